"""RoFormer: attention that knows positions because queries and keys are turned by them (Su et al. 2021, arXiv 2104.09864).

``roformer`` is a causal language model, ``roformer-encoder`` sees both directions, as the paper's encoders do, and
``roformer-linear`` has the paper's linear attention in place of the softmax. Numbers in brackets name the paper's equations.

The problem. Attention compares a query with a key by their product, and that product does not depend on where the two stand. So
a Transformer adds a vector for each position to its input (3). This has three weaknesses. What a head wants to know is mostly a
distance ("two tokens back"), and it must be learned anew at every position. Beyond the context there are no learned vectors.
And the vectors of positions and of words are added in the same channels. Earlier methods with relative positions add a term for
each pair of tokens to the scores. They need all T × T scores, so they do not fit linear attention, which never computes them.

The idea. We look for a function f(x, m) of a vector x and its position m. The product of f(q, m) and f(k, n) has to depend on
q, k and the difference m - n alone (11). In two channels a turn does this (12). The query at position m is turned by the angle
m θ, the key at position n by n θ. Turning both by the same angle changes no product, so only (m - n) θ counts. K channels are
K/2 pairs, and each has an angle θ of its own (14). Nothing is learned, nothing is added to the input, and every layer sees
positions.

- Why queries and keys, but not values: only the product of query and key must know the distance. A turned value would carry its
  absolute position into the output, where no second turn takes it back.
- Why many angles: one angle cannot tell distances apart that differ by a full turn. θ_j = base^(-2j/K) goes from 1 radian per
  position to about 1/base. Fast pairs tell neighbours apart, slow ones regions of the text.
- Why a turn and no other map: it keeps the length of a vector, so that a position makes no key louder than another.
- Why distance weakens a product: at large distances the turned pairs point everywhere, and their sum cancels in part. The paper
  takes arrows of length 1 at the angles (m - n) θ_j, and the sums of the first one, two, .. K/2 of them. It bounds a product by
  the mean length of these sums, times a number that does not depend on the distance (37). Figure 2 shows how this mean falls.
  The bound is from above only: a single product may also rise with the distance.

What is masked. In ``roformer`` and ``roformer-linear`` position m sees the positions n ≤ m, in ``roformer-encoder`` all. A turn
depends on positions and not on tokens, so it lets nothing of the future in.

What it costs. Six operations for each pair of channels of q and k: O(T D) in a layer, beside O(T D²) for its matrices. There
are no weights. The state is the Transformer's cache: 2 t D numbers in a layer after t tokens, 8 t D bytes in float32. It keeps
turned keys, because the position of a key never changes. ``roformer-linear`` keeps D (K + 1) numbers in a layer instead,
4 D (K + 1) bytes. A text of (K + 1) / 2 tokens fills as much of a cache; here a longer one takes no more.

How it is trained and how it writes. ``roformer`` and ``roformer-linear`` guess the next token, as the Transformer does, and
write one token at a time from the state. ``roformer-encoder`` guesses hidden tokens (the task ``masked``) and writes nothing.

What it brings. The paper's translator has a BLEU of 27.5, and 27.3 with the Transformer's sines. Its encoder is better than
BERT in three of six tasks of GLUE and worse in three (section 4.3). With linear attention, the loss falls faster with turns
than without (section 4.4).

What remains hard. The model can read texts of any length, but beyond its context the slow pairs stand at angles that it never
saw, and its loss rises (benchmarks/extrapolation.py measures it). --scaling makes the pairs slower so that s times as many
positions fit; minitv/ops/rope/angles.py has the formulas. Train without it at one context. Then begin another run by
--init-from, with --scaling, --scaling-factor s and a longer --context. The scalings dynamic-ntk, yarn and llama3 also need
--trained-context, which is the context of the first run. --xpos is another way, for training from the start: it lets distant
products shrink.

``roformer-linear`` loses what every state of fixed size loses: all tokens are added into the same numbers, none is ever
forgotten, and a single one of many cannot be read out exactly. And its weights may be negative, see below.

How to choose:

- --base: 10000 is that of the Transformer's sines, and its slowest pair takes almost 2π · 10000 positions for a turn. Models
  for long texts take a larger one, so that slow pairs do not turn far: Llama 3 takes 500000.
- --rotated: pairs that are not turned compare contents wherever they stand. The paper turns all channels, GPT-NeoX a quarter,
  GPT-J 64 of 256. The angles are then those of a head that has the turned channels alone: K in θ_j is their number.
- --heads: K = D / H must be even. A small K has few pairs, and so few speeds. ``roformer-linear`` remembers D K numbers in a
  layer, so fewer heads remember more; its preset nanogpt-cpu has 2.
- --pairing: a model that is trained from the start learns equally well with both. Weights of another model need that model's.
- --scaling, not in ``roformer-linear``: ntk and dynamic-ntk are meant for reading longer texts without further training, the
  others for further training. --xpos is in ``roformer`` alone.
- --norms after, --segments, --output bert: the paper's encoder is BERT otherwise, with them and --embed-norm --bias. Weights of
  such a model come by ``minitv import``; for training from the start, norms before the layers need less care.
- --feature, in ``roformer-linear``: elu(x) + 1 is never 0, so every key can still learn. max(x, 0) is cheaper, but where it is
  0 it has no gradient.

    ours                                                       the paper's
    m, n                positions of a query and of a key      m, n
    K                   channels of a head's query or key      d
    x_m [D]             input of the layer at position m       x_m
    j = 0 .. K/2 - 1    pair of channels (2j, 2j + 1)          i = 1 .. d/2
    θ_j = base^(-2j/K)  angle of pair j for each position      θ_i = 10000^(-2(i-1)/d), (15)
    R_m [K K]           turns all pairs by m θ_j               R^d_{Θ,m}, (15)
    Wqkv [3D D]         all queries, then all keys and values  W_q, W_k, W_v
    v_n                 value of position n, not turned        v_n
    φ                   makes features of q and k positive     φ and φ of another form, (18)

The layer, where Wqkv, Wo, ffn and the sums are those of minitv/variants/transformer.py:

    q_m = R_m W_q x_m,   k_n = R_n W_k x_n                     (14): minitv/ops/rope/__init__.py, by (34) without matrices
    q_mᵀ k_n = x_mᵀ W_qᵀ R_{n-m} W_k x_n                       (16), because R_mᵀ R_n = R_{n-m}
    y_m = Σ_n softmax_n(q_mᵀ k_n / √K) v_n                     (2), over n ≤ m in ``roformer``
    y_m = Σ_n (R_m φ(q_m))ᵀ(R_n φ(k_n)) v_n / Σ_n φ(q_m)ᵀφ(k_n)     (19) in ``roformer-linear``, where q and k are not turned

Gradients. A turn is linear and its transpose turns back: the gradient of W_q x_m is R_{-m} times that of q_m, and the gradient
of W_k x_n is R_{-n} times that of k_n. All else is the gradient of attention.

Linear attention. (17) writes attention with any similarity of q and k in place of exp(q · k / √K). If it is φ(q)ᵀφ(k), (18),
the sum over n is a matrix S = Σ φ(k_n) v_nᵀ that does not depend on the query. Terms that are added to scores cannot be had
this way, but turns can, since they act on φ(q) and φ(k) alone. Turned products may be negative, and so may be their sum. Hence
(19) turns the numerator only: the denominator stays positive, and the weights need not sum to 1. The operator, its state and
its gradients are in minitv/ops/rotary_linear/__init__.py, which also shows that the state may turn in place of the queries.

Three tokens. One head with K = 2 and an angle of a quarter turn, so that coordinates are whole numbers. All queries and keys
are (1, 0) before they are turned. The scale is ln 2 here in place of 1/√K, so that exp(scale · q · k) = 2^(q · k).

    >>> import numpy as np
    >>> from minitv.ops import rope
    >>> x, v = np.tile([1., 0], (1, 1, 3, 1)), np.array([4., 8, 2]).reshape(1, 1, 3, 1)
    >>> q = k = rope(x, angles=(np.pi / 2,))
    >>> print((q.numpy()[0, 0] + 0).round(3) + 0)  # (14): to the right, up, to the left
    [[ 1.  0.]
     [ 0.  1.]
     [-1.  0.]]
    >>> scores = q.numpy()[0, 0] @ k.numpy()[0, 0].T
    >>> print(scores.round(3) + 0)  # (16): 1 on the diagonal, 0 at distance 1, -1 at distance 2
    [[ 1.  0. -1.]
     [ 0.  1.  0.]
     [-1.  0.  1.]]
    >>> weights = np.tril(2 ** scores)
    >>> print((weights @ v[0, 0] / weights.sum(axis=1, keepdims=True)).ravel().round(3))  # (2)
    [4.    6.667 4.   ]

Token 1 has the weights 2^0 and 2^1: (1 · 4 + 2 · 8) / 3 = 6.667. Token 2 has 1/2, 1 and 2: (2 + 8 + 4) / 3.5 = 4. It does not
matter where the text stands, here from position 100 on:

    >>> q = k = rope(x, angles=(np.pi / 2,), start=100)
    >>> print((q.numpy()[0, 0] @ k.numpy()[0, 0].T).round(3) + 0)
    [[ 1.  0. -1.]
     [ 0.  1.  0.]
     [-1.  0.  1.]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, concat, exp, linear, relu
from autograd.random import Random

from ..blocks import Block, PostNorm, PreNorm
from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..models.lm import LanguageModel
from ..nn import ACTIVATIONS, Dropout, Linear, Stateful, full, norm_of, normal
from ..ops import attention, merge_heads, rotary_linear, split_heads
from ..ops.rope import PAIRINGS, RAMPS, SCALINGS, Rotation, Scaling, xpos_growth
from ..options import ModelOptions
from ..variant import Page, Variant
from . import transformer


@dataclass(frozen=True)
class RotaryOptions(transformer.TransformerOptions):
    """roformer-linear"""

    pairing: str = option(
        "interleaved", "which channels of a head are a pair: neighbours, as in the paper, or those half a head apart, as in "
        "GPT-NeoX and transformers' LLaMA",
        choices=PAIRINGS,
    )
    base: float = option(10_000.0, "base of the angles: pair j of K channels turns by base^(-2j/K) for each position", above=1)
    rotated: float = option(1.0, "share of a head's channels that are turned; the others compare contents alone", above=0,
                            high=1)

    __post_init__ = check


@dataclass(frozen=True)
class LinearOptions(RotaryOptions):
    """roformer-linear"""

    feature: str = option("elu", "function that makes queries and keys positive: the paper's elu(x) + 1, or max(x, 0)",
                          choices=("elu", "relu"))


@dataclass(frozen=True)
class EncoderOptions(RotaryOptions):
    """roformer-encoder"""

    scaling: str = option(
        "none", "how angles change for texts longer than the trained context: linear divides them all, ntk raises the base, "
        "dynamic-ntk does so as the text grows, yarn and llama3 divide those of slow pairs",
        choices=SCALINGS,
    )
    scaling_factor: float = option(1.0, "how many times the trained context shall fit", low=1)
    trained_context: int | None = option(
        None, "context of the training that --scaling starts from; none = --context", low=1, high=2**20
    )
    yarn_ramp: str = option(
        "turns", "where yarn's angles change from kept to divided: by the turns of a pair, as in its paper, or by its number, "
        "as in its code",
        choices=RAMPS,
    )
    norms: str = option("before", "where the norms of a block stand: before each layer, or after each sum, as in BERT and the "
                        "paper's encoder", choices=("before", "after"), newer=True)
    segments: int = option(0, "vectors of BERT's kinds of tokens; every token here is of the first kind, and its vector is "
                           "added to those of all tokens", low=0, high=2**20, newer=True)
    output: str = option("linear", "what makes logits: a matrix, or as in BERT a linear layer, the activation, a norm, and the "
                         "matrix with biases", choices=("linear", "bert"), newer=True)


@dataclass(frozen=True)
class RoFormerOptions(EncoderOptions):
    """roformer"""

    xpos: bool = option(False, "queries and keys grow and shrink with the position, so that far products fade: xPos")
    xpos_base: float = option(512.0, "positions in which xPos's pairs fade by their factor; smaller fades faster", above=0)
    kv_heads: int | None = option(None, "heads of keys and values, each of which serves a group of heads, as in LLaMA 2 and "
                                  "later; they divide the heads; none = as many", low=1, newer=True)

    __post_init__ = check

    def groups(self, model: ModelOptions, layer: int) -> int:
        return self.heads if self.kv_heads is None else self.divided("--kv-heads", self.kv_heads)


TURNED = "it turns them already, by its own options"


def turned_channels(width: int, model: ModelOptions, options: RotaryOptions) -> int:
    """How many of a head's ``width`` channels are turned; UserError unless that is an even number."""
    if width % 2:
        raise UserError(f"--heads: {options.heads} heads of the width {model.width} have {width} channels each, allowed: an "
                        "even number, because they are turned in pairs")
    turned = options.rotated * width
    if turned != round(turned) or round(turned) % 2:
        raise UserError(f"--rotated: {options.rotated:g} of {width} channels are {turned:g}, allowed: a share that is an even "
                        "number of channels")
    return round(turned)


class Rotary(transformer.Attention):
    """Attention whose queries and keys are turned by their positions, (14) and (2).

    The state is the Transformer's, keys and values of the past; with ``--scaling dynamic-ntk`` the keys in it are not turned
    yet, because their angles change with the length.

    Dynamic NTK depends on the number of positions. Here that is rounded up to a multiple of the trained context C: the queries
    of positions n C .. (n + 1) C - 1 use the angles of (n + 1) C positions, for themselves and for all keys that they see. So
    every way of reading a text gives the same.
    """

    without_rope = without_alibi = TURNED

    def turning(self, width: int, model: ModelOptions, options: EncoderOptions) -> Rotation:
        turned = turned_channels(width, model, options)
        self.pairing, self.growth, self.centre = options.pairing, (), model.context // 2
        kind, factor = options.scaling, options.scaling_factor
        if kind == "none" and factor != 1:
            raise UserError(f"--scaling-factor {factor:g}: nothing is scaled, because --scaling is none, allowed: 1")
        if kind not in ("none", "dynamic-ntk") and factor == 1:
            raise UserError(f"--scaling {kind}: --scaling-factor 1 changes no angle, allowed: a number above 1")
        if kind != "yarn" and options.yarn_ramp != "turns":
            raise UserError(f"--yarn-ramp {options.yarn_ramp}: --scaling is {kind}, allowed: turns")
        if kind in ("none", "linear", "ntk") and options.trained_context is not None:
            raise UserError(f"--trained-context: --scaling {kind} does not depend on it, allowed: none")
        self.trained = options.trained_context or model.context
        self.scaling = Scaling(turned, options.base, kind, factor, self.trained, options.yarn_ramp)
        if getattr(options, "xpos", False):
            self.growth = xpos_growth(turned, options.xpos_base)
            most = int(math.log(np.finfo(np.float32).max) / max(map(abs, self.growth)))
            if model.context > most:
                raise UserError(f"--xpos: a context of {model.context} positions is too long for it, allowed: up to {most}, "
                                "where its factors are the largest numbers of float32")
        return self.rotation_of(None)

    def rotation_of(self, positions: int | None) -> Rotation:
        """The turns in a text of so many positions."""
        return Rotation(self.scaling.angles(positions), self.pairing, self.scaling.gain, self.growth,
                        self.centre if self.growth else 0)

    @property
    def dynamic(self) -> bool:
        return self.scaling.kind == "dynamic-ntk"

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        if not self.dynamic or x.shape[1] <= self.trained:
            return super().__call__(x, rng)
        q, k, v = split_heads(self.qkv(x), heads=self.parts)
        y = self.out(merge_heads([self._by_length(q, k, v, 0, rng and rng.split(0))]))
        return self.dropout(y, rng and rng.split(1))

    def prefill(self, x: Tensor, state: transformer.State) -> tuple[Tensor, transformer.State]:
        if not self.dynamic:
            return super().prefill(x, state)
        q, k, v = split_heads(self.qkv(x), heads=self.parts)
        start = state.keys.shape[2]
        state = transformer.State(concat([state.keys, k], axis=2), concat([state.values, v], axis=2))
        return self.out(merge_heads([self._by_length(q, *state, start)])), state

    def _by_length(self, q: Tensor, k: Tensor, v: Tensor, start: int, rng: Random | None = None) -> Tensor:
        """Attention of queries from position ``start`` on and all keys up to them, both not turned yet."""
        parts, stop, dropout = [], start + q.shape[2], 0.0 if rng is None else self.dropout.p
        while start < stop:
            length = (start // self.trained + 1) * self.trained
            last, rotation = min(length, stop), self.rotation_of(length)
            first = start - stop + q.shape[2]
            queries = rotation.queries(q[:, :, first : first + last - start], start)
            keys = rotation.keys(k[:, :, :last])
            seed = {"dropout": dropout, "seed": rng.split(length).seed} if rng is not None and dropout else {}
            parts.append(attention(queries, keys, v[:, :, :last], **seed)[0])
            start = last
        return parts[0] if len(parts) == 1 else concat(parts, axis=2)


class Bidirectional(Rotary):
    """The same without a mask, as in the paper: there is no state. Dynamic NTK takes the number of positions as it is."""

    causal = False

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return transformer.Attention.__call__(self, x, rng)

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if not self.dynamic:
            return super()._heads(x, start)
        rotation, (q, k, v) = self.rotation_of(x.shape[1]), split_heads(self.qkv(x), heads=self.parts)
        return rotation.queries(q), rotation.keys(k), v


class Ends(Encoder):
    """What the paper's encoder has of BERT around its blocks, where the options ask for it.

        x = embed[ids] + segments[0]
        logits = norm(f(x Wᵀ + b)) Eᵀ + c

    f is the model's activation, E the embedding with ``--tied``, and b and c exist with ``--bias``.
    """

    def __init__(self, variant: Any, model: ModelOptions, options: EncoderOptions, vocab: int, rng: Random,
                 dtype: Any = np.float32):
        super().__init__(replace(variant, block=NORMED[options.norms]), model, options, vocab, rng, dtype)
        width, std, bias = model.width, model.init_std, model.bias
        self.segments = normal(rng.split(6), (options.segments, width), std, dtype) if options.segments else None
        self.transform = self.transform_norm = self.head_bias = None
        if options.output == "bert":
            self.activation = ACTIVATIONS[model.activation]
            self.transform = Linear(rng.split(7), width, width, std=std, bias=bias, dtype=dtype)
            self.transform_norm = norm_of(model, width, dtype)
            self.head_bias = full((vocab,), 0, dtype) if bias else None

    def looked_up(self, ids: np.ndarray) -> Tensor:
        x = super().looked_up(ids)
        return x if self.segments is None else x + self.segments[0]

    def logits(self, x: Tensor) -> Tensor:
        if self.transform is None:
            return super().logits(x)
        x = self.activation(self.transform(x if self.norm is None else self.norm(x)))
        return linear(self.transform_norm(x), self.head.weight, self.head_bias)


class CausalEnds(Ends, LanguageModel):
    """The same of a model that sees the past alone."""


NORMED: dict[str, type[Block]] = {"before": PreNorm, "after": PostNorm}


class LinearState(NamedTuple):
    """S[B H K V] = Σ_n R_{n-m} φ(k_n) v_nᵀ, where m is the last position, and z[B H K] = Σ_n φ(k_n)."""

    S: Tensor
    z: Tensor


class RotaryLinear(Stateful):
    """out = merge(y) Woᵀ for x[B T D], where y is (19), causal, of φ(q), φ(k) and v; state size B H K (V + 1).

    The first weights are those of the Transformer's attention. UserError as of ``turned_channels``, or if the heads do not
    divide the width.
    """

    without_rope = without_alibi = TURNED

    def __init__(self, rng: Random, model: ModelOptions, options: LinearOptions, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        turned = turned_channels(model.head_dim(self.heads), model, options)
        self.angles, self.pairing, self.feature = Scaling(turned, options.base).angles(), options.pairing, options.feature
        self.qkv = Linear(rng.split(0), width, 3 * width, std=model.init_std, bias=model.bias, dtype=dtype)
        self.out = Linear(rng.split(1), width, width, std=model.output_std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None, None)[0], rng)

    def init_state(self, batch: int) -> LinearState:
        size = self.out.weight.shape[0] // self.heads
        return LinearState(self.constant(0.0, batch, self.heads, size, size), self.constant(0.0, batch, self.heads, size))

    def prefill(self, x: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        return self._run(x, *state)

    def _run(self, x: Tensor, S: Tensor | None, z: Tensor | None) -> tuple[Tensor, LinearState]:
        q, k, v = split_heads(self.qkv(x), heads=(self.heads,) * 3)  # [B H T K]
        y, S, z = rotary_linear(self._positive(q), self._positive(k), v, S, z, angles=self.angles, pairing=self.pairing)  # (19)
        return self.out(merge_heads([y])), LinearState(S, z)

    def _positive(self, x: Tensor) -> Tensor:
        """φ(x): elu(x) + 1 = x + 1 above 0 and e^x below, or max(x, 0)."""
        return relu(x) if self.feature == "relu" else relu(x) + exp(x.clip(high=0.0))


COST = ("training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights, and for the feed-forward "
        "network, which has 8 D²; O(T D) for the turns; ")

ROFORMER = Variant(
    name="roformer",
    summary="Attention whose queries and keys are turned by their positions",
    paper="Su et al. 2021, arXiv 2104.09864",
    mixer=Rotary,
    options=RoFormerOptions,
    model=CausalEnds,
    overrides=dict(positions="none"),
    fused="transformer",
    page=Page(
        formula="y_m = Σ_{n ≤ m} softmax_n((R_m q_m) · (R_n k_n) / √K) v_n in every head, where R_m turns pair j of channels "
                "by the angle m base^(-2j/K)",
        cost=COST + "O(T² D) for attention. Memory: O(T D), because the kernels never store the T × T weights. Generating "
                    "token t: O(D²) for the matrices and O(t D) for attention, the turns of one token being O(D); with "
                    "dynamic-ntk the cached keys are turned anew for every token, O(t D) more",
        state="2 t D numbers in each layer: keys, turned by their positions, and values of all t tokens so far; with "
              "dynamic-ntk the keys are not turned yet",
        operators=("rope", "attention"),
        golden="RoFormerForCausalLM of the package transformers with its cache and all gradients; rotary-embedding-torch "
               "0.9.0, the functions of RoFormer and LLaMA in transformers, and its angles of every scaling",
        discrepancies=(
            "the paper trains encoders on hidden tokens and a translator; this variant is causal, and roformer-encoder is "
            "theirs",
            "the paper and its code pair neighbouring channels; GPT-NeoX and transformers' LLaMA pair channels half a head "
            "apart: --pairing. One is the other after a permutation of the rows of Wq and Wk, which repaired() in "
            "minitv/ops/rope makes",
            "transformers' RoFormer can turn values too (rotary_value, off by default); the paper never does, and here it is "
            "not offered",
            "the paper turns all channels; GPT-NeoX and GPT-J turn a part: --rotated",
            "transformers makes its tables in float32, which at position 10⁶ is wrong by 0.016; here angles are float64, and "
            "only their cosines and sines are rounded",
            "YaRN's paper changes angles by the turns that a pair makes within the context, its code by the number of the "
            "pair: --yarn-ramp",
            "transformers' dynamic NTK takes the length of each call and keeps keys in its cache as they were turned before, "
            "so that reading a text in parts differs from reading it at once; here the length is rounded up to a multiple of "
            "the trained context, and cached keys are turned when they are read",
            "xPos centres positions on the middle of the window in its code, so that cached keys depend on the length; here "
            "the centre is that of the context, which changes no product",
        ),
        review="that absolute turns give relative positions is right: a law of rope tests it. The long-term decay that the "
               "paper names is an upper bound: single products are not monotone in the distance",
    ),
)

ENCODER = Variant(
    name="roformer-encoder",
    summary="RoFormer in both directions, as in its paper: queries and keys are turned by their positions",
    paper="Su et al. 2021, arXiv 2104.09864",
    mixer=Bidirectional,
    options=EncoderOptions,
    model=Ends,
    overrides=dict(positions="none"),
    page=Page(
        formula="y_m = Σ_n softmax_n((R_m q_m) · (R_n k_n) / √K) v_n in every head, over all positions n, where R_m turns pair "
                "j of channels by the angle m base^(-2j/K)",
        cost=COST + "O(T² D) for attention. Memory: O(T D), because the kernels never store the T × T weights. It does not "
                    "generate",
        state="none: it sees a whole sequence at once",
        operators=("rope", "attention"),
        golden="RoFormerForMaskedLM of the package transformers, with all gradients",
        discrepancies=(
            "the paper's encoder is BERT with a norm after each sum, kinds of tokens and an output of two layers; here the "
            "blocks are those of encoder, with the norm before each layer: --norms after --embed-norm --segments 2 --output "
            "bert gives theirs",
            "the paper's Chinese model reads words, as the encoder WoBERT from which it was made; here any tokens are read",
            "xPos is not offered: it lets products fade in one direction, so it needs a causal mask",
        ),
        review="that absolute turns give relative positions is right: a law of rope tests it",
    ),
)

LINEAR = Variant(
    name="roformer-linear",
    summary="RoFormer's linear attention: turned in the numerator, not in the denominator, with a state of fixed size",
    paper="Su et al. 2021, arXiv 2104.09864, section 3.3",
    mixer=RotaryLinear,
    options=LinearOptions,
    overrides=dict(positions="none"),
    presets={"nanogpt-cpu": dict(heads=2)},  # a state has K numbers for each channel of the values: twice as many as of 4 heads
    page=Page(
        formula="y_m = Σ_{n ≤ m} (R_m φ(q_m)) · (R_n φ(k_n)) v_n / Σ_{n ≤ m} φ(q_m) · φ(k_n) in every head, φ(x) = elu(x) + 1",
        cost=COST + "for linear attention O(T D (M + K)) in chunks of M tokens, by which models train here. Memory: "
                    "O(T D + D K T / M). Generating a token: O(D²) for the matrices and O(D K) for attention, however long the "
                    "text is",
        state="D (K + 1) numbers in each layer: S and z of every head, of fixed size",
        operators=("rotary_linear", "rope"),
        golden="a loop over all pairs of positions in PyTorch with the turns of rotary-embedding-torch, gradients included",
        discrepancies=(
            "(19) sums over all positions, and the paper trains a language model (section 4.4); here n ≤ m",
            "the paper trains with the package performer-pytorch, which turns queries and keys before it makes features of "
            "them; then all weights are positive. (19) turns the features, and so does this variant",
            "performer-pytorch also adds a vector for each position to the input; here nothing is added, and --positions "
            "learned or sinusoidal adds it",
            "the paper names elu(x) + 1 for φ (Katharopoulos et al. 2020, arXiv 2006.16236); max(x, 0) is offered too: "
            "--feature",
        ),
        review="it does not name this variant",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
@ROFORMER.becomes("multi-query", "all heads share keys and values, and those of multi-query are turned, --positions rope")
def _(case, draw):
    one, other = case.model(kv_heads=1), case.of("multi-query", positions="rope", ffn_multiple=4.0)
    other.load(one.state())
    case.same(one, other, draw)
