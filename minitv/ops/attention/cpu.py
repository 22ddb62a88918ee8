"""Multi-head attention on the CPU, forward and backward, without ever storing a T x S matrix.

After Rabe and Staats (arXiv 2112.05682) and Dao et al. (arXiv 2205.14135).

For each head, 32 queries at a time meet a tile of keys at a time. Matrices are in the panels of autograd/cpu/panels.py.
The scores of a tile are kept transposed, S^T[key, query]: one lane is one query, so the maximum and the sum of the softmax
run down the rows, lane by lane, and never across a vector.

    forward    S^T = K Q^T                    P = exp(S - max)           Y = P V / sum           lse = max + log sum
    backward   S^T = K Q^T    gP^T = V gY^T   gS = P * (gP - rest)       rest = rowsum(gY * Y) - glse
               gQ = gS K      gK = gS^T Q     gV = P^T gY

All seven products are one and the same routine, `accumulate` of panels.py. The forward pass saves two numbers a query, the
maximum of its scores and the inverse of the sum (more accurate than their log-sum-exp), from which backward recomputes P.

Hidden scores are -inf, whose exponential is an exact 0; no difference of two infinities is ever formed.

Structures. With segments and a dilation, the rows of one segment that a head reads are every r-th one. They are loaded with a
stride and are then a short sequence without gaps, to which the rest applies: `_segment` tells where it lies. Of this
sequence, 32 queries meet the tiles with sinks and those from the first key of the window on, see `_range`; tiles in between
are never touched. The logit of a sink is where the running maximum and sum begin. Heads that share keys read them from the same
panels, and add up the gradients of keys and values there, one head after the other.
"""

import math
from functools import cache

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.compile import cpu_kernel, inline, inner
from autograd.cpu.math import exp
from autograd.cpu.panels import (
    L1,
    LANES,
    U,
    add_adjoint_product,
    add_product,
    by_position,
    dot_columns,
    finite,
    flat,
    load,
    padded,
    product,
    scale_rows,
    store,
    transpose,
)
from autograd.cpu.philox import philox
from autograd.cpu.vectors import scratch
from autograd.random import LOW

from . import visible

TILE = 128  # keys a tile; its scores (16 KiB in float32) stay in the first-level cache
INF, NEVER = math.inf, 2**40  # NEVER: a window that hides nothing


@inline
def _segments(shape, rule):
    """The first and the last segment with queries."""
    T, S, segment = shape[3], shape[4], rule[3]
    return (max(0, S - T) // segment, (S - 1) // segment) if segment else (0, 0)


@inline
def _segment(number, head, lengths, rule):
    """Where one segment of one head lies: its number of keys and of queries, the first key, and the first query's row."""
    H, T, S = lengths
    _, _, _, segment, dilation, block, _ = rule
    offset = head // -(-H // dilation) if block else head % dilation
    start = number * segment + offset
    end = min(S, (number + 1) * segment) if segment else S
    keys = -((start - end) // dilation)  # rounded up
    before = -((start - (S - T)) // dilation)  # keys before the first query
    if segment:
        before = max(0, before)
    return max(0, keys), keys - before, start, start + dilation * before - (S - T)


@inline
def _range(at, queries, keys, sinks, rule):
    """What `queries` queries see of `keys` keys, the first of them at position `at`: the keys before `ends`, and those from
    `begin` to before `stop`; the last key that the first query sees without a causal mask's or a window's exception for sinks,
    and its first recent key. A query that comes e later sees e more, and e fewer.
    """
    causal, window, _, _, dilation, _, _ = rule
    reach = (window + dilation - 1) // dilation
    last, recent = at if causal else min(keys, at + reach - 1), at - reach + 1
    stop = min(keys, last + queries)
    if not causal:
        stop = max(stop, sinks)
    begin = max(0, recent) // 8 * 8
    return min(sinks, begin), begin, stop, last, recent


@inner
def _hide(scores, first, keys, S, last, recent, sinks, causal, mask, mask_start, down, along, queries):
    """Set hidden scores to -inf: keys past the end, keys past what causality or a window allows, keys before the window that
    are no sinks, and where the mask is False. `last` and `recent` are those of `_range`.
    """
    for key in range(max(0, min(S, last + 1) - first), keys):
        hidden = LANES if first + key >= S else min(LANES, first + key - last)
        if not causal and first + key < sinks:
            hidden = 0
        row = scores[key * LANES : (key + 1) * LANES]
        for e in range(LANES):
            row[e] = -INF if e < hidden else row[e]
    for key in range(max(0, sinks - first), min(keys, recent + LANES - 1 - first)):
        for e in range(max(0, first + key - recent + 1), LANES):
            scores[key * LANES + e] = -INF
    if mask.size > 0:
        down, along = U(down), U(along)
        for e in range(U(queries)):
            at = U(mask_start) + U(first) * along + e * down
            for key in range(U(min(keys, S - first))):
                if not mask[at + key * along]:
                    scores[key * L1 + e] = -INF


@inner
def _slope(scores, slope, distance, keys):
    """scores[key, query] += slope * (distance + key - query)"""
    for key in range(keys):
        row, first = scores[key * LANES : (key + 1) * LANES], scores.dtype.type(distance + key)
        for e in range(LANES):
            row[e] += slope * (first - scores.dtype.type(e))


@inner
def _draw(keep, drop, head, query, first, step, keys):
    """The dropout factors of a tile, 0 or 1 / (1 - p); its queries are `step` apart, from `query` on, its keys from `first` on.

    Weight (head, i, j) is kept if word j % 4 of philox(ctr=(i, j // 4, head, 1), key=seed) reaches the threshold.
    """
    threshold, factor, key0, key1 = drop
    zero = factor - factor
    if step > 1 or first % 4 > 0:
        for key in range(keys):
            j, row = first + step * key, keep[key * LANES : (key + 1) * LANES]
            for e in range(LANES):
                words = philox(np.uint64(query + step * e), np.uint64(j // 4), np.uint64(head), np.uint64(1), key0, key1)
                row[e] = factor if words[j % 4] >= threshold else zero
        return
    for j in range(0, keys, 4):
        row = keep[j * LANES : (j + 4) * LANES]
        for e in range(LANES):
            i, j4 = np.uint64(query + e), np.uint64((first + j) // 4)
            w0, w1, w2, w3 = philox(i, j4, np.uint64(head), np.uint64(1), key0, key1)
            row[e] = factor if w0 >= threshold else zero
            row[e + LANES] = factor if w1 >= threshold else zero
            row[e + 2 * LANES] = factor if w2 >= threshold else zero
            row[e + 3 * LANES] = factor if w3 >= threshold else zero


@inline
def _every(x, step):
    """A matrix as `load` and `store` take it, of which they then take every `step`-th row, from an element `_at` on."""
    return x[0], (1, 0, step * x[1][2])


@inline
def _at(x, b, h, row):
    """Where a row of a head begins in the memory of a matrix."""
    return b * x[1][0] + h * x[1][1] + row * x[1][2]


@inner
def _softmax(scores, keys, top, shift, fade, total):
    """exp(score - maximum) in place, with the running maximum `top` and sum `total` of each lane.

    Earlier tiles subtracted an earlier maximum: their sums have to be multiplied by `fade`.
    """
    zero = scores.dtype.type(0)
    for e in range(LANES):
        shift[e] = top[e]
    for key in range(0, keys, 4):
        row = scores[key * LANES : (key + 4) * LANES]
        for e in range(LANES):
            s0, s1, s2, s3 = row[e], row[e + LANES], row[e + 2 * LANES], row[e + 3 * LANES]
            s0 = s1 if s1 > s0 else s0
            s2 = s3 if s3 > s2 else s2
            s0 = s2 if s2 > s0 else s0
            shift[e] = s0 if s0 > shift[e] else shift[e]
    for e in range(LANES):
        new = shift[e]
        shift[e] = zero if new == -INF else new  # no visible key so far: -inf - 0 is -inf, -inf - -inf would be NaN
        fade[e] = exp(top[e] - shift[e])
        top[e] = new
        total[e] *= fade[e]
    for key in range(keys):
        row = scores[key * LANES : (key + 1) * LANES]
        for e in range(LANES):
            p = exp(row[e] - shift[e])
            row[e] = p
            total[e] += p


@cpu_kernel(parts="groups")
def _forward(q, k, v, mask, mask_strides, shape, rule, scale, drop, sink, slopes, y, stats, sums_of_rows, groups):
    _, H, G, T, S, K, V = shape
    causal, _, sinks, segment, step, _, joins = rule
    dropping = drop[0] > 0 or drop[1] != 1
    like, wide_k, wide_v = y[0], padded(K, LANES), padded(V, LANES)
    zero, one, pitch = like.dtype.type(0), like.dtype.type(1), padded(-(-(min(S, segment) if segment else S) // step), 8)
    all_k, all_v = scratch(pitch * wide_k, like), scratch(pitch * wide_v, like)
    rows, across, sums = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_v, like)
    scores, keep, lanes = scratch(TILE * LANES, like), scratch(TILE * LANES, like), scratch(4 * LANES, like)
    top, shift, fade, total = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES], lanes[3 * LANES :]
    share, (begin, end) = H // G, _segments(shape, rule)
    for number in range(groups[0] * share, groups[1] * share):
        part, h = number // share, number % share
        b, g, part = part // (end - begin + 1) // G, part // (end - begin + 1) % G, begin + part % (end - begin + 1)
        h += g * share
        keys, queries, start, row = _segment(part, h, (H, T, S), rule)
        if keys <= 0 or queries <= 0:
            continue
        pitch, head, first_ones = padded(keys, 8), b * H + h, min(keys, max(0, -((start - sinks) // step)))
        keys_k, keys_v = all_k[: pitch * wide_k], all_v[: pitch * wide_v]
        if step > 1 or h % share == 0:
            load(keys_k, pitch, _every(k, step), _at(k, b, g, start), 0, 0, keys, K, one)
            load(keys_v, pitch, _every(v, step), _at(v, b, g, start), 0, 0, keys, V, one)
            sound = finite(keys_v)
        q_at, y_at, q_rows, y_rows = _at(q, b, h, row), _at(y, b, h, row), _every(q, step), _every(y, step)
        for query in range(0, queries, LANES):
            n, at = min(LANES, queries - query), query + keys - queries
            ends, begin_of_window, stop, last, recent = _range(at, n, keys, first_ones, rule)
            load(rows, LANES, q_rows, q_at, 0, query, n, K, scale)
            transpose(across, rows, scores)
            top[:], shift[:], total[:], sums[:] = sink[h], zero, zero, 0
            if sink[h] > -INF:
                shift[:], total[:] = sink[h], one
            if joins:  # these keys join those of earlier calls
                load(sums, LANES, y_rows, y_at, 0, query, n, V, one)
                for e in range(n):
                    i = row + step * (query + e)
                    shift[e], total[e] = stats[head, 0, i], sums_of_rows[head, i]
                    top[e] = -INF if total[e] == 0 else shift[e]
                scale_rows(sums, LANES, n, V, total)
            first, fresh = 0 if ends > 0 else begin_of_window, not joins
            while first < stop:
                limit = ends if first < ends else stop
                count = padded(min(TILE, limit - first), 8)
                product(scores, keys_k[first * LANES :], pitch, across, count, K)
                if slopes[h] != 0:
                    _slope(scores, slopes[h] * step, first - at, count)
                mask_start = (b * mask_strides[0] + h * mask_strides[1] + (row + step * query) * mask_strides[2]
                              + start * mask_strides[3])
                _hide(scores, first, count, keys, last, recent, first_ones, causal, mask, mask_start,
                      step * mask_strides[2], step * mask_strides[3], n)
                _softmax(scores, count, top, shift, fade, total)
                if dropping:
                    _draw(keep, drop, head, row + step * query, start + step * first, step, count)
                    for i in range(count * LANES):
                        scores[i] *= keep[i]
                if not fresh:
                    scale_rows(sums, LANES, n, V, fade)
                add_adjoint_product(sums, LANES, scores, count, keys_v[first * LANES :], pitch, n, count, V, sound)
                fresh, first = False, min(first + TILE, limit)
                if first == ends:
                    first = begin_of_window
            for e in range(n):
                fade[e], i = zero if total[e] == 0 else one / total[e], row + step * (query + e)
                stats[head, 0, i], stats[head, 1, i], sums_of_rows[head, i] = shift[e], fade[e], total[e]
            scale_rows(sums, LANES, n, V, fade)
            store(y_rows, y_at, 0, query, sums, LANES, n, V, one)


@cpu_kernel(parts="groups")
def _backward(q, k, v, mask, mask_strides, shape, rule, scale, drop, sink, slopes, y, stats, rest, g_y, gq, gk, gv, groups):
    _, H, G, T, S, K, V = shape
    causal, _, sinks, segment, step, _, joins = rule
    dropping = drop[0] > 0 or drop[1] != 1
    like, wide_k, wide_v = y[0], padded(K, LANES), padded(V, LANES)
    zero, one, pitch = like.dtype.type(0), like.dtype.type(1), padded(-(-(min(S, segment) if segment else S) // step), 8)
    all_k, all_sums_k = scratch(pitch * wide_k, like), scratch(pitch * wide_k, like)
    all_v, all_sums_v = scratch(pitch * wide_v, like), scratch(pitch * wide_v, like)
    rows_q, across_q, sums_q = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_k, like)
    rows_g, across_g, across_y = scratch(LANES * wide_v, like), scratch(LANES * wide_v, like), scratch(LANES * wide_v, like)
    weights, grads, keep = scratch(TILE * LANES, like), scratch(TILE * LANES, like), scratch(TILE * LANES, like)
    lanes = scratch(3 * LANES, like)
    shift, inverse, dots = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES :]
    q_rows, y_rows, g_rows, gq_rows = _every(q, step), _every(y, step), _every(g_y, step), _every(gq, step)
    gk_rows, gv_rows = _every(gk, step), _every(gv, step)
    share, (begin, end) = H // G, _segments(shape, rule)
    for number in range(groups[0] * share, groups[1] * share):
        part, h = number // share, number % share
        b, g, part = part // (end - begin + 1) // G, part // (end - begin + 1) % G, begin + part % (end - begin + 1)
        h += g * share
        keys, queries, start, row = _segment(part, h, (H, T, S), rule)
        if keys <= 0 or queries <= 0:
            continue
        pitch, head, first_ones = padded(keys, 8), b * H + h, min(keys, max(0, -((start - sinks) // step)))
        keys_k, keys_v = all_k[: pitch * wide_k], all_v[: pitch * wide_v]
        sums_k, sums_v = all_sums_k[: pitch * wide_k], all_sums_v[: pitch * wide_v]
        gk_at, gv_at = _at(gk, b, g, start), _at(gv, b, g, start)
        if step > 1 or h % share == 0:
            load(keys_k, pitch, _every(k, step), _at(k, b, g, start), 0, 0, keys, K, one)
            load(keys_v, pitch, _every(v, step), _at(v, b, g, start), 0, 0, keys, V, one)
            keys_sound = finite(keys_k) and finite(keys_v)
            if step > 1 or joins:  # other heads of the group, or earlier calls, may have been there
                load(sums_k, pitch, gk_rows, gk_at, 0, 0, keys, K, one)
                load(sums_v, pitch, gv_rows, gv_at, 0, 0, keys, V, one)
            else:
                sums_k[:], sums_v[:] = 0, 0
        q_at, y_at, g_at, gq_at = _at(q, b, h, row), _at(y, b, h, row), _at(g_y, b, h, row), _at(gq, b, h, row)
        for query in range(0, queries, LANES):
            n, at = min(LANES, queries - query), query + keys - queries
            ends, begin_of_window, stop, last, recent = _range(at, n, keys, first_ones, rule)
            load(rows_q, LANES, q_rows, q_at, 0, query, n, K, scale)
            load(rows_g, LANES, y_rows, y_at, 0, query, n, V, one)
            transpose(across_y, rows_g, weights)
            load(rows_g, LANES, g_rows, g_at, 0, query, n, V, one)
            sound = keys_sound and finite(rows_q) and finite(rows_g)
            transpose(across_q, rows_q, weights)
            transpose(across_g, rows_g, weights)
            lanes[:], sums_q[:] = 0, 0  # a lane without a query has inverse 0, so that its weights are 0
            dot_columns(dots, across_g, across_y, V)
            for e in range(n):
                i = row + step * (query + e)
                shift[e], inverse[e] = stats[head, 0, i], stats[head, 1, i]
                dots[e] += rest[head, i]
                rest[head, i] = dots[e]
            first = 0 if ends > 0 else begin_of_window
            while first < stop:
                limit = ends if first < ends else stop
                count, panel = padded(min(TILE, limit - first), 8), first * LANES
                product(weights, keys_k[panel:], pitch, across_q, count, K)
                product(grads, keys_v[panel:], pitch, across_g, count, V)
                if slopes[h] != 0:
                    _slope(weights, slopes[h] * step, first - at, count)
                mask_start = (b * mask_strides[0] + h * mask_strides[1] + (row + step * query) * mask_strides[2]
                              + start * mask_strides[3])
                _hide(weights, first, count, keys, last, recent, first_ones, causal, mask, mask_start,
                      step * mask_strides[2], step * mask_strides[3], n)
                if dropping:
                    _draw(keep, drop, head, row + step * query, start + step * first, step, count)
                    for i in range(count * LANES):
                        grads[i] *= keep[i]
                for key in range(count):
                    weight = weights[key * LANES : (key + 1) * LANES]
                    grad = grads[key * LANES : (key + 1) * LANES]
                    for e in range(LANES):
                        p, s = exp(weight[e] - shift[e]) * inverse[e], grad[e] - dots[e]
                        p = p if inverse[e] != 0 else zero  # no NaN in spare lanes
                        s = p * s
                        weight[e], grad[e] = p, s if p != 0 else zero
                if dropping:
                    for i in range(count * LANES):
                        weights[i] *= keep[i]
                add_adjoint_product(sums_q, LANES, grads, count, keys_k[panel:], pitch, n, count, K, sound)
                add_product(sums_k[panel:], pitch, grads, count, rows_q, LANES, count, LANES, K, sound)
                add_product(sums_v[panel:], pitch, weights, count, rows_g, LANES, count, LANES, V, sound)
                first = min(first + TILE, limit)
                if first == ends:
                    first = begin_of_window
            if joins:
                load(rows_q, LANES, gq_rows, gq_at, 0, query, n, K, one)
                for i in range(sums_q.size):
                    sums_q[i] = sums_q[i] * scale + rows_q[i]
            store(gq_rows, gq_at, 0, query, sums_q, LANES, n, K, one if joins else scale)
        if step > 1 or h % share == share - 1:
            store(gk_rows, gk_at, 0, 0, sums_k, pitch, keys, K, one)
            store(gv_rows, gv_at, 0, 0, sums_v, pitch, keys, V, one)


@cpu_kernel
def step(q, keys, values, length, scale, sink, y, lse, scores):
    """One query of every head: y = softmax(scale · q · keys[:, :, :length]) values[:, :length], and the logs of the sums.

    q[H·K] and y[H·V] are the vectors of all heads, keys[G K S], values[G S V], sink[H], lse[H]; ``length`` is at least 1 and
    scores[H/G · S] is memory. The heads that share keys and values read each row of them together.
    """
    (groups, width, _), out, heads = keys.shape, values.shape[2], lse.size
    zero, one, share = q.dtype.type(0), q.dtype.type(1), heads // groups
    for g in range(groups):
        for i in range(share * length):
            scores[i] = zero
        for c in range(width):
            row = keys[g, c]
            for r in range(share):
                logits, factor = scores[r * length : (r + 1) * length], q[(g * share + r) * width + c] * scale
                for j in range(length):
                    logits[j] += factor * row[j]
        for r in range(share):
            h, logits = g * share + r, scores[r * length : (r + 1) * length]
            top, total = sink[h], zero
            for j in range(length):
                top = logits[j] if logits[j] > top else top
            for j in range(length):
                weight = exp(logits[j] - top)
                logits[j] = weight
                total += weight
            total += math.exp(sink[h] - top)
            lse[h] = top + math.log(total)
            for j in range(length):
                logits[j] *= one / total
            for c in range(out):
                y[h * out + c] = zero
        for j in range(length):
            row = values[g, j]
            for r in range(share):
                mean, weight = y[(g * share + r) * out : (g * share + r + 1) * out], scores[r * length + j]
                for c in range(out):
                    mean[c] += weight * row[c]


def _flat_mask(mask):
    """The mask as one flat array with element strides over B, H, T and S, which are 0 where it broadcasts; without elements
    if there is none: for another type Numba would compile the kernels once more.
    """
    if mask is None:
        return np.zeros(0, bool), (0, 0, 0, 0)
    mask = np.array(mask, order="C", ndmin=4)
    return mask.reshape(-1), tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True))


def _options(dtype, K, scale, dropout, seed):
    scale = 1 / math.sqrt(K) if scale is None else scale
    threshold, factor = round(dropout * 2**32), 0 if dropout == 1 else 1 / (1 - dropout)
    drop = np.uint64(threshold), dtype.type(factor), np.uint64(seed & LOW), np.uint64(seed >> 32)
    return dtype.type(scale), drop


def groups_of(arguments):
    """All heads that share keys, in all segments, as the range that a kernel goes over; parts of it are independent."""
    shape, (_, _, _, segment, *_) = arguments[5:7]
    B, _, G, T, S, _, _ = shape
    return 0, B * G * ((S - 1) // segment - max(0, S - T) // segment + 1 if segment else 1)


@cache
def _same(H, dtype, number):
    """One number for all heads, as the kernels read them."""
    return np.full(H, number, dtype)


def supports(q, k, v):
    return None if q.shape[3] else "needs at least one channel in q and k"


def forward(q, k, v, mask, sink, slopes, causal, scale, dropout, seed, window, sinks, segment, dilation, offsets):
    """softmax(scale q k^T over the visible keys) v and the log of its sum, for q [B H T K], k [B G S K], v [B G S V]."""
    B, H, T, K = q.shape
    G, S, V = v.shape[1:]
    whole = segment is None and dilation == 1  # else there may be queries and keys that the kernels never touch
    nothing = not min(B, H, G, T, S, K)  # to compute
    make = np.empty if whole and not nothing else np.zeros
    y, stats, lse = by_position(B, H, T, V, q.dtype, make), make((B * H, 2, T), q.dtype), make((B * H, T), q.dtype)
    logits = _same(H, q.dtype, -INF) if sink is None else sink.astype(q.dtype)
    slopes = _same(H, q.dtype, 0) if slopes is None else slopes.astype(q.dtype)
    if sink is not None and make is np.zeros:
        lone = np.tile(logits > -INF, B)[:, None]  # a query that sees nothing sees the sink
        stats[:, 0], stats[:, 1], lse[...] = np.where(lone, np.tile(logits, B)[:, None], 0), lone, lone
    rule = int(causal), NEVER if window is None else window, sinks, segment or 0, dilation, int(offsets == "block"), 0
    arguments = (flat(q), flat(k), flat(v), *_flat_mask(mask), (B, H, G, T, S, K, V), rule,
                 *_options(q.dtype, K, scale, dropout, seed), logits, slopes)
    if not nothing:
        _forward(*arguments, flat(y), stats, lse, groups_of(arguments))
    with np.errstate(divide="ignore"):
        np.log(lse, out=lse)
    lse += stats[:, 0]
    return (y, lse.reshape(B, H, T)), (arguments, y, stats, sink is not None, make, nothing)


def backward(saved, g_y, g_lse):
    """The gradients of q, k and v, which are laid out like y, and of the sink."""
    arguments, y, stats, sinking, make, nothing = saved
    B, H, G, T, S, K, V = arguments[5]
    if (T, K) == (S, V):  # side by side, as split_heads made q, k and v: to merge the heads then costs no copy
        every = by_position(B, H + 2 * G, T, K, y.dtype, make)
        gq, gk, gv = every[:, :H], every[:, H : H + G], every[:, H + G :]
        memory, strides = flat(every)
        places = [(memory[K * first :], strides) for first in (0, H, H + G)]
    else:
        gq, gk, gv = (by_position(B, heads, rows, d, y.dtype, make) for heads, rows, d in ((H, T, K), (G, S, K), (G, S, V)))
        places = map(flat, (gq, gk, gv))
    rest = np.zeros((B * H, T), y.dtype) if g_lse is None else np.negative(g_lse, order="C").reshape(B * H, T)
    if not nothing:
        _backward(*arguments, flat(y), stats, rest, flat(or_zeros(g_y, y)), *places, groups_of(arguments))
    if not sinking:
        return gq, gk, gv, None
    logits = np.tile(arguments[9], B)[:, None]
    weights = np.exp(np.where(logits > -INF, logits - stats[:, 0], -INF)) * stats[:, 1]
    return gq, gk, gv, -(weights * rest).reshape(B, H, T).sum(axis=(0, 2), dtype=y.dtype)


def step_supports(k, mask, dropout, slopes, dilation):
    if not k.shape[2]:
        return "needs at least one key"
    return None if mask is slopes is None and dropout == 0 and dilation == 1 else "takes no mask, dropout, slopes or dilation"


def step_forward(q, k, v, sink, causal, scale, window, sinks, segment):
    if window is not None or segment is not None:
        seen = visible(1, k.shape[2], causal, window=window, sinks=sinks, segment=segment)[0]
        k, v = k[:, :, seen], v[:, :, seen]
    (B, _, S, K), H, V = k.shape, q.shape[1], v.shape[3]
    keys, values = np.ascontiguousarray(k.swapaxes(2, 3)), np.ascontiguousarray(v)
    y, lse, rows = np.empty((B, H, 1, V), q.dtype), np.empty((B, H, 1), q.dtype), np.ascontiguousarray(q).reshape(B, H * K)
    sink = _same(H, q.dtype, -INF) if sink is None else sink.astype(q.dtype)
    (factor, _), scores = _options(q.dtype, K, scale, 0, 0), np.empty(H * S, q.dtype)
    for b in range(B if H else 0):
        step(rows[b], keys[b], values[b], S, factor, sink, y[b].reshape(-1), lse[b].reshape(-1), scores)
    return (y, lse), None
