"""The Transformer: every token looks at all others at once, in one step (Vaswani et al. 2017, arXiv 1706.03762).

The variant ``transformer`` is the decoder alone, a language model as GPT-2 (Radford et al. 2019). The variant ``encoder`` sees
both directions, as BERT (Devlin et al. 2018, arXiv 1810.04805).

The problem. A recurrent network reads one token after the other, so a long text trains slowly. And what it knows of a far token
has passed through every state in between, all of the same small size. A convolution reads all tokens at once, but each layer
sees a few neighbours only. Numbers in brackets name the paper's equations.

The idea. Each token asks, and the tokens that it sees answer. Token i makes a query q_i, token j a key k_j and a value v_j. The
score q_i · k_j tells how well the key fits the query. The softmax turns the scores of a query into weights, and the output is
the mean of the values with these weights. Any two tokens are one step apart, and a layer is a few large matrix products.

- Why query, key and value are three functions of a token: what a token looks for, how others find it and what it hands over are
  three different things. With q = k the scores would be symmetric, and a token would usually fit itself best.
- Why the softmax: its weights are positive and sum to 1, so the output is a mean of values and stays in their range, whether 10
  or 1000 tokens answer. And exp lets one token that fits well outweigh many that do not.
- Why 1/√K: if the K channels of q and k are independent with variance 1, q · k has the variance K. Large scores make a softmax
  that is nearly 1 at one token and 0 elsewhere, with hardly any gradient (section 3.2.1, footnote 4).
- Why several heads: one softmax gives one mean, so it can follow one relation. H heads follow H relations at once. Each has
  K = D / H channels, so that together they cost as much as one head with D channels (section 3.2.2).
- Why a causal mask: a language model learns to guess token t + 1 from the tokens up to t. The mask hides what comes later, so
  one pass over a text of T tokens trains T guesses, and none of them can see its answer.
- Why positions: without a mask, attention does not depend on the order of the keys at all. So each position adds a vector to x:
  a learned one, or sines (section 3.5). --positions rope turns queries and keys instead, see minitv/ops/rope/__init__.py, and
  --positions alibi subtracts from each score the distance of query and key times a slope, 2^(-8 h / H) in head h = 1 .. H.
- Why a feed-forward network: attention only averages values of tokens. The network then computes with each token on its own. It
  holds two thirds of a layer's weights.
- Why x + f(norm(x)): the sum carries x and its gradient through all layers unchanged, and each layer adds a correction. The
  norm keeps what a layer reads at one scale.

The encoder has no mask. It sees the next token, so guessing that token would teach it nothing. Instead a share of the tokens is
hidden and asked for (the task ``masked``). It reads a text from both sides, and cannot generate one from left to right.

What it costs. Every query meets every key, so time grows with T². To generate, the model keeps the keys and values of all
tokens so far, a cache that grows with every token. In return nothing fades: the last token can read the first one exactly.

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            -, n, d_model, h
    K = D / H           channels of a query, key or value      d_k = d_v, 64 in its experiments
    S                   keys: those of the past and T new ones n
    x [B T D]           input of the layer                     X
    W [outputs inputs]  a matrix of weights, used as x Wᵀ      W [inputs outputs], used as X W
    Wqkv [3D D]         all queries, then all keys, all values W_i^Q, W_i^K, W_i^V of each head i
    Wo [D D]            weights of the output                  W^O
    q_i k_j v_j [K]     query of token i, key, value of j      rows of Q, K and V
    P [T S]             weights of the values, rows sum to 1   softmax(Q Kᵀ / √d_k)

The layer:

    q, k, v = split(x Wqkvᵀ + b)                               section 3.2.2, for all heads
    y = softmax(q kᵀ / √K) v in each head                      (1), over j ≤ i alone in ``transformer``
    out = merge(y) Woᵀ + b                                     section 3.2.2: heads side by side, then one matrix
    ffn(x) = f(x W₁ᵀ + b₁) W₂ᵀ + b₂, hidden width 4 D          (2); f is gelu in GPT-2, max(0, x) in 2017
    x ← x + layer(norm(x)),   x ← x + ffn(norm(x))             GPT-2's order; norm(x + layer(x)) in 2017 (section 3.1)
    logits = norm(x) Eᵀ                                        section 3.4: with --tied, E is the embedding [tokens D]
    loss = mean of -ln softmax(logits_t)[answer of t]          the answer is token t + 1, or the hidden token in ``encoder``

The biases b exist with --bias. minitv/ops/attention/__init__.py has (1) with its masks and gradients, minitv/blocks.py (2) and
the sums, minitv/models/encoder.py the positions of section 3.5 and the output layer of section 3.4.

Three tokens. One head with K = 2 and V = 1. The scale is ln 2 here in place of 1/√K, so that exp(scale · q · k) = 2^(q · k).

    >>> import numpy as np
    >>> q, k, v = np.array([[1., 0], [1, 1], [0, 2]]), np.array([[1., 0], [0, 1], [1, 1]]), np.array([[4.], [8], [2]])
    >>> weights = np.tril(2 ** (q @ k.T))  # causal: token i sees tokens j ≤ i
    >>> print(weights)
    [[2. 0. 0.]
     [2. 2. 0.]
     [1. 4. 4.]]
    >>> P = weights / weights.sum(axis=1, keepdims=True)
    >>> print((P @ v).ravel().round(3))  # (1)
    [4.    6.    4.889]

Token 0 sees itself alone. Keys 0 and 1 fit query 1 equally well: (4 + 8) / 2 = 6. Keys 1 and 2 fit query 2 better than key 0,
with weights 4 to 1: (1 · 4 + 4 · 8 + 4 · 2) / 9 = 4.889. The operator computes the same, and without the mask an encoder's
outputs:

    >>> from minitv.ops import attention
    >>> for causal in (True, False):
    ...     y, _ = attention(*(x[None, None] for x in (q, k, v)), scale=np.log(2), causal=causal)
    ...     print(y.numpy().ravel().round(3))
    [4.    6.    4.889]
    [4.    4.    4.889]

A cache generates the same: the last query meets the keys and values of all tokens.

    >>> y, _ = attention(q[None, None, 2:], k[None, None], v[None, None], scale=np.log(2))
    >>> y.numpy().ravel().round(3)
    array([4.889])
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, concat
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..nn import Buffer, Dropout, Linear, Stateful
from ..ops import attention, merge_heads, split_heads
from ..ops.rope import Rotation, rope_angles
from ..options import ModelOptions
from ..variant import Page, Variant


@dataclass(frozen=True)
class TransformerOptions:
    """transformer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)

    __post_init__ = check

    def groups(self, model: ModelOptions, layer: int) -> int:
        """G, the number of heads of keys and values in a layer: here as many as queries have."""
        return self.heads

    def divided(self, flag: str, groups: int) -> int:
        """G, which an option gives; UserError unless it divides the heads of queries."""
        if self.heads % groups:
            divisors = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise UserError(f"{flag}: {groups} heads of keys and values do not divide {self.heads} heads, allowed: {divisors}")
        return groups


class State(NamedTuple):
    """The cache: keys and values of all past tokens, each [B G S K]."""

    keys: Tensor
    values: Tensor


BOTH_SIDES = "it sees both sides of a position, and its biases fall towards the past alone"


def rotation_of(model: ModelOptions, heads: int, size: int | None = None) -> Rotation | None:
    """How --positions turns the queries and keys of each head, if it does; UserError for an odd number of channels.

    ``size`` is their number, if the width is not divided among the heads.
    """
    of, size = f"of the width {model.width} " if size is None else "", size or model.head_dim(heads)
    if model.positions != "rope":
        return None
    if size % 2:
        raise UserError(f"--positions rope: it turns pairs of channels, and {heads} heads {of}have {size} channels each, "
                        "allowed: an even number")
    return Rotation(rope_angles(size))


class Attention(Stateful):
    """out = merge(softmax(q kᵀ / √K) v) Woᵀ for x[B T D], causal, equation (1) and section 3.2.2; state size 2 B T G K.

    With ``--positions rope`` queries and keys are turned by their position, and the cache holds turned keys. The first weights
    are GPT-2's: normal with deviation init_std, and init_std / √(2 layers) for the output, because a model adds 2 · layers
    outputs to x; biases are 0. While training, the weights P and the output are dropped with the model's probability. UserError
    if the heads do not divide the width, or if rope gets a head with an odd number of channels. With ``--positions alibi`` head
    h subtracts slope_h · (i - j) from the score of query i and key j, and cached keys need no position.
    """

    without_rope = without_alibi = None
    causal: ClassVar[bool] = True  # whether a position sees the past alone
    sees_all: ClassVar[bool] = True  # whether it sees every position that it may see

    def __init__(self, rng: Random, model: ModelOptions, options: TransformerOptions, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        size = model.head_dim(self.heads)
        self.kv_heads = options.groups(model, layer)  # G
        self.rotation = self.turning(size, model, options)
        self.slopes = None
        if model.positions == "alibi":
            self.slopes = Buffer(np.array(alibi_slopes(self.heads)), dtype=dtype, saved=False)  # [H]
        self.parts = self.heads, self.kv_heads, self.kv_heads  # heads of q, k and v
        self.qkv = Linear(rng.split(0), width, sum(self.parts) * size, std=model.init_std, bias=model.bias, dtype=dtype)
        self.out = Linear(rng.split(1), width, width, std=model.output_std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None, seen: Any = None) -> Tensor:
        """``seen`` [B 1 1 T] is False at positions that nobody sees, such as padded ones; None: there are none."""
        q, k, v = self._heads(x, 0)
        mask = {} if seen is None else {"mask": seen}
        if rng is None or not self.dropout.p:
            return self.out(merge_heads([self._attend(q, k, v, **mask)]))  # section 3.2.2 [B T D]
        y = self._attend(q, k, v, dropout=self.dropout.p, seed=rng.split(0).seed, **mask)
        return self.dropout(self.out(merge_heads([y])), rng.split(1))

    def turning(self, width: int, model: ModelOptions, options) -> Rotation | None:
        """How queries and keys of ``width`` channels are turned by their positions; None: they are not."""
        return rotation_of(model, self.heads)

    def init_state(self, batch: int) -> State:
        empty = self.constant(0.0, batch, self.kv_heads, 0, self.out.weight.shape[0] // self.heads)
        return State(empty, empty)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, state.keys.shape[2])
        state = State(concat([state.keys, k], axis=2), concat([state.values, v], axis=2))  # [B G S K]
        return self.out(merge_heads([self._attend(q, *state)])), state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **masking) -> Tensor:
        slopes = None if self.slopes is None else self.slopes.data
        return attention(q, k, v, slopes=slopes, causal=self.causal, **masking)[0]  # (1) [B H T K]

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """q[B H T K], k[B G T K] and v[B G T K] of positions from ``start`` on."""
        q, k, v = split_heads(self.qkv(x), heads=self.parts)
        if self.rotation is None:
            return q, k, v
        return self.rotation.queries(q, start), self.rotation.keys(k, start), v


class Bidirectional(Attention):
    """The same without a mask: every output depends on all tokens, so there is no state and nothing to continue."""

    causal = False
    without_alibi = BOTH_SIDES


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes of the heads, 2^(-8/H), 2^(-16/H), .. 2^-8 (Press et al. 2022, arXiv 2108.12409, section 3).

    Where the number of heads H is no power of 2, they are those of the power n below, and then every other one of 2 n heads, as
    in its authors' code.
    """
    power = 2 ** int(math.log2(heads))

    def slopes(number: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / number) for h in range(number)]

    return slopes(power) + slopes(2 * power)[::2][: heads - power]


TRANSFORMER = Variant(
    name="transformer",
    summary="Causal multi-head attention, as in GPT-2",
    paper="Vaswani et al. 2017, arXiv 1706.03762; Radford et al. 2019",
    mixer=Attention,
    options=TransformerOptions,
    fused="transformer",
    page=Page(
        formula="y_i = Σ_{j ≤ i} softmax_j(q_i · k_j / √K) v_j in every head; q, k, v = split(x Wᵀ), out = merge(y) Wᵀ",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights, and for the "
             "feed-forward network, which has 8 D²; O(T² D) for attention. Memory: O(T D), because the kernels never store the "
             "T × T weights; O(T D + T² H) in the form that does. Generating token t: O(D²) for the matrices and O(t D) for "
             "attention",
        state="2 t D numbers in each layer: keys and values of all t tokens so far",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention, and a whole GPT-2 of the package transformers with all gradients",
        discrepancies=(
            "the paper of 2017 translates with an encoder and a decoder; GPT-2, and this variant, is a decoder alone, without "
            "the attention from decoder to encoder (section 3.2.3)",
            "in 2017 a norm follows each sum, the feed-forward network has max(0, x) and the positions are sines; GPT-2 has "
            "the norm before each layer and once more at the end, gelu and learned positions; here GPT-2's are the default, "
            "and --positions sinusoidal gives the sines",
            "GPT-2 has biases in all linear layers and norms; here --bias switches them on",
            "GPT-2's first weights have the deviation 0.02 for width 768; here it grows with √(768/width) for narrower models, "
            "--init-std 0.02 gives GPT-2's",
            "GPT-2 uses the tanh approximation of gelu, nanoGPT the exact one: --activation, the default is exact",
        ),
        review="it gives the time O(T log T d), which is wrong: it is O(T² d); its space O(T² + T d) is right for the form "
               "that stores all weights",
    ),
)

ENCODER = Variant(
    name="encoder",
    summary="Multi-head attention in both directions, as in BERT",
    paper="Devlin et al. 2018, arXiv 1810.04805; Vaswani et al. 2017, arXiv 1706.03762",
    mixer=Bidirectional,
    options=TransformerOptions,
    model=Encoder,
    page=Page(
        formula="y_i = Σ_j softmax_j(q_i · k_j / √K) v_j in every head, over all positions j; q, k, v = split(x Wᵀ), "
                "out = merge(y) Wᵀ",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights, and for the "
             "feed-forward network, which has 8 D²; O(T² D) for attention. Memory: O(T D), because the kernels never store the "
             "T × T weights; O(T D + T² H) in the form that does. It does not generate",
        state="none: it sees a whole sequence at once",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention without a mask",
        discrepancies=(
            "BERT has a norm after each sum and a second objective with pairs of sentences; here the blocks are those of "
            "transformer, and hidden tokens are the only objective",
        ),
        review="it does not speak of encoders",
    ),
)
