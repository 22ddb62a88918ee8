"""The windows of cpu.py: linear maps from the columns [S B 2 C] of all keys to the sums [T B 2 C] of all positions.

Each has ``span``, how far its biases are apart, and ``apply``, ``transpose`` (the gradient of the columns) and ``gradient``
(that of the bias). Columns that are not all finite are not ``sound``: then no weight of 0 may meet those that are not seen.
"""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inline
from autograd.cpu.gemm import product
from autograd.cpu.math import exp
from autograd.cpu.team import each, spans

ROWS = 64  # positions a tile of aft_local


# -- matrices in tiles -----------------------------------------------------------------------------------------------
@inline
def _wider(high, low, x):
    """The extremes with one more number, unless it is NaN."""
    return (x if x > high else high), (x if x < low else low)


@cpu_kernel
def _full_weights(bias, start, lag, weights):
    """e^bias relative to the largest of a row, for the first lag + t keys of position t; how far the smallest is below."""
    span = 0.0
    for i in range(weights.shape[0]):
        count = min(max(lag + start + i, 0), weights.shape[1])
        row, out = bias[start + i], weights[i]
        high, low = -math.inf, math.inf
        for s in range(count):
            high, low = _wider(high, low, row[s])
        top = bias.dtype.type(high)
        for s in range(count):
            out[s] = exp(row[s] - top)
        for s in range(count, out.size):
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
            high, low = _wider(high, low, row[j])
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


@cpu_kernel
def _product_of_seen(weights, columns, out):
    """out = weights columns, where a weight of 0 hides its row of columns."""
    for i in range(weights.shape[0]):
        row = out[i]
        row[:] = 0
        for s in range(weights.shape[1]):
            weight, column = weights[i, s], columns[s]
            if weight != 0:
                for c in range(row.size):
                    row[c] += weight * column[c]


def _rows(x):
    """One row for each first index."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _in_columns(compute, y, *arrays):
    """``compute(y, *arrays)`` for parts of the last axis of all, copied where they are not the whole of it."""
    parts = spans(y.shape[-1], 64, max(x.size for x in (y, *arrays)))
    if len(parts) == 1:
        return compute(y, *arrays)

    def part(_, start, stop):
        own, *others = (np.ascontiguousarray(x[..., start:stop]) for x in (y, *arrays))
        compute(own, *others)
        y[..., start:stop] = own

    return each(part, parts)


class _Tiles:
    """A matrix of weights in tiles (rows, columns, weights, far): far[rows] is the weight of all columns outside, if any.

    The sums over what is outside are made on the way: it grows from tile to tile, before the columns and, if ``both``, after.
    """

    def __init__(self, shape, both):
        self.shape, self.both, self.span, self.tiles = shape, both, 0.0, []

    def _outside(self):
        """For each side a list of (rows, far, columns that are outside for these rows and were not for those before)."""
        sides, start, stop = ([], []), 0, self.shape[1]
        for rows, span, _, far in self.tiles:
            if span.start > 0:
                sides[0].append((rows, far, slice(start, span.start)))
                start = span.start
        for rows, span, _, far in reversed(self.tiles if self.both else ()):
            if span.stop < self.shape[1]:
                sides[1].append((rows, far, slice(span.stop, stop)))
                stop = span.stop
        return sides

    def apply(self, columns, sound):
        """The sums of all positions."""
        flat = _rows(columns)
        sums = np.empty((self.shape[0], flat.shape[1]), flat.dtype)
        _in_columns(lambda y, x: self._apply(x, y, sound), sums, flat)
        return sums.reshape(len(sums), *columns.shape[1:])

    def _apply(self, flat, sums, sound):
        for rows, span, weights, _ in self.tiles:
            (product if sound else _product_of_seen)(weights, flat[span], sums[rows])
        for side in self._outside():
            total = np.zeros(flat.shape[1], flat.dtype)
            for rows, far, new in side:
                total += np.add.reduce(flat[new], axis=0)
                sums[rows] += far[:, None] * total

    def transpose(self, g):
        """The gradient of the columns."""
        flat = _rows(g)
        out = np.zeros((self.shape[1], flat.shape[1]), flat.dtype)
        _in_columns(self._transpose, out, flat)
        return out.reshape(len(out), *g.shape[1:])

    def _transpose(self, out, flat):
        for rows, span, weights, _ in self.tiles:
            product(weights.T, flat[rows], out=out[span], accumulate=True)
        for side in self._outside():
            total = np.zeros(flat.shape[1], flat.dtype)
            for rows, far, new in reversed(side):
                total += far @ flat[rows]
                out[new] += total

    def _each_gradient(self, g, columns, use):
        """``use(rows, span, weights, gradient of the weights)`` for every tile."""
        g, columns = _rows(g), _rows(columns)

        def part(_, start, stop):
            for rows, span, weights, _ in self.tiles[start:stop]:
                use(rows, span, weights, product(g[rows], columns[span].T))

        each(part, spans(len(self.tiles), 1, g.size))


class Full(_Tiles):
    def __init__(self, bias, keys, causal, chunk_size):
        super().__init__((len(bias), keys), both=False)
        lag = keys - len(bias) + 1 if causal else keys
        for start in range(0, len(bias), chunk_size):
            stop = min(start + chunk_size, len(bias))
            span = slice(0, min(max(lag + stop - 1, 0), keys))
            weights = np.empty((stop - start, span.stop), bias.dtype)
            self.span = max(self.span, _full_weights(bias, start, lag, weights))
            self.tiles.append((slice(start, stop), span, weights, None))

    def gradient(self, g, columns):
        """The gradient of the bias."""
        out = np.zeros(self.shape, g.dtype)
        self._each_gradient(g, columns, lambda rows, span, weights, gweights: np.multiply(
            weights, gweights, out=out[rows, span], where=weights != 0))
        return out


class Local(_Tiles):
    def __init__(self, bias, keys, causal):
        queries, self.window = bias.shape
        super().__init__((queries, keys), both=not causal)
        self.newest = keys - queries + (0 if causal else self.window // 2)  # the key of lag 0 for row 0
        self.tiles = [None] * -(-queries // ROWS)

        def part(_, begin, end):
            for i in range(begin, end):
                start, stop = i * ROWS, min((i + 1) * ROWS, queries)
                span = slice(max(start + self.newest - self.window + 1, 0), min(stop + self.newest, keys))
                weights, far = np.empty((stop - start, span.stop - span.start), bias.dtype), np.empty(stop - start, bias.dtype)
                spread = _local_weights(bias, start, start + self.newest - span.start, causal, weights, far)
                self.tiles[i] = slice(start, stop), span, weights, far, spread

        each(part, spans(len(self.tiles), 1, bias.size))
        self.span = max((spread for *_, spread in self.tiles), default=0.0)
        self.tiles = [tuple(tile) for *tile, _ in self.tiles]

    def gradient(self, g, columns):
        """The gradient of the bias."""
        out = np.zeros((self.shape[0], self.window), g.dtype)
        self._each_gradient(g, columns, lambda rows, span, weights, gweights: _local_gradient(
            weights, gweights, rows.start, rows.start + self.newest - span.start, out))
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


class Conv(_Taps):
    def __init__(self, bias, size, queries, keys, causal):
        super().__init__(bias, size)
        self.queries, self.past, self.ahead, self.both = queries, keys - queries, bias.shape[1] // 2 * (not causal), not causal

    def apply(self, columns, sound):
        sums = np.empty((self.queries, *columns.shape[1:]), columns.dtype)
        self._convolved(columns, sums, self.past + self.ahead)
        return sums

    def _convolved(self, x, y, newest):
        _in_columns(lambda y, x, taps, far: _convolve(x, taps, far, newest, self.both, y), y, x, self.taps, self.far)

    def transpose(self, g):  # what a position sees before it, a key does after it
        out = np.empty((self.past + self.queries, *g.shape[1:]), g.dtype)
        self._convolved(np.ascontiguousarray(g[::-1]), out, self.ahead)
        return np.ascontiguousarray(out[::-1])

    def gradient(self, g, columns):
        gtaps = np.zeros(self.taps.shape, g.dtype)
        _in_columns(lambda gtaps, g, x: _convolve_gradient(g, x, self.past + self.ahead, gtaps), gtaps, g, columns)
        return self._gather(gtaps)


class Conv2d(_Taps):
    def __init__(self, bias, size, image):
        super().__init__(bias, size)
        self.image = image

    def _convolved(self, x, taps):
        x = x.reshape(*self.image, *x.shape[1:])
        out = np.empty_like(x)
        _convolve2d(x, taps, self.far, out)
        return out.reshape(math.prod(self.image), *x.shape[2:])

    def apply(self, columns, sound):
        return self._convolved(columns, self.taps)

    def transpose(self, g):
        return self._convolved(g, np.ascontiguousarray(self.taps[::-1, ::-1]))

    def gradient(self, g, columns):
        gtaps = np.zeros(self.taps.shape, g.dtype)
        _convolve2d_gradient(g.reshape(*self.image, *g.shape[1:]), columns.reshape(*self.image, *g.shape[1:]), gtaps)
        return self._gather(gtaps)
