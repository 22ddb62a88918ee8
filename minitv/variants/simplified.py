"""Simplified blocks: a Transformer without skip connections, values, output matrices (He and Hofmann 2023, arXiv 2311.01906).

The variant ``simplified`` is a language model. ``simplified-bert`` sees both directions, as BERT. Numbers in brackets name the
paper's equations. minitv/variants/transformer.py tells what queries, keys, values and heads are for.

The problem. A Transformer block has two networks, attention and a feed-forward network. Each of them reads a norm of its
input x and adds its output to x. That sum is called a skip connection. It was not known which of these parts are needed, and
they cannot just be left out. Attention gives each token a mean of tokens. If x is not added to it, all tokens are the same
vector after many layers of means. This is called rank collapse, and such a model hardly learns (section 4.1).

The idea. The skip connection moves into the matrix of attention. The weights A become α I + β A - γ C (5). At the start this
is the identity I: each token reads itself alone, and no rank collapses. Then other parts can go. The paper removes one after
the other, and each time checks that the model learns as fast as before: the skip connection of attention (section 4.1), the
matrices of values and outputs (4.2), the order of the two networks, which then read the same input (4.3), and the norms (4.4).
What remains is a block with half the matrices of attention, and without any addition of x:

    z = norm(x),   y = attention(z) + 0.1 ffn(z)

- Why α I + β A - γ C: C is what A is at the start, because the queries start at 0, so that all scores are equal. α, β and γ
  start at 1, so the sum is I + (A - C): the identity, and what attention has learned since. Without C the start would be
  I + A, which mixes a mean of all tokens into each of them. Shaped attention is the name of this sum (Noci et al. 2023).
- Why the queries start at 0 and the keys do not: a score is the product of both. With queries of 0 all scores are 0. In the
  first step the gradient of the keys is 0, but that of the queries is not. If both were 0, both gradients would be 0 for ever.
- Why α, β and γ are trained, in each head by itself: a head that looks around needs less of the identity than one that does
  not. At the start the gradient of γ is minus that of β, because A and C are equal.
- Why no values and no outputs: without the skip connection, a model learns slowly if these matrices start at random numbers.
  The paper writes each as α_V W_init + β_V W' with W' = 0 at the start (6). The model learns faster if β_V is small, which
  keeps the matrix near W_init, and best if W_init is the identity. When the gains α_V and β_V are trained too, β_V / α_V goes
  to 0 in almost all layers (section 4.2). So the paper keeps the identity, and no matrix is left. Head h takes the channels h K
  to (h + 1) K - 1 of z as its values, and writes its result to the same channels. The feed-forward network mixes the channels.
- Why the first layer has a matrix of values all the same: it is the only one whose β_V / α_V stays above 0.05. It reads the
  embeddings. It helps very little (4.2). --value-matrices none leaves it out, and all has one in every layer.
- Why 0.1 before the feed-forward network: no skip connection passes x along, so every layer changes it. The sum of the changes
  of L layers stays of one size if each has a gain of the order 1/√L. The paper takes 0.1 for 18 layers, so here the gain starts
  at 0.1 √(18 / L), and is trained.
- Why a serial block has a skip connection left: --block serial is the paper's SAS. Its feed-forward network reads what
  attention gives, and adds to that. Without this sum, a serial block learned much slower (Figure 22). The parallel block,
  SAS-P, has no such sum, and is the faster one. Both are the same function at the start.
- Why norms can go: in a usual block x grows from layer to layer, and a norm keeps what a network reads at one size. So the
  output of a network is small beside x. Here the gains make it small, without norms (section 4.4). With --normed-layers first
  a model learns a little less in each step, but a step is faster. The first layer has a norm even then, because it reads
  embeddings. When the paper fine-tuned its BERT without norms on other tasks, some texts gave NaN (section 5).
- Why dropout acts on A alone: the identity is the only way that leads past attention. For the same reason three shared options
  do not fit here. --token-shift would delay half of the channels in every layer (--skip permits it). --stack reversible needs
  an addition of x. With --positions alibi the scores would not be equal at the start.

What it costs. Attention has 2 D² weights instead of 4 D². A block with a feed-forward network of width 4 D has 10 D² instead of
12 D², which is 16.7 % less, and so is the work for its matrices. The work for A stays as it is. The presets give the saved
weights to the feed-forward network, so that models of equal size are compared; --ffn-multiple 4 is the paper's block. What is
lost: a head cannot choose what it hands over, and no vector passes through the model unchanged. The models of the paper have
100 to 300 million weights, and larger ones are not tried (section 6).

What the paper reports. 18 layers of width 768 learn as much in each step with SAS and SAS-P as with the usual block. The README
of the code has a loss of 1.155 for the usual block after 40,000 steps, and 1.245 for SAS-P without norms. Of BERT models the
GLUE score is 78.9 with the usual block, 78.4 with SAS and 78.3 with SAS-P (Table 1). These two have 101 million weights instead
of 120 million, and train 1.09 and 1.16 times as fast.

How it is trained, and what to choose. ``simplified`` learns to guess the next token at all positions at once, and
``simplified-bert`` the hidden tokens of the task ``masked``; the paper hides 25 of 100: --mask-rate 0.25. For the language
model, the best learning rate of SAS and SAS-P was 1e-3, which is that of the usual block too. AdamW decays matrices alone, and
no gain, here as in the paper (appendix D). If the feed-forward network is half as wide, the paper starts its gain at 0.2
instead of 0.1. --value-matrices all --output-matrices --matrix-gain 0.2 is the model of Figure 4, with --block serial. It ended
with a higher loss than the model without these matrices. --skip is there for comparisons: in a usual block, with its skip
connections, the matrices of values and outputs do help (Figure 20).

A run writes the gains down at every evaluation, and draws them in readings.png beside its curve.

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            -, T, d, H
    K = D / H           channels of a query, key or value      d_k
    x, z, y [B T D]     input of a block, its norm, its output X_in, Norm(X_in), X_out
    W [outputs inputs]  a matrix of weights, used as x Wᵀ      W [inputs outputs], used as X W
    Wqk [2D D]          all queries, then all keys             W^Q, W^K
    A [T T]             weights of attention, a row a query    A(X)
    C [T T]             the same where all scores are 0        C
    α, β, γ [H]         gains of the identity, of A and C      α, β, γ
    α_V, β_V            gains of a matrix of values            α_V, β_V
    gain of attention   of all heads, 1 at the start           β_SA
    gain of the ffn     of the feed-forward network, f or ffn  β_FF
    skip                of what the ffn adds to in SAS         α_FF, 1 at the start

The block:

    q, k = split(z Wqkᵀ + b),   v = z                          in the first layer v = α_V z + β_V z W'ᵀ, (6)
    A = softmax(q kᵀ / √K) in each head                        (2), over j ≤ i alone in ``simplified``
    h = gain · merge((α I + β A - γ C) v)                      (12), (13): heads side by side, and no matrix after them
    f(z) = gain · max(0, z W₁ᵀ) W₂ᵀ                            hidden width 4 D; the model's --bias adds biases
    y = h + f(z)                                               SAS-P: (7) with α_comb = 0, that is without + x
    y = skip · h + f(norm(h))                                  SAS: (1) with α_SA = 0, that is h without + x

minitv/ops/shaping/__init__.py has α v + β A v - γ C v and its gradients: C v is a running mean, so no [T T] matrix is stored.
The operator attention gives A v, as in the Transformer. The state for generating is the cache of its keys and values, and the
mean of all values so far. The cache is not smaller than a Transformer's, because z itself is the value of a token.

Three tokens. One head with values of one channel, and gains of 1. At the start all scores are equal, so A v is C v, and the
output is v. Printed are a = A v, the output and the mean of all values.

    >>> import numpy as np
    >>> from minitv.ops import attention, shaping
    >>> v, one = np.array([[[4.], [8], [2]]]), np.ones(1)  # [B T D], [H]
    >>> def outputs(q, k):
    ...     a, _ = attention(q[None, None], k[None, None], v[None], scale=np.log(2))
    ...     y, mean = shaping(a.reshape(1, 3, 1), v, one, one, one)
    ...     print(a.numpy().ravel().round(3), y.numpy().ravel().round(3), mean.numpy().ravel().round(3))
    >>> k = np.array([[1., 0], [0, 1], [1, 1]])
    >>> outputs(np.zeros((3, 2)), k)
    [4.    6.    4.667] [4. 8. 2.] [4.667]

4, 6 and 4.667 are the means of 4, of 4 and 8, and of all. With other queries the weights of token 2 become 1/9, 4/9 and 4/9,
and a_2 = 4.889. Only the difference to the mean is added to v_2: 2 + 4.889 - 4.667 = 2.222.

    >>> outputs(np.array([[1., 0], [1, 1], [0, 2]]), k)
    [4.    6.    4.889] [4.    8.    2.222] [4.667]

The same by the matrix:

    >>> A = np.array([[1, 0, 0], [1/2, 1/2, 0], [1/9, 4/9, 4/9]])
    >>> C = np.array([[1, 0, 0], [1/2, 1/2, 0], [1/3, 1/3, 1/3]])
    >>> print(((np.eye(3) + A - C) @ v[0]).ravel().round(3))
    [4.    8.    2.222]

In generating, the third token follows two whose mean is 6. The cache of keys and values gives a_2, and the mean the rest:

    >>> y, mean = shaping(np.array([[[44 / 9]]]), v[:, 2:], one, one, one, np.array([[6.]]), past=2)
    >>> print(y.numpy().ravel().round(3), mean.numpy().ravel().round(3))
    [2.222] [4.667]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, concat, linear, rms_norm
from autograd.random import Random

from .. import blocks
from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..nn import ACTIVATIONS, NORMS, Dropout, LayerNorm, Linear, Module, Parameter, Stateful, full, made
from ..ops import attention, merge_heads, shaping, split_heads
from ..options import ModelOptions
from ..shift import Shifted
from ..variant import Page, Variant
from .transformer import rotation_of


@dataclass(frozen=True)
class SimplifiedOptions:
    """simplified"""

    heads: int = option(4, "attention heads; they divide the width", low=1)
    block: str = option(
        "parallel", "SAS-P, where both networks read x, or SAS, where the feed-forward network reads what attention gives and "
        "adds to it", choices=("parallel", "serial"),
    )
    normed_layers: str = option(
        "every", "layers that normalise what they read: every layer, or the first one alone", choices=("every", "first")
    )
    value_matrices: str = option(
        "first", "layers with a matrix of values, which starts as the identity: the first, all of them, or none",
        choices=("first", "all", "none"),
    )
    output_matrices: bool = option(False, "a matrix after the heads in every layer, which starts as the identity")
    matrix_gain: float = option(1.0, "first gain of what these matrices learn; the paper's Figure 4 has 0.2", above=0)
    skip: bool = option(False, "attention adds to x, as in usual blocks")
    qk_norm: bool = option(False, "an RMS norm of each query and key, as in the authors' later work (arXiv 2405.19279)")
    ffn_gain: float | None = option(
        None, "first gain of the feed-forward network; none = 0.1 √(18 / layers), as 0.1 in the paper's 18 layers", above=0
    )

    def __post_init__(self) -> None:
        check(self)
        if self.matrix_gain != 1 and self.value_matrices == "none" and not self.output_matrices:
            raise UserError(f"--matrix-gain: {self.matrix_gain:g} is given and --value-matrices is none, so that there is no "
                            "matrix that it concerns; allowed: 1")


class State(NamedTuple):
    """The cache: keys and values of all past tokens, each [B H S K], and the mean of the values [B D]."""

    keys: Tensor
    values: Tensor
    mean: Tensor


class Blend(Module):
    """y = α x + β x Wᵀ for x[B T D], equation (6) with the identity as W_init; W starts at 0, α at 1 and β at ``gain``."""

    def __init__(self, width: int, gain: float, dtype):
        self.weight = full((width, width), 0, dtype)
        self.alpha, self.beta = full((1,), 1, dtype), full((1,), gain, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta * linear(x, self.weight)  # (6)

    def readings(self) -> dict[str, float]:
        return {name: vars(self)[name].item() for name in ("alpha", "beta")}


class ShapedAttention(Stateful):
    """gain · merge((α I + β A - γ C) v) for x[B T D], causal, (12) and (13); state size B (2 t D + D).

    The values are x itself, where the options have no matrix of values. The first queries are 0, keys are from N(0, init_std²),
    all gains are 1 and biases 0, so that the first output is the values, to rounding. Dropout drops weights of A alone, because
    the identity is the only way that leads past this layer. UserError if the heads do not divide the width, or if rope gets a
    head with an odd number of channels.
    """

    without_rope = None
    without_alibi = "a block starts as the identity only where all scores are equal"
    causal: ClassVar[bool] = True  # whether a position sees the past alone

    def __init__(self, rng: Random, model: ModelOptions, options: SimplifiedOptions, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        size = model.head_dim(self.heads)
        self.options, self.layer, self.dropout = options, layer, model.dropout
        self.rotation = rotation_of(model, self.heads)
        self.qk = made(Parameter, (2 * width, width), dtype, lambda: np.concatenate(
            [np.zeros((width, width)), rng.split(0).normal((width, width), np.float64) * model.init_std]))
        self.qk_bias = full((2 * width,), 0, dtype) if model.bias else None
        self.q_norm, self.k_norm = (full((size,), 1, dtype) if options.qk_norm else None for _ in range(2))
        self.alpha, self.beta, self.gamma = (full((self.heads,), 1, dtype) for _ in range(3))
        self.gain = full((1,), 1, dtype)  # β_SA
        blended = {"first": layer == 0, "all": True, "none": False}[options.value_matrices]
        self.values = Blend(width, options.matrix_gain, dtype) if blended else None
        self.out = Blend(width, options.matrix_gain, dtype) if options.output_matrices else None

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        q, k, v = self._heads(x, 0)
        dropping = dict(dropout=self.dropout, seed=rng.split(0).seed) if rng is not None and self.dropout else {}
        (heads,) = split_heads(v, heads=(self.heads,))
        return self._shape(attention(q, k, heads, causal=self.causal, **dropping)[0], v)[0]

    def init_state(self, batch: int) -> State:
        width = self.qk.shape[1]
        empty = self.constant(0.0, batch, self.heads, 0, width // self.heads)
        return State(empty, empty, self.constant(0.0, batch, width))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        past = state.keys.shape[2]
        q, k, v = self._heads(x, past)
        (heads,) = split_heads(v, heads=(self.heads,))
        keys, values = concat([state.keys, k], axis=2), concat([state.values, heads], axis=2)  # [B H S K]
        y, mean = self._shape(attention(q, keys, values)[0], v, state.mean, past)
        return y, State(keys, values, mean)

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """q and k [B H T K] of positions from ``start`` on, and v [B T D]."""
        q, k = split_heads(linear(x, self.qk, self.qk_bias), heads=(self.heads, self.heads))  # (2)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)
        if self.rotation is not None:
            q, k = self.rotation.queries(q, start), self.rotation.keys(k, start)
        return q, k, x if self.values is None else self.values(x)  # (6)

    def _shape(self, a: Tensor, v: Tensor, mean: Tensor | None = None, past: int = 0) -> tuple[Tensor, Tensor]:
        """The output [B T D] of attention's a[B H T K] and the values, and the mean of all values."""
        gains = (gain * self.gain for gain in (self.alpha, self.beta, self.gamma))  # [H]
        y, mean = shaping(merge_heads([a]), v, *gains, mean, past=past, causal=self.causal)  # (13)
        return y if self.out is None else self.out(y), mean

    def readings(self) -> dict[str, float]:
        """The gains; of those of the heads, the mean."""
        return {name: float(vars(self)[name].numpy().mean()) for name in ("alpha", "beta", "gamma", "gain")}


class Bidirectional(ShapedAttention):
    """The same without a mask: every output depends on all tokens, so there is no state and nothing to continue."""

    causal = False


class FeedForward(blocks.FeedForward):
    """gain · (f(x W₁ᵀ + b) W₂ᵀ + b) for x[B T D]; the first W₁ and W₂ are from N(0, init_std²)."""

    def __init__(self, rng: Random, model: ModelOptions, options: SimplifiedOptions, layer: int = 0, dtype=np.float32):
        width, hidden = model.width, max(1, round(model.ffn_multiple * model.width))
        kwargs = dict(std=model.init_std, bias=model.bias, dtype=dtype)
        self.up, self.down = Linear(rng.split(0), width, hidden, **kwargs), Linear(rng.split(1), hidden, width, **kwargs)
        self.gain = full((1,), options.ffn_gain or 0.1 * math.sqrt(18 / model.layers), dtype)  # β_FF
        self.activation, self.dropout = ACTIVATIONS[model.activation], Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.gain * super().__call__(x, rng)

    def readings(self) -> dict[str, float]:
        return {"gain": self.gain.item()}


class Simplified(blocks.Block):
    """SAS-P: y = attention(z) + ffn(z) with z = norm(x), section 4.3. SAS: h = attention(norm(x)); y = skip · h + ffn(norm(h)).

    Attention and the feed-forward network have their gains inside. The options of the mixer say which block it is. Without
    norms, the first layer has a LayerNorm all the same, which makes the size of the embeddings harmless.
    """

    lossy = "need not add to x"

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: Stateful, *, dtype=np.float32):
        inner = mixer.mixer if isinstance(mixer, Shifted) else mixer
        options = inner.options
        if inner is not mixer and not options.skip:
            raise UserError("--token-shift: half of the channels would come one position later in every layer, because these "
                            "blocks do not add to x; allowed: --skip beside it")
        kwargs = dict(bias=model.bias, eps=model.norm_eps, dtype=dtype)
        first, every = inner.layer == 0, options.normed_layers == "every"
        norm = NORMS[model.norm] if every else LayerNorm
        self.norm1 = norm(model.width, **kwargs) if first or every else None
        self.mixer = mixer
        self.serial, self.adds = options.block == "serial", options.skip
        self.norm2 = norm(model.width, **kwargs) if self.serial and every else None
        self.ffn = ffn
        self.skip = full((1,), 1, dtype) if self.serial else None  # α_FF

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        z = self._norm(self.norm1, x)
        h = self.mixer(z, rng and rng.split(0))
        return self._join(x, z, h, lambda z: self.ffn(z, rng and rng.split(1)))

    def init_state(self, batch: int) -> tuple[Any, ...]:
        return self.mixer.init_state(batch), self.ffn.init_state(batch)

    def prefill(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        z = self._norm(self.norm1, x)
        h, mixed = self.mixer.prefill(z, state[0])
        return self._join(x, z, h, self.ffn), (mixed, None)

    def _join(self, x: Tensor, z: Tensor, h: Tensor, ffn) -> Tensor:
        if self.adds:
            h = x + h
        return self.skip * h + ffn(self._norm(self.norm2, h)) if self.serial else h + ffn(z)  # (1), (7)

    @staticmethod
    def _norm(norm: Module | None, x: Tensor) -> Tensor:
        return x if norm is None else norm(x)

    def readings(self) -> dict[str, float]:
        return {} if self.skip is None else {"skip": self.skip.item()}


# The feed-forward network takes what attention leaves of 4 D², 2 D² but for the value matrix of the first of L layers.
WIDER = {preset: dict(ffn_multiple=5 - 1 / (2 * layers)) for preset, layers in (("tiny", 2), ("nanogpt-cpu", 4), ("small", 6))}
PAPER = dict(norm="rms_norm", activation="relu")

SHAPE = "y = gain (α v + β A v - γ C v) in every head, with A = softmax(q kᵀ / √K), C = A at q = 0 and v = norm(x); q, k = "
TRAINING = ("training, for each layer and sequence: O(T D²) for the matrices, of which attention has 2 D² weights and the "
            "feed-forward network 8 D², in the presets 10 D²; O(T² D) for attention, O(T D) for the running mean. Memory: "
            "O(T D), because no kernel stores a T × T matrix. ")
GOLDEN = ("the blocks of the paper's code, written again in PyTorch with its matrices I and C: SAS, SAS-P, without norms, with "
          "all matrices, in both directions; outputs and all gradients")
DISCREPANCIES = (
    "the code stores I and C as matrices of the longest sequence and adds them to A; here C v is a running mean, which is the "
    "same function, and costs T D numbers instead of T²",
    "in the code's cached generation all rows of I are added to the one row of the new token; here the state carries a mean, "
    "and reading in parts equals reading at once",
    "the code's dropout acts on the whole matrix, and so on the identity, which is the only way past attention; here it acts "
    "on A alone",
    "the code has biases in queries and keys and in no other matrix; here --bias switches all of them on",
    "the code divides by √mean(x²) + eps, here the divisor is √(mean(x²) + eps); the model's last norm is a LayerNorm in the "
    "code, and the one that --norm names here",
    "the paper trains with a learning rate that falls in a line, and finds this better than a cosine; here it is the cosine of "
    "all variants",
    "weights start from N(0, 0.02²) in the code at width 768; here from N(0, init_std²), which is 0.02 at that width",
    "the paper has sines for positions, its code GPT-2's learned vectors; here --positions",
)
REVIEW = ("it says 15 % faster with 15 % less weights, which is right for the first version of the paper; the newer one says "
          "16 % faster, for SAS-P, with SAS 9 %, and a block alone has 16.7 % less weights")

SIMPLIFIED = Variant(
    name="simplified",
    summary="Blocks without skip connections, values and output matrices, whose attention starts as the identity",
    paper="He and Hofmann 2023, arXiv 2311.01906",
    mixer=ShapedAttention,
    options=SimplifiedOptions,
    channel=FeedForward,
    without=("ffn_gate",),
    block=Simplified,
    overrides=PAPER,
    presets=WIDER,
    fused="simplified",
    page=Page(
        formula=SHAPE + "split(v Wᵀ); SAS-P: x ← y + gain ffn(norm(x)); SAS: x ← skip y + gain ffn(norm(y))",
        cost=TRAINING + "Generating token t: O(D²) for the matrices, O(t D) for attention and O(D) for the mean",
        state="(2 t + 1) D numbers in each layer: keys and values of all t tokens so far, and the mean of the values. With D = "
              "128 these are 16,512 numbers after 64 tokens, 64.5 KiB in float32; the Transformer keeps 64 KiB",
        operators=("shaping", "attention"),
        golden=GOLDEN,
        discrepancies=DISCREPANCIES,
        review=REVIEW,
    ),
)

SIMPLIFIED_BERT = Variant(
    name="simplified-bert",
    summary="The simplified blocks in both directions, as in the paper's BERT",
    paper="He and Hofmann 2023, arXiv 2311.01906",
    mixer=Bidirectional,
    options=SimplifiedOptions,
    channel=FeedForward,
    without=("ffn_gate",),
    block=Simplified,
    model=Encoder,
    overrides=dict(PAPER, positions="rope"),
    presets=WIDER,
    page=Page(
        formula=SHAPE + "split(v Wᵀ), over all positions, where C is 1/T everywhere",
        cost=TRAINING + "It does not generate",
        state="none: it sees a whole sequence at once",
        operators=("shaping", "attention"),
        golden=GOLDEN,
        discrepancies=(
            *DISCREPANCIES,
            "the paper's BERT has vectors of the position that are added; here queries and keys are turned by it. With learned "
            "vectors a small model knows after 2000 steps no more than how frequent each token is: --positions learned",
            "the paper's BERT starts with a gain of 0.05 before the feed-forward network: --ffn-gain 0.05. It has LayerNorms "
            "and a feed-forward network with a gate and gelu; here the norm is --norm, and the network has no gate",
            "with padded sequences C must leave out what attention leaves out, or the block does not start as the identity; "
            "the tasks here have sequences of one length",
        ),
        review=REVIEW,
    ),
)
