"""retention on the CPU, a chunk at a time, forward and backward: O(T), every product in register tiles.

Matrices are in the panels of autograd/cpu/panels.py. Within a chunk of M positions, 32 queries at a time meet all keys
before them; what lies before the chunk is in the state S, z, n that came in. Γ, ξ and ζ are the decays of equation (7), see the
page; A = (Q Kᵀ) ∘ Γ, S' and z' are the state after the chunk, and gX is the gradient of X:

    forward    Y = (A V + ξ ∘ (Q S)) / divisor                   S' = γ^M S + Kᵀ (ζ ∘ V)
               q · z = sum of a row of A, plus ξ ∘ (Q z)         z' = γ^M z + sum of the rows of ζ ∘ K
    backward   G = gY / divisor, r = the gradient of q · z       gA = Γ ∘ (G Vᵀ + r)
               gQ = gA K + ξ ∘ (G Sᵀ + r z)                      gS = γ^M gS' + Qᵀ (ξ ∘ G)
               gK = gAᵀ Q + ζ ∘ (V gS'ᵀ + gz')                   gz = γ^M gz' + Qᵀ (ξ ∘ r)
               gV = Aᵀ G + ζ ∘ (K gS')

A and gA are kept transposed, [key, query], and so is gQ, for which S is then needed as it is. The gradient of the decay is
the same sums with i γ^(i-1) in place of each γ^i.

Saved for backward: S before each chunk, in panels [V / 32, K, 32] with K and V rounded up to 32; z before each chunk; for
each position n, and the inverse of q · z, or 0 where √n is larger. Powers of the decay come from float64, and are 0 where
they no longer count: subnormal numbers are slow.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.panels import (
    LANES,
    add_adjoint_product,
    add_product,
    add_rows,
    by_position,
    dot,
    dot_rows,
    finite,
    flat,
    load,
    padded,
    product,
    scale_rows,
    store,
    transpose,
)
from autograd.cpu.vectors import assign, scratch

from . import NORMALIZATIONS

BLOCK = LANES * LANES
NONE, DECAY, PAPER = range(len(NORMALIZATIONS))


@inner
def _tables(decay, tiny, power, slope, total, weight, weight_slope):
    """decay^i, i decay^(i-1) and the sum of decay^0 .. decay^i; for weights by lag, [lag + 31], which are 0 below lag 0."""
    p, before, s = 1.0, 0.0, 0.0
    for i in range(power.size):
        s += p
        power[i], slope[i], total[i] = p, i * before, s
        weight[i + LANES - 1], weight_slope[i + LANES - 1] = p, i * before
        before, p = p, p * decay
        if abs(p) < tiny:
            p = 0.0


@inner
def _decay_scores(scores, weights):
    """scores *= weights, elementwise; a weight of 0 hides what is not seen, which may be NaN."""
    zero = scores.dtype.type(0)
    for i in range(scores.size):
        scores[i] = scores[i] * weights[i] if weights[i] != zero else zero


@inner
def _fade(out, a, factor, tiny):
    """out = factor * a, without subnormal numbers."""
    zero, least = out.dtype.type(0), out.dtype.type(tiny)
    for i in range(out.size):
        x = factor * a[i]
        out[i] = x if abs(x) >= least else zero


@inner
def _row_scores(out, scores, keys, across, z, power, ones):
    """q · z of 32 queries: the sums of their decayed scores, and what comes from the state."""
    out[:] = 0
    add_rows(out, across, z.size, z)
    for e in range(LANES):
        out[e] *= power[e]
    add_rows(out, scores, keys, ones)


@cpu_kernel(parts="heads")
def _forward(q, k, v, decay, start, shape, kind, tiny, chunk, y, counts, inverses, states, zs, ends, heads):
    (state, z, count), (state_end, z_end, count_end) = start, ends
    _, H, T, K, V = shape
    like, pitch, wide_k, wide_v = y[0], padded(min(chunk, T), LANES), padded(K, LANES), padded(V, LANES)
    zero, one = like.dtype.type(0), like.dtype.type(1)
    keys_k, keys_v, scores = scratch(pitch * wide_k, like), scratch(pitch * wide_v, like), scratch(pitch * LANES, like)
    rows, across, sums = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_v, like)
    power, slope, total = scratch(pitch + 1, like), scratch(pitch + 1, like), scratch(pitch + 1, like)
    weight, weight_slope, weights = scratch(pitch + LANES, like), scratch(pitch + LANES, like), scratch(pitch * LANES, like)
    spare, lanes, factors = scratch(BLOCK, like), scratch(LANES, like), scratch(LANES, like)
    ones, left = scratch(pitch, like), scratch(pitch, like)
    ones[:] = 1
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        _tables(float(decay[h]), tiny, power, slope, total, weight, weight_slope)
        for r in range(pitch):  # [key - query + pitch - 32, e] has the decay between a key and the query + e
            assign(weights[r * LANES : (r + 1) * LANES], weight[pitch - 1 - r : pitch - 1 - r + LANES])
        states[head, 0], zs[head, 0] = 0, 0
        if state[0].size > 0:
            load(states[head, 0], wide_k, state, b, h, 0, K, V, one)
        for c in range(K):
            zs[head, 0, c] = z[head * K + c]
        n = count[head]
        for first in range(0, T, chunk):
            i, m = first // chunk, min(chunk, T - first)
            S, S_next, z_now, z_next = states[head, i], states[head, i + 1], zs[head, i], zs[head, i + 1]
            load(keys_k, pitch, k, b, h, first, m, K, one)
            load(keys_v, pitch, v, b, h, first, m, V, one)
            sound = finite(keys_v)
            for query in range(0, m, LANES):
                some, keys = min(LANES, m - query), padded(min(m, query + LANES), 8)
                load(rows, LANES, q, b, h, first + query, some, K, one)
                transpose(across, rows, spare)
                product(scores, keys_k, pitch, across, keys, K)
                _decay_scores(scores[: keys * LANES], weights[(pitch - LANES - query) * LANES :])
                sums[:] = 0
                begun = power[query + 1 : query + 1 + LANES]
                if first > 0 or state[0].size > 0:
                    add_product(sums, LANES, rows, LANES, S, wide_k, padded(some, 8), K, V, True)
                    scale_rows(sums, LANES, some, V, begun)
                add_adjoint_product(sums, LANES, scores, keys, keys_v, pitch, some, keys, V, sound)
                if kind == PAPER:
                    _row_scores(lanes, scores, keys, across, z_now, begun, ones)
                for e in range(some):
                    mass = total[query + e] + begun[e] * n
                    top, inverse = like.dtype.type(math.sqrt(mass)), zero
                    if kind == PAPER and abs(lanes[e]) > top:
                        inverse = one / lanes[e]
                    counts[head, first + query + e], inverses[head, first + query + e] = mass, inverse
                    factors[e] = one / top if inverse == 0 else abs(inverse)
                if kind != NONE:
                    scale_rows(sums, LANES, some, V, factors)
                store(y, b, h, first + query, sums, LANES, some, V, one)
            for j in range(m):
                left[j] = power[m - 1 - j]
            _fade(S_next, S, power[m], tiny)
            _fade(z_next, z_now, power[m], tiny)
            for c in range(0, K, LANES):
                add_rows(z_next[c:], keys_k[c * pitch :], m, left)
            scale_rows(keys_v, pitch, m, V, left)
            add_adjoint_product(S_next, wide_k, keys_k, pitch, keys_v, pitch, K, m, V, True)
            n = total[m - 1] + power[m] * n
        store(state_end, b, h, 0, states[head, -1], wide_k, K, V, one)
        for c in range(K):
            z_end[head * K + c] = zs[head, -1, c]
        count_end[head] = n


@inner
def _add_carried(gk, keys_k, pitch, width, gz, power, slope, m):
    """gK from the next state: add gz', decay; returns what it says of the decay."""
    total = 0.0
    for left in range(0, width, LANES):
        part = gz[left : left + LANES]
        for j in range(m):
            at = left * pitch + j * LANES
            row, key = gk[at : at + LANES], keys_k[at : at + LANES]
            factor, s = power[m - 1 - j], gk.dtype.type(0)
            for e in range(LANES):
                x = row[e] + part[e]
                s += x * key[e]
                row[e] = x * factor
            total += slope[m - 1 - j] * s
    return total


@inner
def _decay_both(scores, grads, keys, query, weight, weight_slope, r, lanes, of_decay):
    """A and gA from the scores and G Vᵀ, 0 where a decay is; adds to `lanes` what they say of the decay, if that is wanted."""
    zero = scores.dtype.type(0)
    for key in range(keys):
        at = LANES - 1 + query - key
        factors, slopes = weight[at : at + LANES], weight_slope[at : at + LANES]
        row, grad = scores[key * LANES : (key + 1) * LANES], grads[key * LANES : (key + 1) * LANES]
        if of_decay:
            for e in range(LANES):
                s, g = row[e], grad[e] + r[e]
                lanes[e] += s * g * slopes[e]
                row[e] = s * factors[e] if factors[e] != zero else zero
                grad[e] = g * factors[e] if factors[e] != zero else zero
        else:
            for e in range(LANES):
                g = grad[e] + r[e]
                row[e] = row[e] * factors[e] if factors[e] != zero else zero
                grad[e] = g * factors[e] if factors[e] != zero else zero


@inner
def _begun(gq, across, z, r, power, slope, lanes):
    """gQᵀ from the state before: decay it, with r z; adds to `lanes` what it says of the decay."""
    for k in range(z.size):
        row, column, factor = gq[k * LANES : (k + 1) * LANES], across[k * LANES : (k + 1) * LANES], z[k]
        for e in range(LANES):
            x = row[e] + r[e] * factor
            lanes[e] += x * column[e] * slope[e]
            row[e] = x * power[e]


@cpu_kernel(parts="heads")
def _backward(q, k, v, decay, start, shape, kind, tiny, chunk, y, counts, inverses, states, zs, g, ends, gq, gk, gv, gdecay,
              gstate, gz, gcount, of_decay, heads):
    (state, _, count), (state_end, z_end, count_end) = start, ends
    _, H, T, K, V = shape
    like, pitch, wide_k, wide_v = y[0], padded(min(chunk, T), LANES), padded(K, LANES), padded(V, LANES)
    one, half = like.dtype.type(1), like.dtype.type(0.5)
    keys_k, sums_k = scratch(pitch * wide_k, like), scratch(pitch * wide_k, like)
    keys_v, sums_v = scratch(pitch * wide_v, like), scratch(pitch * wide_v, like)
    rows_q, across_q, across_gq = scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_k, like)
    rows_g, across_g, rows_y = scratch(LANES * wide_v, like), scratch(LANES * wide_v, like), scratch(LANES * wide_v, like)
    scores, grads = scratch(pitch * LANES, like), scratch(pitch * LANES, like)
    power, slope, total = scratch(pitch + 1, like), scratch(pitch + 1, like), scratch(pitch + 1, like)
    weight, weight_slope = scratch(pitch + LANES, like), scratch(pitch + LANES, like)
    gS, gS_across, gz_now = scratch(wide_k * wide_v, like), scratch(wide_k * wide_v, like), scratch(wide_k, like)
    spare, lanes, r, factors, dots = (scratch(BLOCK, like), scratch(LANES, like), scratch(LANES, like), scratch(LANES, like),
                                      scratch(LANES, like))
    gcounts, left = scratch(pitch, like), scratch(pitch, like)
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        _tables(float(decay[h]), tiny, power, slope, total, weight, weight_slope)
        gS[:] = 0
        if state_end[0].size > 0:
            load(gS, wide_k, state_end, b, h, 0, K, V, one)
        for c in range(K):
            gz_now[c] = z_end[head * K + c]
        gn, gradient = float(count_end[head]), 0.0
        for i in range((T - 1) // chunk, -1, -1):
            first = i * chunk
            m = min(chunk, T - first)
            S, z, begun_before = states[head, i], zs[head, i], first > 0 or state[0].size > 0
            load(keys_k, pitch, k, b, h, first, m, K, one)
            load(keys_v, pitch, v, b, h, first, m, V, one)
            sums_k[:], sums_v[:], sound = 0, 0, finite(keys_k)
            if first + m < T or state_end[0].size > 0:
                for c in range(0, wide_v, LANES):
                    for a in range(0, wide_k, LANES):
                        at, to = c * wide_k + a * LANES, a * wide_v + c * LANES
                        transpose(gS_across[to : to + BLOCK], gS[at : at + BLOCK], spare)
                add_product(sums_v, pitch, keys_k, pitch, gS, wide_k, padded(m, 8), K, V, True)
                add_product(sums_k, pitch, keys_v, pitch, gS_across, wide_v, padded(m, 8), V, K, True)
                if begun_before and of_decay:
                    gradient += slope[m] * dot(gS, S)
            for j in range(m):
                left[j] = power[m - 1 - j]
            scale_rows(sums_v, pitch, m, V, left)
            gradient += _add_carried(sums_k, keys_k, pitch, K, gz_now, power, slope, m) + slope[m] * dot(gz_now, z)
            _fade(gS, gS, power[m], tiny)
            _fade(gz_now, gz_now, power[m], tiny)
            for query in range(0, m, LANES):
                some, keys = min(LANES, m - query), padded(min(m, query + LANES), 8)
                load(rows_q, LANES, q, b, h, first + query, some, K, one)
                load(rows_g, LANES, g, b, h, first + query, some, V, one)
                r[:], lanes[:] = 0, 0
                for e in range(some):
                    gcounts[query + e] = 0
                if kind != NONE:
                    load(rows_y, LANES, y, b, h, first + query, some, V, one)
                    dot_rows(dots, rows_g, rows_y, LANES, some, V)
                    for e in range(some):
                        mass, inverse = counts[head, first + query + e], inverses[head, first + query + e]
                        if inverse == 0:
                            factors[e] = one / like.dtype.type(math.sqrt(mass))
                            gcounts[query + e] = -half * dots[e] / mass
                        else:
                            factors[e] = abs(inverse)
                            r[e] = -dots[e] * inverse
                    scale_rows(rows_g, LANES, some, V, factors)
                transpose(across_q, rows_q, spare)
                transpose(across_g, rows_g, spare)
                product(scores, keys_k, pitch, across_q, keys, K)
                product(grads, keys_v, pitch, across_g, keys, V)
                _decay_both(scores, grads, keys, query, weight, weight_slope, r, lanes, of_decay)
                add_product(sums_v, pitch, scores, keys, rows_g, LANES, keys, LANES, V, finite(rows_g))
                add_product(sums_k, pitch, grads, keys, rows_q, LANES, keys, LANES, K, finite(rows_q))
                begun, begun_slope = power[query + 1 : query + 1 + LANES], slope[query + 1 : query + 1 + LANES]
                across_gq[:] = 0
                if begun_before:
                    product(across_gq, S, wide_k, across_g, padded(K, 8), V)
                _begun(across_gq, across_q, z, r, begun, begun_slope, lanes)
                if sound:
                    add_adjoint_product(across_gq, wide_k, keys_k, pitch, grads, keys, K, keys, LANES, True)
                for e in range(LANES):
                    gradient += lanes[e]
                if begun_before:
                    scale_rows(rows_g, LANES, some, V, begun)
                    add_adjoint_product(gS, wide_k, rows_q, LANES, rows_g, LANES, K, some, V, True)
                for e in range(LANES):
                    r[e] *= begun[e]
                for c in range(0, K, LANES):
                    add_rows(gz_now[c:], rows_q[c * LANES :], some, r)
                transpose(across_q, across_gq, spare)
                if not sound:  # by the gradients of scores as weights, which hide later keys
                    add_adjoint_product(across_q, LANES, grads, keys, keys_k, pitch, some, keys, K, False)
                store(gq, b, h, first + query, across_q, LANES, some, K, one)
            for e in range(m - 1, -1, -1):
                at = first + e
                gn += gcounts[e]
                gradient += gn * (counts[head, at - 1] if at > 0 else count[head])
                gn *= decay[h]
            store(gk, b, h, first, sums_k, pitch, m, K, one)
            store(gv, b, h, first, sums_v, pitch, m, V, one)
        gdecay[head] = gradient
        if state[0].size > 0:
            store(gstate, b, h, 0, gS, wide_k, K, V, one)
        for c in range(K):
            gz[head * K + c] = gz_now[c]
        gcount[head] = gn


@cpu_kernel
def step(q, k, v, decay, S, z, n, kind, y):
    """One position of all heads, with their vectors one after the other: y, and the state S[H K V], z[H K], n[H] after it.

    y = (decay q S + (q · k) v) / divisor. q · k by itself: where it is small, its rounding is the same factor for all values of
    a head, and a norm that follows drops it.
    """
    (heads, keys, values), zero, one = S.shape, y.dtype.type(0), y.dtype.type(1)
    for h in range(heads):
        stays, present, score = decay[h], zero, zero
        for c in range(keys):
            query, key = q[h * keys + c], k[h * keys + c]
            z[h, c] = stays * z[h, c] + key
            present += query * key
            score += query * z[h, c]
        for j in range(values):
            y[h * values + j] = present * v[h * values + j]
        for c in range(keys):
            query, key = q[h * keys + c], k[h * keys + c]
            for j in range(values):
                past = stays * S[h, c, j]
                y[h * values + j] += query * past
                S[h, c, j] = past + key * v[h * values + j]
        n[h] = stays * n[h] + one
        if kind != NONE:
            root = y.dtype.type(math.sqrt(n[h]))
            factor = one / (max(abs(score), root) if kind == PAPER else root)
            for j in range(values):
                y[h * values + j] *= factor


def supports(q):
    return None if q.shape[3] else "needs at least one channel in q and k"


def _row(array, shape, dtype):
    """A state as one flat array; zeros if there is none."""
    return np.zeros(math.prod(shape), dtype) if array is None else np.array(array, order="C").reshape(-1)


def _matrices(array, dtype):
    """A state of matrices as ``load`` takes it; empty if there is none."""
    return flat(np.zeros((0, 0, 0, 0), dtype) if array is None else array)


def forward(q, k, v, decay, state, z, count, normalization, chunk_size):
    B, H, T, K = q.shape
    V, dtype, chunks = v.shape[3], q.dtype, -(-T // chunk_size)
    wide_k, wide_v = (-(-n // LANES) * LANES for n in (K, V))
    start = _matrices(state, dtype), _row(z, (B, H, K), dtype), _row(count, (B, H), dtype)
    y = by_position(B, H, T, V, dtype)
    ends = np.empty((B, H, K, V), dtype), np.empty((B, H, K), dtype), np.empty((B, H), dtype)
    counts, inverses = np.empty((2, B * H, T), dtype)
    states, zs = np.empty((B * H, chunks + 1, wide_k * wide_v), dtype), np.empty((B * H, chunks + 1, wide_k), dtype)
    # Smaller numbers become 0: their products with others might be subnormal.
    settings = (B, H, T, K, V), NORMALIZATIONS.index(normalization), float(np.finfo(dtype).tiny) * 2.0**24, chunk_size
    arguments = flat(q), flat(k), flat(v), np.array(decay, order="C"), start, *settings, flat(y), counts, inverses, states, zs
    _forward(*arguments, (flat(ends[0]), ends[1].reshape(-1), ends[2].reshape(-1)), (0, B * H))
    return (y, *ends), (arguments, tuple(x is not None for x in (state, z, count)))


def backward(saved, g_y, g_state, g_z, g_count, needs):
    """The gradients of q, k and v are laid out like y."""
    arguments, has = saved
    (B, H, T, K, V), dtype = arguments[5], arguments[3].dtype
    ends = _matrices(g_state, dtype), _row(g_z, (B, H, K), dtype), _row(g_count, (B, H), dtype)
    gq, gk, gv = (by_position(B, H, T, d, dtype) for d in (K, K, V))
    gstate, gz, gcount = np.zeros((B, H, K, V), dtype), np.zeros((B, H, K), dtype), np.zeros((B, H), dtype)
    gdecay = np.zeros((B, H))
    _backward(*arguments, flat(np.zeros((B, H, T, V), dtype) if g_y is None else g_y), ends, flat(gq), flat(gk), flat(gv),
              gdecay.reshape(-1), flat(gstate), gz.reshape(-1), gcount.reshape(-1), "decay" in needs,
              (0, B * H))
    passed = [x if there else None for x, there in zip((gstate, gz, gcount), has, strict=True)]
    return gq, gk, gv, gdecay.sum(0).astype(dtype) if "decay" in needs else None, *passed


step_supports = supports


def step_forward(q, k, v, decay, state, z, count, normalization):
    (B, H, _, K), V, dtype = q.shape, v.shape[3], q.dtype
    q, k, v = (np.ascontiguousarray(x).reshape(-1) for x in (q, k, v))
    y, S = np.empty((B, H, 1, V), dtype), _row(state, (B, H, K, V), dtype).reshape(B * H, K, V)
    z, count = _row(z, (B, H, K), dtype).reshape(B * H, K), _row(count, (B, H), dtype)
    step(q, k, v, np.tile(decay, B), S, z, count, NORMALIZATIONS.index(normalization), y.reshape(-1))
    return (y, S.reshape(B, H, K, V), z.reshape(B, H, K), count.reshape(B, H)), None
