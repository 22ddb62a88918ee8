"""AFT: attention without queries times keys (Zhai et al. 2021, arXiv 2105.14103).

AFT-simple: each channel takes a weighted mean of its past, in linear time (Zhai et al. 2021, arXiv 2105.14103, eq. 5).

    [q, k, v] = x Wqkvᵀ      y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s) v_s / Σ_{s <= t} e^(k_s)      out = y Woᵀ

Weights from N(0, init_std²), Wo from N(0, (init_std/√(2 layers))²), as in the Transformer, whose blocks the paper keeps. The
state is the mean so far and the logarithm of its total weight: 2 D numbers, whatever came before.

AFT-full: AFT with a learned bias for every pair of positions, in quadratic time (Zhai et al. 2021, arXiv 2105.14103, eq. 2).

    y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s + w_ts) v_s / Σ_{s <= t} e^(k_s + w_ts)      w = u vᵀ      out = y Woᵀ

The bias w is the product of two matrices [context, rank] (section 3.2), shared by all channels. The paper starts them from
N(0, 10^-2) without saying whether that is the variance; ``position_std`` is the standard deviation. Other weights are those
of the Transformer. The state is the cache of keys and values.

AFT-local: AFT with a learned bias for the nearest positions, in linear time (Zhai et al. 2021, arXiv 2105.14103, eq. 4).

    y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s + w_ts) v_s / Σ_{s <= t} e^(k_s + w_ts)      out = y Woᵀ
    w_ts = u_t · v_s  if t - s < window,  else 0

The window is no mask: what is outside counts with weight e^k. u and v are matrices [context, rank] (section 3.2); the paper
starts them from N(0, 10^-2) without saying whether that is the variance; ``position_std`` is the standard deviation. Other
weights are those of the Transformer. The state is the keys and values of the window and the mean of what has left it.

AFT-conv: AFT with a learned bias for each distance, a causal convolution (Zhai et al. 2021, arXiv 2105.14103, eq. 6).

    y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s + w_{t-s}) v_s / Σ_{s <= t} e^(k_s + w_{t-s})      w_j = 0 from j = window on

Each head has one key per position and its own filter, standardised over its lags (section 3.2, the biased deviation):

    w = gain · (raw - mean(raw)) / std(raw) + bias          gain and bias start at 0: at first this is AFT-simple

The paper evaluates it on images, in two dimensions and in both directions (the operator aft_conv2d); this is its causal
form along a sequence. Its best results have as many heads as channels, which is the default. The state is the keys and values
of the window and the mean of what has left it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, concat, linear, mean, split, std
from autograd.random import Random

from .. import room
from ..config import check, option
from ..errors import UserError
from ..nn import Dropout, Linear, Stateful, full, normal
from ..ops import aft_conv, aft_full, aft_local, aft_simple, banded_product
from ..options import ModelOptions
from ..variant import Page, Variant

RANK = "columns of u and v, whose product is the bias of every pair of positions"
POSITION_STD = "standard deviation of u and v at the start"
BEGINS = "in its first hundreds of steps it learns like aft-simple, whatever the bias: that starts near 0"
PROJECTION = "a matrix after the mixing; the paper's equations have none, public implementations do"


class AFT(Stateful):
    """x[B T D] -> y[B T D]: y = mix(q, k, v) Woᵀ + b with [q, k, v] = x Wqkvᵀ + b.

    A variant's ``mix(q, k, v, state)`` gives y and the state after it; without a state nothing came before.
    """

    def __init__(self, rng: Random, model: ModelOptions, keys: int, output_projection: bool, dtype):
        width, std = model.width, model.init_std
        self.sizes = width, keys, width
        self.qkv = Linear(rng.split(0), width, sum(self.sizes), std=std, bias=model.bias, dtype=dtype)
        self.out = Linear(rng.split(1), width, width, std=std / math.sqrt(2 * model.layers), bias=model.bias,
                          dtype=dtype) if output_projection else None
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        y, _ = self.mix(*self._split(x), None)
        return self.dropout(self._project(y), rng)

    def prefill(self, x: Tensor, state):
        y, state = self.mix(*self._split(x), state)
        return self._project(y), state

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.qkv(x), sizes=self.sizes)

    def _project(self, y: Tensor) -> Tensor:
        return y if self.out is None else self.out(y)


@dataclass(frozen=True)
class AFTSimpleOptions:
    """aft-simple"""

    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class SimpleState(NamedTuple):
    """The past: the mean of its values and ln Σ e^k of its keys, [B D] each."""

    average: Tensor
    logsum: Tensor


class AFTSimple(AFT):
    """x[B T D] -> y[B T D]; state size 2 B D."""

    def __init__(self, rng: Random, model: ModelOptions, options: AFTSimpleOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: SimpleState | None) -> tuple[Tensor, SimpleState]:
        y, *after = aft_simple(q, k, v, None, *(state or ()))
        return y, SimpleState(*after)

    def init_state(self, batch: int) -> SimpleState:
        shape = batch, self.sizes[0]
        return SimpleState(self.constant(0.0, *shape), self.constant(-math.inf, *shape))


@dataclass(frozen=True)
class AFTFullOptions:
    """aft-full"""

    rank: int = option(64, RANK, low=1)
    position_std: float = option(0.01, POSITION_STD, above=0)
    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class FullState(NamedTuple):
    """The past: keys and values [B S D]."""

    keys: Tensor
    values: Tensor


class AFTFull(AFT):
    """x[B T D] -> y[B T D]; state size 2 B T D, growing with the sequence."""

    bounded = True  # the biases belong to the positions of the context

    def __init__(self, rng: Random, model: ModelOptions, options: AFTFullOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)
        shape = model.context, options.rank
        pairs = room.bytes_of((model.context, model.context), dtype)
        room.check(pairs, f"aft-full's bias for every pair of {model.context} positions")
        self.pos_u = normal(rng.split(2), shape, options.position_std, dtype)
        self.pos_v = normal(rng.split(3), shape, options.position_std, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: FullState | None) -> tuple[Tensor, FullState]:
        if state is not None:
            k, v = concat([state.keys, k], axis=1), concat([state.values, v], axis=1)
        state = FullState(k, v)
        stop = state.keys.shape[1]
        bias = linear(self.pos_u[stop - q.shape[1]:stop], self.pos_v[:stop])
        return aft_full(q, *state, bias), state

    def init_state(self, batch: int) -> FullState:
        empty = self.constant(0.0, batch, 0, self.sizes[0])
        return FullState(empty, empty)


@dataclass(frozen=True)
class AFTLocalOptions:
    """aft-local"""

    window: int = option(32, "the nearest positions, the present included, that have a bias of their own", low=1)
    rank: int = option(64, RANK, low=1)
    position_std: float = option(0.01, POSITION_STD, above=0)
    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class LocalState(NamedTuple):
    """The past: how long it is; the mean of the values that have left the window and ln Σ e^k of their keys, [B D]; and the
    newest keys and values, [B window-1 D].
    """

    position: int
    average: Tensor
    logsum: Tensor
    keys: Tensor
    values: Tensor


class AFTLocal(AFT):
    """x[B T D] -> y[B T D]; state size 2 B window D."""

    bounded = True  # the biases belong to the positions of the context

    def __init__(self, rng: Random, model: ModelOptions, options: AFTLocalOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)
        self.window, shape = options.window, (model.context, options.rank)
        self.pos_u = normal(rng.split(2), shape, options.position_std, dtype)
        self.pos_v = normal(rng.split(3), shape, options.position_std, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: LocalState | None) -> tuple[Tensor, LocalState]:
        start, *past = state or (0,)
        stop = start + q.shape[1]
        bias = banded_product(self.pos_u[start:stop], self.pos_v[max(start - self.window + 1, 0):stop], window=self.window)
        y, *after = aft_local(q, k, v, bias, None, *past)
        return y, LocalState(stop, *after)

    def init_state(self, batch: int) -> LocalState:
        width, near = self.sizes[0], self.window - 1
        return LocalState(0, self.constant(0.0, batch, width), self.constant(-math.inf, batch, width),
                     self.constant(-math.inf, batch, near, width), self.constant(0.0, batch, near, width))


@dataclass(frozen=True)
class AFTConvOptions:
    """aft-conv"""

    heads: int | None = option(None, "groups of channels with one key and one filter each; none = every channel", low=1)
    window: int = option(32, "lags of the filters, the present included", low=2)
    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class ConvState(NamedTuple):
    """The past: the mean of the values that have left the window, [B D], and ln Σ e^k of their keys, [B heads]; and the
    newest keys, [B window-1 heads], and values, [B window-1 D].
    """

    average: Tensor
    logsum: Tensor
    keys: Tensor
    values: Tensor


class AFTConv(AFT):
    """x[B T D] -> y[B T D]; state size B window (D + heads)."""

    def __init__(self, rng: Random, model: ModelOptions, options: AFTConvOptions, layer: int = 0, dtype=np.float32):
        self.heads, self.window = options.heads or model.width, options.window
        if model.width % self.heads:
            raise UserError(f"--heads: {self.heads} heads do not divide the width {model.width}")
        super().__init__(rng, model, self.heads, options.output_projection, dtype)
        self.conv_weight = normal(rng.split(2), (self.heads, self.window), 1.0, dtype)
        self.conv_gain, self.conv_bias = (full((self.heads,), 0, dtype) for _ in range(2))

    def filters(self) -> Tensor:
        """The biases w[heads window]."""
        raw = self.conv_weight
        unit = (raw - mean(raw, axis=1, keepdims=True)) / std(raw, axis=1, keepdims=True)
        return self.conv_gain[:, None] * unit + self.conv_bias[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: ConvState | None) -> tuple[Tensor, ConvState]:
        y, *after = aft_conv(q, k, v, self.filters(), None, *(state or ()))
        return y, ConvState(*after)

    def init_state(self, batch: int) -> ConvState:
        width, near = self.sizes[0], self.window - 1
        return ConvState(self.constant(0.0, batch, width), self.constant(-math.inf, batch, self.heads),
                     self.constant(-math.inf, batch, near, self.heads), self.constant(0.0, batch, near, width))


AFT_SIMPLE = Variant(
    name="aft-simple",
    summary="AFT-simple: each channel takes a weighted mean of its past, in linear time",
    paper="Zhai et al. 2021, arXiv 2105.14103, eq. 5",
    mixer=AFTSimple,
    options=AFTSimpleOptions,
    presets={"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4)},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s) v_s / Σ_{s ≤ t} e^(k_s) in every channel; [q, k, v] = x Wᵀ, out = y Wᵀ",
        cost="O(T D) time and O(T D) memory; O(D) for every token when writing",
        state="2 D: the mean of the values so far, and the logarithm of its total weight",
        operators=("aft_simple",),
        golden="AFTLocal of labml-nn 0.5.1 with a bias of zeros, gradients included",
        discrepancies=(
            "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on "
            "here",
            "aft-pytorch 0.2.2 has no causal mask and subtracts no maximum, so its exponentials overflow; labml-nn, in "
            "causal use "
            "too, subtracts the largest key of the whole sequence, which leaves 0/0 where keys rise by 100: here a running "
            "maximum",
            "the learning rate of nanogpt-cpu is the paper's 3e-3: at the Transformer's 1e-3 all four AFTs end 0.14 to 0.16 "
            "bits "
            "worse (a Transformer gains 0.05 bits by 3e-3)",
        ),
        review="time and space O(T d) are the paper's Table 1, and right",
    ),
)


AFT_FULL = Variant(
    name="aft-full",
    summary="AFT-full: AFT with a learned bias for every pair of positions, in quadratic time",
    paper="Zhai et al. 2021, arXiv 2105.14103, eq. 2",
    mixer=AFTFull,
    options=AFTFullOptions,
    presets={"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4)},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts) in every channel; w = u vᵀ",
        cost="O(T² D) time and O(T D) memory; O(t D) for token t when writing",
        state="2 t D: keys and values of all t tokens read so far",
        operators=("aft_full",),
        golden="AFTLocal of labml-nn 0.5.1 with a window of the whole sequence, gradients included",
        discrepancies=(
            "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on "
            "here",
            "the columns of u and v are 128 in the text and for ImageNet, 64 for CIFAR10, 256 for enwik8: --rank, 64 here",
            "u and v start from N(0, 10⁻²), variance or deviation is not said: --position-std is the deviation, 0.01 here",
            "an older labml-nn subtracted the largest bias of a column, which does not cancel; what cancels is that of a row",
            "w belongs to absolute positions: the model cannot read further than its context",
            BEGINS,
        ),
        review="O(T² d) time and O(T d) space are the paper's Table 1; the space leaves out the T × T biases, which the "
               "factors u "
               "and v (2 T rank parameters) avoid only as long as nobody stores their product",
    ),
)


AFT_LOCAL = Variant(
    name="aft-local",
    summary="AFT-local: AFT with a learned bias for the nearest positions, in linear time",
    paper="Zhai et al. 2021, arXiv 2105.14103, eq. 4",
    mixer=AFTLocal,
    options=AFTLocalOptions,
    presets={"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4)},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts) in every channel; "
                "w_ts = u_t · v_s if t - s < window, else 0",
        cost="O(T window D) time and O(T D) memory; O(window D) for every token when writing",
        state="2 window D: keys and values in the window, the mean of what has left it, and the logarithm of its total weight",
        operators=("aft_local", "banded_product"),
        golden="AFTLocal of labml-nn 0.5.1, causal and in both directions, gradients included",
        discrepancies=(
            "the window is no mask: outside of it the bias is 0 and keys count with weight e^k",
            "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on "
            "here",
            "the columns of u and v are 128 in the text and for ImageNet, 64 for CIFAR10, 256 for enwik8: --rank, 64 here",
            "u and v start from N(0, 10⁻²), variance or deviation is not said: --position-std is the deviation, 0.01 here",
            "aft-pytorch 0.2.2 makes a new bias in every call, which no optimiser ever trains; it is no reference here",
            "w belongs to absolute positions: the model cannot read further than its context",
            BEGINS,
        ),
        review="it names AFT-full and AFT-simple only; O(T window d) time and O(T d) space are the paper's Table 1",
    ),
)


AFT_CONV = Variant(
    name="aft-conv",
    summary="AFT-conv: AFT with a learned bias for each distance, a causal convolution",
    paper="Zhai et al. 2021, arXiv 2105.14103, eq. 6",
    mixer=AFTConv,
    options=AFTConvOptions,
    presets={"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4, heads=None), "small": dict(heads=None)},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_{t-s}) v_s / Σ_{s ≤ t} e^(k_s + w_{t-s}); "
                "one k and one w for all channels of a head",
        cost="O(T window D) time and O(T D) memory; O(window D) for every token when writing",
        state="window (D + heads): keys and values in the window, the mean of what has left it, the logarithm of its total "
              "weight",
        operators=("aft_conv", "aft_conv2d"),
        golden="eq. 6 by PyTorch's conv1d and conv2d with e^w - 1, along a sequence and for images, gradients included",
        discrepancies=(
            "the paper evaluates it on images alone, in both directions; here that is the operator aft_conv2d, and the "
            "variant is "
            "its causal form along a sequence",
            "eq. 6 adds a convolution with e^w - 1 to the sum of everything; for very negative w that is a small difference of "
            "large numbers (values near 1 are wrong by 0.4 at w = -15 in float32): here all terms are positive",
            "a filter is standardised over its lags, by which deviation is not said: here by the biased one",
            "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on "
            "here",
            BEGINS,
        ),
        review="it names AFT-full and AFT-simple only; O(T window d) time and O(T d) space are the paper's Table 1",
    ),
)
