"""AFT on the CPU: aft_simple by a scan, the others by sums in which every exponential is computed once.

    e_s = exp(k_s - largest key of the channel)        E_ts = exp(w_ts - largest bias of the position)

    [N_t Z_t] = Σ_s E_ts [e_s v_s  e_s]                y_t = sigmoid(q_t) N_t / Z_t

The columns [e v, e] of all keys are one array, [S B 2 C], and a *window* is the linear map that takes it to the sums of all
positions, [T B 2 C]: a matrix in tiles (full, local), or a convolution (conv, conv2d). Backward sends the gradients of the
sums through its transpose, and through the exponentials, of which the largest ones are constants that cancel:

    [r_t z_t] = dL/d[N_t Z_t]     [h_s x_s] = Σ_t E_ts [r_t z_t]     gv = e h     gk = e (v h + x)     gw = E ([r z] · [e v, e])

Nothing underflows as long as keys and biases span less than e^60 in float32; if they span more, the call is computed in
float64, up to e^600. Beyond that the kernel declines. The scan of aft_simple subtracts a running maximum, and takes any keys.
"""

import math

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp

from . import common
from .cpu_windows import Conv, Conv2d, Full, Local

SPANS = {np.dtype(np.float32): 60, np.dtype(np.float64): 600}
LOWEST = -1e38  # below all keys, and a difference with it is no NaN


# -- from keys to columns, from sums to outputs ------------------------------------------------------------------------
@cpu_kernel
def _extremes(k, largest, smallest):
    """Of the keys of every channel, [B C], without those of -∞."""
    for b in range(k.shape[0]):
        high, low = largest[b], smallest[b]
        for s in range(k.shape[1]):
            row = k[b, s]
            for c in range(row.size):
                high[c] = row[c] if row[c] > high[c] else high[c]
                low[c] = row[c] if row[c] < low[c] and row[c] > -math.inf else low[c]


@cpu_kernel(parts="k:1 v:1 out")
def _columns(k, v, largest, out):
    """[e v, e]; whether all are finite."""
    channels, zero = k.shape[2], k.dtype.type(0)
    check = zero
    for b in range(k.shape[0]):
        top = largest[b]
        for s in range(k.shape[1]):
            key, value, left, right = k[b, s], v[b, s], out[s, b, :channels], out[s, b, channels:]
            for c in range(channels):
                e = exp(key[c] - top[c])
                left[c] = e * value[c]
                right[c] = e
            for c in range(channels):
                check += left[c] * zero
    return check == 0


@cpu_kernel(parts="columns g gk:1 gv:1")
def _columns_backward(columns, g, gk, gv):
    channels = gk.shape[2]
    for b in range(gk.shape[0]):
        for s in range(gk.shape[1]):
            weighted, e = columns[s, b, :channels], columns[s, b, channels:]
            h, x, key, value = g[s, b, :channels], g[s, b, channels:], gk[b, s], gv[b, s]
            for c in range(channels):
                key[c] = weighted[c] * h[c] + e[c] * x[c]
            for c in range(channels):
                value[c] = e[c] * h[c]


@cpu_kernel(parts="sums q:1 y:1")
def _outputs(q, sums, y):
    """y, and in place of the sums [N, Z] the mean N / Z and 1 / Z, which are 0 where there is no key."""
    channels = q.shape[2]
    zero, one = q.dtype.type(0), q.dtype.type(1)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            gate, mean, inverse, out = q[b, t], sums[t, b, :channels], sums[t, b, channels:], y[b, t]
            for c in range(channels):
                total = inverse[c]
                inverse[c] = zero if total == zero else one / total
            for c in range(channels):
                m = mean[c] * inverse[c]
                mean[c] = m
                out[c] = m / (one + exp(-gate[c]))


@cpu_kernel(parts="sums q:1 g:1 gq:1 gsums")
def _outputs_backward(q, sums, g, gq, gsums):
    """The gradients of q and of the sums."""
    channels = q.shape[2]
    zero, one = q.dtype.type(0), q.dtype.type(1)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            gate, mean, inverse = q[b, t], sums[t, b, :channels], sums[t, b, channels:]
            grad, out, r, z = g[b, t], gq[b, t], gsums[t, b, :channels], gsums[t, b, channels:]
            for c in range(channels):
                e = exp(-abs(gate[c]))
                upper = one / (one + e)
                lower = e * upper  # 1 - upper, to all its digits
                r[c] = grad[c] * (upper if gate[c] > zero else lower)
                out[c] = grad[c] * mean[c] * upper * lower
            for c in range(channels):
                h = r[c] * inverse[c]
                r[c] = h
                z[c] = -h * mean[c]


def _read(q, sums):
    y = np.empty(q.shape, q.dtype)
    _outputs(np.ascontiguousarray(q), sums, y)
    return y


def _unread(q, sums, g):
    gq, gsums = np.empty(q.shape, q.dtype), np.empty_like(sums)
    _outputs_backward(np.ascontiguousarray(q), sums, np.ascontiguousarray(g), gq, gsums)
    return gq, gsums


# -- the state ---------------------------------------------------------------------------------------------------------
def _state(sums, tops):
    """average and logsum from the sums [N, Z] of what has left the window, relative to e^top; and what backward needs."""
    numerator, total = np.split(sums, 2, axis=1)
    inverse = np.divide(1, total, out=np.zeros_like(total), where=total != 0)
    average = numerator * inverse
    with np.errstate(divide="ignore"):
        return average, np.log(total) + tops, (average, inverse)


def _unstate(share, g_average, g_logsum):
    """The gradient of the sums."""
    average, inverse = share
    return np.concatenate([g_average * inverse, (g_logsum - g_average * average) * inverse], axis=1)


def _unjoin(gk, gv, mask, carried, reach=None):
    """``everything`` backward: the gradients of k, v, average, logsum and, if there is a reach, of keys and values."""
    past = 0 if not carried else 1 if reach is None else 1 + reach
    present = [x[:, past:] if mask is None else np.where(mask[..., None], x[:, past:], 0) for x in (gk, gv)]
    if not carried:
        return *present, *(None,) * (2 if reach is None else 4)
    return *present, gv[:, 0], gk[:, 0], *(() if reach is None else (gk[:, 1:past], gv[:, 1:past]))


# -- simple ------------------------------------------------------------------------------------------------------------
@cpu_kernel(parts="part", grain=64)
def _scan(k, v, sums, tops, part):
    """The sums [N, Z] of all prefixes relative to e^top, the largest key so far."""
    length, width, (low, high) = k.shape[1], k.shape[2], part
    channels = high - low
    state, fade, e = np.zeros((2, channels), k.dtype), np.empty(channels, k.dtype), np.empty(channels, k.dtype)
    top, zero, one = np.empty(channels, k.dtype), k.dtype.type(0), k.dtype.type(1)
    numerator, total = state[0], state[1]
    for b in range(k.shape[0]):
        state[:] = zero
        top[:] = LOWEST
        for s in range(length):
            key, value = k[b, s, low:high], v[b, s, low:high]
            for c in range(channels):
                rise = key[c] - top[c]
                small = exp(-abs(rise))
                fade[c] = small if rise > zero else one
                e[c] = one if rise > zero else small
                top[c] = key[c] if rise > zero else top[c]
            left, right, out = sums[s, b, low:high], sums[s, b, width + low : width + high], tops[s, b, low:high]
            for c in range(channels):
                n = numerator[c] * fade[c] + e[c] * value[c]
                numerator[c] = n
                left[c] = n
            for c in range(channels):
                z = total[c] * fade[c] + e[c]
                total[c] = z
                right[c] = z
            for c in range(channels):
                out[c] = top[c]


@cpu_kernel(parts="part", grain=64)
def _scan_backward(k, v, tops, g, gk, gv, part):
    length, width, (low, high) = k.shape[1], k.shape[2], part
    channels = high - low
    state, above = np.zeros((2, channels), k.dtype), np.empty(channels, k.dtype)
    h, x = state[0], state[1]
    for b in range(k.shape[0]):
        state[:] = k.dtype.type(0)
        above[:] = -LOWEST  # fades nothing yet
        for s in range(length - 1, -1, -1):
            top, left, right = tops[s, b, low:high], g[s, b, low:high], g[s, b, width + low : width + high]
            for c in range(channels):
                fade = exp(top[c] - above[c])
                above[c] = top[c]
                h[c] = h[c] * fade + left[c]
                x[c] = x[c] * fade + right[c]
            key, value = k[b, s, low:high], v[b, s, low:high]
            into_key, into_value = gk[b, s, low:high], gv[b, s, low:high]
            for c in range(channels):
                into_value[c] = exp(key[c] - top[c])
            for c in range(channels):
                e = into_value[c]
                into_key[c] = e * (value[c] * h[c] + x[c])
                into_value[c] = e * h[c]


def simple_forward(q, k, v, mask, average, logsum, causal):
    k, v = map(np.ascontiguousarray, common.everything(k, v, mask, average, logsum))  # not parts of one projection
    batch, length, channels = k.shape
    sums, tops = np.empty((length, batch, 2 * channels), k.dtype), np.empty((length, batch, channels), k.dtype)
    _scan(k, v, sums, tops, (0, channels))
    *state, share = _state(sums[-1:].sum(axis=0), tops[-1] if length else np.zeros((batch, channels), k.dtype))
    sums = sums[length - q.shape[1]:] if causal else np.repeat(sums[-1:], q.shape[1], axis=0)
    return (_read(q, sums), *state), (q, k, v, sums, tops, share, causal, mask, average is not None)


def simple_backward(saved, g_y, g_average, g_logsum):
    q, k, v, sums, tops, share, causal, mask, carried = saved
    gq, read = _unread(q, sums, or_zeros(g_y, q))
    if causal and len(read) == k.shape[1]:
        gsums = read
    else:
        gsums = np.zeros((k.shape[1], *read.shape[1:]), k.dtype)
        if causal:
            gsums[len(gsums) - len(read):] = read
        elif len(read):
            gsums[-1] = read.sum(axis=0)
    gsums[-1:] += _unstate(share, or_zeros(g_average, share[0]), or_zeros(g_logsum, share[0]))
    gk, gv = np.empty_like(k), np.empty_like(v)
    _scan_backward(k, v, tops, gsums, gk, gv, (0, k.shape[2]))
    return gq, *_unjoin(gk, gv, mask, carried)


# -- calls -------------------------------------------------------------------------------------------------------------
class _Call:
    """Keys k[B S H] and values v[B S C] of all that is seen, through the window that ``make`` makes of the bias."""

    def __init__(self, q, k, v, bias, make):
        self.dtype, self.heads, self.size = q.dtype, k.shape[2], v.shape[2] // k.shape[2] if k.shape[2] else 1
        for dtype in (self.dtype, np.dtype(np.float64)):
            self.q, k, v, bias = (np.ascontiguousarray(x, dtype) for x in (q, k, v, bias))
            self.window, largest = make(bias), np.full((len(k), self.heads), -math.inf, dtype)
            smallest = -largest
            _extremes(k, largest, smallest)
            if not self.window.span + np.max(largest - smallest, initial=0) > SPANS[dtype]:
                break
        self.largest = np.repeat(np.where(largest == -math.inf, dtype.type(0), largest), self.size, axis=1)
        self.columns = np.empty((k.shape[1], len(v), 2 * v.shape[2]), dtype)
        sound = _columns(k if self.size == 1 else np.repeat(k, self.size, axis=2), v, self.largest, self.columns)
        self.sums = self.window.apply(self.columns, sound)
        self.y = _read(self.q, self.sums).astype(self.dtype, copy=False)

    def backward(self, g, left=0, gstate=0):
        """The gradients of q, k, v and bias; the sums of the first ``left`` columns have the gradient ``gstate``."""
        gq, gsums = _unread(self.q, self.sums, g.astype(self.q.dtype, copy=False))
        gcolumns = self.window.transpose(gsums)
        gcolumns[:left] += gstate
        shape = gcolumns.shape[1], gcolumns.shape[0], gcolumns.shape[2] // 2
        gk, gv = np.empty(shape, gq.dtype), np.empty(shape, gq.dtype)
        _columns_backward(self.columns, gcolumns, gk, gv)
        gk = gk if self.size == 1 else gk.reshape(*shape[:2], self.heads, self.size).sum(axis=3)
        return [x.astype(self.dtype, copy=False) for x in (gq, gk, gv, self.window.gradient(gsums, self.columns))]


def _span(x, *others):
    """How far the numbers of an array are apart, and those of some others; -∞ and NaN do not count."""
    high = max(np.fmax.reduce(y, axis=None, initial=-math.inf) for y in (x, *others))
    low = min(np.fmin.reduce(y, axis=None, initial=math.inf, where=y > -math.inf) for y in (x, *others))
    return max(high - low, 0.0)


def _reason(channels, biases, *keys):
    if channels < keys[0].shape[-1]:
        return "needs at least one channel in every head"
    if _span(*biases) + _span(*[k for k in keys if k is not None]) > SPANS[np.dtype(np.float64)]:
        return "biases and keys span more than e^600"
    return None


def full_supports(v, bias, k):
    return _reason(v.shape[2], [bias], k)


def full_forward(q, k, v, bias, mask, causal, chunk_size):
    k, v = common.everything(k, v, mask)
    call = _Call(q, k, v, bias, lambda bias: Full(bias, k.shape[1], causal, chunk_size))
    return call.y, (call, mask)


def full_backward(saved, g):
    call, mask = saved
    gq, gk, gv, gbias = call.backward(g)
    return gq, *_unjoin(gk, gv, mask, False)[:2], gbias


def local_supports(k, v, bias, logsum, keys):
    return _reason(v.shape[2], [bias, np.zeros(1)], k, logsum, keys)


conv_supports = local_supports


def _stateful_forward(q, k, v, bias, mask, average, logsum, keys, values, causal, make):
    """aft_local and aft_conv: ``make(bias, queries, keys, size)`` makes the window."""
    k, v = common.everything(k, v, mask, average, logsum, keys, values)
    reach = bias.shape[1] - 1 - (0 if causal else bias.shape[1] // 2)
    call = _Call(q, k, v, bias, lambda bias: make(bias, q.shape[1], k.shape[1], v.shape[2] // max(k.shape[2], 1)))
    left = max(k.shape[1] - reach, 0)
    after, logsum, share = _state(np.add.reduce(call.columns[:left], axis=0), call.largest)
    state = after, logsum[:, ::call.size], common.newest(k, reach, -math.inf), common.newest(v, reach, 0)
    return (call.y, *(x.astype(q.dtype, copy=False) for x in state)), (call, mask, average is not None, left, share, reach)


def _stateful_backward(saved, g_y, g_average, g_logsum, g_keys, g_values):
    call, mask, carried, left, share, reach = saved
    spread = np.zeros_like(share[0])
    if g_logsum is not None:
        spread[:, ::call.size] = g_logsum
    gq, gk, gv, gbias = call.backward(or_zeros(g_y, call.y), left, _unstate(share, or_zeros(g_average, share[0]), spread))
    near = gk.shape[1] - left
    for gx, gradient in ((gk, g_keys), (gv, g_values)):
        if gradient is not None:
            gx[:, left:] += gradient[:, reach - near:]
    gk, gv, *others = _unjoin(gk, gv, mask, carried, reach)
    return gq, gk, gv, gbias, *others


def local_forward(q, k, v, bias, mask, average, logsum, keys, values, causal):
    return _stateful_forward(q, k, v, bias, mask, average, logsum, keys, values, causal,
                             lambda bias, queries, keys, size: Local(bias, keys, causal))


def conv_forward(q, k, v, bias, mask, average, logsum, keys, values, causal):
    return _stateful_forward(q, k, v, bias, mask, average, logsum, keys, values, causal,
                             lambda bias, queries, keys, size: Conv(bias, size, queries, keys, causal))


local_backward = conv_backward = _stateful_backward


def conv2d_supports(k, v, bias):
    return _reason(v.shape[3], [bias, np.zeros(1)], k)


def conv2d_forward(q, k, v, bias, mask):
    image, size = k.shape[1:3], v.shape[3] // k.shape[3]
    k, v = common.everything(k, v, mask)
    q, k, v = (x.reshape(len(x), math.prod(image), x.shape[3]) for x in (q, k, v))
    call = _Call(q, k, v, bias, lambda bias: Conv2d(bias, size, image))
    return call.y.reshape(len(q), *image, q.shape[2]), (call, mask, image)


def conv2d_backward(saved, g):
    call, mask, image = saved
    gq, gk, gv, gbias = call.backward(g.reshape(len(g), math.prod(image), g.shape[3]))
    gq, gk, gv = (x.reshape(len(x), *image, x.shape[2]) for x in (gq, gk, gv))
    return gq, *_unjoin(gk, gv, mask, False)[:2], gbias


# -- the bias of aft_local from its factors ----------------------------------------------------------------------------
@cpu_kernel(parts="rows")
def _band(u, v, newest, out, rows):
    for t in range(rows[0], rows[1]):
        for j in range(out.shape[1]):
            s, total = t + newest - j, out.dtype.type(0)
            if 0 <= s < v.shape[0]:
                left, right = u[t], v[s]
                for r in range(left.size):
                    total += left[r] * right[r]
            out[t, j] = total


@cpu_kernel(parts="rows", sums="gv")
def _band_backward(u, v, newest, g, gu, gv, rows):
    for t in range(rows[0], rows[1]):
        for j in range(g.shape[1]):
            s, share = t + newest - j, g[t, j]
            if 0 <= s < v.shape[0]:
                left, right, into_left, into_right = u[t], v[s], gu[t], gv[s]
                for r in range(left.size):
                    into_left[r] += share * right[r]
                for r in range(left.size):
                    into_right[r] += share * left[r]


def band_forward(u, v, window, causal):
    u, v, ahead = np.ascontiguousarray(u), np.ascontiguousarray(v), 0 if causal else window - 1
    out = np.empty((len(u), window + ahead), u.dtype)
    _band(u, v, len(v) - len(u) + ahead, out, (0, len(u)))
    return out, (u, v, len(v) - len(u) + ahead)


def band_backward(saved, g):
    u, v, newest = saved
    gu, gv = np.zeros_like(u), np.zeros_like(v)
    _band_backward(u, v, newest, np.ascontiguousarray(g), gu, gv, (0, len(u)))
    return gu, gv
