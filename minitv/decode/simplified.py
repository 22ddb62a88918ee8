"""Simplified blocks: a whole block of one token in a kernel call, with the cache of keys and values and the mean of the values.

All gains are multiplied into the weights beside them when the decoder is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.vectors import assign
from autograd.ops.rms_norm.cpu import rms_norm_rows

from .. import nn
from ..ops.attention.cpu import step
from ..variants import simplified
from .shared import Linear, Norm, activate, activation_of, columns, linear, linear_of, norm, norm_of, rows, take
from .transformer import Cached, Turns, append, turned, turns_of


class Weights(NamedTuple):
    """A norm without numbers and a linear layer without rows are not there."""

    norm: Norm
    qk: Linear
    q_norm: np.ndarray  # [K]
    k_norm: np.ndarray  # [K]
    values: Linear
    alpha: np.ndarray  # [D], of each channel its head's
    beta: np.ndarray  # [D]
    gamma: np.ndarray  # [D]
    out: Linear
    adds: bool
    serial: bool
    skip: float
    after: Norm
    up: Linear
    down: Linear
    activation: int
    sink: np.ndarray  # [B·H], -inf: no head has one
    turns: Turns


class State(NamedTuple):
    """Keys are kept transposed, as in the Transformer's."""

    keys: np.ndarray  # [B·H K columns]
    values: np.ndarray  # [B·H columns K]
    mean: np.ndarray  # [B D], of all values


@inner
def _normed(x, of, y, spare):
    """y = norm(x), or x."""
    if of.weight.size:
        norm(x, of, y, spare)
    else:
        assign(y.reshape(-1), x.reshape(-1))


@inner
def _norm_heads(x, weight, heads, spare):
    """An RMS norm of each head, in place."""
    rows = x.reshape(heads, weight.size)
    rms_norm_rows(rows, weight, 1e-5, rows, spare[:heads])


@cpu_kernel
def block(x, position, weights, cache, memory):
    """x = h + f(z), or skip h + f(norm(h)), with h = merge(α v + β A v - γ C v) of z = norm(x)."""
    (count, width), (heads, size, _), hidden = x.shape, cache.keys.shape, len(weights.up.weight)
    one = x.dtype.type(1)
    z, at = rows(memory, 0, count, width)
    v, at = rows(memory, at, count, width)
    a, at = rows(memory, at, count, width)
    h, at = rows(memory, at, count, width)
    qk, at = rows(memory, at, count, 2 * width)
    wide, at = rows(memory, at, count, hidden)
    activated, at = rows(memory, at, count, hidden)
    _normed(x, weights.norm, z, memory[at:])
    linear(weights.qk, z, qk, False)
    q, at = columns(qk, 0, width, memory, at)
    k, at = columns(qk, width, width, memory, at)
    if len(weights.values.weight):
        linear(weights.values, z, v, False)
    else:
        assign(v.reshape(-1), z.reshape(-1))
    if weights.q_norm.size:
        _norm_heads(q, weights.q_norm, heads, memory[at:])
        _norm_heads(k, weights.k_norm, heads, memory[at:])
    queries, keys, at = turned(position, weights.turns, q.reshape(-1), k.reshape(-1), heads, heads, size, memory, at)
    append(cache, position, keys, v.reshape(-1))
    lse, at = take(memory, at, heads)
    step(queries, cache.keys, cache.values, position + 1, x.dtype.type(1 / np.sqrt(size)), weights.sink, a.reshape(-1), lse,
         memory[at:])
    share = one / x.dtype.type(position + 1)
    for b in range(count):
        for c in range(width):
            cache.mean[b, c] += (v[b, c] - cache.mean[b, c]) * share
            h[b, c] = weights.alpha[c] * v[b, c] + weights.beta[c] * a[b, c] - weights.gamma[c] * cache.mean[b, c]
    if len(weights.out.weight):
        linear(weights.out, h, a, False)
        assign(h.reshape(-1), a.reshape(-1))
    if weights.adds:
        for b in range(count):
            for c in range(width):
                h[b, c] += x[b, c]
    if weights.serial:
        _normed(h, weights.after, z, memory[at:])
    linear(weights.up, z, wide, False)
    activate(wide.reshape(-1), weights.activation, activated.reshape(-1), memory[at:])
    linear(weights.down, activated, x, False)
    for b in range(count):
        for c in range(width):
            x[b, c] += x.dtype.type(weights.skip) * h[b, c]


class Block(Cached):
    """A whole block; its cache has room for the context at first."""

    module = simplified.Simplified
    kernel = staticmethod(block)

    @classmethod
    def computes(cls, module):
        return super().computes(module) and type(module.mixer) is simplified.ShapedAttention

    def wire(self, norm, module, model):
        mixer, ffn = module.mixer, module.ffn
        heads, size = mixer.heads, self.width // mixer.heads
        alpha, beta, gamma = (np.repeat(gain.data * mixer.gain.data, size) for gain in (mixer.alpha, mixer.beta, mixer.gamma))
        bias = np.zeros(2 * self.width, self.dtype) if mixer.qk_bias is None else mixer.qk_bias.data
        q_norm, k_norm = (np.empty(0, self.dtype) if gains is None else gains.data for gains in (mixer.q_norm, mixer.k_norm))
        weights = Weights(
            self.norm(module.norm1), Linear(mixer.qk.data, bias), q_norm, k_norm, self.blend(mixer.values), alpha, beta, gamma,
            self.blend(mixer.out), module.adds, module.serial, module.skip.item() if module.serial else 1.0,
            self.norm(module.norm2), linear_of(ffn.up), Linear(*(ffn.gain.data * part for part in linear_of(ffn.down))),
            activation_of(ffn), self.no_sink(heads), turns_of(mixer.rotation))
        return weights, State(*self.empty(heads, size, model.context), np.zeros((self.batch, self.width), self.dtype))

    def norm(self, module: nn.Module | None) -> Norm:
        nothing = np.empty(0, self.dtype)
        return Norm(nothing, nothing, 0.0, False) if module is None else norm_of(module)

    def blend(self, module: simplified.Blend | None) -> Linear:
        """α I + β W as one matrix."""
        if module is None:
            return self.none()
        matrix = module.alpha.data * np.eye(self.width, dtype=self.dtype) + module.beta.data * module.weight.data
        return Linear(matrix, np.zeros(self.width, self.dtype))

    def memory(self, module: Any, model: Any) -> int:
        hidden = len(module.ffn.up.weight)
        return 11 * self.width + 3 * hidden + 2 * module.mixer.heads + self.scores(module.mixer.heads)

    def load(self, state, position, rows=slice(None)):
        keys, values, mean = state[0]
        self.write(0, keys, values, rows)
        self.state.mean[rows] = mean.data

    def __call__(self, x, position):
        self.make_room(position + 1)
        super().__call__(x, position)


HALVES = (Block,)
