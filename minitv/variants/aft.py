"""AFT: attention without products of queries and keys (Zhai et al. 2021, arXiv 2105.14103).

The problem. In attention the weight of token s for token t is a softmax of the product q_t · k_s. Every head and every sequence
needs T² such products, and to generate a token the model goes through the keys and values of all tokens before it. Numbers in
brackets name the paper's equations.

The idea. The weight does not depend on the query. It has two factors: e^(k_s), which token s computes from itself alone, and
e^(w_ts), where w_ts is a learned bias of the two positions, whichever tokens stand there. The mean of the values with these
weights takes the place of what attention reads. The query only decides, in each channel, how much of this mean passes:

    m_t = Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts),    y_t = sigmoid(q_t) ∘ m_t

This happens in each channel on its own. The four variants differ in the bias w. The less freedom it has, the less time the
means of T tokens take: O(T² D) in AFT-full, O(T window D) in AFT-local and AFT-conv, O(T D) in AFT-simple. To generate,
AFT-full keeps all keys and values, and the other three have a state of fixed size.

- Why an exponential: weights are positive, so m_t lies between the smallest and the largest value, and y cannot grow with the
  length of the text. One large key is enough for a token to outweigh all others, for as long as no larger key comes.
- Why every channel has its own weights: attention has one weight for all channels of a head, and needs many heads to look at
  many places. Here every channel is a head: its weights are a_ts = e^(k_s + w_ts) / Σ_s e^(k_s + w_ts), and
  y_t = Σ_s sigmoid(q_t) a_ts v_s (3).
- Why a gate: without it the present token could not influence what it reads from the past, apart from its own term.
- Why a bias: a mean does not depend on the order of its terms. Without w a token far back counts as much as the same token
  just read, and the model knows order only from the position embedding that the input contains.
- Why the bias has two factors of few columns: w as a parameter would have T² numbers in each layer. On the images of CIFAR10
  the layer then has 0.6 instead of 9.6 million parameters, and the model becomes better: 2.74 instead of 2.84 bits per
  dimension (Table 3).
- Why a window: the nearest positions gain most. On the text enwik8 the test bits per character, which are better when lower,
  are 1.209 without bias, 1.205 with a bias for the present position only, 1.154 for the nearest 32, and 1.173 for all 1024
  (Table 5).
- Why a token outside the window still counts, with weight e^(k_s): the mean can then reach any token. On ImageNet AFT-conv
  classifies 80.8 % of the images in this way, and 79.9 % with a window that hides what is outside (filters of size 7).
- Why a convolution: in an image the same pattern may be anywhere. If w depends on the distance t - s alone, what is learned at
  one place holds at all places, and w has no largest position.

What is lost. Whichever token stands at position t, it reads the same mean of the past. So it cannot search for a content that
fits it: a key says "I am important", and not "I am important for you". On enwik8 a Transformer of 24 layers of width 256
reaches 1.130 test bits per character, AFT-local 1.154, and AFT-simple 1.209 (Table 4).

    ours                                                                      the paper's
    B T D                     batch, tokens, width                            -, T, d
    H                         heads of AFT-conv                               h
    window                    lags 0 .. window-1 that have a bias             s: |t - t'| < s
    rank                      columns of U and V                              d'
    t, s                      the position that reads, one that it sees       t, t'
    x [B T D]                 input of the layer                              X
    Wqkv, Wo [outputs inputs] matrices of weights, used as x Wᵀ               W [inputs outputs], used as X W; it has no Wo
    q_t k_t v_t [D]           query, key and value; k_t [H] in AFT-conv       Q_t, K_t, V_t
    w [T T]                   bias of position s for position t               w
    U, V [context rank]       factors of w, pos_u and pos_v in the code       u, v
    f [H window]              AFT-conv's filters, the bias of each lag        w
    raw [H window], gain [H], shift [H]: conv_weight, conv_gain, conv_bias    w, γ, β
    a_ts [D]                  weight of s in the mean for t                   a, without the factor of the gate
    m_t, y_t [D]              mean, and output of the mixing                  -, Y_t
    ∘, and / and e^ of arrays on each element                                 ⊙

The layer, in a Transformer's block with the Transformer's position embedding and feed-forward network (hidden width 4 D):

    [q, k, v] = x Wqkvᵀ,   y = mix(q, k, v),   out = y Woᵀ       then  x ← x + out  after a norm of x, as attention does

The first weights are from N(0, init_std²), those of Wo from N(0, (init_std / √(2 layers))²), as in the Transformer. U and V are
from N(0, 0.01²), so w starts near 0, and a new model is nearly AFT-simple.

AFT-full (2): a bias for every pair of positions. E_ts is e^(w_ts) for s ≤ t, else 0, and both sums are products with E:

    w = U Vᵀ (section 3.2),    Y = sigmoid(Q) ∘ (E (e^K ∘ V)) / (E e^K)        the rows of Q, K, V [T D] are positions

AFT-simple (5): w = 0. The two sums no longer depend on t except for where they end, so they are running sums, and their state
has a fixed size:

    N_t = N_{t-1} + e^(k_t) v_t,    Z_t = Z_{t-1} + e^(k_t),    y_t = sigmoid(q_t) ∘ N_t / Z_t

AFT-local (4): w_ts = U_t · V_s if t - s < window, else 0. What has left the window enters the running sums of AFT-simple, and
the tokens in the window are added one by one with their biases:

    N_t = Σ_{s ≤ t - window} e^(k_s) v_s + Σ_{t - window < s ≤ t} e^(k_s + w_ts) v_s        and Z_t likewise, with v = 1

AFT-conv (6): w_ts = f_{t-s} if t - s < window, else 0. All D / H channels of a head share one filter f and one key:

    N_t = Σ_{s ≤ t} e^(k_s) v_s + Σ_{j < window} (e^(f_j) - 1) e^(k_{t-j}) v_{t-j}          and Z_t likewise, with v = 1
    f = gain (raw - mean(raw)) / std(raw) + shift                                         section 3.2, for each head

The subtracted 1 is what the first sum has counted already. The standardisation takes size and mean out of raw: gain alone says
how strong a filter is, and shift how much the window counts against the rest. Both start at 0, so f is 0, and a new AFT-conv is
AFT-simple with one key for each head. raw starts from N(0, 1), not from a constant, which would have the standard deviation 0.
The first step changes gain and shift only: raw is multiplied by gain, so its gradient is still 0.

minitv/ops/aft/__init__.py has the gradients, and how all sums stay within the range of floating point.

Three tokens and one channel. The keys are such that e^k is 1, 2, 1. The queries are 0, so half of each mean passes. e^w is a
matrix in which a token counts three times as much for each step back:

    >>> import numpy as np
    >>> from autograd import Tensor, sum
    >>> from minitv.ops import aft_conv, aft_full, aft_local, aft_simple
    >>> q, k, v = (np.array(x).reshape(1, 3, 1) for x in ([0., 0, 0], np.log([1., 2, 1]), [8., 2, 4]))
    >>> w = np.log([[1., 1, 1], [3, 1, 1], [9, 3, 1]])
    >>> def show(y, *state):
    ...     print(y.numpy().ravel().round(3))
    >>> show(aft_full(q, k, v, w))
    [4.   2.8  2.75]

By hand, m_1 = (3·1·8 + 1·2·2) / (3·1 + 1·2) = 28/5 and m_2 = (9·1·8 + 3·2·2 + 1·1·4) / (9 + 6 + 1) = 88/16; y is half of them.
AFT-simple has no w, and running sums do: N = 8, 12, 16 and Z = 1, 3, 4.

    >>> show(*aft_simple(q, k, v))
    [4. 2. 2.]
    >>> N = Z = 0
    >>> for t in range(3):
    ...     N, Z = N + np.exp(k[0, t, 0]) * v[0, t, 0], Z + np.exp(k[0, t, 0])
    ...     print(round(N, 3), round(Z, 3), round(0.5 * N / Z, 3))
    8.0 1.0 4.0
    12.0 3.0 2.0
    16.0 4.0 2.0

A window of 2 keeps the weights 1 and 3 of the two nearest. For the last token the first one is outside, and counts 1 and not 9:
m_2 = (1·8 + 3·2·2 + 1·4) / (1 + 6 + 1) = 3. This w depends on the distance alone, so one filter gives the same numbers.

    >>> lags = np.log([1., 3])
    >>> show(*aft_local(q, k, v, np.array([lags, lags, lags])))
    [4.  2.8 1.5]
    >>> show(*aft_conv(q, k, v, lags[None]))
    [4.  2.8 1.5]

The gradient of AFT-simple's last output. The weights are 1/4, 1/2, 1/4 and the mean is 4, so half of the weights reach v, and
half of weight · (v - 4) reaches k: the key of a value above the mean grows, that of a value below it shrinks.

    >>> k, v = Tensor(k, requires_grad=True), Tensor(v, requires_grad=True)
    >>> sum(aft_simple(q, k, v)[0][:, 2]).backward()
    >>> print(v.grad.numpy().ravel().round(3), k.grad.numpy().ravel().round(3) + 0.0)
    [0.125 0.25  0.125] [ 0.5 -0.5  0. ]
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
from ..nn import Dropout, Linear, Stateful, full, normal
from ..ops import aft_conv, aft_full, aft_local, aft_simple, banded_product
from ..options import ModelOptions
from ..sequence import relay
from ..variant import Page, Variant

RANK = "columns of the matrices U and V, whose product is the bias"
POSITION_STD = "standard deviation of U and V at the start"
PROJECTION = "a matrix after the mixing; the paper's equations have none, public implementations do"


class AFT(Stateful):
    """out = mix(q, k, v) Woᵀ with [q, k, v] = x Wqkvᵀ, for x[B T D]; both matrices have a bias vector if ``model.bias``.

    A variant's ``mix(q, k, v, state)`` gives y[B T D] and the state after it. A state of None means that nothing came before.
    ``keys`` is the number of channels of k.
    """

    def __init__(self, rng: Random, model: ModelOptions, keys: int, output_projection: bool, dtype):
        width, bias = model.width, model.bias
        self.sizes = width, keys, width
        self.qkv = Linear(rng.split(0), width, sum(self.sizes), std=model.init_std, bias=bias, dtype=dtype)
        self.out = None
        if output_projection:
            self.out = Linear(rng.split(1), width, width, std=model.output_std, bias=bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        y, _ = self.mix(*self._split(x), None)
        return self.dropout(self._project(y), rng)

    def prefill(self, x: Tensor, state):
        y, state = self.mix(*self._split(x), state)
        return self._project(y), state

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.qkv(x), sizes=self.sizes)  # q [B T D], k [B T D] or [B T H], v [B T D]

    def _project(self, y: Tensor) -> Tensor:
        return y if self.out is None else self.out(y)


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
    """AFT-full, equation (2): w = U Vᵀ for x[B T D]; state size 2 B t D, growing with the number t of tokens.

    The first U and V [context rank] are from N(0, position_std²). UserError if the machine has not enough memory
    for w[context context].
    """

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
        bias = linear(self.pos_u[stop - q.shape[1]:stop], self.pos_v[:stop])  # w = U Vᵀ, section 3.2 [T S]
        return aft_full(q, *state, bias), state  # (2) [B T D]

    def init_state(self, batch: int) -> FullState:
        empty = self.constant(0.0, batch, 0, self.sizes[0])
        return FullState(empty, empty)


@dataclass(frozen=True)
class AFTSimpleOptions:
    """aft-simple"""

    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class SimpleState(NamedTuple):
    """The past: m = N / Z, the mean of its values, and ln Z = ln Σ e^k of its keys, [B D] each."""

    average: Tensor
    logsum: Tensor


class AFTSimple(AFT):
    """AFT-simple, equation (5): w = 0 for x[B T D]; state size 2 B D."""

    def __init__(self, rng: Random, model: ModelOptions, options: AFTSimpleOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: SimpleState | None) -> tuple[Tensor, SimpleState]:
        y, *after = relay(lambda k, *past: aft_simple(q, k, v, None, *past), k, *(state or (None, None)),
                          begin=lambda: self.init_state(len(k.data)))  # (5) [B T D]
        return y, SimpleState(*after)

    def init_state(self, batch: int) -> SimpleState:
        shape = batch, self.sizes[0]
        return SimpleState(self.constant(0.0, *shape), self.constant(-math.inf, *shape))


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
    """AFT-local, equation (4): w_ts = U_t · V_s in the window, else 0, for x[B T D]; state size 2 B window D.

    The first U and V [context rank] are from N(0, position_std²).
    """

    bounded = True  # the biases belong to the positions of the context

    def __init__(self, rng: Random, model: ModelOptions, options: AFTLocalOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)
        self.window, shape = options.window, (model.context, options.rank)
        self.pos_u = normal(rng.split(2), shape, options.position_std, dtype)
        self.pos_v = normal(rng.split(3), shape, options.position_std, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: LocalState | None) -> tuple[Tensor, LocalState]:
        start, *past = state or (0,)
        stop = start + q.shape[1]
        near = self.pos_v[max(start - self.window + 1, 0):stop]
        bias = banded_product(self.pos_u[start:stop], near, window=self.window)  # w, section 3.2 [T window]
        y, *after = aft_local(q, k, v, bias, None, *past)  # (4) [B T D]
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
    """AFT-conv, equation (6), causal: w_ts = f_{t-s} in the window, else 0, for x[B T D]; state size B window (D + heads).

    The first raw filters [heads window] are from N(0, 1), gain and shift [heads] are 0. UserError if the heads do not divide
    the width.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: AFTConvOptions, layer: int = 0, dtype=np.float32):
        self.heads, self.window = options.heads or model.width, options.window
        model.head_dim(self.heads)  # refuses what does not divide
        super().__init__(rng, model, self.heads, options.output_projection, dtype)
        self.conv_weight = normal(rng.split(2), (self.heads, self.window), 1.0, dtype)
        self.conv_gain, self.conv_bias = (full((self.heads,), 0, dtype) for _ in range(2))

    def filters(self) -> Tensor:
        """f = gain (raw - mean(raw)) / std(raw) + shift, the biases of the lags: [heads window] (section 3.2)."""
        raw = self.conv_weight
        unit = (raw - mean(raw, axis=1, keepdims=True)) / std(raw, axis=1, keepdims=True)
        return self.conv_gain[:, None] * unit + self.conv_bias[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: ConvState | None) -> tuple[Tensor, ConvState]:
        y, *after = aft_conv(q, k, v, self.filters(), None, *(state or ()))  # (6) [B T D]
        return y, ConvState(*after)

    def init_state(self, batch: int) -> ConvState:
        width, near = self.sizes[0], self.window - 1
        return ConvState(self.constant(0.0, batch, width), self.constant(-math.inf, batch, self.heads),
                     self.constant(-math.inf, batch, near, self.heads), self.constant(0.0, batch, near, width))


PAPER = "Zhai et al. 2021, arXiv 2105.14103"
RATE = dict(lr=3e-3)  # the paper's

MATRICES = "O(T D²) for the matrices, 4 D² weights in Wqkv and Wo and 8 D² in the feed-forward network"
TOKEN = "generating a token: O(D²) for the matrices"

# What several variants share of paper and code.
OUTPUT = "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on here"
DROPOUT = "the paper does not say where dropout acts; here it acts on the output"
FACTORS = (
    "the columns of U and V are 128 in the text and for ImageNet, 64 for CIFAR10, 256 for enwik8: --rank, 64 here",
    "U and V start from N(0, 10⁻²), and the paper does not say whether 10⁻² is the variance or the standard deviation: "
    "--position-std is the standard deviation, 0.01 here",
    "w belongs to absolute positions: the model cannot read further than its context",
)
BEGINS = "w starts at 0 or near it, so in the first hundreds of steps the model learns like AFT-simple"

AFT_FULL = Variant(
    name="aft-full",
    summary="AFT-full: AFT with a learned bias for every pair of positions, in quadratic time",
    paper=f"{PAPER}, eq. 2",
    mixer=AFTFull,
    options=AFTFullOptions,
    presets={"nanogpt-cpu": RATE},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts) in every channel; w = U Vᵀ",
        cost=f"training, for each layer and sequence: {MATRICES}; for the mean O(T² D) time and O(T D) memory; for w, which "
             "all sequences of a batch share, O(T² rank) time, T² numbers and 2 rank context parameters; "
             f"{TOKEN} and O(t (D + rank)) for the mean of t tokens",
        state="2 t D: keys and values of all t tokens read so far",
        operators=("aft_full",),
        golden="AFTLocal of labml-nn 0.5.1 with a window of the whole sequence, gradients included",
        discrepancies=(
            OUTPUT, DROPOUT, *FACTORS, BEGINS,
            "an older labml-nn subtracted the largest bias of a column before the exponential, which does not cancel; what "
            "cancels is the largest of a row",
        ),
        review="it gives O(T² d) time and O(T d) space, as the paper's Table 1; the space leaves out w, whose factors take "
               "less than T² numbers only as long as their product is not stored",
    ),
)


AFT_SIMPLE = Variant(
    name="aft-simple",
    summary="AFT-simple: each channel takes a weighted mean of its past, in linear time",
    paper=f"{PAPER}, eq. 5",
    mixer=AFTSimple,
    options=AFTSimpleOptions,
    presets={"nanogpt-cpu": RATE},
    fused="aft",
    on_ranks="each rank passes the mean of the values and ln Σ e^k on to the next one",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s) v_s / Σ_{s ≤ t} e^(k_s) in every channel; [q, k, v] = x Wqkvᵀ, "
                "out = y Woᵀ",
        cost=f"training, for each layer and sequence: {MATRICES}; for the mean O(T D) time and memory; {TOKEN} and O(D) for "
             "the mean, however long the text is",
        state="2 D: the mean of the values so far, and the logarithm of its total weight",
        operators=("aft_simple",),
        golden="AFTLocal of labml-nn 0.5.1 with a bias of zeros, gradients included",
        discrepancies=(
            OUTPUT, DROPOUT,
            "aft-pytorch 0.2.2 has no causal mask and subtracts no maximum, so its exponentials overflow; labml-nn subtracts "
            "the largest key of the whole sequence, in causal use too, which leaves 0/0 where keys rise by more than 104: here "
            "a running maximum is subtracted",
        ),
        review="it gives O(T d) time and space, which is the paper's Table 1, and right",
    ),
)


AFT_LOCAL = Variant(
    name="aft-local",
    summary="AFT-local: AFT with a learned bias for the nearest positions, in linear time",
    paper=f"{PAPER}, eq. 4",
    mixer=AFTLocal,
    options=AFTLocalOptions,
    presets={"nanogpt-cpu": RATE},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts) in every channel; "
                "w_ts = U_t · V_s if t - s < window, else 0",
        cost=f"training, for each layer and sequence: {MATRICES}; for the mean O(T window D) time and O(T D) memory; for w, "
             "which all sequences of a batch share, O(T window rank) time, T window numbers and 2 rank context parameters; "
             f"{TOKEN} and O(window (D + rank)) for the mean, however long the text is",
        state="2 window D: keys and values in the window, the mean of what has left it, and the logarithm of its total weight",
        operators=("aft_local", "banded_product"),
        golden="AFTLocal of labml-nn 0.5.1, causal and in both directions, gradients included",
        discrepancies=(
            OUTPUT, DROPOUT, *FACTORS, BEGINS,
            "aft-pytorch 0.2.2 makes a new bias in every call, which no optimiser ever trains; it is no reference here",
        ),
        review="it does not name this variant; O(T window d) time and O(T d) space are the paper's Table 1",
    ),
)


AFT_CONV = Variant(
    name="aft-conv",
    summary="AFT-conv: AFT with a learned bias for each distance, a causal convolution",
    paper=f"{PAPER}, eq. 6",
    mixer=AFTConv,
    options=AFTConvOptions,
    presets={"nanogpt-cpu": dict(RATE, heads=None), "small": dict(heads=None)},
    fused="aft",
    page=Page(
        formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_{t-s}) v_s / Σ_{s ≤ t} e^(k_s + w_{t-s}); "
                "one k and one w for all channels of a head",
        cost=f"training, for each layer and sequence: {MATRICES}, (D - H) D fewer in Wqkv with H heads; for the mean "
             "O(T window D) time and O(T D) memory; the filters are H (window + 2) parameters; "
             f"{TOKEN} and O(window D) for the mean, however long the text is",
        state="window (D + heads): keys and values in the window, the mean of what has left it, the logarithm of its total "
              "weight",
        operators=("aft_conv", "aft_conv2d"),
        golden="eq. 6 by PyTorch's conv1d and conv2d with e^w - 1, along a sequence and for images, gradients included",
        discrepancies=(
            OUTPUT, DROPOUT, BEGINS,
            "the paper evaluates it on images alone, in both directions; here that is the operator aft_conv2d, and the variant "
            "is its causal form along a sequence, with as many heads as channels, the paper's best",
            "eq. 6 subtracts numbers that are equal in float32 where w is very negative (at w = -15, values near 1 are wrong "
            "by 0.4); here all terms are positive",
            "the paper does not say by which standard deviation a filter is divided: here by the biased one",
        ),
        review="it does not name this variant; O(T window d) time and O(T d) space are the paper's Table 1",
    ),
)
