"""The causal relative of Linformer: attention of one token, with a cache of mixtures, after which exact keys and values follow.

When a segment is complete, its c exact columns become s mixtures, in the same place: the cache never has a gap. That happens
once in c tokens, by the model's own operators.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd import Tensor, no_grad
from autograd.cpu.compile import cpu_kernel

from ..ops.attention.cpu import step
from ..variants import linformer
from .shared import FeedForward, Half, Linear, Norm, linear, linear_of, norm, take
from .transformer import Cache


class Weights(NamedTuple):
    norm: Norm
    qkv: Linear
    out: Linear
    segment: int
    mixtures: int  # of a segment
    sink: np.ndarray  # [H], -inf: there is none


@cpu_kernel
def attend(x, position, weights, cache, memory):
    """x += W attention(q, k, v) with q, k, v = W' norm(x); k and v are the next column of the cache."""
    width, (heads, size, _) = x.size, cache.keys.shape
    column = position // weights.segment * weights.mixtures + position % weights.segment
    scale = x.dtype.type(1 / np.sqrt(size))
    h, at = take(memory, 0, width)
    y, at = take(memory, at, width)
    qkv, at = take(memory, at, 3 * width)
    lse, at = take(memory, at, heads)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qkv, h, qkv, False)
    k, v = qkv[width : 2 * width], qkv[2 * width :]
    for b in range(heads):
        for c in range(size):
            cache.keys[b, c, column] = k[b * size + c]
            cache.values[b, column, c] = v[b * size + c]
    step(qkv[:width], cache.keys, cache.values, column + 1, scale, weights.sink, y, lse, memory[at:])
    linear(weights.out, y, x, True)


class SegmentAttention(Half):
    module = linformer.SegmentAttention
    kernel = staticmethod(attend)

    def wire(self, norm, module, model):
        self._module, columns = module, model.context // module.segment * module.rows + module.segment
        weights = Weights(norm, linear_of(module.qkv), linear_of(module.out), module.segment, module.rows,
                          np.full(module.heads, -np.inf, self.dtype))
        return weights, self._cache(columns)

    def _cache(self, columns: int) -> Cache:
        heads, size = self._module.heads, self.width // self._module.heads
        return Cache(np.zeros((heads, size, columns), self.dtype), np.zeros((heads, columns, size), self.dtype))

    def memory(self, module, model):
        return 5 * self.width + module.heads + model.context // module.segment * module.rows + module.segment

    def load(self, state, position):
        self._write(0, state.mixed_keys, state.mixed_values)
        self._write(state.mixed_keys.shape[2], state.keys, state.values)

    def __call__(self, x, position):
        super().__call__(x, position)
        segment, mixtures = self.weights.segment, self.weights.mixtures
        if (position + 1) % segment:
            return
        first, module = position // segment * mixtures, self._module
        with no_grad():
            keys = module.mixtures(module.E, Tensor(self.state.keys[None, :, :, first : first + segment].swapaxes(2, 3)), 1)
            values = module.mixtures(module.F, Tensor(self.state.values[None, :, first : first + segment]), 1)
        self._write(first, keys, values)

    def _write(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values [1 H n K] become columns from ``first`` on; the cache has room for a segment after them."""
        stop = first + keys.shape[2]
        self._reserve(stop + self.weights.segment)
        self.state.keys[:, :, first:stop] = keys.data[0].swapaxes(1, 2)
        self.state.values[:, first:stop] = values.data[0]

    def _reserve(self, columns: int) -> None:
        """A longer text, which a model without learned positions takes, needs a larger cache."""
        before, have = self.state, self.state.keys.shape[2]
        if columns <= have:
            return
        self.state = self._cache(2 * columns)
        self.state.keys[:, :, :have], self.state.values[:, :have] = before
        memory = np.empty(len(self._arguments[2]) - have + 2 * columns, self.dtype)
        self._arguments = self.weights, self.state, memory


HALVES = SegmentAttention, FeedForward
