"""gelu and gelu_tanh on the CPU: one pass makes the values and their slopes, backward is a product with the slopes."""

import math

import numpy as np

from ...cpu.compile import cpu_kernel
from ...cpu.math import erfcx, exp
from ...cpu.team import elementwise

FAR = 40.0  # beyond, the slope is 0 or 1 in float64 too; infinities must not meet zeros


@cpu_kernel(parts="x y slope")
def gelu_row(x, y, slope):
    half, one, root = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(math.sqrt(0.5))
    density, far = x.dtype.type(1 / math.sqrt(2 * math.pi)), x.dtype.type(FAR)
    for i in range(x.size):
        v = -far if x[i] < -far else x[i]
        bell = exp(-half * v * v)  # the tail and the density share it
        tail = half * erfcx(abs(v) * root) * bell
        below = one - tail if v > 0 else tail
        y[i] = v * below
        slope[i] = below + (far if v > far else v) * density * bell


@cpu_kernel(parts="x y slope")
def gelu_tanh_row(x, y, slope):
    zero, one, far = x.dtype.type(0), x.dtype.type(1), x.dtype.type(FAR)
    c, cubic, three = x.dtype.type(2 * math.sqrt(2 / math.pi)), x.dtype.type(0.044715), x.dtype.type(3)
    for i in range(x.size):
        v = -far if x[i] < -far else x[i]
        z = far if v > far else v
        inner = c * (z + cubic * z * z * z)
        e = exp(-abs(inner))
        upper = one / (one + e)  # (1 + tanh(inner / 2)) / 2 or its complement, which is small: neither cancels
        lower = e * upper
        share = upper if inner > zero else lower
        y[i] = v * share
        slope[i] = share + z * upper * lower * c * (one + three * cubic * z * z)


def _apply(kernel, x):
    flat = np.ascontiguousarray(x).reshape(-1)
    y, slope = np.empty_like(flat), np.empty_like(flat)
    kernel(flat, y, slope)
    return y.reshape(x.shape), slope.reshape(x.shape)


def forward(x):
    return _apply(gelu_row, x)


def tanh_forward(x):
    return _apply(gelu_tanh_row, x)


def backward(saved, g):
    return (elementwise(lambda both: both[0] * both[1], (saved, g), (saved, g)),)


tanh_backward = backward
