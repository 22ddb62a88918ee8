"""layer_norm on a GPU: a warp a row; backward from the input and each row's saved mean and scale."""

import numpy as np

from ...cuda.source import SHORT, Source, ceil_div, chunk_of, contiguous, float32_only, storage
from ...device import namespace

SOURCE = Source(__file__, SHORT)
supports = float32_only


def forward(x, weight, bias, eps):
    xp = namespace(x)
    x = contiguous(x)
    weight, bias = (None if a is None else contiguous(a) for a in (weight, bias))
    y, width = xp.empty_like(x), x.shape[-1]
    rows = x.size // width if width else 0
    means, scales = xp.empty((2, rows), np.float32)
    if rows:
        SOURCE.launch("mtv_layer_norm_forward", ceil_div(rows, 4), x, x if weight is None else weight,
                      x if bias is None else bias, y, means, scales, rows, width, eps, weight is not None,
                      bias is not None, options=storage(x))
    return y, (x, weight, bias is not None, means, scales)


def backward(saved, g):
    x, weight, biased, means, scales = saved
    xp, width, rows = namespace(x), x.shape[-1], means.size
    g, gx = contiguous(g), xp.empty_like(x)
    if rows:
        SOURCE.launch("mtv_layer_norm_backward", ceil_div(rows, 4), x, x if weight is None else weight, means, scales, g, gx,
                      rows, width, weight is not None, options=storage(x))
    if weight is None and not biased:
        return gx, None, None
    chunk = chunk_of(rows)
    sums = xp.zeros((2, ceil_div(rows, chunk), width), np.float32)
    if rows:
        SOURCE.launch("mtv_layer_norm_backward_affine", (ceil_div(width, 32), sums.shape[1]), x, means, scales, g, sums,
                      rows, width, chunk, options=storage(x))
    gweight, gbias = sums.sum(axis=1).astype(x.dtype, copy=False)
    return gx, None if weight is None else gweight, gbias if biased else None
