"""Hyena: gates and convolutions as long as the sequence, filters made by a network (Poli et al. 2023, arXiv 2302.10866).

    x⁰, x¹, ..., x^(N-1), v = split(short(x Winᵀ + b))       order N; short: a causal convolution of 3 taps
    v ← filter_o * a + d_o a  with  a = v x^(N-1-o)          for o = 0 .. N-2; * is long_conv
    y = (v x⁰) Woutᵀ + b

    filter(i) = window(i) W₃ sin(f W₂ sin(f W₁ sin(f W₀ features(i))))
    features(i) = i / (T - 1), cos(k 2π i / T), -sin(k 2π i / T)     for bands k from 10⁻⁴ to K - 1
    window(i) = e^(-δ i / (T - 1)) + shift, 1 % after between ``fast_decay`` and ``slow_decay`` of the context

The network's biases are left out above. The frequencies f, one for each hidden unit, are trained and shared by its layers;
the features are trained too, slowly. T is the model's context: a shorter sequence takes the beginning of the same filter, a
longer one is refused. Weights from N(0, init_std²) and N(0, filter_std²), the output projection from
N(0, (init_std/√(2 layers))²), d from N(0, 1). Values are dropped before each long convolution and at the end.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, causal_conv1d, concat, getitem, sin, split
from autograd.errors import ShapeError
from autograd.random import Random

from ..config import check, option
from ..nn import Buffer, Dropout, Linear, Module, Stateful, full, made, normal, uniform
from ..ops import long_conv
from ..ops.long_conv import online
from ..options import ModelOptions
from ..variant import Page, Variant


@dataclass(frozen=True)
class HyenaOptions:
    """hyena"""

    order: int = option(2, "projections are order + 1, gates order, long convolutions order - 1", low=2, high=100)
    short_filter: int = option(3, "taps of the short convolution", low=1, high=1000)
    filter_width: int = option(64, "hidden size of the network that makes the long filters", low=1, high=2**16)
    filter_depth: int = option(4, "its linear layers", low=2, high=100)
    filter_bands: int = option(16, "cosines and as many sines of the position that it reads", low=1, high=2**16)
    filter_std: float = option(0.02, "standard deviation of its weights at the start", above=0)
    sine_frequency: float = option(14.0, "of its sines, at the start", above=0)
    features_lr: float = option(0.01, "learning rate of what it reads, relative to --lr; 0 = fixed", low=0)
    window: bool = option(True, "filters fade with the distance")
    fast_decay: float = option(0.3, "part of the context after which the fastest window is at 1 %", above=0)
    slow_decay: float = option(1.5, "the same of the slowest window", above=0)
    window_shift: float = option(0.0, "added to the window; the paper speaks of one, its code has 0")
    window_order: str = option(
        "channels", "for order > 2: decays go from slow to fast over the channels of each filter, as in the authors' "
        "training code, or over the filters one after the other, as in their standalone code", choices=("channels", "filters")
    )

    retired: ClassVar[tuple[str, ...]] = ("online_block",)  # it changed speed only

    __post_init__ = check


class State(NamedTuple):
    """The filters, the last inputs of the short convolution, and the past of each long one."""

    filters: tuple[Tensor, ...]
    recent: Tensor
    pasts: tuple[online.Past, ...]


class Filters(Module):
    """``count`` filters [T D], T up to the context, as a function of the position."""

    def __init__(self, rng: Random, context: int, width: int, count: int, options: HyenaOptions, dtype):
        hidden, depth, bands, std = options.filter_width, options.filter_depth, options.filter_bands, options.filter_std
        self.count = count
        position = np.arange(context)[:, None]
        time = position / max(context - 1, 1)

        def features() -> np.ndarray:
            angles = np.linspace(1e-4, max(bands - 1, 1e-4), bands) * 2 * np.pi * position / context
            return np.concatenate([time, np.cos(angles), -np.sin(angles)], axis=1)

        self._features_lr = options.features_lr
        if options.features_lr:
            self.features = full((context, 2 * bands + 1), 0, dtype)  # what training adds
        sizes = [2 * bands + 1, *[hidden] * (depth - 1)]
        self.layers = [Linear(rng.split(i), a, b, std=std, dtype=dtype) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
        self.out = Linear(rng.split(depth), hidden, count * width, std=std, bias=False, dtype=dtype)
        self.frequency = full((hidden,), options.sine_frequency, dtype)

        def window() -> np.ndarray:
            slow, fast = (-math.log(0.01) / part for part in (options.slow_decay, options.fast_decay))
            decay = np.linspace(slow, fast, count * width)
            if options.window_order == "channels":
                decay = decay.reshape(width, count).T.reshape(-1)
            return np.exp(-time * decay) + options.window_shift

        self.table = made(Buffer, (context, 2 * bands + 1), dtype, features, saved=False)  # [T F]
        shape = context, count * width
        self.window = made(Buffer, shape, dtype, window, saved=False) if options.window else None  # [T count·D]

    def __call__(self, length: int) -> tuple[Tensor, ...]:
        x = Tensor.wrap(self.table.data[:length])
        if self._features_lr:
            learned = self.features if length == len(self.table.data) else self.features[:length]
            x = x + learned * self._features_lr
        for layer in self.layers:
            x = sin(layer(x) * self.frequency)
        filters = self.out(x)
        if self.window is not None:
            filters = filters * Tensor.wrap(self.window.data[:length])
        return split(filters, sizes=self.count) if self.count > 1 else (filters,)


class Hyena(Stateful):
    """x[B T D] -> y[B T D] by gated long convolutions, T up to the context.

    State: (N - 1) T D past inputs and as many sums for later positions, 2 (N + 1) D of the short convolution; the filters.
    ``bidirectional``, for encoders, gives each convolution a second filter that looks ahead; there is no state then.
    """

    bounded = True

    def __init__(self, rng: Random, model: ModelOptions, options: HyenaOptions, layer: int = 0, dtype=np.float32, *,
                 bidirectional: bool = False):
        width, order, std = model.width, options.order, model.init_std
        self.context, self.order, self.bidirectional = model.context, order, bidirectional
        self.project = Linear(rng.split(0), width, (order + 1) * width, std=std, bias=model.bias, dtype=dtype)
        limit = 1 / math.sqrt(options.short_filter)
        self.short = uniform(rng.split(1), ((order + 1) * width, options.short_filter), limit, dtype)
        self.short_bias = full(((order + 1) * width,), 0, dtype) if model.bias else None
        count = (order - 1) * (1 + bidirectional)
        self.filters = Filters(rng.split(2), model.context, width, count, options, dtype)
        self.skip = normal(rng.split(3), ((order - 1) * width,), 1.0, dtype)
        self.out = Linear(rng.split(4), width, width, std=std / math.sqrt(2 * model.layers), bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        self._fits(0, x.shape[1])
        filters = self.filters(x.shape[1])
        *gates, v = split(causal_conv1d(self.project(x), self.short, self.short_bias), sizes=self.order + 1)
        for o, skip in enumerate(split(self.skip, sizes=self.order - 1)):
            a = self.dropout(v * gates[-1 - o], rng and rng.split(0, o))
            v, _ = long_conv(a, filters[o], skip, filters[self.order - 1 + o] if self.bidirectional else None)
        return self.dropout(self.out(v * gates[0]), rng and rng.split(1))

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            raise ShapeError("hyena: a bidirectional mixer has no state, every output depends on the whole sequence")
        filters = self.filters(self.context)
        recent = self.constant(0.0, batch, 0, self.short.shape[0])
        return State(filters, recent, tuple([online.begin(batch, f) for f in filters]))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        length, keep = x.shape[1], self.short.shape[1] - 1
        self._fits(state.pasts[0].position, length)
        recent = concat([state.recent, self.project(x)], axis=1)
        z = _last(causal_conv1d(recent, self.short, self.short_bias), length)
        *gates, v = split(z, sizes=self.order + 1)
        pasts = []
        for o, skip in enumerate(split(self.skip, sizes=self.order - 1)):
            v, past = online.read(v * gates[-1 - o], state.pasts[o], state.filters[o], skip, convolve=long_conv,
                                  block=online.BLOCK)
            pasts.append(past)
        return self.out(v * gates[0]), State(state.filters, _last(recent, min(keep, recent.shape[1])), tuple(pasts))

    def _fits(self, start: int, length: int) -> None:
        if start + length > self.context:
            raise ShapeError(f"hyena: the filters have {self.context} positions; {start} + {length} tokens do not fit")


def _last(x: Tensor, length: int) -> Tensor:
    """The last positions of x[B T D]."""
    return getitem(x, key=(slice(None), slice(x.shape[1] - length, None)))


HYENA = Variant(
    name="hyena",
    summary="Hyena: gates and convolutions as long as the sequence, filters made by a network",
    paper="Poli et al. 2023, arXiv 2302.10866",
    mixer=Hyena,
    options=HyenaOptions,
    overrides=dict(positions="none"),
    # With half the paper's hidden size, small models have as many parameters as the Transformer within 5 %.
    presets={"tiny": dict(filter_width=32), "nanogpt-cpu": dict(filter_width=32)},
    fused="hyena",
    page=Page(
        formula="v ← h_o * a + d_o a with a = v x^(N-1-o) for o = 0 .. N-2, then y = v x⁰; x⁰ … x^(N-1), v = split(short(x "
                "Wᵀ)); * "
                "is a causal convolution over all of T, h_o(i) = window(i) mlp(i)",
        cost="O(N T D (log T + D)) time; no space is stated: O(N T D) here, filters and activations; O((N - 1) t D) for "
             "token t "
             "when writing, by direct sums, or O((N - 1) D log² t) on average, in blocks",
        state="2 (N - 1) t D + 2 (N + 1) D: past inputs, their sums for later positions, and the past of a short filter of 3 "
              "taps; "
              "with the N - 1 filters themselves, (N - 1) D numbers for every position of the context",
        operators=("long_conv", "causal_conv1d"),
        golden="the operator in PyTorch, as conv1d and by torch.fft, and whole mixers of orders 2 and 3 from torch's "
               "modules, with "
               "all gradients; the paper has no package",
        discrepancies=(
            "Definition 3.1 counts N long filters; the code and the experiments have N - 1 and a short one: so it is here",
            "the paper adds a bias to the window, its code adds 0: --window-shift, default 0",
            "with several long filters, the authors' two codes give them different windows: --window-order",
            "their code cuts sequences longer than its filters without a word; here they are an error",
            "their code learns the features with a rate of its own, 1e-5; here in proportion to --lr: --features-lr, 0 = fixed",
            "their recipe does not decay the weights of the filters' network; here matrices decay, as in every variant",
            "options of their code that fail or look ahead (num_heads, inner_factor, num_blocks) are left out",
        ),
        review="its time, O(N T d (log T + d)), is right; the space O(T d) is not in the paper and holds for a fixed order; "
               "that "
               "it overtakes attention at 2048 tokens, FlashAttention between 4096 and 8192, is a property of kernels of "
               "that time",
    ),
)
