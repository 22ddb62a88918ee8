"""adamw on the CPU, in place over ranges of flat buffers, so that worker threads share one step."""

import math

import numpy as np

from ...cpu.compile import cpu_kernel

CHUNK = 4096  # partial sums of squares are float64 sums of float32 chunks: accurate, and the same on every run


@cpu_kernel
def _update(param, grad, m, v, kept, rate, beta1, beta2, correction, eps, scale):
    one = param.dtype.type(1)
    for i in range(param.size):
        g = grad[i] * scale
        mean = beta1 * m[i] + (one - beta1) * g
        square = beta2 * v[i] + (one - beta2) * g * g
        m[i], v[i] = mean, square
        param[i] = param[i] * kept - rate * mean / (np.sqrt(square) * correction + eps)


@cpu_kernel
def _add(total, part):
    for i in range(total.size):
        total[i] += part[i]


@cpu_kernel
def _squares(values):
    total = 0.0
    for start in range(0, values.size, CHUNK):
        chunk = values[start:start + CHUNK]
        partial = values.dtype.type(0)
        for i in range(chunk.size):
            partial += chunk[i] * chunk[i]
        total += partial
    return total


def update(param, grad, m, v, lo, hi, *, lr, beta1, beta2, eps, weight_decay, decayed, step, scale):
    """One step in place on elements lo .. hi of flat buffers; elements below ``decayed`` get weight decay."""
    number = param.dtype.type
    rate, correction = number(lr / (1 - beta1**step)), number(1 / math.sqrt(1 - beta2**step))
    for start, stop, kept in ((lo, min(hi, decayed), 1 - lr * weight_decay), (max(lo, decayed), hi, 1.0)):
        if start < stop:
            part = slice(start, stop)
            _update(param[part], grad[part], m[part], v[part], number(kept), rate, number(beta1), number(beta2),
                    correction, number(eps), number(scale))


def add(left, right):
    """left += right, on flat buffers."""
    _add(left, right)


def sum_gradients(pairs, total, lo, hi) -> float:
    """Add elements lo .. hi of the second buffer of every pair to the first, and return the sum of the squares in ``total``."""
    for left, right in pairs:
        _add(left[lo:hi], right[lo:hi])
    return _squares(total[lo:hi])


def forward(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, decayed, step, scale):
    param, m, v = param.copy(), m.copy(), v.copy()
    update(param, np.ascontiguousarray(grad), m, v, 0, param.size, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
           weight_decay=weight_decay, decayed=decayed, step=step, scale=scale)
    return (param, m, v), ()
