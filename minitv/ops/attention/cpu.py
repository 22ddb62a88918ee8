"""Multi-head attention on the CPU, forward and backward, without ever storing a T x S matrix.

After Rabe and Staats (arXiv 2112.05682) and Dao et al. (arXiv 2205.14135).

For each head, 32 queries at a time meet a tile of keys at a time. Matrices are in the panels of autograd/cpu/panels.py.
The scores of a tile are kept transposed, S^T[key, query]: one lane is one query, so the maximum and the sum of the softmax
run down the rows, lane by lane, and never across a vector.

    forward    S^T = K Q^T                    P = exp(S - max)           Y = P V / sum
    backward   S^T = K Q^T    gP^T = V gY^T   gS = P * (gP - rowsum(gY * Y))
               gQ = gS K      gK = gS^T Q     gV = P^T gY

All seven products are one and the same routine, `accumulate` of panels.py. The forward pass saves two numbers a query, the
maximum of its scores and the inverse of the sum (more accurate than their log-sum-exp), from which backward recomputes P.

Hidden scores are -inf, whose exponential is an exact 0; no difference of two infinities is ever formed.
"""

import math

import numpy as np

from autograd.arrays import or_zeros
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

TILE = 128  # keys a tile; its scores (16 KiB in float32) stay in the first-level cache
INF = math.inf


@inner
def _hide(scores, first, keys, S, last, mask, mask_start, mask_strides, queries):
    """Set hidden scores to -inf: keys past the end, keys past what causality allows, and where the mask is False.

    `last` is the last key that query 0 may see; query e sees e more.
    """
    for key in range(max(0, min(S, last + 1) - first), keys):
        hidden = LANES if first + key >= S else min(LANES, first + key - last)
        for e in range(hidden):
            scores[key * LANES + e] = -INF
    if mask is not None:
        down, along = U(mask_strides[2]), U(mask_strides[3])
        for e in range(U(queries)):
            at = U(mask_start) + U(first) * along + e * down
            for key in range(U(min(keys, S - first))):
                if not mask[at + key * along]:
                    scores[key * L1 + e] = -INF


@inner
def _draw(keep, drop, head, query, first, keys):
    """The dropout factors of a tile, 0 or 1 / (1 - p).

    Weight (head, i, j) is kept if word j % 4 of philox(ctr=(i, j // 4, head, 1), key=seed) reaches the threshold.
    """
    threshold, factor, key0, key1 = drop
    zero = factor - factor
    for j in range(0, keys, 4):
        row = keep[j * LANES : (j + 4) * LANES]
        for e in range(LANES):
            i, j4 = np.uint64(query + e), np.uint64((first + j) // 4)
            w0, w1, w2, w3 = philox(i, j4, np.uint64(head), np.uint64(1), key0, key1)
            row[e] = factor if w0 >= threshold else zero
            row[e + LANES] = factor if w1 >= threshold else zero
            row[e + 2 * LANES] = factor if w2 >= threshold else zero
            row[e + 3 * LANES] = factor if w3 >= threshold else zero


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


@cpu_kernel
def _forward(q, k, v, mask, mask_strides, shape, scale, drop, causal, y, stats):
    B, H, T, S, K, V = shape
    like, pitch, wide_k, wide_v = y[0], padded(S, 8), padded(K, LANES), padded(V, LANES)
    zero, one = like.dtype.type(0), like.dtype.type(1)
    keys_k, keys_v = scratch(pitch * wide_k, like), scratch(pitch * wide_v, like)
    rows, across, sums = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_v, like)
    scores, keep, lanes = scratch(TILE * LANES, like), scratch(TILE * LANES, like), scratch(4 * LANES, like)
    top, shift, fade, total = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES], lanes[3 * LANES :]
    for head in range(B * H):
        b, h = head // H, head % H
        load(keys_k, pitch, k, b, h, 0, S, K, one)
        load(keys_v, pitch, v, b, h, 0, S, V, one)
        sound = finite(keys_v)
        for query in range(0, T, LANES):
            n = min(LANES, T - query)
            last = query + S - T if causal else S
            load(rows, LANES, q, b, h, query, n, K, scale)
            transpose(across, rows, scores)
            top[:], total[:], sums[:] = -INF, 0, 0
            for first in range(0, min(S, last + n), TILE):  # the keys that at least one of these queries sees
                keys = padded(min(TILE, min(S, last + n) - first), 8)
                product(scores, keys_k[first * LANES :], pitch, across, keys, K)
                at = b * mask_strides[0] + h * mask_strides[1] + query * mask_strides[2]
                _hide(scores, first, keys, S, last, mask, at, mask_strides, n)
                _softmax(scores, keys, top, shift, fade, total)
                if drop is not None:
                    _draw(keep, drop, head, query, first, keys)
                    for i in range(keys * LANES):
                        scores[i] *= keep[i]
                if first > 0:
                    scale_rows(sums, LANES, n, V, fade)
                add_adjoint_product(sums, LANES, scores, keys, keys_v[first * LANES :], pitch, n, keys, V, sound)
            for e in range(n):
                fade[e] = zero if total[e] == 0 else one / total[e]
                stats[head, 0, query + e], stats[head, 1, query + e] = shift[e], fade[e]
            scale_rows(sums, LANES, n, V, fade)
            store(y, b, h, query, sums, LANES, n, V, one)


@cpu_kernel
def _backward(q, k, v, mask, mask_strides, shape, scale, drop, causal, y, stats, g, glse, gq, gk, gv):
    B, H, T, S, K, V = shape
    like, pitch, wide_k, wide_v = y[0], padded(S, 8), padded(K, LANES), padded(V, LANES)
    zero, one = like.dtype.type(0), like.dtype.type(1)
    keys_k, sums_k = scratch(pitch * wide_k, like), scratch(pitch * wide_k, like)
    keys_v, sums_v = scratch(pitch * wide_v, like), scratch(pitch * wide_v, like)
    rows_q, across_q, sums_q = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_k, like)
    rows_g, across_g, across_y = scratch(LANES * wide_v, like), scratch(LANES * wide_v, like), scratch(LANES * wide_v, like)
    weights, grads, keep = scratch(TILE * LANES, like), scratch(TILE * LANES, like), scratch(TILE * LANES, like)
    lanes = scratch(3 * LANES, like)
    shift, inverse, dots = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES :]
    for head in range(B * H):
        b, h = head // H, head % H
        load(keys_k, pitch, k, b, h, 0, S, K, one)
        load(keys_v, pitch, v, b, h, 0, S, V, one)
        keys_sound = finite(keys_k) and finite(keys_v)
        sums_k[:], sums_v[:] = 0, 0
        for query in range(0, T, LANES):
            n = min(LANES, T - query)
            last = query + S - T if causal else S
            load(rows_q, LANES, q, b, h, query, n, K, scale)
            load(rows_g, LANES, y, b, h, query, n, V, one)
            transpose(across_y, rows_g, weights)
            load(rows_g, LANES, g, b, h, query, n, V, one)
            sound = keys_sound and finite(rows_q) and finite(rows_g)
            transpose(across_q, rows_q, weights)
            transpose(across_g, rows_g, weights)
            lanes[:], sums_q[:] = 0, 0  # a lane without a query has inverse 0, so that its weights are 0
            dot_columns(dots, across_g, across_y, V)
            for e in range(n):
                dots[e] -= glse[head, query + e]
            for e in range(n):
                shift[e], inverse[e] = stats[head, 0, query + e], stats[head, 1, query + e]
            for first in range(0, min(S, last + n), TILE):
                keys, start = padded(min(TILE, min(S, last + n) - first), 8), first * LANES
                product(weights, keys_k[start:], pitch, across_q, keys, K)
                product(grads, keys_v[start:], pitch, across_g, keys, V)
                at = b * mask_strides[0] + h * mask_strides[1] + query * mask_strides[2]
                _hide(weights, first, keys, S, last, mask, at, mask_strides, n)
                if drop is not None:
                    _draw(keep, drop, head, query, first, keys)
                    for i in range(keys * LANES):
                        grads[i] *= keep[i]
                for key in range(keys):
                    weight = weights[key * LANES : (key + 1) * LANES]
                    grad = grads[key * LANES : (key + 1) * LANES]
                    for e in range(LANES):
                        p = exp(weight[e] - shift[e]) * inverse[e] if inverse[e] != 0 else zero  # no NaN in spare lanes
                        weight[e] = p
                        grad[e] = p * (grad[e] - dots[e]) if p != 0 else zero
                if drop is not None:
                    for i in range(keys * LANES):
                        weights[i] *= keep[i]
                add_adjoint_product(sums_q, LANES, grads, keys, keys_k[start:], pitch, n, keys, K, sound)
                add_product(sums_k[start:], pitch, grads, keys, rows_q, LANES, keys, LANES, K, sound)
                add_product(sums_v[start:], pitch, weights, keys, rows_g, LANES, keys, LANES, V, sound)
            store(gq, b, h, query, sums_q, LANES, n, K, scale)
        store(gk, b, h, 0, sums_k, pitch, S, K, one)
        store(gv, b, h, 0, sums_v, pitch, S, V, one)


@cpu_kernel
def step(q, keys, values, length, scale, y, lse, scores):
    """One query of every head: y = softmax(scale · q · keys[:, :, :length]) values[:, :length].

    q[H·K] and y[H·V] are the vectors of all heads, lse[H] takes the logs of the softmax's sums, keys[H K S], values[H S V];
    ``length`` is at least 1, scores[S] is memory.
    """
    (heads, width, _), out = keys.shape, values.shape[2]
    zero, one = q.dtype.type(0), q.dtype.type(1)
    for h in range(heads):
        query, mean = q[h * width : (h + 1) * width], y[h * out : (h + 1) * out]
        for j in range(length):
            scores[j] = zero
        for c in range(width):
            row, factor = keys[h, c], query[c] * scale
            for j in range(length):
                scores[j] += factor * row[j]
        top, total = scores[0], zero
        for j in range(length):
            top = scores[j] if scores[j] > top else top
        for j in range(length):
            weight = exp(scores[j] - top)
            scores[j] = weight
            total += weight
        lse[h] = top + math.log(total)
        for c in range(out):
            mean[c] = zero
        for j in range(length):
            row, weight = values[h, j], scores[j] * (one / total)
            for c in range(out):
                mean[c] += weight * row[c]


def _flat_mask(mask):
    """The mask as one flat array with element strides over B, H, T and S, which are 0 where it broadcasts."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = np.array(mask, order="C", ndmin=4)
    return mask.reshape(-1), tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True))


def _options(dtype, K, scale, dropout, seed):
    scale = 1 / math.sqrt(K) if scale is None else scale
    if dropout == 0:
        return dtype.type(scale), None
    threshold, factor = round(dropout * 2**32), 0 if dropout == 1 else 1 / (1 - dropout)
    drop = np.uint64(threshold), dtype.type(factor), np.uint64(seed & LOW), np.uint64(seed >> 32)
    return dtype.type(scale), drop


def supports(q, k, v, sink, slopes, window, segment, dilation):
    if q.shape[1] != k.shape[1] or not (sink is slopes is window is segment is None and dilation == 1):
        return "takes as many heads of k and v as of q, no structure, no sink and no slopes"
    return None if q.shape[3] else "needs at least one channel in q and k"


def forward(q, k, v, mask, causal, scale, dropout, seed):
    """softmax(scale q k^T over the visible keys) v, for q [B H T K], k [B H S K], v [B H S V] -> y [B H T V]."""
    shape = B, H, T, _, K, V = *q.shape[:3], *k.shape[2:], v.shape[3]
    make = np.empty if min(shape) else np.zeros  # without queries, keys or channels there is nothing to compute
    y = by_position(B, H, T, V, q.dtype, make)
    stats = make((B * H, 2, T), q.dtype)  # the largest score and the inverse of the sum, for each query
    arguments = flat(q), flat(k), flat(v), *_flat_mask(mask), shape, *_options(q.dtype, K, scale, dropout, seed), bool(causal)
    if min(shape):
        _forward(*arguments, flat(y), stats)
    with np.errstate(divide="ignore"):
        lse = np.where(stats[:, 1] > 0, stats[:, 0] - np.log(stats[:, 1]), -INF).reshape(B, H, T).astype(q.dtype)
    if not min(shape):
        lse[...] = -INF
    return (y, lse), (arguments, y, stats)


def backward(saved, g_y, g_lse):
    """The gradients of q, k and v; they are laid out like y."""
    arguments, y, stats = saved
    B, H, T, S, K, V = shape = arguments[5]
    make = np.empty if min(shape) else np.zeros
    gradients = [by_position(B, H, rows, d, y.dtype, make) for rows, d in ((T, K), (S, K), (S, V))]
    if min(shape):
        glse = np.zeros((B * H, T), y.dtype) if g_lse is None else np.array(g_lse, order="C").reshape(B * H, T)
        stats = np.require(stats, requirements="W")  # to Numba, a read-only array is another type
        _backward(*arguments, flat(y), stats, flat(or_zeros(g_y, y)), glse, *map(flat, gradients))
    return *gradients, None


def step_supports(q, k, mask, dropout, sink, slopes, window, segment, dilation):
    if q.shape[1] != k.shape[1] or not (sink is slopes is window is segment is None and dilation == 1):
        return "takes as many heads of k and v as of q, no structure, no sink and no slopes"
    if not k.shape[2]:
        return "needs at least one key"
    return None if mask is None and dropout == 0 else "takes no mask and no dropout"


def step_forward(q, k, v, scale):
    B, H, S, K = k.shape
    keys = np.ascontiguousarray(k.swapaxes(2, 3)).reshape(B * H, K, S)
    values = np.ascontiguousarray(v).reshape(B * H, S, v.shape[3])
    y, lse = np.empty((B, H, 1, v.shape[3]), q.dtype), np.empty((B, H, 1), q.dtype)
    factor, _ = _options(q.dtype, K, scale, 0, 0)
    step(np.ascontiguousarray(q).reshape(-1), keys, values, S, factor, y.reshape(-1), lse.reshape(-1), np.empty(S, q.dtype))
    return (y, lse), None
