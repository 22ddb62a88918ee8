"""Indexing, gathering, scattering and sorting. Repeated indices add up in gradients; a gather and its scatter are adjoint.

``getitem``, ``gather`` and ``take_along_axis`` follow NumPy (negative indices count from the end); an index out of range
raises ShapeError. Token ids, which must not be negative, go through ``embedding``.
"""

from __future__ import annotations

import numpy as np

from ..arrays import add_at
from ..device import beside, check_range, is_cupy, namespace, plain
from ..errors import DtypeError, ShapeError
from ..laws import non_finite
from ..op import op
from ..shapes import normalize_axis
from ..tensor import Tensor


def _is_basic(key):
    return all(k is None or k is Ellipsis or (isinstance(k, slice | int | np.integer) and not isinstance(k, bool))
               for k in (key if isinstance(key, tuple) else (key,)))


def _frozen_key(key):
    """The key with arrays copied, so that changing them later does not change the gradient."""
    if isinstance(key, tuple):
        return tuple(_frozen_key(k) for k in key)
    if isinstance(key, Tensor):
        raise DtypeError("getitem: an index must be integers, booleans or slices, got a Tensor")
    if isinstance(key, list):
        key = np.asarray(key, dtype=None if key else np.intp)
    if hasattr(key, "dtype") and not isinstance(key, np.generic):
        key = plain(key, "getitem: an index")
        if key.dtype.kind not in "iub":
            raise DtypeError(f"getitem: an index array must be integers or booleans, got {key.dtype}")
        return key.copy() if key.dtype.kind == "b" else key.astype(np.intp)
    return key


def _key_of(x, key):
    """The key for this array: arrays in it copied and, on a GPU, which takes every index, checked and moved beside x."""
    key = _frozen_key(key)
    if not is_cupy(x):
        return key
    parts = key if isinstance(key, tuple) else (key,)
    counts = [getattr(p, "ndim", 0) if getattr(p, "dtype", None) == np.bool_ else int(p is not None and p is not Ellipsis)
             for p in parts]
    axis = 0
    for part, axes in zip(parts, counts, strict=True):
        if getattr(part, "ndim", 0) and part.dtype.kind == "i" and axis < x.ndim:
            _check_indices("getitem", part, x.shape[axis])
        axis += x.ndim - sum(counts) if part is Ellipsis else axes
    return tuple(beside(p, x) if isinstance(p, np.ndarray) else p for p in parts)


def _select(x, key):
    try:
        return x[_key_of(x, key)]
    except IndexError as error:
        raise ShapeError(f"getitem: {error} (the array has shape {x.shape})") from None


@op("x[*] -> y[*]", view=True, analytic=True, method="__getitem__")
def getitem(x, *, key=()):
    """x[key] with integers, slices, None, ..., integer arrays and boolean masks, as NumPy has it."""
    positions = np.arange(x.size).reshape(x.shape)[key]
    flat, out = x.reshape(-1), np.empty(np.shape(positions), x.dtype)
    for index in np.ndindex(out.shape):
        out[index] = flat[np.asarray(positions)[index]]
    return out


getitem.primitive(lambda x, key: _select(x, key))
getitem.vjp(lambda g, key, x_shape: put_add(g, key=key, shape=x_shape))


@getitem.inputs
def _(draw):
    a, b, c = draw.size(1, 4), draw.size(1, 4), draw.size(0, 3)
    rows = draw.integers(-a, a, draw.size(0, 4))
    keys = [(0,), (Ellipsis, -1, slice(None)), (slice(None, None, -1),), (slice(1, None), None, slice(None, None, 2)),
            (rows,), (rows, slice(None), slice(0, 1)), (slice(None), draw.integers(0, b, 3)),
            (rows[:, None], draw.integers(0, b, 2)), (draw.mask(a),), (draw.mask(a, b),),
            (0, slice(None), draw.integers(0, c, 2)), (np.zeros(0, np.intp),)]
    keys += [(Ellipsis, -1), (rows, slice(None), 0)] if c else []
    return (draw.floats(a, b, c),), {"key": draw.choice(keys)}


@op("x[*] -> y[*]", analytic=True)
def put_add(x, *, key=(), shape=()):
    """Zeros of ``shape`` to which x is added at ``key``: the adjoint of getitem."""
    out = np.zeros(shape, x.dtype)
    positions = np.arange(out.size).reshape(shape)[key]
    for position, value in zip(np.asarray(positions).reshape(-1), x.reshape(-1), strict=True):
        out.reshape(-1)[position] += value
    return out


@put_add.primitive
def _(x, key, shape):
    out = namespace(x).zeros(shape, x.dtype)
    key = _key_of(out, key)
    if _is_basic(key):
        out[key] = x
    else:
        add_at(out, key, x)
    return out


put_add.vjp(lambda g, key: getitem(g, key=key))


@put_add.inputs
def _(draw):
    (x,), params = getitem.draw(draw)
    return (draw.floats(*x[params["key"]].shape),), {"key": params["key"], "shape": x.shape}


def _check_indices(name, ids, size):
    def fail(index):
        raise ShapeError(f"{name}: index {index} is out of range for an axis of size {size}")

    check_range(ids, -size, size - 1, fail)


@op("x[*], ids:int[*] -> y[*]", analytic=True, method=True)
def gather(x, ids, *, axis=0):
    """Whole slices of an axis: y[.., i, ..] = x[.., ids[i], ..]; ids may have any shape."""
    axis = normalize_axis("gather", axis, x.ndim)
    out = np.empty((*x.shape[:axis], *ids.shape, *x.shape[axis + 1:]), x.dtype)
    for index in np.ndindex(out.shape):
        inner = index[axis:axis + ids.ndim]
        out[index] = x[(*index[:axis], ids[inner], *index[axis + ids.ndim:])]
    return out


gather.primitive(lambda x, ids, axis: namespace(x).take(x, ids, axis=normalize_axis("gather", axis, x.ndim)))


@gather.vjp
def _(g, ids, x_shape, axis):
    return scatter_add(Tensor.wrap(namespace(g.data).zeros(x_shape, g.dtype)), ids, g, axis=axis)


@gather.validate
def _(x, ids, axis):
    _check_indices("gather", ids, x.shape[normalize_axis("gather", axis, x.ndim)])


def _indexed_axis(draw):
    """A shape and an axis of it that is not empty."""
    ndim = draw.integer(1, 3)
    axis = draw.integer(-ndim, ndim - 1)
    return tuple(draw.size(1 if i == axis % ndim else 0, 3) for i in range(ndim)), axis


@gather.inputs
def _(draw):
    shape, axis = _indexed_axis(draw)
    return (draw.floats(*shape), draw.integers(-shape[axis], shape[axis], *draw.shape(0, 2))), {"axis": axis}


@op("x[*], ids:int[*], updates[*] -> y[*]")
def scatter_add(x, ids, updates, *, axis=0):
    """x with ``updates`` added at whole slices of an axis, y[.., ids[i], ..] += updates[.., i, ..]: gather's adjoint."""
    axis = normalize_axis("scatter_add", axis, x.ndim)
    out = x.copy()
    for index in np.ndindex(updates.shape):
        inner = index[axis:axis + ids.ndim]
        out[(*index[:axis], ids[inner], *index[axis + ids.ndim:])] += updates[index]
    return out


@scatter_add.primitive
def _(x, ids, updates, axis):
    axis = normalize_axis("scatter_add", axis, x.ndim)
    out = x.copy()
    add_at(out, (slice(None),) * axis + (ids,), updates)
    return out


scatter_add.vjp(lambda g, ids, axis: (g, gather(g, ids, axis=axis)))


@scatter_add.validate
def _(x, ids, updates, axis):
    axis = normalize_axis("scatter_add", axis, x.ndim)
    _check_indices("scatter_add", ids, x.shape[axis])
    expected = (*x.shape[:axis], *ids.shape, *x.shape[axis + 1:])
    if updates.shape != expected:
        raise ShapeError(f"scatter_add: updates have shape {updates.shape}, expected {expected}")


@scatter_add.inputs
def _(draw):
    (x, ids), params = gather.draw(draw)
    axis = params["axis"] % x.ndim
    return (x, ids, draw.floats(*x.shape[:axis], *ids.shape, *x.shape[axis + 1:])), params


def _check_along(name, x, ids, axis):
    axis = normalize_axis(name, axis, x.ndim)
    if ids.ndim != x.ndim or any(m != n for k, (m, n) in enumerate(zip(x.shape, ids.shape, strict=True)) if k != axis):
        raise ShapeError(f"{name}: ids {ids.shape} must have the shape of x {x.shape} except along axis {axis}")
    _check_indices(name, ids, x.shape[axis])


@op("x[*], ids:int[*] -> y[*]", analytic=True)
def take_along_axis(x, ids, *, axis=-1):
    """One element per index along an axis: y[.., i, ..] = x[.., ids[.., i, ..], ..]."""
    axis = normalize_axis("take_along_axis", axis, x.ndim)
    out = np.empty(ids.shape, x.dtype)
    for index in np.ndindex(ids.shape):
        out[index] = x[(*index[:axis], ids[index], *index[axis + 1:])]
    return out


take_along_axis.primitive(lambda x, ids, axis: namespace(x).take_along_axis(x, ids, axis))
take_along_axis.validate(lambda x, ids, axis: _check_along("take_along_axis", x, ids, axis))


@take_along_axis.vjp
def _(g, ids, x_shape, axis):
    return add_along_axis(Tensor.wrap(namespace(g.data).zeros(x_shape, g.dtype)), ids, g, axis=axis)


@take_along_axis.inputs
def _(draw):
    shape, axis = _indexed_axis(draw)
    sizes = tuple(draw.size(0, 4) if k == axis % len(shape) else n for k, n in enumerate(shape))
    return (draw.floats(*shape), draw.integers(-shape[axis], shape[axis], *sizes)), {"axis": axis}


@op("x[*], ids:int[*], updates[*] -> y[*]")
def add_along_axis(x, ids, updates, *, axis=-1):
    """x with y[.., ids[.., i, ..], ..] += updates[.., i, ..]: the adjoint of take_along_axis."""
    axis = normalize_axis("add_along_axis", axis, x.ndim)
    out = x.copy()
    for index in np.ndindex(ids.shape):
        out[(*index[:axis], ids[index], *index[axis + 1:])] += updates[index]
    return out


@add_along_axis.primitive
def _(x, ids, updates, axis):
    axis = normalize_axis("add_along_axis", axis, x.ndim)
    xp = namespace(x)
    out = x.copy()
    grid = [xp.arange(n).reshape(-1, *[1] * (ids.ndim - 1 - i)) for i, n in enumerate(ids.shape)]
    grid[axis] = ids
    add_at(out, tuple(grid), updates)
    return out


add_along_axis.vjp(lambda g, ids, axis: (g, take_along_axis(g, ids, axis=axis)))


@add_along_axis.validate
def _(x, ids, updates, axis):
    _check_along("add_along_axis", x, ids, axis)
    if updates.shape != ids.shape:
        raise ShapeError(f"add_along_axis: updates {updates.shape} must have the shape of ids {ids.shape}")


@add_along_axis.inputs
def _(draw):
    (x, ids), params = take_along_axis.draw(draw)
    return (x, ids, draw.floats(*ids.shape)), params


def _order(values, descending):
    """The stable order of a list with NaN last."""
    key = sorted(range(len(values)), key=lambda i: (values[i] != values[i], 0 if values[i] != values[i] else
                                                    -values[i] if descending else values[i]))
    return np.array(key, np.intp)


@op("x[*] -> y:int[*]", laws=[non_finite()], method=True)
def argsort(x, *, axis=-1, descending=False):
    """The indices that sort an axis: stable, NaN last. A plain integer array."""
    axis = normalize_axis("argsort", axis, x.ndim)
    moved = np.moveaxis(x, axis, -1)
    out = np.empty(moved.shape, np.intp)
    for index in np.ndindex(moved.shape[:-1]):
        out[index] = _order(moved[index].tolist(), descending)
    return np.moveaxis(out, -1, axis)


@argsort.primitive
def _(x, axis, descending):
    axis = normalize_axis("argsort", axis, x.ndim)
    return namespace(x).argsort(-x if descending else x, axis=axis, kind="stable")


@op("x[*] -> y[*]", laws=[non_finite()], method=True)
def sort(x, *, axis=-1, descending=False):
    """An axis in order: stable, NaN last."""
    return take_along_axis.definition(x, argsort.definition(x, axis=axis, descending=descending), axis=axis)


@sort.form
def composed(x, axis, descending):
    axis = normalize_axis("sort", axis, x.ndim)
    return take_along_axis(x, argsort(x, axis=axis, descending=descending), axis=axis)


def _sort_inputs(draw):
    shape = tuple(draw.size(0, 4) for _ in range(draw.integer(1, 3)))
    return (draw.distinct(*shape),), {"axis": draw.integer(-len(shape), len(shape) - 1), "descending": draw.boolean()}


sort.inputs(_sort_inputs)
argsort.inputs(_sort_inputs)
