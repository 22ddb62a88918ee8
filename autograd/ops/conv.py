"""conv1d and conv2d: dense and grouped filters over positions, channels last.

    y[.. s .. o] = b[o] + Σ_{i, w} weight[o, i, w] x[.. s stride + w dilation - padding .., i]

x[B T I] or x[B H W I], with zeros outside; weight[O I/groups taps ..], as PyTorch has it, is correlated: not flipped.
Output position s counts 0 .. (T + 2 padding - dilation (taps - 1) - 1) // stride. Output o takes only the o // (O / groups)
-th part of the channels: groups = I is a filter per channel. For other padding than zeros at both ends, or more at one of
them, ``pad`` x first; for a short filter per channel over the past, ``causal_conv1d`` is the faster operator.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from ..errors import DomainError, ShapeError
from ..laws import independent, linear_in
from ..op import op
from .linalg import matmul
from .shape import pad, reshape, stack, transpose


def _each(value, axes: int) -> tuple[int, ...]:
    """One number for each axis of positions."""
    return tuple(value) if axes > 1 and isinstance(value, tuple | list) else (value,) * axes


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _lengths(x, weight, stride, padding, dilation) -> tuple[int, ...]:
    """How many positions the output has."""
    axes = x.ndim - 2
    return tuple((n + 2 * p - d * (w - 1) - 1) // s + 1 for n, w, s, p, d in zip(
        x.shape[1:-1], weight.shape[2:], *(_each(v, axes) for v in (stride, padding, dilation)), strict=True))


def _taps(x, weight, stride, padding, dilation):
    """What each tap sees, in the order of the taps in ``weight``: strided slices [B S .. I] of x with its padding."""
    axes = x.ndim - 2
    lengths = _lengths(x, weight, stride, padding, dilation)
    stride, padding, dilation = (_each(v, axes) for v in (stride, padding, dilation))
    if any(padding):
        x = pad(x, widths=((0, 0), *((p, p) for p in padding), (0, 0)))
    return [x[(slice(None), *(slice(w * d, w * d + (n - 1) * s + 1, s)
                              for w, d, n, s in zip(tap, dilation, lengths, stride, strict=True)))]
            for tap in itertools.product(*map(range, weight.shape[2:]))]


def _by_groups(x, groups):
    """Positions and their channels, group by group: [B S .. I] as [groups R I/groups]."""
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1] // groups
    return transpose(reshape(x, shape=(rows, groups, channels)), axes=(1, 0, 2))


def _matrices(weight, groups):
    """The weight of each tap and group, transposed: [O J taps ..] as [groups taps J O/groups]."""
    out, channels, *taps = weight.shape
    flat = reshape(weight, shape=(groups, out // groups, channels, math.prod(taps)))
    return transpose(flat, axes=(0, 3, 2, 1))


def _assembled(y, like, bias):
    """[groups R O/groups] as [B S .. O], plus the bias."""
    groups, _, out = y.shape
    y = reshape(transpose(y, axes=(1, 0, 2)), shape=(*like.shape[:-1], groups * out))
    return y if bias is None else y + bias


def _columns(x, weight, bias, stride, padding, dilation, groups):
    """What all taps see side by side, times one matrix."""
    windows, matrices = _taps(x, weight, stride, padding, dilation), _matrices(weight, groups)
    _, taps, channels, out = matrices.shape
    rows = math.prod(windows[0].shape[:-1])
    columns = reshape(stack(windows, axis=-2), shape=(rows, taps, groups, channels))
    columns = reshape(transpose(columns, axes=(2, 0, 1, 3)), shape=(groups, rows, taps * channels))
    return _assembled(matmul(columns, reshape(matrices, shape=(groups, taps * channels, out))), windows[0], bias)


def _tap_by_tap(x, weight, bias, stride, padding, dilation, groups):
    """One product for each tap, added up: without the memory for columns."""
    windows, matrices = _taps(x, weight, stride, padding, dilation), _matrices(weight, groups)
    y = None
    for i, part in enumerate(windows):
        term = matmul(_by_groups(part, groups), matrices[:, i])
        y = term if y is None else y + term
    return _assembled(y, windows[0], bias)


@op("x[B T I], weight[O J W], bias?[O] -> y[B S O]", analytic=True,
    laws=[independent("B"), linear_in("x"), linear_in("weight")])
def conv1d(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    """y_s = b + Σ_w weight_w x_{s stride + w dilation - padding}: a filter over positions that mixes the channels.

    x[B T I], weight[O J W] with J = I / groups, bias[O] -> y[B S O], S = (T + 2 padding - dilation (W - 1) - 1) // stride + 1.
    Output channels of one group see the input channels of that group. A weight without taps or longer than the padded x,
    or groups that do not divide, raise ShapeError; a stride, dilation, padding or groups out of range DomainError.
    """
    batch, length, _ = x.shape
    outputs, channels, width = weight.shape
    count = (length + 2 * padding - dilation * (width - 1) - 1) // stride + 1
    out = np.zeros((batch, count, outputs), x.dtype)
    for b, s, o in np.ndindex(out.shape):
        first = o // (outputs // groups) * channels
        for i, w in np.ndindex(channels, width):
            source = s * stride + w * dilation - padding
            if 0 <= source < length:
                out[b, s, o] += weight[o, i, w] * x[b, source, first + i]
        if bias is not None:
            out[b, s, o] += bias[o]
    return out


@conv1d.form
def columns(x, weight, bias, stride, padding, dilation, groups):
    return _columns(x, weight, bias, stride, padding, dilation, groups)


@conv1d.form
def taps(x, weight, bias, stride, padding, dilation, groups):
    return _tap_by_tap(x, weight, bias, stride, padding, dilation, groups)


@op("x[B H W I], weight[O J K L], bias?[O] -> y[B R S O]", analytic=True,
    laws=[independent("B"), linear_in("x"), linear_in("weight")])
def conv2d(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    """y_rs = b + Σ_kl weight_kl x_{r stride + k dilation - padding, s stride + l dilation - padding}: conv1d over two axes.

    x[B H W I], weight[O J K L] with J = I / groups, bias[O] -> y[B R S O]; stride, padding and dilation are one number, or
    one for H and one for W. Sizes and errors are those of conv1d, axis by axis.
    """
    strides, paddings, dilations = (v if isinstance(v, tuple | list) else (v, v) for v in (stride, padding, dilation))
    batch, *sizes, _ = x.shape
    outputs, channels, *taps = weight.shape
    counts = [(sizes[a] + 2 * paddings[a] - dilations[a] * (taps[a] - 1) - 1) // strides[a] + 1 for a in (0, 1)]
    out = np.zeros((batch, *counts, outputs), x.dtype)
    for b, r, s, o in np.ndindex(out.shape):
        first = o // (outputs // groups) * channels
        for i, k, l in np.ndindex(channels, *taps):
            row = r * strides[0] + k * dilations[0] - paddings[0]
            column = s * strides[1] + l * dilations[1] - paddings[1]
            if 0 <= row < sizes[0] and 0 <= column < sizes[1]:
                out[b, r, s, o] += weight[o, i, k, l] * x[b, row, column, first + i]
        if bias is not None:
            out[b, r, s, o] += bias[o]
    return out


@conv2d.form
def columns(x, weight, bias, stride, padding, dilation, groups):
    return _columns(x, weight, bias, stride, padding, dilation, groups)


@conv2d.form
def taps(x, weight, bias, stride, padding, dilation, groups):
    return _tap_by_tap(x, weight, bias, stride, padding, dilation, groups)


def _validate(name):
    def check(x, weight, stride, padding, dilation, groups):
        axes = x.ndim - 2
        for parameter, value, low in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
            numbers = _each(value, axes)
            if len(numbers) != axes or not all(_is_integer(n) and n >= low for n in numbers):
                allowed = f"an integer >= {low}" + f", or {axes} of them" * (axes > 1)
                raise DomainError(f"{name}: {parameter} {value!r}, allowed: {allowed}")
        inputs, outputs = x.shape[-1], weight.shape[0]
        if not _is_integer(groups) or groups < 1:
            raise DomainError(f"{name}: groups {groups!r}, allowed: an integer >= 1")
        if inputs % groups or outputs % groups or weight.shape[1] * groups != inputs:
            raise ShapeError(f"{name}: x {x.shape} has {inputs} channels; with groups = {groups}, weight {weight.shape} needs "
                             f"{inputs} / {groups} as its second size and a first size that {groups} divides")
        for n, taps, p, d in zip(x.shape[1:-1], weight.shape[2:], _each(padding, axes), _each(dilation, axes), strict=True):
            if taps < 1:
                raise ShapeError(f"{name}: weight {weight.shape} needs at least one tap")
            if n + 2 * p <= d * (taps - 1):
                raise ShapeError(f"{name}: weight {weight.shape} with dilation {d} spans {d * (taps - 1) + 1} positions, "
                                 f"x {x.shape} has {n} + 2 · {p} of padding")
    return check


def _inputs(axes):
    def inputs(draw):
        groups, channels, outputs = draw.integer(1, 2), draw.size(0, 2), draw.size(0, 2)
        taps = tuple(draw.size(1, 3) for _ in range(axes))
        stride, padding, dilation = (tuple(draw.integer(low, 2) for _ in range(axes)) for low in (1, 0, 1))
        sizes = tuple(max(1, d * (w - 1) + 1 - 2 * p) + draw.size(0, 3)
                      for w, p, d in zip(taps, padding, dilation, strict=True))
        bias = draw.floats(groups * outputs) if draw.boolean() else None
        params = {"stride": stride, "padding": padding, "dilation": dilation}
        if axes == 1 or draw.boolean():  # one number for all axes
            one = {name: value[0] for name, value in params.items()}
            fits = all(n + 2 * one["padding"] > one["dilation"] * (w - 1) for n, w in zip(sizes, taps, strict=True))
            params = one if fits else params
        return (draw.floats(draw.size(0, 2), *sizes, groups * channels), draw.floats(groups * outputs, channels, *taps),
                bias), {**params, "groups": groups}
    return inputs


for operator, axes in ((conv1d, 1), (conv2d, 2)):
    operator.validate(_validate(operator.name))
    operator.inputs(_inputs(axes))
