"""Monarch Mixer: gated long convolutions and block-diagonal matrices, without attention (Fu et al. 2023, arXiv 2310.12109).

The variant ``monarch-mixer`` is M2-BERT, an encoder that is trained to guess hidden tokens, as the paper's authors published
it. The variant ``monarch-mixer-causal`` is a causal relative, which can generate text.

The problem. A Transformer mixes T tokens by attention, which costs O(T²), and D channels by dense matrices, which cost O(D²).
The paper asks for one cheap operation that can do both, and that processors do fast.

The idea. A Monarch matrix is a product of two block-diagonal matrices and permutations. Multiplying N numbers by it costs N √N,
and it can be a Fourier transform, see minitv/ops/monarch/__init__.py. The layer of the paper mixes tokens and channels with
such matrices. X [T D] is the input, k [T D] are weights, σ is an activation, ∘ is elementwise, and M₁ ... M₄ are Monarch
matrices:

    Y = M₂ (k ∘ (M₁ X))                along the tokens
    Zᵀ = M₄ σ(M₃ Yᵀ)                   along the channels

If M₁ is the Fourier transform and M₂ its inverse, then the first line is a convolution of each channel with a filter as long
as the text, whose Fourier transform is k. This is what the published models compute.

- Why a convolution mixes tokens: every token reaches every other one, with a weight that depends on the distance alone. It
  costs O(T log T) by fast Fourier transforms. As Monarch products it costs O(T √T), but these are products of small dense
  matrices, for which GPUs have special units.
- Why gates: a convolution has the same weights for every text. A product with a projection of the same token lets the text
  decide what passes. One gate before the convolution and one after it are Hyena of order 2 (minitv/variants/hyena.py), from
  which the authors took the layer.
- Why a second convolution, of the layer's input u: the block has no sum x + mixer(x). The second convolution reads u itself.
  Its term e begins at random, from N(0, 1), so that each channel passes its own token on, times a number.
- Why a short convolution: a gate and a value then see the two tokens before their own.
- Why block-diagonal matrices in the feed-forward network: with G blocks they have G times fewer weights than dense ones.
- Why no permutation stands between them: the dense projections of the next layer mix the channels. See "What is lost".
- Why a network makes the filters: with free taps, the number of parameters would grow with T. See Hyena.

What it gives. In the paper, M2-BERT with 80 M parameters reaches 79.9 on the GLUE tasks, where BERT-base with 110 M reaches
79.6. In texts of 4096 tokens, it reads 9.1 times as many tokens in a second as the BERT of the package transformers, and twice
as many as BERT with FlashAttention. In texts of 512 tokens it reads 1.05 times as many as the latter, 386 in a millisecond. A
user of the authors' code measured 224 there (issue 44 of their repository). A causal model with 360 M parameters predicts texts
as well as a Transformer of that size.

What is lost. The weights of tokens depend on the distance, and on their own gates: a token cannot look for another one by its
content, as attention does. The longest text is fixed when the model is built. A layer that generates keeps all its past inputs.
In the feed-forward network, an output does not see all channels. With G = 4, blocks 0 and 1 of the first matrix make gates, and
blocks 2 and 3 values. So output blocks 0 and 1 depend on input blocks 0 and 2 alone, and output blocks 2 and 3 on input blocks
1 and 3. With --permute, every output depends on every channel, if 2 H ≥ G² for a hidden size H.

    ours                                                                 the authors' code
    B T D               batch, tokens, channels                          b, l, d
    M, K                width and frequencies of the filters' networks   order, (emb_dim - 1) / 2 = 2
    G, H                blocks and hidden size, feed-forward network     nblocks, intermediate_size
    u [T D]             input of the mixer, normalised by --input-norm   u
    x¹ x² v [T D]       gates and value                                  x1, x2, v
    short [3D, 3]       short filter of every projection                 short_filter
    f, f̄ [T D]          filter that looks back, and one that looks ahead k_fwd, k_rev of filter_fn
    h, h̄ [T D]          those of the second convolution                  k_fwd, k_rev of filter_fn2
    d, e [D]            terms of the two convolutions                    bias of filter_fn, of filter_fn2
    U [2H D], W [D H]   block-diagonal matrices                          gated_layers, wo

The mixer. f * a is the convolution that looks back, f̄ ⋆ a the one that looks ahead:

    x¹, x², v = split(short(u Winᵀ + b))             the short convolution looks back in both variants
    a = x¹ ∘ v
    c = x² ∘ (f * a + f̄ ⋆ a + d ∘ a) + (h * u + h̄ ⋆ u + e ∘ u)
    y = c Woutᵀ + b
    (f * a)_t = Σ_{s≤t} f_{t-s} a_s,    (f̄ ⋆ a)_t = Σ_{s>t} f̄_{s-t-1} a_s

The filters are Hyena's, f(i) = window(i) ∘ network(features(i)), with 2 frequencies and sines of frequency 10 at the start. The
networks of f and f̄ share the features, the frequencies of the sines and the window, and those of h and h̄ too.

The feed-forward network and the block. In ``monarch-mixer`` the block has one sum and one norm. ``monarch-mixer-causal`` has
the block of GPT-2, with two of both:

    p, q = split(U x),    ffn(x) = W (gelu(p) ∘ q) + b            U and W are block-diagonal with G blocks
    x ← mixer(x),    x ← norm(x + ffn(x))                         ``monarch-mixer``
    x ← x + mixer(norm(x)),    x ← x + ffn(norm(x))               ``monarch-mixer-causal``

Causality. ``monarch-mixer`` sees both sides, and refuses every task in which an answer may depend on the past alone. The causal
relative has f and h only, and their sums end at the token itself, so y_t sees u_0 ... u_t without a mask. A Fourier transform
takes its points as a circle, so for T tokens it needs 2 T points: with fewer, late inputs would reach early outputs around the
circle. The paper proves more. It says which other Monarch matrices M₁, with M₂ = M₁⁻¹, make the first line of its layer causal:
those whose columns are values of certain polynomials. minitv/ops/monarch/__init__.py explains them.

How it is trained. ``monarch-mixer`` learns the task ``masked``; the paper's models ask for 30 of 100 tokens, and for 15 in
tests: --mask-rate 0.3. The authors' smallest model has 12 layers of width 768, filter networks of width 128 and texts of 128
tokens. It learns with AdamW at 8e-4, and the rate rises for 6 % of the steps and then falls in a line.

How it writes. ``monarch-mixer-causal`` learns to guess the next token, at all positions at once. To write a token, it keeps two
past inputs of the short convolution, and all past inputs of both long ones, with their sums for later positions. With a width
of 128, these are 33,536 numbers in each layer after 64 tokens, 131 KiB in float32. That is twice what a Transformer keeps.
There is no state of fixed size: minitv/ops/long_conv/online.py tells why, and how a token costs O(D log² T) on average.

Gradients. The operators' pages have those of convolutions and of block-diagonal matrices. The gates multiply. Let g be the
gradient of c, and r = f * a + f̄ ⋆ a + d ∘ a the first convolution. Then x² has the gradient g ∘ r, and r has g ∘ x². The
backward pass of the convolution turns the latter into the gradient of a. Let this be α. So x¹ has the gradient v ∘ α, and v
has x¹ ∘ α. The second convolution gets g itself, and passes it on to u.

What to choose. --blocks 4 is the paper's for every width; more blocks have fewer weights. --permute lets blocks mix and has no
weights of its own. --monarch-order 2 makes the projections Win and Wout Monarch matrices too. They cost O(T D √D) then, as in
the paper's layer, and more factors cost less. --no-residual-conv leaves h and e out. In ``monarch-mixer`` nothing passes a
token on then but the gated product. --filter-width is the size M of the filters' networks, 128 in the authors' models. Their
other options are Hyena's, and minitv/variants/hyena.py explains them.

Three tokens, one channel, a = 1, 2, 4 and f = f̄ = 1, 1/2, 1/4. The authors' code puts both filters on one circle of 2 T
points. The one that looks ahead stands at its end, backwards:

    >>> import numpy as np
    >>> a, f = np.array([1., 2, 4]), np.array([1, 0.5, 0.25])
    >>> circle = np.concatenate([f, f[::-1]])
    >>> print(circle)
    [1.   0.5  0.25 0.25 0.5  1.  ]
    >>> print(np.fft.irfft(np.fft.rfft(a, 6) * np.fft.rfft(circle), 6)[:3].round(6))
    [5.   6.5  5.25]

So the first output is 5 = f_0 · 1 + f̄_0 · 2 + f̄_1 · 4, and a token is in its own output once. A second function in the same
code adds the complex conjugate of the transform of f̄. In it f̄_0 stands for the token itself, which counts twice then:
4 = (f_0 + f̄_0) · 1 + f̄_1 · 2 + f̄_2 · 4. The option is --lag-zero twice.

    >>> spectrum = np.fft.rfft(f, 6) + np.fft.rfft(f, 6).conj()
    >>> print(np.fft.irfft(np.fft.rfft(a, 6) * spectrum, 6)[:3].round(6))
    [4.   6.5  9.25]

The operator of this library computes both, the last one too by Monarch products:

    >>> from autograd import Tensor, use
    >>> from minitv.ops import long_conv
    >>> for lag_zero, form in (("once", "fft"), ("twice", "fft"), ("twice", "monarch")):
    ...     with use("long_conv", form=form):
    ...         y, _ = long_conv(a.reshape(1, 3, 1), f.reshape(3, 1), None, looks_ahead(Tensor(f.reshape(3, 1)), lag_zero))
    ...     print(y.numpy().ravel().round(6))
    [5.   6.5  5.25]
    [4.   6.5  9.25]
    [4.   6.5  9.25]

Which channels does an output of the feed-forward network see? Take D = H = 8, G = 4 and all weights 1. Each row below is one
output, the first of a block, and counts the ways from each of 8 channels to it. First as it is, then with --permute:

    >>> from minitv.ops.block_diagonal import matrix
    >>> for strided in (False, True):
    ...     U, W = (matrix(np.ones(shape), strided).numpy() for shape in ((4, 4, 2), (4, 2, 2)))
    ...     print((W @ (U[:8] + U[8:]))[::2].astype(int))
    [[2 2 0 0 2 2 0 0]
     [2 2 0 0 2 2 0 0]
     [0 0 2 2 0 0 2 2]
     [0 0 2 2 0 0 2 2]]
    [[1 1 1 1 1 1 1 1]
     [1 1 1 1 1 1 1 1]
     [1 1 1 1 1 1 1 1]
     [1 1 1 1 1 1 1 1]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from autograd import Tensor, causal_conv1d, concat, getitem, split
from autograd.device import namespace
from autograd.errors import ShapeError
from autograd.random import Random

from ..blocks import Block
from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..nn import ACTIVATIONS, Dropout, Linear, Module, Stateful, full, norm_of, normal, uniform
from ..ops import block_diagonal, long_conv, monarch
from ..ops.long_conv import online
from ..ops.monarch import factors, product
from ..options import ModelOptions
from ..variant import Page, Variant
from . import hyena


@dataclass(frozen=True)
class CausalOptions(hyena.FilterOptions):
    """monarch-mixer-causal"""

    blocks: int = option(4, "blocks of the block-diagonal matrices of the feed-forward network; 1 = dense", low=1, high=2**20)
    permute: bool = option(False, "the channels are permuted before each block-diagonal matrix, so that blocks mix")
    monarch_order: int | None = option(
        None, "factors of the Monarch matrices that the projections before and after the convolutions are; none = they are "
        "dense, as in the authors' code", low=2, high=20,
    )
    residual_conv: bool = option(True, "a second long convolution, of the mixer's input, is added after the gate")
    input_norm: bool = option(
        False, "the mixer normalises its input, as the authors' model of 80 M parameters and none of the larger ones"
    )

    __post_init__ = check


@dataclass(frozen=True)
class MonarchOptions(CausalOptions):
    """monarch-mixer"""

    lag_zero: str = option(
        "once", "how often the two directions of a convolution count the token itself: once, as the filters of the authors' "
        "layer, or twice, as their function with a conjugated spectrum", choices=("once", "twice"),
    )


# -- along the channels ------------------------------------------------------------------------------------------------
class MonarchLinear(Module):
    """y = M x + b for x[... inputs] -> y[... outputs] with a Monarch matrix M of ``order`` factors.

    ``inputs`` is a product n₁ n₂ ... of nearly equal digits, and M has about (n₁ + n₂ + ...) inputs weights. They are drawn so
    that y has the variance that a dense matrix from N(0, std²) gives it. ``outputs`` must be a multiple of ``inputs``.
    """

    def __init__(self, rng: Random, inputs: int, outputs: int, *, order: int, std: float, bias: bool = True, dtype=np.float32):
        digits = factors.digits(inputs, order)
        self.factors = []
        for i, size in enumerate(digits):
            last = i == order - 1
            shape = inputs // size, size * (outputs // inputs if last else 1), size
            deviation = std * math.sqrt(inputs / size) if last else 1 / math.sqrt(size)
            self.factors.append(normal(rng.split(i), shape, deviation, dtype))
        self.bias = full((outputs,), 0, dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = monarch(x, *self.factors) if len(self.factors) == 2 else product(x, self.factors)
        return y if self.bias is None else y + self.bias


class BlockDiagonal(Module):
    """y = W x + b with G blocks of weights W[G, outputs/G, inputs/G], after a permutation of x if ``strided``.

    The first weights are uniform up to √(G / inputs): one over the root of the number of terms in a sum.
    """

    def __init__(self, rng: Random, inputs: int, outputs: int, blocks: int, *, strided: bool, bias: bool, dtype=np.float32):
        self.weight = uniform(rng, (blocks, outputs // blocks, inputs // blocks), math.sqrt(blocks / inputs), dtype)
        self.bias = full((outputs,), 0, dtype) if bias else None
        self._strided = strided

    def __call__(self, x: Tensor) -> Tensor:
        y = block_diagonal(x, self.weight, strided=self._strided)
        return y if self.bias is None else y + self.bias


class FeedForward(Stateful):
    """y = W (f(p) ∘ q) + b with p, q = split(U x) at every position: a gated unit of block-diagonal matrices; no state.

    The hidden size H is ``ffn_multiple`` widths, rounded to a multiple of the blocks. UserError if these do not divide the
    width.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: CausalOptions, layer: int = 0, dtype=np.float32):
        width, blocks = model.width, options.blocks
        if width % blocks:
            raise UserError(f"--blocks: {blocks} blocks do not divide the width {width}, allowed: a divisor of {width}")
        hidden = max(1, round(model.ffn_multiple * width / blocks)) * blocks
        self.up = BlockDiagonal(rng.split(0), width, 2 * hidden, blocks, strided=options.permute, bias=False, dtype=dtype)
        self.down = BlockDiagonal(rng.split(1), hidden, width, blocks, strided=options.permute, bias=model.bias, dtype=dtype)
        self.activation, self.dropout = ACTIVATIONS[model.activation], Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        p, q = split(self.up(x), sizes=2)  # [B T H]
        return self.down(self.dropout(self.activation(p) * q, rng))

    def init_state(self, batch: int) -> None:
        return None

    def prefill(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        return self(x), None


# -- along the tokens --------------------------------------------------------------------------------------------------
def looks_ahead(filter: Tensor, lag_zero: str) -> Tensor:
    """The filter[T D] that looks ahead, as long_conv takes it: its first tap is for the token itself, 0 if that counts once."""
    if lag_zero == "twice":
        return filter
    none = Tensor.wrap(namespace(filter.data).zeros((min(1, filter.shape[0]), filter.shape[1]), filter.dtype))
    return concat([none, filter[:-1]], axis=0)


class Filters(hyena.Filters):
    """A filter [T D] that looks back, and one that looks ahead if ``both``, which share all but their linear layers."""

    def __init__(self, rng: Random, context: int, width: int, both: bool, options: hyena.FilterOptions, dtype):
        super().__init__(rng.split(0), context, width, 1, options, dtype)
        self.ahead = hyena.Filters(rng.split(1), context, width, 1, options, dtype, like=self) if both else None

    def pair(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Both filters, [T D] each, for ``length`` tokens."""
        return self(length)[0], None if self.ahead is None else self.ahead(length)[0]


class Mixer(Stateful):
    """y = (x² ∘ (f * a + d ∘ a) + (h * u + e ∘ u)) Woutᵀ + b with a = x¹ ∘ v, for u[B T D]; the page has the formulas.

    Its first weights come from N(0, init_std²), d and e from N(0, 1), and the short filter is uniform up to 1/√taps. Dropout
    stands before the gated convolution and at the end. ShapeError if a sequence is longer than the context.
    """

    bounded = True
    name = "monarch-mixer-causal"
    both = False  # whether it sees both sides

    def __init__(self, rng: Random, model: ModelOptions, options: CausalOptions, layer: int = 0, dtype=np.float32):
        width, order = model.width, options.monarch_order
        make = Linear if order is None else partial(MonarchLinear, order=order)
        self.context = model.context
        self.norm = norm_of(model, width, dtype) if options.input_norm else None
        self.project = make(rng.split(0), width, 3 * width, std=model.init_std, bias=model.bias, dtype=dtype)
        limit = 1 / math.sqrt(options.short_filter)
        self.short = uniform(rng.split(1), (3 * width, options.short_filter), limit, dtype)
        self.short_bias = full((3 * width,), 0, dtype) if model.bias else None
        count = 1 + options.residual_conv
        self.filters = [Filters(rng.split(2, i), model.context, width, self.both, options, dtype) for i in range(count)]
        self.skips = [normal(rng.split(3, i), (width,), 1.0, dtype) for i in range(count)]
        std = model.init_std if self.both else model.output_std  # the block of the encoder adds nothing to what it reads
        self.out = make(rng.split(4), width, width, std=std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        self._fits(0, x.shape[1])
        u = x if self.norm is None else self.norm(x)
        z = causal_conv1d(self.project(u), self.short, self.short_bias)  # [B T 3D]

        def convolve(i: int, a: Tensor) -> Tensor:
            back, ahead = self.filters[i].pair(a.shape[1])
            return long_conv(a, back, self.skips[i], None if ahead is None else self._ahead(ahead))[0]

        return self._joined(u, z, convolve, rng)

    def _joined(self, u: Tensor, z: Tensor, convolve, rng: Random | None = None) -> Tensor:
        """y of the input u and its projections z[B T 3D], with convolution i of a as ``convolve(i, a)``."""
        x1, x2, v = split(z, sizes=3)  # x¹, x², v
        y = convolve(0, self.dropout(v * x1, rng and rng.split(0))) * x2  # x² ∘ (f * a + f̄ ⋆ a + d ∘ a)
        if len(self.filters) > 1:
            y = y + convolve(1, u)  # h * u + h̄ ⋆ u + e ∘ u
        return self.dropout(self.out(y), rng and rng.split(1))

    def _ahead(self, filter: Tensor) -> Tensor:
        raise NotImplementedError

    def init_state(self, batch: int) -> State:
        filters = tuple([made.pair(self.context)[0] for made in self.filters])
        recent = self.constant(0.0, batch, 0, self.short.shape[0])
        return State(filters, recent, tuple([online.begin(batch, f) for f in filters]))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        length, keep, pasts = x.shape[1], self.short.shape[1] - 1, list(state.pasts)
        self._fits(state.pasts[0].position, length)
        u = x if self.norm is None else self.norm(x)
        recent = concat([state.recent, self.project(u)], axis=1)  # [B S+T 3D] after S earlier positions
        z = _last(causal_conv1d(recent, self.short, self.short_bias), length)

        def convolve(i: int, a: Tensor) -> Tensor:
            y, pasts[i] = online.read(a, pasts[i], state.filters[i], self.skips[i], convolve=long_conv, block=online.BLOCK)
            return y

        y = self._joined(u, z, convolve)
        return y, State(state.filters, _last(recent, min(keep, recent.shape[1])), tuple(pasts))

    def _fits(self, start: int, length: int) -> None:
        if start + length > self.context:
            raise ShapeError(f"{self.name}: the filters have {self.context} positions; {start} + {length} tokens do not fit")


class State(NamedTuple):
    """The filters, the last inputs of the short convolution, and the past of each long one."""

    filters: tuple[Tensor, ...]  # of [T D]
    recent: Tensor  # at most [B 2 3D]
    pasts: tuple[online.Past, ...]


class Bidirectional(Mixer):
    """The same with f̄ ⋆ a and h̄ ⋆ u, which look ahead; it has no state."""

    name = "monarch-mixer"
    both = True

    def __init__(self, rng: Random, model: ModelOptions, options: MonarchOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        self._lag_zero = options.lag_zero

    def _ahead(self, filter: Tensor) -> Tensor:
        return looks_ahead(filter, self._lag_zero)

    def init_state(self, batch: int) -> State:
        raise ShapeError("monarch-mixer: it has no state, every output depends on the whole sequence")


def _last(x: Tensor, length: int) -> Tensor:
    """The last positions of x[B T D]."""
    return getitem(x, key=(slice(None), slice(x.shape[1] - length, None)))


class MixerBlock(Block):
    """x ← mixer(x); x ← norm(x + ffn(x)): the block of M2-BERT, which adds nothing to the mixer's output."""

    normed = True

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: Stateful, *, dtype=np.float32):
        self.mixer, self.ffn = mixer, ffn
        self.norm = norm_of(model, model.width, dtype)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        x = self.mixer(x, rng and rng.split(0))
        return self.norm(x + self.ffn(x, rng and rng.split(1)))

    def init_state(self, batch: int) -> tuple:
        return self.mixer.init_state(batch), self.ffn.init_state(batch)

    def prefill(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        x, past = self.mixer.prefill(x, state[0])
        y, after = self.ffn.prefill(x, state[1])
        return self.norm(x + y), (past, after)


COST = ("training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights; O(T H D / G) for the "
        "feed-forward network, which has 3 H D / G; O(T D log T) for the two convolutions. Once for the whole batch: "
        "O(T M (M + D)) for each of {count} filters, whose network has 2 M² + M (2 K + 1 + D) weights. Memory: O(T D), filters "
        "and activations. ")

MONARCH_MIXER = Variant(
    name="monarch-mixer",
    summary="Gated long convolutions in both directions, and feed-forward networks of block-diagonal matrices",
    paper="Fu et al. 2023, arXiv 2310.12109",
    mixer=Bidirectional,
    options=MonarchOptions,
    channel=FeedForward,
    without=("ffn_gate",),  # it always has one
    block=MixerBlock,
    model=Encoder,
    overrides=dict(embed_norm=True, filter_bands=2, sine_frequency=10.0),
    # Block-diagonal matrices have few weights: with wider ones, and narrower networks of filters where there are four, small
    # models have as many parameters as the Transformer.
    presets={"tiny": dict(filter_width=32, ffn_multiple=8.0), "nanogpt-cpu": dict(filter_width=32, ffn_multiple=8.0),
             "small": dict(ffn_multiple=9.0)},
    not_causal="its convolutions look ahead; monarch-mixer-causal is a relative whose convolutions do not",
    page=Page(
        formula="y = (x² ∘ (f * a + d ∘ a) + (h * u + e ∘ u)) Wᵀ with a = x¹ ∘ v and x¹, x², v = split(short(u Winᵀ)); f and h "
                "are filters over all of T in both directions; x ← y, then x ← norm(x + ffn(x))",
        cost=COST.format(count="four") + "It does not generate",
        state="none: it sees a whole sequence at once",
        operators=("long_conv", "monarch", "block_diagonal", "causal_conv1d"),
        golden="the layer of the authors' code, written from its formulas in PyTorch, with all gradients, for both ways to "
               "count the token itself, and without the second convolution; the Fourier transform and dense matrices for "
               "monarch",
        discrepancies=(
            "the paper's layer is sub-quadratic in the width too; the projections of its published models are dense, and the "
            "blocks of their feed-forward network are four for every width, which costs O(D²): --monarch-order, --blocks",
            "the paper's matrices along the tokens may be any Monarch matrices; the published models compute convolutions by "
            "Fourier transforms, as here",
            "the authors' code has two ways to make a filter of two directions, of which its layer calls one: --lag-zero",
            "their block-diagonal matrix can permute its inputs, and their models do not use that: --permute. Theirs is the "
            "inverse of the permutation here, which is that of Monarch matrices",
            "their code fills up a width that the blocks do not divide; here it is refused",
            "their model of 80 M parameters normalises the input of the mixer, the larger ones do not: --input-norm",
            "the short convolution looks back alone, also in this model that sees both sides: so it is here",
            "their embedding is normalised after a vector for the position, and for the type of text, was added; here before, "
            "and there are no types. Their head has one more layer, as BERT's",
            "padding is read by a convolution as any token, in their code too; here no task pads",
            "their filters learn at a rate of 1e-3 and the features at 1e-5; here everything learns at --lr, the features in "
            "proportion to it: --features-lr",
        ),
        review="it says that Monarch Mixer is sub-quadratic in the length and in the width. That is right for the paper's "
               "layer, whose order p costs O(p N^(1+1/p)). In the published models, the width costs O(D²)",
    ),
)

MONARCH_MIXER_CAUSAL = Variant(
    name="monarch-mixer-causal",
    summary="Gated long convolutions over the past, and feed-forward networks of block-diagonal matrices",
    paper="ours, after Fu et al. 2023, arXiv 2310.12109",
    mixer=Mixer,
    options=CausalOptions,
    channel=FeedForward,
    without=("ffn_gate",),  # it always has one
    overrides=dict(positions="none", filter_bands=2, sine_frequency=10.0),
    presets={"tiny": dict(ffn_multiple=8.0), "nanogpt-cpu": dict(ffn_multiple=8.0), "small": dict(ffn_multiple=10.0)},
    page=Page(
        formula="y = (x² ∘ (f * a + d ∘ a) + (h * u + e ∘ u)) Wᵀ with a = x¹ ∘ v and x¹, x², v = split(short(u Winᵀ)); f and h "
                "are filters over the past; x ← x + y, then x ← x + ffn(norm(x))",
        cost=COST.format(count="two") + "Generating: for token t, O(D²) for the matrices and O(t D) for the convolutions by "
                                        "direct sums, or O(D log² t) on average in blocks",
        state="4 t D + 6 D numbers: past inputs of two convolutions, their sums for later positions, and the past of a short "
              "filter of 3 taps; with the filters, 2 D numbers for every position of the context. It grows with the text, as "
              "the keys and values of attention do",
        operators=("long_conv", "monarch", "block_diagonal", "causal_conv1d"),
        golden="the layer of the authors' code without the filters that look ahead, written from its formulas in PyTorch, with "
               "all gradients",
        discrepancies=(
            "the paper has a causal model too, which it compares with Transformers on the Pile; the authors' repository has no "
            "code of it. This relative is M2-BERT's layer with filters that look back alone, in GPT-2's block",
            "the paper's theorem allows bounded polynomials other than those of the Fourier transform; here a law of the "
            "operator monarch checks them, and no model trains them",
        ),
        review="it does not speak of the causal model",
    ),
)
