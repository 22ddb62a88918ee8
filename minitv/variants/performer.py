"""Performer: attention in linear time, by random features of queries and keys (Choromanski et al. 2020, arXiv 2009.14794).

The variant ``performer`` is a causal language model. The variant ``performer-encoder`` sees both directions. Numbers of
sections, and those in brackets, which name equations, are the paper's.

The problem. Attention compares every query with every key, so its time grows with T², and a model that writes keeps all keys
and values. The softmax forces this: no finite number of features gives the weight e^(q · k) as a product φ(q) · φ(k) of
something of the query and something of the key. Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) chooses another
φ, and so another function than attention. The weights of a trained Transformer do not fit it.

The idea. A product of features can be equal to e^(q · k) on average, if the features are random. Take a vector w of K
independent Gaussian numbers, where K is the number of channels. Then for all q and k

    e^(q · k) = E[e^(w · q - ‖q‖²/2) e^(w · k - ‖k‖²/2)]                          lemma 1 (7)

because w · (q + k) is Gaussian with variance ‖q + k‖², and E[e^(w · z)] = e^(‖z‖²/2). So F draws of w give F features of a
query and of a key, and the mean of their products estimates the softmax's weight. With more draws the estimate gets better:
its mean squared error falls as 1/F. The method is called FAVOR+: Fast Attention Via positive Orthogonal Random features.

- Why the time is linear: y_i = Σ_j φ(q_i) · φ(k_j) v_j is φ(q_i) times the matrix Σ_j φ(k_j) v_jᵀ, of F × V numbers, where V
  is the number of channels of a value. All queries share this matrix, and no pair (i, j) is computed. In causal attention
  query i needs the sum over the keys j ≤ i. It is the sum of query i - 1 and one term more.
- Why positive features: e^(q · k) is also the mean of products of sines and cosines. These may be negative. Where the true
  weight is near 0, the error of their estimate grows without bound (8). A sum of such weights, by which every output is
  divided, may be near 0 or negative. e^(w · x - ‖x‖²/2) is positive, and its error vanishes with the weight itself:

      mean squared error = e^(2 q·k) (e^(‖q+k‖²) - 1) / F                         lemma 2 (8), positive features

- Why both w and -w (--features hyperbolic): the two errors partly cancel. With as many features, the error is that of positive
  ones times 1 - e^(-‖q+k‖²) (8).
- Why orthogonal directions: independent draws may point the same way by chance and then say the same thing twice. Up to K
  directions are made orthogonal. Each direction alone is still uniform, and its length is that of a Gaussian vector. So the
  mean stays, and the error falls (theorem 2). More than K directions come in blocks of K, each with a rotation of its own
  (appendix B.2).
- Why length √K (--features regularised): no direction is very long by chance. The estimate's mean is then a little below the
  softmax's weight, and comes near to it if K is large (theorem 1). In the paper such a model learns faster (figure 5).
- Why K^(-1/4): attention has the weight e^(q · k / √K). Dividing q and k by the fourth root of K each gives this product.
- Why the draws are repeated (--redraw): one draw may be bad, and a model that trains with it gets worse (figure 15). On books,
  the paper's model becomes as good as a Transformer if directions are drawn again, and not if they stay (figure 5). The
  directions are saved with the model, and stay as they are when it is evaluated or writes.
- Why the ReLU variant (--features relu): φ(x) = max(0, W x) + offset estimates no softmax. It is a kernel of its own. The
  paper calls it Performer where it does not say softmax (appendix A), and it is the best on proteins (section 4.4).

What is lost. The weights are noisy: where a sharp softmax picks one key of many, ‖q‖ and ‖k‖ are large, and so is the error.
Errors grow from layer to layer. So a trained Transformer with its weights copied starts badly, and must be trained a little
more (section 4.3). And the state has a fixed size, F (K + 1) numbers in a head: a long text must share it.

How it is trained. ``performer`` learns to guess the next token at all positions at once, in chunks, by cross-entropy.
``performer-encoder`` learns the task ``masked``: 15 of 100 tokens are asked for. W is a constant: it has no gradient, and the
steps 1000, 2000, ... begin with a new draw. All other weights are trained as in ``transformer``.

How it writes. ``performer`` reads the prompt once, then one token at a time. A token changes the mean and the weight of every
feature, and its query reads them. Nothing else is kept, however long the text is. With the defaults, a width of 128, 4 heads
and F = 128, this is 128 · (128 + 4) = 16,896 numbers in each layer, 66 KiB in float32. ``performer-encoder`` needs the whole
text for every output, and cannot write.

What is masked. In ``performer`` position i has the sums over j ≤ i alone, so no mask of T × T pairs exists. Only within a
chunk are the products of all pairs made, and those with j > i are set to 0. Padding after a text is in its future.
``performer-encoder`` hides nothing, and reads padding as any other token. The operator could leave it out of all sums: it has
a mask of keys.

What to choose:

- F, --random-features. Twice as many halve the squared error, and double time and state. The paper has 256 for heads of 64
  channels (appendix A). For sines and cosines theorem 4 asks for an order of K log K, and for more the longer queries and keys
  are, but not for more in longer texts.
- --features. positive estimates the softmax without bias, and is the default. hyperbolic has a smaller error with the same F,
  regularised a small bias. relu is for a model that need not resemble a Transformer.
- --orthogonal and --redraw. The defaults follow the paper, which gives no number for --redraw. Relu features estimate no mean,
  and the paper's JAX code never draws them anew: this is --redraw 0.

A trap in published code. They multiply all features of the keys by e^(-c), where c is the largest w · k of all keys and
directions, so that nothing overflows. Then they add a small ε. The factor cancels in the output, but with ε it does not: a
large last key makes all earlier keys fade under ε. In performer-pytorch, multiplying the last key by 3 changes earlier outputs
by more than half of their size: the model sees the future. Here every feature keeps a logarithm of its sum, there is no ε, and
no later key changes anything before it.

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            -, L, -, -
    K = V = D / H       channels of a query, key or value      d
    F                   random features, --random-features     r, the length of φ: m, or 2 m if hyperbolic
    x [B T D]           input of the layer                     -
    Wqkv [3D D]         all queries, then all keys, all values -
    w_f [K], W [F K]    a random direction, and all of them    ω_i, and W in appendix B.2
    φ(x) [F]            features                               φ(x), with the factor 1/√m, which cancels in y
    S [F V], z [F]      Σ_j φ(k_j) v_jᵀ, and Σ_j φ(k_j)        G^PS_i in (11): S are its first columns, z is its last
    mean, logsum        S_f / z_f and ln z_f, what is kept     -

The layer:

    q, k, v = split(x Wqkvᵀ)                                   turned by their positions with --positions rope
    φ_f(x) = e^(w_f · x̃ - ‖x̃‖²/2), x̃ = x / K^(1/4)             (5) with h and f_1 of lemma 1
    y_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j)        (4), all j, in the encoder; (11), j ≤ i, in ``performer``
    out = merge(y) Woᵀ
    x ← x + layer(norm(x)),   x ← x + ffn(norm(x))             the blocks of ``transformer``

``Performer._run`` below has the layer. minitv/ops/favor/__init__.py has φ and y: three forms, chunks and the gradients.
projection.py beside it draws W.

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
from ..sequence import position, relay
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
        return self.dropout(self._run(x, None, None, position())[0], rng)

    def init_state(self, batch: int) -> State:
        features, size = self.projection.shape
        shape = batch, self.heads, features
        return State(self.constant(0.0, *shape, size), self.constant(-math.inf, *shape), 0)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run(x, *state)

    def _run(self, x: Tensor, mean: Tensor | None, logsum: Tensor | None, start: int) -> tuple[Tensor, State]:
        q, k, v = split_heads(self.qkv(x), heads=(self.heads,) * 3)  # [B H T K]
        if self.rotation is not None:
            q, k = self.rotation.queries(q, start), self.rotation.keys(k, start)
        y, mean, logsum = relay(lambda k, *past: favor(q, k, v, self.projection.data, None, *past, **self.kernel), k, mean,
                                logsum, begin=lambda: self.init_state(len(x.data))[:2])  # (4) or (11)  [B H T K]
        return self.out(merge_heads([y])), State(mean, logsum, start + x.shape[1])  # [B T D]


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
    "directions are drawn every 1000 calls in training in performer-pytorch, and at every call, from a seed made of the "
    "queries, in the paper's codes; here by --redraw, every 1000 training steps by default",
    "one W for all heads of a layer, as in performer-pytorch; the JAX code has one in each attention module too",
    "relu features: random directions of x / K^(1/4) in performer-pytorch, of x in the TensorFlow code, none in the JAX "
    "code: --relu-directions; TensorFlow's 1/√F is the same as an --relu-offset that is √F times as large",
    "the paper's models have 256 features in heads of 64 channels; here 128, because heads are half as wide: "
    "--random-features; performer-pytorch has K ln K",
    "section 2.4 wants no more orthogonal directions than channels, and says that all experiments keep to that, which 256 "
    "do not; here they are orthogonal in blocks, as in appendix B.2 and all codes",
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
    on_ranks="each rank passes the mean of the values and ln of the weight of every feature on to the next one",
    page=Page(
        formula="y_i = Σ_{j ≤ i} φ(q_i) · φ(k_j) v_j / Σ_{j ≤ i} φ(q_i) · φ(k_j), φ_f(x) = e^(w_f · x̃ - ‖x̃‖²/2), "
                "x̃ = x / K^(1/4), with random rows w_f; q, k, v = split(x Wᵀ), out = merge(y) Wᵀ",
        cost=COST + ". In chunks of M tokens, by which models train here, 64 on a CPU and 32 on a GPU, that and "
             "O(T M (F H + D)). Memory: O(T D), and F (K + 1) numbers of a head for each chunk. Generating a token: O(D²) for "
             "the matrices and O(F D) for attention, however long the text is",
        state="F (D + H) numbers in each layer: for every feature of a head the mean of the values and the logarithm of the "
              "weight, of 4 bytes in float32; with F = 128 as much as a Transformer's keys and values of about 64 tokens",
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
    overrides=dict(positions="rope"),
    page=Page(
        formula="y_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j) over all positions j, with the features of performer",
        cost=COST + ". Memory: O(T D), and F (K + 1) numbers of a head. It does not generate",
        state="none: it sees a whole sequence at once",
        operators=("favor", "rope"),
        golden="performer-pytorch 1.1.4: FastAttention with its ε set to 0, not causal",
        discrepancies=(
            *DISCREPANCIES,
            "the paper's models add a vector of the position to x; here queries and keys are turned by it. By learned vectors "
            "noisy weights find a neighbour so late that a small model knows after 2000 steps no more than how frequent each "
            "token is: --positions learned",
        ),
        review="it speaks of the time and space of both directions alike: see performer",
    ),
)
