"""favor on the CPU, a chunk at a time, forward and backward: O(T), every product in register tiles, every exponent at most 0.

Matrices are in the panels of autograd/cpu/panels.py. Features are computed where they are needed, from queries and keys, and
never stored: a chunk has A = the features of its M keys [M F], and 32 queries at a time have theirs as [F 32]. S[V F] and z[F]
are the sums of the state in units of e^a, a[F] the largest ln φ_f(k) so far; ' is after the chunk, gX the gradient of X:

    forward    S̄ = e^(a - a') S, z̄ = e^(a - a') z             features of keys e^(ln φ(k) - a'), of queries e^(ln φ(q) + a' - r)
               P = A Q for j ≤ i, else 0                      n = column sums of P, plus z̄ Q
               Y = (Vᵀ P + S̄ Q) / n                           S' = S̄ + Vᵀ A, z' = z̄ + column sums of A
    backward   G = gY / n, c = -G · Y                         M = V G + c for j ≤ i, else 0
               gQ = Aᵀ M + S̄ᵀ G + z̄ c                         gS = e^(a - a') (gS' + G Qᵀ)
               gA = M Qᵀ + V gS' + gz'                        gz = e^(a - a') (gz' + Q c)
               gV = P Gᵀ + A gS'ᵀ                             u = features ∘ their gradients, or where w · x > 0

A chunk is computed pair by pair, with the exponents ln φ_f(q_i) + ln φ_f(k_j) - r_i and the maximum r_i of what query i sees,
if n is tiny somewhere, because later keys of the chunk are much larger, and if a feature or value is not finite. Saved for
backward: S, z and a before each chunk, 1/n, and which chunks those are. Backward goes pair by pair for positive features alone:
others have no exponents, and where one is not finite, the zeros of M hide it from earlier queries. Without ``causal`` there is
one state, after all keys.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.math import exp
from autograd.cpu.panels import (
    LANES,
    add_adjoint_product,
    add_product,
    add_rows,
    by_position,
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

from . import FEATURES, scale_of

BLOCK = LANES * LANES
POSITIVE = FEATURES.index("positive")
FLOOR, HIDDEN, CEILING = -5e37, -1e38, 1e38  # a of an empty state, ln φ of a masked key, a of features that only fill a panel


@inner
def _load_keys(keys_k, keys_v, f, squares, k, v, mask, W, shape, b, h, first, m, pitch, kind, scale, offset):
    """A chunk's keys and values, and ln φ of the keys for positive features, else φ: [M F], of masked keys and the rest of a
    panel HIDDEN, or 0.
    """
    _, _, T, K, V, F = shape
    zero, one, absent_log, half = f.dtype.type(0), f.dtype.type(1), f.dtype.type(HIDDEN), f.dtype.type(0.5 * scale * scale)
    load(keys_k, pitch, k, b, h, first, m, K, one)
    load(keys_v, pitch, v, b, h, first, m, V, one)
    if mask.size > 0:
        for j in range(m):
            if not mask[b * T + first + j]:
                for at in range(j * LANES, keys_k.size, pitch * LANES):
                    keys_k[at : at + LANES] = 0
                for at in range(j * LANES, keys_v.size, pitch * LANES):
                    keys_v[at : at + LANES] = 0
    f[:] = 0
    add_product(f, pitch, keys_k, pitch, W, padded(K, LANES), padded(m, 8), K, F, True)
    dot_rows(squares, keys_k, keys_k, pitch, m, K)
    for j in range(pitch):
        absent = j >= m or (mask.size > 0 and not mask[b * T + first + j])
        less = half * squares[j] if j < m else zero
        for left in range(0, F, LANES):
            row = f[left * pitch + j * LANES : left * pitch + (j + 1) * LANES]
            if absent:
                row[:] = absent_log if kind == POSITIVE else zero
            elif kind == POSITIVE:
                for e in range(LANES):
                    row[e] -= less
            else:
                for e in range(LANES):
                    row[e] = (zero if row[e] < zero else row[e]) + offset
                row[min(F - left, LANES) :] = 0


@inner
def _raise(top_next, top, f, pitch, m):
    """The maximum of a and of the columns of ln φ; NaN counts as nothing."""
    assign(top_next, top)
    for left in range(0, top.size, LANES):
        part = top_next[left : left + LANES]
        for j in range(m):
            row = f[left * pitch + j * LANES : left * pitch + (j + 1) * LANES]
            for e in range(LANES):
                part[e] = row[e] if row[e] > part[e] else part[e]


@inner
def _exp_keys(f, top, pitch):
    """f = e^(f - a)."""
    for left in range(0, top.size, LANES):
        part, panel = top[left : left + LANES], f[left * pitch : (left + LANES) * pitch]
        for j in range(0, panel.size, LANES):
            row = panel[j : j + LANES]
            for e in range(LANES):
                row[e] = exp(row[e] - part[e])


@inner
def _fade(out, x, rows, fade, tiny):
    """Each of the rows of x, a matrix [rows F] in panels, times fade[F], without subnormal numbers."""
    zero, least = out.dtype.type(0), out.dtype.type(tiny)
    for left in range(0, fade.size, LANES):
        part = fade[left : left + LANES]
        for at in range(left * rows, (left + LANES) * rows, LANES):
            one, other = x[at : at + LANES], out[at : at + LANES]
            for e in range(LANES):
                y = one[e] * part[e]
                other[e] = y if abs(y) >= least else zero


@inner
def _factors(fade, top, top_next):
    """e^(a - a')."""
    for c in range(fade.size):
        fade[c] = exp(top[c] - top_next[c])


@inner
def _load_queries(rows, across, f, spare, q, R, shape, b, h, first, some):
    """32 queries, and w_f · x of each: f [F 32]."""
    K, wide = shape[3], padded(shape[5], LANES)
    load(rows, LANES, q, b, h, first, some, K, f.dtype.type(1))
    transpose(across, rows, spare)
    product(f, R, wide, across, wide, K)


@inner
def _weigh(f, top, best, F, kind, offset):
    """From w_f · x, [F 32], the features of queries, positive ones in the unit e^r."""
    zero = f.dtype.type(0)
    if kind != POSITIVE:
        for i in range(F * LANES):
            f[i] = (zero if f[i] < zero else f[i]) + offset
        return
    best[:] = -np.inf
    for c in range(F):
        row, a = f[c * LANES : (c + 1) * LANES], top[c]
        for e in range(LANES):
            x = row[e] + a
            row[e] = x
            best[e] = x if x > best[e] else best[e]
    for c in range(F):
        row = f[c * LANES : (c + 1) * LANES]
        for e in range(LANES):
            row[e] = exp(row[e] - best[e])


@inner
def _hide_later(scores, query, keys):
    """0 where a key is after the query."""
    for key in range(query + 1, keys):
        scores[key * LANES : key * LANES + min(key - query, LANES)] = 0


@inner
def _pairs(scores, rows, f, logs, pitch, run, top, best, F, query, some, keys, kind):
    """The same pair by pair: scores [keys 32], f in the unit e^r, r, and ``run``, the maximum of what the last query sees.

    ``rows`` are w_f · x of the queries [32 F], for other features than positive ones the features; ``logs`` those of the keys.
    """
    scores[: keys * LANES] = 0
    for e in range(some):
        r = f.dtype.type(-np.inf)
        for c in range(F if kind == POSITIVE else 0):
            at = c // LANES * LANES
            key, x = logs[at * pitch + (query + e) * LANES + c - at], rows[at * LANES + e * LANES + c - at]
            run[c] = key if key > run[c] else run[c]
            r = x + run[c] if x + run[c] > r else r
        best[e] = r
        for j in range(query + e + 1):
            total = f.dtype.type(0)
            for left in range(0, F, LANES):
                row, key = rows[(left + e) * LANES :], logs[left * pitch + j * LANES :]
                if kind == POSITIVE:
                    for c in range(min(LANES, F - left)):
                        total += exp(row[c] + key[c] - r)
                else:
                    for c in range(min(LANES, F - left)):
                        total += row[c] * key[c]
            scores[j * LANES + e] = total
        for c in range(F if kind == POSITIVE else 0):
            f[c * LANES + e] = exp(f[c * LANES + e] + top[c] - r)


@cpu_kernel(parts="heads")
def _forward(q, k, v, mask, W, R, shape, causal, kind, scale, offset, chunk, tiny, carried, y, inverses, states, masses, tops,
             pairwise, heads):
    _, H, T, K, V, F = shape
    like, pitch = y[0], padded(min(chunk, T), LANES)
    wide_k, wide_v, wide_f = padded(K, LANES), padded(V, LANES), padded(F, LANES)
    zero, one, limit, low = like.dtype.type(0), like.dtype.type(1), math.sqrt(tiny), like.dtype.type(offset)
    keys_k, keys_v, f, logs = (scratch(pitch * wide_k, like), scratch(pitch * wide_v, like), scratch(pitch * wide_f, like),
                               scratch(pitch * wide_f, like))
    rows, across, queries, rows_f = (scratch(LANES * wide_k, like), scratch(LANES * wide_k, like),
                                     scratch(LANES * wide_f, like), scratch(LANES * wide_f, like))
    scores, across_y, rows_y = scratch(pitch * LANES, like), scratch(LANES * wide_v, like), scratch(LANES * wide_v, like)
    new, fade, run, squares, ones = (scratch(wide_f, like), scratch(wide_f, like), scratch(wide_f, like), scratch(pitch, like),
                                     scratch(pitch, like))
    spare, best, total, factors = scratch(BLOCK, like), scratch(LANES, like), scratch(LANES, like), scratch(LANES, like)
    ones[:], fade[:], slots = 1, 1, states.shape[1]
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        if not causal:
            assign(states[head, 1], states[head, 0])
            assign(masses[head, 1], masses[head, 0])
            assign(tops[head, 1], tops[head, 0])
        for i in range((T + chunk - 1) // chunk):
            first, here, there = i * chunk, i % slots if causal else 1, (i + 1) % slots if causal else 1
            m = min(chunk, T - first)
            S, z, top, S_next, z_next = (states[head, here], masses[head, here], tops[head, here], states[head, there],
                                         masses[head, there])
            _load_keys(keys_k, keys_v, f, squares, k, v, mask, W, shape, b, h, first, m, pitch, kind, scale, low)
            assign(new, top)
            if kind == POSITIVE:
                _raise(new, top, f, pitch, m)
                _factors(fade, top, new)
                _exp_keys(f, new, pitch)
            _fade(S_next, S, wide_v, fade, tiny)
            _fade(z_next, z, 1, fade, tiny)
            pairs = sound = True
            if causal:
                sound = finite(f) and finite(keys_v)
                pairs = not sound
            query = 0 if causal else m
            while query < m:
                if pairs and query == 0:
                    _load_keys(keys_k, keys_v, logs, squares, k, v, mask, W, shape, b, h, first, m, pitch, kind, scale, low)
                    assign(run, top)
                some, keys = min(LANES, m - query), padded(min(m, query + LANES), 8)
                _load_queries(rows, across, queries, spare, q, R, shape, b, h, first + query, some)
                S_seen, z_seen = S_next, z_next
                if pairs:
                    S_seen, z_seen = S, z
                    if kind != POSITIVE:
                        _weigh(queries, top, best, F, kind, low)
                    transpose(rows_f, queries, spare)
                    _pairs(scores, rows_f, queries, logs, pitch, run, top, best, F, query, some, keys, kind)
                else:
                    _weigh(queries, new, best, F, kind, low)
                    product(scores, f, pitch, queries, keys, F)
                    _hide_later(scores, query, keys)
                total[:], across_y[:] = 0, 0
                add_rows(total, scores, keys, ones)
                add_rows(total, queries, wide_f, z_seen)
                if not pairs:
                    for e in range(some):
                        pairs = pairs or total[e] < limit
                    if pairs:
                        query = 0
                        continue
                if i > 0 or carried:
                    add_product(across_y, wide_v, S_seen, wide_v, queries, wide_f, padded(V, 8), F, LANES, True)
                transpose(rows_y, across_y, spare)
                add_adjoint_product(rows_y, LANES, scores, keys, keys_v, pitch, some, keys, V, sound)
                for e in range(some):
                    factors[e] = one / total[e] if total[e] != zero else zero
                    inverses[head, first + query + e] = factors[e]
                scale_rows(rows_y, LANES, some, V, factors)
                store(y, b, h, first + query, rows_y, LANES, some, V, one)
                query += LANES
            pairwise[head, i] = pairs and causal
            assign(tops[head, there], new)
            add_adjoint_product(S_next, wide_v, keys_v, pitch, f, pitch, V, m, F, True)
            for left in range(0, wide_f, LANES):
                add_rows(z_next[left:], f[left * pitch :], m, ones)
        for query in range(0, 0 if causal else T, LANES):
            some = min(LANES, T - query)
            _load_queries(rows, across, queries, spare, q, R, shape, b, h, query, some)
            _weigh(queries, tops[head, 1], best, F, kind, low)
            total[:], across_y[:] = 0, 0
            add_rows(total, queries, wide_f, masses[head, 1])
            add_product(across_y, wide_v, states[head, 1], wide_v, queries, wide_f, padded(V, 8), F, LANES, True)
            transpose(rows_y, across_y, spare)
            for e in range(some):
                factors[e] = one / total[e] if total[e] != zero else zero
                inverses[head, query + e] = factors[e]
            scale_rows(rows_y, LANES, some, V, factors)
            store(y, b, h, query, rows_y, LANES, some, V, one)


@inner
def _load_gradients(rows_g, rows_y, across_g, r, dots, factors, spare, g, y, inverses, V, b, h, first, some):
    """G [32 V] and across, and c, of 32 queries."""
    one = rows_g.dtype.type(1)
    load(rows_g, LANES, g, b, h, first, some, V, one)
    load(rows_y, LANES, y, b, h, first, some, V, one)
    dot_rows(dots, rows_g, rows_y, LANES, some, V)
    r[:], factors[:] = 0, 0
    for e in range(some):
        factors[e] = inverses[first + e]
        r[e] = -dots[e] * factors[e]
    scale_rows(rows_g, LANES, some, V, factors)
    transpose(across_g, rows_g, spare)


@inner
def _from_state(gf, rows_g, r, S, z, V, F, wide_v, some):
    """What the state says of the features of queries, [32 F]: S̄ᵀ G + z̄ c."""
    for left in range(0, F, LANES):
        part = z[left : left + LANES]
        for e in range(LANES):
            row, c = gf[(left + e) * LANES : (left + e + 1) * LANES], r[e]
            for i in range(LANES):
                row[i] = c * part[i]
    add_product(gf, LANES, rows_g, LANES, S, wide_v, padded(some, 8), V, F, True)


@inner
def _to_logits(gf, f, kind, offset):
    """gf becomes the gradient of w_f · x, that of ln φ for positive features; masked keys and the rest of a panel have none."""
    zero = gf.dtype.type(0)
    if kind == POSITIVE:
        for i in range(gf.size):
            gf[i] *= f[i]
    else:
        for i in range(gf.size):
            gf[i] = gf[i] if f[i] > offset else zero


@inner
def _to_state(gS, gz, rows_g, rows_f, r, V, F, wide_v):
    """gS += G Qᵀ and gz += Q c."""
    add_adjoint_product(gS, wide_v, rows_g, LANES, rows_f, LANES, V, LANES, F, True)
    for left in range(0, F, LANES):
        add_rows(gz[left:], rows_f[left * LANES :], LANES, r)


@inner
def _from_later(gf, gv, gS, gz, across, spare, keys_v, f, pitch, m, V, F, wide_v, wide_f):
    """What the state says of a chunk's features and values: gA = V gS' + gz' and gV = A gS'ᵀ."""
    for left in range(0, F, LANES):
        part = gz[left : left + LANES]
        for j in range(m):
            assign(gf[left * pitch + j * LANES : left * pitch + (j + 1) * LANES], part)
        for down in range(0, wide_v, LANES):
            at, to = left * wide_v + down * LANES, down * wide_f + left * LANES
            transpose(across[to : to + BLOCK], gS[at : at + BLOCK], spare)
    add_product(gf, pitch, keys_v, pitch, gS, wide_v, padded(m, 8), V, F, True)
    add_product(gv, pitch, f, pitch, across, wide_f, padded(m, 8), F, V, True)


@inner
def _store_keys(gk, gv, out_k, out_v, u, keys_k, R, totals, shape, b, h, first, m, pitch, wide_f, kind, scale):
    """gK = (u W - (Σ_f u_f) x̃) scale, the second part for positive features alone, and gV."""
    _, _, _, K, V, F = shape
    one, square = u.dtype.type(1), u.dtype.type(scale * scale)
    out_k[:] = 0
    add_product(out_k, pitch, u, pitch, R, wide_f, padded(m, 8), F, K, True)
    if kind == POSITIVE:
        for j in range(m):
            s = u.dtype.type(0)
            for left in range(0, F, LANES):
                row = u[left * pitch + j * LANES : left * pitch + (j + 1) * LANES]
                for e in range(LANES):
                    s += row[e]
            totals[j] = s * square
        for left in range(0, K, LANES):
            for j in range(m):
                at = left * pitch + j * LANES
                to, x = out_k[at : at + LANES], keys_k[at : at + LANES]
                for e in range(LANES):
                    to[e] -= totals[j] * x[e]
    store(gk, b, h, first, out_k, pitch, m, K, one)
    store(gv, b, h, first, out_v, pitch, m, V, one)


@inner
def _add_pairs(gf, extra, grads, rows, logs, pitch, best, F, query, some):
    """What pairs say of the logarithms of features: M_ij e^(ln φ_f(q_i) + ln φ_f(k_j) - r_i) added up over j, and over i."""
    for e in range(some):
        for j in range(query + e + 1):
            weight = grads[j * LANES + e]
            for left in range(0, F, LANES):
                row, key = rows[(left + e) * LANES :], logs[left * pitch + j * LANES :]
                to, other = gf[(left + e) * LANES :], extra[left * pitch + j * LANES :]
                for c in range(min(LANES, F - left)):
                    x = weight * exp(row[c] + key[c] - best[e])
                    to[c] += x
                    other[c] += x


@cpu_kernel(parts="heads")
def _backward(q, k, v, mask, W, R, shape, causal, kind, scale, offset, chunk, tiny, carried, y, inverses, states, masses, tops,
              pairwise, g, ends, gsums, gmasses, gq, gk, gv, heads):
    _, H, T, K, V, F = shape
    like, pitch = y[0], padded(min(chunk, T), LANES)
    wide_k, wide_v, wide_f = padded(K, LANES), padded(V, LANES), padded(F, LANES)
    one, low = like.dtype.type(1), like.dtype.type(offset)
    keys_k, keys_v, out_k, out_v = (scratch(pitch * wide_k, like), scratch(pitch * wide_v, like), scratch(pitch * wide_k, like),
                                    scratch(pitch * wide_v, like))
    f, gf, logs, extra = (scratch(pitch * wide_f, like), scratch(pitch * wide_f, like), scratch(pitch * wide_f, like),
                          scratch(pitch * wide_f, like))
    rows, across, queries, rows_f, rows_l, gqueries = (
        scratch(LANES * wide_k, like), scratch(LANES * wide_k, like), scratch(LANES * wide_f, like),
        scratch(LANES * wide_f, like), scratch(LANES * wide_f, like), scratch(LANES * wide_f, like))
    rows_g, rows_y, across_g = scratch(LANES * wide_v, like), scratch(LANES * wide_v, like), scratch(LANES * wide_v, like)
    scores, grads, S_now, z_now = (scratch(pitch * LANES, like), scratch(pitch * LANES, like), scratch(wide_v * wide_f, like),
                                   scratch(wide_f, like))
    gS_across, fade, run = scratch(wide_v * wide_f, like), scratch(wide_f, like), scratch(wide_f, like)
    squares, spare, best, r = scratch(pitch, like), scratch(BLOCK, like), scratch(LANES, like), scratch(LANES, like)
    dots, factors = scratch(LANES, like), scratch(LANES, like)
    fade[:] = 1
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        gS, gz = gsums[head], gmasses[head]
        for query in range(0, 0 if causal else T, LANES):
            some = min(LANES, T - query)
            _load_queries(rows, across, queries, spare, q, R, shape, b, h, query, some)
            _weigh(queries, tops[head, 1], best, F, kind, low)
            transpose(rows_f, queries, spare)
            _load_gradients(rows_g, rows_y, across_g, r, dots, factors, spare, g, y, inverses[head], V, b, h, query, some)
            _from_state(gqueries, rows_g, r, states[head, 1], masses[head, 1], V, F, wide_v, some)
            _to_logits(gqueries, rows_f, kind, low)
            rows[:] = 0
            add_product(rows, LANES, gqueries, LANES, R, wide_f, padded(some, 8), F, K, True)
            store(gq, b, h, query, rows, LANES, some, K, one)
            _to_state(gS, gz, rows_g, rows_f, r, V, F, wide_v)
        for i in range((T - 1) // chunk, -1, -1):
            first, here, there = i * chunk, i if causal else 1, i + 1 if causal else 1
            m = min(chunk, T - first)
            S, z, top, top_next = states[head, here], masses[head, here], tops[head, here], tops[head, there]
            pairs = pairwise[head, i] and kind == POSITIVE
            _load_keys(keys_k, keys_v, f, squares, k, v, mask, W, shape, b, h, first, m, pitch, kind, scale, low)
            if pairs:
                extra[:] = 0
                assign(logs, f)
                assign(run, top)
            if kind == POSITIVE:
                _exp_keys(f, top_next, pitch)
                _factors(fade, top, top_next)
            gf[:], out_v[:], sound = 0, 0, finite(f)
            if first + m < T or ends or not causal:
                _from_later(gf, out_v, gS, gz, gS_across, spare, keys_v, f, pitch, m, V, F, wide_v, wide_f)
            if pairs:
                _fade(gS, gS, wide_v, fade, tiny)
                _fade(gz, gz, 1, fade, tiny)
                assign(S_now, S)
                assign(z_now, z)
            elif causal:
                _fade(S_now, S, wide_v, fade, tiny)
                _fade(z_now, z, 1, fade, tiny)
            for query in range(0, m if causal else 0, LANES):
                some, keys = min(LANES, m - query), padded(min(m, query + LANES), 8)
                _load_queries(rows, across, queries, spare, q, R, shape, b, h, first + query, some)
                _load_gradients(rows_g, rows_y, across_g, r, dots, factors, spare, g, y, inverses[head], V, b, h, first + query,
                                some)
                product(grads, keys_v, pitch, across_g, keys, V)
                for j in range(keys):
                    for e in range(LANES):
                        grads[j * LANES + e] += r[e]
                _hide_later(grads, query, keys)
                if pairs:
                    transpose(rows_l, queries, spare)
                    _pairs(scores, rows_l, queries, logs, pitch, run, top, best, F, query, some, keys, kind)
                else:
                    _weigh(queries, top_next, best, F, kind, low)
                    product(scores, f, pitch, queries, keys, F)
                    _hide_later(scores, query, keys)
                transpose(rows_f, queries, spare)
                add_product(out_v, pitch, scores, keys, rows_g, LANES, keys, LANES, V, finite(rows_g))
                gqueries[:] = 0
                if i > 0 or carried:
                    _from_state(gqueries, rows_g, r, S_now, z_now, V, F, wide_v, some)
                if not pairs:
                    add_product(gf, pitch, grads, keys, rows_f, LANES, keys, LANES, F, finite(rows_f))
                    add_adjoint_product(gqueries, LANES, grads, keys, f, pitch, some, keys, F, sound)
                _to_logits(gqueries, rows_f, kind, low)
                if pairs:
                    _add_pairs(gqueries, extra, grads, rows_l, logs, pitch, best, F, query, some)
                rows[:] = 0
                add_product(rows, LANES, gqueries, LANES, R, wide_f, padded(some, 8), F, K, True)
                store(gq, b, h, first + query, rows, LANES, some, K, one)
                if i > 0 or carried:
                    _to_state(gS, gz, rows_g, rows_f, r, V, F, wide_v)
            _to_logits(gf, f, kind, low)
            if pairs:
                for j in range(gf.size):
                    gf[j] += extra[j]
            _store_keys(gk, gv, out_k, out_v, gf, keys_k, R, squares, shape, b, h, first, m, pitch, wide_f, kind, scale)
            if causal and not pairs:
                _fade(gS, gS, wide_v, fade, tiny)
                _fade(gz, gz, 1, fade, tiny)
        if not causal:
            if kind == POSITIVE:
                _factors(fade, tops[head, 0], tops[head, 1])
            _fade(gS, gS, wide_v, fade, tiny)
            _fade(gz, gz, 1, fade, tiny)


def supports(q):
    return None if q.shape[3] else "needs at least one channel in q and k"


def _panels(x, wide):
    """A stack of matrices [N R C] as panels [N, wide C / 32, R, 32], flat for each."""
    padding = np.zeros((*x.shape[:2], wide), x.dtype)
    padding[:, :, : x.shape[2]] = x
    panels = padding.reshape(*x.shape[:2], wide // LANES, LANES).swapaxes(1, 2)
    return np.ascontiguousarray(panels).reshape(len(x), x.shape[1] * wide)


def _state_panels(mean, wide_v, wide_f):
    """[B H F V] as the panels [V F] of each head, V and F rounded up."""
    B, H, F, V = mean.shape
    rows = np.zeros((B * H, wide_v, F), mean.dtype)
    rows[:, :V] = mean.reshape(B * H, F, V).swapaxes(1, 2)
    return _panels(rows, wide_f)


def _from_panels(panels, B, H, F, V, wide_v):
    """The other way round."""
    count = -(-F // LANES)
    x = panels.reshape(B * H, count, wide_v, LANES)[:, :, :V]
    return x.transpose(0, 1, 3, 2).reshape(B * H, count * LANES, V)[:, :F].reshape(B, H, F, V)


def forward(q, k, v, projection, mask, mean, logsum, features, scale, offset, causal, chunk_size, recording):
    B, H, T, K = q.shape
    F, V, dtype, chunks, kind = len(projection), v.shape[3], q.dtype, -(-T // chunk_size), FEATURES.index(features)
    wide_k, wide_v, wide_f = (-(-n // LANES) * LANES for n in (K, V, F))
    rows = np.zeros((1, wide_f, K), dtype)
    rows[0, :F] = projection * scale_of(scale, K)
    R = _panels(rows, wide_k)[0]  # rows w_f, [F K]
    columns = np.zeros((1, wide_k, wide_f), dtype)
    columns[0, :K] = rows[0].T
    W = _panels(columns, wide_f)[0]  # the same as [K F]
    slots = chunks + 1 if causal and recording else 2
    states, masses = np.empty((B * H, slots, wide_v * wide_f), dtype), np.zeros((B * H, slots, wide_f), dtype)
    tops = np.full((B * H, slots, wide_f), CEILING if kind == POSITIVE else 0, dtype)
    states[:, 0] = 0
    if logsum is None:
        tops[:, 0, :F] = FLOOR if kind == POSITIVE else 0
    else:
        weight, logs = np.isfinite(logsum).astype(dtype), logsum.reshape(B * H, F)
        if kind == POSITIVE:
            tops[:, 0, :F] = np.maximum(logs, FLOOR)
        else:
            weight = np.exp(logsum)
        masses[:, 0, :F] = weight.reshape(B * H, F)
        states[:, 0] = _state_panels(mean * weight[..., None], wide_v, wide_f)
    y, inverses, pairwise = by_position(B, H, T, V, dtype), np.empty((B * H, T), dtype), np.zeros((B * H, max(chunks, 1)), bool)
    # Smaller numbers become 0: their products with others might be subnormal.
    settings = ((B, H, T, K, V, F), causal, kind, float(scale_of(scale, K)), float(offset), chunk_size,
                float(np.finfo(dtype).tiny) * 2.0**24, logsum is not None)
    arguments = flat(q), flat(k), flat(v), np.zeros(0, bool) if mask is None else np.array(mask, order="C").reshape(-1), W, R
    _forward(*arguments, *settings, flat(y), inverses, states, masses, tops, pairwise, (0, B * H))
    last = chunks % slots if causal else 1
    mass, top = masses[:, last, :F].reshape(B, H, F), tops[:, last, :F].reshape(B, H, F)
    nothing, one = mass == 0, dtype.type(1)
    with np.errstate(all="ignore"):
        mean_after = _from_panels(states[:, last], B, H, F, V, wide_v) / np.where(nothing, one, mass)[..., None]
        logsum_after = np.where(nothing, dtype.type(-math.inf), top + np.log(np.where(nothing, one, mass)))
    saved = arguments, settings, (flat(y), inverses, states, masses, tops, pairwise), mean_after, mass
    return (y, mean_after, logsum_after), saved if recording else None


def backward(saved, g_y, g_mean, g_logsum):
    """The gradients of q, k and v are laid out like y."""
    arguments, settings, kept, mean_after, mass = saved
    (B, H, T, K, V, F), dtype = settings[0], mass.dtype
    wide_v, wide_f = (-(-n // LANES) * LANES for n in (V, F))
    gsums, gmasses = np.zeros((B * H, wide_v * wide_f), dtype), np.zeros((B * H, wide_f), dtype)
    inverse = 1 / np.where(mass == 0, dtype.type(math.inf), mass)  # [B H F]
    if g_mean is not None:
        gsums[:] = _state_panels(g_mean * inverse[..., None], wide_v, wide_f)
        gmasses[:, :F] -= (np.sum(g_mean * mean_after, axis=3) * inverse).reshape(B * H, F)
    if g_logsum is not None:
        gmasses[:, :F] += (g_logsum * inverse).reshape(B * H, F)
    gq, gk, gv = (by_position(B, H, T, d, dtype) for d in (K, K, V))
    g = np.zeros((B, H, T, V), dtype) if g_y is None else g_y
    ends = g_mean is not None or g_logsum is not None
    _backward(*arguments, *settings, *kept, flat(g), ends, gsums, gmasses, flat(gq), flat(gk), flat(gv),
              (0, B * H))
    if not settings[-1]:
        return gq, gk, gv, None, None
    _, _, states, masses, _, _ = kept
    start, gstart = (_from_panels(x, B, H, F, V, wide_v) for x in (states[:, 0], gsums))
    weight, gweight = (x[:, :F].reshape(B, H, F) for x in (masses[:, 0], gmasses))
    return gq, gk, gv, gstart * weight[..., None], np.sum(gstart * start, axis=3) + gweight * weight


@cpu_kernel
def _step(q, k, v, mask, W, mean, logsum, heads, kind, half, offset, y):
    """One position of all heads, vectors [B H, ..] and W[F K] with the scale in it: y, and the state after it in place.

    Σ_f softmax_f(ln φ_f(q) + logsum_f) mean_f, where a key moves mean_f by its share of the weight, e^(ln φ_f(k) - logsum_f).
    """
    (count, features, width), zero, one = (*mean.shape[:2], q.shape[1]), y.dtype.type(0), y.dtype.type(1)
    exponents, keys, shares = np.empty(features, y.dtype), np.empty(features, y.dtype), np.empty(features, y.dtype)
    nothing = y.dtype.type(-np.inf)
    for head in range(count):
        square, top, total = zero, nothing, zero
        for c in range(width):
            square += k[head, c] * k[head, c]
        seen = mask.size == 0 or mask[head // heads]
        for f in range(features):
            query, key = zero, zero
            for c in range(width):
                query += W[f, c] * q[head, c]
                key += W[f, c] * k[head, c]
            if kind == POSITIVE:
                key -= half * square
            else:
                query, key = math.log(max(query, zero) + offset), math.log(max(key, zero) + offset)
            exponents[f], keys[f] = query, key if seen and key > nothing else nothing
        before = logsum[head]
        for f in range(features):
            smaller = min(before[f], keys[f])
            shares[f] = exp(smaller - max(before[f], keys[f])) if smaller > nothing else zero
        for f in range(features):
            before[f] = max(before[f], keys[f]) + math.log1p(shares[f])
        for f in range(features):
            shares[f] = exp(keys[f] - before[f]) if keys[f] > nothing else zero
        for f in range(features):
            if keys[f] > nothing:
                for j in range(v.shape[1]):
                    mean[head, f, j] += shares[f] * (v[head, j] - mean[head, f, j])
            exponents[f] += before[f]
            top = max(top, exponents[f])
        for j in range(v.shape[1]):
            y[head, j] = 0
        if top == nothing:
            continue
        for f in range(features):
            exponents[f] = exp(exponents[f] - top)
        for f in range(features):
            total += exponents[f]
            for j in range(v.shape[1]):
                y[head, j] += exponents[f] * mean[head, f, j]
        for j in range(v.shape[1]):
            y[head, j] *= one / total


step_supports = supports


def step_forward(q, k, v, projection, mask, mean, logsum, features, scale, offset):
    (B, H, *_), V, F, dtype, scale = q.shape, v.shape[3], len(projection), q.dtype, scale_of(scale, q.shape[3])
    q, k, v = (np.ascontiguousarray(x).reshape(B * H, x.shape[3]) for x in (q, k, v))
    shapes, y = ((B, H, F, V), (B, H, F)), np.empty((B * H, V), dtype)
    mean, logsum = (np.full(shape, value, dtype) if x is None else np.array(x, order="C")
                    for x, shape, value in zip((mean, logsum), shapes, (0, -math.inf), strict=True))
    mask = np.zeros(0, bool) if mask is None else np.array(mask, order="C").reshape(-1)
    _step(q, k, v, mask, np.ascontiguousarray(projection * dtype.type(scale)), mean.reshape(B * H, F, V),
          logsum.reshape(B * H, F), H, FEATURES.index(features), dtype.type(scale**2 / 2), dtype.type(offset), y)
    return (y.reshape(B, H, 1, V), mean, logsum), None
