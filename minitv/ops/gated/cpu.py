"""gated on the CPU: one pass each way; backward computes the sigmoid again instead of reading it from memory."""

import numpy as np

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp


@cpu_kernel
def _sigmoid(x, gate, y):
    one = x.dtype.type(1)
    for i in range(x.size):
        y[i] = x[i] / (one + exp(-gate[i]))


@cpu_kernel
def _swish(x, gate, y):
    one = x.dtype.type(1)
    for i in range(x.size):
        y[i] = x[i] * gate[i] / (one + exp(-gate[i]))


@cpu_kernel
def _sigmoid_backward(x, gate, g, dx, dgate):
    one = x.dtype.type(1)
    for i in range(x.size):
        s = one / (one + exp(-gate[i]))
        dx[i] = g[i] * s
        dgate[i] = g[i] * x[i] * s * (one - s)


@cpu_kernel
def _swish_backward(x, gate, g, dx, dgate):
    one = x.dtype.type(1)
    for i in range(x.size):
        s = one / (one + exp(-gate[i]))
        dx[i] = g[i] * gate[i] * s
        dgate[i] = g[i] * x[i] * s * (one + gate[i] * (one - s))


def _flat(x, shape):
    return np.ascontiguousarray(x if x.shape == shape else np.broadcast_to(x, shape).copy()).reshape(-1)


def forward(x, gate, function):
    shape = np.broadcast_shapes(x.shape, gate.shape)
    x, gate = _flat(x, shape), _flat(gate, shape)
    y = np.empty_like(x)
    (_swish if function == "swish" else _sigmoid)(x, gate, y)
    return y.reshape(shape), (x, gate, function)


def backward(saved, g):
    x, gate, function = saved
    dx, dgate = np.empty_like(x), np.empty_like(x)
    (_swish_backward if function == "swish" else _sigmoid_backward)(x, gate, _flat(g, g.shape), dx, dgate)
    return dx.reshape(g.shape), dgate.reshape(g.shape)
