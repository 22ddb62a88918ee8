"""From frames to labels: greedy decoding, prefix beam search, and the best path of a known target.

A path names a class for every frame, and reads as labels by the rule of CTC (``collapse``): equal neighbours become one, then
blanks, written _ here, are dropped. *Greedy* decoding takes the best class of each frame. That is the best path, but many paths
read alike, and the best transcript may be another one:

>>> import numpy as np
>>> logits = np.log([[0.6, 0.4], [0.6, 0.4]])              # [T V] of the blank and a
>>> greedy(logits[None])                                   # _ _ has 0.36
[[]]
>>> [(labels, round(float(np.exp(score)), 2)) for labels, score in beam_search(logits)]  # a a, a _ and _ a have 0.64
[((1,), 0.64), ((), 0.36)]

*Prefix beam search* (Hannun et al. 2014, arXiv 1408.2873) adds up paths that read alike, frame by frame. For each transcript
so far it keeps two probabilities, of the paths that end in a blank and of those that end in the last label: only after a blank
may the same label begin anew. With as many beams as there are transcripts the sums are exact, exp(-ctc_loss).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from autograd.errors import DomainError, ShapeError


def collapse(path: Sequence[int], *, blank: int = 0, previous: int | None = None) -> list[int]:
    """The labels that a path reads as: runs of the same class become one, then blanks are dropped.

    ``previous`` is the class of the frame before the path, where the path goes on with an earlier one.

    >>> collapse([0, 1, 1, 0, 1, 2])
    [1, 1, 2]
    >>> collapse([0, 1]) + collapse([1, 0, 1, 2], previous=1)
    [1, 1, 2]
    """
    labels = []
    for symbol in path:
        if symbol != previous and symbol != blank:
            labels.append(symbol)
        previous = symbol
    return labels


def greedy(logits: np.ndarray, lengths: np.ndarray | None = None, *, blank: int = 0) -> list[list[int]]:
    """The labels of the best path of each utterance: logits [B T V], or log-probabilities, of which lengths[B] frames count.

    In a stream, ``collapse(part.argmax(-1).tolist(), previous=...)`` of each new part [T V] needs the last class only.
    """
    if logits.ndim != 3 or (lengths is not None and np.shape(lengths) != logits.shape[:1]):
        raise ShapeError(f"greedy: logits {logits.shape} and lengths {np.shape(lengths) if lengths is not None else None}, "
                         "allowed: [B T V] and [B]")
    ends = [logits.shape[1]] * len(logits) if lengths is None else lengths
    return [collapse(path[:end].tolist(), blank=blank) for path, end in zip(logits.argmax(axis=-1), ends, strict=True)]


def beam_search(logits: np.ndarray, *, beams: int = 16, blank: int = 0,
                language: Callable[[tuple[int, ...], int | None], float] | None = None) -> list[tuple[tuple[int, ...], float]]:
    """The most probable transcripts of one utterance, logits [T V], and ln of their scores, the best first.

    ``language(labels, label)`` is added to the score where a label follows these labels, and ``language(labels, None)`` at the
    end: the logarithm of what a language model says, times its weight, plus a bonus for each label. A model of words returns 0
    within them. ``beams`` transcripts are kept after each frame. Without a language model the scores are ln of
    probabilities, or of parts of them where paths have been dropped.
    """
    if logits.ndim != 2 or not 0 <= blank < logits.shape[1]:
        raise ShapeError(f"beam_search: logits {logits.shape} and blank {blank}, allowed: [T V] and a class of V")
    if type(beams) is not int or beams < 1:
        raise DomainError(f"beam_search: beams {beams!r}, allowed: an integer from 1")
    logits = logits.astype(np.float64)
    ln_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    kept = {(): (0.0, -math.inf)}  # labels: ln of the paths that end in a blank, and of those that end in the last label
    bonus = {(): 0.0}  # what the language model adds
    for row in ln_p.tolist():
        blanks, nonblanks = defaultdict(list), defaultdict(list)
        for labels, (in_blank, in_label) in kept.items():
            both = _logsum([in_blank, in_label])
            blanks[labels].append(both + row[blank])
            for symbol, score in enumerate(row):
                if symbol == blank or score == -math.inf:
                    continue
                longer = (*labels, symbol)
                if labels and symbol == labels[-1]:
                    nonblanks[labels].append(in_label + score)  # the label goes on
                    nonblanks[longer].append(in_blank + score)
                else:
                    nonblanks[longer].append(both + score)
                if longer not in bonus:
                    bonus[longer] = bonus[labels] + (language(labels, symbol) if language else 0.0)
        found = {labels: (_logsum(blanks[labels]), _logsum(nonblanks[labels])) for labels in {**blanks, **nonblanks}}
        total = {labels: _logsum(pair) + bonus[labels] for labels, pair in found.items()}
        best = heapq.nsmallest(beams, total, key=lambda labels: (-total[labels], labels))
        kept = {labels: found[labels] for labels in best if total[labels] > -math.inf}
        bonus = {labels: bonus[labels] for labels in kept}
    scores = {labels: _logsum(pair) + bonus[labels] + (language(labels, None) if language else 0.0)
              for labels, pair in kept.items()}
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def align(logits: np.ndarray, target: Sequence[int], *, blank: int = 0) -> list[int]:
    """The best path [T] of one utterance, logits [T V], that reads as ``target``: which frames belong to which label.

    DomainError if no path does.

    >>> align(np.log([[0.6, 0.4], [0.1, 0.9], [0.9, 0.1]]), [1])
    [0, 1, 0]
    """
    e = [blank, *(symbol for label in target for symbol in (label, blank))]
    best, steps = [0.0] + (len(e) - 1) * [-math.inf], []  # before the first frame, as in ctc_loss
    for row in logits.tolist():
        steps.append([max((best[r], r) for r in (s, s - 1, s - 2)[: 3 if s > 1 and e[s] not in (blank, e[s - 2]) else 2]
                          if r >= 0)[1] for s in range(len(e))])
        best = [best[r] + row[e[s]] for s, r in enumerate(steps[-1])]
    s = max(range(max(len(e) - 2, 0), len(e)), key=best.__getitem__)
    if best[s] == -math.inf:
        raise DomainError(f"align: no path of {len(logits)} frames reads as these {len(target)} labels")
    path = []
    for step in reversed(steps):
        path.append(e[s])
        s = step[s]
    return path[::-1]


def _logsum(values: Sequence[float]) -> float:
    top = max(values, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(x - top) for x in values))
