"""Language modelling: after every token of a text, say how likely each token is to come next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autograd.random import Random

from ..config import option
from ..data import Batches, windows
from ..options import STEPS
from ..sample import generate
from ..task import Batch
from ._text import CorpusOptions, OnText


@dataclass(frozen=True)
class TextOptions(CorpusOptions):
    """text"""

    sample_tokens: int = option(200, "tokens in the sample at an evaluation; 0 = no sample", low=0, group=STEPS,
                                resumable=True, harmless=True)


class Text(OnText, name="text", summary="the next character (or byte) of a text"):
    """A text in two parts; every token of a window is asked for, given those before it in the window."""

    Options = TextOptions
    metric, unit, key, rising = "bits per character", "bits/char", "bpc", False
    after = "write text with: minitv sample {directory}"

    def __init__(self, options: TextOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        super().__init__(options, context, batch, seed, saved)
        self.vocab = self.tokenizer.vocab
        self.tokens_per_char = dict(zip(("training", "held_out"), self.corpus.tokens_per_char, strict=True))
        self._batches = Batches(self.corpus.training, batch, context, seed)

    @classmethod
    def stored_vocab(cls, saved: Mapping[str, Any]) -> int:
        return cls.stored_tokenizer(saved).vocab

    @classmethod
    def asked_of(cls, options: TextOptions, tokenizer: Any, ids: np.ndarray) -> Batch:
        return Batch(ids[None, :-1], ids[None, 1:])

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

    def about(self) -> list[tuple[str, str]]:
        orders = "  ".join(f"{order}: {bits:.3f}" for order, bits in enumerate(self.corpus.baselines))
        return [*super().about(), ("n-grams", f"bits per character by order  {orders}")]

    def header(self) -> dict[str, Any]:
        return {**super().header(), "tokens_per_char": self.tokens_per_char, "ngram_bpc": self.corpus.baselines}

    def show(self, model: Any, rng: Random) -> str:
        if not self.options.sample_tokens:
            return ""
        ids = generate(model, self.tokenizer.start(), self.options.sample_tokens, rng, temperature=0.8,
                       among=self.tokenizer.spelled)
        return self.tokenizer.decode(list(ids))
