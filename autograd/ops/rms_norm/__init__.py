"""rms_norm: each row divided by its root mean square. Zhang and Sennrich 2019, arXiv 1910.07467."""

from __future__ import annotations

import math

import numpy as np

from ...op import op
from ..elementwise import rsqrt
from ..reduce import mean


@op("x[... D], weight?[D] -> y[... D]", analytic=True)
def rms_norm(x, weight=None, *, eps=1e-5):
    """y = x / √(mean(x²) + eps) · weight over the last axis; in float32, |x| must stay below 1e18."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index].tolist()
        if not row:
            continue
        square = math.fsum(v * v for v in row) / len(row)
        for j, v in enumerate(row):
            y = v / math.sqrt(square + eps)
            out[(*index, j)] = y if weight is None else y * weight[j].item()
    return out


@rms_norm.form
def composed(x, weight, eps):
    y = x * rsqrt(mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


rms_norm.kernel("cpu")
rms_norm.kernel("cuda")


@rms_norm.inputs
def _(draw):
    width = draw.size(0, 9, "D")
    weight = draw.floats(width) if draw.boolean() else None
    return (draw.floats(*draw.shape(0, 2), width), weight), {"eps": 1e-5 if width > 4 else 0.1}  # as in layer_norm
