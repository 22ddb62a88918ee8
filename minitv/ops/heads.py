"""split_heads and merge_heads: from one vector per token to heads side by side, and back. Each is the adjoint of the other."""

from __future__ import annotations

import numpy as np

from autograd.device import namespace
from autograd.errors import ShapeError
from autograd.op import op


@op("x[B T W] -> ys[*]", view=True, analytic=True)
def split_heads(x, *, heads=1, parts=1):
    """x[B T parts·heads·K] -> ``parts`` arrays [B heads T K]: y_p[b, h, t, k] = x[b, t, (p · heads + h) · K + k]."""
    batch, length, width = x.shape
    size = _head_dim(width, heads, parts)
    ys = tuple(np.empty((batch, heads, length, size), x.dtype) for _ in range(parts))
    for p, y in enumerate(ys):
        for b, h, t, k in np.ndindex(y.shape):
            y[b, h, t, k] = x[b, t, (p * heads + h) * size + k]
    return ys


@split_heads.primitive
def _(x, heads, parts):
    batch, length, width = x.shape
    size = _head_dim(width, heads, parts)
    ys = x.reshape(batch, length, parts, heads, size).transpose(2, 0, 3, 1, 4)
    return tuple([ys[p] for p in range(parts)])


split_heads.vjp(lambda g: merge_heads(g if isinstance(g, list) else [g]))


@split_heads.validate
def _(x, heads, parts):
    _head_dim(x.shape[2], heads, parts)


@split_heads.inputs
def _(draw):
    heads, parts = draw.size(1, 3), draw.size(1, 3)
    return (draw.floats(draw.size(0, 2), draw.size(0, 3), parts * heads * draw.size(0, 3)),), {"heads": heads, "parts": parts}


@op("ys[*] -> x[*]", variadic=True, view=True, analytic=True)
def merge_heads(ys):
    """Arrays [B heads T K] of one shape -> x[B T parts·heads·K], split_heads the other way."""
    batch, heads, length, size = ys[0].shape
    x = np.empty((batch, length, len(ys) * heads * size), ys[0].dtype)
    for p, y in enumerate(ys):
        for b, h, t, k in np.ndindex(y.shape):
            x[b, t, (p * heads + h) * size + k] = y[b, h, t, k]
    return x


@merge_heads.primitive
def _(ys):
    batch, heads, length, size = ys[0].shape
    rows = [y.transpose(0, 2, 1, 3).reshape(batch, length, heads * size) for y in ys]
    return rows[0] if len(rows) == 1 else namespace(*rows).concatenate(rows, axis=-1)


merge_heads.vjp(lambda g, shapes: split_heads(g, heads=shapes[0][1], parts=len(shapes)))


@merge_heads.validate
def _(ys):
    if ys[0].ndim != 4 or any(y.shape != ys[0].shape for y in ys):
        raise ShapeError(f"merge_heads: needs arrays of one shape [B H T K], got {[y.shape for y in ys]}")


@merge_heads.inputs
def _(draw):
    shape = draw.size(0, 2), draw.size(1, 3), draw.size(0, 3), draw.size(0, 3)
    return ([draw.floats(*shape) for _ in range(draw.integer(1, 3))],), {}


def _head_dim(width: int, heads: int, parts: int) -> int:
    if heads < 1 or parts < 1 or width % (heads * parts):
        raise ShapeError(f"split_heads: width {width} does not divide into {parts} parts of {heads} heads")
    return width // (heads * parts)
