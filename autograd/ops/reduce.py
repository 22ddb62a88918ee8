"""Reductions, and softmax. ``axis`` is None (all), an integer, or a tuple in any order; ``()`` reduces nothing.

Empty reductions: sum 0, prod 1, logsumexp -inf, mean NaN; max and min raise. Ties of max and min share the gradient
evenly. NaN propagates, and infinities give what IEEE arithmetic gives. The standard deviation of a constant has gradient 0.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import largest
from ..device import namespace
from ..errors import DomainError, ShapeError
from ..laws import non_finite, shift_invariant
from ..op import op
from ..shapes import broadcasts_to, normalize_axes, normalize_axis, reduced_shape
from ..tensor import Tensor
from .elementwise import exp, fsum, ieee, sqrt, where
from .shape import broadcast_to, flip, pad, reshape, transpose


def _definition(x, axis, keepdims, function, name):
    """Apply a function of a list of floats to every group of elements that the reduction joins."""
    axes = normalize_axes(name, axis, x.ndim)
    kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    groups: dict = {index: [] for index in np.ndindex(kept)}
    for index in np.ndindex(x.shape):
        groups[tuple(i for k, i in enumerate(index) if k not in axes)].append(x[index].item())
    out = np.empty(kept, x.dtype)
    for index, values in groups.items():
        out[index] = ieee(function, values)
    return out.reshape(reduced_shape(x.shape, axes)) if keepdims else out


def _spread(g: Tensor, shape, axis, name) -> Tensor:
    """A reduced gradient (or result) broadcast back over the axes it came from."""
    axes = normalize_axes(name, axis, len(shape))
    return broadcast_to(reshape(g, shape=reduced_shape(shape, axes)), shape=shape)


def _count(shape, axis, name):
    return math.prod(shape[a] for a in normalize_axes(name, axis, len(shape)))


def _reduction_inputs(draw, minimum=0, values="floats"):
    """Reduced axes have at least ``minimum`` elements, kept ones may be empty."""
    ndim = draw.integer(0, 3)
    axes = [None] if minimum > 1 else [None, ()]
    if ndim:
        first, other = draw.integer(-ndim, ndim - 1), draw.integer(-ndim, ndim - 1)
        axes += [first, (first,) if first % ndim == other % ndim else (first, other)]
    axis = draw.choice(axes)
    reduced = normalize_axes("draw", axis, ndim)
    shape = tuple(draw.size(minimum if i in reduced else 0, 4) for i in range(ndim))
    return (getattr(draw, values)(*shape),), {"axis": axis, "keepdims": draw.boolean()}


@op("x[*] -> y[*]", laws=[non_finite()], analytic=True, method=True)
def sum(x, *, axis=None, keepdims=False):
    """Σ x over the axes."""
    return _definition(x, axis, keepdims, fsum, "sum")


sum.primitive(lambda x, axis, keepdims: namespace(x).sum(
    x, axis=normalize_axes("sum", axis, x.ndim), keepdims=keepdims))
sum.vjp(lambda g, x_shape, axis: _spread(g, x_shape, axis, "sum"))
sum.inputs(_reduction_inputs)


@op("x[*] -> y[*]", laws=[non_finite()], analytic=True, method=True)
def mean(x, *, axis=None, keepdims=False):
    """Σ x / n over the axes; NaN for n = 0."""
    return _definition(x, axis, keepdims, lambda v: fsum(v) / len(v) if v else math.nan, "mean")


@mean.form
def composed(x, axis, keepdims):
    count = _count(x.shape, axis, "mean")
    return sum(x, axis=axis, keepdims=keepdims) * (1.0 / count if count else math.nan)


mean.inputs(lambda draw: _reduction_inputs(draw, 1))


def centered(x: Tensor, axis, name: str) -> Tensor:
    """x - mean(x) over the axes, exactly 0 where all values are equal.

    A constant taken from each group first changes nothing else, because x - mean(x) does not depend on it.
    """
    axes = normalize_axes(name, axis, x.ndim)
    first = x.data[tuple(slice(0, 1) if i in axes else slice(None) for i in range(x.ndim))]
    shifted = x - Tensor.wrap(first)
    return shifted - mean(shifted, axis=axis, keepdims=True)


def _scalar_variance(values, ddof):
    values = [v - values[0] for v in values]  # the mean of the differences is not rounded to the precision of the values
    center = fsum(values) / len(values)
    return fsum([(v - center) * (v - center) for v in values]) / (len(values) - ddof)


@op("x[*] -> y[*]", laws=[non_finite(), shift_invariant("x")], analytic=True, method=True)
def var(x, *, axis=None, keepdims=False, ddof=0):
    """Σ (x - mean)² / (n - ddof) over the axes."""
    return _definition(x, axis, keepdims, lambda v: _scalar_variance(v, ddof), "var")


@var.form
def composed(x, axis, keepdims, ddof):
    deviation = centered(x, axis, "var")
    return sum(deviation * deviation, axis=axis, keepdims=keepdims) * (1.0 / (_count(x.shape, axis, "var") - ddof))


@op("x[*] -> y[*]", laws=[non_finite(), shift_invariant("x")], method=True)
def std(x, *, axis=None, keepdims=False, ddof=0):
    """√var; where it is 0 its gradient is 0."""
    return _definition(x, axis, keepdims, lambda v: math.sqrt(_scalar_variance(v, ddof)), "std")


@std.form
def composed(x, axis, keepdims, ddof):
    variance = var(x, axis=axis, keepdims=keepdims, ddof=ddof)
    positive = variance.data > 0
    return where(positive, sqrt(where(positive, variance, 1.0)), variance * 0.0)


def _spread_inputs(draw, values):
    (x,), params = _reduction_inputs(draw, 2, values)
    return (x,), {**params, "ddof": draw.integer(0, 1) if x.ndim else 0}


def _validate_ddof(name):
    def check(x, *, axis, keepdims, ddof):
        count = _count(x.shape, axis, name)
        if count <= ddof:
            raise DomainError(f"{name}: {count} elements with ddof = {ddof}: needs more than ddof elements")
    return check


var.inputs(lambda draw: _spread_inputs(draw, "floats"))
std.inputs(lambda draw: _spread_inputs(draw, "distinct"))  # its derivative jumps where all values are equal
for operator in (var, std):
    operator.validate(_validate_ddof(operator.name))


def _declare_extreme(name, pick):
    def definition(x, *, axis=None, keepdims=False):
        def extreme(values):
            return math.nan if any(v != v for v in values) else pick(values)
        return _definition(x, axis, keepdims, extreme, name)

    definition.__name__ = name
    definition.__doc__ = f"The {name}imum over the axes; NaN propagates, ties share the gradient evenly."
    extreme = op("x[*] -> y[*]", laws=[non_finite()], method=True)(definition)
    extreme.primitive(lambda x, axis, keepdims: getattr(namespace(x), name)(
        x, axis=normalize_axes(name, axis, x.ndim), keepdims=keepdims))

    @extreme.vjp
    def _(g, x, out, axis):
        xp = namespace(x.data)
        top = _spread(out.detach(), x.shape, axis, name).data
        chosen = (x.data == top) | (xp.isnan(x.data) & xp.isnan(top))
        ties = chosen.sum(axis=normalize_axes(name, axis, x.ndim), keepdims=True)
        return _spread(g, x.shape, axis, name) * Tensor.wrap((chosen / ties).astype(x.dtype))

    @extreme.validate
    def _(x, axis, keepdims):
        if x.size == 0 and _count(x.shape, axis, name) == 0:
            raise ShapeError(f"{name}: no element to take the {name}imum of (shape {x.shape}, axis {axis})")

    extreme.inputs(lambda draw: _reduction_inputs(draw, 1, "distinct"))
    return extreme


_max, _min = max, min
max = _declare_extreme("max", _max)
min = _declare_extreme("min", _min)


_ORDS = (1, 2, math.inf)


def _scalar_norm(values, ord):
    if any(v != v for v in values):
        return math.nan
    return {1: math.fsum(map(abs, values)), 2: math.hypot(*values), math.inf: _max(map(abs, values), default=0.0)}[ord]


@op("x[*] -> y[*]", laws=[non_finite()], method=True)
def norm(x, *, axis=None, keepdims=False, ord=2):
    """The length of vectors over the axes: ord 2: √Σ x², 1: Σ |x|, math.inf: max |x|; 0 of nothing, NaN propagates.

    No square over- or underflows. The gradient x / norm, sign(x), or the sign at the largest, shared evenly on ties, is 0
    where the norm is 0; infinities share it as if they were equal. Another ord raises DomainError.
    """
    return _definition(x, axis, keepdims, lambda v: _scalar_norm(v, ord), "norm")


def _scale(x, axes):
    """The largest magnitude over the axes, which are kept, where it is a number other than 0; else 1."""
    top = largest(namespace(x).abs(x), axes)
    return namespace(x).where((top > 0) & (top < math.inf), top, x.dtype.type(1))


@norm.primitive
def _(x, axis, keepdims, ord):
    xp, axes = namespace(x), normalize_axes("norm", axis, x.ndim)
    if ord == 1:
        return xp.sum(xp.abs(x), axis=axes, keepdims=keepdims)
    kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    if ord == 2:
        scale = _scale(x, axes)
        scaled = x / scale
        out = scale * xp.sqrt(xp.sum(scaled * scaled, axis=axes, keepdims=True))
    else:
        out = xp.maximum(largest(xp.abs(x), axes), x.dtype.type(0))
    return out if keepdims else out.reshape(kept)


@norm.vjp
def _(g, x, out, axis, ord):
    xp, axes = namespace(x.data), normalize_axes("norm", axis, x.ndim)
    g, sign = _spread(g, x.shape, axis, "norm"), xp.sign(x.data)
    if ord == 1:
        return g * Tensor.wrap(sign)
    top = _spread(out.detach(), x.shape, axis, "norm").data
    if ord == math.inf:
        chosen = (xp.abs(x.data) == top) | (xp.isnan(x.data) & xp.isnan(top))
        return g * Tensor.wrap((sign * chosen / xp.maximum(chosen.sum(axis=axes, keepdims=True), 1)).astype(x.dtype))
    infinite = xp.isinf(x.data)
    scaled = where(top == math.inf, Tensor.wrap(xp.where(infinite, sign, 0 * sign)), where(infinite, 0.0, x)
                   / Tensor.wrap(_scale(x.data, axes)))
    squares = sum(scaled * scaled, axis=axes, keepdims=True)
    return g * (scaled / sqrt(where(squares.data == 0, 1.0, squares)))


@norm.validate
def _(x, axis, keepdims, ord):
    normalize_axes("norm", axis, x.ndim)
    if ord not in _ORDS:
        raise DomainError(f"norm: ord {ord!r}, allowed: {', '.join(map(str, _ORDS))}")


@norm.inputs
def _(draw):
    (x,), params = _reduction_inputs(draw, values="distinct")
    x = x - np.min(x, initial=0.0) + x.dtype.type(0.5)  # magnitudes that differ, away from the kink at 0
    return (draw.layout(np.where(draw.mask(*x.shape), x, -x)),), {**params, "ord": draw.choice(_ORDS)}


@op("x[*] -> y[*]", laws=[non_finite()], analytic=True, method=True)
def prod(x, *, axis=None, keepdims=False):
    """Π x over the axes. A slope is the product of the others, also where x is 0 or the product under- or overflows."""
    return _definition(x, axis, keepdims, math.prod, "prod")


prod.primitive(lambda x, axis, keepdims: namespace(x).prod(
    x, axis=normalize_axes("prod", axis, x.ndim), keepdims=keepdims))


def _before(x: Tensor) -> Tensor:
    """Π of the elements before each one along the last axis, in log n doublings."""
    step, n = 1, x.shape[-1]
    x = _shifted(x, 1)
    while step < n:
        x, step = x * _shifted(x, step), 2 * step
    return x


def _shifted(x: Tensor, step: int) -> Tensor:
    n = x.shape[-1]
    return pad(x[..., : _max(n - step, 0)], widths=(*((0, 0),) * (x.ndim - 1), (_min(step, n), 0)), value=1.0)


@prod.vjp
def _(g, x, axis):
    axes = normalize_axes("prod", axis, x.ndim)
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    order = kept + axes
    moved = transpose(x, axes=order)
    rows = reshape(moved, shape=(*(x.shape[i] for i in kept), _count(x.shape, axis, "prod")))
    # What stands before times what stands after each element: out / x is none of it where out is 0 or infinite.
    others = _before(rows) * flip(_before(flip(rows, axis=-1)), axis=-1)
    back = transpose(reshape(others, shape=moved.shape), axes=tuple(order.index(i) for i in range(x.ndim)))
    return _spread(g, x.shape, axis, "prod") * back


prod.inputs(_reduction_inputs)


def _scalar_logsumexp(values):
    top = math.nan if any(v != v for v in values) else _max(values, default=-math.inf)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(v - top) for v in values))


@op("x[*] -> y[*]", laws=[non_finite(), shift_invariant("x", moves="y")], method=True)
def logsumexp(x, *, axis=-1, keepdims=False):
    """ln Σ e^x over the axes, without overflow; nothing or only -inf gives -inf with gradient 0; +inf shares evenly.

    A NaN gives NaN.
    """
    return _definition(x, axis, keepdims, _scalar_logsumexp, "logsumexp")


@logsumexp.primitive
def _(x, axis, keepdims):
    xp = namespace(x)
    axes = normalize_axes("logsumexp", axis, x.ndim)
    top = largest(x, axes)
    shift = xp.where(xp.isinf(top), x.dtype.type(0), top)
    with np.errstate(divide="ignore", over="ignore"):
        out = xp.log(xp.sum(xp.exp(x - shift), axis=axes, keepdims=True)) + shift
    out = xp.where(xp.isinf(top), top, out)
    return out if keepdims else out.reshape(tuple(n for i, n in enumerate(x.shape) if i not in axes))


@logsumexp.vjp
def _(g, x, out, axis):
    xp = namespace(x.data)
    axes = normalize_axes("logsumexp", axis, x.ndim)
    total = _spread(out.detach(), x.shape, axis, "logsumexp")
    infinite = xp.isinf(total.data)
    # e^(x - out) loses digits where out is large, so its sum is divided out again: the weights of a row sum to 1.
    weights = exp(where(infinite, 0.0, x) - where(infinite, 0.0, total))
    weights = weights / sum(weights, axis=axes, keepdims=True)
    if not bool(infinite.any()):
        return _spread(g, x.shape, axis, "logsumexp") * weights
    top = (x.data == math.inf) & (total.data == math.inf)
    share = top / xp.maximum(top.sum(axis=axes, keepdims=True), 1)
    weights = where(infinite, Tensor.wrap(share.astype(x.dtype)), weights)
    return _spread(g, x.shape, axis, "logsumexp") * weights


@logsumexp.inputs
def _(draw):
    return _reduction_inputs(draw)


def _validate_mask(name):
    def check(x, mask, *, axis):
        normalize_axis(name, axis, x.ndim)
        if mask is not None and not broadcasts_to(mask.shape, x.shape):
            raise ShapeError(f"{name}: mask {mask.shape} does not broadcast to x {x.shape}")
    return check


def _softmax_inputs(draw):
    shape = tuple(draw.size(0, 4) for _ in range(draw.integer(1, 3)))
    mask = None if draw.boolean() else draw.mask(*shape[draw.integer(0, 1):])
    return (draw.floats(*shape), mask), {"axis": draw.integer(-len(shape), len(shape) - 1)}


def _masked_rows(x, mask, axis):
    """Iterate over (index of a row, values less the largest, mask, their logsumexp under the mask) of an axis, if that is
    finite or NaN.

    It is NaN for +inf as well. Rows without anything allowed, or with -inf only, are left out.
    """
    axis = normalize_axis("softmax", axis, x.ndim)
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    for index in np.ndindex((*x.shape[:axis], *x.shape[axis + 1:])):
        row = (*index[:axis], slice(None), *index[axis:])
        top = np.max(x[row], initial=-math.inf, where=mask[row]).item()
        values = [v - top if math.isfinite(top) else v for v in x[row].tolist()]  # else the logsumexp is rounded as they are
        total = _scalar_logsumexp([v for v, a in zip(values, mask[row], strict=True) if a])
        if total != -math.inf:
            yield row, values, mask[row].tolist(), math.nan if total == math.inf else total


@op("x[*], mask?:bool[*] -> y[*]", laws=[non_finite(), shift_invariant("x")], method=True)
def softmax(x, mask=None, *, axis=-1):
    """e^x / Σ e^x along the axis over the positions where mask is True; elsewhere 0.

    A row without any (or with only -inf) gives zeros with gradient 0. A +inf or NaN at one of them makes the whole row NaN.
    """
    out = np.zeros_like(x)
    for row, values, allowed, total in _masked_rows(x, mask, axis):
        out[row] = [math.exp(v - total) if a or total != total else 0.0 for v, a in zip(values, allowed, strict=True)]
    return out


@softmax.primitive
def _(x, mask, axis):
    xp = namespace(x)
    if mask is not None:
        x = xp.where(mask, x, x.dtype.type(-math.inf))
    top = largest(x, (normalize_axis("softmax", axis, x.ndim),))
    with np.errstate(invalid="ignore"):
        weights = xp.exp(x - xp.where(top == -math.inf, x.dtype.type(0), top))
    total = weights.sum(axis=axis, keepdims=True)
    return weights / xp.where(total == 0, x.dtype.type(1), total)


@softmax.vjp
def _(g, out, axis):
    return out * (g - sum(g * out, axis=axis, keepdims=True))


softmax.validate(_validate_mask("softmax"))
softmax.inputs(_softmax_inputs)


@op("x[*], mask?:bool[*] -> y[*]", laws=[non_finite(), shift_invariant("x")], method=True)
def log_softmax(x, mask=None, *, axis=-1):
    """x - ln Σ e^x along the axis over the positions where mask is True; elsewhere -inf with gradient 0.

    A row without any (or with only -inf) gives -inf with gradient 0. A +inf or NaN at one of them makes the whole row NaN.
    """
    out = np.full_like(x, -math.inf)
    for row, values, allowed, total in _masked_rows(x, mask, axis):
        out[row] = [v - total if a or total != total else -math.inf for v, a in zip(values, allowed, strict=True)]
    return out


@log_softmax.primitive
def _(x, mask, axis):
    xp = namespace(x)
    if mask is not None:
        x = xp.where(mask, x, x.dtype.type(-math.inf))
    top = largest(x, (normalize_axis("log_softmax", axis, x.ndim),))
    with np.errstate(divide="ignore", invalid="ignore"):
        shifted = x - xp.where(top == -math.inf, x.dtype.type(0), top)
        total = xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True))
        return xp.where(top == -math.inf, x.dtype.type(-math.inf), shifted - total)


@log_softmax.vjp
def _(g, x, mask, out, axis):
    hidden = out.data == -math.inf
    g = where(hidden, 0.0, g)
    probabilities = where(hidden, 0.0, exp(where(hidden, 0.0, out)))
    return where(hidden, 0.0, g - probabilities * sum(g, axis=axis, keepdims=True))


log_softmax.validate(_validate_mask("log_softmax"))
log_softmax.inputs(_softmax_inputs)
