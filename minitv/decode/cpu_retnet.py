"""RetNet's retention of one token; S, z and n are those of minitv/ops/retention/__init__.py."""

from __future__ import annotations

import math

from autograd.cpu.compile import cpu_kernel

from ..ops.gated.cpu import swish_row
from ..ops.retention.cpu import NONE, PAPER
from .cpu import linear, norm, take


@cpu_kernel
def _rotate(x, position, angles, adjacent):
    """Pair j of the channels of every head of x turned by position · angles[j]."""
    step, gap = (2, 1) if adjacent else (1, angles.size)
    for j in range(angles.size):
        angle = position * angles[j]  # in float64, as in rope: positions have no bound
        cos, sin = x.dtype.type(math.cos(angle)), x.dtype.type(math.sin(angle))
        for i in range(step * j, x.size, 2 * angles.size):
            a, b = x[i], x[i + gap]
            x[i], x[i + gap] = a * cos - b * sin, a * sin + b * cos


@cpu_kernel
def _retain(q, k, v, decay, S, z, n, normalization, y):
    """y = (decay q S + (q · k) v) / (1, √n or max(|q · z|, √n)), n and z of now; S ← decay S + kᵀ v; for every head.

    q · k by itself: where it is small, its rounding is the same factor for all values of a head, and their norm drops it.
    """
    (heads, keys, values), zero, one = S.shape, y.dtype.type(0), y.dtype.type(1)
    for h in range(heads):
        stays, present, score = decay[h], zero, zero
        for c in range(keys):
            query, key = q[h * keys + c], k[h * keys + c]
            z[h, c] = stays * z[h, c] + key
            present += query * key
            score += query * z[h, c]
        for j in range(values):
            y[h * values + j] = present * v[h * values + j]
        for c in range(keys):
            query, key = q[h * keys + c], k[h * keys + c]
            for j in range(values):
                past = stays * S[h, c, j]
                y[h * values + j] += query * past
                S[h, c, j] = past + key * v[h * values + j]
        n[h] = stays * n[h] + one
        if normalization != NONE:
            root = y.dtype.type(math.sqrt(n[h]))
            factor = one / (max(abs(score), root) if normalization == PAPER else root)
            for j in range(values):
                y[h * values + j] *= factor


@cpu_kernel
def step(x, position, affine, eps, centered, qk_weight, qk_bias, v_weight, v_bias, gate_weight, gate_bias, out, out_bias,
          angles, adjacent, scale, decay, normalization, S, z, n, head_affine, head_eps, head_centered, memory):
    width, values, size = x.size, len(v_weight), S.shape[2]
    h, at = take(memory, 0, width)
    qk, at = take(memory, at, 2 * width)
    v, at = take(memory, at, values)
    gate, at = take(memory, at, values)
    y, at = take(memory, at, values)
    norm(x, affine, eps, centered, h, memory[at:])
    linear(qk_weight, qk_bias, h, qk, False)
    linear(v_weight, v_bias, h, v, False)
    linear(gate_weight, gate_bias, h, gate, False)
    _rotate(qk, position, angles, adjacent)
    q, k = qk[:width], qk[width:]
    for c in range(width):
        k[c] *= scale
    _retain(q, k, v, decay, S, z, n, normalization, y)
    for b in range(0, values, size):
        norm(y[b : b + size], head_affine, head_eps, head_centered, v[b : b + size], memory[at:])
    swish_row(v, gate, y)  # as with norm, two arrays: over its own argument it would run number by number
    linear(out, out_bias, y, x, True)
