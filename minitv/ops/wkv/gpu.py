"""wkv and bidirectional_wkv on a GPU: a thread a sequence and channel, see gpu.cu."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.source import Source, ceil_div, contiguous, float32_only
from autograd.device import namespace

from . import EMPTY

SOURCE = Source(__file__)
STEPS = 8  # positions from one kept state to the next, as in gpu.cu
supports = bidirectional_supports = float32_only


def forward(k, v, w, u, a, b, p, reset):
    xp = namespace(k)
    batch, length, width = k.shape
    first = xp.empty((3, batch, width), np.float32)
    first[0], first[1], first[2] = (0, 0, EMPTY) if p is None else (a, b, p)
    flags = xp.empty(0, bool) if reset is None else contiguous(reset)
    inputs = *(contiguous(x) for x in (k, v, w, u)), flags, first
    sizes = batch, length, width, reset is not None
    y, final, lags = xp.empty(k.shape, np.float32), xp.empty_like(first), xp.empty((batch, width), np.float32)
    states = xp.empty((ceil_div(length, STEPS), 4, batch, width), np.float32)
    if lags.size:
        SOURCE.launch("mtv_wkv_forward", ceil_div(lags.size, 64), *inputs, y, final, lags, states, *sizes)
    return (y, *final), (inputs, y, final, lags, states, sizes, p is not None)


def backward(saved, g_y, g_a, g_b, g_p):
    inputs, y, final, lags, states, sizes, carried = saved
    xp = namespace(y)
    dk, dv, dfirst = (xp.empty_like(x) for x in (y, y, final))
    sums = xp.zeros((2, *lags.shape), np.float32)
    if lags.size:
        grads = contiguous(or_zeros(g_y, y)), xp.stack([or_zeros(g, final[0]) for g in (g_a, g_b, g_p)])
        SOURCE.launch("mtv_wkv_backward", ceil_div(lags.size, 64), *inputs, y, final, lags, states, *grads, dk, dv, sums,
                      dfirst, *sizes)
    return dk, dv, *sums.sum(axis=1), *(dfirst if carried else (None, None, None)),


def bidirectional_forward(k, v, w, u):
    xp = namespace(k)
    batch, length, width = k.shape
    inputs, y = tuple(contiguous(x) for x in (k, v, w, u)), xp.empty(k.shape, np.float32)
    before, after = xp.empty((2, length, 4, batch, width), np.float32)
    if y.size:
        SOURCE.launch("mtv_wkv_bidirectional_forward", ceil_div(batch * width, 64), *inputs, y, before, after, *k.shape)
    return y, (inputs, y, before, after)


def bidirectional_backward(saved, g):
    inputs, y, before, after = saved
    xp, (batch, _, width) = namespace(y), y.shape
    dk, dv, sums = xp.empty_like(y), xp.empty_like(y), xp.zeros((2, batch, width), np.float32)
    if y.size:
        SOURCE.launch("mtv_wkv_bidirectional_backward", ceil_div(batch * width, 64), *inputs, y, before, after, contiguous(g),
                      dk, dv, sums, *y.shape)
    return dk, dv, *sums.sum(axis=1)
