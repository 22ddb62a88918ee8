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
from ..corpus import open_corpus
from ..data import Batches, windows
from ..errors import CheckpointError
from ..options import DATA, STEPS
from ..report import count
from ..sources import check_encoding
from ..task import Batch, Task
from ..tokenizer import from_json


@dataclass(frozen=True)
class TextOptions:
    """text"""

    data: str = option(
        "",
        "text file, pipe, folder (every file in it, in the order of the SHA-256 of their names), or - for standard input; "
        "without it, the source of Python's standard library. A tenth of it is held out: the end of a file, of a folder the "
        "end of each large file and the last of the small ones",
        metavar="PATH",
        group=DATA,
        resumable=True,  # it is compared with the hash in the checkpoint: the file may have moved
        harmless=True,
    )
    val_data: str | None = option(
        None, "held-out text of its own, given like --data, of which all is then for training; none = a tenth of --data",
        metavar="PATH", group=DATA, resumable=True, harmless=True, newer=True,
    )
    tokenizer: str = option(
        "char", "a token is one character of the text, or one byte of its UTF-8 (of any file, text or not)",
        choices=("char", "byte"), group=DATA,
    )
    encoding: str = option("utf-8", "how characters are written in the text: utf-8, utf-16, latin-1, cp1252, ...",
                           metavar="NAME", group=DATA, resumable=True, harmless=True, newer=True)
    eval_tokens: int = option(100_000, "held-out tokens read at an evaluation", low=1, group=STEPS, resumable=True)
    sample_tokens: int = option(200, "tokens in the sample at an evaluation; 0 = no sample", low=0, group=STEPS,
                                resumable=True, harmless=True)

    def __post_init__(self) -> None:
        check(self)
        check_encoding(self.encoding)


class Text(Task, name="text", summary="the next character (or byte) of a text"):
    """A text in two parts; every token of a window is asked for, given those before it in the window."""

    Options = TextOptions
    metric, unit, key, rising = "bits per character", "bits/char", "bpc", False
    after = "write text with: minitv sample {directory}"

    def __init__(self, options: TextOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self.context, self.seed = options, context, seed
        tokenizer, expected = (None, None) if saved is None else (self.stored_tokenizer(saved), saved.get("corpus_sha256"))
        self.corpus = open_corpus(options.data, options.val_data, options.tokenizer, options.encoding, context=context,
                                  saved=tokenizer, expected=expected)
        self.tokenizer = self.corpus.tokenizer
        self.vocab = self.tokenizer.vocab
        self.tokens_per_char = dict(zip(("training", "held_out"), self.corpus.tokens_per_char, strict=True))
        self._batches = Batches(self.corpus.training, batch, context, seed)

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
        return Batch(*windows(self.corpus.held_out, self.context, self.options.eval_tokens))

    def value(self, sums: np.ndarray) -> float:
        return float(sums[0] / sums[1]) * self.tokens_per_char["held_out"] / math.log(2)

    def training_value(self, loss: float) -> float:
        return loss * self.tokens_per_char["training"] / math.log(2)

    @cached_property
    def baselines(self) -> dict[str, float]:
        return {f"n-gram order {order}": bits for order, bits in enumerate(self.corpus.baselines)}

    def verdict(self, value: float) -> str:
        beaten = [name for name, bits in self.baselines.items() if value < bits]
        if len(beaten) == len(self.baselines):
            return "better than every n-gram"
        if beaten:
            best = min(beaten, key=self.baselines.__getitem__)
            return f"better than the {best.replace(' order', ' of order')}"
        return "no better than counting characters yet"

    def about(self) -> list[tuple[str, str]]:
        text = f"{self.corpus.description}: {count(self.corpus.characters)} characters, sha256 {self.corpus.sha256[:16]}"
        orders = "  ".join(f"{order}: {bits:.3f}" for order, bits in enumerate(self.corpus.baselines))
        return [("text", text), ("n-grams", f"bits per character by order  {orders}")]

    def header(self) -> dict[str, Any]:
        corpus = {"description": self.corpus.description, "sha256": self.corpus.sha256, "size_bytes": self.corpus.size_bytes,
                  "training_tokens": len(self.corpus.training), "held_out_tokens": len(self.corpus.held_out)}
        return {"corpus": corpus, "tokens_per_char": self.tokens_per_char, "ngram_bpc": self.corpus.baselines}

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
