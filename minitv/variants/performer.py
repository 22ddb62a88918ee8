"""Performer: attention in linear time, by random features of queries and keys (Choromanski et al. 2020, arXiv 2009.14794).

The variant ``performer`` is a causal language model. The variant ``performer-encoder`` sees both directions.

The problem. Attention compares every query with every key, so its time grows with T², and a model that writes keeps all keys
and values. The softmax forces this: the weight e^(q · k) is not a product of something of the query and something of the key.
Linear attention replaces it by such a product, φ(q) · φ(k), and is then another function than attention: a trained Transformer
cannot become one, and quality is often worse. Section numbers are the paper's.

The idea. A product of features can be equal to e^(q · k) on average, if the features are random. Take a vector w of independent
Gaussian numbers. Then for all q and k

    e^(q · k) = E[e^(w · q - ‖q‖²/2) e^(w · k - ‖k‖²/2)]                          lemma 1

because w · (q + k) is Gaussian with variance ‖q + k‖², and E[e^(w · z)] = e^(‖z‖²/2). So F draws of w give F features of a
query and of a key, and the mean of their products estimates the softmax's weight. With more draws the estimate gets better:
its mean squared error falls as 1/F. The method is called FAVOR+: Fast Attention Via positive Orthogonal Random features.

- Why the time is linear: y_i = Σ_j φ(q_i) · φ(k_j) v_j is φ(q_i) times the matrix Σ_j φ(k_j) v_jᵀ, of F × V numbers, and no
  query needs any pair (i, j). Causal attention needs the same matrix of the keys so far: a recurrence, or a prefix sum.
- Why positive features: e^(q · k) is also the mean of products of sines and cosines. These may be negative. Where the true
  weight is near 0, their estimate has a large error relative to it, and a sum of such weights, by which every output is
  divided, may be near 0 or negative. e^(w · x - ‖x‖²/2) is positive, and its error vanishes with the weight itself:

      mean squared error = e^(2 q·k) (e^(‖q+k‖²) - 1) / F                         lemma 2, positive features

- Why both w and -w (hyperbolic features): the two errors partly cancel. At the same number of products the error is smaller.
- Why orthogonal directions: independent draws may point the same way by chance and then say the same thing twice. Directions
  of one block of K draws are made orthogonal, each still uniform, with independent lengths. The mean stays, the error falls.
- Why K^(-1/4): attention has the weight e^(q · k / √K). Dividing q and k by the fourth root of K each gives this product.
- Why the draws are repeated (--redraw): one draw may be bad for the queries and keys at hand, and the model would adapt to its
  errors. The paper draws anew during training, without a number; performer-pytorch draws every 1000 steps, as here. The
  directions are saved with the model, and stay as they are when it is evaluated or writes.
- Why the ReLU variant (--features relu): φ(x) = max(0, W x) + offset estimates no softmax. It is a kernel of its own, cheap and
  easy to train, and what the paper's figures call Performer where they do not say softmax.

What is lost. The weights are noisy: where a sharp softmax picks one key of many, ‖q‖ and ‖k‖ are large, and so is the error. A
trained Transformer with its weights copied starts badly and must be trained a little more (section 4.2). And the state has a
fixed size, F (K + 1) numbers in a head: a long text must share it.

A trap in published code. They divide e^(w · k - ‖k‖²/2) by the largest one of all keys, so that nothing overflows, and then add
a small ε. The division cancels in the output, but with ε it does not: a large last key makes all earlier keys fade under ε.
In performer-pytorch, multiplying the last key by 3 changes earlier outputs by as much as the outputs are large: the model sees
the future. Here every feature keeps a logarithm of its sum, there is no ε, and no later key changes anything before it.

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            -, L, -, -
    K = D / H           channels of a query, key or value      d
    F                   random features, --random-features     m, of which r = m for the positive map
    x [B T D]           input of the layer                     -
    Wqkv [3D D]         all queries, then all keys, all values -
    w_f [K], W [F K]    a random direction, and all of them    ω_i, rows of the projection matrix
    φ(x) [F]            features                               φ(x), with the factor 1/√m, which cancels in y
    S [F K], z [F]      Σ_j φ(k_j) v_jᵀ, and Σ_j φ(k_j)        the columns of G^PS, for C = [V 1]
    mean, logsum        S_f / z_f and ln z_f, what is kept     -

The layer:

    q, k, v = split(x Wqkvᵀ)                                   turned by their positions with --positions rope
    φ_f(x) = e^(w_f · x̃ - ‖x̃‖²/2), x̃ = x / K^(1/4)             lemma 1 and section 2.2
    y_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j)        section 2.2; j ≤ i in ``performer``, all j in the encoder
    out = merge(y) Woᵀ
    x ← x + layer(norm(x)),   x ← x + ffn(norm(x))             the blocks of ``transformer``

minitv/ops/favor/__init__.py has the operator: its three forms, its chunks and the gradients. projection.py beside it draws W.

Three tokens. One head with K = 2 and V = 1, where e^(q · k) is 2^(...) as on the page of ``transformer``: keys and queries are
multiplied by √(ln 2). First what attention gives, then random features, 2, 1000 and 100,000 of them.

    >>> import numpy as np
    >>> from autograd.random import Random
    >>> from minitv.ops import attention, favor
    >>> from minitv.ops.favor.projection import random_projection
    >>> q, k, v = np.array([[1., 0], [1, 1], [0, 2]]), np.array([[1., 0], [0, 1], [1, 1]]), np.array([[4.], [8], [2]])
    >>> q, k, v = (x[None, None] for x in (q * np.log(2) ** 0.5, k * np.log(2) ** 0.5, v))
    >>> attention(q, k, v, scale=1.0)[0].numpy().ravel().round(3)
    array([4.   , 6.   , 4.889])
    >>> for features in (2, 1000, 100_000):
    ...     W = random_projection(Random(1), features, 2)
    ...     y, mean, logsum = favor(q, k, v, W, scale=1.0)
    ...     print(features, y.numpy().ravel().round(2))
    2 [4.   5.07 4.31]
    1000 [4.   6.12 5.05]
    100000 [4.   6.03 4.91]

The first token sees itself alone, so its weight is 1 whatever the features are. The state after three tokens has a mean and a
logarithm for each feature. A fourth token needs nothing else, and reading in two parts gives the same as in one:

    >>> _, *state = favor(q[:, :, :2], k[:, :, :2], v[:, :, :2], W, scale=1.0)
    >>> last, *_ = favor(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], W, None, *state, scale=1.0)
    >>> bool(abs(last.numpy() - y.numpy()[:, :, 2:]).max() < 1e-12), mean.shape, logsum.shape
    (True, (1, 1, 100000, 1), (1, 1, 100000))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from autograd import Tensor
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..nn import Buffer, Dropout, Linear, Stateful, made
from ..ops import favor, merge_heads, split_heads
from ..ops.favor.projection import random_projection
from ..options import ModelOptions
from ..variant import Page, Variant
from .transformer import rotation_of


@dataclass(frozen=True)
class PerformerOptions:
    """performer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)
    features: str = option(
        "positive", "feature map: e^(w·x - ‖x‖²/2); the same of w and -w; the same with ‖w‖ = √K in every row; or "
        "max(0, w·x) + offset, which estimates no softmax",
        choices=("positive", "hyperbolic", "regularised", "relu"),
    )
    random_features: int = option(128, "features of a query or key; hyperbolic: an even number, two for each direction", low=1)
    orthogonal: bool = option(True, "directions are orthogonal in blocks of as many as a head has channels")
    redraw: int = option(1000, "training steps between two draws of the directions; 0 = one draw for ever", low=0)
    relu_offset: float = option(1e-3, "number that is added to relu features", above=0)
    relu_directions: str = option(
        "random", "what relu features are made of: random directions of x / K^(1/4), as performer-pytorch, the same of x, as "
        "the paper's TensorFlow code, or the channels of x itself, as its JAX code, so that there are as many as channels",
        choices=("random", "unscaled", "none"),
    )

    def __post_init__(self) -> None:
        check(self)
        for name, default in (("relu_offset", 1e-3), ("relu_directions", "random")):
            if self.features != "relu" and getattr(self, name) != default:
                raise UserError(f"--{name.replace('_', '-')}: this concerns --features relu, and --features is {self.features}")


class State(NamedTuple):
    """What the heads keep of the past, for each feature: the mean of the values [B H F K] and ln of the weight [B H F]; and the
    number of past positions, for rope.
    """

    mean: Tensor
    logsum: Tensor
    position: int


class Performer(Stateful):
    """out = merge(favor(q, k, v)) Woᵀ for x[B T D], causal; the size of the state is B H F (K + 1), whatever the length.

    All heads of a layer have one W, a buffer that is drawn anew every ``redraw`` training steps. The first weights are those of
    ``transformer``. There are no weights of pairs that could be dropped: dropout is that of the output. UserError if the heads
    do not divide the width, if rope gets a head with an odd number of channels, or hyperbolic features an odd number.
    """

    without_rope = None
    causal: ClassVar[bool] = True  # whether a position sees the past alone

    def __init__(self, rng: Random, model: ModelOptions, options: PerformerOptions, layer: int = 0, dtype=np.float32):
        width, self.heads, self.options = model.width, options.heads, options
        size = model.head_dim(self.heads)
        self.rotation = rotation_of(model, self.heads)
        if options.features == "hyperbolic" and options.random_features % 2:
            raise UserError(f"--random-features: hyperbolic features come in pairs, got {options.random_features}, "
                            "allowed: an even number")
        self.qkv = Linear(rng.split(0), width, 3 * width, std=model.init_std, bias=model.bias, dtype=dtype)
        self.out = Linear(rng.split(1), width, width, std=model.output_std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)
        relu, plain = options.features == "relu", options.relu_directions != "random"
        self.kernel = dict(features="relu" if relu else "positive", offset=options.relu_offset, causal=self.causal,
                           scale=1.0 if relu and plain else None)
        count = size if relu and options.relu_directions == "none" else options.random_features
        self.projection = made(Buffer, (count, size), dtype, lambda: self._draw(rng.split(2), size))  # W [F K]

    def _draw(self, rng: Random, size: int) -> np.ndarray:
        """W for heads of this many channels."""
        kind, count = self.options.features, self.options.random_features
        if kind == "relu" and self.options.relu_directions == "none":
            return np.eye(size)
        rows = random_projection(rng, count // 2 if kind == "hyperbolic" else count, size, orthogonal=self.options.orthogonal,
                                 fixed=kind == "regularised")
        return np.concatenate([rows, -rows]) if kind == "hyperbolic" else rows

    def redraw(self, step: int, rng: Random) -> None:
        """Draw W anew before the training steps ``redraw``, 2 · ``redraw``, ..."""
        if step and self.options.redraw and step % self.options.redraw == 0:
            self.projection.assign_(self._draw(rng, self.projection.shape[1]).astype(self.projection.dtype))

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None, None, 0)[0], rng)

    def init_state(self, batch: int) -> State:
        features, size = self.projection.shape
        shape = batch, self.heads, features
        return State(self.constant(0.0, *shape, size), self.constant(-math.inf, *shape), 0)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run(x, *state)

    def _run(self, x: Tensor, mean: Tensor | None, logsum: Tensor | None, position: int) -> tuple[Tensor, State]:
        q, k, v = split_heads(self.qkv(x), heads=(self.heads,) * 3)  # [B H T K]
        if self.rotation is not None:
            q, k = self.rotation.queries(q, position), self.rotation.keys(k, position)
        y, mean, logsum = favor(q, k, v, self.projection.data, None, mean, logsum, **self.kernel)  # section 2.2  [B H T K]
        return self.out(merge_heads([y])), State(mean, logsum, position + x.shape[1])  # [B T D]


class Bidirectional(Performer):
    """The same over all positions: every output depends on all tokens, so there is no state and nothing to continue."""

    causal = False


COST = ("training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights, and for the feed-forward "
        "network, which has 8 D²; O(T F D) for features and attention")
DISCREPANCIES = (
    "the paper's code multiplies Q of a QR decomposition by no signs, so the first coordinate of the first row is always "
    "negative and e^(w·x) is biased; here the signs make the rotation uniform",
    "the paper's codes and performer-pytorch subtract the largest exponent of all keys and add 1e-4 or 1e-6 to the features, "
    "and some add more to the divisor; in causal models later keys then change earlier outputs; here features have "
    "logarithms and there is no such number",
    "directions are drawn every 1000 training steps in performer-pytorch, and at every call from a seed made of the queries "
    "in the JAX code; here by --redraw, 1000 by default",
    "one W for all heads of a layer, as in performer-pytorch; the JAX code has one in each attention module too",
    "relu features: random directions of x / K^(1/4) in performer-pytorch, of x in the TensorFlow code, none in the JAX "
    "code: --relu-directions; TensorFlow's 1/√F is the same as an --relu-offset that is √F times as large",
    "the paper's models have 256 features in heads of 64 channels; here 128, because heads are half as wide: "
    "--random-features; performer-pytorch has K ln K",
    "regularised features are the paper's SMREG: rows of length √K; hyperbolic ones need two features for a direction",
    "the backward pass of the paper's code subtracts k vᵀ from the state step by step, which loses digits; here the state "
    "before each chunk is kept",
)

PERFORMER = Variant(
    name="performer",
    summary="Softmax attention in linear time, estimated by positive orthogonal random features",
    paper="Choromanski et al. 2020, arXiv 2009.14794",
    mixer=Performer,
    options=PerformerOptions,
    page=Page(
        formula="y_i = Σ_{j ≤ i} φ(q_i) · φ(k_j) v_j / Σ_{j ≤ i} φ(q_i) · φ(k_j), φ_f(x) = e^(w_f · x̃ - ‖x̃‖²/2), "
                "x̃ = x / K^(1/4), with random rows w_f; q, k, v = split(x Wᵀ), out = merge(y) Wᵀ",
        cost=COST + ". In chunks of M tokens, by which models train here, that and O(T M (F H + D)). Memory: O(T D), and "
             "F (K + 1) numbers of a head for each chunk. Generating a token: O(D²) for the matrices and O(F D) for "
             "attention, however long the text is",
        state="F (D + H) numbers in each layer: for every feature of a head the mean of the values and the logarithm of the "
              "weight; with F = 128 as much as a Transformer's keys and values of 64 tokens",
        operators=("favor", "rope"),
        golden="performer-pytorch 1.1.4: FastAttention with its ε set to 0, causal and not, softmax and relu features, with "
               "all gradients",
        discrepancies=DISCREPANCIES,
        review="it gives the time O(T d² log d) and the space O(T d log d + d² log d): right for F = d log d features, where d "
               "is the width of a head; for any F the time is O(T F d) and the space O(T F + T d + F d). The number d log d is "
               "proved for sines and cosines, and F must also grow with the lengths of queries and keys",
    ),
)

PERFORMER_ENCODER = Variant(
    name="performer-encoder",
    summary="The same in both directions, as the paper trains on hidden tokens of proteins",
    paper="Choromanski et al. 2020, arXiv 2009.14794",
    mixer=Bidirectional,
    options=PerformerOptions,
    model=Encoder,
    page=Page(
        formula="y_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j) over all positions j, with the features of performer",
        cost=COST + ". Memory: O(T D), and F (K + 1) numbers of a head. It does not generate",
        state="none: it sees a whole sequence at once",
        operators=("favor", "rope"),
        golden="performer-pytorch 1.1.4: FastAttention with its ε set to 0, not causal",
        discrepancies=DISCREPANCIES,
        review="it speaks of the time and space of both directions alike: see performer",
    ),
)
