"""relu on the CPU: one pass each way, without a branch that a processor would guess wrongly; backward needs only x."""

import numpy as np

from ...cpu.compile import cpu_kernel


@cpu_kernel(parts="x y")
def relu_row(x, y):
    zero = x.dtype.type(0)
    for i in range(x.size):
        y[i] = zero if x[i] < zero else x[i]  # NaN stays


@cpu_kernel(parts="x g gx")
def _backward(x, g, gx):
    zero = x.dtype.type(0)
    for i in range(x.size):
        gx[i] = g[i] if x[i] > zero else zero


def forward(x):
    flat = np.ascontiguousarray(x).reshape(-1)
    y = np.empty_like(flat)
    relu_row(flat, y)
    return y.reshape(x.shape), flat


def backward(saved, g):
    gx = np.empty_like(saved)
    _backward(saved, np.ascontiguousarray(g).reshape(-1), gx)
    return (gx.reshape(g.shape),)
