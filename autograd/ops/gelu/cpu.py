"""gelu and gelu_tanh on the CPU: one pass forward, one pass backward from the saved input."""

import math

import numpy as np

from ...kernel_math import erfc, exp, tanh
from ...kernels import cpu_kernel


@cpu_kernel
def _gelu(x, y):
    half, root = x.dtype.type(0.5), x.dtype.type(math.sqrt(0.5))
    for i in range(x.size):
        y[i] = half * x[i] * erfc(-x[i] * root)


@cpu_kernel
def _gelu_gradient(x, g, gx):
    half, root = x.dtype.type(0.5), x.dtype.type(math.sqrt(0.5))
    density = x.dtype.type(1 / math.sqrt(2 * math.pi))
    for i in range(x.size):
        v = x[i]
        gx[i] = g[i] * (half * erfc(-v * root) + v * density * exp(-half * v * v))


@cpu_kernel
def _gelu_tanh(x, y):
    half, one, c, cubic = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
    for i in range(x.size):
        v = x[i]
        y[i] = half * v * (one + tanh(c * (v + cubic * v * v * v)))


@cpu_kernel
def _gelu_tanh_gradient(x, g, gx):
    half, one, c, cubic = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(math.sqrt(2 / math.pi)), x.dtype.type(0.044715)
    three = x.dtype.type(3)
    for i in range(x.size):
        v = x[i]
        t = tanh(c * (v + cubic * v * v * v))
        slope = one - t * t
        inner = v * slope * c * (one + three * cubic * v * v) if slope != 0 else slope  # v² may overflow
        gx[i] = g[i] * half * (one + t + inner)


def _apply(kernel, *arrays):
    flat = [np.ascontiguousarray(a).reshape(-1) for a in arrays]
    out = np.empty_like(flat[0])
    kernel(*flat, out)
    return out.reshape(arrays[0].shape)


def forward(x):
    return _apply(_gelu, x), (x,)


def backward(saved, g):
    return (_apply(_gelu_gradient, *saved, g),)


def tanh_forward(x):
    return _apply(_gelu_tanh, x), (x,)


def tanh_backward(saved, g):
    return (_apply(_gelu_tanh_gradient, *saved, g),)
