"""token_shift on a GPU: an element a thread, and a sum over all positions for the gradient of mix."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.rows import sum_rows
from autograd.cuda.source import Source, columns, contiguous, elements, float32_only
from autograd.device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(x, mix, last, reset):
    xp = namespace(x)
    B, T, C = x.shape
    x, mix, first, reset = (contiguous(a) for a in (x, mix, last, reset))
    presence = last is not None, reset is not None
    y = xp.empty_like(x)
    SOURCE.launch("mtv_token_shift_forward", elements(y.size), x, mix, first, reset, y, y.size, T, C, *presence)
    if T:
        after = x[:, -1].copy()
    else:
        after = xp.zeros((B, C), np.float32) if last is None else first.copy()
    return (y, after), (x, mix, first, reset, presence)


def backward(saved, g_y, g_last):
    x, mix, first, reset, (carried, resets) = saved
    xp, (B, T, C) = namespace(x), x.shape
    g_y, g_last = contiguous(or_zeros(g_y, x)), xp.zeros((B, C), np.float32) if g_last is None else contiguous(g_last)
    gx, gfirst = xp.empty_like(x), g_last.copy()
    SOURCE.launch("mtv_token_shift_backward", elements(x.size), mix, reset, g_y, g_last, gx, gfirst, x.size, T, C, resets)
    gmix = sum_rows(SOURCE, "mtv_token_shift_backward_mix", columns(C), B * T, (C,), (x, first, reset, g_y),
                    (B * T, T, C, carried, resets))
    return gx, gmix, gfirst if carried else None
