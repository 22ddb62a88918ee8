"""RetNet: retention is attention without the softmax, with a memory that fades (Sun et al. 2023, arXiv 2307.08621).

The problem. Attention compares every token with all tokens before it. This costs O(T²) time to train on T tokens. To generate,
every new token costs O(T) time, and a cache of all keys and values that grows with T. A recurrent network has a state of fixed
size and generates at the same cost per token for ever, but it must be trained one position after the other, which is slow.
Numbers in brackets name the paper's equations.

The idea. What keeps attention from being a recurrence is the softmax: the weight of token s for token t is exp(q_t · k_s),
divided by the sum over all s, and neither the exp nor the sum can be split into a factor of t and a factor of s. Without the
softmax the weight is the product q_t · k_s alone, and the query leaves the sum:

    Σ_s (q_t · k_s) v_s = q_t (Σ_s k_sᵀ v_s) = q_t S_t

S_t is a matrix of fixed size. It is all that the model keeps of the past, and the next token only adds its own k_tᵀ v_t. So one
function has three algorithms. The sum over s computes all positions at once, in O(T²) time. The state generates at a constant
cost. Chunks of M tokens join the two: the sum runs over the tokens of a chunk, and the state holds all tokens before it. For a
fixed M this takes O(T) time, and only the chunks wait for one another. Models train in chunks here.

- Why the memory fades: a softmax lets the tokens of a row compete. Without it nothing pushes old tokens aside, and they would
  pile up in a state of fixed size. So every position multiplies the state by γ < 1. γ is a constant, it is not learned.
- Why heads fade at different rates: head h has γ = 1 - 2^(-5-h). It looks back about 1/(1-γ) tokens: head 0 about 32, head 3
  about 256. Some heads see the last words, others the last paragraphs. The paper's perplexity, which is better when lower, is
  26.05 as published, 27.02 with γ = 127/128 in every head, and 27.86 with γ = 1 (Table 6).
- Why queries and keys are rotated: fading treats all tokens at one distance alike, whatever they say. The rotation turns each
  query and key by an angle that grows with its position, so that their product depends on the content and on the distance t - s
  together. A head can then look for a content at a certain distance.
- Why each head has a norm of its own: a head that fades slowly adds up more tokens, so its outputs are larger. Under one norm
  for all heads, its size would hide the others. The perplexity without this norm is 27.54.
- Why the scores may be scaled, although no softmax makes weights sum to 1: the norm removes every positive factor c of a row,
  norm(c y) = norm(y). So a row may be divided by a number that keeps it in the range of floating point, and the layer's output
  stays as it is. This is exact if the norm's eps is 0, and nearly exact where y is large compared with √eps. The keys are
  divided by √K, because the product of a query and a key grows with the number K of channels. Then each row is divided by √n_t
  or |q_t · z_t|, whichever is larger, because both grow with the number of tokens in the sum.
- Why a gate: without the softmax, retention is only products of linear functions of x, and then a norm. The factor
  swish(x Wgᵀ), with swish(g) = g · sigmoid(g), makes the layer more non-linear. The perplexity without it is 27.84.
- Why values are twice as wide as keys: wider values make the state larger. The layer then has 8 D² weights instead of a
  Transformer's 4 D². So the feed-forward network has half the hidden width, 2 D: both models are equally large (section 3.1).

What is lost. K V numbers per head stand for the whole past, and old tokens fade. So a text far back cannot be copied exactly,
which attention can do. In the paper RetNet is worse than a Transformer of 1.3 billion parameters and better than one of 2.7 and
6.7 billion (Figure 5).

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            -, |x|, d_model, h
    K = D / H           channels of a query or a key           d, 256 in its experiments
    V = value_width K   channels of a value                    2 d
    M                   tokens of a chunk                      B
    x [B T D]           input of the layer                     X
    W [outputs inputs]  a matrix of weights, used as x Wᵀ      W [inputs outputs], used as X W
    q_t k_t [K] v_t [V] query, key and value of token t        Q_n, K_n, V_n
    γ [H], θ [K/2]      decay of a head, angle of a pair       γ, θ
    Γ [T T]             γ^(t-s) where s ≤ t, else 0            D
    S_t [K V]           state of a head                        S_n, and R_i after chunk i
    z_t [K], n_t        Σ_s γ^(t-s) k_s, and Σ_s γ^(t-s)       q_t · z_t = Σ_m (Q Kᵀ ∘ D)_nm, n_t = Σ_m D_nm

Where retention comes from (section 2.1). A linear recurrence writes each token into a state and reads from the state (1).
Queries and keys depend on the token (2). Each eigenvalue of the matrix A is γ e^(iθ), with a length γ and an angle θ. Wq and Wk
absorb its eigenvectors, and A^(t-s) becomes a factor of t times a factor of s (3). With one γ for all channels of a head this
is (4). † is the conjugate transpose, so the angles subtract, and (t-s) θ remains.

    s_t = A s_{t-1} + k_tᵀ v_t,   o_t = q_t s_t = Σ_{s≤t} q_t A^(t-s) k_sᵀ v_s       (1)
    q = x Wqᵀ,   k = x Wkᵀ                                                           (2)
    o_t = Σ_{s≤t} (q_t (γ e^(iθ))^t) (k_s (γ e^(iθ))^(-s))ᵀ v_s                      (3)
    o_t = Σ_{s≤t} γ^(t-s) (q_t e^(itθ)) (k_s e^(isθ))† v_s                           (4)

In the code a complex number is a pair of real channels, and multiplying by e^(itθ) is what the operator rope does. The layer:

    q = rope(x Wqᵀ),   k = rope(x Wkᵀ) / √K,   v = x Wvᵀ         θ_j = 10000^(-j / (K/2 - 1)), and θ_0 = 1 if K = 2
    o = retention(q, k, v)                                       three forms: parallel (5), recurrent (6), chunkwise (7)
    y = norm(o) in each head                                     (8), γ = 1 - 2^(-5-h)
    out = (swish(x Wgᵀ) ∘ y) Woᵀ                                 (8)
    x ← x + layer(norm(x)),   x ← x + ffn(norm(x))               (9), ffn(x) = gelu(x W₁ᵀ) W₂ᵀ of hidden width 2 D

minitv/ops/retention/__init__.py has the three forms as formulas beside their code, the divisors and the gradients.

Three tokens. One head with K = 2, V = 1 and γ = 1/2, without rotation. First the recurrence: the state, then the output.

    >>> import numpy as np
    >>> q, k, v = np.array([[1., 0], [1, 1], [0, 2]]), np.array([[1., 0], [0, 1], [1, 1]]), np.array([[4.], [8], [2]])
    >>> S = np.zeros((2, 1))
    >>> for t in range(3):
    ...     S = 0.5 * S + np.outer(k[t], v[t])  # (6)
    ...     print(S.ravel(), q[t] @ S)
    [4. 0.] [4.]
    [2. 8.] [10.]
    [3. 6.] [12.]

Then all at once. Row t has the faded scores of the tokens before it: 10 = 0.5 · 4 + 1 · 8, and 12 = 0 · 4 + 1 · 8 + 2 · 2.

    >>> scores = q @ k.T * np.array([[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]])  # (5)
    >>> print(scores)
    [[1.  0.  0. ]
     [0.5 1.  0. ]
     [0.  1.  2. ]]
    >>> print((scores @ v).ravel())
    [ 4. 10. 12.]

The operator in all its forms, with chunks of 2 tokens for the last. The paper's divisor is max(|q_t · z_t|, √n_t): q_t · z_t is
the sum of row t, and n_t is 1, 1.5, 1.75, so the rows are divided by 1, 1.5 and 3.

    >>> from autograd import use
    >>> from minitv.ops import retention
    >>> for form, tuning in dict(parallel={}, recurrent={}, chunkwise={"chunk_size": 2}).items():
    ...     for divisor in ("none", "paper"):
    ...         with use("retention", form=form, **tuning):
    ...             y, S, z, n = retention(*(x[None, None] for x in (q, k, v)), np.array([0.5]), normalization=divisor)
    ...         print(form, y.numpy().ravel().round(3), S.numpy().ravel(), z.numpy().ravel(), n.numpy().ravel())
    parallel [ 4. 10. 12.] [3. 6.] [1.25 1.5 ] [1.75]
    parallel [4.    6.667 4.   ] [3. 6.] [1.25 1.5 ] [1.75]
    recurrent [ 4. 10. 12.] [3. 6.] [1.25 1.5 ] [1.75]
    recurrent [4.    6.667 4.   ] [3. 6.] [1.25 1.5 ] [1.75]
    chunkwise [ 4. 10. 12.] [3. 6.] [1.25 1.5 ] [1.75]
    chunkwise [4.    6.667 4.   ] [3. 6.] [1.25 1.5 ] [1.75]
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
from ..sequence import position, relay
from ..variant import Page, Variant

GAIN = 2**-2.5  # of the first weights of q, k, v and the gate, as in torchscale


@dataclass(frozen=True)
class RetNetOptions:
    """retnet"""

    heads: int = option(4, "retention heads; they divide the width", low=1)
    value_width: float = option(2.0, "size of all values together, in model widths; torchscale: 1.6875 with ffn glu", above=0)
    decay: str = option(
        "powers", "decays of the heads: 1 - 2^(-5-h) in head h, or from 1 - 1/32 to 1 - 1/512 in equal ratios of 1 - decay, "
        "as in the paper's experiments",
        choices=("powers", "range"),
    )
    normalization: str = option(
        "paper", "divisor of retention: √n, where n is the sum of a row's decays, the paper's max(|q·z|, √n), or nothing",
        choices=NORMALIZATIONS,
    )
    rotation: str = option(
        "retnet", "rotation of q and k: RetNet's angles on adjacent pairs, or RoPE's on halves, as in flash-linear-attention",
        choices=("retnet", "rope"),
    )
    head_norm: str = option(
        "layer_norm", "norm of each head: the paper's group norm, or torchscale's since October 2023",
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
    """What the heads keep of the past: S [B H K V], z [B H K], n [B H]; and the number of past positions, for the rotation."""

    S: Tensor
    z: Tensor
    n: Tensor
    position: int


def _shrink(model: ModelOptions, options: RetNetOptions) -> float:
    """DeepNet's factor (8 layers)^(-1/4) for a decoder (arXiv 2203.00555), by which some weights start smaller."""
    return (8 * model.layers) ** -0.25 if options.deepnet else 1.0


class Retention(Stateful):
    """out = (swish(x Wgᵀ) ∘ headnorm(retention(q, k, v))) Woᵀ for x[B T D], equations (5) to (8); state size B H (K V + K + 1).

    The first weights are Xavier-uniform, with gain GAIN for q, k, v and the gate, and ``out_gain`` for the output. UserError if
    the heads do not divide the width into an even number of channels each, or do not divide the values.
    """

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
        self.normalization, self.head_norm, self.eps = options.normalization, options.head_norm, model.norm_eps
        head_dim, retnet = width // self.heads, options.rotation == "retnet"
        self.scale = 1 / math.sqrt(head_dim)
        self.rotation = dict(angles=rope_angles(head_dim, closed=retnet), pairing="interleaved" if retnet else "half")
        rates = 2.0 ** (-5 - np.arange(self.heads))  # 1 - γ, (8) [H]; in float32, γ is 1 from head 20 on
        if options.decay == "range":  # section 3.1
            rates = np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), self.heads))
        self.decay = Buffer((1 - rates).astype(dtype), saved=False)  # [H]

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None, None, None, position())[0], rng)

    def init_state(self, batch: int) -> State:
        width, values = self.qk.weight.shape[1] // self.heads, self.v.weight.shape[0] // self.heads
        shapes = (self.heads, width, values), (self.heads, width), (self.heads,)
        return State(*(self.constant(0.0, batch, *shape) for shape in shapes), 0)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run(x, *state)

    def _run(self, x: Tensor, S: Tensor | None, z: Tensor | None, n: Tensor | None, start: int) -> tuple[Tensor, State]:
        q, k = split_heads(self.qk(x), heads=(self.heads, self.heads))  # (2) [B H T K]
        (v,) = split_heads(self.v(x), heads=(self.heads,))  # [B H T V]
        q = rope(q, start=start, **self.rotation)  # (4), (5)
        k = rope(k, start=start, scale=self.scale, **self.rotation)  # (4), (5), and the first scaling of section 2.2
        y, S, z, n = relay(lambda k, *past: retention(q, k, v, self.decay, *past, normalization=self.normalization), k, S, z, n,
                           begin=lambda: self.init_state(len(x.data))[:3])  # (5), (6) or (7) [B H T V]
        y = gated(self._norm(merge_heads([y])), self.gate(x), function="swish")  # (8) [B T H·V]
        return self.out(y), State(S, z, n, start + x.shape[1])  # (8) [B T D]

    def _norm(self, y: Tensor) -> Tensor:
        """Every head of y[B T H·V] normalised on its own."""
        if self.head_norm == "layer_norm":
            return group_norm(y, groups=self.heads, eps=self.eps)
        return reshape(rms_norm(reshape(y, (*y.shape[:2], self.heads, -1)), eps=self.eps), y.shape)


class FeedForward(blocks.FeedForward):
    """y = f(x W₁ᵀ) W₂ᵀ, or (f(x W₁ᵀ) ∘ x W₃ᵀ) W₂ᵀ with a gate, for x[B T D], section 2.3; it has no state.

    The first weights are uniform up to 1/√inputs, as in torchscale.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: RetNetOptions, layer: int = 0, dtype=np.float32):
        glu, width, shrink = options.ffn == "glu", model.width, _shrink(model, options)
        factor = options.ffn_width or model.ffn_multiple * (2 / 3 if glu else 1)
        hidden = max(1, round(factor * width))
        bound, kwargs = 1 / math.sqrt(width), dict(bias=model.bias, dtype=dtype)
        self.up = Linear(rng.split(0), width, hidden, bound=bound * shrink, **kwargs)
        if glu:
            self.gate = Linear(rng.split(2), width, hidden, bound=bound, **kwargs)
        self.down = Linear(rng.split(1), hidden, width, bound=shrink / math.sqrt(hidden), **kwargs)
        self.activation = ACTIVATIONS[model.activation]
        self.dropout = Dropout(model.dropout)


RETNET = Variant(
    name="retnet",
    summary="Retention: linear attention with a decay per head, and a state of fixed size",
    paper="Sun et al. 2023, arXiv 2307.08621",
    mixer=Retention,
    options=RetNetOptions,
    channel=FeedForward,
    without=("ffn_gate",),  # it has --ffn
    overrides=dict(positions="none", ffn_multiple=2),
    fused="retnet",
    on_ranks="each rank passes S, z and n on to the next one",
    page=Page(
        formula="y_t = headnorm(q_t S_t / divisor), S_t = γ S_{t-1} + k_tᵀ v_t in every head, with its own γ; q, k = rotated "
                "x Wᵀ, k / √K; out = (swish(x Wgᵀ) ∘ y) Woᵀ",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 8 D² weights when all values "
             "together are 2 D wide, and for the feed-forward network, which has 4 D²; for retention O(T D (M + V)) in chunks "
             "of M tokens, by which models train here, O(T² D) in parallel, O(T D V) as a recurrence. Memory: "
             "O(T D + D V T / M) in chunks, O(T D + T² H) in parallel. Generating a token: O(D²) for the matrices and O(D V) "
             "for retention, however long the text is",
        state="D (V + 1) + H numbers in each layer: S, z and n of every head, of fixed size; when all values together are 2 D "
              "wide, this is about as much as a Transformer's keys and values of K = D / H tokens",
        operators=("retention", "rope", "gated"),
        golden="torchscale 0.3.0: its layer with all gradients, its rotation, its divisor, and a whole decoder",
        discrepancies=(
            "torchscale's parallel, recurrent and chunkwise forms divide by different sums and agree only for a head norm with "
            "eps = 0; here S, z and n are carried along, and the three are equal for any eps and any chunk",
            "the divisor: the paper's max(abs(q·z), √n), √n alone, or none: --normalization; torchscale's newest, a sum of "
            "absolute scores, is not offered because no state of fixed size can carry it",
            "torchscale treats the divisor as a constant in the backward pass; here it is differentiated",
            "the decay of head h is 1 - 2^(-5-h) in equation (8) and in the code, and another schedule in the paper's "
            "experiments (section 3.1): --decay",
            "the paper has LayerNorm, a group norm of heads and a feed-forward network of two matrices; torchscale has "
            "RMSNorm, narrower values and a gated feed-forward network (--norm rms_norm --head-norm rms_norm --ffn glu "
            "--ffn-width 1.6875 --value-width 1.6875), and after version 0.3.0 the output's first weights are half as large "
            "(--out-gain 0.5)",
            "the paper does not say which angles rotate q and k; torchscale's go from 1 to 1/10000 on adjacent channels, "
            "flash-linear-attention has RoPE's on halves: --rotation",
            "section 2.2 of the paper has d × d matrices Wq, Wk and Wv in each head; in its code, and here, a head reads the "
            "whole input of the layer by d × D matrices",
            "equation (7) of the first arXiv version has R_i for R_{i-1} and lacks ζ, the decay of values in a chunk's state; "
            "figure 4 lacks ζ too",
        ),
        review="it gives the time O(T d (b + h)), which is right for the chunkwise form alone (b is the length of a chunk, h "
               "the channels of a head); its space O(T) is the paper's memory for long sequences with the factor d left out, "
               "and generating needs a state of fixed size only",
    ),
)
