"""RWKV: its two halves of a block for one token. The state is that of the operator wkv, and what each half last read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.vectors import assign

from ..ops.gated.cpu import sigmoid_row
from ..ops.token_shift.cpu import mixed
from ..ops.wkv.cpu import step
from ..variants import rwkv
from .shared import Half, Linear, Norm, activate, activation_of, linear, norm, rows


class Shift(NamedTuple):
    """y = W (mix x + (1 - mix) x_{t-1})."""

    mix: np.ndarray  # [D]
    linear: Linear


class TimeWeights(NamedTuple):
    norm: Norm
    key: Shift
    value: Shift
    receptance: Shift
    out: Linear
    w: np.ndarray  # [D]
    u: np.ndarray  # [D]


class ChannelWeights(NamedTuple):
    norm: Norm
    key: Shift
    receptance: Shift
    value: Linear
    activation: int


@inner
def _shifted(x, before, shift, spare, y):
    for b in range(len(x)):
        mixed(x[b], before[b], shift.mix, spare[b])
    linear(shift.linear, spare, y, False)


@cpu_kernel
def time_mix(x, position, weights, state, memory):
    count, width = x.shape
    h, at = rows(memory, 0, count, width)
    y, at = rows(memory, at, count, width)
    k, at = rows(memory, at, count, width)
    v, at = rows(memory, at, count, width)
    r, at = rows(memory, at, count, width)
    norm(x, weights.norm, h, memory[at:])
    _shifted(h, state.time_x, weights.key, y, k)
    _shifted(h, state.time_x, weights.value, y, v)
    _shifted(h, state.time_x, weights.receptance, y, r)
    assign(state.time_x.reshape(-1), h.reshape(-1))
    for b in range(count):
        step(k[b], v[b], weights.w, weights.u, state.a[b], state.b[b], state.p[b], y[b])
        sigmoid_row(y[b], r[b], k[b])
    linear(weights.out, k, x, True)


@cpu_kernel
def channel_mix(x, position, weights, state, memory):
    (count, width), hidden = x.shape, len(weights.key.linear.weight)
    h, at = rows(memory, 0, count, width)
    y, at = rows(memory, at, count, width)
    r, at = rows(memory, at, count, width)
    wide, at = rows(memory, at, count, hidden)
    activated, at = rows(memory, at, count, hidden)
    norm(x, weights.norm, h, memory[at:])
    _shifted(h, state.channel_x, weights.key, y, wide)
    _shifted(h, state.channel_x, weights.receptance, y, r)
    assign(state.channel_x.reshape(-1), h.reshape(-1))
    activate(wide.reshape(-1), weights.activation, activated.reshape(-1), memory[at:])
    linear(weights.value, activated, y, False)
    for b in range(count):
        sigmoid_row(y[b], r[b], h[b])
        for c in range(width):
            x[b, c] += h[b, c]


class Mix(Half):
    """What both have: linear layers without biases, some of which read a shifted input, and states [B D]."""

    def _linear(self, weight) -> Linear:
        return Linear(weight.data, np.zeros(len(weight), self.dtype))

    def load(self, state, position, rows=slice(None)):
        for place, part in zip(self.state, state, strict=True):
            place[rows] = part.data


class TimeMix(Mix):
    module = rwkv.TimeMix
    kernel = staticmethod(time_mix)

    def wire(self, norm, module, model):
        weights = TimeWeights(norm, Shift(module.mix_k.data, self._linear(module.key)),
                              Shift(module.mix_v.data, self._linear(module.value)),
                              Shift(module.mix_r.data, self._linear(module.receptance)), self._linear(module.out),
                              -np.exp(module.time_decay.data), module.time_first.data)
        return weights, rwkv.State(*np.empty((4, self.batch, self.width), self.dtype))

    def memory(self, module, model):
        return 5 * self.width


class ChannelMix(Mix):
    module = rwkv.ChannelMix
    kernel = staticmethod(channel_mix)

    def wire(self, norm, module, model):
        weights = ChannelWeights(norm, Shift(module.mix_k.data, self._linear(module.key)),
                                 Shift(module.mix_r.data, self._linear(module.receptance)), self._linear(module.value),
                                 activation_of(module))
        return weights, rwkv.ChannelState(np.empty((self.batch, self.width), self.dtype))

    def memory(self, module, model):
        return 3 * self.width + 3 * len(module.key)


HALVES = TimeMix, ChannelMix
