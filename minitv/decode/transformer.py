"""The Transformer: attention of one token, with the cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd.cpu.compile import cpu_kernel

from ..ops.attention.cpu import step
from ..variants import transformer
from .shared import FeedForward, Half, Linear, Norm, linear, linear_of, norm, take


class Weights(NamedTuple):
    norm: Norm
    qkv: Linear
    out: Linear
    sink: np.ndarray  # [H], a score of each head that belongs to no token; -inf is none


class Cache(NamedTuple):
    """Keys are kept transposed, so that the scores of a query are sums of whole vectors."""

    keys: np.ndarray  # [G head_dim context]
    values: np.ndarray  # [G context head_dim]


@cpu_kernel
def attend(x, position, weights, cache, memory):
    """x += W attention(q, k, v) with q, k, v = W' norm(x); k and v join the cache."""
    width, (groups, size, _), heads = x.size, cache.keys.shape, weights.sink.size
    scale = x.dtype.type(1 / np.sqrt(size))
    h, at = take(memory, 0, width)
    y, at = take(memory, at, width)
    qkv, at = take(memory, at, width + 2 * groups * size)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qkv, h, qkv, False)
    k, v = qkv[width : width + groups * size], qkv[width + groups * size :]
    for g in range(groups):
        for c in range(size):
            cache.keys[g, c, position] = k[g * size + c]
            cache.values[g, position, c] = v[g * size + c]
    lse, at = take(memory, at, heads)
    step(qkv[:width], cache.keys, cache.values, position + 1, scale, weights.sink, y, lse, memory[at:])
    linear(weights.out, y, x, True)


class Attention(Half):
    module = transformer.Attention
    kernel = staticmethod(attend)

    @classmethod
    def computes(cls, module):
        return super().computes(module) and module.rotation is None

    def wire(self, norm, module, model):
        groups, context, size = module.kv_heads, model.context, self.width // module.heads
        cache = Cache(np.zeros((groups, size, context), self.dtype), np.zeros((groups, context, size), self.dtype))
        return Weights(norm, linear_of(module.qkv), linear_of(module.out), np.full(module.heads, -np.inf, self.dtype)), cache

    def memory(self, module, model):
        return 5 * self.width + module.heads + module.heads // module.kv_heads * model.context

    def load(self, state, position):
        self.state.keys[:, :, :position] = state.keys.data[0].swapaxes(1, 2)
        self.state.values[:, :position] = state.values.data[0]


HALVES = Attention, FeedForward
