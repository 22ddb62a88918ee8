"""RWKV-4: a weighted mean of the past whose weights fade, channel by channel (Peng et al. 2023, arXiv 2305.13048).

    time mixing      k, v, r = shift_k(x) Wkᵀ, shift_v(x) Wvᵀ, shift_r(x) Wrᵀ      y = (sigmoid(r) · wkv(k, v)) Woᵀ
    channel mixing   k, r = f(shift_k(x) Wkᵀ), shift_r(x) Wrᵀ                     y = sigmoid(r) · (k Wvᵀ)

shift is token_shift, every one with a mix of its own, and f(x) is --activation, max(x, 0)² in the presets. The model
normalises the embedding before the first block. Linear layers have no biases: --bias is about norms alone. Weights are drawn
as in RWKV-v4neo: time mixing's Wv, channel mixing's Wk and an untied head are orthogonal, all other matrices of the blocks
are 0, so that every block starts as the identity; decays and mixes depend on the layer and the channel. --init-std is of a
tied embedding alone. Not offered of the official code: a copying head (head_qk), a small attention (tiny_att), and other
learning rates for decays and bonuses.

The state are five vectors a layer: time_x and channel_x, what the two halves last read, and a, b and p of the operator wkv.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, exp, linear
from autograd.random import Random

from ..config import check, option
from ..nn import ACTIVATIONS, Dropout, Parameter, Stateful, full, made, uniform
from ..ops import gated, token_shift, wkv
from ..ops.wkv import EMPTY
from ..options import ModelOptions
from ..variant import Page, Variant


@dataclass(frozen=True)
class RWKVOptions:
    """rwkv"""

    ffn_width: float | None = option(
        None, "hidden size of channel mixing, in widths; none = 4, as in the paper", above=0
    )

    __post_init__ = check


class State(NamedTuple):
    """What time mixing has seen, each [B D]: its last input, and wkv's two sums and their exponent."""

    time_x: Tensor
    a: Tensor
    b: Tensor
    p: Tensor


class ChannelState(NamedTuple):
    """The last input of channel mixing [B D]."""

    channel_x: Tensor


def orthogonal(rng: Random, outputs: int, inputs: int, gain: float, dtype) -> Parameter:
    """A matrix [outputs inputs] with orthogonal rows or columns of length gain · √(outputs / inputs), at least gain."""
    def draw() -> np.ndarray:
        q, r = np.linalg.qr(rng.normal((max(outputs, inputs), min(outputs, inputs)), np.float64))
        q = q * np.where(np.diag(r) < 0, -1, 1)  # without this, the signs are not uniform
        return (q if outputs >= inputs else q.T) * gain * math.sqrt(max(1.0, outputs / inputs))

    return made(Parameter, (outputs, inputs), dtype, draw)


def _depth(model: ModelOptions, layer: int) -> float:
    """0 for the first layer, 1 for the last."""
    return layer / max(1, model.layers - 1)


def _mix(model: ModelOptions, layer: int, dtype, power: float = 1.0, plus: float = 0.0) -> Parameter:
    """The share of the present token in each channel: higher channels and later layers look back less."""
    def share() -> np.ndarray:
        return (np.arange(model.width) / model.width) ** (power * (1 - layer / model.layers)) + plus

    return made(Parameter, (model.width,), dtype, share)


class ChannelMix(Stateful):
    """y = sigmoid(shift_r(x) Wrᵀ) · (f(shift_k(x) Wkᵀ) Wvᵀ); its state is the last input."""

    def __init__(self, rng: Random, model: ModelOptions, options: RWKVOptions, layer: int = 0, dtype=np.float32):
        width, hidden = model.width, max(1, round((options.ffn_width or model.ffn_multiple) * model.width))
        self.mix_k, self.mix_r = _mix(model, layer, dtype), _mix(model, layer, dtype)
        self.key = orthogonal(rng.split(0), hidden, width, 1.0, dtype)
        self.receptance = full((width, width), 0, dtype)
        self.value = full((width, hidden), 0, dtype)
        self.activation = ACTIVATIONS[model.activation]
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None)[0], rng)

    def init_state(self, batch: int) -> ChannelState:
        return ChannelState(self.constant(0.0, batch, self.receptance.shape[0]))

    def prefill(self, x: Tensor, state: ChannelState) -> tuple[Tensor, ChannelState]:
        return self._run(x, *state)

    def _run(self, x: Tensor, channel_x: Tensor | None) -> tuple[Tensor, ChannelState]:
        k, last = token_shift(x, self.mix_k, channel_x)
        r, _ = token_shift(x, self.mix_r, channel_x)
        k = linear(self.activation(linear(k, self.key)), self.value)
        return gated(k, linear(r, self.receptance)), ChannelState(last)


class TimeMix(Stateful):
    """x[B T D] -> y[B T D] by time mixing; state size 4 B D, and B D of channel mixing."""

    def __init__(self, rng: Random, model: ModelOptions, options: RWKVOptions, layer: int = 0, dtype=np.float32):
        width, depth = model.width, _depth(model, layer)
        self.mix_k = _mix(model, layer, dtype)
        self.mix_v = _mix(model, layer, dtype, plus=0.3 * depth)
        self.mix_r = _mix(model, layer, dtype, power=0.5)
        self.key = full((width, width), 0, dtype)
        self.value = orthogonal(rng.split(0), width, width, 1.0, dtype)
        self.receptance = full((width, width), 0, dtype)
        self.out = full((width, width), 0, dtype)
        self.time_decay = made(Parameter, (width,), dtype, lambda: (
            -5 + 8 * (np.arange(width) / max(1, width - 1)) ** (0.7 + 1.3 * depth)))
        self.time_first = made(Parameter, (width,), dtype, lambda: math.log(0.3) + 0.5 * ((np.arange(width) + 1) % 3 - 1))
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None, None, None, None)[0], rng)

    def init_state(self, batch: int) -> State:
        return State(*(self.constant(value, batch, self.out.shape[0]) for value in (0.0, 0.0, 0.0, EMPTY)))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run(x, *state)

    def _run(self, x: Tensor, time_x: Tensor | None, *state: Tensor | None) -> tuple[Tensor, State]:
        k, last = token_shift(x, self.mix_k, time_x)
        v, _ = token_shift(x, self.mix_v, time_x)
        r, _ = token_shift(x, self.mix_r, time_x)
        y, *state = wkv(linear(k, self.key), linear(v, self.value), -exp(self.time_decay), self.time_first, *state)
        return linear(gated(y, linear(r, self.receptance)), self.out), State(last, *state)


def init_tables(rng: Random, model: ModelOptions, vocab: int, dtype) -> tuple[Parameter, Parameter]:
    """The embedding, tiny because its norm enlarges it, and the head, where each has a matrix of its own."""
    embed = uniform(rng.split(0), (vocab, model.width), 1e-4, dtype)
    return embed, orthogonal(rng.split(1), vocab, model.width, 0.5, dtype)


RWKV = Variant(
    name="rwkv",
    summary="RWKV-4: a weighted mean of the past whose weights fade, channel by channel",
    paper="Peng et al. 2023, arXiv 2305.13048",
    mixer=TimeMix,
    options=RWKVOptions,
    channel=ChannelMix,
    tables=init_tables,
    # As in the paper, but for hidden layers of 3.5 widths, which make up for the head of its own and the receptances.
    overrides=dict(positions="none", embed_norm=True, ffn_width=3.5, activation="relu_squared", bias=True, tied=False),
    without=("ffn_multiple", "init_std"),  # it has --ffn-width and a rule for every weight
    fused="rwkv",
    page=Page(
        formula="y_t = (Σ_{i<t} e^((t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (Σ_{i<t} e^((t-1-i) w + k_i) + e^(u + k_t)) in "
                "every "
                "channel; out = (sigmoid(r) · y) Wᵀ; k, v and r are made of x_t mixed with x_{t-1}",
        cost="O(T D) time for the mean, besides O(T D²) for the projections; O(D) time and space for a token when writing",
        state="5 D: what both halves read last, and the mean's numerator, denominator and largest exponent",
        operators=("wkv", "bidirectional_wkv", "token_shift", "gated"),
        golden="RWKV of the package transformers with all gradients and its state, and its author's package rwkv with its "
               "state",
        discrepancies=(
            "the paper subtracts w >= 0; its code learns time_decay and adds w = -e^time_decay, as here",
            "the paper halves the mix of receptances at the start; its code halves the exponent of (channel / D), as here",
            "the paper starts the output matrices at random; its code starts them at 0 and values and keys orthogonal, as here",
            "the package transformers starts the bonus u at 1 everywhere, by a misplaced parenthesis; here it is ln 0.3 ± 0.5",
            "the official kernels drop the gradient of a state that is carried in; here it is exact",
            "with a tied head, which the official code does not have, the embedding starts as in the other variants",
        ),
        review="its O(T d) time is right, its O(T d) space is not what the paper says, which is O(d): the state does not grow. "
               "There is no max pooling in channel mixing: max(k, 0)² is the squared ReLU",
    ),
)
