"""Attention of one token, with the cache of keys and values.

Keys are kept transposed, [H head_dim context], so that the scores of a query are sums of whole vectors.
"""

from __future__ import annotations

import numpy as np

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp

from .cpu import linear, norm, take


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
def step(x, past, affine, eps, centered, qkv_weight, qkv_bias, out, out_bias, keys, values, memory):
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
