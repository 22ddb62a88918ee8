"""Philox4x32-10 inside kernels: the same bits as autograd.random."""

import numpy as np

from .kernels import inline
from .random import LOW, M0, M1, W0, W1

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
