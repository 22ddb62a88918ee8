"""Hyena: gates and convolutions as long as the sequence, filters made by a network (Poli et al. 2023, arXiv 2302.10866).

The problem. Attention (3) costs O(T²) time for T tokens. The cheaper operators before this paper were as good as attention only
together with some layers of attention. The paper asks what attention has that they lack, and names three properties: its
weights depend on the data, its number of parameters does not grow with T, and every token can reach every later one. Numbers in
brackets name the paper's equations.

The idea. Hyena takes turns with two cheap operations. A convolution (1) with a filter h as long as the sequence lets every
token reach every later one, with weights that depend on the distance alone. An elementwise product with a projection x of the
input, called a gate, makes these weights depend on the data. With two gates x⁰, x¹ and one filter, which is order 2:

    y_t = x⁰_t Σ_{s≤t} h_{t-s} x¹_s v_s

So the weight of token s for token t is x⁰_t x¹_s h_{t-s}: a query times a key, as in attention, times a function of the
distance; and every channel has its own. Order N has N gates and N - 1 filters. From order 3 on, the weight of s for t is a sum
over the tokens between them, so it depends on these tokens as well. A Fourier transform turns each convolution into a product,
which costs O(T log T), and no matrix of T² weights is ever made.

- Why no softmax: to divide by the sum of the weights, one would have to compute them all. Here they may be negative, and
  nothing limits their size.
- Why a long filter: a layer with a filter of a few taps sees a few tokens, and a token far back is out of reach.
- Why a network makes the filters (7): with free taps, the number of parameters would grow with T. The network computes a tap
  from its position, so its size does not depend on T, and a tap learns from what its neighbours have learned.
- Why the network reads cosines and sines of the position: as one number, neighbouring positions look almost the same to it.
- Why its activation is a sine: networks learn smooth functions first, but a filter that picks the token at one certain
  distance is not smooth. With f = 14 in sin(f z), the first filters already oscillate fast. Filters that are too smooth at the
  start cost up to 5 % of perplexity (appendix D.2).
- Why a window: the network's filters are as strong far away as nearby. The factor e^(-δ i) makes them fade, at another rate δ
  in every channel, so that some channels look at the last tokens and others at the whole context (figure 3.1).
- Why the short filter: a projection sees one token. To find what stood behind an earlier "a", a key must tell that the token
  before it was "a". A convolution of 3 taps over all projections shows keys and queries the two tokens before them.
- Why the term d: it adds the input of a convolution to its output, so a channel passes its own token on before the filter has
  learned much.

What is lost. There is no state of fixed size: to generate, a layer keeps all its past inputs, and a new token meets each of
them. The filters have as many taps as the context, so a longer text is refused.

    ours                                                                        the paper's
    B T D                  batch, tokens, channels; T is at most the context    -, L, D
    N                      order                                                N
    K, M                   bands of the features; width of the filter network   K = (D_e - 1) / 2, -
    u [T D]                input of the layer, x in the code                    u
    v [T D]                value                                                v
    x⁰ ... x^(N-1) [T D]   gates; x⁰ is the last one that is applied            x^N ... x^1: our x^(N-1-o) is its x^(o+1)
    short [(N+1) D, 3]     short filter of every projection                     h in algorithm 1; does the work of h^1
    filter_o [T D]         long filters, o = 0 ... N-2                          h^(o+2)
    d_o [D]                skip, the term d                                     -, it stands in the code alone
    i                      lag of a tap                                         t in (7)
    δ [D], f [M]           decay of a window, frequency of the sines            α, ω_a

The layer (algorithms 1 and 3). * is the convolution (1) in every channel, and ∘ is elementwise.

    x⁰, ..., x^(N-1), v = split(short(u Winᵀ + b))
    for o = 0 ... N-2:   a = x^(N-1-o) ∘ v,   v ← filter_o * a + d_o ∘ a        (4)
    y = (x⁰ ∘ v) Woutᵀ + b                                                      (4), the last gate

The filters (algorithm 2), for lags i = 0 ... T-1 and frequencies k, which are K numbers from 10⁻⁴ to K - 1 in equal steps:

    filter(i) = window(i) ∘ W₃ sin(f ∘ (W₂ sin(f ∘ (W₁ sin(f ∘ W₀ features(i))))))        (7), without the biases
    features(i) = i / (T - 1), cos(2π k i / T), -sin(2π k i / T)                          appendix D.3
    window(i) = e^(-δ i / (T - 1)) + shift                                                figure 3.1

δ goes over the channels from ln 100 / slow_decay to ln 100 / fast_decay, so the windows reach 1 % after 1.5 down to 0.3
contexts. T is the context here: a shorter sequence takes the first taps of the same filters. The layers of the network share
one vector f. Training changes f, and the features too, at a smaller rate. shift is 0 unless --window-shift is given: with a
positive one, no window fades to nothing.

As matrices, in one channel: D_x is the diagonal matrix of x, and S_h [T T] is the lower triangular matrix (2) that has h_{t-s}
in row t and column s, and d more on its diagonal. H3 (5), (6) was such a product of two D and two S, whose filters came from a
state space model; the paper generalises it.

    y = D_x⁰ S_filter_(N-2) D_x¹ ... S_filter_0 D_x^(N-1) v

Each S is lower triangular and each D diagonal, so y_t depends on the tokens up to t alone (proposition 3.1).

Three tokens, one channel, order 2 with h = 1, 1/2, 1/4 and d = 0. First gate, convolve, gate:

    >>> import numpy as np
    >>> x0, x1, v, h = np.array([[1., 2, 1], [1, 1, 2], [1, 3, 2], [1, 0.5, 0.25]])
    >>> a = x1 * v
    >>> print(a, np.convolve(h, a)[:3], x0 * np.convolve(h, a)[:3])  # (4)
    [1. 3. 4.] [1.   3.5  5.75] [1.   7.   5.75]

Then the matrix that this is, with one row per output: 7 = 1 · 1 + 2 · 3.

    >>> S = np.array([[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]])  # (2)
    >>> H = np.diag(x0) @ S @ np.diag(x1)
    >>> print(H)
    [[1.   0.   0.  ]
     [1.   2.   0.  ]
     [0.25 0.5  2.  ]]
    >>> print(H @ v)
    [1.   7.   5.75]

The operator in all its forms, without and with d = 1, which adds a to the convolution:

    >>> from autograd import use
    >>> from minitv.ops import long_conv
    >>> for form in ("fft", "direct", "relaxed"):
    ...     with use("long_conv", form=form):
    ...         for skip in (None, np.ones(1)):
    ...             y, _ = long_conv(a.reshape(1, 3, 1), h.reshape(3, 1), skip)
    ...             print(form, (x0 * y.numpy().ravel()).round(6))
    fft [1.   7.   5.75]
    fft [ 2.   13.    9.75]
    direct [1.   7.   5.75]
    direct [ 2.   13.    9.75]
    relaxed [1.   7.   5.75]
    relaxed [ 2.   13.    9.75]

minitv/ops/long_conv/__init__.py has the forms and the gradients, minitv/ops/long_conv/online.py the way to generate.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, causal_conv1d, concat, getitem, sin, split
from autograd.errors import ShapeError
from autograd.random import Random

from ..config import check, option
from ..nn import Buffer, Dropout, Linear, Module, Stateful, full, made, normal, uniform
from ..ops import long_conv
from ..ops.long_conv import online
from ..options import ModelOptions
from ..sequence import before, columns, gathered, position, scattered, share
from ..variant import Page, Variant


@dataclass(frozen=True)
class FilterOptions:
    """filters"""

    short_filter: int = option(3, "taps of the short convolution", low=1, high=1000)
    filter_width: int = option(64, "hidden size of the network that makes the long filters", low=1, high=2**16)
    filter_depth: int = option(4, "linear layers of the filter network", low=2, high=100)
    filter_bands: int = option(16, "frequencies of the position that the filter network reads, each as cosine and sine", low=1,
                               high=2**16)
    filter_std: float = option(0.02, "standard deviation of the filter network's weights at the start", above=0)
    sine_frequency: float = option(14.0, "frequency of the filter network's sines at the start", above=0)
    features_lr: float = option(0.01, "learning rate of the filter network's input, relative to --lr; 0 = fixed", low=0)
    window: bool = option(True, "filters fade with the distance")
    fast_decay: float = option(0.3, "part of the context after which the fastest window is at 1 %", above=0)
    slow_decay: float = option(1.5, "part of the context after which the slowest window is at 1 %", above=0)
    window_shift: float = option(0.0, "number that is added to the window; Hyena's paper mentions one, its code has 0")

    window_order: ClassVar[str] = "channels"  # of a single filter there is no other


@dataclass(frozen=True)
class HyenaOptions(FilterOptions):
    """hyena"""

    order: int = option(2, "order N: N gates, N + 1 projections and N - 1 long convolutions", low=2, high=100)
    window_order: str = option(
        "channels", "for order > 2: decays go from slow to fast over the channels of each filter, as in the authors' "
        "training code, or over the filters one after the other, as in their standalone code", choices=("channels", "filters")
    )

    retired: ClassVar[tuple[str, ...]] = ("online_block",)  # it changed speed only

    __post_init__ = check


class State(NamedTuple):
    """The filters, the last inputs of the short convolution, and the past of each long one."""

    filters: tuple[Tensor, ...]  # N - 1 of [T D]
    recent: Tensor  # at most [B 2 (N+1)·D]
    pasts: tuple[online.Past, ...]


class Hyena(Stateful):
    """y = (x⁰ ∘ v) Woutᵀ after N - 1 times v ← filter * (x ∘ v) + d ∘ (x ∘ v), for u[B T D], equation (4).

    Its first weights come from N(0, init_std²), those of the output from N(0, (init_std/√(2 layers))²), d from N(0, 1), and the
    short filter is uniform up to 1/√taps. Dropout stands before each long convolution and at the end. ShapeError if a sequence
    is longer than the context. ``bidirectional``, for encoders, gives each convolution a second filter that looks ahead; then
    there is no state.
    """

    bounded = True

    def __init__(self, rng: Random, model: ModelOptions, options: HyenaOptions, layer: int = 0, dtype=np.float32, *,
                 bidirectional: bool = False):
        width, order, std = model.width, options.order, model.init_std
        self.context, self.order, self.bidirectional = model.context, order, bidirectional
        self.project = Linear(rng.split(0), width, (order + 1) * width, std=std, bias=model.bias, dtype=dtype)
        limit = 1 / math.sqrt(options.short_filter)
        self.short = uniform(rng.split(1), ((order + 1) * width, options.short_filter), limit, dtype)
        self.short_bias = full(((order + 1) * width,), 0, dtype) if model.bias else None
        count = (order - 1) * (1 + bidirectional)
        self.filters = Filters(rng.split(2), model.context, width, count, options, dtype)
        self.skip = normal(rng.split(3), ((order - 1) * width,), 1.0, dtype)
        self.out = Linear(rng.split(4), width, width, std=model.output_std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        start, length = position(), x.shape[1]
        self._fits(start, length)
        filters = self.filters(length, start)  # (7) N - 1 of [T D], algorithm 2
        z, recent = before(self.project(x), self.short.shape[1] - 1, None)
        if recent is not None:
            z = concat([recent, z], axis=1)
        z = causal_conv1d(z, self.short, self.short_bias)  # [B T (N+1)·D], algorithm 1
        if recent is not None:
            z = _last(z, length)
        *gates, v = split(z, sizes=self.order + 1)  # N gates and the value, each [B T D]
        for o, skip in enumerate(split(self.skip, sizes=self.order - 1)):  # (4), algorithm 3
            a = self.dropout(v * gates[-1 - o], rng and rng.split(0, o))  # [B T D]
            v = self._convolve(a, filters[o], skip, filters[self.order - 1 + o] if self.bidirectional else None)  # [B T D]
        return self.dropout(self.out(v * gates[0]), rng and rng.split(1))  # (4) [B T D]

    def _convolve(self, a: Tensor, filter: Tensor, skip: Tensor, reverse: Tensor | None) -> Tensor:
        if share() is None:
            return long_conv(a, filter, skip, reverse)[0]
        width = a.shape[2]
        y, _ = long_conv(gathered(a), gathered(filter[None])[0], skip[columns(width)])
        return scattered(y, width)

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            raise ShapeError("hyena: a bidirectional mixer has no state, every output depends on the whole sequence")
        filters = self.filters(self.context)
        recent = self.constant(0.0, batch, 0, self.short.shape[0])
        return State(filters, recent, tuple([online.begin(batch, f) for f in filters]))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        length, keep = x.shape[1], self.short.shape[1] - 1
        self._fits(state.pasts[0].position, length)
        recent = concat([state.recent, self.project(x)], axis=1)  # [B S+T (N+1)·D] after S earlier positions
        z = _last(causal_conv1d(recent, self.short, self.short_bias), length)
        *gates, v = split(z, sizes=self.order + 1)
        pasts = []
        for o, skip in enumerate(split(self.skip, sizes=self.order - 1)):
            v, past = online.read(v * gates[-1 - o], state.pasts[o], state.filters[o], skip, convolve=long_conv,
                                  block=online.BLOCK)
            pasts.append(past)
        return self.out(v * gates[0]), State(state.filters, _last(recent, min(keep, recent.shape[1])), tuple(pasts))

    def _fits(self, start: int, length: int) -> None:
        if start + length > self.context:
            raise ShapeError(f"hyena: the filters have {self.context} positions; {start} + {length} tokens do not fit")


def _last(x: Tensor, length: int) -> Tensor:
    """The last positions of x[B T D]."""
    return getitem(x, key=(slice(None), slice(x.shape[1] - length, None)))


class Filters(Module):
    """filter(i) = window(i) ∘ network(features(i)) for lags i: ``count`` filters [T D], T up to the context; equation (7).

    The network's first weights come from N(0, filter_std²). All but its linear layers may be those of other filters, ``like``.
    """

    def __init__(self, rng: Random, context: int, width: int, count: int, options: FilterOptions, dtype,
                 like: Filters | None = None):
        hidden, depth, bands, std = options.filter_width, options.filter_depth, options.filter_bands, options.filter_std
        self.count = count
        position = np.arange(context)[:, None]
        time = position / max(context - 1, 1)

        def features() -> np.ndarray:
            angles = np.linspace(1e-4, max(bands - 1, 1e-4), bands) * 2 * np.pi * position / context
            return np.concatenate([time, np.cos(angles), -np.sin(angles)], axis=1)  # appendix D.3 [T 2K+1]

        def window() -> np.ndarray:
            slow, fast = (-math.log(0.01) / part for part in (options.slow_decay, options.fast_decay))
            decay = np.linspace(slow, fast, count * width)
            if options.window_order == "channels":
                decay = decay.reshape(width, count).T.reshape(-1)
            return np.exp(-time * decay) + options.window_shift  # figure 3.1 [T count·D]

        self._features_lr = options.features_lr
        if options.features_lr:  # what training adds
            self.features = full((context, 2 * bands + 1), 0, dtype) if like is None else like.features
        sizes = [2 * bands + 1, *[hidden] * (depth - 1)]
        self.layers = [Linear(rng.split(i), a, b, std=std, dtype=dtype) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
        self.out = Linear(rng.split(depth), hidden, count * width, std=std, bias=False, dtype=dtype)
        if like is not None:
            self.frequency, self.table, self.window = like.frequency, like.table, like.window
            return
        self.frequency = full((hidden,), options.sine_frequency, dtype)
        self.table = made(Buffer, (context, 2 * bands + 1), dtype, features, saved=False)  # [T 2K+1]
        shape = context, count * width
        self.window = made(Buffer, shape, dtype, window, saved=False) if options.window else None  # [T count·D]

    def __call__(self, length: int, start: int = 0) -> tuple[Tensor, ...]:
        lags = slice(start, start + length)
        x = Tensor.wrap(self.table.data[lags])  # [T 2K+1]
        if self._features_lr:
            learned = self.features if length == len(self.table.data) else self.features[lags]
            x = x + learned * self._features_lr
        for layer in self.layers:
            x = sin(layer(x) * self.frequency)  # [T M]
        filters = self.out(x)  # [T count·D]
        if self.window is not None:
            filters = filters * Tensor.wrap(self.window.data[lags])  # (7)
        return split(filters, sizes=self.count) if self.count > 1 else (filters,)


HYENA = Variant(
    name="hyena",
    summary="Hyena: gates and convolutions as long as the sequence, filters made by a network",
    paper="Poli et al. 2023, arXiv 2302.10866",
    mixer=Hyena,
    options=HyenaOptions,
    overrides=dict(positions="none"),
    # With half the paper's hidden size, small models have as many parameters as the Transformer within 5 %.
    presets={"tiny": dict(filter_width=32), "nanogpt-cpu": dict(filter_width=32)},
    fused="hyena",
    on_ranks="each rank gathers all positions of its block of channels before a long convolution, and gives them back after it",
    page=Page(
        formula="v ← h_o * a + d_o ∘ a with a = x^(N-1-o) ∘ v for o = 0 .. N-2, then y = (x⁰ ∘ v) Wᵀ; x⁰ … x^(N-1), v = "
                "split(short(u Wᵀ)); * is a causal convolution over all of T, h_o(i) = window(i) network(i)",
        cost="training, for each layer and sequence: O(N T D²) for the projections, which have (N + 2) D² weights; O(N T D "
             "log T) for the convolutions. Once for the whole batch: O(T M (M + N D)) for the filters, whose network of four "
             "matrices has M (2 K + 1 + 2 M + (N - 1) D) weights. Memory: O(N T D), filters and activations; the paper states "
             "none. Generating: for token t, O(N D²) for the projections and O((N - 1) t D) for the convolutions by direct "
             "sums, or O((N - 1) D log² t) on average in blocks",
        state="2 (N - 1) t D + 2 (N + 1) D numbers: past inputs, their sums for later positions, and the past of a short "
              "filter of 3 taps; with the N - 1 filters themselves, (N - 1) D numbers for every position of the context",
        operators=("long_conv", "causal_conv1d"),
        golden="the operator in PyTorch, as conv1d and by torch.fft, and whole mixers of orders 2 and 3 from torch's "
               "modules, with all gradients; the paper has no package",
        discrepancies=(
            "definition 3.1 has N long filters; the code and the experiments have N - 1, and a short one for all projections "
            "in place of the first: so it is here",
            "the term d is in the code alone; it is here",
            "appendix D.3 has the frequencies k = 0 ... K - 1 and the sine; the code has K steps from 10⁻⁴ to K - 1 and minus "
            "the sine, as here",
            "the paper adds a bias to the window (figure 3.1), its code adds 0: --window-shift, default 0",
            "with several long filters, the authors' two codes give them different windows: --window-order",
            "their code cuts sequences longer than its filters without a word; here they are an error",
            "their code learns the features with a rate of its own, 1e-5; here in proportion to --lr: --features-lr, 0 = fixed",
            "their recipe does not decay the weights of the filters' network; here matrices decay, as in every variant",
            "options of their code that fail or look ahead (num_heads, inner_factor, num_blocks) are left out",
        ),
        review="it gives the time O(N T d (log T + d)), "
               "which is right (proposition 3.2). Its space O(T d) is not in the paper and holds for a fixed order. It "
               "repeats that Hyena overtakes attention at 2048 tokens and FlashAttention between 4096 and 8192; this is a "
               "property of the kernels of that time",
    ),
)
