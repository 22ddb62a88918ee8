"""layer_norm on a GPU: a warp a row; backward from the input and each row's saved shift and scale."""

import numpy as np

from ...cuda.rows import sum_rows
from ...cuda.source import Source, columns, contiguous, float32_only, warps
from ...device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(x, weight, bias, eps):
    xp = namespace(x)
    x, weight, bias = (contiguous(a) for a in (x, weight, bias))
    y, width = xp.empty_like(x), x.shape[-1]
    rows = x.size // width if width else 0
    shifts, scales = xp.empty((2, rows), np.float32)
    SOURCE.launch("mtv_layer_norm_forward", warps(rows), x, weight, bias, y, shifts, scales, rows, width, eps,
                  weight is not None, bias is not None)
    return y, (x, weight, bias is not None, shifts, scales)


def backward(saved, g):
    x, weight, biased, shifts, scales = saved
    xp, width, rows = namespace(x), x.shape[-1], shifts.size
    g, gx = contiguous(g), xp.empty_like(x)
    SOURCE.launch("mtv_layer_norm_backward", warps(rows), x, weight, shifts, scales, g, gx, rows, width, weight is not None)
    if weight is None and not biased:
        return gx, None, None
    gweight, gbias = sum_rows(SOURCE, "mtv_layer_norm_backward_affine", columns(width), rows, (2, width),
                              (x, shifts, scales, g), (rows, width))
    return gx, None if weight is None else gweight, gbias if biased else None
