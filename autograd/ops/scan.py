"""Scans: y_t is made of x_0 .. x_t along an axis. A gradient is a scan from the other end."""

from __future__ import annotations

import math

import numpy as np

from ..device import namespace
from ..laws import identity, non_finite
from ..metric import assert_close
from ..op import op
from ..shapes import normalize_axis
from ..tensor import Tensor
from .elementwise import exp, where
from .reduce import logsumexp
from .shape import concat, flip, pad, swapaxes


def _scan(x, axis, name, combine):
    """y_0 = x_0, y_t = combine(y_{t-1}, x_t) along the axis, element by element."""
    axis = normalize_axis(name, axis, x.ndim)
    out = x.copy()
    for index in np.ndindex(x.shape):
        if index[axis]:
            out[index] = combine(out[(*index[:axis], index[axis] - 1, *index[axis + 1:])], x[index])
    return out


def _doublings(x, combine):
    """The same scan of arrays along the last axis for an associative function, in log n steps."""
    step, out = 1, x.copy()
    while step < x.shape[-1]:
        out[..., step:] = combine(out[..., :-step], out[..., step:])
        step *= 2
    return out


def _recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_0 = b_0, h_t = a_t h_{t-1} + b_t along the last axis, in log n doublings."""
    step = 1
    while step < b.shape[-1]:
        b = concat([b[..., :step], a[..., step:] * b[..., :-step] + b[..., step:]], axis=-1)
        a = concat([a[..., :step], a[..., step:] * a[..., :-step]], axis=-1)
        step *= 2
    return b


def _reverse_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_t = b_t + a_{t+1} h_{t+1} along the last axis, from its end."""
    return flip(_recurrence(_delayed(flip(a, axis=-1)), flip(b, axis=-1)), axis=-1)


def _delayed(x: Tensor) -> Tensor:
    """1, x_0, x_1, ... along the last axis, which is not empty."""
    return pad(x[..., :-1], widths=(*((0, 0),) * (x.ndim - 1), (1, 0)), value=1.0)


def _scan_inputs(draw):
    shape = tuple(draw.size(0, 4) for _ in range(draw.integer(1, 3)))
    return (draw.floats(*shape),), {"axis": draw.integer(-len(shape), len(shape) - 1)}


@op("x[*] -> y[*]", laws=[non_finite()], analytic=True, method=True)
def cumsum(x, *, axis=-1):
    """y_t = Σ_{s <= t} x_s along the axis."""
    return _scan(x, axis, "cumsum", lambda y, v: y + v)


cumsum.primitive(lambda x, axis: namespace(x).cumsum(x, axis=normalize_axis("cumsum", axis, x.ndim)))
cumsum.vjp(lambda g, axis: flip(cumsum(flip(g, axis=axis), axis=axis), axis=axis))
cumsum.inputs(_scan_inputs)


@op("x[*] -> y[*]", laws=[non_finite()], analytic=True, method=True)
def cumprod(x, *, axis=-1):
    """y_t = Π_{s <= t} x_s along the axis, of the shape of x; the gradient is right for any number of zeros.

    An axis that x does not have raises ShapeError.
    """
    return _scan(x, axis, "cumprod", lambda y, v: y * v)


cumprod.primitive(lambda x, axis: namespace(x).cumprod(x, axis=normalize_axis("cumprod", axis, x.ndim)))


@cumprod.vjp
def _(g, x, out, axis):
    if not x.size:
        return g
    g, x, out = (swapaxes(t, axis, -1) for t in (g, x, out))
    # dy_t/dx_s = (Π before s) (Π after s, up to t): nothing is divided by x.
    return swapaxes(_delayed(out) * _reverse_recurrence(x, g), axis, -1)


@cumprod.inputs
def _(draw):
    (x,), params = _scan_inputs(draw)
    return ((x if draw.boolean() else draw.layout(np.where(draw.mask(*x.shape), x, x.dtype.type(0)))),), params


def _ends_in_logsumexp(case, draw):
    if case.x.shape[case.axis]:
        whole = logsumexp.definition(case.x, axis=case.axis)
        assert_close(np.take(case().y, -1, case.axis), whole, "the last is not logsumexp")


@op("x[*] -> y[*]", laws=[identity("the last is logsumexp", _ends_in_logsumexp)], method=True)
def logcumsumexp(x, *, axis=-1):
    """y_t = ln Σ_{s <= t} e^x_s along the axis, of the shape of x, without overflow.

    Only -inf so far gives -inf with gradient 0; from the first +inf on, those that have come share the gradient evenly;
    a NaN stays. An axis that x does not have raises ShapeError.
    """
    return _scan(x, axis, "logcumsumexp", np.logaddexp)


@logcumsumexp.primitive
def _(x, axis):
    axis = normalize_axis("logcumsumexp", axis, x.ndim)
    return _doublings(x.swapaxes(axis, -1), namespace(x).logaddexp).swapaxes(axis, -1)


@logcumsumexp.vjp
def _(g, x, axis):
    if not x.size:
        return g
    g, x = swapaxes(g, axis, -1), swapaxes(x, axis, -1)
    xp = namespace(x.data)
    # Relative to the running maximum m, the sums are s_t = e^(m_{t-1} - m_t) s_{t-1} + e^(x_t - m_t), whatever x's offset.
    m = _doublings(x.data, xp.maximum)
    decay = xp.ones(m.shape, m.dtype)
    with np.errstate(invalid="ignore"):
        decay[..., 1:] = xp.where(m[..., 1:] == m[..., :-1], decay[..., 1:], xp.exp(m[..., :-1] - m[..., 1:]))
    infinite, decay = m == math.inf, Tensor.wrap(decay)
    share = Tensor.wrap((x.data == math.inf).astype(x.dtype))
    shifted = where(infinite, 0.0, x) - Tensor.wrap(xp.where(xp.isinf(m), x.dtype.type(0), m))
    e = where(infinite, share, exp(shifted))
    sums = _recurrence(decay, e)
    nothing = sums.data == 0
    return swapaxes(e * _reverse_recurrence(decay, where(nothing, 0.0, g / where(nothing, 1.0, sums))), axis, -1)


logcumsumexp.inputs(_scan_inputs)
