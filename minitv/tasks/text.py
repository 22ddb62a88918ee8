"""Language modelling: after every token of a text, say how likely each token is to come next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autograd.random import Random

from ..config import check, option
from ..data import Batches, load_text, split, windows
from ..errors import CheckpointError, UserError
from ..ngram import ngram_bpc
from ..options import DATA, STEPS
from ..report import count
from ..task import Batch, Task
from ..tokenizer import TOKENIZERS, from_json


@dataclass(frozen=True)
class TextOptions:
    """text"""

    data: str = option(
        "",
        "text file, folder (every file in it), or - for standard input; without it, the source of Python's standard library",
        metavar="PATH",
        group=DATA,
        resumable=True,  # it is compared with the hash in the checkpoint: the file may have moved
        harmless=True,
    )
    tokenizer: str = option(
        "char", "a token is one character of the text, or one byte of its UTF-8", choices=("char", "byte"), group=DATA
    )
    eval_tokens: int = option(100_000, "held-out tokens read at an evaluation", low=1, group=STEPS, resumable=True)
    sample_tokens: int = option(200, "tokens in the sample at an evaluation; 0 = no sample", low=0, group=STEPS,
                                resumable=True, harmless=True)

    __post_init__ = check


class Text(Task, name="text", summary="the next character (or byte) of a text"):
    """A text in two parts; every token of a window is asked for, given those before it in the window."""

    Options = TextOptions
    metric, unit, key, rising = "bits per character", "bits/char", "bpc", False
    after = "write text with: minitv sample {directory}"

    def __init__(self, options: TextOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self.context, self.seed = options, context, seed
        self.corpus = load_text(options.data)
        if saved is None:
            self.tokenizer = TOKENIZERS[options.tokenizer].train(self.corpus.text)
        else:
            self.tokenizer = self.stored_tokenizer(saved)
            if self.corpus.sha256 != saved.get("corpus_sha256", self.corpus.sha256):
                raise UserError(f"{self.corpus.description} is not the text this run began with; give that one with --data")
        self.vocab = self.tokenizer.vocab
        self.training, held_out = split(self.tokenizer.encode(self.corpus.text), context)
        self._held_out = held_out
        per_char, held_per_char = (len(ids) / max(self.tokenizer.characters_in(ids), 1) for ids in (self.training, held_out))
        self.tokens_per_char = {"training": per_char, "held_out": held_per_char}
        self._batches = Batches(self.training, batch, context, seed)

    @classmethod
    def stored_vocab(cls, saved: Mapping[str, Any]) -> int:
        return cls.stored_tokenizer(saved).vocab

    @classmethod
    def stored_tokenizer(cls, saved: Mapping[str, Any]) -> Any:
        if not isinstance(saved.get("tokenizer"), Mapping):
            raise CheckpointError("the checkpoint has no tokenizer")
        return from_json(saved["tokenizer"])

    def batch(self, step: int) -> Batch:
        return Batch(*self._batches.batch(step))

    def held_out(self) -> Batch:
        return Batch(*windows(self._held_out, self.context, self.options.eval_tokens))

    def value(self, sums: np.ndarray) -> float:
        return float(sums[0] / sums[1]) * self.tokens_per_char["held_out"] / math.log(2)

    def training_value(self, loss: float) -> float:
        return loss * self.tokens_per_char["training"] / math.log(2)

    @cached_property
    def baselines(self) -> dict[str, float]:
        return {f"n-gram order {order}": bits for order, bits in enumerate(self._ngrams)}

    @cached_property
    def _ngrams(self) -> list[float]:
        per_char = self.tokens_per_char["held_out"]
        return [bits * per_char for bits in ngram_bpc(self.training, self._held_out, self.vocab)]

    def verdict(self, value: float) -> str:
        beaten = [name for name, bits in self.baselines.items() if value < bits]
        if len(beaten) == len(self.baselines):
            return "better than every n-gram"
        if beaten:
            best = min(beaten, key=self.baselines.__getitem__)
            return f"better than the {best.replace(' order', ' of order')}"
        return "no better than counting characters yet"

    def about(self) -> list[tuple[str, str]]:
        text = f"{self.corpus.description}: {count(len(self.corpus.text))} characters, sha256 {self.corpus.sha256[:16]}"
        orders = "  ".join(f"{order}: {bits:.3f}" for order, bits in enumerate(self._ngrams))
        return [("text", text), ("n-grams", f"bits per character by order  {orders}")]

    def header(self) -> dict[str, Any]:
        corpus = {"description": self.corpus.description, "sha256": self.corpus.sha256, "size_bytes": self.corpus.size_bytes,
                  "training_tokens": len(self.training), "held_out_tokens": len(self._held_out)}
        return {"corpus": corpus, "tokens_per_char": self.tokens_per_char, "ngram_bpc": self._ngrams}

    def show(self, model: Any, rng: Random) -> str:
        from ..sample import generate

        if not self.options.sample_tokens:
            return ""
        ids = generate(model, self.tokenizer.start(), self.options.sample_tokens, rng, temperature=0.8)
        return self.tokenizer.decode(list(ids))

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_json(), "corpus_sha256": self.corpus.sha256}

    @staticmethod
    def inherited(saved: Mapping[str, Any]) -> dict[str, Any]:
        return {"tokenizer": saved.get("tokenizer")}
