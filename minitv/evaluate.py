"""How well a trained model predicts a text: the loss, bits per character, and the surprise of every character."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from autograd import cross_entropy, no_grad, to_numpy
from autograd.cpu.process import blas_threads, cores
from autograd.device import beside, is_cupy

from .errors import RunError, UserError
from .signals import outcome, threads
from .sources import Reader, Source
from .tokenizer import Tokenizer

TOKENS = 512  # in a call of the model: their activations stay in a core's private cache
TOKENS_GPU = 2**15


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` gives: the ids, the surprise in nats of each after the first, and the tokens that a character has."""

    ids: np.ndarray  # [N]
    surprise: np.ndarray  # [N - 1]
    tokens_per_character: float

    @property
    def loss(self) -> float:
        """The mean surprise in nats per token."""
        return float(self.surprise.mean())

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def bits_per_character(self) -> float:
        """The same as training reports it: bits per token times the tokens that a character has in this text."""
        return self.bits_per_token * self.tokens_per_character

    def characters(self, tokenizer: Any) -> Iterator[tuple[str, float]]:
        """Each character of the text with its bits, the sum over its tokens; NaN for the first, which nothing comes before."""
        decoder, bits = tokenizer.decoder(), 0.0
        for token, more in zip(self.ids.tolist(), [math.nan, *self.surprise / math.log(2)], strict=True):
            bits += more
            if text := decoder.feed(token):
                yield text, float(bits)
                bits = 0.0
        if text := decoder.finish():
            yield text, float(bits)


def evaluate(model: Any, ids: np.ndarray, characters: int) -> Evaluation:
    """Let a causal model predict every token of a text [N] after the first, in windows as in training.

    ``characters`` is the length of the text. UserError when there are fewer than two tokens; RunError when the model
    computes a number that is not finite.
    """
    check_length(len(ids))
    return Evaluation(ids, surprise(model, ids), len(ids) / max(characters, 1))


def check_length(tokens: int) -> None:
    """UserError if nothing can be predicted in a text of so many tokens."""
    if tokens < 2:
        raise UserError(f"the text has {tokens} token{'s' * (tokens != 1)}, and a prediction needs one to be predicted and one "
                        "before it: give at least two")


def open_text(source: str | None, tokenizer: Tokenizer, encoding: str, option: str = "--data") -> Source:
    """A source as ``option`` names it, with the characters that the tokenizer takes; UserError if it cannot be read."""
    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return Reader(option, encoding, tokenizer.bytewise, tell, otherwise="").open(source)


def judge(task: Any, model: Any) -> np.ndarray:
    """The sums of ``task.score`` over what the task holds out; RunError when the model computes a number that is not finite."""
    batch = task.held_out()
    on_gpu = is_cupy(next(iter(model.parameters())).data)
    rows = max(1, (TOKENS_GPU if on_gpu else TOKENS) // batch.length)
    parts = [batch.part(slice(i, i + rows)) for i in range(0, len(batch.inputs), rows)]
    with blas_threads(1), threads(1 if on_gpu else cores()) as pool:
        started = [pool.submit(copy_context().run, task.score, model, part) for part in parts]
        shown = tqdm(started, desc="reading", unit="call", delay=2, leave=False, disable=None)
        sums = sum(map(outcome, shown))
    if not np.isfinite(sums).all():
        raise RunError("the model's loss is not finite: its weights, or what it computes from them, are not")
    return sums


class Read(NamedTuple):
    """A text: its ids [N], its length, a few words about it, and of what was read from a source the SHA-256 of its UTF-8."""

    ids: np.ndarray
    characters: int
    description: str
    sha256: str | None


def read_text(source: str, tokenizer: Tokenizer, encoding: str, option: str = "--data") -> Read:
    """The text of a source as ``option`` names it.

    UserError when it cannot be read, or has a character that the tokenizer does not know.
    """
    source = open_text(source, tokenizer, encoding, option)
    digest = hashlib.sha256()
    for document in source.documents:
        for block in document.blocks():
            digest.update(block)
    parts = [part for document in source.documents for part in tokenizer.read(document)]
    ids = np.concatenate([np.empty(0, np.intp), *(ids for ids, _ in parts)]).astype(np.intp)
    return Read(ids, sum(characters for _, characters in parts), source.description, digest.hexdigest())


def surprise(model: Any, ids: np.ndarray) -> np.ndarray:
    """-ln p(id | the ids before it in its window), in nats, float64 [N - 1], of all ids [N] but the first.

    The windows have the length of the model's context, follow each other without overlap and begin without a past, as in
    training; the last one is shorter.
    """
    context, full = model.context, (len(ids) - 1) // model.context
    windows = [(ids[:full * context].reshape(full, context), ids[1:full * context + 1].reshape(full, context)),
               (ids[None, full * context:-1], ids[None, full * context + 1:])]  # [N T] and the rest [1 T']
    on_gpu = is_cupy(model.embed.weight.data)
    rows = max(1, (TOKENS_GPU if on_gpu else TOKENS) // context)
    pieces = [(inputs[i:i + rows], labels[i:i + rows]) for inputs, labels in windows if inputs.size
              for i in range(0, len(inputs), rows)]

    def score(piece: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        logits = model(piece[0])  # [B T V]
        losses = cross_entropy(logits, beside(piece[1], logits.data), reduction="none")  # [B T]
        return to_numpy(losses.data).astype(np.float64).ravel()

    with no_grad(), blas_threads(1), threads(1 if on_gpu else cores()) as pool:
        started = map(score, pieces) if on_gpu else [pool.submit(copy_context().run, score, piece) for piece in pieces]
        shown = tqdm(started, total=len(pieces), desc="reading", unit="call", delay=2, leave=False, disable=None)
        nats = np.concatenate([part if on_gpu else outcome(part) for part in shown])
    if not np.isfinite(nats).all():
        raise RunError(f"the surprise of token {int(np.argmin(np.isfinite(nats))) + 1} is not finite: the model's weights, or "
                       "what it computes from them, are not")
    return nats
