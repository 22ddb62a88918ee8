"""What counting can do: n-gram models, the baseline of every run."""

from __future__ import annotations

from typing import Any

import numpy as np

PIECE = 2**13  # so many tokens at most follow one another in a sample of a text


def ngram_bpc(train_ids: np.ndarray, held_ids: np.ndarray, vocab: int, max_order: int = 5) -> list[float]:
    """Bits per held-out token of interpolated Witten-Bell models with histories of 0 to ``max_order`` tokens.

    p(c | h) = (N(hc) + T(h) p(c | h')) / (N(h) + T(h)), where N counts in the training text, T(h) is the number of
    distinct tokens seen after h, and h' is h without its first token. Below the empty history stands the uniform
    distribution; a history never seen gives p(c | h'). All held-out tokens are scored, the first ones with a history
    that reaches into the training text, which they follow. (Witten and Bell 1991, IEEE Trans. Inf. Theory 37(4).)
    """
    length = len(train_ids)
    ids = np.concatenate([train_ids, held_ids]).astype(np.min_scalar_type(vocab - 1), copy=False)
    p = np.full(len(held_ids), 1 / vocab)
    number = np.int32 if len(ids) < 2**31 else np.int64
    history = np.zeros(len(ids), number)  # of each token: the number of its history among those seen, or -1
    bits = []
    for order in range(max_order + 1):
        key = history.astype(np.int64)
        key *= vocab
        key += ids
        key[history < 0] = -1
        first = min(order, length)  # the first token with a full history
        grams, gram, count = _number(key[first:length], number)
        key = key[length:]
        place = np.searchsorted(grams, key)
        matches = np.append(grams, -2)[place] == key

        histories = history.max(initial=0) + 1
        total = np.bincount(grams // vocab, count, histories)  # N(h)
        distinct = np.bincount(grams // vocab, minlength=histories)  # T(h)
        total, distinct = np.append(total, 0), np.append(distinct, 0)  # what history -1 finds
        n, t = total[history[length:]], distinct[history[length:]]
        hits = np.where(matches, np.append(count, 0)[place], 0)
        p = np.where(n > 0, (hits + t * p) / np.maximum(n + t, 1), p)
        bits.append(float(-np.log2(p).mean()) + 0.0)

        # the grams are the histories of the next order, one token later
        history[:first + 1] = -1
        history[first + 1:length + 1] = gram[:len(history) - first - 1]
        history[length + 1:] = np.where(matches, place, -1)[:-1]
    return bits


def after(contexts: np.ndarray, tokens: np.ndarray, asked: np.ndarray, held: np.ndarray, vocab: int, below: Any) -> np.ndarray:
    """The probability of each of the tokens ``held`` [M] in its context ``asked`` [M], by what stands in other ones.

    ``tokens`` [N] stood in the ``contexts`` [N], integers from 0 up. As above, p(c | h) = (N(hc) + T(h) below) / (N(h) + T(h)),
    where ``below`` [M] is what is known without the context.
    """
    pairs, counts = np.unique(contexts.astype(np.int64) * vocab + tokens, return_counts=True)
    seen, first, kinds = np.unique(pairs // vocab, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)  # N(h)
    n, t = (_found(seen, asked, values) for values in (totals, kinds))
    hits = _found(pairs, asked.astype(np.int64) * vocab + held, counts)
    return np.where(n > 0, (hits + t * below) / np.maximum(n + t, 1), below)


def _found(keys: np.ndarray, asked: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value [M] of each key [M] that is asked for, among sorted ones; 0 where it is not there."""
    places = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)


def _number(keys: np.ndarray, number: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different keys, sorted; for each key its number among them; how often each occurs.

    This is np.unique in half of the memory.
    """
    order = np.argsort(keys)
    keys = keys[order]
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    numbers = np.empty(len(keys), number)
    numbers[order] = np.cumsum(new, dtype=number) - 1
    starts = np.flatnonzero(new)
    return keys[starts], numbers, np.diff(starts, append=len(keys))


def sample(ids: np.ndarray, tokens: int) -> np.ndarray:
    """The ids, or where there are more than ``tokens`` of them, about that many in evenly spaced pieces, in order."""
    if len(ids) <= tokens:
        return ids
    pieces = -(-tokens // PIECE)
    size = tokens // pieces
    starts = np.linspace(0, len(ids) - size, pieces).astype(np.int64)
    return np.concatenate([ids[start:start + size] for start in starts])
