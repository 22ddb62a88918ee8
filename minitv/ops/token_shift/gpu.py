"""token_shift on a GPU: an element a thread, and sums over chunks of positions for the gradient of mix."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.source import Source, ceil_div, chunk_of, contiguous, float32_only
from autograd.device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(x, mix, last, reset):
    xp = namespace(x)
    batch, length, width = x.shape
    x, mix = contiguous(x), contiguous(mix)
    first = xp.empty(0, np.float32) if last is None else contiguous(last)
    flags = xp.empty(0, bool) if reset is None else contiguous(reset)
    given = last is not None, reset is not None
    y = xp.empty_like(x)
    if y.size:
        SOURCE.launch("mtv_token_shift_forward", ceil_div(y.size, 256), x, mix, first, flags, y, y.size, length, width, *given)
    if length:
        after = x[:, -1].copy()
    else:
        after = xp.zeros((batch, width), np.float32) if last is None else first.copy()
    return (y, after), (x, mix, first, flags, given)


def backward(saved, g_y, g_last):
    x, mix, first, reset, (carried, resets) = saved
    xp, (_, length, width), rows = namespace(x), x.shape, x.shape[0] * x.shape[1]
    g, glast = contiguous(or_zeros(g_y, x)), xp.zeros((len(x), width), np.float32) if g_last is None else contiguous(g_last)
    dx, dfirst, chunk = xp.empty_like(x), glast.copy(), chunk_of(rows)
    sums = xp.zeros((ceil_div(rows, chunk), width), np.float32)
    if x.size:
        SOURCE.launch("mtv_token_shift_backward", ceil_div(x.size, 256), mix, reset, g, glast, dx, dfirst, x.size, length,
                      width, resets)
        SOURCE.launch("mtv_token_shift_backward_mix", (ceil_div(width, 32), len(sums)), x, first, reset, g, sums, rows, length,
                      width, chunk, carried, resets)
    return dx, sums.sum(axis=0), dfirst if carried else None
