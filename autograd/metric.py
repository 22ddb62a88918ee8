"""The one measure of equality, of which every test of values speaks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from .device import to_numpy

# The rounding that is allowed to a result, relative to its largest value: 256 ulp. Longer sums grow like the square
# root of their number of terms; each test states that number where it is large.
TOLERANCE = {np.dtype(np.float32): 256 * 2.0**-24, np.dtype(np.float64): 256 * 2.0**-53}


_recorders: ContextVar[tuple] = ContextVar("recorders of errors", default=())


@contextmanager
def recorded() -> Iterator[list[tuple[float, float]]]:
    """Collects (error, allowed) of every comparison within."""
    errors: list[tuple[float, float]] = []
    token = _recorders.set((*_recorders.get(), errors))
    try:
        yield errors
    finally:
        _recorders.reset(token)


def within(error: float, allowed: float) -> bool:
    """Whether an error is allowed; it is recorded."""
    for errors in _recorders.get():
        errors.append((error, allowed))
    return error <= allowed


def distance(actual, expected) -> float:
    """The largest difference relative to the largest expected value; NaN and infinities must stand in the same places.

    Returns infinity where they do not, or where the shapes differ. For an array whose values are all below 1 in
    magnitude, the scale stays that of the values, but never below 1e-3.
    """
    actual, expected = to_numpy(actual), to_numpy(expected)
    if actual.shape != expected.shape:
        return math.inf
    if not actual.size:
        return 0.0
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(expected[finite]).max()), 1e-3)
    return float(np.abs(actual[finite] - expected[finite]).max()) / scale


def assert_close(actual, expected, message: str = "values differ", terms: float = 1) -> None:
    """AssertionError unless ``distance`` is within the tolerance of ``actual``'s dtype times √terms."""
    dtype = to_numpy(actual).dtype
    limit = TOLERANCE.get(dtype, 0.0) * math.sqrt(max(terms, 1))
    error = distance(actual, expected)
    if not within(error, limit):
        a, e = to_numpy(actual), to_numpy(expected)
        detail = f"shapes {a.shape} and {e.shape}" if a.shape != e.shape else f"relative error {error:.3g}, allowed {limit:.3g}"
        raise AssertionError(f"{message}: {detail} ({dtype})\nactual   {a.ravel()[:8]}\nexpected {e.ravel()[:8]}")
