"""Philox4x32-10 (Salmon et al. 2011, SC'11): random words that are a function of a counter and a key."""

from __future__ import annotations

import numpy as np

M0, M1 = 0xD2511F53, 0xCD9E8D57  # the multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # the key's increments
LOW = 0xFFFFFFFF


def philox(c0, c1, c2, c3, seed: int):
    """Four uint32 arrays for each counter (c0, c1, c2, c3) under the 64-bit key ``seed``; the counters broadcast."""
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & np.uint64(LOW) for c in (c0, c1, c2, c3))
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    shift, low = np.uint64(32), np.uint64(LOW)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return tuple(np.broadcast_arrays(*(c.astype(np.uint32) for c in (c0, c1, c2, c3))))


def philox_int(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """``philox`` of one counter in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3
