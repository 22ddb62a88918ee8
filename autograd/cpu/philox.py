"""Philox4x32-10 inside kernels: the same bits as autograd.random."""

import numpy as np

from ..philox import LOW, M0, M1, W0, W1
from .compile import cpu_kernel, inline

_M0, _M1, _W0, _W1, _LOW, _SHIFT = (np.uint64(n) for n in (M0, M1, W0, W1, LOW, 32))


@inline
def philox(c0, c1, c2, c3, k0, k1):
    """Four 32-bit words of the counter (c0, c1, c2, c3) under the key (k0, k1), all of them uint64 below 2**32.

    In 64 bits throughout, a round is two vector multiplications: half as many instructions as with conversions between.
    """
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


LANES = 64  # counters at a time


@cpu_kernel
def fill_words(seed, out):
    """Random(seed).words(len(out)) of whole counters, uint32."""
    zero, low, high = np.uint64(0), seed & _LOW, seed >> _SHIFT
    words = np.empty((4, LANES), np.uint64)
    a, b, c, d = words[0], words[1], words[2], words[3]
    for first in range(0, out.size // 4, LANES):
        counter, count = np.uint64(first), min(LANES, out.size // 4 - first)
        for e in range(LANES):  # LANES divides 2**32: no carry
            a[e], b[e], c[e], d[e] = philox((counter & _LOW) + np.uint64(e), counter >> _SHIFT, zero, zero, low, high)
        part = out[4 * first : 4 * (first + count)]
        for e in range(np.uintp(count)):
            i = np.uintp(4) * e
            part[i], part[i + np.uintp(1)] = a[e], b[e]
            part[i + np.uintp(2)], part[i + np.uintp(3)] = c[e], d[e]


@cpu_kernel
def fill_uniform(seed, out):
    """Random(seed).uniform(len(out), float64) of whole counters, two numbers each."""
    zero, low, high = np.uint64(0), seed & _LOW, seed >> _SHIFT
    words = np.empty((2, LANES), np.float64)
    x, y = words[0], words[1]
    for first in range(0, out.size // 2, LANES):
        counter, count = np.uint64(first), min(LANES, out.size // 2 - first)
        for e in range(LANES):
            a, b, c, d = philox((counter & _LOW) + np.uint64(e), counter >> _SHIFT, zero, zero, low, high)
            x[e] = np.float64(np.int64((a << _SHIFT | b) >> np.uint64(11))) * 2.0**-53
            y[e] = np.float64(np.int64((c << _SHIFT | d) >> np.uint64(11))) * 2.0**-53
        part = out[2 * first : 2 * (first + count)]
        for e in range(np.uintp(count)):
            part[np.uintp(2) * e], part[np.uintp(2) * e + np.uintp(1)] = x[e], y[e]
