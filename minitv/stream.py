"""minitv stream: how well a model predicts a text of any length, read in constant memory, by the position in the text.

The text is read once, in blocks, in up to four ways:

    dense            windows of the model's context that follow each other and begin without a past, as in training and in
                     `minitv eval`; positions are counted in the window
    window           the last W + S keys and values are kept, and nothing else
    window + sinks   the S first and the W last ones are kept: StreamingLLM, minitv/variants/attention_sinks.py
    recomputation    for every token, the tokens before it that fit into the context are read anew: the best that a model with
                     this context can do, at W times the cost. Only some tokens of each range of positions are predicted so.
                     Their mean is changed by as much as the same tokens are easier than all for the cache, read beside it

Ranges of positions double in length: position p, with p tokens before it, lies in range ⌊log2 p⌋. With the first, second and
last ways the loss stays what it is within the context, as long as they work; where window attention fails, it jumps at W + S
tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autograd import cross_entropy, no_grad, to_numpy
from autograd.cpu.process import blas_threads, cores
from autograd.device import beside, is_cupy

from .checkpoint import run_folder
from .errors import RunError
from .evaluate import check_length, open_text, surprise
from .models.lm import LanguageModel
from .options import StreamOptions
from .picture import BITS, COLOURS, DASHES, MARKERS, Line, Look, draw
from .report import count
from .sample import Trained, open_run
from .signals import outcome, threads
from .variants.attention_sinks import Preceded, cache_of, streaming

PICTURE = "stream.png"
BLOCK = 4096  # tokens that every way reads before the next ones are fetched
SEGMENT = 256  # tokens in a call of the model that goes on from a cache
RANGES = 64  # more than any text needs
EVERYWHERE = slice(0, RANGES)
DENSE, WINDOW, SINKS, ANEW = "dense", "window", "window + sinks", "recomputation"
LOOKS = {name: Look(COLOURS[i], DASHES[i], MARKERS[i]) for i, name in enumerate((SINKS, DENSE, WINDOW, ANEW))}


def _ranges(positions: np.ndarray) -> np.ndarray:
    """⌊log2 p⌋ of positions [n] from 1 on."""
    return np.frexp(positions.astype(np.float64))[1] - 1


@dataclass
class Sums:
    """Sums of the surprise in nats, and numbers of tokens, by the range of positions."""

    nats: np.ndarray = field(default_factory=lambda: np.zeros(RANGES))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(RANGES, np.int64))

    def add(self, positions: np.ndarray, nats: np.ndarray) -> None:
        """Count the surprise of tokens [n] at positions [n] from 1 on."""
        ranges = _ranges(positions)
        self.nats += np.bincount(ranges, nats, RANGES)
        self.tokens += np.bincount(ranges, minlength=RANGES)

    @property
    def means(self) -> np.ndarray:
        """Nats per token in every range; NaN where there are none."""
        return np.divide(self.nats, self.tokens, out=np.full(RANGES, math.nan), where=self.tokens > 0)


class Streams:
    """The ways of reading a text, side by side: ``read(ids)`` goes on with the next ids of the text.

    ``sums`` has what each way has predicted so far. ``recompute`` is the largest number of tokens in a range of positions that
    are also predicted by recomputation.
    """

    def __init__(self, model: LanguageModel, window: int, sinks: int, recompute: int = 0):
        self.model, self.recompute, self.position = model, recompute, 0
        kept = streaming(model, window, sinks)
        caches = {WINDOW: streaming(model, window + sinks, 0), SINKS: kept} if sinks else {WINDOW: kept}
        self.ways: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {DENSE: self._dense}
        self.ways |= {name: Cached(changed) for name, changed in caches.items()}
        if recompute:
            self.ways[ANEW] = self._anew
        self.cached = list(caches)[-1]  # what recomputation is compared with
        self.sums = {name: Sums() for name in self.ways}
        self.paired = Sums()  # of the cache, on the tokens that recomputation predicts
        self._past = np.empty(0, np.intp)  # the last ids, as many as the context

    def read(self, ids: np.ndarray) -> None:
        """The next ids [n] of the text, of which all but the very first are predicted."""
        known, context = self._past, self.model.context
        text = np.concatenate([known, ids])
        with no_grad(), blas_threads(1), threads(1 if is_cupy(self.model.embed.weight.data) else cores()) as pool:
            jobs = {name: pool.submit(copy_context().run, way, text, len(known)) for name, way in self.ways.items()}
            read = {name: outcome(job) for name, job in jobs.items()}
            for name, (positions, nats) in read.items():
                if not np.isfinite(nats).all():
                    wrong = int(positions[np.argmin(np.isfinite(nats))])
                    raise RunError(f"the surprise at position {wrong} ({name}) is not finite: the model's weights, or what it "
                                   "computes from them, are not")
                self.sums[name].add(positions, nats)
        if ANEW in read:
            (some, _), (every, nats) = read[ANEW], read[self.cached]
            self.paired.add(some, nats[np.searchsorted(every, some)])
        self.position += len(ids)
        self._past = text[-context:]  # what recomputation reads, and the dense window that has not ended yet

    def _dense(self, text: np.ndarray, known: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the window and surprise of all new tokens."""
        context, begin = self.model.context, self.position - known  # the place of text[0]
        new = np.arange(max(self.position, 1), begin + len(text))  # places of the tokens that are predicted
        start = (new[:1].sum() - 1) // context * context  # where the window of the first of them begins
        nats = surprise(self.model, text[start - begin:]) if len(new) else np.empty(0)
        return (new - 1) % context + 1, nats[len(nats) - len(new):]

    def _anew(self, text: np.ndarray, known: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and surprise of some of the new tokens."""
        context, begin = self.model.context, self.position - known
        new = np.arange(max(self.position, 1), begin + len(text))
        new = new[new % np.maximum(2 ** _ranges(new) // self.recompute, 1) == 0]
        nats, lengths, rows = np.empty(len(new)), np.minimum(new, context), max(1, 2048 // context)
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            for some in np.split(same, range(rows, len(same), rows)):
                places = new[some] - begin
                ids = text[places[:, None] + np.arange(-length, 0)]  # [n length]
                logits = self.model(ids, at=np.arange(1, len(ids) + 1) * length - 1)  # [n V], after the last of each
                nats[some] = _surprise(logits, text[places])
        return new, nats


class Cached:
    """A model that goes on from its cache."""

    def __init__(self, model: LanguageModel):
        self.model = model
        with no_grad():
            self.state, self.last = model.init_state(1), None

    def __call__(self, text: np.ndarray, known: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the text and surprise of all new tokens."""
        first, parts = self.state.position, []
        read = text[known - (self.last is not None):]  # the last token of the block before has not been read yet
        self.last = read[-1]
        for start in range(0, len(read) - 1, SEGMENT):
            ids = read[start:start + SEGMENT + 1]
            logits, self.state = self.model.prefill(ids[None, :-1], self.state)
            parts.append(_surprise(logits, ids[None, 1:])[0])
        return np.arange(first + 1, first + len(read)), np.concatenate([np.empty(0), *parts])


def mass(model: LanguageModel, ids: np.ndarray, first: int = 4) -> list[list[float]]:
    """The mean weights of each layer that the second half of windows [B T] gives to the first positions, and to the sink.

    The model is of the variant attention-sinks, or another one with its attention. A sink is a logit that has no value: layers
    without one have no last number.
    """
    shares, preceded = [], isinstance(model.blocks, Preceded)
    with no_grad():
        x = model.embedded(ids, 0)
        stack = model.blocks.stack if preceded else model.blocks
        x = model.blocks.preceded(x) if preceded else x
        for block in stack:
            mixer = block.mixer
            q, k, _ = mixer.project(block.norm1(x))
            q, k = (part.numpy().astype(np.float64) for part in (mixer.layer.rotation.queries(q), mixer.layer.rotation.keys(k)))
            length = q.shape[2]
            scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])  # [B H T T]
            scores[:, :, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -math.inf
            if mixer.logit is not None:
                logit = np.broadcast_to(mixer.logit.numpy()[None, :, None, None], (*scores.shape[:3], 1))
                scores = np.concatenate([scores, logit], axis=3)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = (weights / weights.sum(-1, keepdims=True))[:, :, length // 2:].mean((0, 1, 2))
            sink = [float(weights[length])] if mixer.logit is not None else []
            shares.append([round(value, 4) for value in [*map(float, weights[:first]), *sink]])
            x = block(x)
    return shares


def _surprise(logits: Any, labels: np.ndarray) -> np.ndarray:
    """-ln p of labels [...] by logits [... V], in nats, float64."""
    losses = cross_entropy(logits, beside(labels, logits.data), reduction="none")
    return to_numpy(losses.data).astype(np.float64)


@dataclass
class Result:
    """What reading a text gave: the run, the cache, the sums of every way, and the characters of the text."""

    run: Trained
    directory: str
    description: str
    window: int
    sinks: int
    streams: Streams
    characters: int = 0
    stopped: bool = False  # whether Ctrl-C ended it

    def bits(self, name: str, part: slice = EVERYWHERE) -> float:
        """Bits per character of a way of reading, in some ranges of positions."""
        sums, cached = self.streams.sums[name], self.streams.sums[self.streams.cached]
        means, tokens = sums.means, sums.tokens
        if name == ANEW:
            means, tokens = means + cached.means - self.streams.paired.means, np.where(tokens > 0, cached.tokens, 0)
        total = tokens[part].sum()
        if not total:
            return math.nan
        nats = (means[part] * tokens[part])[tokens[part] > 0].sum() / total
        return float(nats) * self.streams.position / max(self.characters, 1) / math.log(2)

    @property
    def last(self) -> int:
        """How many ranges the text reaches."""
        return max(self.streams.position - 1, 1).bit_length()

    @property
    def beyond(self) -> slice:
        """The ranges whose tokens have more before them than the context holds."""
        return slice((self.run.model.context - 1).bit_length(), RANGES)

    def about(self) -> list[tuple[str, str]]:
        """Lines (label, text) for a person."""
        context = self.run.model.context
        rows = [("model", f"{self.run.experiment.variant.name} of {self.directory}, step {self.run.step}, context {context}"),
                ("text", f"{self.description}: {count(self.characters)} characters, "
                         f"{self.streams.position / context:.1f} times the context"),
                ("cache", f"{self.sinks} sinks + {self.window} recent tokens; window alone: {self.sinks + self.window}")]
        beyond = [f"{name} {self.bits(name, self.beyond):.3f}" for name in self.streams.ways if name != DENSE]
        if self.streams.position > context:
            rows.append(("beyond", f"bits per character after more than {context} tokens: " + ", ".join(beyond)))
        rows.append((DENSE, f"bits per character in windows of {context}, over all positions: "
                            f"{self.bits(DENSE):.3f}"))
        return rows

    def table(self) -> list[str]:
        """Bits per character by the range of positions, in lines of text."""
        names = list(self.streams.ways)
        lines = [f"{'position':>19}  {'tokens':>9}" + "".join(f"  {name:>14}" for name in names)]
        for part in range(self.last):
            high = min(2 ** (part + 1), self.streams.position) - 1
            bits = [self.bits(name, slice(part, part + 1)) for name in names]
            cells = "".join("  " + (f"{value:>14.3f}" if math.isfinite(value) else f"{'-':>14}") for value in bits)
            read = self.streams.sums[WINDOW].tokens[part]
            lines.append(f"{f'{2 ** part} - {high}' if part else '1':>19}  {read:>9}{cells}")
        return lines

    def draw(self, out: str | None = None) -> Path:
        """The picture of the table, by default stream.png in the folder of the run; UserError as of picture.draw."""
        path, lines = run_folder(self.directory) / PICTURE if out is None else Path(out), []
        for name in self.streams.ways:
            points = [(round(1.5 * 2**part) if part else 1, bits) for part in range(self.last)
                      if math.isfinite(bits := self.bits(name, slice(part, part + 1)))]
            lines.append(Line(points, name, LOOKS[name], marker="full"))
        cache = self.window + self.sinks
        title = f"{self.run.experiment.variant.name}, {self.sinks} sinks + {self.window} recent tokens in the cache"
        return draw(path, lines, {}, BITS, title=title, about=self.description,
                    axis="tokens before in the text; dense: in its window",
                    mark=(cache + 1, f"{cache} tokens and the newest: the cache is full"))


def blocks(ids: Iterator[np.ndarray], tokens: int | None) -> Iterator[np.ndarray]:
    """Ids in blocks of at most BLOCK, up to a number of tokens."""
    left = math.inf if tokens is None else tokens
    for part in ids:
        for start in range(0, len(part), BLOCK):
            block = part[start:start + BLOCK][:None if left == math.inf else int(left)]
            if not len(block):
                return
            left -= len(block)
            yield block.astype(np.intp)


def stream(directory: str, options: StreamOptions) -> Result:
    """Read a text in constant memory with the model of a run, in every way; a result that Ctrl-C cuts short counts.

    UserError if the model cannot be streamed, or the text has fewer than two tokens.
    """
    run = open_run(directory, options.checkpoint, options.device, "predict the next token")
    tokenizer = run.tokenizer
    window, sinks = cache_of(run.model, options.window, options.sinks)
    streams = Streams(run.model, window, sinks, options.recompute)
    source = open_text(options.data, tokenizer, options.encoding)
    result = Result(run, directory, source.description, window, sinks, streams)
    parts, decoder = (ids for document in source.documents for ids, _ in tokenizer.read(document)), tokenizer.decoder()
    size, path = options.tokens, Path(options.data or "-")
    if size is None and path.is_file():
        size = path.stat().st_size  # of bytes, of which a token has at least one
    with tqdm(desc="reading", total=size, unit="token", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        try:
            for block in blocks(parts, options.tokens):
                streams.read(block)
                result.characters += sum(len(decoder.feed(token)) for token in block.tolist())
                bar.set_postfix_str(f"{result.bits(streams.cached):.3f} bits/char", refresh=False)
                bar.update(len(block))
        except KeyboardInterrupt:
            if streams.position < 2:
                raise
            result.stopped = True
    check_length(streams.position)
    return result
