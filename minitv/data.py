"""The windows of token ids that training and evaluation see."""

from __future__ import annotations

import itertools

import numpy as np

from autograd.philox import philox
from autograd.random import Random

from .errors import UserError

STORED = 2**21  # the order of this many windows is stored; that of more is computed where it is needed


class Batches:
    """Windows of the ids in random order, a pure function of the seed and the step: a resumed run goes on with its own.

    Each pass over the text cuts it, from a random place on, into windows that do not overlap, and shuffles them: no
    part is seen twice before every part was seen once.
    """

    def __init__(self, ids: np.ndarray, batch: int, context: int, seed: int):
        check_length(ids, context, "the text of the batches")
        self._ids, self._shape, self._random = ids, (batch, context), Random(seed)
        self._windows = max(1, len(ids) // context - 1)  # so that the first one can begin at any of `context` places
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [B T] and labels [B T], the tokens that follow them."""
        batch, context = self._shape
        drawn = range(step * batch, (step + 1) * batch)
        passes = itertools.groupby(drawn, lambda i: i // self._windows)
        starts = [self._starts(epoch, np.array([i % self._windows for i in some])) for epoch, some in passes]
        return _gather(self._ids, np.concatenate(starts), context)

    def _starts(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Where the windows begin that one pass over the text sees at some places of its order."""
        context = self._shape[1]
        offset = self._random.split(epoch, 0).integers(0, len(self._ids) - self._windows * context)
        return offset + context * self._window(epoch, places)

    def _window(self, epoch: int, places: np.ndarray) -> np.ndarray:
        random = self._random.split(epoch, 1)
        if self._windows > STORED:
            return shuffled(places, self._windows, random)
        if self._order[0] != epoch:
            self._order = epoch, random.permutation(self._windows).astype(np.int32)
        return self._order[1][places].astype(np.int64)


def shuffled(places: np.ndarray, n: int, random: Random) -> np.ndarray:
    """What stands at some places [N] of a random order of 0 .. n-1 that is not stored, int64 [N].

    A Feistel network of four rounds permutes the numbers below a power of 4; one that leads to n or beyond goes through it
    again until it falls below n. (Luby and Rackoff 1988, SIAM J. Comput. 17(2); Black and Rogaway 2002, CT-RSA.)
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask = np.uint64(2**half - 1)
    numbers = places.astype(np.uint64)  # [N]
    todo = np.arange(len(numbers))  # places whose number is not below n yet
    while todo.size:
        left, right = numbers[todo] >> np.uint64(half), numbers[todo] & mask
        for number in range(4):
            left, right = right, left ^ (philox(right, number, 0, 3, random.seed)[0] & mask)
        numbers[todo] = left << np.uint64(half) | right
        todo = todo[numbers[todo] >= n]
    return numbers.astype(np.int64)


def windows(ids: np.ndarray, context: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [N T] and labels [N T]: evenly spaced windows that do not overlap, N = tokens / T rounded down.

    At least one window, and at most those that fit.
    """
    check_length(ids, context, "the text of the windows")
    last = len(ids) - 1  # the last token is only a label
    count = max(1, min(last, tokens) // context)
    return _gather(ids, np.arange(count) * last // count, context)


def check_length(ids: np.ndarray, context: int, part: str) -> None:
    """Raise UserError if a part of the text has no window of context + 1 tokens."""
    if len(ids) < context + 1:
        raise UserError(f"{part} has {len(ids)} tokens, and --context {context} needs at least {context + 1}: "
                        "give a longer text with --data, or a smaller --context")


def _gather(ids: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.lib.stride_tricks.sliding_window_view(ids, context + 1)[starts]  # [B T+1]
    return rows[:, :-1].astype(np.intp), rows[:, 1:].astype(np.intp)
