"""dilated_attention: attention that is dense near by and thin far away (LongNet, Ding et al. 2023, arXiv 2307.02486).

A pattern (w, r) cuts the sequence into segments of w positions, and keeps every r-th position of a segment. Positions that are
kept are active: they alone have a query, a key and a value in this pattern. A head keeps those from its offset s_h on, so that
different heads keep different ones. Numbers in brackets name the paper's equations.

    active_h(p):  (p mod w) mod r = s_h                      ``offsets`` "modulo": s_h = h mod r, as in (13) to (15)
                                                             "block": s_h = ⌊h / ⌈H / r⌉⌋, as in torchscale
    A_h(p) = {j : active_h(j), ⌊j/w⌋ = ⌊p/w⌋}                what an active position p sees, and j ≤ p if causal

Several patterns (w_i, r_i) are mixed. Each gives an output y_i and the sum Z_i of its softmax, and the mixture weights them by
these sums:

    y_i = Σ_{j ∈ A_i} exp(S_pj) v_j / Z_i,   Z_i = Σ_{j ∈ A_i} exp(S_pj),   S_pj = scale · q_p · k_j
    y = Σ_i (Z_i / Σ_n Z_n) y_i                              (9), (10); a pattern in which p is not active has Z_i = 0
    lse = ln Σ_i Z_i                                         -∞, with y = 0, where p is active in no pattern

One softmax. Put the first line into the second, and each Z_i cancels:

    y = Σ_j C_pj exp(S_pj) v_j / Σ_j C_pj exp(S_pj)          C_pj is the number of patterns in which p sees j

So the mixture is one softmax, in which a key counts as often as there are patterns that show it. Near keys are in several
patterns and therefore count more. Only the form ``counted`` makes the matrix C.

Cost. A pattern costs T w / r² products (16): T / r of all positions are active, and each sees w / r of them. If the w_i and r_i
both grow by a factor a, the sum over the patterns is at most w_1 a / (a - 1) for each position, however long the sequence is
(18).

The kernels are those of attention, called for each pattern. On the CPU they read the active positions of a segment with a
stride, as a short sequence without gaps, so nothing is computed for a position that is not active; and they go on with the sums
that the patterns before have left. On a GPU the outputs of the patterns are mixed afterwards.

Gradients. Because it is one softmax, so is its gradient. Let g be the gradient of y:

    P_pj = exp(S_pj - lse_p)       dS_pj = P_pj (g_p · v_j - g_p · y_p)       with the lse and the y of the mixture

for each pattern that shows j to p, and the gradients of all patterns are added. This is attention's backward pass, which is
given the sums of the mixture in place of a pattern's own. The weights Z_i / Σ Z need no gradient of their own: it is in there.

A cache. The keys may begin before the queries. ``start`` is the position of the first key, and the last of S keys stands where
the last of T queries does. So query i stands at p = start + S - T + i. Keys from the beginning of the largest segment on are
enough; keys that a query could see and that are missing raise DomainError.
"""

from __future__ import annotations

import builtins
import math
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import becomes, causal, independent, law, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, exp, log, logsumexp, put_add, softmax, sum, where

from ..attention import OFFSETS, attention, offset_of
from ..merge_attention import merge_attention
from ..pairs import scores, weighted


def counts(heads, queries, keys, segments, dilations, offsets, causal, start) -> np.ndarray:
    """C [H T S]: the number of patterns in which a query sees a key."""
    p, j = start + keys - queries + np.arange(queries), start + np.arange(keys)  # positions [T], [S]
    C = np.zeros((heads, queries, keys), np.intp)
    for w, r in zip(segments, dilations, strict=True):
        s = offset_of(np.arange(heads), heads, r, offsets)[:, None]
        active_p, active_j = p % w % r == s, j % w % r == s  # [H T], [H S]
        C += active_p[:, :, None] & active_j[:, None] & (p[:, None] // w == j // w)
    return C * (j <= p[:, None]) if causal else C


@op("q[B H T K], k[B H S K], v[B H S V] -> y[B H T V], lse[B H T]", logs="lse",
    laws=[causal("q k:S v:S", causal=True), independent("B"), linear_in("v"),
          # Where outputs of patterns are weighted by exp(lse_i - lse), a large lse loses digits.
          shift_invariant("k", "all keys", step=0.25, but_for="lse", scale=0.25, except_for=("mixture", "distributed"))])
def dilated_attention(q, k, v, *, segments=(32,), dilations=(1,), offsets="modulo", causal=True, scale=None, start=0):
    """y_p = Σ_j C_pj exp(S_pj) v_j / Σ_j C_pj exp(S_pj) with S_pj = scale · q_p · k_j, and the log of the sum below.

    q[B H T K], k[B H S K], v[B H S V] -> y[B H T V], lse[B H T]. C_pj is the number of patterns (segments[i], dilations[i]) in
    which query p sees key j; the page above has the rules of ``offsets`` and ``start``, the position of the first key. A
    position that is active in no pattern gives y 0 and lse -∞. ``scale`` defaults to 1/√K. Fewer keys than queries raise
    ShapeError; no pattern, a segment or a dilation below 1, another rule of offsets, and a start after the beginning of a
    segment of the first query raise DomainError.
    """
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    scale = _scale(scale, width)
    C = counts(heads, queries, keys, segments, dilations, offsets, causal, start)
    y, lse = np.zeros((*q.shape[:3], v.shape[3]), q.dtype), np.full(q.shape[:3], -math.inf, q.dtype)
    for b, h, i in np.ndindex(batch, heads, queries):
        seen = [(j, C[h, i, j].item(), scale * _dot(q[b, h, i], k[b, h, j])) for j in range(keys) if C[h, i, j]]
        top = max((s for _, _, s in seen), default=-math.inf)  # exp(s - top) cannot overflow
        if top == -math.inf:
            continue
        total = builtins.sum(c * math.exp(s - top) for _, c, s in seen)
        lse[b, h, i] = top + math.log(total)
        for j, c, s in seen:
            y[b, h, i] += c * math.exp(s - top) / total * v[b, h, j]
    return y, lse


def _dot(a, b):
    return builtins.sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def _scale(scale: float | None, width: int) -> float:
    """1/√width unless a scale is given; without channels all scores are 0."""
    return scale if scale is not None else 1 / math.sqrt(width) if width else 0.0


@dilated_attention.form
def mixture(q, k, v, segments, dilations, offsets, causal, scale, start):
    """Attention for each pattern, and the mean of their outputs by the sums of their softmaxes."""
    parts = []
    for w, r in zip(segments, dilations, strict=True):
        skip = max((start + k.shape[2] - q.shape[2]) // w * w - start, 0)  # keys before the segment of the first query
        parts.append(attention(q, k[:, :, skip:], v[:, :, skip:], causal=causal, scale=scale, segment=w, dilation=r,
                               offsets=offsets))
    return merged(parts)


def merged(parts) -> tuple[Tensor, Tensor]:
    """y = Σ_i (Z_i / Σ Z) y_i and ln Σ_i Z_i from the outputs y_i[B H T V] and lse_i[B H T] = ln Z_i of patterns."""
    return reduce(lambda one, two: merge_attention(*one, *two), parts)


def detached(q, k, v, *, segments, dilations, **params) -> tuple[Tensor, Tensor]:
    """dilated_attention with another gradient, torchscale's: the weights Z_i / Σ Z count as constants."""
    parts = [dilated_attention(q, k, v, segments=(w,), dilations=(r,), **params)
             for w, r in zip(segments, dilations, strict=True)]
    return merged((y, lse.detach()) for y, lse in parts)


@dilated_attention.form
def counted(q, k, v, segments, dilations, offsets, causal, scale, start):
    """One softmax P over all keys that are seen, and each weight times its count. Time O(T S (K + V)), memory O(T S) a head."""
    C = namespace(q.data).asarray(counts(*q.shape[1:3], k.shape[2], segments, dilations, offsets, causal, start))
    seen = C > 0
    logits = scores(q * _scale(scale, q.shape[3]), k, seen)  # S [B H T S]
    weights = softmax(logits, seen) * Tensor.wrap(C.astype(q.dtype))
    total = sum(weights, axis=-1)  # Σ_j C_pj P_pj, 0 where nothing is seen
    y = weighted(weights / where(total[..., None] == 0, 1.0, total[..., None]), v, seen)
    return y, logsumexp(where(seen, logits, -math.inf)) + log(where(total == 0, 1.0, total))


@dilated_attention.form(tuning={"ranks": 2})
def distributed(q, k, v, segments, dilations, offsets, causal, scale, start, ranks):
    """The paper's algorithm for several machines (section 3.1): each rank has its own part of the sequence."""
    return over_ranks(q, k, v, segments, dilations, offsets, causal, scale, start, ranks)[:2]


def over_ranks(q, k, v, segments, dilations, offsets, causal, scale, start, ranks) -> tuple[Tensor, Tensor, list[list[int]]]:
    """y, lse, and for each rank and pattern how many numbers it receives from other ranks for a sequence, all heads together.

    Rank n holds queries, keys and values of the n-th part of the positions; the keys of the past are with the first one. The
    gradient sends those of keys and values back along the way that they came.
    """
    queries, stop = q.shape[2], start + k.shape[2]
    past, part, ys, lses, received = stop - queries, -(-queries // ranks), [], [], []

    def gather(heads, positions):
        return tuple(x[:, heads][:, :, positions - start] for x in (k, v))

    for rank in range(ranks):
        first, last = (min(past + n * part, stop) for n in (rank, rank + 1))
        y, lse, numbers = on_rank(q[:, :, first - past:last - past], gather, first, start, stop, segments, dilations, offsets,
                                  causal, scale, own=first if rank else start)
        ys, lses, received = [*ys, y], [*lses, lse], [*received, numbers]
    return concat(ys, axis=2), concat(lses, axis=2), received


def on_rank(q, gather, first, start, stop, segments, dilations, offsets, causal, scale,
            own) -> tuple[Tensor, Tensor, list[int]]:
    """y, lse of the positions that one rank holds, and for each pattern how many numbers it receives from other ranks.

    q[B H T K] stands at the positions from ``first`` on, and the rank holds the keys from ``own`` on up to its last query;
    ``gather(heads, positions)`` gives the keys [B G N K] and values [B G N V] of other positions from ``start`` to ``stop``,
    too. Segments that end within the part of the rank need nothing from elsewhere. Of each longer segment that it shares with
    other ranks it gathers what a pattern keeps: fewer than w / r keys, however long the sequence is.
    """
    (batch, heads, queries, width), last = q.shape, first + q.shape[2]
    xp, outputs, received, out = namespace(q.data), [], [], gather(np.arange(heads), np.arange(0))[1].shape[3]
    for w, r in zip(segments, dilations, strict=True):
        begin, end = segments_of(first, last, start, stop, w, causal)
        if first % w == 0 and begin == first and end == last:
            local = gather(np.arange(heads), np.arange(first, last))
            outputs.append(attention(q, *local, causal=causal, scale=scale, segment=w, dilation=r, offsets=offsets))
            received.append(0)
            continue
        y, lse = (Tensor.wrap(xp.zeros((batch, heads, queries, *more), q.dtype)) for more in ((out,), ()))
        kept, count = np.zeros((heads, queries), bool), 0
        for s, group in by_offset(heads, r, offsets):
            ask, answer = wanted(first, last, start, stop, w, r, s, causal)
            seen = ask[:, None] // w == answer // w  # [T' S']
            seen &= (answer <= ask[:, None]) | (not causal)
            keys, values = gather(group, answer)
            count += len(group) * int(((answer < own) | (answer >= last)).sum()) * (width + out)
            new = attention(q[:, group][:, :, ask - first], keys, values, xp.asarray(seen), causal=False, scale=scale)
            y, lse = (x + put_add(part, key=(slice(None), group[:, None], ask - first), shape=x.shape)
                      for x, part in zip((y, lse), new, strict=True))
            kept[group[:, None], ask - first] = True
        outputs.append((y, where(xp.asarray(kept), lse, -math.inf)))
        received.append(count)
    return *merged(outputs), received


def segments_of(first: int, last: int, start: int, stop: int, w: int, causal: bool) -> tuple[int, int]:
    """Where the keys begin and end that queries from ``first`` to ``last`` - 1 see, of those from ``start`` to ``stop`` - 1."""
    return max(first // w * w, start), last if causal else min(-(-last // w) * w, stop)


def by_offset(heads: int, r: int, offsets: str) -> list[tuple[int, np.ndarray]]:
    """The offsets of a pattern with the dilation r, and for each of them the heads that have it."""
    starts = offset_of(np.arange(heads), heads, r, offsets)
    return [(int(s), np.flatnonzero(starts == s)) for s in np.unique(starts)]


def wanted(first: int, last: int, start: int, stop: int, w: int, r: int, s: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """The queries from ``first`` to ``last`` - 1 that a pattern keeps at the offset s, and the keys that they see of all.

    Keys lie from ``start`` to ``stop`` - 1, and with ``causal`` before ``last``.
    """
    ask, answer = active(first, last, w, r, s), active(*segments_of(first, last, start, stop, w, causal), w, r, s)
    return ask, answer[np.isin(answer // w, ask // w)]  # nobody needs what nobody asks for


def between_shares(q, k, v, part, segments, dilations, offsets, causal, scale=None, detaches=False) -> Tensor:
    """y[B H T V] of the positions that this rank holds, of queries, keys and values of the same positions.

    ``part`` is a Share of minitv/sequence.py. Patterns whose segments end where shares end are computed by the operator. Of the
    others, a rank receives the keys and values that its queries see, and sends those that others see; the gradients return
    along the same ways. They are one softmax, in which a key stands once for each pattern that shows it, so the time grows with
    the square of what these patterns keep of a share. ``detaches`` is the gradient of ``detached``.
    """
    heads, width, params = np.arange(q.shape[1])[:, None], k.shape[3], dict(offsets=offsets, causal=causal, scale=scale)
    patterns = tuple(zip(segments, dilations, strict=True))
    local = [pattern for pattern in patterns if part.length % pattern[0] == 0]
    if not local:
        xp = namespace(q.data)
        y = Tensor.wrap(xp.zeros((*q.shape[:3], v.shape[3]), q.dtype))
        lse = Tensor.wrap(xp.full(q.shape[:3], -math.inf, q.dtype))
    far = tuple(pattern for pattern in patterns if part.length % pattern[0])
    if far:
        way = routes(part.rank, part.size, part.length, q.shape[1], far, offsets, causal)
        own = concat([k, v], axis=3)  # [B H T K+V]
        q, received = part.exchange({rank: own[:, which, at] for rank, (which, at) in way.outgoing.items()},
                                    {rank: (len(own.data), count, own.shape[3]) for rank, count in way.incoming.items()}, q)
        received[part.rank] = own[:, way.own[0], way.own[1]]
        pool = concat([one for _, one in sorted(received.items())], axis=1)  # [B M K+V]
        both = pool[:, way.keys]  # [B H S' K+V]
        others = attention(q[:, heads, way.queries], both[..., :width], both[..., width:], namespace(q.data).asarray(way.seen),
                           causal=False, scale=scale)  # [B H T' V], [B H T']
    if local and detaches:
        y, lse = detached(q, k, v, segments=[w for w, _ in local], dilations=[r for _, r in local], **params)
    elif local:
        segments, dilations = zip(*local, strict=True)
        y, lse = dilated_attention(q, k, v, segments=segments, dilations=dilations, **params)
    if not far:
        return y
    new, sums = others
    return _mixed(y, *((lse.detach(), new, sums.detach()) if detaches else (lse, new, sums)), (slice(None), heads, way.queries))


def _mixed(y, lse, new, sums, at) -> Tensor:
    """The mean of y[B H T V] and of others, which belong to the positions ``at``, by the sums of their softmaxes."""
    xp = namespace(y.data)
    tops = lse.data.copy()
    xp.maximum.at(tops, at, sums.data)
    tops[tops == -math.inf] = 0  # exp(s - top) cannot overflow
    one, other = exp(lse - Tensor.wrap(tops)), exp(sums - Tensor.wrap(tops[at]))
    total = one + put_add(other, key=at, shape=lse.shape)
    values = y * one[..., None] + put_add(new * other[..., None], key=at, shape=y.shape)
    return values / where(total.data == 0, 1.0, total)[..., None]


class Routes(NamedTuple):
    """What a rank sends and receives for patterns that reach beyond its share, and how its queries see it.

    ``outgoing`` and ``own`` are heads and positions, counted from the first one of the share, of keys that other ranks and this
    one need; ``incoming`` says how many come from each rank. All that is needed here stands one after the other, in the order
    of ranks: of that, head h reads ``keys[h]``; ``queries[h]`` are the positions of its queries, one for each pattern that
    keeps it, and ``seen[h]`` says which of the keys each sees. Heads with fewer are filled up with what nobody sees.
    """

    outgoing: dict[int, tuple[np.ndarray, np.ndarray]]
    incoming: dict[int, int]
    own: tuple[np.ndarray, np.ndarray]
    queries: np.ndarray  # [H T']
    keys: np.ndarray  # [H S']
    seen: np.ndarray  # [H T' S']


@lru_cache(maxsize=64)
def routes(rank: int, size: int, length: int, heads: int, patterns: tuple[tuple[int, int], ...], offsets: str,
           causal: bool) -> Routes:
    """Those of one rank of ``size``, each with ``length`` positions."""
    first, last, stop = rank * length, (rank + 1) * length, size * length
    outgoing: dict[int, list] = {}
    needed: dict[int, list] = {rank: []}
    asked: list[list] = [[] for _ in range(heads)]

    def held(positions: np.ndarray, other: int) -> np.ndarray:
        return positions[positions // length == other]

    for number, (w, r) in enumerate(patterns):
        for s, group in by_offset(heads, r, offsets):
            around = active(*segments_of(first, last, 0, stop, w, False), w, r, s)  # all that its segments have
            for other in np.unique(around // length).tolist():
                mine = held(wanted(other * length, (other + 1) * length, 0, stop, w, r, s, causal)[1], rank)
                if other != rank and len(mine):
                    outgoing.setdefault(other, []).extend((h, mine - first) for h in group.tolist())
            ask, answer = wanted(first, last, 0, stop, w, r, s, causal)
            for h in group.tolist():
                asked[h].append((number, ask))
            for other in np.unique(answer // length).tolist():
                needed.setdefault(other, []).extend((h, number, held(answer, other)) for h in group.tolist())
    keys: list[list] = [[] for _ in range(heads)]
    count = 0
    for _, parts in sorted(needed.items()):
        for h, number, positions in parts:
            keys[h].append((number, positions, count + np.arange(len(positions))))
            count += len(positions)
    width, height = (max((builtins.sum(len(positions) for _, positions, *_ in parts) for parts in of_heads), default=0)
                     for of_heads in (keys, asked))
    way = Routes({other: places(parts) for other, parts in outgoing.items()},
                 {other: builtins.sum(len(part[2]) for part in parts) for other, parts in needed.items() if other != rank},
                 places([(h, positions - first) for h, _, positions in needed[rank]]),
                 np.zeros((heads, height), np.intp), np.zeros((heads, width), np.intp), np.zeros((heads, height, width), bool))
    for h in range(heads):
        row = 0
        for number, ask in asked[h]:
            way.queries[h, row:row + len(ask)] = ask - first
            column = 0
            for other, positions, at in keys[h]:
                way.keys[h, column:column + len(at)] = at
                if other == number:
                    seen = ask[:, None] // patterns[number][0] == positions // patterns[number][0]
                    seen &= (positions <= ask[:, None]) | (not causal)
                    way.seen[h, row:row + len(ask), column:column + len(at)] = seen
                column += len(at)
            row += len(ask)
    return way


def places(parts: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Heads and positions, one for each key, of some keys of heads."""
    return (np.repeat([h for h, _ in parts], [len(at) for _, at in parts]).astype(np.intp),
            np.concatenate([at for _, at in parts]) if parts else np.zeros(0, np.intp))


def active(first: int, last: int, w: int, r: int, s: int) -> np.ndarray:
    """The positions p from ``first`` to ``last`` - 1 that a pattern (w, r) keeps at the offset s: (p mod w) mod r = s."""
    p = (np.arange(first // w * w, last, w)[:, None] + np.arange(s, w, r)).ravel()
    return p[(p >= first) & (p < last)]


dilated_attention.kernel("cpu")
dilated_attention.kernel("cuda")


@dilated_attention.validate
def _(q, k, segments, dilations, offsets, start):
    queries, keys = q.shape[2], k.shape[2]
    if keys < queries:
        raise ShapeError(f"dilated_attention: {keys} keys for {queries} queries, allowed: at least as many keys as queries")
    for name, values in (("segments", segments), ("dilations", dilations)):
        if not (isinstance(values, tuple) and values and all(type(n) is int and n >= 1 for n in values)):
            raise DomainError(f"dilated_attention: {name} is {values!r}, allowed: a tuple of integers of at least 1")
    if len(segments) != len(dilations):
        raise DomainError(f"dilated_attention: {len(segments)} segments and {len(dilations)} dilations, allowed: as many of "
                          "one as of the other")
    if offsets not in OFFSETS:
        raise DomainError(f"dilated_attention: offsets is {offsets!r}, allowed: {', '.join(OFFSETS)}")
    first = start + keys - queries if type(start) is int else 0
    least = min(first // w * w for w in segments)
    if type(start) is not int or start < 0 or start > least:
        raise DomainError(f"dilated_attention: start is {start!r}, allowed: an integer from 0 to {least}, where the largest "
                          f"segment of the first query, at position {first}, begins")


@dilated_attention.inputs
def _(draw):
    batch, heads, queries, past = draw.size(0, 2, "B"), draw.size(0, 4, "H"), draw.size(0, 6, "T"), draw.integer(0, 7)
    width, out, patterns = draw.size(1, 4, "K"), draw.size(0, 3, "V"), draw.integer(1, 3)
    segments, dilations = (tuple(draw.integer(1, n) for _ in range(patterns)) for n in (6, 3))
    start = draw.choice((0, min(past // w * w for w in segments)))
    q, k, v = (draw.floats(batch, heads, n, d) for n, d in
               ((queries, width), (past - start + queries, width), (past - start + queries, out)))
    return (q, k, v), {"segments": segments, "dilations": dilations, "offsets": draw.choice(OFFSETS), "causal": draw.boolean(),
                       "scale": draw.choice((None, 0.7)), "start": start}


@becomes(dilated_attention, "attention", "one segment holds the text, without dilation")
def _(case, draw):
    whole = case(segments=(case.k.shape[2] + draw.integer(1, 3),), dilations=(1,), start=0)
    for name, one, two in zip(("y", "lse"), whole, case.defined_by(attention), strict=True):
        assert_close(one, two, f"{name} of one segment without dilation is not that of attention", terms=16)


@law(dilated_attention, "the mixture is the patterns' outputs, weighted by the sums of their softmaxes")
def _(case, draw):
    parts = [case(segments=(w,), dilations=(r,)) for w, r in zip(case.segments, case.dilations, strict=True)]
    y, lse = case()
    expected = np.logaddexp.reduce([part.lse.astype(np.float64) for part in parts])
    shares = [np.exp(part.lse - np.where(expected == -math.inf, 0, expected))[..., None] for part in parts]
    assert_close(lse, expected.astype(lse.dtype), "lse is not that of the patterns together", terms=16)
    assert_close(y, np.sum([share * part.y for share, part in zip(shares, parts, strict=True)], axis=0).astype(y.dtype),
                 "the mixture is not the mean of the patterns by their sums", terms=64)


@law(dilated_attention, "the order of the patterns does not matter, and doubled values give doubled outputs")
def _(case, draw):
    order = draw.generator().permutation(len(case.segments)).tolist()
    other = case(v=2 * case.v, **{name: tuple(case[name][i] for i in order) for name in ("segments", "dilations")})
    for name, one, two, factor in zip(("y", "lse"), other, case(), (2, 1), strict=True):
        assert_close(one, factor * two, f"{name} depends on the order of the patterns", terms=16)


@law(dilated_attention, "a pattern that is alone may be given twice, with doubled values: y doubles, and lse grows by ln 2")
def _(case, draw):
    once, twice = (case(v=n * case.v, segments=case.segments[:1] * n, dilations=case.dilations[:1] * n) for n in (1, 2))
    assert_close(twice.y, 2 * once.y, "y depends on how often its only pattern is given", terms=16)
    assert_close(twice.lse, once.lse + once.lse.dtype.type(math.log(2)), "lse does not grow by ln 2", terms=16)
