"""wkv and bidirectional_wkv on a GPU: a thread a sequence and channel, see gpu.cu."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.source import Source, ceil_div, contiguous, elements, float32_only
from autograd.device import namespace

from . import EMPTY

SOURCE = Source(__file__, [(f"-DEMPTY={EMPTY}f",)])
supports = bidirectional_supports = float32_only


def forward(k, v, w, u, a, b, p, reset):
    xp = namespace(k)
    B, T, C = k.shape
    first = xp.empty((3, B, C), np.float32)
    first[0], first[1], first[2] = (0, 0, EMPTY) if p is None else (a, b, p)
    inputs = *(contiguous(x) for x in (k, v, w, u, reset)), first
    sizes = B, T, C, reset is not None
    y, final, lags = xp.empty(k.shape, np.float32), xp.empty_like(first), xp.empty((B, C), np.float32)
    states = xp.empty((ceil_div(T, SOURCE["STEPS"]), 4, B, C), np.float32)
    SOURCE.launch("mtv_wkv_forward", elements(B * C), *inputs, y, final, lags, states, *sizes)
    return (y, *final), (inputs, y, final, lags, states, sizes, p is not None)


def backward(saved, g_y, g_a, g_b, g_p):
    inputs, y, final, lags, states, sizes, carried = saved
    xp = namespace(y)
    gk, gv, gfirst = (xp.empty_like(x) for x in (y, y, final))
    sums = xp.empty((2, *lags.shape), np.float32)
    g_y, g_final = contiguous(or_zeros(g_y, y)), xp.stack([or_zeros(g, lags) for g in (g_a, g_b, g_p)])
    SOURCE.launch("mtv_wkv_backward", elements(lags.size), *inputs, y, final, lags, states, g_y, g_final, gk, gv, sums, gfirst,
                  *sizes)
    return gk, gv, *sums.sum(axis=1), *(gfirst if carried else (None, None, None))


def bidirectional_forward(k, v, w, u):
    xp = namespace(k)
    B, T, C = k.shape
    inputs, y = tuple(contiguous(x) for x in (k, v, w, u)), xp.empty(k.shape, np.float32)
    before, after = xp.empty((2, T, 4, B, C), np.float32)
    SOURCE.launch("mtv_wkv_bidirectional_forward", elements(B * C), *inputs, y, before, after, B, T, C)
    return y, (inputs, y, before, after)


def bidirectional_backward(saved, g):
    inputs, y, before, after = saved
    xp, (B, T, C) = namespace(y), y.shape
    gk, gv, sums = xp.empty_like(y), xp.empty_like(y), xp.empty((2, B, C), np.float32)
    SOURCE.launch("mtv_wkv_bidirectional_backward", elements(B * C), *inputs, y, before, after, contiguous(g), gk, gv, sums,
                  B, T, C)
    return gk, gv, *sums.sum(axis=1)
