"""split_heads and merge_heads: from one vector per token to heads side by side, and back. Each is the adjoint of the other."""

from __future__ import annotations

import numpy as np

from autograd.device import namespace
from autograd.errors import ShapeError
from autograd.op import op


@op("x[B T W] -> ys[*]", view=True, analytic=True)
def split_heads(x, *, heads=(1,)):
    """x[B T W] -> one array [B heads[p] T K] for each part p, K = W / Σ heads: y_p[b, h, t, k] = x[b, t, (first_p + h) K + k].

    ``first_p`` is the number of heads before part p. ShapeError if W does not divide by all heads.
    """
    batch, length, width = x.shape
    size, first = _head_dim(width, heads), 0
    ys = tuple(np.empty((batch, n, length, size), x.dtype) for n in heads)
    for y in ys:
        for b, h, t, k in np.ndindex(y.shape):
            y[b, h, t, k] = x[b, t, (first + h) * size + k]
        first += y.shape[1]
    return ys


@split_heads.primitive
def _(x, heads):
    batch, length, width = x.shape
    ys, first = x.reshape(batch, length, sum(heads), _head_dim(width, heads)).transpose(0, 2, 1, 3), 0
    parts = []
    for n in heads:
        parts.append(ys[:, first : first + n])
        first += n
    return tuple(parts)


split_heads.vjp(lambda g: merge_heads(g if isinstance(g, list) else [g]))


@split_heads.validate
def _(x, heads):
    _head_dim(x.shape[2], heads)


@split_heads.inputs
def _(draw):
    heads = tuple(draw.size(1, 3) for _ in range(draw.size(1, 3)))
    return (draw.floats(draw.size(0, 2), draw.size(0, 3), sum(heads) * draw.size(0, 3)),), {"heads": heads}


@op("ys[*] -> x[*]", variadic=True, view=True, analytic=True)
def merge_heads(ys):
    """Arrays [B heads T K], which may differ in the number of heads -> x[B T K·all heads], split_heads the other way."""
    batch, _, length, size = ys[0].shape
    x, first = np.empty((batch, length, sum(y.shape[1] for y in ys) * size), ys[0].dtype), 0
    for y in ys:
        for b, h, t, k in np.ndindex(y.shape):
            x[b, t, (first + h) * size + k] = y[b, h, t, k]
        first += y.shape[1]
    return x


@merge_heads.primitive
def _(ys):
    if len(ys) > 1 and (whole := _whole(ys)) is not None:
        return whole.reshape(*whole.shape[:2], -1)
    rows = [y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], y.shape[1] * y.shape[3]) for y in ys]
    return rows[0] if len(rows) == 1 else namespace(*rows).concatenate(rows, axis=-1)


def _whole(ys) -> np.ndarray | None:
    """The array [B T heads K] that consists of these views of it, as a kernel may make them; None if there is none."""
    if type(ys[0]) is not np.ndarray:
        return None
    whole, first = ys[0].base, 0
    if type(whole) is not np.ndarray or whole.ndim != 4 or not whole.flags.c_contiguous or not whole.size:
        return None
    heads = whole.transpose(0, 2, 1, 3)
    for y in ys:
        part = heads[:, first : first + y.shape[1]]
        if y.base is not whole or (y.shape, y.strides, y.dtype) != (part.shape, part.strides, part.dtype):
            return None
        if y.__array_interface__["data"] != part.__array_interface__["data"]:
            return None
        first += y.shape[1]
    return whole if first == whole.shape[2] else None


merge_heads.vjp(lambda g, shapes: split_heads(g, heads=tuple(shape[1] for shape in shapes)))


@merge_heads.validate
def _(ys):
    if ys[0].ndim != 4 or any(y.ndim != 4 or _without_heads(y) != _without_heads(ys[0]) for y in ys):
        raise ShapeError(f"merge_heads: needs arrays [B heads T K] of the same B, T and K, got {[y.shape for y in ys]}")


@merge_heads.inputs
def _(draw):
    batch, length, size = draw.size(0, 2), draw.size(0, 3), draw.size(0, 3)
    return ([draw.floats(batch, draw.size(1, 3), length, size) for _ in range(draw.integer(1, 3))],), {}


def _without_heads(y) -> tuple[int, int, int]:
    return y.shape[0], *y.shape[2:]


def _head_dim(width: int, heads: tuple[int, ...]) -> int:
    if not heads or min(heads) < 1 or width % sum(heads):
        raise ShapeError(f"split_heads: width {width} does not divide into heads {heads}: give at least one head to each part, "
                         "and a width that all heads together divide")
    return width // sum(heads)
