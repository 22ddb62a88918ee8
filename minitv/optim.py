"""AdamW over one flat buffer, gradient buffers, clipping, and the learning-rate schedule."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from autograd import Tensor, to_numpy
from autograd.device import beside, is_cupy, namespace, read

from .nn import Module, Parameter

SPAN = 2**18  # numbers of a flat buffer that a thread takes at once; a multiple of the kernel's chunks


def cosine(step: int, *, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """The learning rate of step 0, 1, ...: a linear rise over ``warmup`` steps, then half a cosine down to min_lr."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)


class GradientBuffer:
    """A flat gradient: the first contribution to a parameter is written, later ones are added."""

    def __init__(self, layout: dict[int, tuple[int, int, tuple[int, ...]]], flat):
        self.flat = flat
        self._views = {key: self.flat[start:stop].reshape(shape) for key, (start, stop, shape) in layout.items()}
        self.written: set[int] = set()

    def __call__(self, parameter: Parameter, gradient: Tensor) -> None:
        """The sink of ``Tensor.backward``."""
        view = self._views[id(parameter)]
        if id(parameter) in self.written:
            view += gradient.data
        else:
            view[...] = gradient.data
            self.written.add(id(parameter))

    def finish(self) -> None:
        """Zero what nothing was written to, and start over: the next contribution to a parameter is a first one."""
        for key, view in self._views.items():
            if key not in self.written:
                view[...] = 0
        self.written.clear()


class AdamW:
    """AdamW (arXiv 1711.05101) with global-norm clipping; weight decay on matrices only.

    The parameters are moved into one flat buffer, those that decay first, and become views of it, on the device where they
    lie. ``buffers`` are flat gradients, which ``step`` adds up in order; ``gradient`` is the sum.
    """

    def __init__(self, model: Module, *, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8,
                 weight_decay: float = 0.1, clip: float = 1.0, buffers: int = 1):
        named = sorted(model.named_parameters(), key=lambda item: item[1].ndim < 2)
        self._named = named
        self._settings = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        self._clip = clip
        size = sum(p.size for _, p in named)
        xp, dtype = namespace(*(p.data for _, p in named)), named[0][1].dtype
        self.decayed = sum(p.size for _, p in named if p.ndim >= 2)
        self.param, self.m, self.v = (xp.zeros(size, dtype) for _ in range(3))
        self._layout: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        start = 0
        for _, parameter in named:
            self._layout[id(parameter)] = (start, start + parameter.size, parameter.shape)
            start += parameter.size
        self.move(self.param)
        self.buffers = [self.buffer() for _ in range(buffers)]
        self.gradient = self.buffers[0].flat  # of the last step
        self.steps = 0

    def move(self, flat) -> None:
        """Let the parameters lie in another flat buffer."""
        for _, parameter in self._named:
            start, stop, shape = self._layout[id(parameter)]
            flat[start:stop] = parameter.data.reshape(-1)
            parameter.data = flat[start:stop].reshape(shape)
        self.param = flat

    def step(self, lr: float, run: Callable = map) -> float:
        """Add the gradients of all buffers, clip, update; returns the norm before clipping. A norm that is not finite
        changes nothing.

        ``run(function, items)`` maps over parts of the parameters, perhaps on threads.
        """
        return self.update(lr, *read(self.squares(run)), run)

    def buffer(self, flat=None) -> GradientBuffer:
        """One more buffer for a gradient, in a flat array of its own or in one that is given."""
        if flat is None:
            flat = namespace(self.param).zeros(self.param.size, self.param.dtype)
        return GradientBuffer(self._layout, flat)

    def add(self, left: GradientBuffer, right: GradientBuffer) -> None:
        """left += right, for gradients that are finished."""
        self._kernel().add(left.flat, right.flat)

    def squares(self, run: Callable = map, pairs: Sequence[tuple[GradientBuffer, GradientBuffer]] | None = None,
                total: GradientBuffer | None = None):
        """The first half of a step: add up the gradients; returns the sum of their squares, on a GPU without waiting.

        Of every pair the second is added to the first, one pair after the other, and ``total`` then is the sum. Without them
        the buffers that were written to are added to the first one.
        """
        if total is None:
            sources = [buffer for buffer in self.buffers if buffer.written] or self.buffers[:1]
            for buffer in sources:
                buffer.finish()
            total, pairs = sources[0], [(sources[0], buffer) for buffer in sources[1:]]
        self.gradient = total.flat
        flats = [(left.flat, right.flat) for left, right in pairs or ()]
        return sum(run(lambda r: self._kernel().sum_gradients(flats, total.flat, *r), self._ranges()))

    def update(self, lr: float, squares: float, run: Callable = map, *, count: int = 1) -> float:
        """The second half: clip and update by the gradients that ``squares`` added up, divided by ``count``.

        Returns the norm before clipping.
        """
        norm = math.sqrt(squares) / count
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        scale = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
        scale /= count
        settings = dict(self._settings, lr=lr, decayed=self.decayed, step=self.steps, scale=scale)
        list(run(lambda r: self._kernel().update(self.param, self.gradient, self.m, self.v, *r, **settings), self._ranges()))
        for _, parameter in self._named:
            parameter.version[0] += 1
        return norm

    def _kernel(self):
        """The fused kernels of the device, imported at the first step."""
        return importlib.import_module("autograd.ops.adamw." + ("gpu" if is_cupy(self.param) else "cpu"))

    def _ranges(self) -> list[tuple[int, int]]:
        """Parts of the flat buffers for threads; they depend on the size alone, as do the bits of a sum over them."""
        size = self.param.size
        length = size if is_cupy(self.param) else SPAN
        return [(start, min(start + length, size)) for start in range(0, size, length)]

    def state(self) -> dict[str, np.ndarray]:
        """Copies of both moments of every parameter, and the number of updates."""
        arrays, m, v = {"steps": np.array(self.steps, np.int64)}, to_numpy(self.m), to_numpy(self.v)
        for name, parameter in self._named:
            start, stop, shape = self._layout[id(parameter)]
            arrays[f"m.{name}"] = m[start:stop].reshape(shape).copy()
            arrays[f"v.{name}"] = v[start:stop].reshape(shape).copy()
        return arrays

    @staticmethod
    def fresh() -> dict[str, np.ndarray]:
        """The same before the first update, when both moments are 0: the number of updates, which is 0, says all."""
        return {"steps": np.array(0, np.int64)}

    def expected(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of the names, shapes and dtypes that ``load`` needs in place of these: those of ``fresh`` or of ``state``."""
        return self.fresh() if arrays.keys() == {"steps"} and not arrays["steps"].any() else self.state()

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore what ``state`` or ``fresh`` returned."""
        self.steps = int(arrays["steps"])
        if arrays.keys() == self.fresh().keys():
            self.m[:], self.v[:] = 0, 0
            return
        for name, parameter in self._named:
            start, stop, _ = self._layout[id(parameter)]
            self.m[start:stop] = beside(arrays[f"m.{name}"].reshape(-1), self.m)
            self.v[start:stop] = beside(arrays[f"v.{name}"].reshape(-1), self.v)
