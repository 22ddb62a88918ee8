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
from .shared import Linear, Norm, activate, activation_of, linear, linear_of, norm, norm_of, take
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
    sink: np.ndarray  # [H], -inf: no head has one
    turns: Turns


class State(NamedTuple):
    """Keys are kept transposed, as in the Transformer's."""

    keys: np.ndarray  # [H K columns]
    values: np.ndarray  # [H columns K]
    mean: np.ndarray  # [D], of all values


@inner
def _normed(x, of, y, spare):
    """y = norm(x), or x."""
    if of.weight.size:
        norm(x, of, y, spare)
    else:
        assign(y, x)


@inner
def _norm_heads(x, weight, heads, spare):
    """An RMS norm of each head, in place."""
    rows = x.reshape(heads, weight.size)
    rms_norm_rows(rows, weight, 1e-5, rows, spare[:heads])


@cpu_kernel
def block(x, position, weights, cache, memory):
    """x = h + f(z), or skip h + f(norm(h)), with h = merge(α v + β A v - γ C v) of z = norm(x)."""
    width, (heads, size, _), hidden = x.size, cache.keys.shape, len(weights.up.weight)
    one = x.dtype.type(1)
    z, at = take(memory, 0, width)
    v, at = take(memory, at, width)
    a, at = take(memory, at, width)
    h, at = take(memory, at, width)
    qk, at = take(memory, at, 2 * width)
    wide, at = take(memory, at, hidden)
    activated, at = take(memory, at, hidden)
    _normed(x, weights.norm, z, memory[at:])
    linear(weights.qk, z, qk, False)
    if len(weights.values.weight):
        linear(weights.values, z, v, False)
    else:
        assign(v, z)
    q, k = qk[:width], qk[width:]
    if weights.q_norm.size:
        _norm_heads(q, weights.q_norm, heads, memory[at:])
        _norm_heads(k, weights.k_norm, heads, memory[at:])
    q, k, at = turned(position, weights.turns, q, k, heads, heads, size, memory, at)
    append(cache, position, k, v)
    lse, at = take(memory, at, heads)
    step(q, cache.keys, cache.values, position + 1, x.dtype.type(1 / np.sqrt(size)), weights.sink, a, lse, memory[at:])
    share = one / x.dtype.type(position + 1)
    for c in range(width):
        cache.mean[c] += (v[c] - cache.mean[c]) * share
        h[c] = weights.alpha[c] * v[c] + weights.beta[c] * a[c] - weights.gamma[c] * cache.mean[c]
    if len(weights.out.weight):
        linear(weights.out, h, a, False)
        assign(h, a)
    if weights.adds:
        for c in range(width):
            h[c] += x[c]
    if weights.serial:
        _normed(h, weights.after, z, memory[at:])
    linear(weights.up, z, wide, False)
    activate(wide, weights.activation, activated, memory[at:])
    linear(weights.down, activated, x, False)
    for c in range(width):
        x[c] += x.dtype.type(weights.skip) * h[c]


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
            activation_of(ffn), np.full(heads, -np.inf, self.dtype), turns_of(mixer.rotation))
        return weights, State(*self.empty(heads, size, model.context), np.zeros(self.width, self.dtype))

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
        return 9 * self.width + 3 * hidden + 2 * module.mixer.heads + self.state.keys.shape[2]

    def load(self, state: Any, position: int) -> None:
        keys, values, mean = state[0]
        self.write(0, keys, values)
        self.state.mean[:] = mean.data[0]

    def __call__(self, x, position):
        self.make_room(position + 1)
        super().__call__(x, position)


HALVES = (Block,)
