"""What NumPy and CuPy do differently, each difference in one place.

    what                     NumPy                 CuPy                                  here
    adding at indices        np.add.at, in order   atomics, in no fixed order            add_at: in order
    special functions        scipy.special         cupyx.scipy.special                   special
    Fourier transforms       scipy.fft             cupyx.scipy.fft                       transforms
    largest of nothing       initial=-inf          no such argument                      largest
    products of stacks       BLAS                  copies transposed operands            blas.matmul
    index out of range       raises                counts round and round                device.check_range
    reductions to a number   scalars               0-d arrays, reading one waits         device.unscalar, device.read
    sorting                  kind="stable"         always stable, takes the argument     give it always
    arrays of the host       as all                refused, except as an index           device.beside
"""

from __future__ import annotations

import math

import numpy as np
from scipy import fft, special as scipy_special

from .device import is_cupy, namespace


def special(x):
    """The module of special functions for this array."""
    if not is_cupy(x):
        return scipy_special
    from cupyx.scipy import special as cupy_special

    return cupy_special


def transforms(x):
    """The module of Fourier transforms for this array; it may refuse an empty one."""
    if not is_cupy(x):
        return fft
    from cupyx.scipy import fft as cupy_fft

    return cupy_fft


def largest(x, axes):
    """The maximum over axes, which are kept; -inf of nothing."""
    if x.size:
        return namespace(x).max(x, axis=axes, keepdims=True)
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return namespace(x).full(kept, -math.inf, x.dtype)


def add_at(target, key, values) -> None:
    """target[key] += values, where repeated indices add up, in the order of the values; ``target`` is contiguous."""
    if not is_cupy(target):
        np.add.at(target, key, values)
        return
    from .ops.embedding.gpu import add_rows

    if len(key) == 1 and values.ndim - key[0].ndim == target.ndim - 1:  # whole rows
        ids = key[0].reshape(-1)
        ids = ids + target.shape[0] * (ids < 0)
        add_rows(target.reshape(target.shape[0], -1), ids, values.reshape(ids.size, -1))
    else:
        xp = namespace(target)
        places = xp.arange(target.size).reshape(target.shape)[key]
        values = xp.broadcast_to(values, places.shape)
        add_rows(target.reshape(-1, 1), places.reshape(-1), values.reshape(-1, 1))
