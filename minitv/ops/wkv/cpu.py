"""wkv and bidirectional_wkv on the CPU, forward and backward: one token after the other, up to LANES channels at a time.

Everything is computed on rows of LANES numbers in one scratch array, for which LLVM sees that they do not overlap. A state
that meets a token (k, v) leaves a record of how:

    a, b      the state before, in the unit e^p
    stays     e^(p + w - p'), what becomes of it, and joins = e^(k - p'), what the token brings; p' = max(p + w, k)
    past      the share of a in y, and ``present``, that of v: y = past a + present v

Backward then needs no exponential. As p is a unit only, the gradients (α, β) of (a, b) go back through

    dv = present dy + joins α                    dw = Σ stays (α a + β b)
    dk = present dy (v - y) + joins (α v + β)    du = Σ present dy (v - y)
    α ← stays α + past dy                        β ← stays β - past dy y

All factors are at most 1, so that nothing overflows. The gradient of the last p, less what a and b owe to their unit, belongs
to the key that is the maximum.

p itself would gather rounding: with keys of 100, a decay of 1e-6 a step is lost altogether. Kept are the key that gave the
maximum, ``top``, and the number of steps since, ``lag``: p = top + lag w. Only differences of p and keys enter exponentials.

Saved for backward: the inputs, y, a and b at the end, ``states`` [B, 4, chunks, C] of a, b, top and lag before every chunk of
``chunk_size`` positions, from which the records within a chunk are made again, and the last lag [B C].

In both directions every position has two records, of the state of all tokens before it and of all after it, which backward
makes again: y = past a + past' a' + present v.
"""

import numba
import numpy as np

from autograd.kernel_math import exp
from autograd.kernels import FLAGS, cpu_kernel, inline

from . import EMPTY

LANES = 128
VECTOR = 16  # channels are computed in multiples of this

# Rows of the scratch memory: inputs and results of one position, a state, its gradient, sums, and then records.
W, U, K, V, Y, DY, DK, DV, DW, DU = range(10)
A, B, TOP, LAG = range(10, 14)
ALPHA, BETA = range(14, 16)
ROWS = 16
RECORD = 6  # rows: a, b, stays, joins, past, present


@inline
def _row(s, r):
    return s[r * LANES : (r + 1) * LANES]


@cpu_kernel
def _read(s, r, x, start, n):
    """Fill a row from memory."""
    row, part = _row(s, r), x[start : start + n]
    for c in range(n):
        row[c] = part[c]


@cpu_kernel
def _write(x, start, s, r, n):
    row, part = _row(s, r), x[start : start + n]
    for c in range(n):
        part[c] = row[c]


# Without "reassoc": the order of this sum is what keeps the difference of two large exponents exact.
@numba.njit(**{**FLAGS, "fastmath": FLAGS["fastmath"] - {"reassoc"}, "forceinline": True})
def _excess(top, lag, w, k, u):
    """p - (u + k)"""
    return (top - k) + (lag * w - u)


@cpu_kernel
def _forget(s, state):
    _row(s, state)[:] = 0
    _row(s, state + 1)[:] = 0
    _row(s, state + 2)[:] = EMPTY
    _row(s, state + 3)[:] = 0


@cpu_kernel
def _advance(s, state, h, m):
    """Let the state meet the token in K and V; PAST of the record is p - (u + k) for now."""
    zero, one = s.dtype.type(0), s.dtype.type(1)
    w, u, k, v = _row(s, W), _row(s, U), _row(s, K), _row(s, V)
    a, b, top, lag = _row(s, state), _row(s, state + 1), _row(s, state + 2), _row(s, state + 3)
    old_a, old_b, stays, joins, past = _row(s, h), _row(s, h + 1), _row(s, h + 2), _row(s, h + 3), _row(s, h + 4)
    for c in range(m):
        past[c] = _excess(top[c], lag[c], w[c], k[c], u[c])
        steps = lag[c] + one
        excess = _excess(top[c], steps, w[c], k[c], zero)
        e = exp(-abs(excess))
        stay, join = (one, e) if excess > zero else (e, one)
        old_a[c], old_b[c], stays[c], joins[c] = a[c], b[c], stay, join
        a[c], b[c] = stay * a[c] + join * v[c], stay * b[c] + join
        top[c], lag[c] = (top[c], steps) if excess > zero else (k[c], zero)


@cpu_kernel
def _weigh(s, h, m):
    """The shares of the past and the present, and y."""
    zero, one = s.dtype.type(0), s.dtype.type(1)
    v, y = _row(s, V), _row(s, Y)
    a, b, past, present = _row(s, h), _row(s, h + 1), _row(s, h + 4), _row(s, h + 5)
    for c in range(m):
        excess = past[c]
        e = exp(-abs(excess))
        before, now = (one, e) if excess > zero else (e, one)
        scale = one / (before * b[c] + now)
        past[c], present[c] = before * scale, now * scale
        y[c] = past[c] * a[c] + present[c] * v[c]


@cpu_kernel
def _forward(k, v, w, u, reset, shape, size, y, final, states, lags):
    length, width, chunks = shape[1], shape[2], states.shape[2]
    s = np.zeros((ROWS + RECORD) * LANES, k.dtype)
    for first in range(0, width, LANES):
        n = min(LANES, width - first)
        m = (n + VECTOR - 1) // VECTOR * VECTOR
        _read(s, W, w, first, n)
        _read(s, U, u, first, n)
        for b in range(shape[0]):
            for r in range(3):
                _read(s, A + r, final[r, b], first, n)
            _row(s, LAG)[:] = 0
            for chunk in range(chunks):
                for r in range(4):
                    _write(states[b, r, chunk], first, s, A + r, n)
                for t in range(chunk * size, min(length, chunk * size + size)):
                    at = (b * length + t) * width + first
                    _read(s, K, k, at, n)
                    _read(s, V, v, at, n)
                    if reset[b, t]:
                        _forget(s, A)
                    _advance(s, A, ROWS, m)
                    _weigh(s, ROWS, m)
                    _write(y, at, s, Y, n)
            _write(final[0, b], first, s, A, n)
            _write(final[1, b], first, s, B, n)
            _write(lags[b], first, s, LAG, n)
            last = final[2, b]
            for c in range(n):
                last[first + c] = s[TOP * LANES + c] + s[LAG * LANES + c] * w[first + c]


@cpu_kernel
def _pull(s, h, m):
    """What y's gradient does to the present token."""
    v, y, dy, dk, dv, du, present = _row(s, V), _row(s, Y), _row(s, DY), _row(s, DK), _row(s, DV), _row(s, DU), _row(s, h + 5)
    for c in range(m):
        dv[c] = present[c] * dy[c]
        dk[c] = dv[c] * (v[c] - y[c])
        du[c] += dk[c]


@cpu_kernel
def _retreat(s, grad, h, m):
    """From the gradient of the state after a token to that of the state before it."""
    v, y, dy, dk, dv, dw = _row(s, V), _row(s, Y), _row(s, DY), _row(s, DK), _row(s, DV), _row(s, DW)
    alpha, beta = _row(s, grad), _row(s, grad + 1)
    a, b, stays, joins, past = _row(s, h), _row(s, h + 1), _row(s, h + 2), _row(s, h + 3), _row(s, h + 4)
    for c in range(m):
        pulled = past[c] * dy[c]
        dv[c] += joins[c] * alpha[c]
        dk[c] += joins[c] * (alpha[c] * v[c] + beta[c])
        dw[c] += stays[c] * (alpha[c] * a[c] + beta[c] * b[c])
        alpha[c] = stays[c] * alpha[c] + pulled
        beta[c] = stays[c] * beta[c] - pulled * y[c]


@cpu_kernel
def _write_exponents(s, b, first, n, length, width, final, states, lags, dfinal, dk):
    """The gradient of the last p to the key that it is, or to the first p, which is also a unit."""
    for c in range(n):
        at, lag = first + c, lags[b, first + c]
        given = dfinal[2, b, at] - dfinal[0, b, at] * final[0, b, at] - dfinal[1, b, at] * final[1, b, at]
        s[DW * LANES + c] += given * lag
        dfinal[2, b, at] = s[ALPHA * LANES + c] * states[b, 0, 0, at] + s[BETA * LANES + c] * states[b, 1, 0, at]
        t = length - 1 - int(lag)
        if t < 0:
            dfinal[2, b, at] += given
        else:
            dk[(b * length + t) * width + at] += given


@cpu_kernel
def _backward(k, v, w, u, reset, shape, size, y, final, states, lags, dy, dfinal, dk, dv, dw, du):
    """``dfinal`` holds the gradients of the last state, and those of the first one afterwards."""
    length, width, chunks = shape[1], shape[2], states.shape[2]
    s = np.zeros((ROWS + RECORD * size) * LANES, k.dtype)
    for first in range(0, width, LANES):
        n = min(LANES, width - first)
        m = (n + VECTOR - 1) // VECTOR * VECTOR
        _read(s, W, w, first, n)
        _read(s, U, u, first, n)
        _row(s, DW)[:] = 0
        _row(s, DU)[:] = 0
        for b in range(shape[0]):
            _read(s, ALPHA, dfinal[0, b], first, n)
            _read(s, BETA, dfinal[1, b], first, n)
            for chunk in range(chunks - 1, -1, -1):
                start, stop = chunk * size, min(length, chunk * size + size)
                for r in range(4):
                    _read(s, A + r, states[b, r, chunk], first, n)
                for t in range(start, stop):
                    at = (b * length + t) * width + first
                    _read(s, K, k, at, n)
                    _read(s, V, v, at, n)
                    if reset[b, t]:
                        _forget(s, A)
                    h = ROWS + RECORD * (t - start)
                    _advance(s, A, h, m)
                    _weigh(s, h, m)
                for t in range(stop - 1, start - 1, -1):
                    at = (b * length + t) * width + first
                    _read(s, V, v, at, n)
                    _read(s, Y, y, at, n)
                    _read(s, DY, dy, at, n)
                    h = ROWS + RECORD * (t - start)
                    _pull(s, h, m)
                    _retreat(s, ALPHA, h, m)
                    _write(dk, at, s, DK, n)
                    _write(dv, at, s, DV, n)
                    if reset[b, t]:
                        _row(s, ALPHA)[:] = 0
                        _row(s, BETA)[:] = 0
            _write_exponents(s, b, first, n, length, width, final, states, lags, dfinal, dk)
            _write(dfinal[0, b], first, s, ALPHA, n)
            _write(dfinal[1, b], first, s, BETA, n)
        _write(dw, first, s, DW, n)
        _write(du, first, s, DU, n)


# -- both directions ---------------------------------------------------------------------------------------------------
@cpu_kernel
def _weigh_both(s, left, right, m):
    """The shares of what lies before, of what lies after and of the present, and y."""
    zero, one = s.dtype.type(0), s.dtype.type(1)
    v, y = _row(s, V), _row(s, Y)
    a, b, before = _row(s, left), _row(s, left + 1), _row(s, left + 4)
    c, d, after, present = _row(s, right), _row(s, right + 1), _row(s, right + 4), _row(s, left + 5)
    for i in range(m):
        top = max(max(before[i], after[i]), zero)
        one_side, other, now = exp(before[i] - top), exp(after[i] - top), exp(-top)
        scale = one / (one_side * b[i] + other * d[i] + now)
        before[i], after[i], present[i] = one_side * scale, other * scale, now * scale
        y[i] = before[i] * a[i] + after[i] * c[i] + present[i] * v[i]


@cpu_kernel
def _scan_both(k, v, s, start, first, n, m, length, width):
    """Fill the records of all positions of a sequence: one of what lies before each, one of what lies after."""
    _forget(s, A)
    for t in range(length):
        at = start + t * width + first
        _read(s, K, k, at, n)
        _read(s, V, v, at, n)
        _advance(s, A, ROWS + 2 * RECORD * t, m)
    _forget(s, A)
    for t in range(length - 1, -1, -1):
        at = start + t * width + first
        _read(s, K, k, at, n)
        _read(s, V, v, at, n)
        _advance(s, A, ROWS + (2 * t + 1) * RECORD, m)


@cpu_kernel
def _bidirectional_forward(k, v, w, u, shape, y):
    length, width = shape[1], shape[2]
    s = np.zeros((ROWS + 2 * RECORD * length) * LANES, k.dtype)
    for first in range(0, width, LANES):
        n = min(LANES, width - first)
        m = (n + VECTOR - 1) // VECTOR * VECTOR
        _read(s, W, w, first, n)
        _read(s, U, u, first, n)
        for b in range(shape[0]):
            start = b * length * width
            _scan_both(k, v, s, start, first, n, m, length, width)
            for t in range(length):
                at = start + t * width + first
                _read(s, V, v, at, n)
                _weigh_both(s, ROWS + 2 * RECORD * t, ROWS + (2 * t + 1) * RECORD, m)
                _write(y, at, s, Y, n)


@cpu_kernel
def _bidirectional_backward(k, v, w, u, shape, y, dy, dk, dv, dw, du):
    length, width = shape[1], shape[2]
    s = np.zeros((ROWS + 2 * RECORD * length) * LANES, k.dtype)
    for first in range(0, width, LANES):
        n = min(LANES, width - first)
        m = (n + VECTOR - 1) // VECTOR * VECTOR
        _read(s, W, w, first, n)
        _read(s, U, u, first, n)
        _row(s, DW)[:] = 0
        _row(s, DU)[:] = 0
        for b in range(shape[0]):
            start = b * length * width
            _scan_both(k, v, s, start, first, n, m, length, width)
            _row(s, ALPHA)[:] = 0
            _row(s, BETA)[:] = 0
            for t in range(length - 1, -1, -1):
                at, h = start + t * width + first, ROWS + 2 * RECORD * t
                _read(s, V, v, at, n)
                _weigh_both(s, h, h + RECORD, m)
                _read(s, DY, dy, at, n)
                _pull(s, h, m)
                _retreat(s, ALPHA, h, m)
                _write(dk, at, s, DK, n)
                _write(dv, at, s, DV, n)
            _row(s, ALPHA)[:] = 0
            _row(s, BETA)[:] = 0
            for t in range(length):
                at = start + t * width + first
                _read(s, V, v, at, n)
                _read(s, Y, y, at, n)
                _read(s, DY, dy, at, n)
                _read(s, DK, dk, at, n)
                _read(s, DV, dv, at, n)
                _retreat(s, ALPHA, ROWS + (2 * t + 1) * RECORD, m)
                _write(dk, at, s, DK, n)
                _write(dv, at, s, DV, n)
        _write(dw, first, s, DW, n)
        _write(du, first, s, DU, n)


# -- host --------------------------------------------------------------------------------------------------------------
def _flat(x):
    return np.ascontiguousarray(x).reshape(-1)


def forward(k, v, w, u, a, b, p, reset, *, chunk_size):
    batch, length, width = k.shape
    final = np.empty((3, batch, width), k.dtype)
    final[0], final[1], final[2] = (0, 0, EMPTY) if p is None else (a, b, p)
    reset = np.zeros((batch, length), bool) if reset is None else np.ascontiguousarray(reset)
    size = min(chunk_size, max(1, length))
    states = np.empty((batch, 4, length // size + 1, width), k.dtype)
    y, lags = np.empty(k.size, k.dtype), np.empty((batch, width), k.dtype)
    inputs = _flat(k), _flat(v), _flat(w), _flat(u), reset, k.shape, size
    _forward(*inputs, y, final, states, lags)
    return (y.reshape(k.shape), *final), (inputs, y, final, states, lags, p is not None)


def backward(saved, dy, da, db, dp):
    inputs, y, final, states, lags, carried = saved
    grads, dfinal = [np.empty_like(x) for x in inputs[:4]], np.ascontiguousarray([da, db, dp])
    _backward(*inputs, y, final, states, lags, _flat(dy), dfinal, *grads)
    dk, dv, dw, du = grads
    return dk.reshape(dy.shape), dv.reshape(dy.shape), dw, du, *(dfinal if carried else (None, None, None)), None


def bidirectional_forward(k, v, w, u):
    inputs, y = (_flat(k), _flat(v), _flat(w), _flat(u), k.shape), np.empty(k.size, k.dtype)
    _bidirectional_forward(*inputs, y)
    return y.reshape(k.shape), (inputs, y)


def bidirectional_backward(saved, dy):
    inputs, y = saved
    grads = [np.empty_like(x) for x in inputs[:4]]
    _bidirectional_backward(*inputs, y, _flat(dy), *grads)
    dk, dv, dw, du = grads
    return dk.reshape(dy.shape), dv.reshape(dy.shape), dw, du
