"""merge_attention: the results of attention for two sets of keys become the result for both sets together.

The same queries attend to the keys of a set A and to those of a set B. Each result is a pair: the outputs y, and the logs lse
of the sums that the softmax divided by. attention returns both.

    y_A = Σ_{j in A} exp(S_j) v_j / exp(lse_A)               lse_A = ln Σ_{j in A} exp(S_j), and the same for B
    lse = ln (exp(lse_A) + exp(lse_B))
    y   = w_A y_A + w_B y_B                                  w_A = exp(lse_A - lse), w_B = exp(lse_B - lse)

Why this is exact: exp(lse) is the sum of exp(S_j) over A and B, and w_A y_A is the part of the mean over A and B that belongs
to the keys of A. So the merged pair is that of one softmax over all keys. A key that is in both sets counts twice. More sets
are merged one after the other, in any order, because a merged pair is again a pair of the same kind.

A set in which a query sees nothing has lse = -∞, so its weight is exactly 0 and its y may hold anything. If both are -∞, y is 0
and lse is -∞. The larger of the two lse is subtracted before exp, which prevents overflow.

Gradients. Let g be the gradient of y and c that of lse.

    dy_A = w_A g      dlse_A = w_A (w_B g · (y_A - y_B) + c)      the same for B, with A and B exchanged

The factor w_B (y_A - y_B) is y_A - y: a key set gains weight where its mean is better than the merged one. The gradient of
lse_A then goes into attention, which adds P_ij dlse_i to the gradients of its scores. Without this part, the gradients are
wrong.
"""

from __future__ import annotations

import math

import numpy as np

from autograd.laws import becomes, independent, law, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import logsumexp, softmax, stack, where

from ..attention import attention


@op("y[B H T V], lse[B H T], other_y[B H T V], other_lse[B H T] -> y[B H T V], lse[B H T]", logs="lse",
    laws=[independent("B H T V"), linear_in("y"), linear_in("other_y"), shift_invariant("lse other_lse", moves="lse")])
def merge_attention(y, lse, other_y, other_lse):
    """y = (e^lse y + e^other_lse other_y) / (e^lse + e^other_lse), and the log of this sum: attention over the keys of both.

    y[B H T V] and lse[B H T] are what attention returns for some keys, other_y[B H T V] and other_lse[B H T] for others. A row
    whose lse is -∞ counts as nothing; two such rows give zeros and -∞.
    """
    merged, total = np.zeros_like(y), np.full_like(lse, -math.inf)
    for at in np.ndindex(lse.shape):
        parts = [(s[at].item(), x[at]) for s, x in ((lse, y), (other_lse, other_y)) if s[at] != -math.inf]
        if parts:
            top = max(s for s, _ in parts)  # exp(s - top) cannot overflow
            weights = [math.exp(s - top) for s, _ in parts]
            total[at] = top + math.log(sum(weights))
            merged[at] = sum(w / sum(weights) * x for w, (_, x) in zip(weights, parts, strict=True))
    return merged, total


@merge_attention.form
def weighted(y, lse, other_y, other_lse):
    """The softmax of the two lse weighs the two y."""
    both = stack([lse, other_lse], axis=3)  # [B H T 2]
    weights = softmax(both)  # 0 and 0 where both are -∞
    merged = 0.0
    for i, (x, s) in enumerate(((y, lse), (other_y, other_lse))):
        there = (s.data != -math.inf)[..., None]
        merged = merged + weights[..., i : i + 1] * (x if there.all() else where(there, x, 0.0))
    return merged, logsumexp(both, axis=3)


merge_attention.kernel("cpu")
merge_attention.kernel("cuda")


@merge_attention.inputs
def _(draw):
    batch, heads, length, out = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 5, "T"), draw.size(0, 4, "V")
    y, other_y = draw.floats(batch, heads, length, out), draw.floats(batch, heads, length, out)
    scale = draw.choice((1, 4, 100))

    def logs():
        lse = scale * draw.floats(batch, heads, length)
        hidden = draw.mask(*lse.shape) & draw.mask(*lse.shape) if draw.boolean() else np.zeros(lse.shape, bool)
        return draw.layout(np.where(hidden, lse.dtype.type(-math.inf), lse))

    return (y, logs(), other_y, logs()), {}


def _close(found, expected, message):
    for name, one, two in zip(("y", "lse"), found, expected, strict=True):
        assert_close(one, two, f"{name}: {message}", terms=64)


@law(merge_attention, "three are merged in any order")
def _(case, draw):
    """(a with b) with c is (c with b) with a."""
    a, b = (case.y, case.lse), (case.other_y, case.other_lse)
    c = draw.floats(*case.y.shape), draw.floats(*case.lse.shape)

    def merged(one, two):
        return case(y=one[0], lse=one[1], other_y=two[0], other_lse=two[1])

    _close(merged(merged(a, b), c), merged(merged(c, b), a), "the order of three matters")


@law(merge_attention, "nothing adds nothing")
def _(case, draw):
    there = case.lse != -math.inf
    alone = case(other_y=math.nan, other_lse=-math.inf)
    _close(alone, (np.where(there[..., None], case.y, 0), case.lse), "a set without keys changes the result")


@becomes(merge_attention, "attention", "the parts are attention to sets of keys")
def _(case, draw):
    batch, heads, length, out = case.y.shape
    keys, cut = draw.integer(0, 6), draw.integer(0, 6)
    q, k, v = (draw.floats(batch, heads, n, size) for n, size in ((length, 3), (keys, 3), (keys, out)))

    def pair(*parts):
        """y and lse of attention over these slices of the keys."""
        with np.errstate(all="ignore"):
            arrays = (q, *(np.concatenate([x[:, :, part] for part in parts], axis=2) for x in (k, v)))
            return [x.astype(q.dtype) for x in attention.definition(*(x.astype(np.float64) for x in arrays), causal=False)]

    (y, lse), (other_y, other_lse) = pair(slice(cut)), pair(slice(None))  # the first keys count twice
    _close(case(y=y, lse=lse, other_y=other_y, other_lse=other_lse), pair(slice(cut), slice(None)),
           "merging is not one softmax over all keys")
