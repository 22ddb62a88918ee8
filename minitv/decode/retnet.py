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
from .shared import Half, Linear, Norm, columns, linear, linear_of, norm, rows, take


class Weights(NamedTuple):
    norm: Norm
    qk: Linear
    v: Linear
    gate: Linear
    out: Linear
    angles: np.ndarray  # [head_dim / 2], radians a position
    interleaved: bool
    scale: np.floating  # of keys
    decay: np.ndarray  # [B·H]
    normalization: int
    head_norm: Norm


class State(NamedTuple):
    S: np.ndarray  # [B·H head_dim V]
    z: np.ndarray  # [B·H head_dim]
    n: np.ndarray  # [B·H]


@cpu_kernel
def retain(x, position, weights, state, memory):
    """x += W (swish(W' h) · headnorm(retention(q, k, v))) with h = norm(x), and q and k turned by the position."""
    (heads, size, value_size), one = state.S.shape, x.dtype.type(1)
    (count, width), pairs = x.shape, size // 2
    h, at = rows(memory, 0, count, width)
    qk, at = rows(memory, at, count, 2 * width)
    queries, at = take(memory, at, x.size)
    keys, at = take(memory, at, x.size)
    v, at = rows(memory, at, count, heads * value_size // count)
    gate, at = rows(memory, at, count, heads * value_size // count)
    y, at = rows(memory, at, count, heads * value_size // count)
    cos, at = take(memory, at, pairs)
    sin, at = take(memory, at, pairs)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qk, h, qk, False)
    linear(weights.v, h, v, False)
    linear(weights.gate, h, gate, False)
    q, at = columns(qk, 0, width, memory, at)
    k, at = columns(qk, width, width, memory, at)
    turn(position, weights.angles, cos, sin)
    shape, strides, turns = (1, heads, 1, size), (0, size, 0), (cos.reshape(1, 1, pairs), sin.reshape(1, 1, pairs))
    rotate((q.reshape(-1), strides), shape, turns[0], turns[1], weights.interleaved, one, one, queries, (0, 1))
    rotate((k.reshape(-1), strides), shape, turns[0], turns[1], weights.interleaved, weights.scale, one, keys, (0, 1))
    step(queries, keys, v.reshape(-1), weights.decay, state.S, state.z, state.n, weights.normalization, y.reshape(-1))
    norm(y.reshape(heads, value_size), weights.head_norm, v.reshape(heads, value_size), memory[at:])
    swish_row(v.reshape(-1), gate.reshape(-1), y.reshape(-1))  # two arrays: over its own argument it goes number by number
    linear(weights.out, y, x, True)


class Retention(Half):
    module = retnet.Retention
    kernel = staticmethod(retain)

    def wire(self, norm, module, model):
        state = State(*(part.data.reshape(-1, *part.shape[2:]) for part in module.init_state(self.batch)[:3]))
        size = state.S.shape[2]
        head_norm = Norm(np.ones(size, self.dtype), np.zeros(size, self.dtype), module.eps, module.head_norm == "layer_norm")
        return Weights(norm, linear_of(module.qk), linear_of(module.v), linear_of(module.gate), linear_of(module.out),
                       np.array(module.rotation["angles"]), module.rotation["pairing"] == "interleaved",
                       self.dtype.type(module.scale), np.tile(module.decay.data, self.batch),
                       NORMALIZATIONS.index(module.normalization), head_norm), state

    def memory(self, module, model):
        return 7 * self.width + 3 * len(module.v.weight) + self.width // module.heads + 2 * module.heads  # of the norm of heads

    def load(self, state, position, rows=slice(None)):
        for place, part in zip(self.state, state[:3], strict=True):
            place.reshape(self.batch, *part.shape[1:])[rows] = part.data


class FeedForward(shared.FeedForward):
    module = retnet.FeedForward


HALVES = Retention, FeedForward
