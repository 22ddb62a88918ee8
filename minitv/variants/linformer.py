"""Linformer: attention to M mixtures of the keys instead of all T keys (Wang et al. 2020, arXiv 2006.04768).

The variant ``linformer`` is the paper's: an encoder, trained to guess hidden tokens. The variant ``linformer-segment`` is not
in the paper. It is a causal relative, which can generate text. Numbers in brackets name the paper's equations.

The problem. In attention every query meets every key. T tokens cost O(T²) time, so a long text is slow.

The idea. Attention multiplies the values by a T × T matrix of weights. In trained models a few singular vectors carry most of
this matrix (section 3, figure 1), so T keys and T values are more than is needed. The layer replaces the keys by M weighted
sums of them, and the values by M weighted sums too. Such a sum is called a mixture here. The M × T matrices E and F hold the
weights of the sums, and training finds them. A query then meets M mixtures instead of T keys. Time grows as T M. It is linear
in T if M does not grow with T.

- Why mix along the sequence: the usual matrices mix the channels of one token. E mixes the tokens, each channel on its own. A
  row of E chooses positions. So a row of E k, where k are the keys, stands for these positions, and not for one token.
- Why a softmax still works: it runs over the M mixtures. Its weights are positive and sum to 1, as before.
- Why two matrices: keys say what can be found, values what is handed over. In the paper's tests one matrix for both, E = F, is
  about as good.
- Why heads and layers can share E: E mixes positions alone, and reads no channel. The tests below show no harm.
- Why M may be smaller in upper layers: fewer singular vectors carry their weights (section 4, "nonuniform projected
  dimension"), see --layer-lengths.

What the theorems say. Let A be the T × T weights, v a channel of the values, and ε a small number. Theorem 1 (3): there is a
matrix with a rank of the order log T whose product with v differs from A v by less than ε ‖A v‖, with high probability.
Theorem 2 (8): there are E and F with which the output of a query differs from that of attention by at most ε times the norm of
its weights and the norm of the values. It needs an M of the order of the smaller one of 9 K log(K) / ε² and 5 log(T) / ε²,
where K is the number of channels of a head. The first one does not depend on T. Both proofs draw random matrices. They do not
say that training finds good ones.

What it gives. The paper's table 2 has the mean accuracy on four tasks with texts of up to 512 tokens. It is 92.25 for
RoBERTa-base, which is a Transformer. For M = 128 it is 91.75 with E and F in every layer, 91.85 with E = F, and 91.83 with one
matrix for all layers. For M = 256 it is 92.08, 92.03 and 92.30. Table 3 has the speed of reading for M = 128: 1.5 times that
of the Transformer for 512 tokens, and 20 times for 65536.

What is lost. A query cannot read one token exactly: every key and value that it meets is a sum over many. The sums have the
same weights in every text. The authors of Performer (arXiv 2009.14794, figures 5 and 6) find that Linformer stays behind a
Transformer on books and on proteins. But they draw its E and F anew again and again, and do not train them. Besides, E has a
column for each position. So the longest text is fixed when the model is built, and a shorter text uses the first columns of E.
It is not causal. Every row of E k mixes all T positions, those after the query too. A mask over the T × M weights can hide a
mixture from a query, but it cannot take one token out of a mixture. One package offers such a mask, and its outputs change
with tokens that come later. So ``linformer`` refuses every task in which an answer may depend on the past alone.

The causal relative. ``linformer-segment`` cuts the text into segments of c tokens. E and F have c columns here, and turn each
segment into s mixtures as soon as it is complete. A query meets the mixtures of all complete segments before its own, and the
exact keys of its own segment up to itself, in one softmax. No mixture contains a later token. The text may have any length, if
positions are sines or none. Time grows as T c + T² s / c, which is least at c = √(T s). It is then T √(T s): less than T², and
not linear. What is lost: a token of an earlier segment cannot be read exactly, unless s = c.

How it is trained. ``linformer`` learns the task ``masked``, as the paper's models: 15 of 100 tokens are asked for, and the
loss is the cross-entropy of the model's guesses. E and F are trained with all other weights. One pass guesses all hidden
tokens, so there is nothing to write token by token. ``linformer-segment`` learns to guess the next token, at all positions of
a text at once. To write, it keeps the mixtures of the complete segments, and the exact keys and values of the last segment.
When that one is complete, E and F turn it into s mixtures. With the defaults, a width of 128, c = 16 and s = 4, these are
4,096 numbers in each layer after 64 tokens, 16 KiB in float32. A Transformer keeps 64 KiB.

What to choose:

- M, --projected-length. The paper finds that quality depends on M, and hardly on T / M (section 5.2). With M = 256 the
  perplexity stays about the same from 512 to 4096 tokens, and M = 128 is nearly enough for 512 tokens (section 5.1). The
  default is a quarter of the context. For a longer text, M need not grow.
- --sharing. The default, headwise, is that of fairseq, where the authors' code is. By table 2, layerwise does no worse.
- --projection. The default, linear, is the paper's own layer. Windows, below, have few weights or none, and no longest text.
- c and s, --segment and --summaries. More mixtures lose less and cost more. By default s = 4, and c is s times a power of two
  and at most √(context · s), where time is least.

    ours                                                        the paper's
    B T D H             batch, tokens, width, heads             -, n, d_m, h
    K = D / H           channels of a query, key or value       d, d_k
    M                   number of mixtures, --projected-length  k, the projected dimension
    x [B T D]           input of the layer                      Q = K = V, before the matrices W
    Wq Wk Wv Wo [D D]   matrices of weights, used as x Wᵀ       W^Q W^K W^V W^O, used as X W
    q k v [T K]         queries, keys, values of a head         Q W_i^Q, K W_i^K, V W_i^V
    E F [M T]           projections of keys and of values       E_i F_i; section 4 calls them n × k and uses them as k × n
    k̄ v̄ [M K]           mixtures of keys and of values          E_i K W_i^K, F_i V W_i^V
    P [T M]             weights, rows sum to 1                  P̄
    c, s                tokens of a segment, and its mixtures   -

The layer of ``linformer``:

    q = x Wqᵀ,   k = x Wkᵀ,   v = x Wvᵀ                         (2), in each head, as in the Transformer
    k̄ = E k,   v̄ = F v                                         (7), ``Linformer._mixtures``
    P = softmax(q k̄ᵀ / √K),   y = P v̄                           (7), ``attention`` without a mask
    out = merge(y) Woᵀ                                          (1), heads side by side, then one matrix

The layer of ``linformer-segment``, for token i in segment b:

    k̄ = E k,   v̄ = F v                                         of each complete segment, [s K], ``SegmentAttention.mixtures``
    y_i = softmax(q_i [k̄_0; ...; k̄_(b-1); k_bc; ...; k_i]ᵀ / √K) [v̄_0; ...; v̄_(b-1); v_bc; ...; v_i]

``attend`` below computes the softmax over the mixtures and that over the exact keys apart, because each needs few scores.
minitv/ops/merge_attention/__init__.py tells how two softmaxes become one, and minitv/ops/project/__init__.py has E k.

Sharing (section 4, "parameter sharing between projections"), for a model of L layers with H heads:

    --sharing none        E and F for every head of every layer     2 L H matrices
    --sharing headwise    E and F for every layer                   2 L
    --sharing key-value   E = F for every layer                     L
    --sharing layerwise   E = F for all layers                      1

Other projections (section 4, "general projections") cut the text into windows of T / M tokens, and make a mixture of each.
--projection mean and max have nothing to learn; convolution multiplies the window's tokens by matrices of K × K numbers,
depthwise by one number for each channel. They take a text of any length, unless positions are learned, and the number of
mixtures grows with it.

The order of the products. E mixes positions and Wk mixes channels, so E (x Wkᵀ) = (E x) Wkᵀ. This code computes the right side
if all heads share E, because only M rows then meet Wk. With --bias the keys are x Wkᵀ + b, and a mixture has b times the sum
of its row of E. The paper's formula says so, and so does the default, --projection-order keys. The code of the authors makes
the mixtures of x and then adds b once. --projection-order input does that.

Padding. Rows that are no part of the text (``seen`` is False) are set to 0 before E and F. After E no mask could tell them
apart any more. The task listops fills up a text with a token of its own instead, which the model reads as any other. In
``linformer-segment`` what follows a text is in its future, and so needs no mask.

Positions are added to x, as in the Transformer. --positions rope is refused: it turns each key by its position, and a mixture
of keys has none.

Gradients. ``attention`` gives the gradients of q, k̄ and v̄. Let G be the gradient of k̄ in one head of one text. Then k has the
gradient Eᵀ G, and E has the sum of G kᵀ over all texts, and over all heads and layers that share E. The same holds for v̄, F
and v. In ``linformer-segment`` G comes from all later segments, and an exact key has a second gradient, from its own segment.
With --frozen-projection E and F keep their first weights, and k and v have the same gradients.

Three tokens. One head with K = 2, values of one channel, and M = 2. The scale is ln 2 here in place of 1/√K, so that
exp(scale · q · k) = 2^(q · k). Row 0 of E adds keys 0 and 2, row 1 is key 1. F has the mean of values 0 and 2.

    >>> import numpy as np
    >>> q, k, v = np.array([[1., 0], [1, 1], [0, 2]]), np.array([[1., 0], [0, 1], [1, 1]]), np.array([[4.], [8], [2]])
    >>> E, F = np.array([[1., 0, 1], [0, 1, 0]]), np.array([[0.5, 0, 0.5], [0, 1, 0]])
    >>> print(E @ k, (F @ v).ravel())
    [[2. 1.]
     [0. 1.]] [3. 8.]
    >>> weights = 2 ** (q @ (E @ k).T)
    >>> print(weights)
    [[4. 1.]
     [8. 2.]
     [4. 4.]]
    >>> print((weights @ F @ v / weights.sum(axis=1, keepdims=True)).ravel())
    [4.  4.  5.5]

Token 0 gives (4 · 3 + 1 · 8) / 5 = 4. Every output has some of token 2 in it, the first one too. The operators compute the
same:

    >>> from minitv.ops import attention, project
    >>> mixtures = project(k[None, None], E[None]), project(v[None, None], F[None])
    >>> y, _ = attention(q[None, None], *mixtures, causal=False, scale=np.log(2))
    >>> print(y.numpy().ravel())
    [4.  4.  5.5]

If E and F are the identity, M = T and nothing is lost: this is attention as in the Transformer.

    >>> mixtures = project(k[None, None], np.eye(3)[None]), project(v[None, None], np.eye(3)[None])
    >>> for keys, values in (mixtures, (k[None, None], v[None, None])):
    ...     y, _ = attention(q[None, None], keys, values, causal=False, scale=np.log(2))
    ...     print(y.numpy().ravel().round(3))
    [4.    4.    4.889]
    [4.    4.    4.889]

The causal relative with c = 2 and s = 1, where E = F is the mean of the two tokens of a segment. Tokens 0 and 1 see each other
as in the Transformer. Token 2 sees the mean of the keys of tokens 0 and 1, with the weight 2^1, and its own key, with 2^2:
(2 · 6 + 4 · 2) / 6 = 3.333.

    >>> mean = np.array([[0.5, 0.5]])
    >>> keys, values = np.concatenate([mean @ k[:2], k]), np.concatenate([mean @ v[:2], v])
    >>> seen = np.array([[0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
    >>> weights = 2 ** (q @ keys.T) * seen
    >>> print(weights)
    [[0. 2. 0. 0.]
     [0. 2. 2. 0.]
     [2. 0. 0. 4.]]
    >>> print((weights @ values / weights.sum(axis=1, keepdims=True)).ravel().round(3))
    [4.    6.    3.333]

The same from the code of the model's layer:

    >>> from autograd import Tensor
    >>> part = [Tensor(x[None, None] * factor) for x, factor in ((q, np.log(2) * np.sqrt(2)), (k, 1), (v, 1))]
    >>> mixtures = [project(x[:, :, :2], mean[None]) for x in part[1:]]
    >>> print(attend(*part, *mixtures, segment=2, each=1).numpy().ravel().round(3))
    [4.    6.    3.333]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, assert_close, concat, linear, matmul, reshape, where
from autograd.device import namespace
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..nn import Buffer, Dropout, Linear, Module, Parameter, Stateful, made
from ..ops import attention, merge_attention, merge_heads, project, split_heads
from ..options import ModelOptions
from ..variant import Page, Variant

SHARING = ("none", "headwise", "key-value", "layerwise")
SUMMARIES = 4  # of a segment, unless it is shorter


@dataclass(frozen=True)
class ProjectionOptions:
    """linformer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)
    projection: str = option(
        "linear", "how tokens become fewer: mixed by matrices E and F, or windows of tokens one after the other, of which the "
        "mean, the maximum, a convolution over all channels of a head, or one for each channel is taken",
        choices=("linear", "mean", "max", "convolution", "depthwise"),
    )
    sharing: str = option(
        "headwise", "what a projection is shared by: nothing, the heads of a layer, these for both keys and values, or all "
        "layers", choices=SHARING,
    )
    projection_init: str = option(
        "xavier", "first weights of E and F: uniform up to √(3/(T + k)), as in fairseq, or up to 1/√k, as in lucidrains' "
        "package, or normal with variance 1/k, as in the paper's proof", choices=("xavier", "uniform", "normal"),
    )
    frozen_projection: bool = option(False, "projections keep their first weights, as fairseq can have it")


@dataclass(frozen=True)
class LinformerOptions(ProjectionOptions):
    """linformer"""

    projected_length: int | None = option(
        None, "mixtures that keys and values become, k in the paper; none = a quarter of the context", low=1, high=2**20
    )
    layer_lengths: str | None = option(
        None, "projected length of each layer, such as 32,32,16,16; none = --projected-length in all", metavar="N,N,..."
    )
    projection_order: str = option(
        "keys", "what E and F are applied to: keys and values, as in the paper, or what they are made of, as in fairseq, so "
        "that biases are added afterwards; without --bias this is the same", choices=("keys", "input"),
    )

    __post_init__ = check


@dataclass(frozen=True)
class SegmentOptions(ProjectionOptions):
    """linformer-segment"""

    segment: int | None = option(
        None, "tokens of a segment, which see each other exactly; none = --summaries times a power of two, up to √(context · "
        "--summaries), where attention costs least", low=1, high=2**20,
    )
    summaries: int | None = option(
        None, f"mixtures that a complete segment becomes; none = {SUMMARIES}, or all of a shorter segment", low=1, high=2**20
    )

    __post_init__ = check


# -- projections -------------------------------------------------------------------------------------------------------
class Matrix(Module):
    """Y = E X with E[G M C], for x[B H T K] -> y[B H M K], in each of G groups of heads; T is at most C."""

    def __init__(self, rng: Random, groups: int, rows: int, columns: int, width: int, options: ProjectionOptions, dtype):
        std, bound = None, math.sqrt(3 / (rows + columns))  # Xavier's with gain 1/√2
        if options.projection_init == "uniform":
            bound = 1 / math.sqrt(rows)
        if options.projection_init == "normal":
            std = 1 / math.sqrt(rows)
        self.weight = _drawn(rng, (groups, rows, columns), bound, std, options, dtype)

    def __call__(self, x: Tensor, seen=None) -> Tensor:
        return project(x, self.weight, seen)


class Windows(Module):
    """x[B H T K] -> y[B H M K]: ``window`` makes a mixture of each ``size`` tokens; the last window may have fewer."""

    def __init__(self, rng: Random, groups: int, rows: int, columns: int, width: int, options: ProjectionOptions, dtype):
        self.size, self.groups = columns // rows, groups

    def __call__(self, x: Tensor, seen=None) -> Tensor:
        if seen is not None:
            x = where(seen[:, None, :, None], x, 0.0)
        batch, heads, length, width = x.shape
        whole, parts = length // self.size * self.size, []
        for part, size in ((x[:, :, :whole], self.size), (x[:, :, whole:], length - whole)):
            if part.shape[2]:
                y = self.window(reshape(part, (batch, self.groups, -1, size, width)))  # [B G N K], N windows of a group
                parts.append(reshape(y, (batch, heads, -1, width)))
        return parts[0] if len(parts) == 1 else concat(parts, axis=2)

    def window(self, x: Tensor) -> Tensor:
        """Windows x[B G N size K] -> y[B G N K]."""
        raise NotImplementedError


class Mean(Windows):
    """The mean of each window."""

    def window(self, x: Tensor) -> Tensor:
        return x.mean(axis=3)


class Max(Windows):
    """The maximum of each window, channel by channel."""

    def window(self, x: Tensor) -> Tensor:
        return x.max(axis=3)


class Convolution(Windows):
    """y = Σ_j x_j W_j over the tokens j of each window, W[G size K K]; the first weights are uniform up to 1/√(size K)."""

    def __init__(self, rng: Random, groups: int, rows: int, columns: int, width: int, options: ProjectionOptions, dtype):
        super().__init__(rng, groups, rows, columns, width, options, dtype)
        bound = 1 / math.sqrt(self.size * width)
        self.weight = _drawn(rng, (groups, self.size, width, width), bound, None, options, dtype)

    def window(self, x: Tensor) -> Tensor:
        batch, groups, count, size, width = x.shape
        weight = reshape(self.weight[:, :size], (groups, size * width, width))
        return matmul(reshape(x, (batch, groups, count, size * width)), weight)


class Depthwise(Windows):
    """y = Σ_j w_j x_j over the tokens j of each window, w[G size K]; the first weights are uniform up to 1/√size."""

    def __init__(self, rng: Random, groups: int, rows: int, columns: int, width: int, options: ProjectionOptions, dtype):
        super().__init__(rng, groups, rows, columns, width, options, dtype)
        self.weight = _drawn(rng, (groups, self.size, width), 1 / math.sqrt(self.size), None, options, dtype)

    def window(self, x: Tensor) -> Tensor:
        size, width = x.shape[3:]
        return (x * reshape(self.weight[:, :size], (self.groups, 1, size, width))).sum(axis=3)


PROJECTIONS: dict[str, type[Module]] = {"linear": Matrix, "mean": Mean, "max": Max, "convolution": Convolution,
                                        "depthwise": Depthwise}


def _drawn(rng: Random, shape: tuple[int, ...], bound: float, std: float | None, options: ProjectionOptions, dtype):
    """Weights of a projection, uniform up to ``bound`` unless there is a deviation; frozen ones are a buffer."""
    def make() -> np.ndarray:
        return rng.normal(shape, np.float64) * std if std else (2 * rng.uniform(shape, np.float64) - 1) * bound

    return made(Buffer if options.frozen_projection else Parameter, shape, dtype, make)


class Projected(Stateful):
    """What both variants have: Wo, and the projections E of keys and F of values, shared as --sharing says."""

    without_rope = "a mixture of keys from many positions has no position of its own"

    def __init__(self, rng: Random, model: ModelOptions, options: ProjectionOptions, rows: int, columns: int, names: str,
                 dtype):
        width, self.heads, self.sharing = model.width, options.heads, options.sharing
        size, kind = model.head_dim(self.heads), PROJECTIONS[options.projection]
        if kind is not Matrix and columns % rows:
            raise UserError(f"{names}: {rows} windows do not divide {columns} positions, allowed with --projection "
                            f"{options.projection}: a divisor of {columns}")
        self.out = Linear(rng.split(3), width, width, std=model.output_std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)
        groups = self.heads if self.sharing == "none" else 1

        def projection(stream: int) -> Module:
            return kind(rng.split(stream), groups, rows, columns, size, options, dtype)

        self.E = projection(4)
        self.F = projection(5) if self.sharing in ("none", "headwise") else self.E

    def join(self, first: Projected) -> None:
        if self.sharing == "layerwise":
            self.E = self.F = first.E

    def _joined(self, y: Tensor, rng: Random | None) -> Tensor:
        return self.dropout(self.out(merge_heads([y])), rng)

    def _dropped(self, rng: Random | None) -> dict:
        """What attention needs to know to drop weights."""
        return {} if rng is None or not self.dropout.p else dict(dropout=self.dropout.p, seed=rng.seed)


# -- the paper's -------------------------------------------------------------------------------------------------------
class Linformer(Projected):
    """out = merge(softmax(q (E k)ᵀ / √K) (F v)) Woᵀ for x[B T D], section 4 of the paper; there is no state.

    The first weights are those of the Transformer, and of E and F as --projection-init has them. While training, the weights P
    and the output are dropped with the model's probability. UserError if the heads do not divide the width, if a projected
    length is above the context, or does not divide it where windows are projected.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: LinformerOptions, layer: int = 0, dtype=np.float32):
        rows, names = _projected_length(model, options, layer)
        super().__init__(rng, model, options, rows, model.context, names, dtype)
        self.q, self.k, self.v = (Linear(rng.split(i), model.width, model.width, std=model.init_std, bias=model.bias,
                                         dtype=dtype) for i in range(3))
        self.bounded = isinstance(self.E, Matrix)  # a column of E belongs to a position
        # E (x Wᵀ) = (E x) Wᵀ, and the right side is less work, if one E mixes all channels.
        self.early = isinstance(self.E, Matrix | Mean) and options.sharing != "none"
        self.order = options.projection_order
        if self.order == "input" and not self.early:
            raise UserError("--projection-order input: it needs one projection for all channels, allowed with --projection "
                            "linear or mean and with --sharing headwise, key-value or layerwise")

    def __call__(self, x: Tensor, rng: Random | None = None, seen=None) -> Tensor:
        """``seen``[B T], booleans, says which rows are text; the others are padding, and change no output of the text."""
        keys, values = self._mixtures(self.E, self.k, x, seen), self._mixtures(self.F, self.v, x, seen)  # k̄, v̄ [B H M K]
        q = self._split(self.q(x))
        y, _ = attention(q, keys, values, causal=False, **self._dropped(rng and rng.split(0)))  # P v̄ [B H T K]
        return self._joined(y, rng and rng.split(1))

    def _mixtures(self, projection: Module, dense: Linear, x: Tensor, seen) -> Tensor:
        """E (x Wᵀ + b) in every head."""
        if not self.early:
            return projection(self._split(dense(x)), seen)
        y = projection(x[:, None], seen)[:, 0]  # E x [B M D]
        if dense.bias is None or self.order == "input":
            return self._split(dense(y))
        ones = self.constant(1.0, *x.shape[:1], 1, x.shape[1], 1)
        sums = projection(ones, seen)[:, 0]  # of the rows of E [B M 1]
        return self._split(linear(y, dense.weight) + sums * dense.bias)

    def _split(self, x: Tensor) -> Tensor:
        """[B T D] -> [B H T K]"""
        return split_heads(x, heads=(self.heads,))[0]


def _projected_length(model: ModelOptions, options: LinformerOptions, layer: int) -> tuple[int, str]:
    """The number M of mixtures in a layer, and the option that says so."""
    context, lengths, flag = model.context, options.layer_lengths, "--projected-length"
    if lengths is None:
        k = max(1, context // 4) if options.projected_length is None else options.projected_length
    else:
        flag = "--layer-lengths"
        numbers = model.by_layer(flag, lengths)
        if options.projected_length is not None:
            raise UserError(f"{flag}: --projected-length says the same for all layers, give one of them")
        if options.sharing == "layerwise" and len(set(numbers)) > 1:
            raise UserError(f"{flag}: {lengths} are several lengths, and --sharing layerwise has one projection for all layers")
        k = numbers[layer]
    if k > context:
        raise UserError(f"{flag}: {k} mixtures are more than the context of {context} positions, allowed: 1 to {context}")
    return k, flag


# -- the causal relative -----------------------------------------------------------------------------------------------
class State(NamedTuple):
    """The mixtures of all complete segments, [B H N K], and the exact keys and values of the last segment, [B H r K], r < c."""

    mixed_keys: Tensor
    mixed_values: Tensor
    keys: Tensor
    values: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mixed_keys: Tensor, mixed_values: Tensor, *, segment: int, each: int,
           past: int = 0, dropped: tuple[dict, dict] = ({}, {})) -> Tensor:
    """Causal attention to the mixtures of complete segments and to the exact keys of one's own segment, in one softmax.

    q[B H T K] are the last T positions of k[B H S K] and v[B H S V], which begin with a segment. Mixtures are [B H N K] and
    [B H N V]: first ``past`` ones of segments before k, then ``each`` of every segment of k that is complete.
    """
    xp, length, keys, mixed = namespace(q.data), q.shape[2], k.shape[2], mixed_keys.shape[2]
    y, lse = attention(q, k, v, segment=segment if keys > segment else None, **dropped[0])
    if not mixed:
        return y
    own = xp.arange(keys - length, keys)[:, None] // segment  # segments of k before that of a query [T 1]
    seen = xp.arange(mixed) < past + each * own  # [T N]
    return merge_attention(y, lse, *attention(q, mixed_keys, mixed_values, seen, causal=False, **dropped[1]))[0]


class SegmentAttention(Projected):
    """out = merge(softmax(q [k̄; k]ᵀ / √K) [v̄; v]) Woᵀ for x[B T D]: k̄ and v̄ are E k and F v of every complete segment.

    The state has s mixtures of each complete segment, and at most c - 1 exact keys and values. The first weights are those of
    ``Linformer``, with c columns for T. UserError if the heads do not divide the width, if a segment is longer than the
    context, or has fewer tokens than mixtures, or a number of them that windows cannot divide.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: SegmentOptions, layer: int = 0, dtype=np.float32):
        self.segment, self.rows = self.sizes(model, options)
        super().__init__(rng, model, options, self.rows, self.segment, "--summaries", dtype)
        self.qkv = Linear(rng.split(0), model.width, 3 * model.width, std=model.init_std, bias=model.bias, dtype=dtype)

    @staticmethod
    def sizes(model: ModelOptions, options: SegmentOptions) -> tuple[int, int]:
        """The tokens c of a segment, and the mixtures s that it becomes."""
        context, segment, rows = model.context, options.segment, options.summaries
        if segment is None:
            least = SUMMARIES if rows is None else rows
            segment = min(context, least * 2 ** max(0, math.floor(math.log2(context / least) / 2)))
        if segment > context:
            raise UserError(f"--segment: {segment} tokens are more than the context of {context}, allowed: 1 to {context}")
        if rows is None:
            rows = min(SUMMARIES, segment)
        if rows > segment:
            raise UserError(f"--summaries: {rows} mixtures are more than the {segment} tokens of a segment, allowed: 1 to "
                            f"{segment}")
        return segment, rows

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), heads=3 * (self.heads,))
        complete = max(0, x.shape[1] - 1) // self.segment  # segments that a later token sees
        y = attend(q, k, v, self.mixtures(self.E, k, complete), self.mixtures(self.F, v, complete), segment=self.segment,
                   each=self.rows, dropped=tuple(self._dropped(rng and rng.split(i)) for i in (0, 1)))
        return self._joined(y, rng and rng.split(2))

    def init_state(self, batch: int) -> State:
        empty = self.constant(0.0, batch, self.heads, 0, self.out.weight.shape[0] // self.heads)
        return State(empty, empty, empty, empty)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = split_heads(self.qkv(x), heads=3 * (self.heads,))
        k, v = concat([state.keys, k], axis=2), concat([state.values, v], axis=2)  # from the beginning of a segment [B H S K]
        complete, past = k.shape[2] // self.segment, state.mixed_keys.shape[2]
        keys, values = (concat([old, self.mixtures(projection, rows, complete)], axis=2) for old, projection, rows in
                        ((state.mixed_keys, self.E, k), (state.mixed_values, self.F, v)))  # k̄, v̄ [B H N K]
        y = attend(q, k, v, keys, values, segment=self.segment, each=self.rows, past=past)
        rest = complete * self.segment
        return self._joined(y, None), State(keys, values, k[:, :, rest:], v[:, :, rest:])

    def mixtures(self, projection: Module, x: Tensor, complete: int) -> Tensor:
        """What becomes of the first segments of x[B H T K], [B H complete·s K]."""
        batch, heads, _, width = x.shape
        segments = reshape(x[:, :, : complete * self.segment], (batch, heads * complete, self.segment, width))
        if not complete:
            return reshape(segments, (batch, heads, 0, width))
        return reshape(projection(segments), (batch, heads, complete * self.rows, width))


LINFORMER = Variant(
    name="linformer",
    summary="Attention in both directions to a fixed number of mixtures of all keys, in linear time",
    paper="Wang et al. 2020, arXiv 2006.04768",
    mixer=Linformer,
    options=LinformerOptions,
    model=Encoder,
    not_causal="every row of E k mixes all positions, so that no mask can hide the later ones; linformer-segment is a relative "
               "that sees the past alone",
    page=Page(
        formula="y = softmax(q (E k)ᵀ / √K) (F v) in every head, with E and F of the shape M × T; q, k, v = x Wᵀ, "
                "out = merge(y) Woᵀ",
        cost="training, for each layer and sequence: O(T D²) for the queries, the output and the feed-forward network, O(M D²) "
             "for keys and values where all heads share E, linear or a mean, else O(T D²), O(T M D) for E and F, and O(T M D) "
             "for attention; the weights are 4 D², 8 D² in the feed-forward network, and M T of each E or F. Memory: O(T D), "
             "because the kernels never store the T × M weights P; O(T D + T M H) in the plain form, which does. It does not "
             "generate",
        state="none: it sees a whole sequence at once",
        operators=("project", "attention"),
        golden="the LinformerSelfAttention of the package linformer, with all gradients, and full attention when E and F are "
               "the identity",
        discrepancies=(
            "the paper introduces E and F as n × k matrices and multiplies by them as k × n; here they are M × T, and M is "
            "its k",
            "the paper projects keys and values; the code of its authors, in fairseq, projects the input of the layer and then "
            "multiplies by Wk and Wv, which differs by the biases: --projection-order",
            "the first weights of E and F are Xavier's with gain 1/√2 in fairseq, the default here, uniform up to 1/√M in "
            "lucidrains' package, and multiples of one normal matrix in the paper's proof: --projection-init; fairseq can "
            "freeze them: --frozen-projection",
            "share_kv in lucidrains' package also sets Wk = Wv, so that values are the keys; the paper, and --sharing "
            "key-value, share E = F alone",
            "the package linformer-pytorch offers causal=True, which masks a triangle of the T × M weights; its early outputs "
            "change with later tokens. The code of Long Range Arena accepts a causal mask and ignores it",
            "with a text shorter than the context, E keeps its first columns, as in fairseq and lucidrains' package; a "
            "mixture is then a sum of fewer terms, so a model works best at the length that it was trained for",
        ),
        review="it says that Linformer breaks attention into multiple smaller attentions. The paper's introduction says so "
               "too, but its equation (7) does not: every query remains, and meets M mixtures of all keys in one softmax; it "
               "is not block attention",
    ),
)

LINFORMER_SEGMENT = Variant(
    name="linformer-segment",
    summary="Causal attention to the exact keys of one's own segment and to mixtures of the earlier ones",
    paper="ours, after Wang et al. 2020, arXiv 2006.04768",
    mixer=SegmentAttention,
    options=SegmentOptions,
    fused="linformer",
    page=Page(
        formula="y_i = softmax(q_i [k̄; k]ᵀ / √K) [v̄; v] in every head, over the mixtures k̄ = E k, v̄ = F v of all complete "
                "segments before that of i and the keys j ≤ i of its own; q, k, v = x Wᵀ, out = merge(y) Woᵀ",
        cost="training, for each layer and sequence, with segments of c tokens that become s mixtures: O(T D²) for the "
             "projections, which have 4 D² weights, and for the feed-forward network, which has 8 D²; O(T s D) for E and F, "
             "which have s c weights each; O(T (c + T s / c) D) for attention, which is least at c = √(T s). Memory: O(T D). "
             "Generating token t: O(D²) for the matrices and O((c + t s / c) D) for attention",
        state="2 D (s t / c + c) numbers in each layer at most, of 4 bytes in float32: s mixtures of each complete segment, "
              "and the exact keys and values of the last one",
        operators=("project", "attention", "merge_attention"),
        golden="full causal attention when E and F are the identity, and a loop over all tokens",
        discrepancies=(
            "it is not in the paper, which has no causal model: it is an honest way to use its idea for one. The published "
            "relative is Transformer-LS (Zhu et al. 2021, arXiv 2107.02192), whose projections depend on the data",
        ),
        review="it does not speak of a causal Linformer",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
def _same_attention(case, draw, full: str, size: int, lengths: tuple[int, ...], **options) -> None:
    """With projections of ``size`` positions that are the identity, the layers are those of full attention."""
    one, other = case.model(sharing=draw.choice(SHARING), **options), case.of(full)
    for block, same in zip(one.blocks, other.blocks, strict=True):
        mixer, attention = block.mixer, same.mixer
        mixer.out.load(attention.out.state())
        if hasattr(mixer, "qkv"):
            mixer.qkv.load(attention.qkv.state())
        else:
            parts = (np.split(array.numpy(), 3) for array in (attention.qkv.weight, attention.qkv.bias))
            for part, weight, bias in zip((mixer.q, mixer.k, mixer.v), *parts, strict=True):
                part.load({"weight": weight, "bias": bias})
        for part in (mixer.E, mixer.F):
            part.weight.assign_(np.broadcast_to(np.eye(size), part.weight.shape).copy())
        for length in lengths:
            x = Tensor(draw.generator().normal(size=(case.sizes["B"], length, case.sizes["D"])))
            assert_close(mixer(x).numpy(), attention(x).numpy(), f"over {length} positions", terms=1000)


@LINFORMER.becomes("encoder", "it projects to as many positions as there are, by an identity matrix")
def _(case, draw):
    """Where k = T is needed: more rows are keys of zeros."""
    length = case.sizes["T"]
    _same_attention(case, draw, "encoder", length, (length,), projected_length=length)


@LINFORMER_SEGMENT.becomes("transformer", "a segment has as many summaries as tokens, by an identity matrix")
def _(case, draw):
    """Also where the last segment is not complete."""
    length = case.sizes["T"]
    _same_attention(case, draw, "transformer", 4, (length, length - 1), segment=4, summaries=4)
