"""Products over pairs of positions of which only some are seen: what is not seen may be NaN or infinite, and shows nowhere.

A matrix product multiplies everything, and 0 times NaN is NaN. So where a number is not finite, the unseen ones are replaced
before they are multiplied, pair by pair, which takes a larger array.
"""

from __future__ import annotations

from autograd.device import namespace
from autograd.ops import matmul, sum, swapaxes, where


def finite(x):
    return bool(namespace(x.data).isfinite(x.data).all())


def scores(q, k, mask=None):
    """q[.. T K] and k[.. S K] -> their products [.. T S], which have no meaning where the boolean seen[.. T S] is False."""
    if mask is None or finite(k):
        return matmul(q, swapaxes(k))
    return sum(q[..., None, :] * where(mask[..., None], k[..., None, :, :], 0.0), axis=-1)


def weighted(weights, v, mask=None):
    """weights[.. T S] and v[.. S V] -> the sums over S [.. T V] of what is seen; unseen weights are 0."""
    if mask is None or finite(v):
        return matmul(weights, v)
    return sum(weights[..., None] * where(mask[..., None], v[..., None, :, :], 0.0), axis=-2)
