"""lsh_attention on the CPU, forward and backward: tiles of the sorted order, whose time is linear in T where buckets are small.

In each round the keys of a head are gathered in the order of (bucket, position). What a query sees is then one stretch of
that order, from ``first`` up to ``last``: its bucket, or two pieces. So 32 queries that are neighbours in the order meet the
tiles of a few keys, as in attention/cpu.py: scores transposed, one lane a query, -inf where something is hidden. Where the
piece before the first is another one ("wrap"), its keys are gathered in front of the others.

The softmax runs on over the rounds: y holds the sum of weighted values so far, ``top`` and ``total`` the largest score and the
sum of weights of each query. So the rounds are never stored, and backward, with the final sums, recomputes every weight:

    P = exp(S - top) / (N total)      gS = P (gY · V - gY · Y)      gQ += gS K̂      gK̂ += gSᵀ Q      gV += Pᵀ gY

N counts the rounds in which the pair is seen: two comparisons a round, of the key's place in the order with ``first`` and
``last``. A query that sees nothing has the sum 0; its output is its own value.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
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
    padded,
    product,
    scale_rows,
    transpose,
)
from autograd.cpu.vectors import scratch

from ..lsh.cpu import LABELS, sort

TILE = 128  # keys a tile; its scores (16 KiB in float32) stay in the first-level cache
INF, END = math.inf, 2**31 - 1
WRAPS = {"none": 0, "same": 1, "previous": 2}


@inner
def _gather(panels, pitch, x, b, h, positions, start, rows, width, factors):
    """Rows of a matrix [B H T d] that begins at position ``start``, times their factors, into panels of ``pitch`` rows."""
    a, (by_sequence, by_head, by_row) = x
    base = b * by_sequence + h * by_head
    for left in range(0, width, LANES):
        columns = min(LANES, width - left)
        for r in range(rows):
            t = positions[r]
            i, o, factor = U(base + (t - start) * by_row + left), U(left * pitch + r * LANES), factors[t]
            if columns == LANES:
                for c in range(L1):
                    panels[o + c] = a[i + c] * factor
            else:
                for c in range(U(columns)):
                    panels[o + c] = a[i + c] * factor
        panels[left * pitch + rows * LANES : (left + LANES) * pitch] = 0


@inner
def _scatter(x, b, h, positions, start, panels, pitch, rows, width, scale, adding):
    """The other way: rows of panels, times ``scale``, to the positions of a matrix, or added to what stands there."""
    a, (by_sequence, by_head, by_row) = x
    base = b * by_sequence + h * by_head
    for left in range(0, width, LANES):
        columns = U(min(LANES, width - left))
        for r in range(rows):
            i, o = U(base + (positions[r] - start) * by_row + left), U(left * pitch + r * LANES)
            if adding:
                for c in range(columns):
                    a[i + c] += panels[o + c] * scale
            else:
                for c in range(columns):
                    a[i + c] = panels[o + c] * scale


@inner
def _inverse_norms(k, b, h, S, K, eps, out):
    """1 / √(|k_j|² + K ε) of every key."""
    a, (by_sequence, by_head, by_row) = k
    for t in range(S):
        row = a[b * by_sequence + h * by_head + t * by_row :][:K]
        squares = row.dtype.type(K) * eps
        for c in range(K):
            squares += row[c] * row[c]
        out[t] = row.dtype.type(1) / np.sqrt(squares)


@inner
def _lay_out(buckets, rule, order, place, first, last, starts, spare):
    """Of every round: the order, its inverse, and for each position the stretch of the order that it sees."""
    chunk, window, _, _, _, causal = rule
    R, S = buckets.shape
    for r in range(R):
        sort(buckets[r], spare[:S], spare[S:], starts)
        for p in range(S):
            t = spare[p]
            order[r, p], place[r, t] = t, p
            if chunk:
                begin, end = max(p // chunk - 1, 0) * chunk, min((p // chunk + 1) * chunk, S)
            else:
                begin, end = starts[buckets[r, t]], starts[buckets[r, t] + 1]
                if window:
                    begin, end = max(begin, p - window + 1), min(end, p + window)
                if causal:
                    end = p
            first[r, t], last[r, t] = begin, end


@inner
def _spread(order, buckets, rule, r, keys, labels):
    """The keys of a round in the order of its tiles, and their buckets: before all, those that the first piece wraps to.

    Returns how many these are. A bucket of another round is -1, which is no query's.
    """
    chunk, _, _, wrap, _, _ = rule
    R, S = order.shape
    extra, source = 0, (r + R - 1) % R if wrap == 2 else r
    if chunk and wrap:
        tail = (S - 1) // chunk * chunk
        extra = S - tail
        for p in range(extra):
            keys[p] = order[source, tail + p]
            labels[p] = buckets[r, keys[p]] if source == r else -1
    for p in range(S):
        keys[extra + p] = order[r, p]
        labels[extra + p] = buckets[r, order[r, p]]
    return extra


@inner
def _take(asked, n, rule, extra, place, first, last, buckets, r, lanes):
    """What decides of each lane's query: in lanes the stretch of keys that it sees, its position and its bucket.

    Returns the stretch of all of them, from a multiple of 8 on.
    """
    chunk = rule[0]
    begin, end, low, high = lanes[0], lanes[1], END, 0
    for e in range(LANES):
        if e < n:
            t = asked[e]
            begin[e], end[e], lanes[2, e], lanes[3, e] = first[r, t] + extra, last[r, t] + extra, t, buckets[r, t]
            if extra and place[r, t] < chunk:
                begin[e] = 0
            if begin[e] < end[e]:
                low, high = min(low, begin[e]), max(high, end[e])
        else:
            begin[e], end[e], lanes[2, e], lanes[3, e] = 0, 0, -1, -2
    return low // 8 * 8, high


@inner
def _hide(scores, from_key, keys, times, labels, checked, lanes, causal):
    """Set hidden scores to -inf: keys out of a query's stretch, itself, later ones, and where ``checked`` other buckets."""
    begin, end, position, bucket = lanes[0], lanes[1], lanes[2], lanes[3]
    minus = -scores.dtype.type(INF)
    for key in range(keys):
        row = scores[key * LANES : (key + 1) * LANES]
        at, t, label = np.int32(from_key + key), times[from_key + key], labels[from_key + key]
        for e in range(LANES):
            seen = (begin[e] <= at) & (at < end[e]) & (t != position[e]) & ((t < position[e]) | (not causal))
            seen = seen & ((bucket[e] == label) | (not checked))
            row[e] = row[e] if seen else minus


@inner
def _count(many, from_key, keys, times, asked, n, rule, place, first, last, buckets, bounds):
    """In how many rounds each query of a tile sees each key, at least 1."""
    chunk, _, across, wrap, _, _ = rule
    R, S = place.shape
    one, zero = many.dtype.type(1), many.dtype.type(0)
    many[: keys * LANES] = 0
    checked, tail = chunk > 0 and not across, max(S - 1, 0) // max(chunk, 1) * chunk
    for r in range(R):
        begin, end, bucket, wraps = bounds[0], bounds[1], bounds[2], bounds[3]
        for e in range(n):
            t = asked[e]
            begin[e], end[e], bucket[e] = first[r, t], last[r, t], buckets[r, t]
            wraps[e] = chunk > 0 and wrap > 0 and place[r, t] < chunk
        source = (r + R - 1) % R if wrap == 2 else r
        for key in range(keys):
            t = times[from_key + key]
            if t < 0:
                continue
            row, at, label = many[key * LANES : (key + 1) * LANES], place[r, t], buckets[r, t]
            for e in range(LANES):
                seen = (begin[e] <= at) & (at < end[e]) & ((bucket[e] == label) | (not checked))
                row[e] += one if seen else zero
            if wrap and place[source, t] >= tail and (source == r or not checked):
                for e in range(LANES):
                    seen = (wraps[e] != 0) & ((bucket[e] == label) | (not checked))
                    row[e] += one if seen else zero
    for i in range(keys * LANES):
        many[i] = max(many[i], one)


@inner
def _softmax(scores, many, counting, keys, top, shift, fade, total):
    """exp(score - maximum) in place, with the running maximum and sum of each lane; ``fade`` corrects the sums before."""
    zero, minus = scores.dtype.type(0), -scores.dtype.type(INF)
    for e in range(LANES):
        shift[e] = top[e]
    for key in range(keys):
        row = scores[key * LANES : (key + 1) * LANES]
        for e in range(LANES):
            shift[e] = row[e] if row[e] > shift[e] else shift[e]
    for e in range(LANES):
        new = shift[e]
        shift[e] = zero if new == minus else new  # nothing seen so far: -inf - 0 is -inf, -inf - -inf would be NaN
        fade[e] = exp(top[e] - shift[e])
        top[e] = new
        total[e] *= fade[e]
    for key in range(keys):
        row, often = scores[key * LANES : (key + 1) * LANES], many[key * LANES : (key + 1) * LANES]
        if counting:
            for e in range(LANES):
                row[e] = exp(row[e] - shift[e]) / often[e]
                total[e] += row[e]
        else:
            for e in range(LANES):
                row[e] = exp(row[e] - shift[e])
                total[e] += row[e]


@inner
def _asking(order, start, asked):
    """The positions from ``start`` on in the order."""
    n = 0
    for p in range(order.size):
        if order[p] >= start:
            asked[n] = order[p]
            n += 1


@cpu_kernel
def _forward(q, k, v, buckets, count, shape, rule, scale, eps, y, stats):
    B, H, T, S, K, V, R = shape
    chunk, _, across, wrap, correction, causal = rule
    like, pitch, wide_k, wide_v = stats[0, 0], padded(2 * S, 8), padded(K, LANES), padded(V, LANES)
    one, start = like.dtype.type(1), S - T
    keys_k, keys_v = scratch(pitch * wide_k, like), scratch(pitch * wide_v, like)
    rows, across_q, sums = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_v, like)
    scores, many, running = scratch(TILE * LANES, like), scratch(TILE * LANES, like), scratch(4 * LANES, like)
    top, shift, fade, total = running[:LANES], running[LANES : 2 * LANES], running[2 * LANES : 3 * LANES], running[3 * LANES :]
    norms, ones, scales = scratch(S, like), scratch(S, like), scratch(S, like)
    order, place = np.empty((R, S), np.int32), np.empty((R, S), np.int32)
    first, last = np.empty((R, S), np.int32), np.empty((R, S), np.int32)
    times, labels, asked = np.empty(pitch, np.int32), np.empty(pitch, np.int32), np.empty(S, np.int32)
    lanes, bounds = np.empty((4, LANES), np.int32), np.empty((4, LANES), np.int32)
    starts, spare, itself = np.empty(count + 1, np.int64), np.empty(2 * S, np.int64), np.empty(1, np.int32)
    ones[:], scales[:], bounds[:] = 1, scale, 0
    counting, checked = correction and (R > 1 or wrap > 0), chunk > 0 and not across
    for head in range(B * H):
        b, h = head // H, head % H
        _inverse_norms(k, b, h, S, K, eps, norms)
        _lay_out(buckets[head], rule, order, place, first, last, starts, spare)
        stats[head, 0], stats[head, 1] = -INF, 0
        for r in range(R):
            times[:], labels[:] = -1, -3
            extra = _spread(order, buckets[head], rule, r, times, labels)
            _gather(keys_k, pitch, k, b, h, times, 0, extra + S, K, norms)
            _gather(keys_v, pitch, v, b, h, times, 0, extra + S, V, ones)
            sound = finite(keys_v)
            _asking(order[r], start, asked)
            for query in range(0, T, LANES):
                n, mine = min(LANES, T - query), asked[query:]
                low, high = _take(mine, n, rule, extra, place, first, last, buckets[head], r, lanes)
                _gather(rows, LANES, q, b, h, mine, start, n, K, scales)
                transpose(across_q, rows, scores)
                top[:], total[:], sums[:] = -INF, 0, 0
                for e in range(n):
                    top[e], total[e] = stats[head, 0, mine[e] - start], stats[head, 1, mine[e] - start]
                if r:
                    _gather(sums, LANES, y, b, h, mine, start, n, V, ones)
                for key in range(low, high, TILE):
                    keys = padded(min(TILE, high - key), 8)
                    product(scores, keys_k[key * LANES :], pitch, across_q, keys, K)
                    _hide(scores, key, keys, times, labels, checked, lanes, causal)
                    if counting:
                        _count(many, key, keys, times, mine, n, rule, place, first, last, buckets[head], bounds)
                    _softmax(scores, many, counting, keys, top, shift, fade, total)
                    if r or key > low:
                        scale_rows(sums, LANES, n, V, fade)
                    add_adjoint_product(sums, LANES, scores, keys, keys_v[key * LANES :], pitch, n, keys, V, sound)
                for e in range(n):
                    stats[head, 0, mine[e] - start], stats[head, 1, mine[e] - start] = top[e], total[e]
                _scatter(y, b, h, mine, start, sums, LANES, n, V, one, False)
        a, (by_sequence, by_head, by_row) = y
        for i in range(T):
            itself[0] = start + i
            if stats[head, 1, i] == 0:  # it sees nothing: itself, then
                stats[head, 0, i] = 0
                _gather(sums, LANES, v, b, h, itself, 0, 1, V, ones)
                _scatter(y, b, h, itself, start, sums, LANES, 1, V, one, False)
            else:
                stats[head, 1, i] = one / stats[head, 1, i]
                row = a[b * by_sequence + h * by_head + i * by_row :][:V]
                for c in range(V):
                    row[c] *= stats[head, 1, i]


@cpu_kernel
def _backward(q, k, v, buckets, count, shape, rule, scale, eps, y, stats, g, gq, gk, gv):
    """gq, gk and gv hold zeros before."""
    B, H, T, S, K, V, R = shape
    chunk, _, across, wrap, correction, causal = rule
    like, pitch, wide_k, wide_v = stats[0, 0], padded(2 * S, 8), padded(K, LANES), padded(V, LANES)
    zero, one, start = like.dtype.type(0), like.dtype.type(1), S - T
    keys_k, sums_k = scratch(pitch * wide_k, like), scratch(pitch * wide_k, like)
    keys_v, sums_v = scratch(pitch * wide_v, like), scratch(pitch * wide_v, like)
    rows_q, across_q, sums_q = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_k, like)
    rows_g, across_g, across_y = scratch(LANES * wide_v, like), scratch(LANES * wide_v, like), scratch(LANES * wide_v, like)
    weights, grads, many = scratch(TILE * LANES, like), scratch(TILE * LANES, like), scratch(TILE * LANES, like)
    running = scratch(3 * LANES, like)
    shift, inverse, dots = running[:LANES], running[LANES : 2 * LANES], running[2 * LANES :]
    norms, ones, scales = scratch(S, like), scratch(S, like), scratch(S, like)
    order, place = np.empty((R, S), np.int32), np.empty((R, S), np.int32)
    first, last = np.empty((R, S), np.int32), np.empty((R, S), np.int32)
    times, labels, asked = np.empty(pitch, np.int32), np.empty(pitch, np.int32), np.empty(S, np.int32)
    lanes, bounds = np.empty((4, LANES), np.int32), np.empty((4, LANES), np.int32)
    starts, spare, itself = np.empty(count + 1, np.int64), np.empty(2 * S, np.int64), np.empty(1, np.int32)
    ones[:], scales[:], bounds[:] = 1, scale, 0
    counting, checked = correction and (R > 1 or wrap > 0), chunk > 0 and not across
    for head in range(B * H):
        b, h = head // H, head % H
        _inverse_norms(k, b, h, S, K, eps, norms)
        _lay_out(buckets[head], rule, order, place, first, last, starts, spare)
        for r in range(R):
            times[:], labels[:] = -1, -3
            extra = _spread(order, buckets[head], rule, r, times, labels)
            _gather(keys_k, pitch, k, b, h, times, 0, extra + S, K, norms)
            _gather(keys_v, pitch, v, b, h, times, 0, extra + S, V, ones)
            sums_k[:], sums_v[:] = 0, 0
            keys_sound = finite(keys_k) and finite(keys_v)
            _asking(order[r], start, asked)
            for query in range(0, T, LANES):
                n, mine = min(LANES, T - query), asked[query:]
                low, high = _take(mine, n, rule, extra, place, first, last, buckets[head], r, lanes)
                if low >= high:
                    continue
                _gather(rows_q, LANES, q, b, h, mine, start, n, K, scales)
                _gather(rows_g, LANES, y, b, h, mine, start, n, V, ones)
                transpose(across_y, rows_g, weights)
                _gather(rows_g, LANES, g, b, h, mine, start, n, V, ones)
                sound = keys_sound and finite(rows_q) and finite(rows_g)
                transpose(across_q, rows_q, weights)
                transpose(across_g, rows_g, weights)
                running[:], sums_q[:] = 0, 0  # a lane without a query has inverse 0, so that its weights are 0
                dot_columns(dots, across_g, across_y, V)
                for e in range(n):
                    shift[e], inverse[e] = stats[head, 0, mine[e] - start], stats[head, 1, mine[e] - start]
                for key in range(low, high, TILE):
                    keys, at = padded(min(TILE, high - key), 8), key * LANES
                    product(weights, keys_k[at:], pitch, across_q, keys, K)
                    product(grads, keys_v[at:], pitch, across_g, keys, V)
                    _hide(weights, key, keys, times, labels, checked, lanes, causal)
                    if counting:
                        _count(many, key, keys, times, mine, n, rule, place, first, last, buckets[head], bounds)
                    for j in range(keys):
                        weight, grad = weights[j * LANES : (j + 1) * LANES], grads[j * LANES : (j + 1) * LANES]
                        often = many[j * LANES : (j + 1) * LANES]
                        for e in range(LANES):
                            p = exp(weight[e] - shift[e]) * inverse[e] if inverse[e] != 0 else zero  # no NaN in spare lanes
                            p = p / often[e] if counting else p
                            weight[e] = p
                            grad[e] = p * (grad[e] - dots[e]) if p != 0 else zero
                    add_adjoint_product(sums_q, LANES, grads, keys, keys_k[at:], pitch, n, keys, K, sound)
                    add_product(sums_k[at:], pitch, grads, keys, rows_q, LANES, keys, LANES, K, sound)
                    add_product(sums_v[at:], pitch, weights, keys, rows_g, LANES, keys, LANES, V, sound)
                _scatter(gq, b, h, mine, start, sums_q, LANES, n, K, scale, True)
            _scatter(gk, b, h, times, 0, sums_k, pitch, extra + S, K, one, True)
            _scatter(gv, b, h, times, 0, sums_v, pitch, extra + S, V, one, True)
        for i in range(T):
            if stats[head, 1, i] == 0:
                itself[0] = start + i
                _gather(rows_g, LANES, g, b, h, itself, start, 1, V, ones)
                _scatter(gv, b, h, itself, 0, rows_g, LANES, 1, V, one, True)
        (a, (a_b, a_h, a_t)), (c, (c_b, c_h, c_t)) = k, gk
        for t in range(S):  # from the unit key to the key
            key, grad, along = a[b * a_b + h * a_h + t * a_t :][:K], c[b * c_b + h * c_h + t * c_t :][:K], zero
            for i in range(K):
                along += key[i] * norms[t] * grad[i]
            for i in range(K):
                grad[i] = (grad[i] - key[i] * norms[t] * along) * norms[t]


@cpu_kernel
def _step(q, k, v, buckets, window, correction, scale, eps, y, seen, scores):
    """One query a head, of the last position: the keys in its buckets are looked up, from the last one back.

    q and y are [B·H, K] and [B·H, V], k[B·H S K], v[B·H S V], buckets[B·H R S]; seen[S] holds zeros, scores[S] is memory.
    """
    heads, rounds, S = buckets.shape
    zero, one, K, V = q.dtype.type(0), q.dtype.type(1), q.shape[1], v.shape[2]
    keys = np.empty(S, np.int64)
    for h in range(heads):
        count = 0
        for r in range(rounds):
            row, found = buckets[h, r], 1
            label = row[S - 1]
            for j in range(S - 2, -1, -1):
                if row[j] == label:
                    if window and found >= window:
                        break
                    found += 1
                    if seen[j] == 0:
                        keys[count] = j
                        count += 1
                    seen[j] += 1
        mean, top, total = y[h], -q.dtype.type(INF), zero
        for i in range(count):
            j = keys[i]
            square, dot = q.dtype.type(K) * eps, zero
            for c in range(K):
                square += k[h, j, c] * k[h, j, c]
                dot += q[h, c] * k[h, j, c]
            scores[i] = scale * dot / np.sqrt(square)
            top = max(top, scores[i])
        for c in range(V):
            mean[c] = zero if count else v[h, S - 1, c]
        for i in range(count):
            scores[i] = exp(scores[i] - top)
        for i in range(count):
            j = keys[i]
            weight = scores[i] * (one if correction else q.dtype.type(seen[j]))
            seen[j] = 0
            total += weight
            for c in range(V):
                mean[c] += weight * v[h, j, c]
        if count:
            for c in range(V):
                mean[c] *= one / total


def _labels(buckets):
    """Buckets [B H R S] as small numbers [B·H R S], and how many there may be."""
    (B, H, R, S), count = buckets.shape, int(buckets.max(initial=0)) + 1
    if count > LABELS:
        values, buckets = np.unique(buckets, return_inverse=True)
        count = len(values)
    return np.ascontiguousarray(buckets).reshape(B * H, R, S), count


def forward(q, k, v, buckets, chunk, window, across, wrap, correction, causal, scale, eps):
    """y[B H T V] of q[B H T K], k[B H S K], v[B H S V] and buckets[B H R S]."""
    shape = B, H, T, _, _, V, _ = *q.shape[:3], *k.shape[2:], v.shape[3], buckets.shape[2]
    make = np.empty if min(shape) else np.zeros  # without queries, keys or channels there is nothing to compute
    y = by_position(B, H, T, V, q.dtype, make)
    stats = make((B * H, 2, T), q.dtype)  # the largest score and the inverse of the sum, for each query
    rule = chunk or 0, window or 0, bool(across), WRAPS[wrap], bool(correction), bool(causal)
    arguments = flat(q), flat(k), flat(v), *_labels(buckets), shape, rule, q.dtype.type(scale), q.dtype.type(eps)
    if min(shape):
        _forward(*arguments, flat(y), stats)
    return y, (arguments, y, stats)


def backward(saved, g):
    """The gradients of q, k and v; they are laid out like y."""
    arguments, y, stats = saved
    B, H, T, S, K, V, _ = shape = arguments[5]
    gradients = [by_position(B, H, rows, d, y.dtype, np.zeros) for rows, d in ((T, K), (S, K), (S, V))]
    if min(shape):
        _backward(*arguments, flat(y), stats, flat(g), *map(flat, gradients))
    return gradients


def step_supports(chunk):
    return None if chunk is None else "takes whole buckets only"


def step_forward(q, k, v, buckets, window, correction, scale, eps):
    (B, H, S, K), V = k.shape, v.shape[3]
    y = np.empty((B, H, 1, V), q.dtype)
    q, k, v, buckets = (np.ascontiguousarray(x) for x in (q, k, v, buckets))
    _step(q.reshape(B * H, K), k.reshape(B * H, S, K), v.reshape(B * H, S, V), buckets.reshape(B * H, buckets.shape[2], S),
          window or 0, bool(correction), q.dtype.type(scale), q.dtype.type(eps), y.reshape(B * H, V), np.zeros(S, np.int64),
          np.empty(S, q.dtype))
    return y, None
