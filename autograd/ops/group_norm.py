"""group_norm: layer_norm within groups of channels. Wu and He 2018, arXiv 1803.08494."""

from __future__ import annotations

from ..errors import ShapeError
from ..laws import shift_invariant
from ..op import op
from .layer_norm import layer_norm
from .shape import reshape


@op("x[... C], weight?[C], bias?[C] -> y[... C]", analytic=True, tolerance=4.0, laws=[shift_invariant("x")])
def group_norm(x, weight=None, bias=None, *, groups=1, eps=1e-5):
    """Each of ``groups`` equal parts of the last axis to mean 0 and variance 1, then weight and bias per channel.

    Positions are normalised one by one, which is PyTorch's group_norm of a (rows, C) array: RetNet's use of it.
    """
    parts = layer_norm.definition(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), None, None, eps=eps)
    out = parts.reshape(x.shape)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@group_norm.form
def composed(x, weight, bias, groups, eps):
    y = layer_norm(reshape(x, shape=(*x.shape[:-1], groups, x.shape[-1] // groups)), eps=eps)
    y = reshape(y, shape=x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@group_norm.validate
def _(x, weight, bias, groups, eps):
    if groups < 1 or x.shape[-1] % groups:
        raise ShapeError(f"group_norm: {x.shape[-1]} channels do not divide into groups = {groups}")


@group_norm.inputs
def _(draw):
    groups, per = draw.size(1, 3), draw.size(1, 6)
    width = groups * per
    weight = draw.floats(width) if draw.boolean() else None
    bias = draw.floats(width) if draw.boolean() else None
    return (draw.floats(*draw.shape(0, 2), width), weight, bias), {
        "groups": groups, "eps": 1e-5 if per > 4 else 0.1}  # as in layer_norm
