"""depthwise_conv1d on a GPU: the sums of causal_conv1d, which begin ``ahead`` positions later."""

from ...cuda.source import float32_only
from ..causal_conv1d.gpu import convolve, correlate

supports = float32_only


def forward(x, weight, bias, ahead):
    taps = weight.T[::-1]  # backwards from the furthest ahead
    return convolve(x, taps, -ahead, bias), (x, taps, bias is not None, ahead)


def backward(saved, g):
    x, taps, biased, ahead = saved
    gx = convolve(g, taps[::-1], 1 - len(taps) + ahead)
    gweight = correlate(x, g, len(taps), -ahead)[::-1].T
    return gx, gweight, g.sum(axis=(0, 1)) if biased else None
