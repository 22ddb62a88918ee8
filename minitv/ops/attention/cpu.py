"""Multi-head attention on the CPU, forward and backward, without ever storing a T x S matrix.

After Rabe and Staats (arXiv 2112.05682) and Dao et al. (arXiv 2205.14135).

For each head, 32 queries at a time meet a tile of keys at a time. Matrices are in the panels of autograd/cpu/panels.py.
The scores of a tile are kept transposed, S^T[key, query]: one lane is one query, so the maximum and the sum of the softmax
run down the rows, lane by lane, and never across a vector.

    forward    S^T = K Q^T                    P = exp(S - max)           Y = P V / sum
    backward   S^T = K Q^T    dP^T = V dY^T   dS = P * (dP - rowsum(dY * Y))
               dQ = dS K      dK = dS^T Q     dV = P^T dY

All seven products are one and the same routine, `accumulate` of panels.py. The forward pass saves two numbers a query, the
maximum of its scores and the inverse of the sum (more accurate than their log-sum-exp), from which backward recomputes P.

Hidden scores are -inf, whose exponential is an exact 0; no difference of two infinities is ever formed.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp
from autograd.cpu.panels import L1, LANES, U, finite, flat, load, product, scratch, store, transpose, weigh
from autograd.cpu.philox import philox
from autograd.random import LOW

TILE = 128  # keys a tile; its scores (16 KiB in float32) stay in the first-level cache
INF = math.inf


@cpu_kernel
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


@cpu_kernel
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


@cpu_kernel
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
def _forward(q_in, k_in, v_in, mask, mask_strides, shape, scale, drop, causal, y, stats):
    (q, q_strides), (k, k_strides), (v, v_strides) = q_in, k_in, v_in
    B, H, T, S, K, V = shape
    zero, one = y.dtype.type(0), y.dtype.type(1)
    pitch = (S + 7) // 8 * 8
    wide_k, wide_v = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
    keys_k, keys_v = scratch(pitch * wide_k, q), scratch(pitch * wide_v, q)
    rows, across, sums = scratch(LANES * wide_k, q), scratch(LANES * wide_k, q), scratch(LANES * wide_v, q)
    scores, keep, lanes = scratch(TILE * LANES, q), scratch(TILE * LANES, q), scratch(4 * LANES, q)
    top, shift, fade, total = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES], lanes[3 * LANES :]
    for head in range(B * H):
        b, h = head // H, head % H
        load(keys_k, pitch, k, b * k_strides[0] + h * k_strides[1], k_strides[2], S, K, one)
        load(keys_v, pitch, v, b * v_strides[0] + h * v_strides[1], v_strides[2], S, V, one)
        sound = finite(keys_v)
        for query in range(0, T, LANES):
            n = min(LANES, T - query)
            last = query + S - T if causal else S
            load(rows, LANES, q, b * q_strides[0] + h * q_strides[1] + query * q_strides[2], q_strides[2], n, K, scale)
            transpose(across, rows, scores)
            top[:] = -INF
            total[:] = 0
            sums[:] = 0
            for first in range(0, min(S, last + n), TILE):  # the keys that at least one of these queries sees
                keys = (min(TILE, min(S, last + n) - first) + 7) // 8 * 8
                product(scores, keys_k, pitch, first, keys, across, K)
                at = b * mask_strides[0] + h * mask_strides[1] + query * mask_strides[2]
                _hide(scores, first, keys, S, last, mask, at, mask_strides, n)
                _softmax(scores, keys, top, shift, fade, total)
                if drop is not None:
                    _draw(keep, drop, head, query, first, keys)
                    for i in range(keys * LANES):
                        scores[i] *= keep[i]
                for left in range(0, V, LANES):
                    if first > 0:
                        for e in range(n):
                            for c in range(LANES):
                                sums[(left + e) * LANES + c] *= fade[e]
                    at = left * pitch + first * LANES
                    weigh(sums, left * LANES, scores, 0, 1, LANES, keys_v, at, (n + 7) // 8 * 8, keys, sound)
            for e in range(n):
                inverse = zero if total[e] == 0 else one / total[e]
                stats[head, 0, query + e], stats[head, 1, query + e] = shift[e], inverse
                for left in range(0, V, LANES):
                    panel = sums[(left + e) * LANES : (left + e + 1) * LANES]
                    for c in range(LANES):
                        panel[c] *= inverse
            store(y, ((b * T + query) * H + h) * V, H * V, sums, LANES, n, V, one)


@cpu_kernel
def _backward(q_in, k_in, v_in, mask, mask_strides, shape, scale, drop, causal, y, stats, g_in, dq, dk, dv):
    (q, q_strides), (k, k_strides), (v, v_strides), (g, g_strides) = q_in, k_in, v_in, g_in
    B, H, T, S, K, V = shape
    zero, one = y.dtype.type(0), y.dtype.type(1)
    pitch = (S + 7) // 8 * 8
    wide_k, wide_v = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
    keys_k, sums_k = scratch(pitch * wide_k, q), scratch(pitch * wide_k, q)
    keys_v, sums_v = scratch(pitch * wide_v, q), scratch(pitch * wide_v, q)
    rows_q, across_q, sums_q = scratch(LANES * wide_k, q), scratch(LANES * wide_k, q), scratch(LANES * wide_k, q)
    rows_g, across_g, rows_y = scratch(LANES * wide_v, q), scratch(LANES * wide_v, q), scratch(LANES * wide_v, q)
    weights, grads, keep = scratch(TILE * LANES, q), scratch(TILE * LANES, q), scratch(TILE * LANES, q)
    lanes = scratch(3 * LANES, q)
    shift, inverse, dot = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES :]
    for head in range(B * H):
        b, h = head // H, head % H
        load(keys_k, pitch, k, b * k_strides[0] + h * k_strides[1], k_strides[2], S, K, one)
        load(keys_v, pitch, v, b * v_strides[0] + h * v_strides[1], v_strides[2], S, V, one)
        keys_sound = finite(keys_k) and finite(keys_v)
        sums_k[:] = 0
        sums_v[:] = 0
        for query in range(0, T, LANES):
            n = min(LANES, T - query)
            last = query + S - T if causal else S
            at = b * q_strides[0] + h * q_strides[1] + query * q_strides[2]
            load(rows_q, LANES, q, at, q_strides[2], n, K, scale)
            at = b * g_strides[0] + h * g_strides[1] + query * g_strides[2]
            load(rows_g, LANES, g, at, g_strides[2], n, V, one)
            load(rows_y, LANES, y, ((b * T + query) * H + h) * V, H * V, n, V, one)
            sound = keys_sound and finite(rows_q) and finite(rows_g)
            transpose(across_q, rows_q, weights)
            transpose(across_g, rows_g, weights)
            lanes[:] = 0  # a lane without a query has inverse 0, so that its weights are 0
            sums_q[:] = 0
            for e in range(n):
                shift[e], inverse[e] = stats[head, 0, query + e], stats[head, 1, query + e]
                for left in range(0, V, LANES):
                    panel_g = rows_g[(left + e) * LANES : (left + e + 1) * LANES]
                    panel_y = rows_y[(left + e) * LANES : (left + e + 1) * LANES]
                    for c in range(LANES):
                        dot[e] += panel_g[c] * panel_y[c]
            for first in range(0, min(S, last + n), TILE):
                keys = (min(TILE, min(S, last + n) - first) + 7) // 8 * 8
                product(weights, keys_k, pitch, first, keys, across_q, K)
                product(grads, keys_v, pitch, first, keys, across_g, V)
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
                        grad[e] = p * (grad[e] - dot[e]) if p != 0 else zero
                if drop is not None:
                    for i in range(keys * LANES):
                        weights[i] *= keep[i]
                for left in range(0, K, LANES):
                    at = left * pitch + first * LANES
                    weigh(sums_q, left * LANES, grads, 0, 1, LANES, keys_k, at, (n + 7) // 8 * 8, keys, sound)
                    weigh(sums_k, at, grads, 0, LANES, 1, rows_q, left * LANES, keys, LANES, sound)
                for left in range(0, V, LANES):
                    at = left * pitch + first * LANES
                    weigh(sums_v, at, weights, 0, LANES, 1, rows_g, left * LANES, keys, LANES, sound)
            store(dq, ((b * T + query) * H + h) * K, H * K, sums_q, LANES, n, K, scale)
        store(dk, (b * S * H + h) * K, H * K, sums_k, pitch, S, K, one)
        store(dv, (b * S * H + h) * V, H * V, sums_v, pitch, S, V, one)


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


def supports(q, k, v):
    return None if q.shape[3] else "needs at least one channel in q and k"


def forward(q, k, v, mask, causal, scale, dropout, seed):
    """softmax(scale q k^T over the visible keys) v, for q [B H T K], k [B H S K], v [B H S V] -> y [B H T V]."""
    shape = B, H, T, _, K, V = *q.shape[:3], *k.shape[2:], v.shape[3]
    make = np.empty if min(shape) else np.zeros  # without queries, keys or channels there is nothing to compute
    y = make((B, T, H, V), q.dtype)  # the heads of a position side by side: merging them is a reshape
    stats = make((B * H, 2, T), q.dtype)  # the largest score and the inverse of the sum, for each query
    if min(shape):
        arrays = flat(q), flat(k), flat(v), *_flat_mask(mask)
        _forward(*arrays, shape, *_options(q.dtype, K, scale, dropout, seed), bool(causal), y.reshape(-1), stats)
    return y.transpose(0, 2, 1, 3), (q, k, v, mask, y, stats, causal, scale, dropout, seed)


def backward(saved, g):
    """The gradients of q, k and v; they are laid out like y."""
    q, k, v, mask, y, stats, causal, scale, dropout, seed = saved
    shape = B, H, T, S, K, V = *q.shape[:3], *k.shape[2:], v.shape[3]
    make = np.empty if min(shape) else np.zeros  # without queries, keys or channels there is nothing to compute
    dq, dk, dv = make((B, T, H, K), q.dtype), make((B, S, H, K), q.dtype), make((B, S, H, V), q.dtype)
    if min(shape):
        y, stats = (np.require(x, requirements="W") for x in (y, stats))  # to Numba, a read-only array is another type
        arrays = flat(q), flat(k), flat(v), *_flat_mask(mask)
        given = *arrays, shape, *_options(q.dtype, K, scale, dropout, seed), bool(causal), y.reshape(-1), stats
        _backward(*given, flat(g), dq.reshape(-1), dk.reshape(-1), dv.reshape(-1))
    return *(d.transpose(0, 2, 1, 3) for d in (dq, dk, dv)),
