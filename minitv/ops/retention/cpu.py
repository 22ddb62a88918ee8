"""retention on the CPU, a chunk at a time, forward and backward: O(T), every product in register tiles.

Matrices are in the panels of autograd/cpu/panels.py. Within a chunk of m positions, 32 queries at a time meet all keys
before them; what lies before the chunk is in the state S, z, n that came in. With A = (Q Kᵀ) * D, D[i, j] = decay^(i-j) for
i >= j, else 0, and the decays f_i = decay^(i+1) since that state and l_j = decay^(m-1-j) until the next one:

    forward    Y = (A V + f (Q S)) / divisor      S' = decay^m S + Kᵀ (l V)
               rows of A + f (Q z) are q · z      z' = decay^m z + sum of l K
    backward   G = dY / divisor, r = d(q · z)     dA = D * (G Vᵀ + r)
               dQ = dA K + f (G Sᵀ + r z)         dS = decay^m dS' + Qᵀ (f G)
               dK = dAᵀ Q + l (V dS'ᵀ + dz')      dz = decay^m dz' + Qᵀ (f r)
               dV = Aᵀ G + l (K dS')

A and dA are kept transposed, [key, query], and so is dQ, for which S is then needed as it is. The gradient of the decay is
the same sums with i decay^(i-1) in place of each decay^i.

Saved for backward: S before each chunk, in panels [V / 32, K, 32] with K and V rounded up to 32; z before each chunk; for
each position n, and the inverse of q · z, or 0 where √n is larger. Powers of the decay come from float64, and are 0 where
they no longer count: subnormal numbers are slow.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.panels import (
    L1,
    L2,
    L3,
    LANES,
    U1,
    U2,
    U3,
    U4,
    U,
    add_adjoint_product,
    add_product,
    finite,
    flat,
    load,
    product,
    scratch,
    store,
    transpose,
)

from . import NORMALIZATIONS

BLOCK = LANES * LANES
NONE, DECAY, PAPER = range(len(NORMALIZATIONS))


@cpu_kernel
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


@cpu_kernel
def _decay_scores(scores, weights, query):
    """scores *= weights, elementwise; 0 for keys after their query."""
    for i in range(scores.size):
        scores[i] *= weights[i]
    _hide(scores, query)


@cpu_kernel
def _hide(scores, query):
    """0 for keys after their query, of which the first is `query`: they may be NaN, which a weight of 0 leaves."""
    for key in range(query + 1, scores.size // LANES):
        for e in range(min(LANES, key - query)):
            scores[key * LANES + e] = 0


@cpu_kernel
def _scale_rows(panels, pitch, width, rows, factors):
    """panels[r, c] *= factors[r]; up to 3 rows more than `rows` change too."""
    for left in range(U(0), U(width), L1):
        for r in range(U(0), U(rows), U4):
            i, f0, f1, f2, f3 = left * U(pitch) + r * L1, factors[r], factors[r + U1], factors[r + U2], factors[r + U3]
            for e in range(L1):
                x0, x1, x2, x3 = panels[i + e], panels[i + e + L1], panels[i + e + L2], panels[i + e + L3]
                panels[i + e], panels[i + e + L1], panels[i + e + L2], panels[i + e + L3] = x0 * f0, x1 * f1, x2 * f2, x3 * f3


@cpu_kernel
def _fade(out, a, factor, tiny):
    """out = factor * a, without subnormal numbers."""
    zero, least = out.dtype.type(0), out.dtype.type(tiny)
    for i in range(out.size):
        x = factor * a[i]
        out[i] = x if abs(x) >= least else zero


@cpu_kernel
def _dot(a, b):
    s = a.dtype.type(0)
    for i in range(a.size):
        s += a[i] * b[i]
    return s


@cpu_kernel
def _add_rows(out, o, panels, i, rows, factors):
    """out[o + e] += sum of factors[r] * panels[i + 32 r + e], for r < rows and e < 32; rows up to a multiple of 4 are zero."""
    o = U(o)
    for r in range(U(0), U(rows), U4):
        j, f0, f1, f2, f3 = U(i) + r * L1, factors[r], factors[r + U1], factors[r + U2], factors[r + U3]
        for e in range(L1):
            x0, x1, x2, x3 = panels[j + e], panels[j + e + L1], panels[j + e + L2], panels[j + e + L3]
            out[o + e] += f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3


@cpu_kernel
def _row_scores(out, scores, keys, across, z, power, ones):
    """q · z of 32 queries: the sums of their decayed scores, and what comes from the state."""
    out[:] = 0
    _add_rows(out, 0, across, 0, z.size, z)
    for e in range(LANES):
        out[e] *= power[e]
    _add_rows(out, 0, scores, 0, keys, ones)


@cpu_kernel
def _forward(q_in, k_in, v_in, decay, start, shape, kind, tiny, chunk, y, counts, inverses, states, zs, ends):
    (q, q_strides), (k, k_strides), (v, v_strides) = q_in, k_in, v_in
    (state, z, count), (state_end, z_end, count_end) = start, ends
    B, H, T, K, V = shape
    zero, one = y.dtype.type(0), y.dtype.type(1)
    pitch = (min(chunk, T) + LANES - 1) // LANES * LANES
    wide_k, wide_v = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
    keys_k, keys_v, scores = scratch(pitch * wide_k, q), scratch(pitch * wide_v, q), scratch(pitch * LANES, q)
    rows, across, sums = scratch(LANES * wide_k, q), scratch(LANES * wide_k, q), scratch(LANES * wide_v, q)
    power, slope, total, left = scratch(pitch + 1, q), scratch(pitch + 1, q), scratch(pitch + 1, q), scratch(pitch, q)
    weight, weight_slope, weights = scratch(pitch + LANES, q), scratch(pitch + LANES, q), scratch(pitch * LANES, q)
    spare, lanes, factors, ones = scratch(BLOCK, q), scratch(LANES, q), scratch(LANES, q), scratch(pitch, q)
    ones[:] = 1
    for head in range(B * H):
        b, h = head // H, head % H
        _tables(float(decay[h]), tiny, power, slope, total, weight, weight_slope)
        for r in range(pitch):  # [key - query + pitch - 32, e] has the decay between a key and the query + e
            weights[r * LANES : (r + 1) * LANES] = weight[pitch - 1 - r : pitch - 1 - r + LANES]
        states[head, 0], zs[head, 0] = 0, 0
        if state.size > 0:
            load(states[head, 0], wide_k, state, head * K * V, V, K, V, one)
        for c in range(K):
            zs[head, 0, c] = z[head * K + c]
        n = count[head]
        for first in range(0, T, chunk):
            i, m = first // chunk, min(chunk, T - first)
            S, S_next, z_now, z_next = states[head, i], states[head, i + 1], zs[head, i], zs[head, i + 1]
            load(keys_k, pitch, k, b * k_strides[0] + h * k_strides[1] + first * k_strides[2], k_strides[2], m, K, one)
            load(keys_v, pitch, v, b * v_strides[0] + h * v_strides[1] + first * v_strides[2], v_strides[2], m, V, one)
            sound = finite(keys_v)
            for query in range(0, m, LANES):
                some, keys = min(LANES, m - query), (min(m, query + LANES) + 7) // 8 * 8
                at = b * q_strides[0] + h * q_strides[1] + (first + query) * q_strides[2]
                load(rows, LANES, q, at, q_strides[2], some, K, one)
                transpose(across, rows, spare)
                product(scores, keys_k, pitch, 0, keys, across, K)
                _decay_scores(scores[: keys * LANES], weights[(pitch - LANES - query) * LANES :], query)
                sums[:] = 0
                begun = power[query + 1 : query + 1 + LANES]
                if first > 0 or state.size > 0:
                    add_product(sums, LANES, rows, LANES, 0, S, wide_k, (some + 7) // 8 * 8, K, V, True)
                    _scale_rows(sums, LANES, V, some, begun)
                add_adjoint_product(sums, LANES, scores, keys, keys_v, pitch, some, keys, V, sound)
                if kind == PAPER:
                    _row_scores(lanes, scores, keys, across, z_now, begun, ones)
                for e in range(some):
                    seen = total[query + e] + begun[e] * n
                    top, inverse = y.dtype.type(math.sqrt(seen)), zero
                    if kind == PAPER and abs(lanes[e]) > top:
                        inverse = one / lanes[e]
                    counts[head, first + query + e], inverses[head, first + query + e] = seen, inverse
                    factors[e] = one / top if inverse == 0 else abs(inverse)
                if kind != NONE:
                    _scale_rows(sums, LANES, V, some, factors)
                store(y, ((b * T + first + query) * H + h) * V, H * V, sums, LANES, some, V, one)
            for j in range(m):
                left[j] = power[m - 1 - j]
            _fade(S_next, S, power[m], tiny)
            _fade(z_next, z_now, power[m], tiny)
            for c in range(0, K, LANES):
                _add_rows(z_next, c, keys_k, c * pitch, m, left)
            _scale_rows(keys_v, pitch, V, m, left)
            add_adjoint_product(S_next, wide_k, keys_k, pitch, keys_v, pitch, K, m, V, True)
            n = total[m - 1] + power[m] * n
        store(state_end, head * K * V, V, states[head, -1], wide_k, K, V, one)
        for c in range(K):
            z_end[head * K + c] = zs[head, -1, c]
        count_end[head] = n


@cpu_kernel
def _add_carried(dk, keys_k, pitch, width, dz, power, slope, m):
    """dK from the next state: add dz', decay; returns what it says of the decay."""
    found = 0.0
    for left in range(0, width, LANES):
        part = dz[left : left + LANES]
        for j in range(m):
            at = left * pitch + j * LANES
            row, key = dk[at : at + LANES], keys_k[at : at + LANES]
            factor, s = power[m - 1 - j], dk.dtype.type(0)
            for e in range(LANES):
                x = row[e] + part[e]
                s += x * key[e]
                row[e] = x * factor
            found += slope[m - 1 - j] * s
    return found


@cpu_kernel
def _decay_both(scores, grads, keys, query, weight, weight_slope, r, lanes):
    """A and dA from the scores and G Vᵀ; adds to `lanes` what they say of the decay."""
    for key in range(keys):
        at = LANES - 1 + query - key
        factors, slopes = weight[at : at + LANES], weight_slope[at : at + LANES]
        row, grad = scores[key * LANES : (key + 1) * LANES], grads[key * LANES : (key + 1) * LANES]
        for e in range(LANES):
            s, g = row[e], grad[e] + r[e]
            lanes[e] += s * g * slopes[e]
            row[e] = s * factors[e]
            grad[e] = g * factors[e]
    _hide(scores[: keys * LANES], query)
    _hide(grads[: keys * LANES], query)


@cpu_kernel
def _begun(dq, across, z, r, power, slope, lanes):
    """dQᵀ from the state before: decay it, with r z; adds to `lanes` what it says of the decay."""
    for k in range(z.size):
        row, column, factor = dq[k * LANES : (k + 1) * LANES], across[k * LANES : (k + 1) * LANES], z[k]
        for e in range(LANES):
            x = row[e] + r[e] * factor
            lanes[e] += x * column[e] * slope[e]
            row[e] = x * power[e]


@cpu_kernel
def _backward(q_in, k_in, v_in, decay, start, shape, kind, tiny, chunk, y, counts, inverses, states, zs, g_in, ends,
              dq, dk, dv, ddecay, dstate, dz, dcount):
    (q, q_strides), (k, k_strides), (v, v_strides), (g, g_strides) = q_in, k_in, v_in, g_in
    (state, _, count), (state_end, z_end, count_end) = start, ends
    B, H, T, K, V = shape
    zero, one, half = y.dtype.type(0), y.dtype.type(1), y.dtype.type(0.5)
    pitch = (min(chunk, T) + LANES - 1) // LANES * LANES
    wide_k, wide_v = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
    keys_k, sums_k = scratch(pitch * wide_k, q), scratch(pitch * wide_k, q)
    keys_v, sums_v = scratch(pitch * wide_v, q), scratch(pitch * wide_v, q)
    rows_q, across_q = scratch(LANES * wide_k, q), scratch(LANES * wide_k, q)
    rows_g, across_g, rows_y = scratch(LANES * wide_v, q), scratch(LANES * wide_v, q), scratch(LANES * wide_v, q)
    across_dq, scores, grads = scratch(LANES * wide_k, q), scratch(pitch * LANES, q), scratch(pitch * LANES, q)
    power, slope, total = scratch(pitch + 1, q), scratch(pitch + 1, q), scratch(pitch + 1, q)
    weight, weight_slope = scratch(pitch + LANES, q), scratch(pitch + LANES, q)
    dS, dS_across, dz_now = scratch(wide_k * wide_v, q), scratch(wide_k * wide_v, q), scratch(wide_k, q)
    spare, lanes, r, factors = scratch(BLOCK, q), scratch(LANES, q), scratch(LANES, q), scratch(LANES, q)
    dcounts, left = scratch(pitch, q), scratch(pitch, q)
    for head in range(B * H):
        b, h = head // H, head % H
        _tables(float(decay[h]), tiny, power, slope, total, weight, weight_slope)
        if state_end.size > 0:
            load(dS, wide_k, state_end, head * K * V, V, K, V, one)
        else:
            dS[:] = 0
        for c in range(K):
            dz_now[c] = z_end[head * K + c]
        dn, found = float(count_end[head]), 0.0
        for i in range((T - 1) // chunk, -1, -1):
            first = i * chunk
            m = min(chunk, T - first)
            S, z, begun_before = states[head, i], zs[head, i], first > 0 or state.size > 0
            load(keys_k, pitch, k, b * k_strides[0] + h * k_strides[1] + first * k_strides[2], k_strides[2], m, K, one)
            load(keys_v, pitch, v, b * v_strides[0] + h * v_strides[1] + first * v_strides[2], v_strides[2], m, V, one)
            sums_k[:], sums_v[:], sound = 0, 0, finite(keys_k)
            if first + m < T or state_end.size > 0:
                for c in range(0, wide_v, LANES):
                    for a in range(0, wide_k, LANES):
                        at, to = c * wide_k + a * LANES, a * wide_v + c * LANES
                        transpose(dS_across[to : to + BLOCK], dS[at : at + BLOCK], spare)
                padded = (m + 7) // 8 * 8
                add_product(sums_v, pitch, keys_k, pitch, 0, dS, wide_k, padded, K, V, True)
                add_product(sums_k, pitch, keys_v, pitch, 0, dS_across, wide_v, padded, V, K, True)
                if begun_before:
                    found += slope[m] * _dot(dS, S)
            for j in range(m):
                left[j] = power[m - 1 - j]
            _scale_rows(sums_v, pitch, V, m, left)
            found += _add_carried(sums_k, keys_k, pitch, K, dz_now, power, slope, m) + slope[m] * _dot(dz_now, z)
            _fade(dS, dS, power[m], tiny)
            _fade(dz_now, dz_now, power[m], tiny)
            for query in range(0, m, LANES):
                some, keys = min(LANES, m - query), (min(m, query + LANES) + 7) // 8 * 8
                at = b * q_strides[0] + h * q_strides[1] + (first + query) * q_strides[2]
                load(rows_q, LANES, q, at, q_strides[2], some, K, one)
                at = b * g_strides[0] + h * g_strides[1] + (first + query) * g_strides[2]
                load(rows_g, LANES, g, at, g_strides[2], some, V, one)
                r[:], lanes[:] = 0, 0
                for e in range(some):
                    dcounts[query + e] = 0
                if kind != NONE:
                    load(rows_y, LANES, y, ((b * T + first + query) * H + h) * V, H * V, some, V, one)
                    for e in range(some):
                        dot = zero
                        for c in range(0, V, LANES):
                            at = (c + e) * LANES
                            dot += _dot(rows_g[at : at + LANES], rows_y[at : at + LANES])
                        seen, inverse = counts[head, first + query + e], inverses[head, first + query + e]
                        if inverse == 0:
                            factors[e] = one / y.dtype.type(math.sqrt(seen))
                            dcounts[query + e] = -half * dot / seen
                        else:
                            factors[e] = abs(inverse)
                            r[e] = -dot * inverse
                    _scale_rows(rows_g, LANES, V, some, factors)
                transpose(across_q, rows_q, spare)
                transpose(across_g, rows_g, spare)
                product(scores, keys_k, pitch, 0, keys, across_q, K)
                product(grads, keys_v, pitch, 0, keys, across_g, V)
                _decay_both(scores, grads, keys, query, weight, weight_slope, r, lanes)
                add_product(sums_v, pitch, scores, keys, 0, rows_g, LANES, keys, LANES, V, finite(rows_g))
                add_product(sums_k, pitch, grads, keys, 0, rows_q, LANES, keys, LANES, K, finite(rows_q))
                begun, begun_slope = power[query + 1 : query + 1 + LANES], slope[query + 1 : query + 1 + LANES]
                across_dq[:] = 0
                if begun_before:
                    product(across_dq, S, wide_k, 0, (K + 7) // 8 * 8, across_g, V)
                _begun(across_dq, across_q, z, r, begun, begun_slope, lanes)
                if sound:
                    add_adjoint_product(across_dq, wide_k, keys_k, pitch, grads, keys, K, keys, LANES, True)
                for e in range(LANES):
                    found += lanes[e]
                if begun_before:
                    _scale_rows(rows_g, LANES, V, some, begun)
                    add_adjoint_product(dS, wide_k, rows_q, LANES, rows_g, LANES, K, some, V, True)
                for e in range(LANES):
                    r[e] *= begun[e]
                for c in range(0, K, LANES):
                    _add_rows(dz_now, c, rows_q, c * LANES, some, r)
                transpose(across_q, across_dq, spare)
                if not sound:  # by the gradients of scores as weights, which hide later keys
                    add_adjoint_product(across_q, LANES, grads, keys, keys_k, pitch, some, keys, K, False)
                store(dq, ((b * T + first + query) * H + h) * K, H * K, across_q, LANES, some, K, one)
            for e in range(m - 1, -1, -1):
                at = first + e
                dn += dcounts[e]
                found += dn * (counts[head, at - 1] if at > 0 else count[head])
                dn *= decay[h]
            store(dk, ((b * T + first) * H + h) * K, H * K, sums_k, pitch, m, K, one)
            store(dv, ((b * T + first) * H + h) * V, H * V, sums_v, pitch, m, V, one)
        ddecay[head] = found
        if state.size > 0:
            store(dstate, head * K * V, V, dS, wide_k, K, V, one)
        for c in range(K):
            dz[head * K + c] = dz_now[c]
        dcount[head] = dn


def supports(q):
    return None if q.shape[3] else "needs at least one channel in q and k"


def _flat_state(array, shape, dtype):
    """A state as one flat array; zeros if there is none."""
    return np.zeros(math.prod(shape), dtype) if array is None else np.array(array, order="C").reshape(-1)


def forward(q, k, v, decay, state, z, count, normalization, chunk_size):
    B, H, T, K = q.shape
    V, dtype, chunks = v.shape[3], q.dtype, -(-T // chunk_size)
    wide_k, wide_v = (-(-n // LANES) * LANES for n in (K, V))
    start = (_flat_state(state, (B, H, K, V) if state is not None else (0,), dtype), _flat_state(z, (B, H, K), dtype),
             _flat_state(count, (B, H), dtype))
    y = np.empty((B, T, H, V), dtype)  # the heads of a position side by side: merging them is a reshape
    ends = np.empty((B, H, K, V), dtype), np.empty((B, H, K), dtype), np.empty((B, H), dtype)
    counts, inverses = np.empty((2, B * H, T), dtype)
    states, zs = np.empty((B * H, chunks + 1, wide_k * wide_v), dtype), np.empty((B * H, chunks + 1, wide_k), dtype)
    # Smaller numbers become 0: their products with others might be subnormal.
    settings = (B, H, T, K, V), NORMALIZATIONS.index(normalization), float(np.finfo(dtype).tiny) * 2.0**24, chunk_size
    arrays = np.array(decay, order="C"), start, *settings, y.reshape(-1), counts, inverses, states, zs
    _forward(flat(q), flat(k), flat(v), *arrays, tuple(e.reshape(-1) for e in ends))
    return (y.transpose(0, 2, 1, 3), *ends), (q, k, v, arrays, tuple(x is not None for x in (state, z, count)))


def backward(saved, g_y, g_state, g_z, g_count):
    """The gradients of q, k and v are laid out like y."""
    q, k, v, arrays, given = saved
    (B, H, T, K), V, dtype = q.shape, v.shape[3], q.dtype
    ends = (_flat_state(g_state, (0,), dtype), _flat_state(g_z, (B, H, K), dtype), _flat_state(g_count, (B, H), dtype))
    g = np.zeros((B, H, T, V), dtype) if g_y is None else g_y
    dq, dk, dv = np.empty((B, T, H, K), dtype), np.empty((B, T, H, K), dtype), np.empty((B, T, H, V), dtype)
    starts = np.zeros((B, H, K, V), dtype), np.zeros((B, H, K), dtype), np.zeros((B, H), dtype)
    ddecay = np.zeros((B, H))
    _backward(flat(q), flat(k), flat(v), *arrays, flat(g), ends, dq.reshape(-1), dk.reshape(-1), dv.reshape(-1),
              ddecay.reshape(-1), *(x.reshape(-1) for x in starts))
    passed = [x if has else None for x, has in zip(starts, given, strict=True)]
    return *(x.transpose(0, 2, 1, 3) for x in (dq, dk, dv)), ddecay.sum(0).astype(dtype), *passed
