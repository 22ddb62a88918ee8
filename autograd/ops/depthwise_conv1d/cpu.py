"""depthwise_conv1d on the CPU: the sums of causal_conv1d, which begin ``ahead`` positions later."""

import numpy as np

from ..causal_conv1d.cpu import convolve, correlate


def forward(x, weight, bias, ahead):
    taps = weight.T[::-1]  # backwards from the furthest ahead
    return convolve(x, taps, -ahead, bias), (x, taps, bias is not None, ahead)


def backward(saved, g):
    x, taps, biased, ahead = saved
    gx = convolve(g, taps[::-1], 1 - len(taps) + ahead)
    gweight = correlate(x, g, len(taps), -ahead)[::-1].T
    return gx, gweight, np.add.reduce(g, axis=(0, 1)) if biased else None
