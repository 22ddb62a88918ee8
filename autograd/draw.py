"""Drawing inputs for an operator: one protocol for property tests (Hypothesis) and for benchmarks (a seed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

LAYOUTS = ("c", "fortran", "strided", "reversed", "broadcast")


class Draw:
    """Sizes, values and memory layouts, all decided by ``integer(low, high)`` (both ends included).

    A test passes Hypothesis's integers and gets shrinking; ``seeded`` passes a generator's. ``dtype`` is the dtype of
    every float array that is drawn.
    """

    def __init__(self, integer: Callable[[int, int], int], dtype=np.float64, layouts: Sequence[str] = ("c",)):
        self.integer = integer
        self.dtype = np.dtype(dtype)
        self._layouts = tuple(layouts)
        self._least = 0  # of all sizes
        self._sizes: dict[str, int] = {}

    @classmethod
    def seeded(cls, seed: int, dtype=np.float64, layouts: Sequence[str] = ("c",)) -> Draw:
        """Draws that a seed decides."""
        generator = np.random.default_rng(seed)
        return cls(lambda low, high: low + int(generator.integers(0, high - low, endpoint=True, dtype=np.uint64)), dtype,
                   layouts)

    def size(self, low: int = 0, high: int = 4) -> int:
        """A size of an axis; 0 and 1 are legal sizes and are drawn."""
        return self.integer(max(low, self._least), max(high, self._least))

    @contextmanager
    def filled(self) -> Iterator[None]:
        """No axis that is drawn inside is empty."""
        self._least = 1
        try:
            yield
        finally:
            self._least = 0

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
            self._sizes[name] = self.size(0, 5)
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
