"""AFT's half of a block for one token. A mean over the past is three numbers a channel, relative to its largest exponent:

    a = Σ e^(k_s + w_ts - top) v_s        b = Σ e^(k_s + w_ts - top)        y_t = sigmoid(q_t) a / b

Keys and values of the window lie in a ring; what has left it is such a mean, with w = 0. AFT-full's window is the context, in
AFT-simple nothing is in it. Before the first key a = 0, b = 1 and top = -∞: exponents are finite, so it counts e^-∞.
"""

from __future__ import annotations

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp

from .cpu import linear, norm, take

BLOCK = 16  # lags whose exponents are made at a time: they stay in the nearest cache, and a and b are rescaled rarely


@cpu_kernel
def _place(newest, lag, size):
    """Where in a ring of that size lies what came ``lag`` tokens before the newest."""
    return newest - lag if newest >= lag else newest - lag + size


@cpu_kernel
def _join(exponents, values, newest, a, b, top, highest):
    """a ← a + Σ e^x v and b ← b + Σ e^x, relative to a new top; row i of the exponents x is that of lag i."""
    for c in range(top.size):
        highest[c] = top[c]
    for i in range(exponents.shape[0]):
        for c in range(top.size):
            highest[c] = exponents[i, c] if exponents[i, c] > highest[c] else highest[c]
    for c in range(top.size):
        fade = exp(top[c] - highest[c])
        a[c] *= fade
        b[c] *= fade
        top[c] = highest[c]
    for i in range(exponents.shape[0]):
        s = _place(newest, i, len(values))
        for c in range(top.size):
            e = exp(exponents[i, c] - top[c])
            a[c] += e * values[s, c]
            b[c] += e


@cpu_kernel
def _of_pairs(keys, newest, u, v, position, exponents):
    """x = k_s + u · v_s for s = position, position - 1, ..., the first of which has the newest key."""
    for i in range(exponents.shape[0]):
        s, bias = _place(newest, i, len(keys)), u.dtype.type(0)
        for r in range(u.size):
            bias += u[r] * v[position - i, r]
        for c in range(exponents.shape[1]):
            exponents[i, c] = keys[s, c] + bias


@cpu_kernel
def _of_lags(keys, newest, filters, lag, exponents):
    """x = k_s + w_j for j = lag, lag + 1, ..., the first of which has the newest key."""
    for i in range(exponents.shape[0]):
        s = _place(newest, i, len(keys))
        for c in range(exponents.shape[1]):
            exponents[i, c] = keys[s, c] + filters[lag + i, c]


@cpu_kernel
def _add(q, a, b, out, out_bias, y, x):
    """x ← x + W (sigmoid(q) a / b) + bias; a W without rows is no W."""
    one = x.dtype.type(1)
    for c in range(x.size):
        y[c] = a[c] / (b[c] * (one + exp(-q[c])))
    if len(out):
        linear(out, out_bias, y, x, True)
    else:
        for c in range(x.size):
            x[c] += y[c]


@cpu_kernel
def simple(x, affine, eps, centered, qkv_weight, qkv_bias, out, out_bias, state, memory):
    width = x.size
    h, at = take(memory, 0, width)
    qkv, at = take(memory, at, 3 * width)
    norm(x, affine, eps, centered, h, memory[at:])
    linear(qkv_weight, qkv_bias, h, qkv, False)
    q, k, v = qkv[:width], qkv[width : 2 * width].reshape(1, width), qkv[2 * width :].reshape(1, width)
    a, b, top = state[0], state[1], state[2]
    _join(k, v, 0, a, b, top, h)
    _add(q, a, b, out, out_bias, h, x)


@cpu_kernel
def windowed(x, position, newest, affine, eps, centered, qkv_weight, qkv_bias, out, out_bias, u, v, filters, keys, values,
              state, memory):
    """The token's key and value become the newest of the ring; the bias is u vᵀ, or the filters if there are any."""
    width, seen = x.size, min(position + 1, len(keys))
    h, at = take(memory, 0, width)
    qkv, at = take(memory, at, 3 * width)
    sums, at = take(memory, at, 3 * width)
    exponents, at = take(memory, at, BLOCK * width)
    norm(x, affine, eps, centered, h, memory[at:])
    linear(qkv_weight, qkv_bias, h, qkv, False)
    a, b, top = sums[:width], sums[width : 2 * width], sums[2 * width :]
    for c in range(width):
        keys[newest, c], values[newest, c] = qkv[width + c], qkv[2 * width + c]
        a[c], b[c], top[c] = state[0, c], state[1, c], state[2, c]
    for lag in range(0, seen, BLOCK):
        count, first = min(BLOCK, seen - lag), _place(newest, lag, len(keys))
        block = exponents[: count * width].reshape(count, width)
        if len(filters):
            _of_lags(keys, first, filters, lag, block)
        else:
            _of_pairs(keys, first, u[position], v, position - lag, block)
        _join(block, values, first, a, b, top, h)
    _add(qkv[:width], a, b, out, out_bias, h, x)
    if seen == len(keys):  # the oldest leaves the window
        oldest = _place(newest, seen - 1, seen)
        _join(keys[oldest : oldest + 1], values, oldest, state[0], state[1], state[2], h)
