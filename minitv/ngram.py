"""What counting can do: n-gram models, the baseline of every run."""

from __future__ import annotations

import numpy as np


def ngram_bpc(train_ids: np.ndarray, held_ids: np.ndarray, vocab: int, max_order: int = 5) -> list[float]:
    """Bits per held-out token of interpolated Witten-Bell models with histories of 0 to ``max_order`` tokens.

    p(c | h) = (N(hc) + T(h) p(c | h')) / (N(h) + T(h)), where N counts in the training text, T(h) is the number of
    distinct tokens seen after h, and h' is h without its first token. Below the empty history stands the uniform
    distribution; a history never seen gives p(c | h'). All held-out tokens are scored, the first ones with a history
    that reaches into the training text, which they follow. (Witten and Bell 1991, IEEE Trans. Inf. Theory 37(4).)
    """
    ids = np.concatenate([train_ids, held_ids]).astype(np.int64)
    trained = len(train_ids)
    p = np.full(len(held_ids), 1 / vocab)
    history = np.zeros(len(ids), np.int64)  # of each token: the number of its history among those seen, or -1
    bits = []
    for order in range(max_order + 1):
        key = np.where(history < 0, -1, history * vocab + ids)
        first = min(order, trained)  # the first token with a full history
        grams, gram, count = np.unique(key[first:trained], return_inverse=True, return_counts=True)
        place = np.searchsorted(grams, key[trained:])
        seen = np.append(grams, -2)[place] == key[trained:]

        histories = history.max(initial=0) + 1
        total = np.bincount(grams // vocab, count, histories)  # N(h)
        distinct = np.bincount(grams // vocab, minlength=histories)  # T(h)
        total, distinct = np.append(total, 0), np.append(distinct, 0)  # what history -1 finds
        n, t = total[history[trained:]], distinct[history[trained:]]
        hits = np.where(seen, np.append(count, 0)[place], 0)
        p = np.where(n > 0, (hits + t * p) / np.maximum(n + t, 1), p)
        bits.append(float(-np.log2(p).mean()) + 0.0)

        # the grams are the histories of the next order, one token later
        history = np.concatenate([np.full(first, -1), gram, np.where(seen, place, -1)])
        history = np.concatenate([[-1], history[:-1]])
    return bits
