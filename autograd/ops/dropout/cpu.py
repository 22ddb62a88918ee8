"""dropout on the CPU: the mask is drawn in the kernel and drawn again in backward; nothing is stored."""

import numpy as np

from ...cpu.compile import cpu_kernel
from ...cpu.philox import philox
from ...random import LOW

BLOCKS = 64  # counters at a time: their words are drawn lane by lane, then used in the order of the elements


@cpu_kernel(parts="blocks")
def _drop(x, low, high, threshold, scale, y, blocks):
    zero, none = np.uint64(0), x.dtype.type(0)
    words = np.empty((4, BLOCKS), np.uint64)
    a, b, c, d = words[0], words[1], words[2], words[3]
    for first in range(4 * BLOCKS * blocks[0], 4 * BLOCKS * blocks[1], 4 * BLOCKS):
        counter = np.uint64(first // 4)
        bottom, top = counter & np.uint64(LOW), counter >> np.uint64(32)
        for e in range(BLOCKS):  # BLOCKS divides 2**32: no carry
            a[e], b[e], c[e], d[e] = philox(bottom + np.uint64(e), top, zero, zero, low, high)
        source, out = x[first : first + 4 * BLOCKS], y[first : first + 4 * BLOCKS]
        whole = source.size // 4
        for e in range(np.uintp(whole)):
            i = np.uintp(4) * e
            out[i] = source[i] * scale if a[e] >= threshold else none
            out[i + np.uintp(1)] = source[i + np.uintp(1)] * scale if b[e] >= threshold else none
            out[i + np.uintp(2)] = source[i + np.uintp(2)] * scale if c[e] >= threshold else none
            out[i + np.uintp(3)] = source[i + np.uintp(3)] * scale if d[e] >= threshold else none
        for i in range(4 * whole, source.size):
            out[i] = source[i] * scale if words[i % 4, whole] >= threshold else none


def _run(x, p, seed):
    if p == 1:
        return np.zeros(x.shape, x.dtype)
    flat = np.ascontiguousarray(x).reshape(-1)
    y = np.empty_like(flat)
    threshold, scale = np.uint64(round(p * 2**32)), x.dtype.type(1 / (1 - p))
    _drop(flat, np.uint64(seed & LOW), np.uint64(seed >> 32), threshold, scale, y,
          (0, -(-flat.size // (4 * BLOCKS))))
    return y.reshape(x.shape)


def forward(x, p, seed):
    return _run(x, p, seed), (p, seed)


def backward(saved, g):
    return (_run(g, *saved),)
