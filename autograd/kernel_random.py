"""Philox4x32-10 inside kernels: the same bits as autograd.random."""

import numpy as np

from .kernels import inline
from .random import M0, M1, W0, W1

_M0, _M1 = np.uint64(M0), np.uint64(M1)
_W0, _W1 = np.uint32(W0), np.uint32(W1)
_SHIFT = np.uint64(32)


@inline
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of the counter (c0, c1, c2, c3) under the key (k0, k1); all arguments are uint32."""
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = np.uint32(np.uint32(p1 >> _SHIFT) ^ c1 ^ k0), np.uint32(p1), \
            np.uint32(np.uint32(p0 >> _SHIFT) ^ c3 ^ k1), np.uint32(p0)
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3
