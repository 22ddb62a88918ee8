"""rms_norm on a GPU: a warp a row; backward from the input and each row's saved scale."""

import numpy as np

from ...cuda.rows import sum_rows
from ...cuda.source import Source, columns, contiguous, float32_only, warps
from ...device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(x, weight, eps):
    xp = namespace(x)
    x, weight = contiguous(x), contiguous(weight)
    y, width = xp.empty_like(x), x.shape[-1]
    rows = x.size // width if width else 0
    scales = xp.empty(rows, np.float32)
    SOURCE.launch("mtv_rms_norm_forward", warps(rows), x, weight, y, scales, rows, width, eps, weight is not None)
    return y, (x, weight, scales)


def backward(saved, g):
    x, weight, scales = saved
    xp, width, rows = namespace(x), x.shape[-1], scales.size
    g, gx = contiguous(g), xp.empty_like(x)
    SOURCE.launch("mtv_rms_norm_backward", warps(rows), x, weight, scales, g, gx, rows, width, weight is not None)
    if weight is None:
        return gx, None
    return gx, sum_rows(SOURCE, "mtv_rms_norm_backward_weight", columns(width), rows, (width,), (x, scales, g), (rows, width))
