"""rms_norm on a GPU: a warp a row; backward from the input and each row's saved scale."""

import numpy as np

from ...cuda.source import SHORT, Source, ceil_div, chunk_of, contiguous, float32_only, storage
from ...device import namespace

SOURCE = Source(__file__, SHORT)
supports = float32_only


def forward(x, weight, eps):
    xp = namespace(x)
    x = contiguous(x)
    weight = None if weight is None else contiguous(weight)
    y, width = xp.empty_like(x), x.shape[-1]
    rows = x.size // width if width else 0
    scales = xp.empty(rows, np.float32)
    if rows:
        SOURCE.launch("mtv_rms_norm_forward", ceil_div(rows, 4), x, x if weight is None else weight, y, scales, rows, width,
                      eps, weight is not None, options=storage(x))
    return y, (x, weight, scales)


def backward(saved, g):
    x, weight, scales = saved
    xp, width, rows = namespace(x), x.shape[-1], scales.size
    g, gx = contiguous(g), xp.empty_like(x)
    if rows:
        SOURCE.launch("mtv_rms_norm_backward", ceil_div(rows, 4), x, x if weight is None else weight, scales, g, gx, rows,
                      width, weight is not None, options=storage(x))
    if weight is None:
        return gx, None
    chunk = chunk_of(rows)
    sums = xp.zeros((ceil_div(rows, chunk), width), np.float32)
    if rows:
        SOURCE.launch("mtv_rms_norm_backward_weight", (ceil_div(width, 32), len(sums)), x, scales, g, sums, rows, width,
                      chunk, options=storage(x))
    return gx, sums.sum(axis=0).astype(x.dtype, copy=False)
