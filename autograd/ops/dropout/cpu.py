"""dropout on the CPU: the mask is drawn in the kernel and drawn again in backward; nothing is stored."""

import numpy as np

from ...kernel_random import philox
from ...kernels import cpu_kernel


@cpu_kernel
def _drop(x, low, high, threshold, scale, y):
    zero, none = np.uint32(0), x.dtype.type(0)
    for block in range((x.size + 3) // 4):
        a, b, c, d = philox(np.uint32(block), np.uint32(np.uint64(block) >> np.uint64(32)), zero, zero, low, high)
        i = 4 * block
        if i + 4 <= x.size:
            y[i] = x[i] * scale if a >= threshold else none
            y[i + 1] = x[i + 1] * scale if b >= threshold else none
            y[i + 2] = x[i + 2] * scale if c >= threshold else none
            y[i + 3] = x[i + 3] * scale if d >= threshold else none
        else:
            y[i] = x[i] * scale if a >= threshold else none
            if i + 1 < x.size:
                y[i + 1] = x[i + 1] * scale if b >= threshold else none
            if i + 2 < x.size:
                y[i + 2] = x[i + 2] * scale if c >= threshold else none


def _run(x, p, seed):
    if p == 1:
        return np.zeros(x.shape, x.dtype)
    flat = np.ascontiguousarray(x).reshape(-1)
    y = np.empty_like(flat)
    threshold, scale = np.uint64(round(p * 2**32)), x.dtype.type(1 / (1 - p))
    _drop(flat, np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32), threshold, scale, y)
    return y.reshape(x.shape)


def forward(x, *, p, seed):
    return _run(x, p, seed), (p, seed)


def backward(saved, g):
    return (_run(g, *saved),)
