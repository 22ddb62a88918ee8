"""Retention: linear attention with a decay per head, and a state of fixed size (Sun et al. 2023, arXiv 2307.08621).

    q, k = rope(x Wqᵀ), rope(x Wkᵀ) / √head_dim         turned by angles 10000^(-j / (head_dim/2 - 1))
    y = headnorm(retention(q, k, x Wvᵀ))                 every head normalised on its own
    out = (swish(x Wgᵀ) · y) Woᵀ                         values and gates value_width model widths wide

The feed-forward network is the paper's f(x W₁ᵀ) W₂ᵀ, twice as wide as the model, or torchscale's gated (f(x W₁ᵀ) · x W₃ᵀ) W₂ᵀ.
Weights are drawn as in torchscale: Xavier-uniform with gain 2^-2.5 for q, k, v and g, and gain ``out_gain`` for the output;
uniform up to 1/√inputs in the feed-forward network. The options hold every place where paper and code, or two versions of the
code, differ; the defaults are the paper's. torchscale's models are --norm rms_norm --head-norm rms_norm --ffn glu
--ffn-width 1.6875 --value-width 1.6875. Its newest divisor, the sum of absolute scores, is not offered: no state of fixed
size can carry it, so that its forms disagree. The state is S, z and n of the operator, and the position for the rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, group_norm, reshape, rms_norm
from autograd.random import Random

from .. import blocks
from ..config import check, option
from ..errors import UserError
from ..nn import ACTIVATIONS, Buffer, Dropout, Linear, Stateful
from ..ops import gated, merge_heads, retention, rope, split_heads
from ..ops.retention import NORMALIZATIONS
from ..ops.rope import rope_angles
from ..options import ModelOptions
from ..variant import Page, Variant

GAIN = 2**-2.5
EPS = 1e-5  # of the norm of heads


@dataclass(frozen=True)
class RetNetOptions:
    """retnet"""

    heads: int = option(4, "retention heads; they divide the width", low=1)
    value_width: float = option(2.0, "size of all values together, in model widths; torchscale: 1.6875 with ffn glu", above=0)
    decay: str = option(
        "powers", "of head h: 1 - 2^(-5-h), or from 1 - 1/32 to 1 - 1/512 in equal ratios, as in the paper's experiments",
        choices=("powers", "range"),
    )
    normalization: str = option(
        "paper", "what retention is divided by: √n of its decays, the paper's max(|q·z|, √n), or nothing",
        choices=NORMALIZATIONS,
    )
    rotation: str = option(
        "retnet", "of q and k: RetNet's angles on adjacent pairs, or RoPE's on halves, as in flash-linear-attention",
        choices=("retnet", "rope"),
    )
    head_norm: str = option(
        "layer_norm", "of each head: the paper's group norm, or torchscale's since October 2023",
        choices=("layer_norm", "rms_norm"),
    )
    ffn: str = option("mlp", "feed-forward network: the paper's, or torchscale's gated one", choices=("mlp", "glu"))
    ffn_width: float | None = option(
        None, "hidden size of the feed-forward network, in widths; none = --ffn-multiple, for glu two thirds of it", above=0
    )
    out_gain: float = option(1.0, "gain of the output's first weights: 1 in torchscale 0.3.0, 0.5 after it", above=0)
    deepnet: bool = option(False, "first weights of v, out and the feed-forward network divided by (8 layers)^(1/4)")

    __post_init__ = check


class State(NamedTuple):
    """The past of each head: S [B H head_dim V], z [B H head_dim], n [B H]; and how many positions it has."""

    S: Tensor
    z: Tensor
    n: Tensor
    position: int


def _shrink(model: ModelOptions, options: RetNetOptions) -> float:
    """DeepNet's factor (arXiv 2203.00555, decoder only), by which some weights start smaller."""
    return (8 * model.layers) ** -0.25 if options.deepnet else 1.0


class FeedForward(blocks.FeedForward):
    """y = f(x W₁ᵀ) W₂ᵀ, or (f(x W₁ᵀ) · x W₃ᵀ) W₂ᵀ with a gate, at every position; it has no state."""

    def __init__(self, rng: Random, model: ModelOptions, options: RetNetOptions, layer: int = 0, dtype=np.float32):
        glu, width, shrink = options.ffn == "glu", model.width, _shrink(model, options)
        factor = options.ffn_width or model.ffn_multiple * (2 / 3 if glu else 1)
        hidden = max(1, round(factor * width))
        bound, kwargs = 1 / math.sqrt(width), dict(bias=model.bias, dtype=dtype)
        self.up = Linear(rng.split(0), width, hidden, bound=bound * shrink, **kwargs)
        self.gate = Linear(rng.split(2), width, hidden, bound=bound, **kwargs) if glu else None
        self.down = Linear(rng.split(1), hidden, width, bound=shrink / math.sqrt(hidden), **kwargs)
        self.activation = ACTIVATIONS[model.activation]
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        y = self.activation(self.up(x))
        return self.dropout(self.down(y if self.gate is None else y * self.gate(x)), rng)


class Retention(Stateful):
    """x[B T D] -> y[B T D] by retention; state size B H (K V + K + 1) with K = D/H and V = value_width D/H."""

    without_rope = "it turns them already, by the angles that --rotation names"

    def __init__(self, rng: Random, model: ModelOptions, options: RetNetOptions, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        values = round(options.value_width * width)
        if width % (2 * self.heads):
            raise UserError(f"--heads: {self.heads} heads of the width {width} have {width / self.heads:g} channels each, "
                            "allowed: an even number")
        if not values or values % self.heads:
            raise UserError(f"--value-width: {self.heads} heads do not divide {options.value_width} · {width} = {values}")

        def bound(outputs: int, gain: float = GAIN) -> float:
            return gain * math.sqrt(6 / (width + outputs))

        shrink, kwargs = _shrink(model, options), dict(bias=model.bias, dtype=dtype)
        self.qk = Linear(rng.split(0), width, 2 * width, bound=bound(width), **kwargs)
        self.v = Linear(rng.split(1), width, values, bound=bound(values) * shrink, **kwargs)
        self.gate = Linear(rng.split(2), width, values, bound=bound(values), **kwargs)
        self.out = Linear(rng.split(3), values, width, bound=bound(values, options.out_gain) * shrink, **kwargs)
        self.dropout = Dropout(model.dropout)
        self.normalization, self.head_norm = options.normalization, options.head_norm
        head_dim, retnet = width // self.heads, options.rotation == "retnet"
        self.scale = 1 / math.sqrt(head_dim)
        self.rotation = dict(angles=rope_angles(head_dim, closed=retnet), pairing="adjacent" if retnet else "half")
        rates = 2.0 ** (-5 - np.arange(self.heads))
        if options.decay == "range":
            rates = np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), self.heads))
        self.decay = Buffer((1 - rates).astype(dtype), saved=False)  # [H]

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None, None, None, 0)[0], rng)

    def init_state(self, batch: int) -> State:
        width, values = self.qk.weight.shape[1] // self.heads, self.v.weight.shape[0] // self.heads
        shapes = (self.heads, width, values), (self.heads, width), (self.heads,)
        return State(*(self.constant(0.0, batch, *shape) for shape in shapes), 0)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run(x, *state)

    def _run(self, x: Tensor, S: Tensor | None, z: Tensor | None, n: Tensor | None, position: int) -> tuple[Tensor, State]:
        q, k = split_heads(self.qk(x), heads=self.heads, parts=2)
        (v,) = split_heads(self.v(x), heads=self.heads)
        q = rope(q, start=position, **self.rotation)
        k = rope(k, start=position, scale=self.scale, **self.rotation)
        y, S, z, n = retention(q, k, v, self.decay, S, z, n, normalization=self.normalization)
        y = gated(self._norm(merge_heads([y])), self.gate(x), function="swish")
        return self.out(y), State(S, z, n, position + x.shape[1])

    def _norm(self, y: Tensor) -> Tensor:
        if self.head_norm == "layer_norm":
            return group_norm(y, groups=self.heads, eps=EPS)
        return reshape(rms_norm(reshape(y, (*y.shape[:2], self.heads, -1)), eps=EPS), y.shape)


RETNET = Variant(
    name="retnet",
    summary="Retention: linear attention with a decay per head, and a state of fixed size",
    paper="Sun et al. 2023, arXiv 2307.08621",
    mixer=Retention,
    options=RetNetOptions,
    channel=FeedForward,
    overrides=dict(positions="none", ffn_multiple=2),
    fused="retnet",
    page=Page(
        formula="y_t = headnorm(q_t S_t / divisor), S_t = γ S_{t-1} + k_tᵀ v_t in every head, with its own γ; q, k = rotated "
                "x Wᵀ, "
                "k / √K; out = (swish(x Wgᵀ) · y) Woᵀ",
        cost="O(T D (C + K)) time in chunks of C positions with K channels a head, which trains; O(T² D) in parallel; O(D V) "
             "for "
             "every token when writing, with V values a head",
        state="D (V + 1) + heads: S, its keys' sum z and a count n for every head, of fixed size",
        operators=("retention", "rope", "gated"),
        golden="torchscale 0.3.0: its layer with all gradients, its rotation, its divisor, and a whole decoder",
        discrepancies=(
            "torchscale's parallel, recurrent and chunkwise forms divide by different sums and agree only for a head norm with "
            "eps = 0; here S, z and n are carried along, and the three are equal for any eps and any chunk",
            "the paper's divisor max(abs(q·z), √n), √n alone, or none: --normalization; torchscale's newest, a sum of absolute "
            "scores, is not offered because no state of fixed size can carry it",
            "torchscale takes the divisor as a constant in the backward pass; here it is differentiated",
            "decay of head h: 1 - 2^(-5-h) in the paper's text and code, another schedule in its experiments: --decay",
            "the paper has LayerNorm, a group norm of heads and a feed-forward network of two matrices, torchscale RMSNorm "
            "and a "
            "gated one, narrower values and half the first output weights: --norm, --head-norm, --ffn, --value-width, "
            "--out-gain",
            "rotation by angles that reach 1/10000, on adjacent channels; flash-linear-attention uses RoPE's on halves: "
            "--rotation",
            "the first arXiv version's equation 7 has R_i for R_{i-1}, and figure 4 forgets the decay of values in a chunk's "
            "state",
        ),
        review="its time O(T d (b + h)) is right for the chunkwise form only; its space O(T) is the paper's long-sequence "
               "memory "
               "with d left out, while writing needs a state of fixed size",
    ),
)
