"""lsh_attention: every query sees the keys that share a bucket with it (Reformer, arXiv 2001.04451, section 2 and appendix A).

Position i has the bucket h_r(i) in round r. Numbers in brackets name the paper's equations.

    k̂_j = k_j / √(|k_j|² + K ε)                    unit keys: only the direction of a key counts, as in its hash
    C_ij = how often query i sees key j            the number of rounds r with h_r(i) = h_r(j), where j < i; without a causal
                                                   mask j ≠ i
    P_ij ∝ C_ij exp(scale · q_i · k̂_j)             the softmax over what i sees; with ``correction`` C_ij counts as 1
    y_i = Σ_j P_ij v_j                             (2), (6)

Queries and keys are one and the same vector in Reformer (q = k), which always fits itself best. So a query sees its own
position only if it sees no other in any round, as at position 0. Its output is then v_i. The paper subtracts 10⁵ from the score
of a position with itself (16), and so does its code. This gives the same for |q| below 10⁴, where exp(-10⁵ + 2·10⁴) is 0.

Rounds. The paper computes an output o^r and a log-sum-exp Z^r in every round alone, and merges them (appendix A):

    o_i = Σ_r exp(Z_i^r - Z_i) o_i^r               (14), with Z_i = ln Σ_r exp(Z_i^r)
    o_i^r                                          (15), where ln N_ij is subtracted from the scores, N_ij = C_ij (16)

A key that is seen in N rounds then counts N times 1/N: the merged rounds are one softmax over the union of what they see.
Without the subtraction it counts N times. The form ``rounds`` is written like this, ``union`` as one softmax.

What a round shows. The positions are sorted by (bucket, position).

    chunk None      all positions of the same bucket, however many: the paper's definition of P_i (4). With ``window``
                    w those alone that are fewer than w places away in the order. What a query sees depends on the past alone.
    chunk m         the order is cut into pieces of m; a query sees its own piece and the piece before it (5). ``across`` says
                    whether positions of other buckets in them are seen too. The piece before the first is none, the last one
                    of the same round (wrap "same"), or the last one of the round before (wrap "previous", where round 0
                    follows the last round), as in the published codes. Where the cuts fall depends on all positions, so which
                    past keys a query sees depends on the future, if the buckets do: a chunked model is causal in its values,
                    and not in what it sees.

The queries are those of the last T of S positions, as in the operator attention: position i has the query i - (S - T).

Gradients, for the merged weights P and the gradient g_i of y_i. Nothing flows through buckets and orders. Reformer gives one
tensor as q and k, whose gradient is dq + dk:

    dS_ij = P_ij (g_i · v_j - g_i · y_i)      dv_j = Σ_i P_ij g_i
    dq_i = scale Σ_j dS_ij k̂_j                dk̂_j = scale Σ_i dS_ij q_i
    dk_j = (dk̂_j - k̂_j (k̂_j · dk̂_j)) / √(|k_j|² + K ε)
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import becomes, causal, independent, law, linear_in
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import logsumexp, softmax, sqrt, stack, where

from ..lsh import check_labels
from ..pairs import scores, weighted

WRAPS = "none", "same", "previous"


def seen_by(t: int, buckets, chunk, window, across, wrap, causal) -> Counter:
    """How often position t sees each other position, over the rounds of buckets[R S]."""
    seen: Counter = Counter()
    orders = [sorted(range(len(row)), key=row.__getitem__) for row in buckets]
    for r, (row, order) in enumerate(zip(buckets, orders, strict=True)):
        place = order.index(t)
        if chunk is None:
            keys = [j for p, j in enumerate(order) if row[j] == row[t] and (window is None or abs(p - place) < window)]
        else:
            piece, ends = place // chunk, {"none": [], "same": order, "previous": orders[r - 1]}[wrap]
            before = order[max(piece - 1, 0) * chunk : piece * chunk] or ends[(len(ends) - 1) // chunk * chunk :]
            keys = [j for j in order[piece * chunk : (piece + 1) * chunk] if across or row[j] == row[t]]
            other = piece == 0 and wrap == "previous" and len(orders) > 1  # a bucket of another round is another bucket
            keys += [j for j in before if across or (not other and row[j] == row[t])]
        seen.update(j for j in keys if j < t or (j > t and not causal))
    return seen


@op("q[B H T K], k[B H S K], v[B H S V], buckets:int[B H R S] -> y[B H T V]",
    laws=[causal("q k:S v:S", causal=True), independent("B H"), linear_in("v")])
def lsh_attention(q, k, v, buckets, *, chunk=None, window=None, across=False, wrap="none", correction=True, causal=True,
                  scale=1.0, eps=1e-6):
    """y_i = Σ_j softmax_j(scale · q_i · k̂_j) v_j over the keys that share a bucket or a piece of the order with query i.

    q[B H T K] of the last T positions, k[B H S K], v[B H S V], buckets[B H R S] of R rounds, not negative -> y[B H T V]. The
    page above says what the parameters mean. DomainError for a value that is not allowed, ShapeError for T above S.
    """
    (batch, heads, length, width), first = q.shape, k.shape[2] - q.shape[2]
    y = np.zeros((batch, heads, length, v.shape[3]), q.dtype)
    for b, h, i in np.ndindex(batch, heads, length):
        seen = seen_by(first + i, buckets[b, h].tolist(), chunk, window, across, wrap, causal)
        logits = {}
        for j, count in seen.items():
            norm = math.sqrt(sum(x * x for x in k[b, h, j].tolist()) + width * eps)
            product = sum(q[b, h, i, c].item() * k[b, h, j, c].item() for c in range(width))
            logits[j] = scale * product / norm + (0 if correction else math.log(count))
        top = max(logits.values(), default=0.0)  # exp(s - top) cannot overflow
        total = sum(math.exp(s - top) for s in logits.values())
        for j, s in logits.items():
            y[b, h, i] += math.exp(s - top) / total * v[b, h, j]
        if not seen:
            y[b, h, i] = v[b, h, first + i]  # itself, as there is nothing else
    return y


def counts(buckets, queries: int, chunk, window, across, wrap, causal):
    """How often each of the last queries sees each key in every round, [B H R T S]."""
    xp = namespace(buckets)
    length = buckets.shape[3]
    places = xp.argsort(xp.argsort(buckets, axis=-1, kind="stable"), axis=-1, kind="stable")  # in the order [B H R S]

    def pairs(values):
        return values[..., length - queries :, None], values[..., None, :]

    mine, other = pairs(buckets)
    shared = mine == other
    if chunk is None:
        seen = shared
        if window is not None:
            p, at = pairs(places)
            seen = seen & (abs(p - at) < window)
        seen = seen.astype(np.intp)
    else:
        piece, at = pairs(places // chunk)
        near = (piece == at) | (piece == at + 1)
        seen = (near & (shared | across)).astype(np.intp)
        if wrap != "none":
            ends, rounds = places // chunk, buckets.shape[2]
            if wrap == "previous":
                ends = xp.roll(ends, 1, axis=2)
            at = pairs(ends)[1]
            counted = shared | across if wrap == "same" or rounds == 1 else xp.full(shared.shape, across)
            seen = seen + ((piece == 0) & (at == max(length - 1, 0) // chunk) & counted)
    position, key = xp.arange(length - queries, length)[:, None], xp.arange(length)
    return seen * (key < position if causal else key != position)


def _shown(buckets, queries: int, *rule):
    """The counts [B H R T S], and where a query sees nothing but itself [B H T S]."""
    xp, keys = namespace(buckets), buckets.shape[3]
    seen = counts(buckets, queries, *rule)
    own = xp.arange(keys) == xp.arange(keys - queries, keys)[:, None]
    return seen, own & ~(seen.sum(axis=2) > 0).any(axis=-1, keepdims=True)


def _unit(k, eps: float):
    """k̂ = k / √(|k|² + K ε)."""
    return k / sqrt((k * k).sum(axis=-1, keepdims=True) + k.shape[3] * eps)


@lsh_attention.form
def union(q, k, v, buckets, chunk, window, across, wrap, correction, causal, scale, eps):
    """One softmax over the union of what the rounds show, by a mask of all pairs. Time and memory O(S T) for each head."""
    xp = namespace(q.data)
    seen, alone = _shown(buckets, q.shape[2], chunk, window, across, wrap, causal)
    total = seen.sum(axis=2)  # C [B H T S]
    mask = (total > 0) | alone
    logits = scores(q * scale, _unit(k, eps), mask)
    if not correction:
        logits = logits + Tensor.wrap(xp.log(xp.maximum(total, 1)).astype(q.dtype))
    return weighted(softmax(logits, mask), v, mask)


@lsh_attention.form
def rounds(q, k, v, buckets, chunk, window, across, wrap, correction, causal, scale, eps):
    """The rounds one by one, merged by their log-sum-exps, as in appendix A."""
    xp, unit = namespace(q.data), _unit(k, eps)
    seen, alone = _shown(buckets, q.shape[2], chunk, window, across, wrap, causal)
    total, outputs, sums, masks = xp.maximum(seen.sum(axis=2), 1), [], [], []
    for r in range(seen.shape[2]):
        mask = (seen[:, :, r] > 0) | alone  # who is alone is so in every round, and all have the same output
        weight = xp.maximum(seen[:, :, r], 1) / (total if correction else 1)  # 1/N, where a round shows a key once
        logits = scores(q * scale, unit, mask) + Tensor.wrap(xp.log(weight).astype(q.dtype))
        outputs.append(weighted(softmax(logits, mask), v, mask))  # o^r [B H T V]
        sums.append(logsumexp(where(mask, logits, -math.inf)))  # Z^r [B H T]
        masks.append(mask.any(axis=-1))
    share = softmax(stack(sums), xp.stack(masks), axis=0)  # exp(Z^r - Z) [R B H T]
    return (share[..., None] * stack(outputs)).sum(axis=0)


lsh_attention.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
lsh_attention.kernel("cpu")
lsh_attention.kernel("cuda")


@lsh_attention.validate
def _(q, k, buckets, chunk, window, across, wrap, correction, causal, scale, eps):
    if q.shape[2] > k.shape[2]:
        raise ShapeError(f"lsh_attention: {q.shape[2]} queries of {k.shape[2]} positions, allowed: as many at most")
    if not k.shape[3] or not buckets.shape[2]:
        raise ShapeError(f"lsh_attention: k {k.shape} and buckets {buckets.shape}, allowed: at least one channel and one round")
    for name, value in (("chunk", chunk), ("window", window)):
        if value is not None and (type(value) is not int or value < 1):
            raise DomainError(f"lsh_attention: {name} {value!r}, allowed: an integer from 1, or None")
    if wrap not in WRAPS:
        raise DomainError(f"lsh_attention: wrap {wrap!r}, allowed: {', '.join(WRAPS)}")
    if chunk is None and (across or wrap != "none"):
        raise DomainError("lsh_attention: across and wrap are about pieces of the order, give a chunk with them")
    if chunk is not None and window is not None:
        raise DomainError("lsh_attention: a window is about whole buckets, give it without a chunk")
    if not eps > 0:
        raise DomainError(f"lsh_attention: eps {eps!r}, allowed: a number above 0")
    check_labels("lsh_attention", buckets)


@lsh_attention.inputs
def _(draw):
    batch, heads, queries = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 6, "T")
    width, out = draw.size(1, 4, "K"), draw.size(0, 3, "V")
    keys = queries + draw.choice((0, 0, 1, 3))
    buckets = draw.integers(0, draw.integer(1, 4), batch, heads, draw.integer(1, 3), keys)
    params = {"correction": draw.boolean(), "causal": draw.integer(0, 3) > 0, "scale": draw.choice((1.0, 0.6)),
              "eps": draw.choice((1e-6, 1e-2))}
    if draw.boolean():
        params |= {"chunk": draw.choice((1, 2, 3, max(keys, 1))), "across": draw.boolean(), "wrap": draw.choice(WRAPS)}
    else:
        params |= {"window": draw.choice((None, None, 1, 3))}
    return (draw.floats(batch, heads, queries, width), draw.floats(batch, heads, keys, width),
            draw.floats(batch, heads, keys, out), buckets), params


def _masked(case, seen):
    """What one softmax over the unit keys in a mask gives, where a row that sees nothing sees itself."""
    keys, queries = case.k.shape[2], case.q.shape[2]
    own = np.arange(keys) == np.arange(keys - queries, keys)[:, None]
    seen = seen & ~own
    seen = np.broadcast_to(seen | (own & ~seen.any(-1, keepdims=True)), (*case.q.shape[:3], keys))
    unit = case.k / np.sqrt((case.k**2).sum(-1, keepdims=True) + case.k.shape[3] * case.k.dtype.type(case.eps))
    weights = np.where(seen, np.exp(case.scale * case.q @ unit.swapaxes(2, 3)), 0).astype(case.q.dtype)
    return weights / weights.sum(-1, keepdims=True) @ case.v


def _all(case):
    """Everything that a query may see."""
    past = np.tril(np.ones((case.q.shape[2], case.k.shape[2]), bool), case.k.shape[2] - case.q.shape[2])
    return past if case.causal else np.ones_like(past)


WHOLE = dict(chunk=None, window=None, across=False, wrap="none")


@becomes(lsh_attention, "attention", "one bucket holds everything, and k is q of length 1")
def _(case, draw):
    y = case(buckets=np.zeros_like(case.buckets), **WHOLE, correction=True).y
    assert_close(y, _masked(case, _all(case)), "one bucket is not full attention", terms=64)


@becomes(lsh_attention, "attention", "a chunk is as long as the text, and k is q of length 1")
def _(case, draw):
    whole = {**WHOLE, "chunk": max(case.k.shape[2], 1) + draw.integer(0, 2), "across": True}
    for correction in (False, True):
        y = case(**whole, correction=correction).y
        assert_close(y, _masked(case, _all(case)), "a piece is not full attention", terms=64)


def _union(case, **changes):
    """What one softmax gives over the union of what the rounds show."""
    rule = {name: changes.get(name, case[name]) for name in ("chunk", "window", "across", "wrap", "causal")}
    return _masked(case, counts(case.buckets, case.q.shape[2], **rule).sum(axis=2) > 0)


@law(lsh_attention, "rounds merged are one softmax over the union of what they show")
def _(case, draw):
    assert_close(case(correction=True).y, _union(case), "merged rounds are not the union", terms=64)


@law(lsh_attention, "other names for the buckets change nothing")
def _(case, draw):
    names = draw.generator().permutation(10)
    assert_close(case(**WHOLE, buckets=names[case.buckets], correction=True).y, _union(case, **WHOLE),
                 "the names of buckets count", terms=64)


@law(lsh_attention, "rounds that come twice change nothing")
def _(case, draw):
    wrap, twice = "none" if case.wrap == "previous" else case.wrap, np.repeat(case.buckets, 2, axis=2)
    assert_close(case(buckets=twice, wrap=wrap, correction=True).y, _union(case, wrap=wrap), "a round counts twice", terms=64)
    assert_close(case(buckets=twice, wrap=wrap).y, case(wrap=wrap).y, "a round counts twice", terms=64)


@law(lsh_attention, "the length of a key does not count")
def _(case, draw):
    assert_close(case(k=case.k * 4, eps=case.eps * 16).y, case().y, "the length of a key counts", terms=64)


@law(lsh_attention, "what other buckets hold does not count")
def _(case, draw):
    if not case.k.shape[2] or case.across:
        return
    t, other = case.k.shape[2] - 1, case.buckets[..., :1, -1:]
    hidden = ~(case.buckets == case.buckets[..., -1:]).any(axis=2)  # [B H S], from the last position
    spoilt = np.where(hidden[..., None], np.nan, case.k), np.where(hidden[..., None], np.nan, case.v)
    if case.q.shape[2]:
        assert_close(case(k=spoilt[0], v=spoilt[1]).y[:, :, -1], case().y[:, :, -1], f"position {t} sees bucket {other}")


@law(lsh_attention, "the weights sum to one")
def _(case, draw):
    y = case(v=1.0).y
    assert_close(y, np.ones_like(y), "weights do not sum to 1", terms=16)


@law(lsh_attention, "the last queries are those of the whole sequence")
def _(case, draw):
    first = case.k.shape[2] - case.q.shape[2]
    earlier = draw.floats(*case.q.shape[:2], first, case.q.shape[3])
    whole = case(q=np.concatenate([earlier, case.q], axis=2)).y
    assert_close(whole[:, :, first:], case().y, "a query depends on how many are asked", terms=64)
