"""gated on the CPU: one pass each way; backward computes the sigmoid again instead of reading it from memory."""

import numpy as np

from autograd.cpu.compile import cpu_kernel, inline
from autograd.cpu.math import exp

FAR = 1e4  # beyond, a sigmoid is 0 or 1 and its slope 0; infinities must not meet zeros


@cpu_kernel(parts="x gate y")
def sigmoid_row(x, gate, y):
    one = x.dtype.type(1)
    for i in range(x.size):
        y[i] = x[i] / (one + exp(-gate[i]))


@inline
def swish(x, gate):
    """x · gate · sigmoid(gate)"""
    far = type(x)(FAR)
    v = -far if gate < -far else gate
    return x * v / (type(x)(1) + exp(-v))


@cpu_kernel(parts="x gate y")
def swish_row(x, gate, y):
    for i in range(x.size):
        y[i] = swish(x[i], gate[i])


@cpu_kernel(parts="x gate g gx ggate")
def _sigmoid_backward(x, gate, g, gx, ggate):
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for i in range(x.size):
        e = exp(-abs(gate[i]))
        upper = one / (one + e)
        lower = e * upper  # 1 - upper, to all its digits
        gx[i] = g[i] * (upper if gate[i] > zero else lower)
        ggate[i] = g[i] * x[i] * upper * lower


@cpu_kernel(parts="x gate g gx ggate")
def _swish_backward(x, gate, g, gx, ggate):
    zero, one, far = x.dtype.type(0), x.dtype.type(1), x.dtype.type(FAR)
    for i in range(x.size):
        v = -far if gate[i] < -far else gate[i]
        z = far if v > far else v
        e = exp(-abs(z))
        upper = one / (one + e)
        lower = e * upper
        s = upper if z > zero else lower
        gx[i] = g[i] * v * s
        ggate[i] = g[i] * x[i] * (s + z * upper * lower)


def _flat(x, shape):
    return np.ascontiguousarray(x if x.shape == shape else np.broadcast_to(x, shape).copy()).reshape(-1)


def forward(x, gate, function):
    shape = np.broadcast_shapes(x.shape, gate.shape)
    x, gate = _flat(x, shape), _flat(gate, shape)
    y = np.empty_like(x)
    (swish_row if function == "swish" else sigmoid_row)(x, gate, y)
    return y.reshape(shape), (x, gate, function)


def backward(saved, g):
    x, gate, function = saved
    gx, ggate = np.empty_like(x), np.empty_like(x)
    (_swish_backward if function == "swish" else _sigmoid_backward)(x, gate, _flat(g, g.shape), gx, ggate)
    return gx.reshape(g.shape), ggate.reshape(g.shape)
