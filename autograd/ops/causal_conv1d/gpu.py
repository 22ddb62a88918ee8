"""causal_conv1d on a GPU, and sums of any number of taps over the past and the future."""

import numpy as np

from ...cuda.source import Source, ceil_div, contiguous, float32_only
from ...device import namespace

ROWS, TIMES, SPAN, WARPS = 8, 64, 32, 8  # as in gpu.cu
EACH = 2  # spans that a warp adds up, or more where memory for the sums of all blocks would exceed that of x

SOURCE = Source(__file__)
supports = float32_only


def convolve(x, taps, first=0, bias=None):
    """y[b, t] = bias + Σ_u taps[u] x[b, t - first - u], for x[B T C] and taps[U C]; outside of 0 .. T-1, x is 0."""
    x, taps = contiguous(x), contiguous(taps)
    batch, length, channels = x.shape
    y = namespace(x).empty_like(x)
    if x.size:
        grid = batch * ceil_div(length, TIMES), ceil_div(channels, 32)
        SOURCE.launch("mtv_causal_conv1d_convolve", grid, x, taps, taps if bias is None else contiguous(bias), y, length,
                      channels, len(taps), first, bias is not None)
    return y


def correlate(x, g, count, first=0):
    """The gradient of the taps of ``convolve``: [u] = Σ_b Σ_t g[b, t] x[b, t - first - u] for u < count."""
    x, g = contiguous(x), contiguous(g)
    batch, length, channels = x.shape
    spans = batch * ceil_div(length, SPAN)
    each = max(EACH, ceil_div(count, SPAN * WARPS))
    sums = namespace(x).empty((ceil_div(spans, WARPS * each), count, channels), np.float32)
    if sums.size:
        grid = len(sums), ceil_div(channels, 32), ceil_div(count, ROWS)
        SOURCE.launch("mtv_causal_conv1d_correlate", grid, x, g, sums, batch, length, channels, count, first, each)
    return sums.sum(axis=0)


def forward(x, weight, bias):
    taps = weight.T[::-1]  # the last is the present
    return convolve(x, taps, 0, bias), (x, taps, bias is not None)


def backward(saved, g):
    x, taps, biased = saved
    gx = convolve(g, taps[::-1], 1 - len(taps))
    gweight = correlate(x, g, len(taps))[::-1].T
    return gx, gweight, g.sum(axis=(0, 1)) if biased else None
