"""RetNet: retention of one token; S, z and n are those of the operator retention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd.cpu.compile import cpu_kernel

from ..ops.gated.cpu import swish_row
from ..ops.retention import NORMALIZATIONS
from ..ops.retention.cpu import step
from ..ops.rope.cpu import rotate, turn
from ..variants import retnet
from . import shared
from .shared import Half, Linear, Norm, linear, linear_of, norm, take


class Weights(NamedTuple):
    norm: Norm
    qk: Linear
    v: Linear
    gate: Linear
    out: Linear
    angles: np.ndarray  # [head_dim / 2], radians a position
    interleaved: bool
    scale: np.floating  # of keys
    decay: np.ndarray  # [H]
    normalization: int
    head_norm: Norm


class State(NamedTuple):
    S: np.ndarray  # [H head_dim V]
    z: np.ndarray  # [H head_dim]
    n: np.ndarray  # [H]


@cpu_kernel
def retain(x, position, weights, state, memory):
    """x += W (swish(W' h) · headnorm(retention(q, k, v))) with h = norm(x), and q and k turned by the position."""
    (heads, size, value_size), one = state.S.shape, x.dtype.type(1)
    width, values, pairs = x.size, heads * value_size, size // 2
    h, at = take(memory, 0, width)
    qk, at = take(memory, at, 2 * width)
    turned, at = take(memory, at, 2 * width)
    v, at = take(memory, at, values)
    gate, at = take(memory, at, values)
    y, at = take(memory, at, values)
    cos, at = take(memory, at, pairs)
    sin, at = take(memory, at, pairs)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qk, h, qk, False)
    linear(weights.v, h, v, False)
    linear(weights.gate, h, gate, False)
    turn(position, weights.angles, cos, sin)
    shape, strides, turns = (1, heads, 1, size), (0, size, 0), (cos.reshape(1, 1, pairs), sin.reshape(1, 1, pairs))
    q, k = turned[:width], turned[width:]
    rotate((qk[:width], strides), shape, turns[0], turns[1], weights.interleaved, one, one, q, (0, 1))
    rotate((qk[width:], strides), shape, turns[0], turns[1], weights.interleaved, weights.scale, one, k, (0, 1))
    step(q, k, v, weights.decay, state.S, state.z, state.n, weights.normalization, y)
    for b in range(0, values, value_size):
        norm(y[b : b + value_size], weights.head_norm, v[b : b + value_size], memory[at:])
    swish_row(v, gate, y)  # as with norm, two arrays: over its own argument it would run number by number
    linear(weights.out, y, x, True)


class Retention(Half):
    module = retnet.Retention
    kernel = staticmethod(retain)

    def wire(self, norm, module, model):
        state = State(*(part.data[0] for part in module.init_state(1)[:3]))
        size = state.S.shape[2]
        head_norm = Norm(np.ones(size, self.dtype), np.zeros(size, self.dtype), module.eps, module.head_norm == "layer_norm")
        return Weights(norm, linear_of(module.qk), linear_of(module.v), linear_of(module.gate), linear_of(module.out),
                       np.array(module.rotation["angles"]), module.rotation["pairing"] == "interleaved",
                       self.dtype.type(module.scale), module.decay.data, NORMALIZATIONS.index(module.normalization),
                       head_norm), state

    def memory(self, module, model):
        return 5 * self.width + 3 * len(module.v.weight) + self.width // module.heads

    def load(self, state, position):
        for row, part in zip(self.state, state[:3], strict=True):
            row[:] = part.data[0]


class FeedForward(shared.FeedForward):
    module = retnet.FeedForward


HALVES = Retention, FeedForward
