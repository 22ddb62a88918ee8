"""Reductions and scans. ``axis`` is None (all), an integer, or a tuple in any order; ``()`` reduces nothing.

Empty reductions: sum 0, prod 1, logsumexp -inf, mean NaN; max and min raise. Ties of max and min share the gradient
evenly; NaN propagates. The standard deviation of a constant has gradient 0.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import largest
from ..device import namespace
from ..errors import DomainError, ShapeError
from ..laws import shift_invariant
from ..op import op
from ..shapes import broadcasts_to, normalize_axes, normalize_axis, reduced_shape
from ..tensor import Tensor
from .elementwise import exp, sqrt, where
from .shape import broadcast_to, flip, pad, reshape


def _definition(x, axis, keepdims, function, name):
    """Apply a function of a list of floats to every group of elements that the reduction joins."""
    axes = normalize_axes(name, axis, x.ndim)
    kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    groups: dict = {index: [] for index in np.ndindex(kept)}
    for index in np.ndindex(x.shape):
        groups[tuple(i for k, i in enumerate(index) if k not in axes)].append(x[index].item())
    out = np.empty(kept, x.dtype)
    for index, values in groups.items():
        out[index] = function(values)
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


@op("x[*] -> y[*]", analytic=True)
def sum(x, *, axis=None, keepdims=False):
    """Σ x over the axes."""
    return _definition(x, axis, keepdims, math.fsum, "sum")


sum.primitive(lambda x, *, axis=None, keepdims=False: namespace(x).sum(
    x, axis=normalize_axes("sum", axis, x.ndim), keepdims=keepdims))
sum.vjp(lambda g, x_shape, axis: _spread(g, x_shape, axis, "sum"))
sum.inputs(_reduction_inputs)


@op("x[*] -> y[*]", analytic=True)
def mean(x, *, axis=None, keepdims=False):
    """Σ x / n over the axes; NaN for n = 0."""
    return _definition(x, axis, keepdims, lambda v: math.fsum(v) / len(v) if v else math.nan, "mean")


@mean.form
def composed(x, *, axis=None, keepdims=False):
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
    center = math.fsum(values) / len(values)
    return math.fsum((v - center) ** 2 for v in values) / (len(values) - ddof)


@op("x[*] -> y[*]", analytic=True, laws=[shift_invariant("x")])
def var(x, *, axis=None, keepdims=False, ddof=0):
    """Σ (x - mean)² / (n - ddof) over the axes."""
    return _definition(x, axis, keepdims, lambda v: _scalar_variance(v, ddof), "var")


@var.form
def composed(x, *, axis=None, keepdims=False, ddof=0):
    deviation = centered(x, axis, "var")
    return sum(deviation * deviation, axis=axis, keepdims=keepdims) * (1.0 / (_count(x.shape, axis, "var") - ddof))


@op("x[*] -> y[*]", laws=[shift_invariant("x")])
def std(x, *, axis=None, keepdims=False, ddof=0):
    """√var; where it is 0 its gradient is 0."""
    return _definition(x, axis, keepdims, lambda v: math.sqrt(_scalar_variance(v, ddof)), "std")


@std.form
def composed(x, *, axis=None, keepdims=False, ddof=0):
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
    extreme = op("x[*] -> y[*]")(definition)
    extreme.primitive(lambda x, *, axis=None, keepdims=False: getattr(namespace(x), name)(
        x, axis=normalize_axes(name, axis, x.ndim), keepdims=keepdims))

    @extreme.vjp
    def _(g, x, out, axis):
        xp = namespace(x.data)
        top = _spread(out.detach(), x.shape, axis, name).data
        chosen = (x.data == top) | (xp.isnan(x.data) & xp.isnan(top))
        ties = chosen.sum(axis=normalize_axes(name, axis, x.ndim), keepdims=True)
        return _spread(g, x.shape, axis, name) * Tensor.wrap((chosen / ties).astype(x.dtype))

    @extreme.validate
    def _(x, *, axis, keepdims):
        if x.size == 0 and _count(x.shape, axis, name) == 0:
            raise ShapeError(f"{name}: no element to take the {name}imum of (shape {x.shape}, axis {axis})")

    extreme.inputs(lambda draw: _reduction_inputs(draw, 1, "distinct"))
    return extreme


_max, _min = max, min
max = _declare_extreme("max", _max)
min = _declare_extreme("min", _min)


@op("x[*] -> y[*]")
def prod(x, *, axis=None, keepdims=False):
    """Π x over the axes; the gradient is right for any number of zeros."""
    return _definition(x, axis, keepdims, math.prod, "prod")


prod.primitive(lambda x, *, axis=None, keepdims=False: namespace(x).prod(
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
def _(g, x, out, axis):
    from .shape import transpose

    g = _spread(g, x.shape, axis, "prod")
    if bool((x.data != 0).all()):
        return g * _spread(out, x.shape, axis, "prod") / x
    # A zero forbids dividing by x: multiply what stands before and what stands after each element.
    axes = normalize_axes("prod", axis, x.ndim)
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    order = kept + axes
    moved = transpose(x, axes=order)
    lead, n = tuple(x.shape[i] for i in kept), _count(x.shape, axis, "prod")
    rows = reshape(moved, shape=(*lead, n))
    others = _before(rows) * flip(_before(flip(rows, axis=-1)), axis=-1)
    back = transpose(reshape(others, shape=moved.shape), axes=tuple(order.index(i) for i in range(x.ndim)))
    return g * back


prod.inputs(_reduction_inputs)


def _scalar_logsumexp(values):
    top = _max(values, default=-math.inf)
    if math.isinf(top) or math.isnan(math.fsum(values) if not math.isinf(top) else 0.0):
        return top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


@op("x[*] -> y[*]", laws=[shift_invariant("x", moves="y")])
def logsumexp(x, *, axis=-1, keepdims=False):
    """ln Σ e^x over the axes, without overflow; nothing or only -inf gives -inf with gradient 0; +inf shares evenly."""
    return _definition(x, axis, keepdims, _scalar_logsumexp, "logsumexp")


@logsumexp.primitive
def _(x, *, axis=-1, keepdims=False):
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


@op("x[*] -> y[*]", analytic=True)
def cumsum(x, *, axis=-1):
    """y_t = Σ_{s <= t} x_s along the axis."""
    axis = normalize_axis("cumsum", axis, x.ndim)
    out = x.copy()
    for index in np.ndindex(x.shape):
        if index[axis]:
            out[index] = out[(*index[:axis], index[axis] - 1, *index[axis + 1:])] + x[index]
    return out


cumsum.primitive(lambda x, *, axis=-1: namespace(x).cumsum(x, axis=normalize_axis("cumsum", axis, x.ndim)))
cumsum.vjp(lambda g, axis: flip(cumsum(flip(g, axis=axis), axis=axis), axis=axis))


@cumsum.inputs
def _(draw):
    shape = tuple(draw.size(0, 4) for _ in range(draw.integer(1, 3)))
    return (draw.floats(*shape),), {"axis": draw.integer(-len(shape), len(shape) - 1)}


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
    """Iterate over (index of the row, values, mask) of an axis."""
    axis = normalize_axis("softmax", axis, x.ndim)
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    for index in np.ndindex((*x.shape[:axis], *x.shape[axis + 1:])):
        row = (*index[:axis], slice(None), *index[axis:])
        yield row, x[row].tolist(), mask[row].tolist()


@op("x[*], mask?:bool[*] -> y[*]", laws=[shift_invariant("x")])
def softmax(x, mask=None, *, axis=-1):
    """e^x / Σ e^x along the axis over the positions where mask is True; elsewhere 0.

    A row without any (or with only -inf) gives zeros with gradient 0. A +inf or NaN gives NaN in its row.
    """
    out = np.zeros_like(x)
    for row, values, allowed in _masked_rows(x, mask, axis):
        top = _max([v for v, a in zip(values, allowed, strict=True) if a], default=-math.inf)
        total = _scalar_logsumexp([v - top for v, a in zip(values, allowed, strict=True) if a])
        out[row] = [math.exp(v - top - total) if a and top != -math.inf else 0.0
                    for v, a in zip(values, allowed, strict=True)]
    return out


@softmax.primitive
def _(x, mask=None, *, axis=-1):
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
    return out * (g - sum(g * out, axis=axis, keepdims=True)), None


softmax.validate(_validate_mask("softmax"))
softmax.inputs(_softmax_inputs)


@op("x[*], mask?:bool[*] -> y[*]", laws=[shift_invariant("x")])
def log_softmax(x, mask=None, *, axis=-1):
    """x - ln Σ e^x along the axis over the positions where mask is True; elsewhere -inf with gradient 0."""
    out = np.full_like(x, -math.inf)
    for row, values, allowed in _masked_rows(x, mask, axis):
        top = _max([v for v, a in zip(values, allowed, strict=True) if a], default=-math.inf)
        total = _scalar_logsumexp([v - top for v, a in zip(values, allowed, strict=True) if a])
        out[row] = [v - top - total if a and top != -math.inf else -math.inf for v, a in zip(values, allowed, strict=True)]
    return out


@log_softmax.primitive
def _(x, mask=None, *, axis=-1):
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
    return where(hidden, 0.0, g - probabilities * sum(g, axis=axis, keepdims=True)), None


log_softmax.validate(_validate_mask("log_softmax"))
log_softmax.inputs(_softmax_inputs)
