"""Word and character error rates of transcripts, with the uncertainty that the choice of utterances leaves.

The edits between a reference and a hypothesis are the fewest words that must be substituted, deleted from the reference or
inserted into it to make the hypothesis of it. The error rate of a corpus is all its edits divided by the length of all its
references. A mean over utterances would let short ones count more. It may be above 1: there is no limit to insertions.

>>> print(word_error_rate(["one two three", "four"], ["one too three", "four five"]))
50.0 % (95 %: 33.3 to 100.0)

The interval is that of the bootstrap (Bisani and Ney 2004): utterances are drawn with replacement, as many as there are, and
the rate is computed anew, 1000 times. 95 % of these rates lie in it. It treats utterances as independent of each other, so it
is too narrow where a few speakers have many utterances each, and it says nothing about another training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import UserError

DRAWS, CONFIDENCE = 1000, 0.95


class Edits(NamedTuple):
    """The fewest edits from a reference to a hypothesis."""

    substitutions: int
    deletions: int
    insertions: int

    @property
    def total(self) -> int:
        """The edit distance."""
        return sum(self)


class ErrorRate(NamedTuple):
    """Edits per word or character of the references, the bounds of its 95 % interval, and what it is made of."""

    rate: float
    low: float
    high: float
    substitutions: int
    deletions: int
    insertions: int
    length: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % (95 %: {100 * self.low:.1f} to {100 * self.high:.1f})"


def edits(reference: Sequence[Any], hypothesis: Sequence[Any]) -> Edits:
    """The fewest edits (Levenshtein 1966), in O(n m); of several ways the one with the most substitutions.

    >>> edits("kitten", "sitting"), edits("kitten", "sitting").total
    (Edits(substitutions=2, deletions=0, insertions=1), 3)
    """
    row = [(j, 0, 0, j) for j in range(len(hypothesis) + 1)]  # edits, substitutions, deletions, insertions
    for i, wanted in enumerate(reference, 1):
        above, row = row, [(i, 0, i, 0)]
        for j, given in enumerate(hypothesis, 1):
            n, s, d, k = above[j - 1]
            diagonal = (n, s, d, k) if wanted == given else (n + 1, s + 1, d, k)
            n, s, d, k = above[j]
            deleted = (n + 1, s, d + 1, k)
            n, s, d, k = row[j - 1]
            row.append(min(diagonal, deleted, (n + 1, s, d, k + 1), key=lambda way: (way[0], -way[1])))
    return Edits(*row[-1][1:])


def error_rate(references: Sequence[Sequence[Any]], hypotheses: Sequence[Sequence[Any]], *, seed: int = 0) -> ErrorRate:
    """The error rate of a corpus of sequences, one hypothesis for each reference; ``seed`` is that of the bootstrap.

    UserError if there are not as many hypotheses, or if all references are empty.
    """
    if len(references) != len(hypotheses):
        raise UserError(f"there are {len(references)} references and {len(hypotheses)} hypotheses: an error rate needs one "
                        "hypothesis for each reference")
    lengths = np.array([len(reference) for reference in references])  # [N]
    if not lengths.sum():
        raise UserError(f"the {len(references)} references are empty, and an error rate is relative to their length: give at "
                        "least one word")
    counts = [edits(*pair) for pair in zip(references, hypotheses, strict=True)]
    totals = np.array([count.total for count in counts])  # [N]
    return ErrorRate(float(totals.sum() / lengths.sum()), *bootstrap(totals, lengths, seed=seed),
                     *(int(n) for n in np.sum(counts, axis=0)), int(lengths.sum()))


def bootstrap(edits: np.ndarray, lengths: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The bounds of the 95 % interval of Σ edits / Σ lengths over utterances [N]."""
    drawn = np.random.default_rng(seed).multinomial(len(lengths), np.full(len(lengths), 1 / len(lengths)), DRAWS)  # [draws N]
    sizes = drawn @ lengths
    rates = (drawn @ edits)[sizes > 0] / sizes[sizes > 0]
    low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], *, seed: int = 0) -> ErrorRate:
    """WER: the error rate over words, which white space separates."""
    return error_rate(*([text.split() for text in texts] for texts in (references, hypotheses)), seed=seed)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str], *, seed: int = 0) -> ErrorRate:
    """CER: the error rate over characters, where any white space within a text counts as one space."""
    return error_rate(*([" ".join(text.split()) for text in texts] for texts in (references, hypotheses)), seed=seed)
