"""LongNet: attention that is dense near by and thinner the farther it looks (Ding et al. 2023, arXiv 2307.02486).

The variant ``longnet`` is a language model. ``longnet-encoder`` sees both directions and guesses tokens that are hidden from it
(the task ``masked``). Numbers in brackets name the paper's equations.

The problem. In attention every token compares itself with all tokens before it, so T tokens cost T² comparisons. For a book
that is too much. A window of the nearest tokens costs T times its size, but nothing beyond it is seen.

The idea. A token needs its neighbours one by one, while of a distant region a sample will do. So take several patterns, each a
pair of numbers (w, r). A pattern cuts the text into segments of w tokens and keeps every r-th token of each segment. The tokens
that are kept attend to each other within their segment, all others leave this pattern out. The first pattern is short and keeps
everything, say (32, 1). The next are (64, 2), (128, 4) and so on (11), (12): each looks twice as far and keeps half as many
tokens. A text may have any length: its last segment is then shorter, and a segment that is longer than the text is all of it.

- Why it costs so little: of T tokens T / r are kept, and each sees at most w / r others. That makes T w / r² comparisons (16).
  With w_i = 32 · 2^i and r_i = 2^i this is 32 T, 16 T, 8 T, ..., together less than 64 T, however long the text is (18).
- Why no token is out of reach: a kept token reads every earlier kept token of its largest segment in one layer. A token that is
  not kept there is first read by a neighbour that is, in a shorter pattern, which takes one layer more. With each pattern the
  steps get twice as long, so the number of layers between two tokens grows with log T (20). In attention it is 1, with a window
  of w tokens T / w.
- Why heads are shifted: with r = 4 three of four tokens would never be kept. So head h starts at an offset s_h of its own: four
  heads keep four different quarters of the tokens, and the output matrix of the layer joins what they found.
- Why the patterns are weighted by their softmax sums: a pattern with keys that fit the query has a large sum. The weights need
  no parameters, and they turn all patterns together into one softmax. In it a key counts once for every pattern that shows it.
  Near keys are in several patterns, so they count more. In the paper these weights are better than learned constants
  (section 2.2).
- Why (w, 1) should be among the patterns: in it every token sees at least itself. Without it a head gives 0 at all tokens that
  no pattern keeps.

What is lost. A token far away is read directly by one head in r at most, and only by tokens at the same offset. Segments are
fixed: the first token of a segment sees the one before it only if a longer segment contains both. Nothing passes the border of
the longest segment: a text longer than that is read in independent parts. In the paper, models trained on 32K tokens of source
code have a perplexity, which is better when lower, of 3.01 at 32K tokens and 4.37 at 2K. Sparse attention (Child et al. 2019)
has 3.64 and 5.15. A Transformer trained on 2K tokens has 4.24 at 2K and 11.29 at 32K (Table 2).

How to choose. The first segment says how many neighbours a token sees one by one; time grows with it. Segments and dilations
should grow by one factor, so that time stays proportional to T, and the longest segment should hold the whole context. The
default is such patterns, with 32 as the first segment. If there are fewer heads than the largest dilation, its pattern leaves
out the tokens at the offsets that no head has. The paper's models have five patterns, from (2048, 1) to (32768, 12). They learn
from source code, in 300 000 steps of half a million tokens each (section 4.1).

    ours                                                       the paper's
    B T D H             batch, tokens, width, heads            -, N, d, h
    K = D / H           channels of a query, key or value      d
    w_i, r_i            segment and dilation of pattern i      w_i, r_i
    s_h                 offset of head h                       s_j of head j
    y_i [T K], Z_i [T]  output of a pattern, its softmax's sum O of (r_i, w_i), and s_i in (10)
    α_i [T]             weight of a pattern                    α_i
    C [T T]             in how many patterns p sees j          -
    S [T T]             scores q_p · k_j / √K                  Q Kᵀ

The layer:

    q, k, v = split(x Wqkvᵀ)
    A_i(p) = {j ≤ p in the segment of p : (j mod w_i) mod r_i = s_h}     (3) to (5), (13) to (15), with s_h = h mod r_i; it is
                                                                         empty unless (p mod w_i) mod r_i = s_h: p is kept
    y_i = Σ_{j ∈ A_i} exp(S_pj) v_j / Z_i,   Z_i = Σ_{j ∈ A_i} exp(S_pj) (6) to (8); y_i = 0 where A_i is empty
    y = Σ_i α_i y_i,   α_i = Z_i / Σ_n Z_n                               (9), (10)
      = Σ_j C_pj exp(S_pj) v_j / Σ_j C_pj exp(S_pj)                      the same as one softmax
    out = merge(y) Woᵀ                                                   heads side by side, then one matrix

The condition j ≤ p keeps ``longnet`` causal; ``longnet-encoder`` has all j of the segment. The mixture, its gradient and the
algorithm for several machines, (21) to (25), are in minitv/ops/dilated_attention/__init__.py. There each machine has a part of
the text, and gathers of the others' keys and values only those that a pattern keeps: what it receives does not grow with the
text.

Writing. The cache has the keys and values from the beginning of the longest segment on. A new token reads those that its
patterns show, so writing gives what one pass over the text gives. A token that begins a new segment in all patterns sees itself
alone, and all that was in the cache is dropped.

Four tokens. One head with K = 2, V = 1 and s = 0. The scale is ln 2, so that exp(S) = 2^(q · k). The patterns are (2, 1), whose
segments are tokens 0 1 and 2 3, and (4, 2), which keeps tokens 0 and 2.

    >>> import numpy as np
    >>> q, k = np.array([[1., 0], [1, 1], [0, 2], [1, 0]]), np.array([[1., 0], [0, 1], [1, 1], [0, 0]])
    >>> v = np.array([[4.], [8], [2], [6]])
    >>> near = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])  # what (2, 1) shows
    >>> far = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])  # what (4, 2) shows
    >>> Z = [(pattern * 2 ** (q @ k.T)).sum(axis=1, keepdims=True) for pattern in (near, far)]
    >>> print(Z[0].ravel(), Z[1].ravel())
    [2. 4. 4. 3.] [2. 0. 5. 0.]
    >>> parts = [(pattern * 2 ** (q @ k.T)) @ v / np.maximum(z, 1) for pattern, z in zip((near, far), Z)]
    >>> print(parts[0].ravel().round(3), parts[1].ravel().round(3))
    [4.    6.    2.    3.333] [4.  0.  2.4 0. ]
    >>> print(((Z[0] * parts[0] + Z[1] * parts[1]) / (Z[0] + Z[1])).ravel().round(3))
    [4.    6.    2.222 3.333]

Token 2 sees itself in both patterns, and token 0 in the second one: (4 · 2 + 5 · 2.4) / 9 = 2.222. As one softmax, in which its
own key counts twice:

    >>> weights = (near + far) * 2 ** (q @ k.T)
    >>> print(weights[2], (weights[2] @ v / weights[2].sum()).round(3))
    [1. 0. 8. 0.] [2.222]

The operator in all its forms:

    >>> from autograd import use
    >>> from minitv.ops import dilated_attention
    >>> for form in ("mixture", "counted", "distributed"):
    ...     with use(kernel="none"), use("dilated_attention", form=form):
    ...         arrays = (x[None, None] for x in (q, k, v))
    ...         y, lse = dilated_attention(*arrays, segments=(2, 4), dilations=(1, 2), scale=np.log(2))
    ...     print(form, y.numpy().ravel().round(3), np.exp(lse.numpy()).ravel().round(3))
    mixture [4.    6.    2.222 3.333] [4. 4. 9. 3.]
    counted [4.    6.    2.222 3.333] [4. 4. 9. 3.]
    distributed [4.    6.    2.222 3.333] [4. 4. 9. 3.]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from autograd import Tensor, concat
from autograd.random import Random

from .. import blocks
from ..config import option
from ..errors import UserError, quoted
from ..models.encoder import Encoder
from ..nn import norm_of
from ..ops import dilated_attention, merge_heads
from ..ops.attention import OFFSETS
from ..ops.dilated_attention import between_shares, detached
from ..ops.rope import Rotation, xpos_growth
from ..options import ModelOptions
from ..sequence import position, share
from ..variant import Page, Variant
from . import transformer

FIRST = 32  # the shortest segment of the default patterns


@dataclass(frozen=True)
class EncoderOptions(transformer.TransformerOptions):
    """longnet-encoder"""

    segments: str | None = option(
        None, f"patterns segment:dilation, separated by commas; none = {FIRST}:1,{2 * FIRST}:2,{4 * FIRST}:4 and so on up to "
        f"the context; lists for each layer are separated by /, such as {FIRST}:1/{2 * FIRST}:2 for two layers",
        metavar="W:R,...",
    )
    offsets: str = option(
        "modulo", "where the positions begin that head h keeps: the paper's h mod dilation, or the same offset for heads that "
        "follow each other, as in torchscale",
        choices=OFFSETS,
    )
    detach_mixture: bool = option(
        False, "the weights of the patterns count as constants in the backward pass, as in torchscale: this is not the gradient"
    )
    sub_norm: bool = option(
        False, "one more norm inside attention and feed-forward network, before their output matrix, as in the paper's models"
    )


@dataclass(frozen=True)
class LongNetOptions(EncoderOptions):
    """longnet"""

    xpos: bool = option(False, "queries and keys also grow and shrink with the position, so that far products fade: xPos, as "
                        "in the paper's models")


def patterns(text: str | None, context: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The segments and the dilations of a list such as 32:1,64:2, or of the default for a context; UserError."""
    if text is None:
        rungs = max((context - 1) // FIRST, 0).bit_length() + 1
        return tuple(FIRST << i for i in range(rungs)), tuple(1 << i for i in range(rungs))
    pairs = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*0*[1-9]\d{0,8}:0*[1-9]\d{0,8}\s*", part, re.ASCII):
            raise UserError(f"--segments: {quoted(part.strip())} in {quoted(text)} is no pattern, allowed: segment:dilation "
                            "with integers from 1, several separated by commas, such as 32:1,64:2,128:4")
        w, r = map(int, part.split(":"))
        if w % r:
            raise UserError(f"--segments: the dilation {r} does not divide the segment {w}, allowed: a dilation that divides "
                            f"its segment, such as {w}:{max(n for n in range(1, min(r, w) + 1) if w % n == 0)}")
        pairs.append((w, r))
    segments, dilations = zip(*pairs, strict=True)
    return segments, dilations


def of_layer(text: str | None, model: ModelOptions, layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The segments and the dilations of a layer, where a text may have a list of patterns for each layer; UserError."""
    lists = [text] if text is None else text.split("/")
    if len(lists) not in (1, model.layers):
        raise UserError(f"--segments: {quoted(text)} has {len(lists)} lists of patterns, allowed: one for all layers, or one "
                        f"for each of the {model.layers} layers, separated by /")
    return patterns(lists[layer % len(lists)], model.context)


class State(NamedTuple):
    """Keys and values [B H S K] from the beginning of the longest segment of the last position on, and how many were read."""

    keys: Tensor
    values: Tensor
    position: int


class Dilated(transformer.Attention):
    """out = merge(y) Woᵀ for x[B T D], where y is dilated attention of q, k, v = split(x Wqkvᵀ); state at most 2 B w D.

    The first weights are those of the Transformer's attention. While training, the output is dropped with the model's
    probability. UserError if the heads do not divide the width, or if a list of patterns is wrong.
    """

    without_alibi = "its patterns have no biases of distance"
    sees_all = False

    def __init__(self, rng: Random, model: ModelOptions, options: EncoderOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        self.segments, self.dilations = of_layer(options.segments, model, layer)
        self.offsets, self.detaches = options.offsets, options.detach_mixture
        self.norm = norm_of(model, model.width, dtype) if options.sub_norm else None

    def turning(self, width: int, model: ModelOptions, options: EncoderOptions) -> Rotation | None:
        rotation = super().turning(width, model, options)
        if not getattr(options, "xpos", False):
            return rotation
        if rotation is None:
            raise UserError(f"--xpos: it changes how queries and keys are turned, and --positions is {model.positions}, "
                            "allowed: --positions rope")
        return replace(rotation, growth=xpos_growth(width), centre=model.context // 2)  # both growths are small near the middle

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._mixed(*self._heads(x, position()), 0), rng)

    def init_state(self, batch: int) -> State:
        return State(*super().init_state(batch), 0)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, state.position)
        keys, values = concat([state.keys, k], axis=2), concat([state.values, v], axis=2)  # [B H S K]
        start, after = state.position - state.keys.shape[2], state.position + x.shape[1]
        y = self._mixed(q, keys, values, start)
        seen = min(max(after - 1, 0) // w * w for w in self.segments) - start  # later positions see no key before this one
        return y, State(keys[:, :, seen:], values[:, :, seen:], after)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """The output [B T D] of queries and of keys and values from position ``start`` on."""
        params = dict(segments=self.segments, dilations=self.dilations, offsets=self.offsets, causal=self.causal)
        if (part := share()) is not None:
            y = between_shares(q, k, v, part, **params, detaches=self.detaches)
        else:
            y, _ = (detached if self.detaches else dilated_attention)(q, k, v, start=start, **params)
        y = merge_heads([y])
        return self.out(y if self.norm is None else self.norm(y))


class Bidirectional(Dilated):
    """The same without a mask: kept tokens of a segment see each other in both directions."""

    causal = False


class FeedForward(blocks.FeedForward):
    """y = f(x W₁ᵀ) W₂ᵀ, with ``sub_norm`` norm(f(x W₁ᵀ)) W₂ᵀ."""

    def __init__(self, rng: Random, model: ModelOptions, options: EncoderOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        hidden = self.down.weight.shape[1]
        self.norm = norm_of(model, hidden, dtype) if options.sub_norm else None

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        h = self.hidden(x)
        return self.dropout(self.down(h if self.norm is None else self.norm(h)), rng)


COST = ("training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights, and for the feed-forward "
        "network, which has 8 D²; O(T D Σ w_i / r_i²) for attention, which is O(T D) if segments and dilations grow by one "
        "factor. Memory: O(T D). On the CPU it does not grow with the number of patterns, because all of them add to one "
        "output; on a GPU the output of each pattern is kept for the backward pass. ")

ON_RANKS = "ranks exchange the keys and values that patterns longer than a share keep"

LONGNET = Variant(
    name="longnet",
    summary="Dilated attention: patterns that look farther at fewer tokens, mixed as one softmax",
    paper="Ding et al. 2023, arXiv 2307.02486",
    mixer=Dilated,
    options=LongNetOptions,
    channel=FeedForward,
    overrides=dict(positions="rope"),
    on_ranks=ON_RANKS,
    page=Page(
        formula="y_p = Σ_j C_pj exp(q_p · k_j / √K) v_j / Σ_j C_pj exp(q_p · k_j / √K) in every head, where C_pj is the number "
                "of patterns (w, r) in which token p sees token j ≤ p: same segment of w tokens, both at the head's offset "
                "modulo r",
        cost=COST + "Generating a token: O(D²) for the matrices, at most O(D Σ w_i / r_i) for attention, which is O(D) for "
                    "each pattern and so O(D log T) if both grow by one factor, and at most O(w D) to copy the cache with the "
                    "new token behind it, w the longest segment",
        state="at most 2 w D numbers in each layer, w the longest segment: keys and values from the beginning of the current "
              "one on; those of the one before are dropped. With w = 256 and D = 128 these are 256 KiB in float32",
        operators=("dilated_attention", "rope"),
        golden="the dilated attention of torchscale's repository with its offsets, a whole layer with all gradients, of which "
               "the weights of the patterns are detached and not; and gathered positions in PyTorch for the paper's offsets",
        discrepancies=(
            "head h keeps positions from the offset h mod r on in the paper, from ⌊h / ⌈H / r⌉⌋ on in torchscale: --offsets",
            "torchscale computes the weights of the patterns without a gradient, so that queries and keys get a wrong one: "
            "--detach-mixture; here the gradient is that of the formula",
            "torchscale takes a sum of exactly 1 (a logarithm of 0) for the sign that a token is not kept, and drops it; here "
            "such a token counts",
            "torchscale fills up segments with zeros that are not masked, which is wrong without a causal mask if w does not "
            "divide T; here there is nothing to fill up",
            "the dilation must divide the segment in --segments, so that two patterns of the paper's models, 16384:6 and "
            "32768:12, are not allowed; the operator takes any two numbers",
            "the paper leaves the factor 1/√K out of (1) and (6); its code has it",
            "the paper's models have patterns 2048:1, 4096:2, 8192:4, 16384:6 and 32768:12, and 12 layers of width 768 with 12 "
            "heads. The rest is the Transformer MAGNETO (Wang et al. 2022), which has a second norm in each half of a block "
            "(--sub-norm), with positions by xPos (--xpos). MAGNETO's first weights are not offered",
            "for several machines the released code gathers keys of earlier machines only, so that the first one attends to "
            "zeros; here the result does not depend on their number",
            "a key that several patterns show counts several times, in the paper's formula as in the code",
        ),
        review="its time O(T d) is right for growing segments and dilations. Its space O((T/r) log(T/r) d) is not in the "
               "paper, where the log belongs to the number of layers between two tokens: the space is O(T d). A billion tokens "
               "is right for the time of a forward pass on many machines; language models are reported up to 32K. It says that "
               "segments and dilations grow from layer to layer; in the paper they grow from pattern to pattern, and all "
               "layers have the same: --segments with a list for each layer tries the other",
    ),
)

LONGNET_ENCODER = Variant(
    name="longnet-encoder",
    summary="Dilated attention in both directions, for hidden tokens",
    paper="Ding et al. 2023, arXiv 2307.02486",
    mixer=Bidirectional,
    options=EncoderOptions,
    channel=FeedForward,
    model=Encoder,
    overrides=dict(positions="rope"),
    on_ranks=ON_RANKS,
    page=Page(
        formula="y_p = Σ_j C_pj exp(q_p · k_j / √K) v_j / Σ_j C_pj exp(q_p · k_j / √K) in every head, where C_pj is the number "
                "of patterns (w, r) in which tokens p and j see each other: same segment of w tokens, both at the head's "
                "offset modulo r",
        cost=COST + "It does not generate",
        state="none: it sees a whole sequence at once",
        operators=("dilated_attention", "rope"),
        golden="gathered positions in PyTorch, in both directions, forward and gradients",
        discrepancies=(
            "the paper trains language models alone; torchscale's encoder has the same attention without the mask",
            "xPos is for a causal mask, so --xpos is not offered",
        ),
        review="it does not speak of encoders",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
@LONGNET.becomes("transformer", "one segment holds the text, without dilation")
def _(case, draw):
    one, other = case.model(segments=f"{case.sizes['T']}:1"), case.of("transformer", positions="rope")
    other.load(one.state())
    case.same(one, other, draw)


@LONGNET_ENCODER.becomes("encoder", "one segment holds the text, without dilation")
def _(case, draw):
    one, other = case.model(segments=f"{case.sizes['T']}:1"), case.of("encoder", positions="rope")
    other.load(one.state())
    case.same(one, other, draw)
