"""causal_conv1d on a GPU, and sums of any number of taps over the past and the future."""

import numpy as np

from ...cuda.source import Source, ceil_div, columns, contiguous, float32_only
from ...device import namespace

EACH = 2  # spans that a warp adds up, or more where memory for the sums of all blocks would exceed that of x

SOURCE = Source(__file__)
supports = float32_only


def convolve(x, taps, first=0, bias=None):
    """y[b, t] = bias + Σ_u taps[u] x[b, t - first - u], for x[B T C] and taps[U C]; outside of 0 .. T-1, x is 0."""
    x, taps, bias = (contiguous(a) for a in (x, taps, bias))
    B, T, C = x.shape
    y = namespace(x).empty_like(x)
    SOURCE.launch("mtv_causal_conv1d_convolve", (B * ceil_div(T, SOURCE["TIMES"]), columns(C)), x, taps,
                  bias, y, T, C, len(taps), first, bias is not None)
    return y


def correlate(x, g, count, first=0):
    """The gradient of the taps of ``convolve``: [u] = Σ_b Σ_t g[b, t] x[b, t - first - u] for u < count."""
    x, g = contiguous(x), contiguous(g)
    B, T, C = x.shape
    span, rows = SOURCE["SPAN"], SOURCE["ROWS"]
    each = max(EACH, ceil_div(count, span * rows))
    sums = namespace(x).empty((ceil_div(B * ceil_div(T, span), rows * each), count, C), np.float32)
    SOURCE.launch("mtv_causal_conv1d_correlate", (len(sums), columns(C), ceil_div(count, rows)), x, g, sums, B, T, C, count,
                  first, each)
    return sums.sum(axis=0)


def filtered(x, weight, bias, ahead):
    """``forward`` of depthwise_conv1d, whose outputs see ``ahead`` later positions."""
    taps = weight.T[::-1]  # backwards from the furthest ahead
    return convolve(x, taps, -ahead, bias), (x, taps, bias is not None, ahead)


def forward(x, weight, bias):
    return filtered(x, weight, bias, 0)


def backward(saved, g):
    x, taps, biased, ahead = saved
    gx = convolve(g, taps[::-1], 1 - len(taps) + ahead)
    gweight = correlate(x, g, len(taps), -ahead)[::-1].T
    return gx, gweight, g.sum(axis=(0, 1)) if biased else None
