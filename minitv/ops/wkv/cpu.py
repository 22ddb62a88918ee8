"""wkv and bidirectional_wkv on the CPU, forward and backward: one token after the other, up to LANES channels at a time.

A state that meets a token (k, v) leaves a record of how:

    a, b      the state before, in the unit e^p
    stays     e^(p + w - p'), what becomes of it, and joins = e^(k - p'), what the token brings; p' = max(p + w, k)
    past      the share of a in y, and ``present``, that of v: y = past a + present v

Backward then needs no exponential. As p is a unit only, the gradients (α, β) of (a, b) go back through

    gv = present g + joins α                     gw = Σ stays (α a + β b)
    gk = present g (v - y) + joins (α v + β)     gu = Σ present g (v - y)
    α ← stays α + past g                         β ← stays β - past g y

All factors are at most 1, so that nothing overflows. v - y is past (b v - a), which loses no digits where y is almost v; in
both directions it is the sum of that of both. The gradient of the last p, less what a and b owe to their unit, belongs
to the key that is the maximum.

p itself would gather rounding: with keys of 100, a decay of 1e-6 a step is lost altogether. Kept are the key that gave the
maximum, ``top``, and the number of steps since, ``lag``: p = top + lag w. Only differences of p and keys enter exponentials.

Saved for backward: the inputs, y, a and b at the end, ``states`` [B, 4, chunks, C] of a, b, top and lag before every chunk of
``chunk_size`` positions, from which the records within a chunk are made again, and the last lag [B C].

In both directions every position has two records, of the state of all tokens before it and of all after it, which backward
makes again: y = past a + past' a' + present v.

The state of the channels lies in rows of scratch memory. Indices of channels are unsigned, so that LLVM sees in every function
that they do not count from the end; and rows are not sliced, which would count references at every position.
"""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.compile import cpu_kernel, inline
from autograd.cpu.math import exp
from autograd.cpu.vectors import scratch

from . import EMPTY

LANES = 256

# Rows of the scratch memory: a state, its gradient, and sums.
W, U, A, B, TOP, LAG, ALPHA, BETA, GW, GU = range(10)
ROWS = 10
RECORD = 6  # rows: a, b, stays, joins, past, present


@inline
def _rows(count, like):
    return scratch(count * LANES, like).reshape(count, LANES)


@inline(exact=True)
def _excess(top, lag, w, k, u):
    """p - (u + k), in an order that keeps the difference of two large exponents exact."""
    return (top - k) + (lag * w - u)


@inline
def _weights(excess):
    """e^p and e^q in units of the larger one, for excess = p - q."""
    zero, one = type(excess)(0), type(excess)(1)
    e = exp(-abs(excess))
    return (one, e) if excess > zero else (e, one)


@inline
def _shares(excess, b):
    """Of the past and the present in y."""
    before, now = _weights(excess)
    scale = type(b)(1) / (before * b + now)
    return before * scale, now * scale


@inline
def _advance(a, b, top, lag, w, k, v):
    """The state after the token, and how: stays, joins."""
    zero = type(k)(0)
    steps = lag + type(k)(1)
    excess = _excess(top, steps, w, k, zero)
    stays, joins = _weights(excess)
    top, lag = (top, steps) if excess > zero else (k, zero)
    return stays * a + joins * v, stays * b + joins, top, lag, stays, joins


@inline
def _block(first, stop):
    """The first channel of a block, and how many it has."""
    return np.uintp(first), np.uintp(min(LANES, stop - first))


@inline
def _begin(s, w, u, first, n):
    """Decays and bonuses of a block, and sums of 0."""
    for c in range(n):
        s[W, c], s[U, c], s[GW, c], s[GU, c] = w[first + c], u[first + c], 0, 0


@inline
def _forget(s, n):
    for c in range(n):
        s[A, c], s[B, c], s[TOP, c], s[LAG, c] = 0, 0, EMPTY, 0


@cpu_kernel(parts="channels", grain=64)
def _forward(k, v, w, u, reset, size, y, final, states, lags, channels):
    batch, length, _ = k.shape
    s = _rows(ROWS, k)
    for block in range(channels[0], channels[1], LANES):
        first, n = _block(block, channels[1])
        _begin(s, w, u, first, n)
        for i in range(batch):
            for c in range(n):
                s[A, c], s[B, c], s[TOP, c] = final[0, i, first + c], final[1, i, first + c], final[2, i, first + c]
                s[LAG, c] = 0
            for chunk in range(states.shape[2]):
                for r in range(4):
                    for c in range(n):
                        states[i, r, chunk, first + c] = s[A + r, c]
                for t in range(chunk * size, min(length, chunk * size + size)):
                    if reset[i, t]:
                        _forget(s, n)
                    for c in range(n):
                        key, value = k[i, t, first + c], v[i, t, first + c]
                        a, b, top, lag = s[A, c], s[B, c], s[TOP, c], s[LAG, c]
                        past, present = _shares(_excess(top, lag, s[W, c], key, s[U, c]), b)
                        y[i, t, first + c] = past * a + present * value
                        s[A, c], s[B, c], s[TOP, c], s[LAG, c], _, _ = _advance(a, b, top, lag, s[W, c], key, value)
            for c in range(n):
                final[0, i, first + c], final[1, i, first + c], lags[i, first + c] = s[A, c], s[B, c], s[LAG, c]
                final[2, i, first + c] = s[TOP, c] + s[LAG, c] * s[W, c]


@cpu_kernel
def step(k, v, w, u, a, b, p, y):
    """One position of all channels: y, and the state a, b, p after it, each [C]."""
    zero = k.dtype.type(0)
    for c in range(k.size):
        past, present = _shares(_excess(p[c], zero, w[c], k[c], u[c]), b[c])
        y[c] = past * a[c] + present * v[c]
        a[c], b[c], top, lag, _, _ = _advance(a[c], b[c], p[c], zero, w[c], k[c], v[c])
        p[c] = top + lag * w[c]


@inline
def _record(s, records, h, k, v, i, t, first, n, alone):
    """Let the state meet a token, and record it; if not ``alone``, ``past`` is p - (u + k) for now."""
    for c in range(n):
        key, a, b, top, lag = k[i, t, first + c], s[A, c], s[B, c], s[TOP, c], s[LAG, c]
        excess = _excess(top, lag, s[W, c], key, s[U, c])
        records[h, c], records[h + 1, c] = a, b
        records[h + 4, c], records[h + 5, c] = _shares(excess, b) if alone else (excess, key)
        s[A, c], s[B, c], s[TOP, c], s[LAG, c], records[h + 2, c], records[h + 3, c] = _advance(
            a, b, top, lag, s[W, c], key, v[i, t, first + c])


@inline
def _retreat(s, records, h, v, y, g, gk, gv, i, t, first, n, owner):
    """From the gradients of y and of the state after a token to gk, gv, GW, GU and those of the state before it.

    The first direction, or the only one, is the ``owner``: it has what y owes to the token itself; the other adds to gk and gv.
    """
    for c in range(n):
        value, out, grad, alpha, beta = v[i, t, first + c], y[i, t, first + c], g[i, t, first + c], s[ALPHA, c], s[BETA, c]
        a, b, stays, joins = records[h, c], records[h + 1, c], records[h + 2, c], records[h + 3, c]
        pulled, now = records[h + 4, c] * grad, records[h + 5, c] * grad
        bonus = records[h + 5, c] * pulled * (b * value - a)
        gv[i, t, first + c] = now + joins * alpha if owner else gv[i, t, first + c] + joins * alpha
        change = bonus + joins * (alpha * value + beta)
        gk[i, t, first + c] = change if owner else gk[i, t, first + c] + change
        s[GW, c] += stays * (alpha * a + beta * b)
        s[GU, c] += bonus
        s[ALPHA, c] = stays * alpha + pulled
        s[BETA, c] = stays * beta - pulled * out


@cpu_kernel(parts="channels", grain=64)
def _backward(k, v, w, u, reset, size, y, final, states, lags, g, gfinal, gk, gv, gw, gu, channels):
    """``gfinal`` holds the gradients of the last state, and those of the first one afterwards."""
    batch, length, _ = k.shape
    s, records = _rows(ROWS, k), _rows(RECORD * size, k)
    for block in range(channels[0], channels[1], LANES):
        first, n = _block(block, channels[1])
        _begin(s, w, u, first, n)
        for i in range(batch):
            for c in range(n):
                s[ALPHA, c], s[BETA, c] = gfinal[0, i, first + c], gfinal[1, i, first + c]
            for chunk in range(states.shape[2] - 1, -1, -1):
                start, count = chunk * size, min(size, length - chunk * size)
                for r in range(4):
                    for c in range(n):
                        s[A + r, c] = states[i, r, chunk, first + c]
                for j in range(count):
                    if reset[i, start + j]:
                        _forget(s, n)
                    _record(s, records, RECORD * j, k, v, i, start + j, first, n, True)
                for j in range(count - 1, -1, -1):
                    _retreat(s, records, RECORD * j, v, y, g, gk, gv, i, start + j, first, n, True)
                    if reset[i, start + j]:
                        for c in range(n):
                            s[ALPHA, c], s[BETA, c] = 0, 0
            # The gradient of the last p goes to the key that it is, or to the first p, which is also a unit.
            for c in range(n):
                at, lag = first + c, lags[i, first + c]
                share = gfinal[2, i, at] - gfinal[0, i, at] * final[0, i, at] - gfinal[1, i, at] * final[1, i, at]
                s[GW, c] += share * lag
                gfinal[2, i, at] = s[ALPHA, c] * states[i, 0, 0, at] + s[BETA, c] * states[i, 1, 0, at]
                gfinal[0, i, at], gfinal[1, i, at] = s[ALPHA, c], s[BETA, c]
                t = length - 1 - int(lag)
                if t < 0:
                    gfinal[2, i, at] += share
                else:
                    gk[i, t, at] += share
        for c in range(n):
            gw[first + c], gu[first + c] = s[GW, c], s[GU, c]


# -- both directions ---------------------------------------------------------------------------------------------------
@inline
def _scan_both(s, records, k, v, i, first, n):
    """Fill the records of all positions of a sequence: one of what lies before each, one of what lies after.

    ``past`` of each is the share of its side in y.
    """
    length, zero, one = k.shape[1], k.dtype.type(0), k.dtype.type(1)
    _forget(s, n)
    for t in range(length):
        _record(s, records, 2 * RECORD * t, k, v, i, t, first, n, False)
    _forget(s, n)
    for t in range(length - 1, -1, -1):
        h, g = 2 * RECORD * t, (2 * t + 1) * RECORD
        _record(s, records, g, k, v, i, t, first, n, False)
        for c in range(n):
            before, after = records[h + 4, c], records[g + 4, c]
            top = max(max(before, after), zero)
            one_side, other, now = exp(before - top), exp(after - top), exp(-top)
            scale = one / (one_side * records[h + 1, c] + other * records[g + 1, c] + now)
            records[h + 4, c], records[g + 4, c] = one_side * scale, other * scale
            records[h + 5, c] = records[g + 5, c] = now * scale


@cpu_kernel(parts="channels", grain=64)
def _bidirectional_forward(k, v, w, u, y, channels):
    batch, length, _ = k.shape
    s, records = _rows(ROWS, k), _rows(2 * RECORD * length, k)
    for block in range(channels[0], channels[1], LANES):
        first, n = _block(block, channels[1])
        _begin(s, w, u, first, n)
        for i in range(batch):
            _scan_both(s, records, k, v, i, first, n)
            for t in range(length):
                h, g = 2 * RECORD * t, (2 * t + 1) * RECORD
                for c in range(n):
                    y[i, t, first + c] = (records[h + 4, c] * records[h, c] + records[g + 4, c] * records[g, c]
                                          + records[h + 5, c] * v[i, t, first + c])


@cpu_kernel(parts="channels", grain=64)
def _bidirectional_backward(k, v, w, u, y, g, gk, gv, gw, gu, channels):
    batch, length, _ = k.shape
    s, records = _rows(ROWS, k), _rows(2 * RECORD * length, k)
    for block in range(channels[0], channels[1], LANES):
        first, n = _block(block, channels[1])
        _begin(s, w, u, first, n)
        for i in range(batch):
            _scan_both(s, records, k, v, i, first, n)
            for c in range(n):
                s[ALPHA, c], s[BETA, c] = 0, 0
            for t in range(length - 1, -1, -1):
                _retreat(s, records, 2 * RECORD * t, v, y, g, gk, gv, i, t, first, n, True)
            for c in range(n):
                s[ALPHA, c], s[BETA, c] = 0, 0
            for t in range(length):
                _retreat(s, records, (2 * t + 1) * RECORD, v, y, g, gk, gv, i, t, first, n, False)
        for c in range(n):
            gw[first + c], gu[first + c] = s[GW, c], s[GU, c]


# -- host --------------------------------------------------------------------------------------------------------------
def forward(k, v, w, u, a, b, p, reset, chunk_size):
    batch, length, width = k.shape
    final = np.empty((3, batch, width), k.dtype)
    final[0], final[1], final[2] = (0, 0, EMPTY) if p is None else (a, b, p)
    reset = np.zeros((batch, length), bool) if reset is None else np.ascontiguousarray(reset)
    size = min(chunk_size, max(1, length))
    states = np.empty((batch, 4, length // size + 1, width), k.dtype)
    y, lags = np.empty(k.shape, k.dtype), np.empty((batch, width), k.dtype)
    inputs = *map(np.ascontiguousarray, (k, v, w, u)), reset, size
    _forward(*inputs, y, final, states, lags, (0, width))
    return (y, *final), (inputs, y, final, states, lags, p is not None)


def backward(saved, g_y, g_a, g_b, g_p):
    inputs, y, final, states, lags, carried = saved
    grads = [np.empty_like(x) for x in inputs[:4]]
    gfinal = np.array([or_zeros(g, final[0]) for g in (g_a, g_b, g_p)])
    _backward(*inputs, y, final, states, lags, np.ascontiguousarray(or_zeros(g_y, y)), gfinal, *grads,
              (0, len(inputs[2])))
    return *grads, *(gfinal if carried else (None, None, None)),


def step_forward(k, v, w, u, a, b, p, reset):
    batch, _, width = k.shape
    state = np.empty((3, batch, width), k.dtype)
    state[0], state[1], state[2] = (0, 0, EMPTY) if p is None else (a, b, p)
    if reset is not None:
        state[:, reset[:, 0]] = np.array([0, 0, EMPTY])[:, None, None]
    y, rates = np.empty(k.shape, k.dtype), (np.tile(x, batch) for x in (w, u))
    step(*(np.ascontiguousarray(x).reshape(-1) for x in (k, v)), *rates, *state.reshape(3, -1), y.reshape(-1))
    return (y, *state), None


def bidirectional_forward(k, v, w, u):
    inputs, y = tuple(map(np.ascontiguousarray, (k, v, w, u))), np.empty(k.shape, k.dtype)
    _bidirectional_forward(*inputs, y, (0, len(w)))
    return y, (inputs, y)


def bidirectional_backward(saved, g):
    inputs, y = saved
    grads = [np.empty_like(x) for x in inputs]
    _bidirectional_backward(*inputs, y, np.ascontiguousarray(g), *grads, (0, y.shape[2]))
    return grads
