"""AFT on the CPU: aft_simple by a scan, the others by sums in which every exponential is computed once.

    e_s = exp(k_s - largest key of the channel)        E_ts = exp(w_ts - largest bias of the position)

    [N_t Z_t] = Σ_s E_ts [e_s v_s  e_s]                y_t = sigmoid(q_t) N_t / Z_t

The columns [e v, e] of all keys are one array, [S B 2 C], and a *window* is the linear map that takes it to the sums of all
positions, [T B 2 C]: a matrix in tiles (full, local), or a convolution (conv, conv2d). Backward sends the gradients of the
sums through its transpose, and through the exponentials, of which the largest ones are constants that cancel:

    [r_t z_t] = dL/d[N_t Z_t]     [h_s x_s] = Σ_t E_ts [r_t z_t]     dv = e h     dk = e (v h + x)     dw = E ([r z] · [e v, e])

Nothing underflows as long as keys and biases span less than e^60 in float32; if they span more, the call is computed in
float64, up to e^600. Beyond that the kernel declines. The scan of aft_simple subtracts a running maximum, and takes any keys.
"""

import math

import numpy as np

from autograd.gemm import product
from autograd.kernel_math import exp
from autograd.kernels import cpu_kernel, inline

from . import everything, newest

SPANS = {np.dtype(np.float32): 60, np.dtype(np.float64): 600}
ROWS = 64  # positions a tile of aft_local
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


@cpu_kernel
def _columns(k, v, largest, out):
    """[e v, e]"""
    channels = k.shape[2]
    for b in range(k.shape[0]):
        top = largest[b]
        for s in range(k.shape[1]):
            key, value, left, right = k[b, s], v[b, s], out[s, b, :channels], out[s, b, channels:]
            for c in range(channels):
                e = exp(key[c] - top[c])
                left[c] = e * value[c]
                right[c] = e


@cpu_kernel
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


@cpu_kernel
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


@cpu_kernel
def _outputs_backward(q, sums, g, gq, gsums):
    """The gradients of q and of the sums."""
    channels = q.shape[2]
    one = q.dtype.type(1)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            gate, mean, inverse = q[b, t], sums[t, b, :channels], sums[t, b, channels:]
            grad, out, r, z = g[b, t], gq[b, t], gsums[t, b, :channels], gsums[t, b, channels:]
            for c in range(channels):
                share = one / (one + exp(-gate[c]))
                h = grad[c] * share
                r[c] = h
                out[c] = h * mean[c] * (one - share)
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
    """``everything`` backward: the gradients of k, v, mask, average, logsum and, if there is a reach, of keys and values."""
    past = 0 if not carried else 1 if reach is None else 1 + reach
    present = [x[:, past:] if mask is None else np.where(mask[..., None], x[:, past:], 0) for x in (gk, gv)]
    if not carried:
        return *present, *(None,) * (3 if reach is None else 5)
    return *present, None, gv[:, 0], gk[:, 0], *(() if reach is None else (gk[:, 1:past], gv[:, 1:past]))


# -- simple ------------------------------------------------------------------------------------------------------------
@cpu_kernel
def _scan(k, v, sums, tops):
    """The sums [N, Z] of all prefixes relative to e^top, the largest key so far."""
    length, channels = k.shape[1], k.shape[2]
    state, fade, e = np.zeros((2, channels), k.dtype), np.empty(channels, k.dtype), np.empty(channels, k.dtype)
    top, zero, one = np.empty(channels, k.dtype), k.dtype.type(0), k.dtype.type(1)
    numerator, total = state[0], state[1]
    for b in range(k.shape[0]):
        state[:] = zero
        top[:] = LOWEST
        for s in range(length):
            key, value = k[b, s], v[b, s]
            for c in range(channels):
                rise = key[c] - top[c]
                small = exp(-abs(rise))
                fade[c] = small if rise > zero else one
                e[c] = one if rise > zero else small
                top[c] = key[c] if rise > zero else top[c]
            left, right, out = sums[s, b, :channels], sums[s, b, channels:], tops[s, b]
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


@cpu_kernel
def _scan_backward(k, v, tops, g, gk, gv):
    length, channels = k.shape[1], k.shape[2]
    state, above = np.zeros((2, channels), k.dtype), np.empty(channels, k.dtype)
    h, x = state[0], state[1]
    for b in range(k.shape[0]):
        state[:] = k.dtype.type(0)
        above[:] = -LOWEST  # fades nothing yet
        for s in range(length - 1, -1, -1):
            top, left, right = tops[s, b], g[s, b, :channels], g[s, b, channels:]
            for c in range(channels):
                fade = exp(top[c] - above[c])
                above[c] = top[c]
                h[c] = h[c] * fade + left[c]
                x[c] = x[c] * fade + right[c]
            key, value, into_key, into_value = k[b, s], v[b, s], gk[b, s], gv[b, s]
            for c in range(channels):
                into_value[c] = exp(key[c] - top[c])
            for c in range(channels):
                e = into_value[c]
                into_key[c] = e * (value[c] * h[c] + x[c])
                into_value[c] = e * h[c]


def simple_forward(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    k, v = everything(k, v, mask, average, logsum)
    batch, length, channels = k.shape
    sums, tops = np.empty((length, batch, 2 * channels), k.dtype), np.empty((length, batch, channels), k.dtype)
    _scan(k, v, sums, tops)
    *state, share = _state(sums[-1:].sum(axis=0), tops[-1] if length else np.zeros((batch, channels), k.dtype))
    sums = sums[length - q.shape[1]:] if causal else np.repeat(sums[-1:], q.shape[1], axis=0)
    return (_read(q, sums), *state), (q, k, v, sums, tops, share, causal, mask, average is not None)


def simple_backward(saved, g, g_average, g_logsum):
    q, k, v, sums, tops, share, causal, mask, carried = saved
    gq, read = _unread(q, sums, g)
    gsums = np.zeros((k.shape[1], k.shape[0], 2 * k.shape[2]), k.dtype)
    if causal:
        gsums[len(gsums) - len(read):] = read
    elif len(read):
        gsums[-1] = read.sum(axis=0)
    gsums[-1:] += _unstate(share, g_average, g_logsum)
    gk, gv = np.empty_like(k), np.empty_like(v)
    _scan_backward(k, v, tops, gsums, gk, gv)
    return gq, *_unjoin(gk, gv, mask, carried)


# -- windows: linear maps from the columns [S B 2 C] of keys to the sums [T B 2 C] of positions ------------------------
@cpu_kernel
def _full_weights(bias, start, lag, weights):
    """e^bias relative to the largest of a row, for the first lag + t keys of position t; how far the smallest is below."""
    span = 0.0
    for i in range(weights.shape[0]):
        seen = min(max(lag + start + i, 0), weights.shape[1])
        row, out = bias[start + i], weights[i]
        high, low = -math.inf, math.inf
        for s in range(seen):
            high, low = max(high, row[s]), min(low, row[s])
        top = bias.dtype.type(high)
        for s in range(seen):
            out[s] = exp(row[s] - top)
        for s in range(seen, out.size):
            out[s] = 0
        span = max(span, high - low)
    return span


@cpu_kernel
def _local_weights(bias, start, first, causal, weights, far):
    """The same for a window of lags, lag 0 of row 0 being key ``first``; ``far`` is the weight of a bias of 0."""
    span, window = 0.0, bias.shape[1]
    for i in range(weights.shape[0]):
        row, out = bias[start + i], weights[i]
        high, low = 0.0, 0.0
        for j in range(window):
            high, low = max(high, row[j]), min(low, row[j])
        top = bias.dtype.type(high)
        far[i] = exp(-top)
        for s in range(out.size):
            j = first + i - s
            if 0 <= j < window:
                out[s] = exp(row[j] - top)
            else:
                out[s] = 0 if causal and j < 0 else far[i]
        span = max(span, high - low)
    return span


@cpu_kernel
def _local_gradient(weights, g, start, first, gbias):
    """gbias[t, j] = weights g for the key at lag j."""
    for i in range(weights.shape[0]):
        for j in range(gbias.shape[1]):
            s = first + i - j
            if 0 <= s < weights.shape[1]:
                gbias[start + i, j] = weights[i, s] * g[i, s]


def _rows(x):
    """One row for each first index."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


class _Tiles:
    """A matrix of weights in tiles (rows, columns, weights, far): far[rows] is the weight of all columns outside, if any.

    The sums over what is outside are made on the way: it grows from tile to tile, before the columns and, if ``both``, after.
    """

    def __init__(self, shape, both):
        self.shape, self.both, self.span, self.tiles = shape, both, 0.0, []

    def _outside(self):
        """For each side a list of (rows, far, columns that are outside for these rows and were not for those before)."""
        sides, start, stop = ([], []), 0, self.shape[1]
        for rows, seen, _, far in self.tiles:
            if seen.start > 0:
                sides[0].append((rows, far, slice(start, seen.start)))
                start = seen.start
        for rows, seen, _, far in reversed(self.tiles if self.both else ()):
            if seen.stop < self.shape[1]:
                sides[1].append((rows, far, slice(seen.stop, stop)))
                stop = seen.stop
        return sides

    def apply(self, columns):
        """The sums of all positions."""
        flat = _rows(columns)
        sums = np.empty((self.shape[0], flat.shape[1]), flat.dtype)
        for rows, seen, weights, _ in self.tiles:
            product(weights, flat[seen], out=sums[rows])
        for side in self._outside():
            total = np.zeros(flat.shape[1], flat.dtype)
            for rows, far, new in side:
                total += np.add.reduce(flat[new], axis=0)
                sums[rows] += far[:, None] * total
        return sums.reshape(len(sums), *columns.shape[1:])

    def transpose(self, g):
        """The gradient of the columns."""
        flat = _rows(g)
        out = np.zeros((self.shape[1], flat.shape[1]), flat.dtype)
        for rows, seen, weights, _ in self.tiles:
            product(weights.T, flat[rows], out=out[seen], accumulate=True)
        for side in self._outside():
            total = np.zeros(flat.shape[1], flat.dtype)
            for rows, far, new in reversed(side):
                total += far @ flat[rows]
                out[new] += total
        return out.reshape(len(out), *g.shape[1:])

    def _products(self, g, columns):
        """Every tile with the gradient of its weights."""
        g, columns = _rows(g), _rows(columns)
        return ((tile, product(g[tile[0]], columns[tile[1]].T)) for tile in self.tiles)


class _Full(_Tiles):
    def __init__(self, bias, keys, causal, chunk_size):
        super().__init__((len(bias), keys), both=False)
        lag = keys - len(bias) + 1 if causal else keys
        for start in range(0, len(bias), chunk_size):
            stop = min(start + chunk_size, len(bias))
            seen = slice(0, min(max(lag + stop - 1, 0), keys))
            weights = np.empty((stop - start, seen.stop), bias.dtype)
            self.span = max(self.span, _full_weights(bias, start, lag, weights))
            self.tiles.append((slice(start, stop), seen, weights, None))

    def gradient(self, g, columns):
        """The gradient of the bias."""
        out = np.zeros(self.shape, g.dtype)
        for (rows, seen, weights, _), gweights in self._products(g, columns):
            np.multiply(weights, gweights, out=out[rows, seen])
        return out


class _Local(_Tiles):
    def __init__(self, bias, keys, causal):
        queries, self.window = bias.shape
        super().__init__((queries, keys), both=not causal)
        self.newest = keys - queries + (0 if causal else self.window // 2)  # the key of lag 0 for row 0
        for start in range(0, queries, ROWS):
            stop = min(start + ROWS, queries)
            seen = slice(max(start + self.newest - self.window + 1, 0), min(stop + self.newest, keys))
            weights, far = np.empty((stop - start, seen.stop - seen.start), bias.dtype), np.empty(stop - start, bias.dtype)
            first = start + self.newest - seen.start
            self.span = max(self.span, _local_weights(bias, start, first, causal, weights, far))
            self.tiles.append((slice(start, stop), seen, weights, far))

    def gradient(self, g, columns):
        """The gradient of the bias."""
        out = np.zeros((self.shape[0], self.window), g.dtype)
        for (rows, seen, weights, _), gweights in self._products(g, columns):
            _local_gradient(weights, gweights, rows.start, rows.start + self.newest - seen.start, out)
        return out


# -- windows that are the same everywhere ------------------------------------------------------------------------------
@inline
def _accumulate(row, taps, j, x, s, b, count):
    """row += the sum over i < count of taps[j + i] x[s - i, b], four terms at a time."""
    i = 0
    while i + 4 <= count:
        w0, w1, w2, w3 = taps[j + i], taps[j + i + 1], taps[j + i + 2], taps[j + i + 3]
        x0, x1, x2, x3 = x[s - i, b], x[s - i - 1, b], x[s - i - 2, b], x[s - i - 3, b]
        for c in range(row.size):
            row[c] += w0[c] * x0[c] + w1[c] * x1[c] + w2[c] * x2[c] + w3[c] * x3[c]
        i += 4
    while i < count:
        w0, x0 = taps[j + i], x[s - i, b]
        for c in range(row.size):
            row[c] += w0[c] * x0[c]
        i += 1


@inline
def _correlate(row, g, t, x, s, b, count):
    """row += the sum over i < count of g[t + i, b] x[s + i, b], four terms at a time."""
    i = 0
    while i + 4 <= count:
        g0, g1, g2, g3 = g[t + i, b], g[t + i + 1, b], g[t + i + 2, b], g[t + i + 3, b]
        x0, x1, x2, x3 = x[s + i, b], x[s + i + 1, b], x[s + i + 2, b], x[s + i + 3, b]
        for c in range(row.size):
            row[c] += g0[c] * x0[c] + g1[c] * x1[c] + g2[c] * x2[c] + g3[c] * x3[c]
        i += 4
    while i < count:
        g0, x0 = g[t + i, b], x[s + i, b]
        for c in range(row.size):
            row[c] += g0[c] * x0[c]
        i += 1


@inline
def _add(row, x, y):
    for c in range(row.size):
        row[c] = x[c] + y[c]


@cpu_kernel
def _convolve(x, taps, far, newest, both, out):
    """out[t] = Σ_j taps[j] x[t + newest - j] + far · the sum of what is before and, if ``both``, after these."""
    keys, batch, columns = x.shape
    window, length = taps.shape[0], out.shape[0]
    total = np.empty(columns, x.dtype)
    for b in range(batch):
        total[:] = 0
        for t in range(length):
            row, gone = out[t, b], t + newest - window
            if 0 <= gone < keys:
                _add(total, total, x[gone, b])
            for c in range(columns):
                row[c] = far[c] * total[c]
            first = max(t + newest - keys + 1, 0)
            _accumulate(row, taps, first, x, t + newest - first, b, min(window, t + newest + 1) - first)
        if both:
            total[:] = 0
            for t in range(length - 1, -1, -1):
                row, coming = out[t, b], t + newest + 1
                if coming < keys:
                    _add(total, total, x[coming, b])
                for c in range(columns):
                    row[c] += far[c] * total[c]


@cpu_kernel
def _convolve_gradient(g, x, newest, gtaps):
    """gtaps[j] += Σ_t g[t] x[t + newest - j]"""
    for b in range(x.shape[1]):
        for j in range(gtaps.shape[0]):
            lag = newest - j
            start, stop = max(-lag, 0), min(g.shape[0], x.shape[0] - lag)
            _correlate(gtaps[j], g, start, x, start + lag, b, stop - start)


@cpu_kernel
def _convolve2d(x, taps, far, out):
    """out[y, x] = Σ_ij taps[i, j] x[y + M//2 - i, x + N//2 - j] + far · the sum of all others, for x[Y X B N].

    The others are the rows above and below, and what is left and right of the window in its own rows.
    """
    rows, columns, batch, size = x.shape
    height, width = taps.shape[0] // 2, taps.shape[1] // 2
    left, right = np.zeros((rows, columns + 1, size), x.dtype), np.zeros((rows, columns + 1, size), x.dtype)
    above, below = np.zeros((rows + 1, size), x.dtype), np.zeros((rows + 1, size), x.dtype)
    for b in range(batch):
        for y in range(rows):
            for i in range(columns):
                _add(left[y, i + 1], left[y, i], x[y, i, b])
            for i in range(columns - 1, -1, -1):
                _add(right[y, i], right[y, i + 1], x[y, i, b])
            _add(above[y + 1], above[y], left[y, columns])
        for y in range(rows - 1, -1, -1):
            _add(below[y], below[y + 1], left[y, columns])
        for y in range(rows):
            top, bottom = max(y - height, 0), min(y + height + 1, rows)
            for i in range(columns):
                row, first, last = out[y, i, b], max(i - width, 0), min(i + width + 1, columns)
                _add(row, above[top], below[bottom])
                for near in range(top, bottom):
                    _add(row, row, left[near, first])
                    _add(row, row, right[near, last])
                for c in range(size):
                    row[c] *= far[c]
                for near in range(top, bottom):
                    _accumulate(row, taps[y + height - near], i + width - last + 1, x[near], last - 1, b, last - first)


@cpu_kernel
def _convolve2d_gradient(g, x, gtaps):
    rows, columns, batch, _ = x.shape
    for b in range(batch):
        for i in range(gtaps.shape[0]):
            for j in range(gtaps.shape[1]):
                down, lag = gtaps.shape[0] // 2 - i, gtaps.shape[1] // 2 - j
                start, stop = max(-lag, 0), min(columns, columns - lag)
                for y in range(max(-down, 0), min(rows, rows - down)):
                    _correlate(gtaps[i, j], g[y], start, x[y + down], start + lag, b, stop - start)


class _Taps:
    """The weights of a window and that of all other keys, each head's for all its channels: [.. 2 C] and [2 C]."""

    def __init__(self, bias, size):
        lags = tuple(range(1, bias.ndim))
        high, low = bias.max(axis=lags, initial=0), bias.min(axis=lags, initial=0)
        self.span = np.max(high - low, initial=0)
        self.weights, self.size = np.exp(bias - np.expand_dims(high, lags)), size
        self.taps, self.far = self._spread(np.moveaxis(self.weights, 0, -1)), self._spread(np.exp(-high))

    def _spread(self, x):
        wide = np.repeat(x, self.size, axis=-1)
        return np.concatenate([wide, wide], axis=-1)

    def _gather(self, gtaps):
        """The gradient of the bias."""
        parts = gtaps.reshape(*gtaps.shape[:-1], 2, len(self.weights), self.size).sum(axis=(-3, -1))
        return np.moveaxis(parts, -1, 0) * self.weights


class _Conv(_Taps):
    def __init__(self, bias, size, queries, keys, causal):
        super().__init__(bias, size)
        self.queries, self.past, self.ahead, self.both = queries, keys - queries, bias.shape[1] // 2 * (not causal), not causal

    def apply(self, columns):
        sums = np.empty((self.queries, *columns.shape[1:]), columns.dtype)
        _convolve(columns, self.taps, self.far, self.past + self.ahead, self.both, sums)
        return sums

    def transpose(self, g):  # what a position sees before it, a key does after it
        out = np.empty((self.past + self.queries, *g.shape[1:]), g.dtype)
        _convolve(np.ascontiguousarray(g[::-1]), self.taps, self.far, self.ahead, self.both, out)
        return np.ascontiguousarray(out[::-1])

    def gradient(self, g, columns):
        gtaps = np.zeros(self.taps.shape, g.dtype)
        _convolve_gradient(g, columns, self.past + self.ahead, gtaps)
        return self._gather(gtaps)


class _Conv2d(_Taps):
    def __init__(self, bias, size, image):
        super().__init__(bias, size)
        self.image = image

    def _convolved(self, x, taps):
        x = x.reshape(*self.image, *x.shape[1:])
        out = np.empty_like(x)
        _convolve2d(x, taps, self.far, out)
        return out.reshape(math.prod(self.image), *x.shape[2:])

    def apply(self, columns):
        return self._convolved(columns, self.taps)

    def transpose(self, g):
        return self._convolved(g, np.ascontiguousarray(self.taps[::-1, ::-1]))

    def gradient(self, g, columns):
        gtaps = np.zeros(self.taps.shape, g.dtype)
        _convolve2d_gradient(g.reshape(*self.image, *g.shape[1:]), columns.reshape(*self.image, *g.shape[1:]), gtaps)
        return self._gather(gtaps)


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
        _columns(k if self.size == 1 else np.repeat(k, self.size, axis=2), v, self.largest, self.columns)
        self.sums = self.window.apply(self.columns)
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
    """How far the numbers of an array are apart, and those of some others; -∞ does not count."""
    high = max(np.max(y, initial=-math.inf) for y in (x, *others))
    low = min(np.min(y, initial=math.inf, where=y > -math.inf) for y in (x, *others))
    return high - low


def _reason(channels, bias, *keys):
    if channels < keys[0].shape[-1]:
        return "needs at least one channel in every head"
    if _span(bias, np.zeros(1)) + _span(*[k for k in keys if k is not None]) > SPANS[np.dtype(np.float64)]:
        return "biases and keys span more than e^600"
    return None


def full_supports(q, k, v, bias, mask, **_):
    return _reason(v.shape[2], bias, k)


def full_forward(q, k, v, bias, mask=None, *, causal=True, chunk_size=64):
    k, v = everything(k, v, mask)
    call = _Call(q, k, v, bias, lambda bias: _Full(bias, k.shape[1], causal, chunk_size))
    return call.y, (call, mask)


def full_backward(saved, g):
    call, mask = saved
    gq, gk, gv, gbias = call.backward(g)
    return gq, *_unjoin(gk, gv, mask, False)[:2], gbias, None


def local_supports(q, k, v, bias, mask, average, logsum, keys, values, **_):
    return _reason(v.shape[2], bias, k, logsum, keys)


conv_supports = local_supports


def _stateful_forward(q, k, v, bias, mask, average, logsum, keys, values, causal, make):
    """aft_local and aft_conv: ``make(bias, queries, keys, size)`` makes the window."""
    k, v = everything(k, v, mask, average, logsum, keys, values)
    reach = bias.shape[1] - 1 - (0 if causal else bias.shape[1] // 2)
    call = _Call(q, k, v, bias, lambda bias: make(bias, q.shape[1], k.shape[1], v.shape[2] // max(k.shape[2], 1)))
    left = max(k.shape[1] - reach, 0)
    after, logsum, share = _state(np.add.reduce(call.columns[:left], axis=0), call.largest)
    state = after, logsum[:, ::call.size], newest(k, reach, -math.inf), newest(v, reach, 0)
    return (call.y, *(x.astype(q.dtype, copy=False) for x in state)), (call, mask, average is not None, left, share)


def _stateful_backward(saved, g, g_average, g_logsum, g_keys, g_values):
    call, mask, carried, left, share = saved
    spread = np.zeros_like(g_average)
    spread[:, ::call.size] = g_logsum
    gq, gk, gv, gbias = call.backward(g, left, _unstate(share, g_average, spread))
    near, reach = gk.shape[1] - left, g_keys.shape[1]
    gk[:, left:] += g_keys[:, reach - near:]
    gv[:, left:] += g_values[:, reach - near:]
    gk, gv, *others = _unjoin(gk, gv, mask, carried, reach)
    return gq, gk, gv, gbias, *others


def local_forward(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    return _stateful_forward(q, k, v, bias, mask, average, logsum, keys, values, causal,
                             lambda bias, queries, keys, size: _Local(bias, keys, causal))


def conv_forward(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    return _stateful_forward(q, k, v, bias, mask, average, logsum, keys, values, causal,
                             lambda bias, queries, keys, size: _Conv(bias, size, queries, keys, causal))


local_backward = conv_backward = _stateful_backward


def conv2d_supports(q, k, v, bias, mask, **_):
    return _reason(v.shape[3], bias, k)


def conv2d_forward(q, k, v, bias, mask=None):
    image, size = k.shape[1:3], v.shape[3] // k.shape[3]
    k, v = everything(k, v, mask)
    q, k, v = (x.reshape(len(x), math.prod(image), x.shape[3]) for x in (q, k, v))
    call = _Call(q, k, v, bias, lambda bias: _Conv2d(bias, size, image))
    return call.y.reshape(len(q), *image, q.shape[2]), (call, mask, image)


def conv2d_backward(saved, g):
    call, mask, image = saved
    gq, gk, gv, gbias = call.backward(g.reshape(len(g), math.prod(image), g.shape[3]))
    gq, gk, gv = (x.reshape(len(x), *image, x.shape[2]) for x in (gq, gk, gv))
    return gq, *_unjoin(gk, gv, mask, False)[:2], gbias, None


# -- the bias of aft_local from its factors ----------------------------------------------------------------------------
@cpu_kernel
def _band(u, v, newest, out):
    for t in range(u.shape[0]):
        for j in range(out.shape[1]):
            s, total = t + newest - j, out.dtype.type(0)
            if 0 <= s < v.shape[0]:
                left, right = u[t], v[s]
                for r in range(left.size):
                    total += left[r] * right[r]
            out[t, j] = total


@cpu_kernel
def _band_backward(u, v, newest, g, gu, gv):
    for t in range(u.shape[0]):
        for j in range(g.shape[1]):
            s, share = t + newest - j, g[t, j]
            if 0 <= s < v.shape[0]:
                left, right, into_left, into_right = u[t], v[s], gu[t], gv[s]
                for r in range(left.size):
                    into_left[r] += share * right[r]
                for r in range(left.size):
                    into_right[r] += share * left[r]


def band_forward(u, v, *, window=32, causal=True):
    u, v, ahead = np.ascontiguousarray(u), np.ascontiguousarray(v), 0 if causal else window - 1
    out = np.empty((len(u), window + ahead), u.dtype)
    _band(u, v, len(v) - len(u) + ahead, out)
    return out, (u, v, len(v) - len(u) + ahead)


def band_backward(saved, g):
    u, v, newest = saved
    gu, gv = np.zeros_like(u), np.zeros_like(v)
    _band_backward(u, v, newest, np.ascontiguousarray(g), gu, gv)
    return gu, gv
