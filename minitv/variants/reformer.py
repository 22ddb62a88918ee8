"""Reformer: each token looks only at tokens that point the same way (Kitaev, Kaiser and Levskaya 2020, arXiv 2001.04451).

The problem. Attention compares every token with every other one, so time grows with T². For a text of 64 000 tokens, the scores
of one head are 16 GB of numbers, if they are kept. And training keeps what every layer computed until its gradient is needed,
so memory grows with the number of layers. Numbers in brackets name the paper's equations.

The idea, in three parts. First, the softmax of a row is nearly the sum over the few largest scores. A score q · k is large
where both vectors point the same way. So a hash puts vectors that point the same way into one bucket, and a token looks only
into its own bucket (section 2). Second, reversible layers: the input of a layer is computed again from its output, so it need
not be kept (section 3). Third, the feed-forward network computes a part of the text at a time, so its wide hidden values never
exist at once (10). This is --ffn-chunks.

- Why queries and keys are the same vectors: a query finds a key only if both are in one bucket. If a token had two different
  vectors, they could be in two buckets, and a bucket could hold many queries and no key. With q = k, the query and the key of a
  token are always in the same bucket.
- Why unit keys: the hash looks at directions alone, but the score also grows with the length of the key. So keys get the length
  1: k̂ = q / |q|. The query keeps its length, which decides how sharp its softmax is.
- Why a token does not see itself: its own key fits it best, with the score |q|. Most of the weight would go there. So it
  sees itself only where it sees nothing else, as at position 0.
- Why the hash works: the vector is turned at random, and the bucket is the axis that it then lies nearest to, with its sign.
  With 16 buckets, two vectors with a cosine of 0.9 are in the same one with a probability of about 0.6, and two orthogonal ones
  with 1/16.
- Why several rounds: one hash separates 4 of 10 such neighbours. With R independent ones they meet in at least one with the
  probability 1 - 0.4^R. A token sees all that any round shows it, in one softmax (6).
- Why a key counts once: a near neighbour meets the query in many rounds. Without a correction it would count as many times.
- Why the rotations are drawn anew in every step: with fixed ones, a pair that lies on both sides of a boundary would never
  meet. When the model is evaluated or writes, they stay as they are. They are saved with the weights.

What is lost. A key that fits well is missed with the probability that no round brings it together with the query. And a bucket
is a matter of chance: where many tokens point the same way, one bucket holds nearly all of them, and the time is again T²
(--window bounds it).

How to choose. A bucket holds m / 2 tokens on average, because there are n = 2 T / m buckets; T is the context here. A smaller m
(--chunk) is faster and misses more keys; 128 is typical of the paper (section 5). It saves little where the context is not many
times m. More rounds miss fewer keys and cost more time. With 8 rounds the paper's models are nearly as good as full attention
(Figure 4). A model may have more rounds when it is evaluated than in training (--eval-rounds), because a round only adds keys.
In a task of copying a text, a model that was trained with one round is right in 77.9 % of its guesses with one round, and in
99.9 % with 8 (Table 2). The paper's models of text see 64 000 tokens at once, and one of 12 layers reaches 1.05 bits per
dimension on enwik8 (section 5).

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            b, l, d_model, n_h
    K = D / H           channels of a query or a value         d_k
    m, n                length of a chunk, number of buckets   m, n_buckets
    R                   rounds                                 n_rounds, n_r
    q_i, v_i [K]        query of token i, its value            q_i, v_i
    k̂_i [K]             key of token i, of length 1            k_i
    R_r [K n/2]         rotation of a round and a head         R
    h_r(i)              bucket of token i in round r           h^(r)(q_i)
    P_i                 tokens that token i sees               P_i, and P_i^(r) in one round
    z_i                 log of what the softmax divides by     z(i, P_i)
    x₁, x₂ [B T D]      the two streams of the stack           x_1, x_2

The layer:

    q = x Wqᵀ,   v = x Wvᵀ                                      section 2, in all heads
    h_r(i) = argmax([q_i R_r ; -q_i R_r])                       section 2, the hash; LSH is locality-sensitive hashing
    P_i = {j < i : h_r(j) = h_r(i) in some round r}             (4), (6); it is {i} where that is empty
    y_i = Σ_{j ∈ P_i} exp(q_i · k̂_j - z_i) v_j                  (2), with k̂_j = q_j / |q_j|
    z_i = ln Σ_{j ∈ P_i} exp(q_i · k̂_j)
    out = merge(y) Woᵀ                                          heads side by side, then one matrix

minitv/ops/lsh/__init__.py has the hash and the order by it. minitv/ops/lsh_attention/__init__.py has attention, its rounds (12)
to (16) and its gradients. The hash gives integers, so no gradient flows through it. With --positions rope, q is turned after
the hash and before the scores.

The stack (section 3). Both streams begin as x, and the head reads their mean:

    x₁ ← x₁ + layer(norm(x₂)),   x₂ ← x₂ + ffn(norm(x₁))        (9), forward
    x₂ ← x₂ - ffn(norm(x₁)),     x₁ ← x₁ - layer(norm(x₂))      (8), back again, while gradients are computed

autograd/reversible.py has this. An x that comes back differs in its last digits, and could fall into another bucket. So the
first pass keeps the buckets of every layer, and backward reads them.

Chunks. Buckets have any length, which suits no GPU of 2020. So the paper sorts the tokens by (bucket, position) and cuts the
order into chunks of m. A token sees those of its bucket in its own chunk and in the one before (5), (11): --attend chunk. The
published codes let it see both chunks whole: --attend chunks. Where the cuts fall depends on all tokens, those to come
included. So which of the past a token sees depends on the future. When such a model writes, there is no future yet, and a token
sees other keys than in training. Here the whole bucket is the default (--attend bucket): what a token sees then depends on the
past alone, and writing gives what training gives.

Writing. The state has q, v and the buckets of all past tokens. A new token is hashed, its buckets are compared with those of
every past token, and it sees the tokens that share one.

Four tokens. One head, K = 2, V = 1 and n = 2 buckets: the rotation is one vector r, and the bucket is 0 where q · r ≥ 0, else
1.

    >>> import numpy as np
    >>> q, v = np.array([[2., 0], [0, 1], [3, 4], [-1, 0]]), np.array([[4.], [8], [2], [6]])
    >>> unit = q / np.linalg.norm(q, axis=1, keepdims=True)
    >>> print((q @ unit.T).round(2))  # all scores; row i belongs to query i
    [[ 2.   0.   1.2 -2. ]
     [ 0.   1.   0.8  0. ]
     [ 3.   4.   5.  -3. ]
     [-1.   0.  -0.6  1. ]]
    >>> rotations = np.array([[1., 1], [-1, 2]])  # of two rounds
    >>> buckets = (q @ rotations.T < 0).T.astype(int)
    >>> print(buckets)
    [[0 0 0 1]
     [1 0 0 0]]

Round 0 puts tokens 0, 1 and 2 together, round 1 tokens 1, 2 and 3. Token 2 sees token 0 in round 0 and token 1 in both, with
the scores 3 and 4. Token 3 sees 1 and 2 in round 1. Token 0 sees nothing, so it sees itself:

    >>> w = np.exp([3, 4, 0, -0.6])
    >>> print(((w[0] * 4 + w[1] * 8) / (w[0] + w[1])).round(3), ((w[2] * 8 + w[3] * 2) / (w[2] + w[3])).round(3))
    6.924 5.874

The operators compute the same:

    >>> from minitv.ops import lsh_attention, lsh_buckets
    >>> found = lsh_buckets(q[None, None], rotations[None, :, :, None])
    >>> print(np.array_equal(found[0, 0], buckets))
    True
    >>> y = lsh_attention(q[None, None], q[None, None], v[None, None], found, eps=1e-12)
    >>> print(y.numpy().ravel().round(3))
    [4.    4.    6.924 5.874]

Without the correction token 1 counts twice for token 2, because it is seen in two rounds:

    >>> y = lsh_attention(q[None, None], q[None, None], v[None, None], found, correction=False, eps=1e-12)
    >>> print(y.numpy().ravel().round(3), ((w[0] * 4 + 2 * w[1] * 8) / (w[0] + 2 * w[1])).round(3))
    [4.    4.    7.379 5.874] 7.379
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, concat, cross_entropy, embedding, reshape, split
from autograd.device import beside, namespace
from autograd.random import Random
from autograd.reversible import noted, recomputed

from .. import blocks
from ..config import check, option
from ..errors import UserError
from ..models.lm import LanguageModel
from ..nn import Buffer, Dropout, Embedding, Linear, Module, Stateful, full, made, norm_of, normal, training
from ..ops import attention, lsh_attention, lsh_buckets, merge_heads, split_heads
from ..ops.lsh import factors_of
from ..ops.lsh_attention import WRAPS
from ..options import ModelOptions
from ..stack import Reversible, cycle
from ..variant import Page, Variant
from .transformer import rotation_of


@dataclass(frozen=True)
class ReformerOptions:
    """reformer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)
    rounds: int = option(2, "rounds of hashing in training", low=1, high=64)
    eval_rounds: int | None = option(None, "rounds of hashing when the model is evaluated or writes; none = --rounds", low=1,
                                     high=64)
    chunk: int = option(64, "length m of a chunk of the sorted positions; it also decides how many buckets there are", low=1)
    buckets: int | None = option(None, "buckets of a round, an even number; none = 2 context / m", low=2, high=2**20)
    factors: str | None = option(None, "even factors of the buckets, such as 64,128, whose product they are; none = one up to "
                                 "128 buckets, two above", newer=True)
    attend: str = option(
        "bucket", "keys that a query sees: those of its bucket, as the paper defines it; those of its bucket in its chunk and "
        "the one before; or all keys in these two chunks, as in the published codes",
        choices=("bucket", "chunk", "chunks"),
    )
    window: int | None = option(None, "most keys of its bucket that a query sees, itself included, with --attend bucket; "
                                "none = all of them", low=1)
    wrap: str = option("none", "what the first chunk sees as the one before: nothing, the last chunk of the same round, or of "
                       "the round before", choices=WRAPS)
    correction: bool = option(True, "a key that is seen in several rounds counts once")
    scale: str = option("one", "factor of the products of queries and unit keys: 1, or 1/√K as in reformer-pytorch",
                        choices=("one", "root"))
    mixers: str = option("lsh", "attention of the layers, repeated over all of them: names separated by commas, each of lsh, "
                         "local (the last m tokens), full (all tokens), and chunked (a chunk of the text and the one before, "
                         "with keys of their own, as in the published codes)")
    local_chunk: int | None = option(None, "length m of local and chunked; none = --chunk", low=1, newer=True)
    head_size: int | None = option(None, "channels of a head; none = the width is divided among the heads", low=1, high=2**20,
                                   newer=True)
    attention_bias: bool = option(True, "attention has biases too, where --bias gives them; the published codes have none",
                                  newer=True)
    full_below: int = option(0, "so many first positions of a text see all that is before them", low=0)
    axial: str | None = option(None, "axes of a grid of learned positions, such as 8x8, whose product is the context at least; "
                               "none = a vector for each position")
    axial_widths: str | None = option(None, "channels of the axes of --axial, such as 64,192, whose sum is the width; none = "
                                      "nearly equal parts", newer=True)
    streams: str = option("mean", "what the head reads of the two streams of a reversible stack: their mean, or both side by "
                          "side", choices=("mean", "concat"))
    head_bias: bool = option(False, "the output layer has biases", newer=True)
    ffn_width: float | None = option(
        None, "hidden size of the feed-forward network, in widths; none = --ffn-multiple and a half, for the matrix that "
        "shared queries and keys save", above=0
    )
    ffn_chunks: int = option(1, "parts of the text that the feed-forward network computes one after the other, to save memory",
                             low=1, harmless=True)
    loss_chunks: int = option(1, "parts of the text whose loss is computed one after the other, to save memory", low=1,
                              harmless=True)

    __post_init__ = check


class State(NamedTuple):
    """All past tokens: shared queries and keys [B H S K], values [B H S V], and the bucket in every round, int[B H R S]."""

    keys: Tensor
    values: Tensor
    buckets: Any


class SharedAttention(Stateful):
    """out = merge(y) Woᵀ, where y is attention in every head whose queries are its keys, over what ``_rule`` shows.

    The first weights are those of the Transformer here: normal with deviation init_std, and init_std / √(2 layers) for the
    output. While training, the output is dropped with the model's probability. UserError if the heads do not divide the width.
    """

    without_rope = None
    parts = 2  # what it makes of x: queries that are keys, and values
    window: int | None = None

    @classmethod
    def of_layer(cls, options: ReformerOptions, layer: int) -> type[Stateful]:
        return cycle("--mixers", options.mixers, MIXERS, layer)

    def __init__(self, rng: Random, model: ModelOptions, options: ReformerOptions, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        self.size = options.head_size or model.head_dim(self.heads)  # K
        self.rotation = rotation_of(model, self.heads, options.head_size)
        inner, bias = self.heads * self.size, model.bias and options.attention_bias
        self.qkv = Linear(rng.split(0), width, self.parts * inner, std=model.init_std, bias=bias, dtype=dtype)
        self.out = Linear(rng.split(1), inner, width, std=model.output_std, bias=bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)
        self.scale = 1 / math.sqrt(self.size) if options.scale == "root" else 1.0

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        q, k, v, buckets = self._heads(x, 0)
        return self.dropout(self._attended(q, k, v, buckets), rng)

    def init_state(self, batch: int) -> State:
        empty = self.constant(0.0, batch, self.heads, 0, self.size)
        return State(empty, empty, namespace(empty.data).zeros((batch, self.heads, self.rounds(), 0), np.intp))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v, buckets = self._heads(x, state.keys.shape[2])
        joined = namespace(buckets).concatenate([state.buckets, buckets], axis=3)
        state = State(concat([state.keys, k], axis=2), concat([state.values, v], axis=2), joined)
        return self._attended(q, *state), state

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Any]:
        """q = k and v [B H T K] of positions from ``start`` on, and their buckets [B H R T]."""
        q, v = split_heads(self.qkv(x), heads=(self.heads,) * 2)
        buckets = noted(lambda: self.hashed(q))  # of what is not turned; the same when a reversible stack computes it again
        if self.rotation is not None:
            q = self.rotation.queries(q, start)
        return q, q, v, buckets

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, buckets) -> Tensor:
        """The output [B T D] of the last positions."""
        return self.out(merge_heads([self.attention(q, k, v, buckets)]))

    def rounds(self) -> int:
        """How many rounds of hashing there are now."""
        return 1

    def hashed(self, q: Tensor):
        """All positions in one bucket."""
        batch, heads, length, _ = q.shape
        return namespace(q.data).zeros((batch, heads, 1, length), np.intp)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, buckets) -> Tensor:
        """y [B H T V] of the last positions."""
        return lsh_attention(q, k, v, buckets, window=self.window, scale=self.scale)


class FullAttention(SharedAttention):
    """Every token sees all before it."""


class LocalAttention(SharedAttention):
    """Every token sees the m - 1 tokens before it."""

    def __init__(self, rng, model, options, layer=0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        self.window = options.local_chunk or options.chunk


class Recent(NamedTuple):
    """Keys and values [B H S K] of the last positions, from the one numbered ``first`` on."""

    keys: Tensor
    values: Tensor
    first: int


class ChunkedAttention(SharedAttention):
    """A token sees those before it in its own chunk of the text and in the chunk before, with keys of their own; scale 1/√K.

    This is the local attention of trax and transformers. The state holds the keys that a later token may see.
    """

    parts = 3

    def __init__(self, rng, model, options, layer=0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        self.chunk = options.local_chunk or options.chunk

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self.prefill(x, None)[0], rng)

    def init_state(self, batch: int) -> Recent:
        empty = self.constant(0.0, batch, self.heads, 0, self.size)
        return Recent(empty, empty, 0)

    def prefill(self, x: Tensor, state: Recent | None) -> tuple[Tensor, Recent]:
        first = 0 if state is None else state.first
        start = first if state is None else first + state.keys.shape[2]
        q, k, v = split_heads(self.qkv(x), heads=(self.heads,) * 3)
        if self.rotation is not None:
            q, k = self.rotation.queries(q, start), self.rotation.keys(k, start)
        if state is not None:
            k, v = concat([state.keys, k], axis=2), concat([state.values, v], axis=2)
        stop, parts = start + q.shape[2], []
        for begin, end in pairwise([start, *range((start // self.chunk + 1) * self.chunk, stop, self.chunk), stop]):
            low, high = max(self.earliest(begin), first) - first, end - first
            parts.append(attention(q[:, :, begin - start : end - start], k[:, :, low:high], v[:, :, low:high])[0])
        drop = max(self.earliest(stop), first) - first
        y = parts[0] if len(parts) == 1 else concat(parts, axis=2)
        return self.out(merge_heads([y])), Recent(k[:, :, drop:], v[:, :, drop:], first + drop)

    def earliest(self, position: int) -> int:
        """The first position that this one sees."""
        return max(position // self.chunk - 1, 0) * self.chunk


class LSHAttention(SharedAttention):
    """Every token sees those that share a bucket with it, or two chunks of the positions sorted by bucket.

    The rotations are drawn anew before every training step, and are part of a checkpoint. UserError for an odd number of
    buckets, and for options that are about another kind of ``--attend``.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: ReformerOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        count = options.buckets or 2 * max(1, model.context // options.chunk)
        if count % 2:
            raise UserError(f"--buckets: {count} is odd, allowed: an even number, half of them for each sign")
        if options.attend == "bucket" and options.wrap != "none":
            raise UserError(f"--wrap {options.wrap}: this is about chunks, allowed with --attend bucket: none")
        if options.attend != "bucket" and options.window:
            raise UserError(f"--window {options.window}: this is about whole buckets, allowed with --attend {options.attend}: "
                            "none")
        self.factors = factors_of(count) if options.factors is None else _factors(options.factors, count)
        self.training_rounds, self.eval_rounds = options.rounds, options.eval_rounds or options.rounds
        self.full_below, self.window = options.full_below, options.window
        shape = (self.heads, max(self.training_rounds, self.eval_rounds), self.size, sum(self.factors) // 2)
        self.rotations = made(Buffer, shape, dtype, lambda: rng.split(2).normal(shape, dtype))  # R_r of section 2
        self.rule = dict(window=options.window, correction=options.correction, scale=self.scale)
        if options.attend != "bucket":
            self.rule |= dict(chunk=options.chunk, across=options.attend == "chunks", wrap=options.wrap)

    def redraw(self, step: int, rng: Random) -> None:
        self.rotations.assign_(rng.normal(self.rotations.shape, self.rotations.dtype))

    def rounds(self) -> int:
        return self.training_rounds if training() else self.eval_rounds

    def hashed(self, q: Tensor):
        return lsh_buckets(q, self.rotations.data[:, : self.rounds()], factors=self.factors)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, buckets) -> Tensor:
        length, keys = q.shape[2], k.shape[2]
        first = min(max(self.full_below - (keys - length), 0), length)  # so many queries see all that is before them
        parts = []
        if first:
            seen = keys - length + first
            parts.append(lsh_attention(q[:, :, :first], k[:, :, :seen], v[:, :, :seen], 0 * buckets[:, :, :1, :seen],
                                       scale=self.scale))
        if first < length or not length:
            parts.append(lsh_attention(q[:, :, first:] if first else q, k, v, buckets, **self.rule))
        return parts[0] if len(parts) == 1 else concat(parts, axis=2)


MIXERS: dict[str, type[Stateful]] = {"lsh": LSHAttention, "local": LocalAttention, "full": FullAttention,
                                    "chunked": ChunkedAttention}


class FeedForward(blocks.FeedForward):
    """y = f(x W₁ᵀ) W₂ᵀ, for parts of the text one after the other (section 3): the hidden values of one part exist at a time.

    With several parts the hidden values are computed again in backward.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: ReformerOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        self.chunks = options.ffn_chunks

    def multiple(self, model: ModelOptions, options: ReformerOptions) -> float:
        return options.ffn_width or model.ffn_multiple + 0.5

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        whole, parts = super().__call__, pieces(x, self.chunks, 1)
        if len(parts) == 1:
            return whole(x, rng)
        return concat([recomputed(partial(whole, rng=rng and rng.split(i)), self.parameters(), part)
                       for i, part in enumerate(parts)], axis=1)


def pieces(x: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """x cut into parts of nearly one length, ``count`` at most."""
    count = max(1, min(count, x.shape[axis]))
    sizes = [(i + 1) * x.shape[axis] // count - i * x.shape[axis] // count for i in range(count)]
    return (x,) if count == 1 else split(x, sizes=tuple(sizes), axis=axis)


class Streams(Reversible):
    """The reversible stack, whose streams end as their mean or side by side."""

    def __init__(self, rng: Random, variant: Any, model: ModelOptions, options: Any, dtype: Any = np.float32):
        super().__init__(rng, variant, model, options, dtype)
        self.concatenated = options.streams == "concat"

    def joined(self, one: Tensor, two: Tensor) -> Tensor:
        return concat([one, two], axis=2) if self.concatenated else super().joined(one, two)


class AxialPositions(Module):
    """Learned positions on a grid n_1 × n_2 × ...: position p has a vector of each axis, at its digit there, side by side.

    The last axis is that of the lowest digit. There are Σ n_a d_a numbers, with Σ d_a = D, in place of D Π n_a. ``sizes`` are
    the d_a.
    """

    def __init__(self, rng: Random, axes: tuple[int, ...], sizes: Sequence[int], std: float, dtype):
        self.axes = axes
        self.tables = [normal(rng.split(a), (n, d), std, dtype) for a, (n, d) in enumerate(zip(axes, sizes, strict=True))]

    def __call__(self, start: int, stop: int) -> Tensor:
        """The vectors [T D] of positions from ``start`` to ``stop`` - 1."""
        digits = np.unravel_index(np.arange(start, stop), self.axes)
        return concat([embedding(table, beside(digit, table.data)) for table, digit in zip(self.tables, digits, strict=True)],
                      axis=1)


class ReformerModel(LanguageModel):
    """A language model that may have axial positions, a head over both streams, and a loss in parts."""

    def __init__(self, variant: Any, model: ModelOptions, options: ReformerOptions, vocab: int, rng: Random,
                 dtype: Any = np.float32):
        axial, both = options.axial is not None, options.streams == "concat"
        if not axial and options.axial_widths is not None:
            raise UserError(f"--axial-widths {options.axial_widths}: this concerns --axial, give both")
        if axial and model.positions != "learned":
            raise UserError(f"--axial {options.axial}: it is a kind of learned positions, allowed: --positions learned")
        if both and (model.tied or model.stack is not None):
            raise UserError("--streams concat: the head reads 2 D channels of a reversible stack, allowed with --no-tied and "
                            "without --stack")
        common = replace(model, positions="none" if axial else model.positions, tied=model.tied or both)
        super().__init__(variant, common, options, vocab, rng, dtype)
        self.loss_chunks, self.axial = options.loss_chunks, None
        if axial:
            axes = _axes(options.axial, model)
            self.axial = AxialPositions(rng.split(6), axes, _widths(options, model, len(axes)), model.init_std, dtype)
            self.bounded = True
        if both:
            self.norm = norm_of(model, 2 * model.width, dtype)
            self.head = Embedding(rng.split(7), vocab, 2 * model.width, std=model.init_std, dtype=dtype)
        self.head_bias = full((vocab,), 0, dtype) if options.head_bias else None

    def logits(self, x: Tensor) -> Tensor:
        y = super().logits(x)
        return y if self.head_bias is None else y + self.head_bias

    def embedded(self, ids: np.ndarray, start: int) -> Tensor:
        x = super().embedded(ids, start)
        return x if self.axial is None else x + self.axial(start, start + ids.shape[1])

    def loss(self, ids: np.ndarray, labels: np.ndarray, nothing: int, rng: Random | None = None) -> tuple[Tensor, int]:
        """The sum of the cross-entropies where a label is not ``nothing``, and how many there are, a part of them at a time."""
        x = self.hidden(ids, rng)
        asked = np.flatnonzero(labels != nothing)
        x = reshape(x, (-1, x.shape[2]))  # [B T D]
        if asked.size < labels.size:
            x = embedding(x, beside(asked, x.data))  # [N D]
        labels = beside(labels.reshape(-1)[asked], x.data)
        head = [*self.head.parameters(), *(self.norm.parameters() if self.norm is not None else []),
                *([] if self.head_bias is None else [self.head_bias])]
        total, first = None, 0
        for part in pieces(x, self.loss_chunks, 0):
            some = labels[first : first + len(part.data)]
            first += len(some)
            loss = recomputed(lambda x, some=some: cross_entropy(self.logits(x), some, reduction="sum"), head, part)
            total = loss if total is None else total + loss
        return total, asked.size


def _factors(text: str, count: int) -> tuple[int, ...]:
    """The factors of so many buckets."""
    factors = tuple(int(word) if word.strip().isdecimal() else 0 for word in text.split(","))
    if min(factors) < 2 or any(n % 2 for n in factors) or math.prod(factors) != count:
        raise UserError(f"--factors: {text!r}, allowed: even integers separated by commas, whose product is the number of "
                        f"buckets, {count}")
    return factors


def _axes(text: str, model: ModelOptions) -> tuple[int, ...]:
    """The axes of a grid such as 8x8."""
    words = text.lower().split("x")
    axes = tuple(int(word) if word.isdecimal() else 0 for word in words)
    if not 2 <= len(axes) <= model.width or min(axes) < 1 or math.prod(axes) < model.context:
        raise UserError(f"--axial: {text!r}, allowed: two numbers or more such as 8x8, whose product is the context, "
                        f"{model.context}, at least")
    return axes


def _widths(options: ReformerOptions, model: ModelOptions, count: int) -> list[int]:
    """The channels of each of ``count`` axes."""
    if options.axial_widths is None:
        return [model.width * (a + 1) // count - model.width * a // count for a in range(count)]
    words = options.axial_widths.split(",")
    widths = [int(word) if word.strip().isdecimal() else 0 for word in words]
    if len(widths) != count or min(widths) < 1 or sum(widths) != model.width:
        raise UserError(f"--axial-widths: {options.axial_widths!r}, allowed: {count} positive integers separated by commas, "
                        f"whose sum is the width, {model.width}")
    return widths


REFORMER = Variant(
    name="reformer",
    summary="Attention within buckets of similar tokens, in a reversible stack",
    paper="Kitaev, Kaiser and Levskaya 2020, arXiv 2001.04451",
    mixer=SharedAttention,
    options=ReformerOptions,
    channel=FeedForward,
    stack=Streams,
    model=ReformerModel,
    presets={"nanogpt-cpu": dict(rounds=4)},
    page=Page(
        formula="y_i = Σ_j softmax_j(q_i · k̂_j) v_j over the tokens j < i with h_r(q_j) = h_r(q_i) in a round r, "
                "h_r(x) = argmax([x R_r; -x R_r]), where k̂_j is q_j at length 1",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 3 D² weights, and for the "
             "feed-forward network, which has 9 D²; O(R T D n) for hashing into n buckets, and O(R T D (n_1 + n_2)) above 128 "
             "buckets, where a hash has two factors n = n_1 n_2; O(R (T + n) H) for the order; O(R T m D) for attention where "
             "buckets hold about m / 2 tokens, up to O(R T² D) where one holds all. Everything is computed twice, but for the "
             "buckets. Memory: O(T D) for all layers together, what one layer needs, and R H T integers for each layer, the "
             "buckets. Generating token t: O(D²) for the matrices, O(R t H) comparisons of buckets, O(R m D) for attention, "
             "and O(t (D + R H)) to copy the state with the new token behind it",
        state="2 t D + R H t numbers in each layer: shared queries and keys, values, and the bucket of every token in every "
              "round and head. With D = 128, H = 4 and R = 2 these are 1088 bytes for each token: 4 for each float, and 8 for "
              "each bucket",
        operators=("lsh_attention", "lsh_buckets", "bucket_order"),
        golden="transformers: its LSH attention with all gradients, its hashes and orders, and a whole language model with "
               "its reversible chain; reformer-pytorch 1.4.4: its LSH attention, and its full attention with shared queries "
               "and keys",
        discrepancies=(
            "the paper defines attention over whole buckets (4), and computes it in chunks (5); the published codes, which are "
            "trax (the authors'), transformers and reformer-pytorch, see two chunks whole: --attend, the default is the "
            "definition",
            "the paper counts a key once that several rounds show (16); trax and transformers do not: --no-correction. "
            "reformer-pytorch can, but counts 0 for pairs that only its wrapped chunk shows, and so adds 20.7 to their scores",
            "the first chunk of a round sees the last one of the round before in the codes; the paper does not say: --wrap",
            "trax and transformers use q · k̂ as it is, reformer-pytorch divides by √K: --scale; the paper leaves √d_k out of "
            "its formulas 'for clarity'",
            "unit keys are q / √(q · q + K ε) with ε = 10⁻⁶, as in trax and transformers",
            "the paper and the codes subtract 10⁵ from a token's score with itself (16); here it sees itself exactly where it "
            "sees nothing else, which gives the same numbers",
            "the paper does not say how the two streams end; trax and transformers put them side by side before the head, "
            "reformer-pytorch takes their mean: --streams, the default is the mean",
            "trax has dropout on attention weights, with one mask for all chunks; here dropout is on the output of a layer",
            "the paper does not say what tells the model a token's position; trax and transformers learn positions on a grid: "
            "--axial; the default is a learned vector for each position",
            "trax's model for enwik8 has layers with local attention between those with hashes: --mixers "
            "local,local,lsh,local; local attention here has shared queries and keys too. Theirs has keys of its own and sees "
            "a chunk of the text and the one before: --mixers chunked",
            "transformers uses full attention where a text has at most m tokens; here --full-below L lets the first L tokens "
            "of any text see all before them, so that writing gives what the call gives",
        ),
        review="it gives the time O(T log T d), which is the paper's headline: the order is found by counting here, in O(T), "
               "and the hash costs O(T² d / m) where the number of buckets grows with T and has one factor, which the paper's "
               "log does not show; its space O(T log T + T d) is not in the paper, which has max(b l d_model, b n_h l n_r c) "
               "without a log, for all layers together",
    ),
)
