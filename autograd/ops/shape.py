"""Operators that move elements without changing them. All are linear; each gradient is another operator of this page."""

from __future__ import annotations

import itertools
import math

import numpy as np

from ..device import beside, namespace, plain
from ..errors import DomainError, ShapeError
from ..laws import non_finite
from ..op import op
from ..shapes import broadcast_axes, broadcasts_to, normalize_axes, normalize_axis
from .index import gather, getitem


def _axis_draw(draw, low=1, high=3):
    shape = tuple(draw.size(0, 4) for _ in range(draw.integer(low, high)))
    return shape, draw.integer(-len(shape), len(shape) - 1)


def target_shape(name: str, old: tuple[int, ...], shape) -> tuple[int, ...]:
    """``shape`` with its one -1 replaced; a size that does not fit raises ShapeError."""
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    size = math.prod(old)
    if math.prod(shape) == size and (not shape or min(shape) >= 0):
        return shape
    known = math.prod([n for n in shape if n != -1])
    if shape.count(-1) > 1 or any(n < -1 for n in shape):
        raise ShapeError(f"{name}: shape {shape} may have one -1 and no other negative size")
    if -1 in shape:
        if known == 0:
            raise ShapeError(f"{name}: the -1 in {shape} is ambiguous because the other sizes multiply to 0")
        shape = tuple(size // known if n == -1 else n for n in shape)
    if math.prod(shape) != size:
        raise ShapeError(f"{name}: {old} has {size} elements, {shape} has {math.prod(shape)}")
    return shape


@op("x[*] -> y[*]", view=True, analytic=True)
def reshape(x, *, shape=()):
    """The same elements in C order under another shape; one size may be -1."""
    out = np.empty(target_shape("reshape", x.shape, shape), x.dtype)
    for source, target in zip(np.ndindex(x.shape), np.ndindex(out.shape), strict=True):
        out[target] = x[source]
    return out


reshape.primitive(lambda x, shape: x.reshape(target_shape("reshape", x.shape, shape)))
reshape.vjp(lambda g, x_shape: reshape(g, shape=x_shape))


@reshape.inputs
def _(draw):
    a, b, c = (draw.size(0, 3) for _ in range(3))
    return (draw.floats(a, b, c),), {"shape": draw.choice([(a * b, c), (c, b, a), (a, 1, b * c), (a * b * c,)])}


def _permutation(axes, ndim):
    if axes is None:
        return tuple(reversed(range(ndim)))
    normal = tuple(normalize_axis("transpose", a, ndim) for a in axes)
    if sorted(normal) != list(range(ndim)):
        raise ShapeError(f"transpose: axes {tuple(axes)} are not a permutation of the {ndim} axes")
    return normal


@op("x[*] -> y[*]", view=True, analytic=True)
def transpose(x, *, axes=None):
    """y[i_axes[0], i_axes[1], ...] = x[i_0, i_1, ...]; None reverses all axes."""
    order = _permutation(axes, x.ndim)
    out = np.empty(tuple(x.shape[a] for a in order), x.dtype)
    for index in np.ndindex(x.shape):
        out[tuple(index[a] for a in order)] = x[index]
    return out


transpose.primitive(lambda x, axes: x.transpose(_permutation(axes, x.ndim)))


@transpose.vjp
def _(g, axes):
    order = _permutation(axes, g.ndim)
    return transpose(g, axes=tuple(order.index(i) for i in range(g.ndim)))


@transpose.inputs
def _(draw):
    shape = draw.shape(0, 4, 3)
    axes = [a - len(shape) * draw.integer(0, 1) for a in draw.generator().permutation(len(shape)).tolist()]
    return (draw.floats(*shape),), {"axes": draw.choice((None, tuple(axes)))}


@op("x[*] -> y[*]", analytic=True, method=True)
def swapaxes(x, *, axis1=-1, axis2=-2):
    """Two axes exchanged."""
    order = list(range(x.ndim))
    a, b = (normalize_axis("swapaxes", axis, x.ndim) for axis in (axis1, axis2))
    order[a], order[b] = order[b], order[a]
    return transpose.definition(x, axes=order)


@swapaxes.form
def composed(x, axis1, axis2):
    order = list(range(x.ndim))
    a, b = (normalize_axis("swapaxes", axis, x.ndim) for axis in (axis1, axis2))
    order[a], order[b] = order[b], order[a]
    return transpose(x, axes=tuple(order))


@swapaxes.inputs
def _(draw):
    shape, axis1 = _axis_draw(draw)
    return (draw.floats(*shape),), {"axis1": axis1, "axis2": draw.integer(-len(shape), len(shape) - 1)}


@op("x[*] -> y[*]", view=True, analytic=True, method=True)
def broadcast_to(x, *, shape=()):
    """x repeated to ``shape`` by NumPy's broadcasting; the gradient sums over the repeats."""
    out = np.empty(shape, x.dtype)
    lead = len(shape) - x.ndim
    for index in np.ndindex(tuple(shape)):
        out[index] = x[tuple(0 if n == 1 else i for i, n in zip(index[lead:], x.shape, strict=True))]
    return out


broadcast_to.primitive(lambda x, shape: namespace(x).broadcast_to(x, tuple(shape)))
broadcast_to.vjp(lambda g, x_shape: sum_to(g, shape=x_shape))


@broadcast_to.validate
def _(x, shape):
    if not isinstance(shape, tuple | list) or min(shape, default=0) < 0 or not broadcasts_to(x.shape, tuple(shape)):
        raise ShapeError(f"broadcast_to: {x.shape} does not broadcast to {shape}")


@broadcast_to.inputs
def _(draw):
    shape = draw.shape(0, 3)
    source = tuple(1 if draw.boolean() else n for n in shape)
    return (draw.floats(*source),), {"shape": draw.shape(0, 2, 3) + shape}


@op("x[*] -> y[*]", view=True, analytic=True, method=True)
def sum_to(x, *, shape=()):
    """The sum of x over the places to which broadcasting repeats each element of an array of ``shape``."""
    out = np.zeros(shape, x.dtype)
    lead = x.ndim - len(shape)
    for index in np.ndindex(x.shape):
        out[tuple(0 if n == 1 else i for i, n in zip(index[lead:], shape, strict=True))] += x[index]
    return out


@sum_to.primitive
def _(x, shape):
    return x.sum(axis=broadcast_axes(tuple(shape), x.shape)).reshape(shape)


sum_to.vjp(lambda g, x_shape: broadcast_to(g, shape=x_shape))


@sum_to.validate
def _(x, shape):
    if not isinstance(shape, tuple | list) or min(shape, default=0) < 0 or not broadcasts_to(tuple(shape), x.shape):
        raise ShapeError(f"sum_to: {shape} does not broadcast to {x.shape}")


@sum_to.inputs
def _(draw):
    (x,), params = broadcast_to.draw(draw)
    return (draw.floats(*params["shape"]),), {"shape": x.shape}


def concat_axis(arrays, axis):
    axis = normalize_axis("concat", axis, arrays[0].ndim)
    for i, a in enumerate(arrays):
        if a.ndim != arrays[0].ndim or any(m != n for k, (m, n) in enumerate(zip(a.shape, arrays[0].shape, strict=True))
                                           if k != axis):
            raise ShapeError(f"concat: xs[{i}] has shape {a.shape}, xs[0] has {arrays[0].shape}: only axis {axis} may differ")
    return axis


@op("xs[*] -> y[*]", variadic=True, analytic=True)
def concat(xs, *, axis=0):
    """The tensors one after another along an axis."""
    axis = concat_axis(xs, axis)
    shape = list(xs[0].shape)
    shape[axis] = sum(x.shape[axis] for x in xs)
    out, start = np.empty(shape, xs[0].dtype), 0
    for x in xs:
        for index in np.ndindex(x.shape):
            out[(*index[:axis], start + index[axis], *index[axis + 1:])] = x[index]
        start += x.shape[axis]
    return out


concat.primitive(lambda xs, axis: namespace(*xs).concatenate(xs, concat_axis(xs, axis)))


@concat.vjp
def _(g, shapes, axis):
    return split(g, sizes=tuple(s[axis] for s in shapes), axis=axis)


@concat.inputs
def _(draw):
    shape, axis = _axis_draw(draw)
    parts = [tuple(draw.size(0, 3) if i == axis % len(shape) else n for i, n in enumerate(shape))
             for _ in range(draw.integer(1, 3))]
    return ([draw.floats(*s) for s in parts],), {"axis": axis}


def _sizes(x, sizes, axis):
    axis = normalize_axis("split", axis, x.ndim)
    total = x.shape[axis]
    if isinstance(sizes, int | np.integer):
        if sizes < 1 or total % sizes:
            raise ShapeError(f"split: axis {axis} has size {total}, which does not divide into {sizes} equal parts")
        return axis, (total // int(sizes),) * int(sizes)
    if sum(sizes) != total or any(n < 0 for n in sizes):
        raise ShapeError(f"split: sizes {tuple(sizes)} do not add up to {total}, the size of axis {axis}")
    return axis, tuple(sizes)


def _pieces(x, sizes, axis):
    axis, sizes = _sizes(x, sizes, axis)
    bounds = np.cumsum((0, *sizes)).tolist()
    return tuple(x[(slice(None),) * axis + (slice(a, b),)] for a, b in itertools.pairwise(bounds))


@op("x[*] -> ys[*]", view=True, analytic=True, method=True)
def split(x, *, sizes=1, axis=-1):
    """A tuple of pieces along an axis: ``sizes`` is a number of equal parts or a list of sizes."""
    axis, sizes = _sizes(x, sizes, axis)
    pieces, start = [], 0
    for size in sizes:
        piece = np.empty((*x.shape[:axis], size, *x.shape[axis + 1:]), x.dtype)
        for index in np.ndindex(piece.shape):
            piece[index] = x[(*index[:axis], start + index[axis], *index[axis + 1:])]
        pieces.append(piece)
        start += size
    return tuple(pieces)


split.primitive(lambda x, sizes, axis: _pieces(x, sizes, axis))
split.vjp(lambda g, axis: concat(g if isinstance(g, list) else [g], axis=axis))


@split.inputs
def _(draw):
    shape, axis = _axis_draw(draw)
    parts = [draw.size(0, 3) for _ in range(draw.integer(1, 3))]
    shape = tuple(sum(parts) if i == axis % len(shape) else n for i, n in enumerate(shape))
    return (draw.floats(*shape),), {"sizes": tuple(parts), "axis": axis}


@op("xs[*] -> y[*]", variadic=True, analytic=True)
def stack(xs, *, axis=0):
    """Tensors of one shape side by side along a new axis."""
    axis = normalize_axis("stack", axis, xs[0].ndim + 1)
    out = np.empty((*xs[0].shape[:axis], len(xs), *xs[0].shape[axis:]), xs[0].dtype)
    for i, x in enumerate(xs):
        for index in np.ndindex(x.shape):
            out[(*index[:axis], i, *index[axis:])] = x[index]
    return out


@stack.form
def composed(xs, axis):
    axis = normalize_axis("stack", axis, xs[0].ndim + 1)
    if any(x.shape != xs[0].shape for x in xs):
        raise ShapeError(f"stack: all shapes must be equal, got {[x.shape for x in xs]}")
    shape = (*xs[0].shape[:axis], 1, *xs[0].shape[axis:])
    return concat([reshape(x, shape=shape) for x in xs], axis=axis)


@stack.inputs
def _(draw):
    shape = draw.shape(0, 2)
    return ([draw.floats(*shape) for _ in range(draw.integer(1, 3))],), {"axis": draw.integer(-len(shape) - 1, len(shape))}


def _widths(name, widths, ndim):
    widths = tuple((w, w) if isinstance(w, int | np.integer) else tuple(w) for w in widths)
    if len(widths) != ndim or any(len(w) != 2 or min(w) < 0 for w in widths):
        raise ShapeError(f"{name}: widths {widths} must be one (before, after) pair of sizes >= 0 for each of {ndim} axes")
    return widths


@op("x[*] -> y[*]", analytic=True)
def pad(x, *, widths=(), value=0.0):
    """x surrounded by ``value``: ``widths`` is one (before, after) pair per axis."""
    widths = _widths("pad", widths, x.ndim)
    out = np.full(tuple(n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)), value, x.dtype)
    for index in np.ndindex(x.shape):
        out[tuple(i + a for i, (a, _) in zip(index, widths, strict=True))] = x[index]
    return out


@pad.primitive
def _(x, widths, value):
    return namespace(x).pad(x, _widths("pad", widths, x.ndim) or (), constant_values=value) if x.ndim else x.copy()


@pad.vjp
def _(g, x_shape, widths):
    pairs = _widths("pad", widths, g.ndim)
    return getitem(g, key=tuple(slice(a, a + n) for n, (a, _) in zip(x_shape, pairs, strict=True)))


@pad.inputs
def _(draw):
    shape = draw.shape(0, 3, 3)
    return (draw.floats(*shape),), {"widths": tuple((draw.size(0, 2), draw.size(0, 2)) for _ in shape),
                                    "value": draw.choice((0.0, -1.5))}


@op("x[*] -> y[*]", view=True, analytic=True, method=True)
def flip(x, *, axis=None):
    """The order reversed along the axes (None: all)."""
    axes = normalize_axes("flip", axis, x.ndim)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        out[tuple(n - 1 - i if k in axes else i for k, (i, n) in enumerate(zip(index, x.shape, strict=True)))] = x[index]
    return out


flip.primitive(lambda x, axis: namespace(x).flip(x, normalize_axes("flip", axis, x.ndim)))
flip.vjp(lambda g, axis: flip(g, axis=axis))


@flip.inputs
def _(draw):
    shape, axis = _axis_draw(draw)
    return (draw.floats(*shape),), {"axis": draw.choice((None, axis, tuple(range(len(shape)))))}


def _shifts(shift, axis, ndim):
    shifts = shift if isinstance(shift, tuple | list) else (shift,)
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if not all(isinstance(s, int | np.integer) for s in shifts):
        raise ShapeError(f"roll: shift must be an integer or integers, got {shift!r}")
    if len(shifts) != len(axes):
        raise ShapeError(f"roll: {len(shifts)} shifts for {len(axes)} axes")
    return tuple(int(s) for s in shifts), tuple(normalize_axis("roll", a, ndim) for a in axes)


@op("x[*] -> y[*]", analytic=True, method=True)
def roll(x, *, shift=1, axis=-1):
    """y[(i + shift) mod n] = x[i] along the axis; tuples roll several axes."""
    out = x.copy()
    for s, a in zip(*_shifts(shift, axis, x.ndim), strict=True):
        source = out.copy()
        for index in np.ndindex(x.shape):
            out[(*index[:a], (index[a] + s) % x.shape[a], *index[a + 1:])] = source[index]
    return out


@roll.primitive
def _(x, shift, axis):
    return namespace(x).roll(x, *_shifts(shift, axis, x.ndim))


@roll.vjp
def _(g, shift, axis):
    shifts, axes = _shifts(shift, axis, g.ndim)
    return roll(g, shift=tuple(-s for s in shifts), axis=axes)


@roll.inputs
def _(draw):
    shape, axis = _axis_draw(draw)
    both = {"shift": (draw.integer(-5, 5), 1), "axis": (axis, 0)}
    return (draw.floats(*shape),), draw.choice((both, {"shift": draw.integer(-5, 5), "axis": axis}))


def _repeat_axis(x, repeats, axis):
    axis = normalize_axis("repeat", axis, x.ndim)
    counts = plain(repeats if np.size(repeats) else np.zeros(np.shape(repeats), np.intp), "repeat: repeats")
    if counts.dtype.kind not in "iu" or (counts < 0).any():
        raise DomainError(f"repeat: repeats must be integers >= 0, got {repeats!r}")
    if counts.ndim and counts.shape != (x.shape[axis],):
        raise ShapeError(f"repeat: {counts.size} repeats for axis {axis} of size {x.shape[axis]}")
    return axis, np.repeat(np.arange(x.shape[axis]), counts)


@op("x[*] -> y[*]", analytic=True, method=True)
def repeat(x, *, repeats=1, axis=-1):
    """Every element of an axis repeated in place: one count, or a list with a count for each."""
    axis, source = _repeat_axis(x, repeats, axis)
    out = np.empty((*x.shape[:axis], len(source), *x.shape[axis + 1:]), x.dtype)
    for index in np.ndindex(out.shape):
        out[index] = x[(*index[:axis], source[index[axis]], *index[axis + 1:])]
    return out


@repeat.form
def composed(x, repeats, axis):
    axis, source = _repeat_axis(x, repeats, axis)
    return gather(x, beside(source, x.data), axis=axis)


@repeat.inputs
def _(draw):
    shape, axis = _axis_draw(draw)
    counts = [draw.size(0, 2) for _ in range(shape[axis])]
    return (draw.floats(*shape),), {"repeats": draw.choice((2, tuple(counts))) if counts else 2, "axis": axis}


def _tile_plan(shape, repeats):
    repeats = (repeats,) if isinstance(repeats, int | np.integer) else tuple(repeats)
    if any(r < 0 for r in repeats):
        raise ShapeError(f"tile: repeats {repeats} must be >= 0")
    ndim = max(len(shape), len(repeats))
    return (1,) * (ndim - len(shape)) + tuple(shape), (1,) * (ndim - len(repeats)) + repeats


@op("x[*] -> y[*]", analytic=True, method=True)
def tile(x, *, repeats=1):
    """x as a whole repeated along the last ``len(repeats)`` axes."""
    shape, repeats = _tile_plan(x.shape, repeats)
    source = x.reshape(shape)
    out = np.empty(tuple(n * r for n, r in zip(shape, repeats, strict=True)), x.dtype)
    for index in np.ndindex(out.shape):
        out[index] = source[tuple(i % n for i, n in zip(index, shape, strict=True))]
    return out


@tile.form
def composed(x, repeats):
    shape, repeats = _tile_plan(x.shape, repeats)
    pairs = tuple(n for pair in zip(repeats, shape, strict=True) for n in pair)
    ones = tuple(n for size in shape for n in (1, size))
    whole = broadcast_to(reshape(x, shape=ones), shape=pairs)
    return reshape(whole, shape=tuple(n * r for n, r in zip(shape, repeats, strict=True)))


@tile.inputs
def _(draw):
    return (draw.floats(*draw.shape(0, 3, 3)),), {"repeats": tuple(draw.size(1, 3) for _ in range(draw.integer(0, 3)))}


def _triangle(x, offset, lower):
    if x.ndim < 2:
        raise ShapeError(f"{'tril' if lower else 'triu'}: needs at least 2 axes, got shape {x.shape}")
    xp = namespace(x)
    rows, columns = xp.arange(x.shape[-2])[:, None], xp.arange(x.shape[-1])
    return columns <= rows + offset if lower else columns >= rows + offset


def _declare_triangle(lower: bool):
    name, relation = ("tril", "<=") if lower else ("triu", ">=")

    def definition(x, *, offset=0):
        out = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            difference = index[-1] - index[-2] - offset
            if (difference <= 0) if lower else (difference >= 0):
                out[index] = x[index]
        return out

    definition.__name__ = name
    definition.__doc__ = f"y[.., i, j] = x[.., i, j] where j {relation} i + offset, else 0."
    triangle = op("x[*] -> y[*]", laws=[non_finite()], analytic=True, method=True)(definition)
    triangle.primitive(lambda x, offset: namespace(x).where(_triangle(x, offset, lower), x, x.dtype.type(0)))
    triangle.vjp(lambda g, offset: triangle(g, offset=offset))
    triangle.inputs(lambda draw: ((draw.floats(*draw.shape(0, 1), draw.size(), draw.size()),),
                                  {"offset": draw.integer(-3, 3)}))
    return triangle


tril = _declare_triangle(lower=True)
triu = _declare_triangle(lower=False)
