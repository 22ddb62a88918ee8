"""rotary_linear on the CPU: the kernels of rope and of retention without decay for the numerator, one pass for the rest.

The denominator is a running sum of keys, z, times the query. Backward, the gradient of q needs z again, which is summed anew
from the first position on, and that of k the sum of what comes later, from the last position on.
"""

import numpy as np

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.panels import by_position, flat

from ..retention import cpu as retention
from ..rope import cpu as rope
from ..rope import turns


@cpu_kernel(parts="heads")
def _divide(q_in, k_in, shape, z, y_in, inverse, heads):
    """Rows y divided by q · z, z the running sum of keys that begins as it comes in; the inverses [B H T], 0 for 0."""
    q, q_strides = q_in
    k, k_strides = k_in
    y, y_strides = y_in
    _, H, T, K, V = shape
    zero, one = z.dtype.type(0), z.dtype.type(1)
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        total = z[head * K : (head + 1) * K]
        for t in range(T):
            at = b * q_strides[0] + h * q_strides[1] + t * q_strides[2]
            row = q[at : at + K]
            at = b * k_strides[0] + h * k_strides[1] + t * k_strides[2]
            key = k[at : at + K]
            divisor = zero
            for c in range(K):
                total[c] += key[c]
                divisor += row[c] * total[c]
            factor = one / divisor if divisor != zero else zero
            inverse[head * T + t] = factor
            at = b * y_strides[0] + h * y_strides[1] + t * y_strides[2]
            out = y[at : at + V]
            for j in range(V):
                out[j] = out[j] * factor if factor != zero else zero


@cpu_kernel(parts="heads")
def _rows(y_in, g_in, shape, inverse, slopes, gy_in, heads):
    """The gradient of the numerators, g / divisor, and of the divisors, -(g · y) / divisor, [B H T]."""
    y, y_strides = y_in
    g, g_strides = g_in
    gy, gy_strides = gy_in
    _, H, T, _, V = shape
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        for t in range(T):
            at = b * y_strides[0] + h * y_strides[1] + t * y_strides[2]
            row = y[at : at + V]
            at = b * g_strides[0] + h * g_strides[1] + t * g_strides[2]
            gradient = g[at : at + V]
            at = b * gy_strides[0] + h * gy_strides[1] + t * gy_strides[2]
            out, factor, total = gy[at : at + V], inverse[head * T + t], y.dtype.type(0)
            for j in range(V):
                total += gradient[j] * row[j]
                out[j] = gradient[j] * factor
            slopes[head * T + t] = -total * factor


@cpu_kernel(parts="heads")
def _add_divisor(q_in, k_in, shape, z, slopes, gz, gq_in, gk_in, heads):
    """gq += slope z and gk += the sum of slope q from this position on, to which gz, the gradient of the last z, belongs.

    gz becomes the gradient of the z that came in; ``z`` is changed.
    """
    q, q_strides = q_in
    k, k_strides = k_in
    gq, gq_strides = gq_in
    gk, gk_strides = gk_in
    _, H, T, K, _ = shape
    for head in range(heads[0], heads[1]):
        b, h = head // H, head % H
        total, rest = z[head * K : (head + 1) * K], gz[head * K : (head + 1) * K]
        for t in range(T):
            at = b * k_strides[0] + h * k_strides[1] + t * k_strides[2]
            key = k[at : at + K]
            at = b * gq_strides[0] + h * gq_strides[1] + t * gq_strides[2]
            out, slope = gq[at : at + K], slopes[head * T + t]
            for c in range(K):
                total[c] += key[c]
                out[c] += slope * total[c]
        for t in range(T - 1, -1, -1):
            at = b * q_strides[0] + h * q_strides[1] + t * q_strides[2]
            row = q[at : at + K]
            at = b * gk_strides[0] + h * gk_strides[1] + t * gk_strides[2]
            out, slope = gk[at : at + K], slopes[head * T + t]
            for c in range(K):
                rest[c] += slope * row[c]
                out[c] += rest[c]


def _turned_state(state, angles, pairing, by):
    """R_by of the channels K of state[B H K V]."""
    B, _, _, V = state.shape
    tables = turns(angles, 0, V, np.full((B, V), by), state.dtype)
    return rope.apply(state.swapaxes(2, 3), tables, pairing, 1, 1).swapaxes(2, 3)


def supports(q):
    return retention.supports(q)


def forward(q, k, v, state, z, angles, pairing, chunk_size):
    """y is laid out [B T H V], as are gradients."""
    (B, H, T, K), V, dtype = q.shape, v.shape[3], q.dtype
    tables = turns(angles, 1, T, None, dtype)
    turned = [rope.apply(x, tables, pairing, 1, 1) for x in (q, k)]
    (y, S, _, _), saved = retention.forward(*turned, v, np.ones(H, dtype), state, None, None, "none", chunk_size)
    start = np.zeros(B * H * K, dtype) if z is None else np.array(z, order="C").reshape(-1)
    z_after, inverse, shape = start.copy(), np.empty(B * H * T, dtype), (B, H, T, K, V)
    _divide(flat(q), flat(k), shape, z_after, flat(y), inverse, (0, B * H))
    return (y, _turned_state(S, angles, pairing, -T), z_after.reshape(B, H, K)), (
        saved, q, k, y, start, inverse, shape, tables, angles, pairing, state is not None, z is not None)


def backward(saved, g_y, g_state, g_z):
    inner, q, k, y, z, inverse, shape, tables, angles, pairing, has_state, has_z = saved
    (B, H, T, K, V), dtype = shape, q.dtype
    g_y = np.zeros((B, H, T, V), dtype) if g_y is None else g_y
    gy, slopes = by_position(B, H, T, V, dtype), np.empty(B * H * T, dtype)
    _rows(flat(y), flat(g_y), shape, inverse, slopes, flat(gy), (0, B * H))
    g_state = None if g_state is None else _turned_state(g_state, angles, pairing, T)
    gq, gk, gv, _, gS, _, _ = retention.backward(inner, gy, g_state, None, None, ())
    gq, gk = (rope.apply(g, tables, pairing, 1, -1) for g in (gq, gk))
    gz = np.zeros(B * H * K, dtype) if g_z is None else np.array(g_z, order="C").reshape(-1)
    _add_divisor(flat(q), flat(k), shape, z.copy(), slopes, gz, flat(gq), flat(gk), (0, B * H))
    return gq, gk, gv, gS if has_state else None, gz.reshape(B, H, K) if has_z else None
