"""gelu and gelu_tanh on the CPU: one pass makes the values and their slopes, backward is a product with the slopes."""

import math

import numpy as np

from ...cpu.compile import cpu_kernel
from ...cpu.math import erfcx, exp, tanh


@cpu_kernel
def _gelu(x, y, slope):
    half, one, root = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(math.sqrt(0.5))
    density = x.dtype.type(1 / math.sqrt(2 * math.pi))
    for i in range(x.size):
        v = x[i]
        bell = exp(-half * v * v)  # the tail and the density share it
        tail = half * erfcx(abs(v) * root) * bell
        below = one - tail if v > 0 else tail
        y[i] = v * below
        slope[i] = below + v * density * bell


@cpu_kernel
def _gelu_tanh(x, y, slope):
    half, one, c, cubic = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
    three = x.dtype.type(3)
    for i in range(x.size):
        v = x[i]
        t = tanh(c * (v + cubic * v * v * v))
        y[i] = half * v * (one + t)
        steep = one - t * t
        inner = v * steep * c * (one + three * cubic * v * v) if steep != 0 else steep  # v² may overflow
        slope[i] = half * (one + t + inner)


def _apply(kernel, x):
    flat = np.ascontiguousarray(x).reshape(-1)
    y, slope = np.empty_like(flat), np.empty_like(flat)
    kernel(flat, y, slope)
    return y.reshape(x.shape), slope.reshape(x.shape)


def forward(x):
    return _apply(_gelu, x)


def tanh_forward(x):
    return _apply(_gelu_tanh, x)


def backward(saved, g):
    return (saved * g,)


tanh_backward = backward
