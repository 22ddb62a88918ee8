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
from scipy import fft
from scipy import special as scipy_special

from .cuda.rows import add_rows
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


def or_zeros(x, like):
    """The array, or zeros like another one where there is none: a gradient that never arrived."""
    return namespace(like).zeros_like(like) if x is None else x


def add_at(target, key, values) -> None:
    """target[key] += values, where repeated indices add up, in the order of the values; ``target`` is contiguous."""
    if not is_cupy(target):
        np.add.at(target, key, values)
    elif values.size:
        first = key[0] if isinstance(key, tuple) else key
        if (not isinstance(key, tuple) or len(key) == 1) and first.dtype != np.bool_:  # whole rows
            ids = first.reshape(-1)
            add_rows(target.reshape(len(target), -1), ids + len(target) * (ids < 0), values.reshape(ids.size, -1))
        else:
            places = namespace(target).arange(target.size).reshape(target.shape)[key].reshape(-1)
            add_rows(target.reshape(-1, 1), places, values.reshape(-1, 1))
