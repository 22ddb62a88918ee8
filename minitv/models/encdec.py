"""EncoderDecoder: a source and the target so far to the logits of the target's next token.

The encoder reads the whole source, in both directions, and gives the memory m, a vector for each token of the source. The
decoder writes the target from left to right. Each of its layers looks at the target so far and, by cross-attention, at the
memory (Vaswani et al. 2017, arXiv 1706.03762, sections 3.1 and 3.2.3). minitv/variants/one_wide_ffn.py tells why, what it costs
and how it is trained.

    x = √D embed[source] + p;  every layer:  x ← x + self(norm(x)),  x ← x + ffn(norm(x));  m = norm(x)
    y = √D embed[target] + p;  every layer:  y ← y + self(norm(y)),  y ← y + cross(norm(y), m),  y ← y + ffn(norm(y))
    logits = norm(y) Wᵀ

Both sides have one embedding. The head W is the embedding too when it is tied (section 3.4). The positions p are sines (section
3.5), the same on both sides. With --positions learned they are learned for each side, without √D; with rope, self turns its
queries and keys instead, and cross has no positions of its own. A layer may have no feed-forward network, and layers may have
one in common: the options of a variant say so in a Plan.

The last id of the vocabulary is the end sign: it ends each sequence, and begins each target. Rows of ids of different lengths
are filled with PADDING behind their ends:

    source    3 1 4 # - -        # is the end sign, - is PADDING
    target    # 4 1 3 - -        what the decoder reads: place t sees the places up to t, and gives the logits of the next token
    answers   4 1 3 # - -        where the target is padded, none is asked

No position that holds a token sees a padded one. In the source a mask hides it, ``seen``; in the target it stands behind all
tokens, where the causal mask of self hides it. So padding changes no output and no gradient.

The source is read once, however long the target becomes: each layer's keys and values of the memory are computed when writing
begins, and stay in the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, embedding, no_grad, reshape, to_numpy
from autograd.device import beside, namespace
from autograd.random import Random

from ..blocks import FeedForward
from ..nn import Dropout, Embedding, Linear, Module, Stateful, norm_of, normal
from ..ops import attention, merge_heads, split_heads
from ..options import ModelOptions
from ..report import count
from ..stack import check_positions
from .encoder import Encoder, sines

PADDING = -1  # an id where a row has ended

KeysValues = tuple[Tensor, Tensor]  # each [B H S K]


class Plan(NamedTuple):
    """What the layers are made of: the self-attention of the readers and of the writers, which are the layers of the two sides,
    and the number of each layer's feed-forward network, or None.

    Layers with the same number have one network in common. Network n has ``factors[n]`` times the hidden size of the model.
    """

    reader: type[Stateful]
    writer: type[Stateful]
    encoder: list[int | None]
    decoder: list[int | None]
    factors: list[float]


class Network(FeedForward):
    """A FeedForward with ``factor`` times the hidden size f of the model.

    Its W₂ starts from N(0, output_std² / factor), so that the first output has the same size whatever the factor is.
    """

    def __init__(self, rng: Random, model: ModelOptions, factor: float, dtype: Any = np.float32):
        hidden = max(1, round(factor * max(1, round(model.ffn_multiple * model.width))))
        kwargs = dict(bias=model.bias, dtype=dtype)
        self.up = Linear(rng.split(0), model.width, hidden, std=model.init_std, **kwargs)
        self.down = Linear(rng.split(1), hidden, model.width, std=model.output_std / math.sqrt(factor), **kwargs)
        if model.ffn_gate:
            self.gate = Linear(rng.split(2), model.width, hidden, std=model.init_std, **kwargs)
        self._finish(model)


class CrossAttention(Module):
    """out = merge(softmax(q kᵀ / √K) v) Woᵀ, q = y Wqᵀ of the target, k and v = split(m Wkvᵀ) of the memory, section 3.2.3."""

    def __init__(self, rng: Random, model: ModelOptions, heads: int, dtype: Any = np.float32):
        width, kwargs = model.width, dict(bias=model.bias, dtype=dtype)
        model.head_dim(heads)
        self.heads = heads
        self.q = Linear(rng.split(0), width, width, std=model.init_std, **kwargs)
        self.kv = Linear(rng.split(1), width, 2 * width, std=model.init_std, **kwargs)
        self.out = Linear(rng.split(2), width, width, std=model.output_std, **kwargs)
        self.dropout = Dropout(model.dropout)

    def read(self, memory: Tensor) -> KeysValues:
        """Keys and values [B H S K] of the memory [B S D], the same for every token of the target."""
        return split_heads(self.kv(memory), heads=(self.heads, self.heads))

    def __call__(self, y: Tensor, known: KeysValues, seen: Any = None, rng: Random | None = None) -> Tensor:
        """[B T D] for y [B T D]; ``seen`` [B 1 1 S] is False where the source is padded."""
        (q,) = split_heads(self.q(y), heads=(self.heads,))
        dropping = {} if rng is None or not self.dropout.p else dict(dropout=self.dropout.p, seed=rng.split(0).seed)
        mixed, _ = attention(q, *known, mask=seen, causal=False, **dropping)  # [B H T K]
        return self.dropout(self.out(merge_heads([mixed])), rng and rng.split(1))


class Reader(Module):
    """A layer of the encoder: x ← x + mixer(norm(x)), x ← x + ffn(norm(x)). The mixer is self-attention without causality."""

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: FeedForward | None, dtype: Any):
        self.norm1, self.mixer = _norm(model, dtype), mixer
        self.norm2, self.ffn = _norm(model, dtype) if ffn else None, ffn

    def __call__(self, x: Tensor, seen: Any, rng: Random | None) -> Tensor:
        x = x + self.mixer(self.norm1(x), rng and rng.split(0), seen)
        return x if self.ffn is None else x + self.ffn(self.norm2(x), rng and rng.split(1))


class Writer(Module):
    """A layer of the decoder: y ← y + mixer(norm(y)), y ← y + cross(norm(y), m), y ← y + ffn(norm(y)).

    The mixer is causal self-attention. The call has the whole target; ``prefill`` has the part that follows the state.
    """

    def __init__(self, model: ModelOptions, mixer: Stateful, cross: CrossAttention, ffn: FeedForward | None, dtype: Any):
        self.norm1, self.mixer = _norm(model, dtype), mixer
        self.norm2, self.cross = _norm(model, dtype), cross
        self.norm3, self.ffn = _norm(model, dtype) if ffn else None, ffn

    def __call__(self, y: Tensor, memory: Tensor, seen: Any, rng: Random | None) -> Tensor:
        y = y + self.mixer(self.norm1(y), rng and rng.split(0))
        return self._rest(y, self.cross.read(memory), seen, rng)

    def prefill(self, y: Tensor, past: Any, known: KeysValues, seen: Any) -> tuple[Tensor, Any]:
        """The same of a part of the target that continues the mixer's state ``past``, and the state after it."""
        mixed, past = self.mixer.prefill(self.norm1(y), past)
        return self._rest(y + mixed, known, seen, None), past

    def _rest(self, y: Tensor, known: KeysValues, seen: Any, rng: Random | None) -> Tensor:
        y = y + self.cross(self.norm2(y), known, seen, rng and rng.split(1))
        return y if self.ffn is None else y + self.ffn(self.norm3(y), rng and rng.split(2))


class State(NamedTuple):
    """What a decoder remembers between two tokens: 2 (S + t) D numbers in each layer and row."""

    position: int  # t, how many tokens of the target have been read
    seen: Any  # [B 1 1 S], False where the source is padded; None where it is not
    pasts: tuple[Any, ...]  # of each layer: its mixer's state, which grows with every token
    known: tuple[KeysValues, ...]  # of each layer: keys and values of the memory, which stay


class Hypothesis(NamedTuple):
    """A target without its end sign, the sum of its log-probabilities, and the score by which a beam ranks it."""

    ids: np.ndarray
    log_probability: float
    score: float


class Sizes(NamedTuple):
    """What a model is made of, and what it costs.

    The last three count products with weights, each of them one multiplication and one addition.
    """

    unique: int  # every weight once
    executed: int  # every weight as often as layers use it
    encoder: int  # for each token of the source
    memory: int  # for each token of the source: keys and values in all layers of the decoder
    decoder: int  # for each token of the target, the head among them


class EncoderDecoder(Encoder):
    """A model of pairs: logits [B T V] of a source [B S] and a target [B T], which begins with the end sign.

    ``options`` are the variant's own: ``heads``, and ``plan(model)`` for the layers.
    """

    reads: ClassVar[str] = "pairs of sequences"
    writing: ClassVar[str] = ("an answer to a source, token after token, with keys and values of both in the state; greedy, "
                              "drawn, or the best of a beam (minitv sample DIR --prompt SOURCE --beam N)")

    def __init__(self, variant: Any, model: ModelOptions, options: Any, vocab: int, rng: Random, dtype: Any = np.float32):
        self.variant, self.context, self.encoding, self.end = variant, model.context, model.positions, vocab - 1
        plan, std = options.plan(model), model.init_std
        self.embed = Embedding(rng.split(0), vocab, model.width, std=std, dtype=dtype)
        self.bounded = model.positions == "learned"
        self.source_positions, self.target_positions = (
            normal(rng.split(1, side), (model.context, model.width), std, dtype) if self.bounded else None for side in range(2))
        self.dropout = Dropout(model.dropout)
        networks = [Network(rng.split(2, n), model, factor, dtype) for n, factor in enumerate(plan.factors)]

        def made(kind: type[Stateful], side: int, layer: int) -> Stateful:
            mixer = kind(rng.split(3, side, layer), model, options, layer, dtype)
            check_positions(variant.name, model, mixer)
            return mixer

        def network(number: int | None) -> Network | None:
            return None if number is None else networks[number]

        self.encoder = [Reader(model, made(plan.reader, 0, i), network(n), dtype) for i, n in enumerate(plan.encoder)]
        self.memory_norm = _norm(model, dtype)
        self.decoder = [Writer(model, made(plan.writer, 1, i), CrossAttention(rng.split(5, i), model, options.heads, dtype),
                               network(n), dtype) for i, n in enumerate(plan.decoder)]
        self.norm = _norm(model, dtype)
        self.head = self.embed if model.tied else Embedding(rng.split(4), vocab, model.width, std=std, dtype=dtype)

    # -- at once

    def __call__(self, source: np.ndarray, target: np.ndarray, rng: Random | None = None, at: np.ndarray | None = None
                 ) -> Tensor:
        """Logits [B T V] for sources [B S] and targets [B T]; ``rng`` switches dropout on.

        ``at`` asks for some positions of the targets alone, N indices into the B T positions row by row, and gets logits [N V].
        """
        memory, seen = self.encode(source, rng and rng.split(0))
        y, rng = self._entered(target, 0, self.target_positions, rng and rng.split(1)), rng and rng.split(2)
        for i, layer in enumerate(self.decoder):
            y = layer(y, memory, seen, rng and rng.split(i))
        if at is not None:
            y = embedding(reshape(y, (-1, y.shape[2])), beside(at, y.data))  # [N D]
        return self.logits(y)

    def encode(self, source: np.ndarray, rng: Random | None = None) -> tuple[Tensor, Any]:
        """The memory [B S D] of sources [B S], and which of its positions are seen [B 1 1 S]: None for all of them."""
        x, rng = self._entered(source, 0, self.source_positions, rng and rng.split(0)), rng and rng.split(1)
        seen = np.asarray(source) >= 0 if isinstance(source, list) else source >= 0  # [B S]
        seen = None if seen.all() else beside(seen[:, None, None], self.embed.weight.data)
        for i, layer in enumerate(self.encoder):
            x = layer(x, seen, rng and rng.split(i))
        return self.memory_norm(x), seen

    def _entered(self, ids: np.ndarray, start: int, positions: Tensor | None, rng: Random | None = None) -> Tensor:
        """What the first layer of a side reads, [B T D], of ids [B T] at the positions from ``start`` on."""
        ids = self.checked(ids, start)
        x = self.embed(namespace(ids).where(ids < 0, 0, ids))
        stop = start + ids.shape[1]
        if self.encoding == "sinusoidal":
            x = x * math.sqrt(x.shape[2]) + Tensor.wrap(beside(sines(start, stop, x.shape[2], x.dtype), x.data))
        if positions is not None:
            x = x + positions[start:stop]
        return self.dropout(x, rng)

    # -- in parts

    def begin(self, source: np.ndarray) -> State:
        """The state before the first token of the targets of sources [B S]."""
        memory, seen = self.encode(source)
        pasts = tuple(layer.mixer.init_state(memory.shape[0]) for layer in self.decoder)
        return State(0, seen, pasts, tuple(layer.cross.read(memory) for layer in self.decoder))

    def prefill(self, target: np.ndarray, state: State, last: bool = False) -> tuple[Tensor, State]:
        """Logits [B T V] of a part of the targets that continues ``state``, or of its last token; and the state after it."""
        y, pasts = self._entered(target, state.position, self.target_positions), []
        for layer, past, known in zip(self.decoder, state.pasts, state.known, strict=True):
            y, past = layer.prefill(y, past, known, state.seen)
            pasts.append(past)
        logits = self.logits(y[:, -1:] if last else y)
        return logits, state._replace(position=state.position + target.shape[1], pasts=tuple(pasts))

    def given(self, source: np.ndarray) -> Given:
        """The language model of the targets of a source [S]."""
        return Given(self, np.asarray(source, np.intp)[None])

    # -- answers

    def greedy(self, source: np.ndarray, limit: int) -> list[np.ndarray]:
        """The targets of sources [B S], at most ``limit`` tokens each, every one the likeliest after those before it."""
        with no_grad():
            state, rows = self.begin(source), len(source)
            last, ends, tokens = np.full((rows, 1), self.end), np.full(rows, limit), []
            for length in range(limit):
                logits, state = self.prefill(last, state)
                last = to_numpy(logits.data[:, -1]).argmax(-1)[:, None]  # [B 1]
                tokens.append(last)
                ends = np.where((last[:, 0] == self.end) & (ends == limit), length, ends)
                if (ends <= length).all():
                    break
        ids = np.concatenate([np.empty((rows, 0), np.intp), *tokens], axis=1)  # [B T]
        return [row[:end] for row, end in zip(ids, ends, strict=True)]

    def beam(self, source: np.ndarray, size: int, limit: int, penalty: float = 1.0) -> list[Hypothesis]:
        """The best targets of a source [S] that a beam of ``size`` finds, at most ``limit`` tokens each, the best first.

        The score of a target with n tokens, its end sign among them, is the sum of their log-probabilities divided by
        n^penalty: without it, short targets win. At every step the ``size`` likeliest continuations are looked at: those that
        end are complete, and the likeliest others go on. It stops with ``size`` complete ones. Where none is complete at the
        limit, those that are not stand for them. A beam of 1 is ``greedy``.
        """
        complete: list[Hypothesis] = []
        ids, sums = np.full((1, 1), self.end), np.zeros(1)  # of the live ones [N 1 + T] and [N]
        with no_grad():
            state = self.begin(np.asarray(source, np.intp)[None])
            for length in range(1, limit + 1):
                logits, state = self.prefill(ids[:, -1:], state)
                scores = to_numpy(logits.data[:, -1]).astype(np.float64)  # [N V]
                scores -= scores.max(axis=1, keepdims=True)
                totals = sums[:, None] + scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
                order = np.argsort(-totals, axis=None, kind="stable")[: 2 * size]  # of which at most N are ends
                rows, tokens = np.divmod(order, totals.shape[1])
                ends = tokens == self.end
                for i in np.flatnonzero(ends[:size]):
                    total = float(totals[rows[i], self.end])
                    complete.append(Hypothesis(ids[rows[i], 1:], total, total / length**penalty))
                if len(complete) >= size:
                    break
                live = np.flatnonzero(~ends)[:size]
                sums, state = totals.reshape(-1)[order[live]], _chosen(state, rows[live])
                ids = np.concatenate([ids[rows[live]], tokens[live, None]], axis=1)
        results = complete or [Hypothesis(row[1:], float(total), float(total) / max(limit, 1) ** penalty)
                               for row, total in zip(ids, sums, strict=True)]
        return sorted(results, key=lambda hypothesis: -hypothesis.score)[:size]

    # -- what it is made of

    def sizes(self) -> Sizes:
        """Its weights, and the products with them."""
        def matrices(*modules: Module) -> int:
            return sum(p.size for module in modules for p in module.parameters() if p.ndim == 2)

        layers = [*self.encoder, *self.decoder]
        inside = {id(p): p.size for layer in layers for p in layer.parameters()}
        unique = sum(p.size for p in self.parameters())
        executed = unique - sum(inside.values()) + sum(p.size for layer in layers for p in layer.parameters())
        memory = matrices(*(layer.cross.kv for layer in self.decoder))
        return Sizes(unique, executed, matrices(*self.encoder), memory,
                     matrices(*self.decoder) - memory + self.head.weight.size)

    def about(self) -> list[tuple[str, str]]:
        """Its weights and its cost, for the beginning of a run."""
        sizes = self.sizes()
        shared = f"{count(sizes.unique)} unique, {count(sizes.executed)} executed (a shared one once for each layer)"
        cost = (f"{count(sizes.encoder + sizes.memory)} multiply-adds with weights for a token of the source, "
                f"{count(sizes.memory)} of them for cross-attention; {count(sizes.decoder)} for a token of the target")
        return [("weights", shared), ("cost", cost)]


class Given:
    """An encoder-decoder with a source [1 S]: a language model of its targets, which is read as any other one is."""

    def __init__(self, model: EncoderDecoder, source: np.ndarray):
        self.model, self.source = model, source
        self.variant, self.context, self.bounded, self.embed = model.variant, model.context, model.bounded, model.embed

    def init_state(self, batch: int) -> State:
        """The state before the first token of ``batch`` targets."""
        return self.model.begin(np.repeat(self.source, batch, axis=0))

    def prefill(self, ids: np.ndarray, state: State, last: bool = False) -> tuple[Tensor, State]:
        return self.model.prefill(ids, state, last)


def padded(sequences: Sequence[np.ndarray], end: int, length: int | None = None) -> np.ndarray:
    """Sequences of ids as rows [B S], each with the end sign behind it, and PADDING up to the longest one or to ``length``."""
    length = max((len(ids) for ids in sequences), default=0) + 1 if length is None else length
    rows = np.full((len(sequences), length), PADDING)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids
        row[len(ids)] = end
    return rows


def _chosen(state: State, rows: np.ndarray) -> State:
    """The state of some rows, all of one source: the memory's keys and values are copied for more or fewer rows alone."""
    def pick(part: Any) -> Any:
        if isinstance(part, Tensor):
            return Tensor.wrap(part.data[beside(rows, part.data)])
        return type(part)(*map(pick, part)) if hasattr(part, "_fields") else tuple(map(pick, part))

    same = state.known[0][0].shape[0] == len(rows)
    return state._replace(pasts=tuple(map(pick, state.pasts)), known=state.known if same else tuple(map(pick, state.known)))


def _norm(model: ModelOptions, dtype: Any) -> Module:
    return norm_of(model, model.width, dtype)
