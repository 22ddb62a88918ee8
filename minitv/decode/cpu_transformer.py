"""Attention of one token, with the cache of keys and values.

Keys are kept transposed, [H head_dim context], so that the scores of a query are sums of whole vectors.
"""

from __future__ import annotations

import numpy as np

from autograd.kernel_math import exp
from autograd.kernels import cpu_kernel

from .cpu import Half, affine, linear, norm, take


@cpu_kernel
def _attend(query, keys, values, seen, scale, y, scores):
    """One head: y = softmax(scale · query · keys[:, :seen]) values[:seen]."""
    zero, one = query.dtype.type(0), query.dtype.type(1)
    for j in range(seen):
        scores[j] = zero
    for c in range(query.size):
        row, factor = keys[c], query[c] * scale
        for j in range(seen):
            scores[j] += factor * row[j]
    top, total = scores[0], zero
    for j in range(seen):
        top = scores[j] if scores[j] > top else top
    for j in range(seen):
        weight = exp(scores[j] - top)
        scores[j] = weight
        total += weight
    for c in range(y.size):
        y[c] = zero
    for j in range(seen):
        row, weight = values[j], scores[j] * (one / total)
        for c in range(y.size):
            y[c] += weight * row[c]


@cpu_kernel
def _step(x, past, affine, eps, centered, qkv_weight, qkv_bias, out, out_bias, keys, values, memory):
    """The token follows ``past`` others; its keys and values join theirs."""
    width, (heads, size) = x.size, keys.shape[:2]
    scale = x.dtype.type(1 / np.sqrt(size))
    h, at = take(memory, 0, width)
    y, at = take(memory, at, width)
    qkv, at = take(memory, at, 3 * width)
    norm(x, affine, eps, centered, h, memory[at:])
    linear(qkv_weight, qkv_bias, h, qkv, False)
    for b in range(heads):
        k, v = qkv[width + b * size : width + (b + 1) * size], qkv[2 * width + b * size : 2 * width + (b + 1) * size]
        for c in range(size):
            keys[b, c, past] = k[c]
            values[b, past, c] = v[c]
        part = slice(b * size, (b + 1) * size)
        _attend(qkv[part], keys[b], values[b], past + 1, scale, y[part], memory[at:])
    linear(out, out_bias, y, x, True)


class Attention(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        size, context = self.width // module.heads, model.context
        self._keys = np.zeros((module.heads, size, context), self.dtype)
        self._values = np.zeros((module.heads, context, size), self.dtype)
        self._given = (*self.norm, *affine(module.qkv), *affine(module.out), self._keys, self._values,
                       self.memory(5 * self.width, context))

    def load(self, state) -> None:
        seen = state.keys.shape[2]
        self._keys[:, :, :seen] = state.keys.data[0].swapaxes(1, 2)
        self._values[:, :seen] = state.values.data[0]

    def __call__(self, x: np.ndarray, position: int) -> None:
        _step(x, position, *self._given)
