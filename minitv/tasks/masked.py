"""Masked: tokens of a text are hidden, and both sides of each are there to guess it from.

Devlin et al. 2018, arXiv 1810.04805 (BERT), section 3.1. A share of the tokens of every window is asked for. Of those, 8 in 10
are replaced by a sign of their own, 1 in 10 by a random token, and 1 in 10 stay, so that a model cannot know that a token is
right because it is readable. Each step hides other tokens; those of the held-out windows are always the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autograd import no_grad, to_numpy
from autograd.random import Random

from ..config import option
from ..corpus import COUNTED
from ..data import Batches, windows
from ..errors import UserError
from ..ngram import sample
from ..report import count
from ..task import NOTHING, Batch, Task
from ._drawn import HELD_OUT, choose
from ._text import CorpusOptions, OnText

WINDOWS, BLANKS = range(2)  # the independent random streams of a run
CHUNK = 2**22  # probabilities that a baseline holds at once
SHOWN = 2  # windows on the screen


@dataclass(frozen=True)
class MaskedOptions(CorpusOptions):
    """masked"""

    mask_rate: float = option(0.15, "share of the tokens that are asked for while training", above=0, high=1)
    eval_mask_rate: float = option(0.15, "share of the held-out tokens that are asked for", above=0, high=1)
    mask_share: float = option(0.8, "share of those that are replaced by the mask", low=0, high=1)
    random_share: float = option(0.1, "share of those that are replaced by a random token; the others stay", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept_share < 0:
            raise UserError(f"--random-share: {self.random_share} and --mask-share {self.mask_share} are more than 1 together")

    @property
    def kept_share(self) -> float:
        """The share of the tokens asked for that the model can read."""
        return round(1 - self.mask_share - self.random_share, 12)


class Masked(OnText, name="masked", summary="guess the tokens of a text that are hidden, from both sides (BERT)"):
    """Ids of the text, and one more for the mask; labels where a token is asked for."""

    Options = MaskedOptions
    causal = False
    metric, unit, key, rising = "bits per masked token", "bits/token", "bpt", False
    tells_accuracy = True
    judged = "bits", "hidden token", "hidden tokens"

    def __init__(self, options: MaskedOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        super().__init__(options, context, batch, seed, saved)
        self.mask, self.description = mask_of(self.tokenizer), self.corpus.description
        self.tokens = self.tokenizer.vocab
        self.vocab = max(self.mask + 1, self.tokens)
        random = Random(seed)
        self._windows = Batches(self.corpus.training, batch, context, random.split(WINDOWS).seed)
        self._random = random.split(BLANKS)
        held_out, _ = windows(self.corpus.held_out, context, options.eval_tokens)
        self._held_out = self.hide(held_out, options.eval_mask_rate, HELD_OUT)

    def batch(self, step: int) -> Batch:
        ids, _ = self._windows.batch(step)
        return self.hide(ids, self.options.mask_rate, self._random.split(step))

    def held_out(self) -> Batch:
        return self._held_out

    def hide(self, ids: np.ndarray, rate: float, random: Random) -> Batch:
        """Windows [B T] in which the same number of tokens is asked for, at least one."""
        return hide(ids, rate, random, self.mask, self.tokens, self.options)

    @classmethod
    def asked_of(cls, options: MaskedOptions, tokenizer: Any, ids: np.ndarray) -> Batch:
        return hide(ids[None], options.eval_mask_rate, HELD_OUT, mask_of(tokenizer), tokenizer.vocab, options)

    @classmethod
    def of_other_data(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        raise UserError("--data: a model of the task masked is asked for the tokens of the text that its run held out")

    def value(self, sums: np.ndarray) -> float:
        return float(sums[0] / sums[1] / math.log(2))

    @property
    def baselines(self) -> dict[str, float]:
        return self._counting[0]

    @property
    def accuracies(self) -> dict[str, float]:
        return self._counting[1]

    @functools.cached_property
    def _counting(self) -> tuple[dict[str, float], dict[str, float]]:
        """What counting gives, of a token alone and of a token between the two beside it: bits, and the share guessed right."""
        table = Bigrams(sample(self.corpus.training, COUNTED), self.tokens)
        bits, hits = np.zeros(2), np.zeros(2)
        inputs = np.pad(self._held_out.inputs, ((0, 0), (1, 1)), constant_values=self.mask)
        around = np.where(inputs == self.mask, self.tokens, inputs)
        rows, places = np.nonzero(self._held_out.labels != NOTHING)
        step = max(1, CHUNK // self.tokens)
        for i in range(0, len(rows), step):
            r, t = rows[i : i + step], places[i : i + step]
            left, here, right = around[r, t], inputs[r, t + 1], around[r, t + 2]
            for k, scores in enumerate((table.alone(len(r)), table.between(left, right))):
                scores = self._seeing(scores, here)
                best = scores.max(axis=1, keepdims=True)
                total = best[:, 0] + np.log(np.exp(scores - best).sum(axis=1))
                labels = self._held_out.labels[r, t]
                bits[k] += (total - scores[np.arange(len(r)), labels]).sum() / math.log(2)
                hits[k] += (scores.argmax(axis=1) == labels).sum()
        bits, hits = (dict(zip(("unigram", "bigram"), (sums / len(rows)).tolist(), strict=True)) for sums in (bits, hits))
        return bits, hits

    def _seeing(self, scores: np.ndarray, here: np.ndarray) -> np.ndarray:
        """Log-probabilities [N V] of the hidden token, with what the input there says of it, by Bayes' rule.

        A token that is no mask was left with the probability ``kept_share``, or came by chance.
        """
        likelihood = np.full(scores.shape, self.options.random_share / self.tokens)
        readable = np.flatnonzero(here != self.mask)
        likelihood[readable, here[readable]] += self.options.kept_share
        likelihood[here == self.mask] = 1
        with np.errstate(divide="ignore"):  # without random tokens, what can be read is right
            return scores + np.log(likelihood)

    def about(self) -> list[tuple[str, str]]:
        rows, tokens = [*OnText.about(self), *Task.about(self)], len(self.corpus.training)
        if tokens > COUNTED:
            rows.append(("note", f"the baselines count {count(COUNTED)} of {count(tokens)} tokens, in evenly spaced pieces"))
        return rows

    def training_value(self, loss: float) -> float:
        return loss / math.log(2)

    def show(self, model: Any, rng: Random) -> str:
        """Two held-out windows whose blanks the model has filled."""
        batch = self._held_out.part(slice(0, SHOWN))
        with no_grad():
            logits, labels = self.answers(model, batch)
        answers = to_numpy(logits.data).argmax(axis=-1).reshape(-1)
        filled = iter(answers.tolist())
        texts = []
        for ids, targets in zip(batch.inputs, batch.labels, strict=True):
            text, start = "", 0
            for place in np.flatnonzero(targets != NOTHING):
                text += self.tokenizer.decode(ids[start:place]) + self._blank(next(filled), int(targets[place]))
                start = place + 1
            texts.append(text + self.tokenizer.decode(ids[start:]))
        right = int((answers == labels.reshape(-1)).sum())
        return "\n".join([*texts, f"{right} of {labels.size} blanks right: [x] is right, [y|x] is y where x is right"])

    def _blank(self, answer: int, label: int) -> str:
        names = ["?" if token == self.mask else self.tokenizer.decode([token]) for token in (answer, label)]
        names = [name if name.isprintable() else name.encode("unicode_escape").decode() for name in names]
        return f"[{names[0]}]" if answer == label else f"[{names[0]}|{names[1]}]"


def mask_of(tokenizer: Any) -> int:
    """The id that stands for a hidden token; UserError where an imported vocabulary has none."""
    if tokenizer.mask is None:
        raise UserError("the model came without the id of its mask, which stands for hidden tokens: it is mask_token_id in "
                        "config.json, or [MASK] in tokenizer.json, so give one of them there and import it again")
    return tokenizer.mask


def hide(ids: np.ndarray, rate: float, random: Random, mask: int, tokens: int, options: MaskedOptions) -> Batch:
    """Windows [B T] in which a share of the tokens is asked for, by the options.

    ``mask`` is the id that stands for them; random ones are below ``tokens``.
    """
    places = choose(random.split(0), *ids.shape, max(1, round(rate * ids.shape[1])))  # [B asked]
    targets = np.take_along_axis(ids, places, axis=1)
    fate = random.split(1).uniform(targets.shape, np.float64)
    others = random.split(2).integers(0, tokens, targets.shape)
    masked, replaced = options.mask_share, options.mask_share + options.random_share
    inputs, labels = ids.astype(int), np.full(ids.shape, NOTHING)  # [B T]; the mask may not fit the text's own type
    words = np.where(fate < masked, mask, np.where(fate < replaced, others, targets))
    np.put_along_axis(inputs, places, words, axis=1)
    np.put_along_axis(labels, places, targets, axis=1)
    return Batch(inputs, labels)


class Bigrams:
    """Interpolated Witten-Bell estimates of one token after another, from the ids of a text.

    p(b) = (N(b) + T / V) / (N + T) and p(b | a) = (N(ab) + T(a) p(b)) / (N(a) + T(a)), where N counts, T is how many different
    tokens occur, and T(a) how many occur after a (Witten and Bell 1991, IEEE Trans. Inf. Theory 37(4)).
    """

    def __init__(self, ids: np.ndarray, vocab: int):
        from scipy.sparse import coo_array

        ids = ids.astype(int)
        pairs = coo_array((np.ones(len(ids) - 1), (ids[:-1], ids[1:])), (vocab, vocab))
        self._after = pairs.tocsr()  # [a, b]; equal pairs are summed
        self._before = self._after.T.tocsr()  # [b, a]
        self._total = self._after.sum(axis=1)  # N(a) [V]
        self._distinct = np.diff(self._after.indptr).astype(float)  # T(a) [V]
        counts = np.bincount(ids, minlength=vocab)
        kinds = np.count_nonzero(counts)
        self._p = (counts + kinds / vocab) / (len(ids) + kinds)  # p(b) [V]

    def alone(self, count: int) -> np.ndarray:
        """log p(x) of every token x, count times [N V]."""
        return np.tile(np.log(self._p), (count, 1))

    def between(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """log p(x | left) p(right | x) of every token x [N V]; V stands for a neighbour that is not known."""
        vocab = len(self._p)
        scores = self.alone(len(left))
        rows = np.flatnonzero(left < vocab)
        a = left[rows]
        scores[rows] = np.log(self._estimate(self._after[a].toarray(), self._p, self._total[a, None], self._distinct[a, None]))
        rows = np.flatnonzero(right < vocab)
        b = right[rows]
        scores[rows] += np.log(self._estimate(self._before[b].toarray(), self._p[b, None], self._total, self._distinct))
        return scores

    @staticmethod
    def _estimate(counts: np.ndarray, p: np.ndarray, total: np.ndarray, distinct: np.ndarray) -> np.ndarray:
        return np.where(total > 0, (counts + distinct * p) / np.maximum(total + distinct, 1), p)
