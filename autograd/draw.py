"""Drawing inputs for an operator: one protocol for property tests (Hypothesis) and for benchmarks (a seed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

LAYOUTS = ("c", "fortran", "strided", "reversed", "broadcast")


class Draw:
    """Sizes, values and memory layouts, all decided by ``integer(low, high)`` (both ends included).

    A test passes Hypothesis's integers and gets shrinking; ``seeded`` passes a generator's. ``dtype`` is the dtype of
    every float array that is drawn. ``sizes`` are those that are not drawn, by the letters of the signature.
    """

    def __init__(self, integer: Callable[[int, int], int], dtype=np.float64, layouts: Sequence[str] = ("c",),
                 sizes: Mapping[str, int] | None = None):
        self.integer = integer
        self.dtype = np.dtype(dtype)
        self.sizes = dict(sizes or {})
        self.letters: dict[str, int] = {}  # that could have been chosen, and the least size of each
        self._layouts = tuple(layouts)
        self._least = 0  # of all sizes
        self._sizes: dict[str, int] = {}

    @classmethod
    def seeded(cls, seed: int, dtype=np.float64, layouts: Sequence[str] = ("c",),
               sizes: Mapping[str, int] | None = None) -> Draw:
        """Draws that a seed decides."""
        generator = np.random.default_rng(seed)
        return cls(lambda low, high: low + int(generator.integers(0, high - low, endpoint=True, dtype=np.uint64)), dtype,
                   layouts, sizes)

    @classmethod
    def replayed(cls, choices: Sequence[int], dtype=np.float64, layouts: Sequence[str] = ("c",),
                 sizes: Mapping[str, int] | None = None) -> Draw:
        """Draws that repeat these integers, each within its bounds, and then take the smallest; ``draw.choices`` are all of
        them, with what was the smallest.
        """
        choices, taken = iter(choices), []

        def integer(low: int, high: int) -> int:
            value = min(max(next(choices, low), low), high)
            taken.append((value, low))
            return value

        draw = cls(integer, dtype, layouts, sizes)
        draw.choices = taken
        return draw

    def size(self, low: int = 0, high: int = 4, letter: str = "") -> int:
        """A size of an axis; 0 and 1 are legal sizes and are drawn. ``letter`` is the axis's in the signature."""
        self.letters[letter] = low
        if letter in self.sizes:
            return self.sizes[letter]
        return self.integer(max(low, self._least), max(high, self._least))

    def multiple(self, part: str, whole: str, low: int, high: int, least: int, most: int) -> tuple[int, int]:
        """The sizes of two letters: one from low to high, and that times a factor from least to most."""
        self.letters[whole] = low * least
        if whole in self.sizes and part not in self.sizes:
            return self.size(low, high, whole), self.size(low, high, whole)
        size = self.size(low, high, part)
        return size, self.sizes[whole] if whole in self.sizes else size * self.integer(least, most)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """No axis that is drawn inside is empty."""
        before, self._least = self._least, 1
        try:
            yield
        finally:
            self._least = before

    def choice(self, options: Sequence):
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def boolean(self) -> bool:
        return bool(self.integer(0, 1))

    def shape(self, low: int = 0, high: int = 3, size: int = 4) -> tuple[int, ...]:
        """A shape with between ``low`` and ``high`` axes."""
        return tuple(self.size(0, size) for _ in range(self.integer(low, high)))

    def generator(self) -> np.random.Generator:
        """A NumPy generator with a drawn seed, for generic values."""
        return np.random.default_rng(self.integer(0, 2**32 - 1))

    def floats(self, *shape: int, low: float | None = None, high: float | None = None, kinks=()) -> np.ndarray:
        """Generic values: standard normal, or uniform in [low, high]; at least 0.05 away from ``kinks``."""
        generator = self.generator()
        values = generator.standard_normal(shape) if low is None else generator.uniform(low, high, shape)
        for kink in kinks:
            near = np.abs(values - kink) < 0.05
            values = np.where(near, kink + np.where(values < kink, -0.1, 0.1), values)
        return self.layout(values.astype(self.dtype))

    def distinct(self, *shape: int) -> np.ndarray:
        """Values that differ from each other by at least 0.1: no ties, no kinks of max or sort."""
        size = int(np.prod(shape, dtype=int))
        return self.layout((self.generator().permutation(size) * 0.1 - 0.05 * size).reshape(shape).astype(self.dtype))

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers in [low, high)."""
        if high <= low:
            return np.zeros(tuple(0 if n else n for n in shape) if shape else (0,), np.intp)
        return self.layout(self.generator().integers(low, high, shape))

    def mask(self, *shape: int) -> np.ndarray:
        """Booleans, a few more True than False."""
        return self.layout(self.generator().random(shape) < 0.6)

    def layout(self, array: np.ndarray) -> np.ndarray:
        """The same values in a drawn memory layout ("broadcast" repeats one slice, so it changes the values)."""
        kind = self.choice(self._layouts) if len(self._layouts) > 1 else self._layouts[0]
        if kind == "c" or not array.ndim or not array.size:
            return array
        if kind == "fortran":
            return np.asfortranarray(array)
        if kind == "strided":
            wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
            wide[..., ::2] = array
            return wide[..., ::2]
        if kind == "reversed":
            return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
        return np.broadcast_to(array[:1], array.shape)

    def letter(self, name: str) -> int:
        """The size of a dimension letter: drawn once, the same wherever it stands."""
        if name.isdigit():
            return int(name)
        if name not in self._sizes:
            self._sizes[name] = self.size(0, 5, name)
        return self._sizes[name]


def draw_inputs(op, draw: Draw):
    """The arrays and parameters for one call of ``op``: as it declares, or derived from its signature."""
    if op.draw is not None:
        return op.draw(draw)
    lead = draw.shape(0, 2)
    arrays = []
    for argument in op.signature.inputs:
        if argument.optional and draw.boolean():
            arrays.append(None)
            continue
        shape: tuple[int, ...] = ()
        for letter in argument.dims:
            shape += lead if letter == "..." else (draw.letter(letter),)
        arrays.append(draw.mask(*shape) if argument.kind == "bool" else draw.floats(*shape))
    return tuple(arrays), {}
