"""Attention sinks: a model that reads and writes without end in a memory of fixed size (Xiao et al. 2023, arXiv 2309.17453).

The paper calls its method StreamingLLM. It changes no weight: a Transformer that is trained already keeps the keys and values
of its first few tokens and of its most recent ones, and forgets those in between. Numbers in brackets name the paper's
equations.

The problem. A Transformer keeps the keys and values of all tokens so far. The cache grows with every token, and beyond the
length of its training the model fails anyway, because it meets distances that it has never seen. Two remedies are obvious.
Window attention keeps the last W keys and values: its memory is constant, but the loss explodes as soon as the very first
token leaves the cache. To compute the last W tokens anew for every token works, and costs O(W²) for each of them.

Why the window fails (section 3.1). The weights of a softmax sum to 1,

    SoftMax(x)_i = exp(x_i) / Σ_j exp(x_j)                                                             (1)

so a query that finds nothing of use must put its weight somewhere. Training lets it put the weight on the first tokens,
because they are the only ones that all queries see. The paper finds most weight there, above the bottom two layers, whatever
these tokens say. It calls them attention sinks. When they leave the cache, most of the denominator in (1) leaves with them, all
other weights become far too large, and the output is a mean that the model has never met. On a book of 65 000 tokens, Llama-2
of 13 billion parameters has a perplexity, which is better when lower, of 5158 with the last 1024 tokens in the cache. It has
5.40 with the first 4 and the last 1020, and 5.60 with four line breaks in place of the first 4 (Table 1).

The idea (section 3.2). Keep the keys and values of the first S tokens for ever. To the model, what it keeps is a text without a
gap: positions are counted in the cache, not in the text, so no distance is ever larger than in training.

What is lost. The context does not become longer. The model knows what is in the cache, and nothing of what has left it. The
output is not that of a model that reads the last W tokens anew, either: the keys in the cache were computed when older tokens
were still there, and depend on them.

How to choose. S = 4 is enough for models that were trained without a fixed first token. Llama-2 of 7 billion parameters has the
perplexity 3360 with S = 0, then 11.88, 10.51, 9.59 and 9.54 with S = 1, 2, 4 and 8. Falcon, MPT and Pythia need S = 1 only
(Table 2). W costs memory and time in proportion. A larger cache does not always lower the perplexity (Table 6), and a
model must not see more tokens than in training: C + 1 is the context at most, and one more with a learned token.

Sinks in training (section 3.3). A model can be given a place for the weight that it has no use for: --sink-kind.

- ``first-tokens``: as published, the S first tokens of the text. This is the default.
- ``learned-token``: one learned vector before the text, at position 0, which no answer is asked of. Then S = 1 suffices, and it
  is this vector: in the paper a model has the perplexity 18.01 with it, and without it 18.49 with S = 1 and 18.05 with S = 4
  (Table 3). The paper recommends it to all who train a model.
- ``zero``: a key and a value of zeros before the text. Its score is always 0, so the weights may sum to less than 1:

    SoftMax₁(x)_i = exp(x_i) / (1 + Σ_j exp(x_j))                                                       (2)

  In the paper it is no cure: a model trained so still needs its first tokens (Table 3).
- ``logit``: the same with exp(b) in place of 1, b learned for each head and 0 at first, as in gpt-oss. It is not in the paper.

    ours                                                             the paper's
    S                the first positions, which are never forgotten  sinks, start_size in its code
    W                recent tokens in the cache                      recent tokens, recent_size
    C = S + W        tokens in the cache; "4+1020" has C = 1024      cache size
    t                position of the newest token in the text        -
    B T D H K        batch, tokens, width, heads, channels a head    -
    q_t k_j v_j [K]  query of token t, key and value of token j      -
    R(m)             turns a query or key as at position m (RoPE)    rotary transformation
    b [H]            learned logits of the sink                      -

The layer (section 3.2). Token t sees itself, the W tokens before it and the S first ones. The newest token comes on top of the
cache, so it sees C + 1 tokens.

    token t sees token j if j ≤ t, and t - j ≤ W or j < S
    distance(t, j) = t - j for recent tokens, min(t, C) - j for j < S               positions in the cache
    score(t, j) = (R(distance) q_t) · k_j / √K
    y_t = Σ_j softmax_j(score(t, j)) v_j                                            (1), or (2) for another kind of sink

The paper keeps keys before they are turned, and turns all of them for every token by their places 0 .. C - 1 in the cache. Here
no key is turned twice. Recent keys are turned by their position in the text and sinks by 0 .. S - 1, once. The query is turned
twice, by t for the recent keys and by min(t, C) for the sinks, and the two results are merged by the logs of their softmax's
sums, which gives one softmax over all (minitv/ops/merge_attention/__init__.py). Because R(m) q · R(n) k depends on m - n alone,
these are the distances above. Positions in the text are counted from a base that moves on with the window, so that no angle
grows without end.

This is one function of the text, whichever way it is computed: the mask trains and evaluates all tokens at once, and the cache
reads and writes one after the other. That holds for any number of layers, because it holds in each. The gradients are those of
attention (minitv/ops/attention/__init__.py) and of merging; for the logit, db = -Σ_t P_t (g_t · y_t), where P_t is the weight
that token t leaves at the sink and g_t the gradient of y_t.

Training and writing. Without --window, the cache and the newest token are as long as the context. So training sees all tokens
of its context, as published, and only what is read or written beyond is streamed. A smaller --window is used in training too.
``minitv stream RUN --data FILE`` reads a text of any length, with this variant or with any trained Transformer whose positions
are relative (rope, alibi) or none.

Four tokens. W = 1 and S = 1, so C = 2. Queries, keys and values have one channel, and the scale is ln 2, so that exp(score) is
2^(q k). No position is turned.

    >>> import numpy as np
    >>> t, j = np.arange(4)[:, None], np.arange(4)
    >>> seen = (j <= t) & ((t - j <= 1) | (j < 1))
    >>> print(seen.astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 0 1 1]]
    >>> q, k, v = np.array([1., 1, 1, 1]), np.array([2., 0, 0, 1]), np.array([0., 6, 12, 3])
    >>> weights = 2 ** np.outer(q, k) * seen
    >>> print((weights @ v / weights.sum(axis=1)).round(3))  # (1)
    [0.    1.2   3.    2.571]

Token 3 does not see token 1. Its weights are 4 for the sink, 1 for token 2 and 2 for itself: (4 · 0 + 1 · 12 + 2 · 3) / 7.
Without the sink they are 1 and 2, and the output jumps to (12 + 6) / 3 = 6. The operator computes both, with the token itself
counted in its window:

    >>> from minitv.ops import attention
    >>> for sinks in (1, 0):
    ...     y, _ = attention(*(x[None, None, :, None] for x in (q, k, v)), scale=np.log(2), window=2, sinks=sinks)
    ...     print(y.numpy().ravel().round(3))
    [0.    1.2   3.    2.571]
    [0.  1.2 9.  6. ]

The places of the sink in the cache, min(t, C) - 0, are the distances at which tokens 0 .. 5 see it: the model never meets 3.

    >>> print(np.minimum(np.arange(6), 2))
    [0 1 2 2 2 2]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, broadcast_to, concat, reshape
from autograd.device import beside
from autograd.random import Random

from .. import variants
from ..config import check, option
from ..errors import UserError
from ..models.lm import LanguageModel
from ..nn import Buffer, Module, Parameter, Stateful, full, made, normal
from ..ops import attention, merge_attention, merge_heads, rope, split_heads
from ..options import ModelOptions
from ..variant import Page, Variant
from . import transformer

SINKS = 4  # first tokens that a model without a sink of its own keeps


@dataclass(frozen=True)
class SinkOptions(transformer.TransformerOptions):
    """attention-sinks"""

    window: int | None = option(
        None, "recent tokens in the cache, besides the sinks and the token itself; none = as many as the context has room for",
        low=1, high=2**20,
    )
    sinks: int | None = option(
        None, f"first positions that are never forgotten; none = {SINKS}, and 1 with a learned token", low=0, high=2**20
    )
    sink_kind: str = option(
        "first-tokens", "where a query leaves the weight that it has no use for: at the first tokens, as published; at a "
        "learned token before the text; at a key and a value of zeros (SoftMax1); at a learned logit of each head",
        choices=("first-tokens", "learned-token", "zero", "logit"),
    )

    __post_init__ = check

    def cache(self, context: int) -> tuple[int, int]:
        """Window and sinks of a model that is trained with ``context`` tokens; UserError if they do not fit."""
        learned = self.sink_kind == "learned-token"
        room = max(context - 1, 1) + learned  # what the last token of the context sees besides itself
        sinks = self.sinks
        if sinks is None:
            sinks = 1 if learned else min(SINKS, room // 2, self.window or room)
        window = room - sinks if self.window is None else self.window
        check_cache(window, sinks, room)
        if learned and not sinks:
            raise UserError("--sinks 0: the token of --sink-kind learned-token stands at the first position, and it is to be "
                            "kept, allowed: 1 or more")
        return window, sinks


def check_cache(window: int, sinks: int, room: int) -> None:
    """Raise UserError unless a model that is trained to see ``room`` tokens besides the newest can keep so many."""
    if sinks > window:
        raise UserError(f"--sinks {sinks}: the cache would have more sinks than recent tokens (--window {window}), allowed: 0 "
                        f"to {min(window, room // 2)}")
    if window + sinks > room:
        raise UserError(f"--window {window} and --sinks {sinks}: a token would see {window + sinks} others, and in training, "
                        f"by --context, it sees at most {room}, allowed: a window of 1 to {max(room - sinks, 1)}")


class Cache(NamedTuple):
    """Keys and values [B G n K] of the first tokens and of the most recent ones, at most S and W of them, and how many came.

    Turned keys of recent tokens are turned as if position ``base`` were 0.
    """

    first_keys: Tensor
    first_values: Tensor
    keys: Tensor
    values: Tensor
    position: int
    base: int


class Streamed(Stateful):
    """out = merge(y) Woᵀ for x[B T D], y as above, by the weights of an attention; the state has 2 C G K numbers of a sequence.

    ``layer`` is the attention of transformer.py or one of its kind, ``logit`` [H] the sink's, or None. T tokens at once cost
    O(T (S + W) D) besides the projections, and memory for T + C keys.
    """

    without_rope = without_alibi = None

    def __init__(self, layer: transformer.Attention, window: int, sinks: int, logit: Tensor | None = None):
        self.layer, self.window, self.sinks, self.logit = layer, window, sinks, logit

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        layer, rotation = self.layer, self.layer.rotation
        if rng is not None and not layer.dropout.p:
            rng = None
        q, k, v = self.project(x)
        longer = x.shape[1] > self.window + self.sinks + 1  # than what one token sees
        if longer and (rotation is not None or layer.slopes is not None):
            y, _ = self._read(q, k, v, self.init_state(x.shape[0]), rng)
        else:  # places in the cache are those in the text, or they do not matter
            if rotation is not None:
                q, k = rotation.queries(q), rotation.keys(k)
            mask = {"window": self.window + 1, "sinks": self.sinks} if longer else {}
            y, _ = attention(q, k, v, sink=self.logit, slopes=self._slopes, **mask, **self._dropped(rng, 0))  # (1), (2)
        return layer.dropout(layer.out(merge_heads([y])), rng and rng.split(2))  # [B T D]

    def init_state(self, batch: int) -> Cache:
        empty = self.layer.init_state(batch)
        return Cache(*empty[:2], *empty[:2], 0, 0)

    def prefill(self, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        y, state = self._read(*self.project(x), state)
        return self.layer.out(merge_heads([y])), state

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q[B H T K], k[B G T K] and v[B G T K], not turned yet."""
        return split_heads(self.layer.qkv(x), heads=self.layer.parts)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, state: Cache, rng: Random | None = None) -> tuple[Tensor, Cache]:
        """y [B H T K] of queries and keys that are not turned yet, and the cache after them."""
        rotation, start, count = self.layer.rotation, state.position, q.shape[2]
        first_keys, first_values, keys, values, _, base = state
        if rotation is not None and start - base > self.window:
            keys, base = rotation.moved(keys, base - start), start
        new = min(max(self.sinks - start, 0), count)  # tokens that are sinks
        if new:
            sinks = k[:, :, :new] if rotation is None else rotation.keys(k[:, :, :new], start)
            first_keys, first_values = _after(first_keys, sinks), _after(first_values, v[:, :, :new])
        near = q
        if rotation is not None:
            near, k = rotation.queries(q, start - base), rotation.keys(k, start - base)
        keys, values = _after(keys, k[:, :, new:]), _after(values, v[:, :, new:])
        y, lse = attention(near, keys, values, sink=self.logit, slopes=self._slopes, window=self.window + 1,
                           **self._dropped(rng, 0))
        if self.sinks:
            places = np.arange(start, start + count)
            kept = first_keys.shape[2]
            seen = None if start >= self.sinks else beside(np.arange(kept) <= places[:, None], q.data)  # [T S]
            places = np.minimum(places, self.window + self.sinks)  # in the cache
            far, lse_far = attention(self._placed(q, places), first_keys, first_values, seen, slopes=self._slopes, causal=False,
                                     **self._dropped(rng, 1))
            if self.layer.slopes is not None:  # the operator has placed query i at i + S - T: all its scores are off by as much
                lse_far = lse_far + reshape(self.layer.slopes, (-1, 1)) * Tensor.wrap(
                    beside((np.arange(count) + kept - count - places).astype(q.dtype), q.data))
            y, _ = merge_attention(y, lse, far, lse_far)
        old = max(keys.shape[2] - self.window, 0)
        return y, Cache(first_keys, first_values, keys[:, :, old:], values[:, :, old:], start + count, base)

    @property
    def _slopes(self) -> Any:
        """ALiBi's slopes [H], or None."""
        return None if self.layer.slopes is None else self.layer.slopes.data

    def _placed(self, q: Tensor, places: np.ndarray) -> Tensor:
        """Queries [B H T K] turned as at ``places`` [T]."""
        rotation = self.layer.rotation
        if rotation is None:
            return q
        positions = np.broadcast_to(places - rotation.centre, (q.shape[0], len(places)))
        return rope(q, beside(np.ascontiguousarray(positions), q.data), angles=rotation.angles, pairing=rotation.pairing,
                    gain=rotation.gain, growth=rotation.growth)

    def _dropped(self, rng: Random | None, part: int) -> dict[str, Any]:
        """The dropout of the weights of one part of the keys."""
        return {} if rng is None else {"dropout": self.layer.dropout.p, "seed": rng.split(part).seed}


def _after(past: Tensor, new: Tensor) -> Tensor:
    return concat([past, new], axis=2) if past.shape[2] and new.shape[2] else new if new.shape[2] else past


class SinkAttention(Streamed):
    """The Transformer's attention with the window and the sinks of the options.

    UserError if window and sinks do not fit into the context, or for positions that are added to the tokens of a text.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: SinkOptions, layer: int = 0, dtype=np.float32):
        check_positions(model.positions, f"--positions {model.positions}")
        logit = None
        if options.sink_kind == "logit":
            logit = full((options.heads,), 0, dtype)
        elif options.sink_kind == "zero":
            logit = made(Buffer, (options.heads,), dtype, lambda: np.zeros(options.heads, dtype), saved=False)
        super().__init__(transformer.Attention(rng, model, options, layer, dtype), *options.cache(model.context), logit)


class Preceded(Module):
    """The layers of a stack after a learned vector, which stands at position 0 and gives no output."""

    bounded = False

    def __init__(self, stack: Any, token: Parameter):
        self.stack, self.token = stack, token

    def __len__(self) -> int:
        return len(self.stack)

    def __getitem__(self, layer: int) -> Any:
        return self.stack[layer]

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.stack(self.preceded(x), rng)[:, 1:]

    def preceded(self, x: Tensor) -> Tensor:
        """[B T+1 D]: the vector, and x after it."""
        return concat([self._of(x.shape[0]), x], axis=1)

    def init_state(self, batch: int) -> tuple[Any, ...]:
        return self.stack.prefill(self._of(batch), self.stack.init_state(batch))[1]

    def prefill(self, x: Tensor, state: tuple, last: bool = False) -> tuple[Tensor, tuple]:
        return self.stack.prefill(x, state, last)

    def _of(self, batch: int) -> Tensor:
        """The vector for every sequence, [B 1 D]."""
        return broadcast_to(reshape(self.token, (1, 1, -1)), shape=(batch, 1, self.token.shape[0]))


class SinkModel(LanguageModel):
    """A language model that begins with a learned token, if the options say so."""

    def __init__(self, variant: Any, model: ModelOptions, options: SinkOptions, vocab: int, rng: Random,
                 dtype: Any = np.float32):
        super().__init__(variant, model, options, vocab, rng, dtype)
        if options.sink_kind == "learned-token":
            self.blocks = Preceded(self.blocks, normal(rng.split(6), (model.width,), model.init_std, dtype))


def check_positions(positions: str, label: str) -> None:
    """Raise UserError for positions that are added to tokens, which begins with ``label``."""
    if positions in ("learned", "sinusoidal"):
        raise UserError(f"{label}: a vector for each place of the text is in the keys already when a cache forgets some of "
                        "them, and cannot be changed to their places in the cache, allowed: rope, alibi, none")


def streams(variant: Variant) -> bool:
    """Whether a variant's attention can be streamed: a query sees all that is before it, or the cache of this page."""
    return variant.causal and (issubclass(variant.mixer, Streamed) or getattr(variant.mixer, "sees_all", False))


def cache_of(model: LanguageModel, window: int | None, sinks: int | None) -> tuple[int, int]:
    """Window and sinks for ``streaming``: where one is None, that of a model which has them, or else what fits its context."""
    own = next((module for module in model.modules() if isinstance(module, Streamed)), None)
    room = max(model.context - 1, 1) + isinstance(model.blocks, Preceded)
    if sinks is None:
        sinks = min(SINKS if own is None else own.sinks, room // 2, window or room)
    if window is None:
        window = max(room - sinks, 1) if own is None or own.sinks != sinks else own.window
    return window, sinks


def streaming(model: LanguageModel, window: int, sinks: int) -> LanguageModel:
    """A trained model with the same weights, whose attention keeps ``window`` recent tokens and the ``sinks`` first ones.

    UserError if its attention is of another kind, if its positions are learned or sines, or if it was trained to see fewer.
    """
    if not streams(model.variant):
        names = [name for name in variants.variants() if streams(variants.load(name))]
        raise UserError(f"--window: {model.variant.name} has no cache of keys and values that could be cut, allowed: "
                        f"{', '.join(names)}")
    check_positions(model.encoding, f"--window: this model was trained with --positions {model.encoding}")
    learned = isinstance(model.blocks, Preceded)
    check_cache(window, sinks, max(model.context - 1, 1) + learned)
    made: dict[int, Any] = {}

    def changed(part: Any) -> Any:
        """A copy of a module in which every attention is streamed; its arrays are the same."""
        if isinstance(part, list | tuple):
            return type(part)(map(changed, part))
        if not isinstance(part, Module):
            return part
        if id(part) not in made:
            if isinstance(part, Streamed):
                made[id(part)] = Streamed(part.layer, window, sinks, part.logit)
            elif isinstance(part, transformer.Attention):
                if getattr(part, "dynamic", False):
                    raise UserError("--window: the keys of --scaling dynamic-ntk turn by other angles when a text grows, and "
                                    "the text in a cache does not grow, allowed: a model with another scaling")
                made[id(part)] = Streamed(part, window, sinks)
            else:
                made[id(part)] = copy = object.__new__(type(part))
                copy.__dict__.update((name, changed(value)) for name, value in vars(part).items())
        return made[id(part)]

    return changed(model)


ATTENTION_SINKS = Variant(
    name="attention-sinks",
    summary="StreamingLLM: attention to the first tokens and to the recent ones, for texts without end in constant memory",
    paper="Xiao et al. 2023, arXiv 2309.17453",
    mixer=SinkAttention,
    options=SinkOptions,
    model=SinkModel,
    overrides=dict(positions="rope"),
    page=Page(
        formula="y_t = Σ_j softmax_j(R(d) q_t · k_j / √K) v_j in every head over the first S tokens, at the distances "
                "d = min(t, S + W) - j, and over the W recent ones and the token itself, at d = t - j",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights, and for the "
             "feed-forward network, which has 8 D²; O(T (S + W) D) for attention. Memory: O(T D). Reading or generating a "
             "token: O(D²) for the matrices and O((S + W) D) for attention, however long the text is",
        state="2 (S + W) D numbers in each layer, of fixed size: keys and values of the first S tokens and of the W recent "
              "ones. With S = 4, W = 59 and D = 128 these are 64 512 bytes in float32",
        operators=("attention", "merge_attention", "rope"),
        golden="a layer whose cache is that of the package attention_sinks 0.4.0 and whose keys are all turned anew for every "
               "token, with all gradients; gpt-oss's eager attention of the package transformers for the learned logit",
        discrepancies=(
            "the paper streams models that were trained as usual, and so does this variant without --window; with --window it "
            "is trained by the same mask that it is streamed by",
            "the paper's cache of 4+1020 tokens comes besides the newest token, and so does ours; its function for dialogues "
            "drops tokens before new ones arrive, so that a cache is shorter by them (evict_for_space)",
            "the paper keeps keys before they are turned, and turns them all for every token; here each is turned once and the "
            "query twice, which gives the same numbers",
            "the cache class of the package transformers, removed since, turned kept keys by differences of positions and left "
            "the newest at its place in the text, so that errors grew (its issues 31581, 33691, 35350)",
            "the paper's cache may be as long as the training context, so that the newest token sees one distance that "
            "training has not shown; here the cache and the newest token together are at most the context",
            "a learned logit for each head is not in the paper: gpt-oss and x-transformers have it",
        ),
        review="it says that StreamingLLM is similar to LongNet with learnable sinks at the beginning, which is wrong: "
               "there is no dilation, there are no segments, nothing needs to be trained, and the sinks are ordinary first "
               "tokens; a learned token is an option of the paper",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
@ATTENTION_SINKS.becomes("transformer", "the window is as long as the text")
def _(case, draw):
    """In one pass, and by the cache that it streams with."""
    one, other = case.model(window=case.sizes["T"] - 1, sinks=0), case.of("transformer", positions="rope")
    one.load({name.replace("mixer.", "mixer.layer."): array for name, array in other.state().items()})
    case.same(one, other, draw)
