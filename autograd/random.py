"""Random: random numbers that are a value, by Philox, the same bits in NumPy and in kernels."""

from __future__ import annotations

import operator
from types import ModuleType

import numpy as np

from .errors import DomainError, DtypeError, ShapeError
from .philox import LOW, philox, philox_int

LARGE = 2**20  # from this many numbers on a kernel draws them, twice as fast; for fewer it is not worth its compilation


class Random:
    """A source of random numbers that is a value: the same Random gives the same numbers each time.

    Different numbers come from different sources: ``split(i, j, ...)`` makes independent ones.
    """

    __slots__ = ("seed",)

    def __init__(self, seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise DomainError(f"Random: seed must be an integer in [0, 2**64), got {seed!r}")
        self.seed = int(seed)

    def __repr__(self) -> str:
        return f"Random({self.seed})"

    def split(self, *path: int) -> Random:
        """An independent source for each path of integers >= 0."""
        seed = self.seed
        for step in map(operator.index, path):  # NumPy's integers would overflow
            if not 0 <= step < 2**64:
                raise DomainError(f"Random.split: a path holds integers in [0, 2**64), got {step}")
            a, b, _, _ = philox_int((step & LOW, step >> 32, 0, 2), seed)
            seed = a | b << 32
        return Random(seed)

    def words(self, count: int) -> np.ndarray:
        """``count`` uint32 words; word e is element e mod 4 of counter (e div 4, 0, 0, 0)."""
        kernels = _kernels(count)
        if kernels:
            out = np.empty(-(-count // 4) * 4, np.uint32)
            kernels.fill_words(np.uint64(self.seed), out)
            return out[:count]
        blocks = np.arange(-(-count // 4), dtype=np.uint64)
        return np.stack(philox(blocks, blocks >> np.uint64(32), 0, 0, self.seed), axis=-1).reshape(-1)[:count]

    def uniform(self, shape=(), dtype=np.float32) -> np.ndarray:
        """Uniform in [0, 1): multiples of 2**-24 (float32) or 2**-53 (float64)."""
        size, dtype = _size("uniform", shape), _float("uniform", dtype)
        if dtype == np.float32:
            return ((self.words(size) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
        kernels = _kernels(size)
        if kernels:
            out = np.empty(-(-size // 2) * 2)
            kernels.fill_uniform(np.uint64(self.seed), out)
            return out[:size].reshape(shape)
        words = self.words(2 * size).astype(np.uint64).reshape(-1, 2)
        return (((words[:, 0] << np.uint64(32) | words[:, 1]) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def normal(self, shape=(), dtype=np.float32) -> np.ndarray:
        """Standard normal, by the Box-Muller transform of pairs of uniforms."""
        size, dtype = _size("normal", shape), _float("normal", dtype)
        half = -(-size // 2)
        u = self.uniform((2, half), np.float64)
        radius, angle = np.sqrt(-2 * np.log1p(-u[0])), 2 * np.pi * u[1]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].reshape(shape).astype(dtype)

    def integers(self, low: int, high: int, shape=()) -> np.ndarray:
        """Integers in [low, high), int64."""
        low, high = operator.index(low), operator.index(high)
        if high <= low or high - low > 2**31 or low < -(2**63) or high > 2**63:
            raise DomainError(f"Random.integers: needs low < high, int64 and at most 2**31 values, got [{low}, {high})")
        size = _size("integers", shape)
        span = np.uint64(high - low)
        words = self.words(2 * size).astype(np.uint64).reshape(-1, 2)
        # (word * span) / 2**64 in two halves: a bias below 2**-32
        product = (words[:, 0] * span) + (words[:, 1] * span >> np.uint64(32))
        return (low + (product >> np.uint64(32)).astype(np.int64)).reshape(shape)

    def permutation(self, n: int) -> np.ndarray:
        """A random order of 0 .. n-1."""
        if n < 0:
            raise DomainError(f"Random.permutation: n must be at least 0, got {n}")
        return np.argsort(self.uniform((n,), np.float64), kind="stable")

    def keep(self, shape, p: float) -> np.ndarray:
        """A boolean array, False with probability p: word e of element e (C order) is at least p 2**32."""
        if not 0 <= p <= 1:
            raise DomainError(f"Random.keep: p must be a probability in [0, 1], got {p}")
        size = _size("keep", shape)
        return (self.words(size).astype(np.uint64) >= round(p * 2**32)).reshape(shape)


def _kernels(count: int) -> ModuleType | None:
    """The kernels that draw many numbers; None for few, or where none can be compiled."""
    if count < LARGE:
        return None
    from .cpu import philox
    from .cpu.compile import unavailable

    return None if unavailable() else philox


def _size(name: str, shape) -> int:
    if np.min(shape, initial=0) < 0:
        raise ShapeError(f"Random.{name}: shape {shape} has a negative size")
    return int(np.prod(shape, dtype=int))


def _float(name: str, dtype) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise DtypeError(f"Random.{name}: dtype {dtype}, allowed: float32, float64")
    return dtype
