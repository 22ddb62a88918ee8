"""long_conv on the CPU: few taps by the direct sum, many by the Fourier transform.

The transforms run over time, with channels as lanes. A complex sequence carries two real ones: z = x + i x', of channels that
are a vector apart. With n >= 2T - 1 points nothing wraps around. Where X, X' and H, H' are the transforms of x, x' and of
their taps, and w is z's transform at -k,

    X = (z + w̄) / 2     i X' = (z - w̄) / 2     a = (H + H') / 2     b = (H - H') / 2

    convolution   X H + i X' H' = z a + w̄ b                  its gradient for x: the same with ā and b̄
    correlation   G X̄ + i G' X̄' = u + i v                    with u = G X̄, v = (i G')(conj(i X'))

All are computed for k and -k together. The two values of k that are their own negative have real transforms there. The gradient
of the taps is summed over the batch before its one inverse transform. Backward transforms x and the taps again, which is
faster than to keep what forward had.
"""

import functools

import numpy as np

from autograd.cpu import fft
from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.fft import Complex
from autograd.cpu.vectors import BYTES, copy_rows, scratch, vectorized
from autograd.ops.causal_conv1d.cpu import convolve, correlate, widened

from . import common

DIRECT = 64  # taps a position, on average, up to which the direct sum is faster


@vectorized
def _split_pair(taps, i, j):
    """From the transform of two filters at k and -k, a of both at k and b at -k."""
    z, w = Complex.load(taps, i), Complex.load(taps, j).conjugate()
    h, other = (z + w).scale(0.25), (z - w).turned(2).scale(0.25)
    (h + other).store(taps, i)
    (h - other).store(taps, j)


@vectorized
def _filter_pair(work, taps, i, j, adjoint):
    """The product with both filters at k and -k, or with their conjugates."""
    z, w, a, b = Complex.load(work, i), Complex.load(work, j), Complex.load(taps, i), Complex.load(taps, j)
    if adjoint:
        a, b = a.conjugate(), b.conjugate()
    (z * a + w.conjugate() * b).store(work, i)
    (w * a.conjugate() + z.conjugate() * b.conjugate()).store(work, j)


@vectorized
def _filter_single(work, taps, i):
    """The product where k = -k and all four transforms are real."""
    for part in (i, i + work.lanes):
        work.store(part, work.load(part) * taps.load(part))


@vectorized
def _correlate_pair(total, work, signal, i, j):
    """Add the products of the two gradients with the conjugates of the two signals, at k and -k."""
    g, x = Complex.load(work, i), Complex.load(signal, i)
    g_, x_ = Complex.load(work, j).conjugate(), Complex.load(signal, j).conjugate()
    u = ((g + g_) * (x + x_).conjugate()).scale(0.25)
    v = ((g - g_) * (x - x_).conjugate()).scale(0.25)
    (Complex.load(total, i) + u + v.turned(6)).store(total, i)
    (Complex.load(total, j) + u.conjugate() + v.conjugate().turned(6)).store(total, j)


@vectorized
def _correlate_single(total, work, signal, i):
    for part in (i, i + work.lanes):
        total.store(part, total.load(part) + work.load(part) * signal.load(part))


@inner
def _load(work, lanes, x, start, re, im, width, rows):
    """Two vectors of channels as the real and imaginary parts of the first points; the others are 0."""
    copy_rows(work, 0, 2 * lanes, x, start + re, width, rows)
    copy_rows(work, lanes, 2 * lanes, x, start + im, width, rows)
    work[2 * lanes * rows :] = 0


@inner
def _store(y, start, re, im, width, work, point, lanes, rows):
    """The points from ``point`` on as two vectors of channels."""
    copy_rows(y, start + re, width, work, 2 * lanes * point, 2 * lanes, rows)
    copy_rows(y, start + im, width, work, 2 * lanes * point + lanes, 2 * lanes, rows)


@inner
def _load_taps(work, lanes, taps, first, re, im, width, plan, pairs, row):
    """The transform of two vectors of filters, split into a and b. Lags below 0 are the last points."""
    past = taps.size // width + first
    _load(work, lanes, taps, -first * width, re, im, width, past)
    last = work[work.size + 2 * lanes * first :]
    copy_rows(last, 0, 2 * lanes, taps, re, width, -first)
    copy_rows(last, lanes, 2 * lanes, taps, im, width, -first)
    fft.forward(work, plan)
    for i in range(len(pairs)):
        _split_pair(work, pairs[i, 0] * row, pairs[i, 1] * row)


@cpu_kernel(parts="channels")
def _forward(x, taps, first, channels, plan, pairs, singles, points, shape, y):
    batch, length, width = shape
    lanes = BYTES // x.itemsize
    row = 2 * lanes
    work, spectrum = scratch(points * row, x), scratch(points * row, x)
    for vectors in range(len(channels)):
        re, im = channels[vectors, 0], channels[vectors, 1]
        _load_taps(spectrum, lanes, taps, first, re, im, width, plan, pairs, row)
        for b in range(batch):
            _load(work, lanes, x, b * length * width, re, im, width, length)
            fft.forward(work, plan)
            for i in range(len(pairs)):
                _filter_pair(work, spectrum, pairs[i, 0] * row, pairs[i, 1] * row, 0)
            for point in singles:
                _filter_single(work, spectrum, point * row)
            fft.inverse(work, plan)
            _store(y, b * length * width, re, im, width, work, 0, lanes, length)


@cpu_kernel(parts="channels")
def _backward(x, taps, first, channels, plan, pairs, singles, points, shape, g, gx, gtaps):
    batch, length, width = shape
    lanes = BYTES // x.itemsize
    row, count = 2 * lanes, taps.size // width
    work, spectrum, signal, total = (scratch(points * row, x), scratch(points * row, x), scratch(points * row, x),
                                     scratch(points * row, x))
    for vectors in range(len(channels)):
        re, im = channels[vectors, 0], channels[vectors, 1]
        _load_taps(spectrum, lanes, taps, first, re, im, width, plan, pairs, row)
        total[:] = 0
        for b in range(batch):
            _load(work, lanes, g, b * length * width, re, im, width, length)
            _load(signal, lanes, x, b * length * width, re, im, width, length)
            fft.forward(work, plan)
            fft.forward(signal, plan)
            for i in range(len(pairs)):
                _correlate_pair(total, work, signal, pairs[i, 0] * row, pairs[i, 1] * row)
                _filter_pair(work, spectrum, pairs[i, 0] * row, pairs[i, 1] * row, 1)
            for point in singles:
                _correlate_single(total, work, signal, point * row)
                _filter_single(work, spectrum, point * row)
            fft.inverse(work, plan)
            _store(gx, b * length * width, re, im, width, work, 0, lanes, length)
        fft.inverse(total, plan)
        _store(gtaps, 0, re, im, width, total, points + first, lanes, -first)
        _store(gtaps, -first * width, re, im, width, total, 0, lanes, count + first)


@functools.cache
def _setting(points: int, dtype, width: int):
    """The plan, where k and -k are, where k = -k is, and which channels meet in a complex sequence."""
    plan, lanes = fft.plan(points, dtype), BYTES // dtype.itemsize
    k = np.arange(1, (points + 1) // 2)
    pairs = np.stack([plan.places[k], plan.places[points - k]], axis=1)
    pairs = pairs[np.argsort(pairs.min(axis=1))]  # in the order of memory
    singles = plan.places[[0, points // 2] if points % 2 == 0 else [0]]
    starts = [min(c, width - lanes) for c in range(0, width, lanes)]  # the last vector repeats channels
    channels = np.array(starts + starts[-1:] * (len(starts) % 2)).reshape(-1, 2)
    return plan.arguments, pairs, singles, channels


@cpu_kernel
def step(taps, inputs, newest, count, y):
    """y += Σ_{s < count} taps_s inputs_{newest - s}, of one position; rows of inputs are counted modulo their number."""
    for s in range(count):
        row = newest - s if newest >= s else newest - s + len(inputs)
        for c in range(y.size):
            y[c] += taps[s, c] * inputs[row, c]


def _arguments(x, taps, first, points):
    """What both FFT kernels take, with the filter scaled for the inverse transform."""
    wide = widened(x)
    plan, *where = _setting(points, x.dtype, wide.shape[2])
    scaled = widened(taps * x.dtype.type(1 / points))
    return wide.reshape(-1), scaled.reshape(-1), first, where[2], plan, where[0], where[1], points, wide.shape


def _fft(x, taps, first, points):
    arguments = _arguments(x, taps, first, points)
    y = np.empty(arguments[-1], x.dtype)
    _forward(*arguments, y.reshape(-1))
    return y[..., : x.shape[2]]


def _fft_backward(x, taps, first, points, g):
    arguments = _arguments(x, taps, first, points)
    shape = arguments[-1]
    gx, gtaps = np.empty(shape, x.dtype), np.empty((len(taps), shape[2]), x.dtype)
    _backward(*arguments, widened(g).reshape(-1), gx.reshape(-1), gtaps.reshape(-1))
    return gx[..., : x.shape[2]], gtaps[:, : x.shape[2]] * x.dtype.type(1 / points)


direct_forward, direct_backward = common.direct(convolve, correlate)
direct_defers = common.defers(DIRECT)
fft_forward, fft_backward = common.transformed(_fft, _fft_backward)


def step_supports(reverse):
    return None if reverse is None else "takes no filter that looks ahead"


def step_forward(x, filter, skip, history):
    whole = np.ascontiguousarray(x if history is None else np.concatenate([history, x], axis=1))
    length, keep = whole.shape[1], max(len(filter) - 1, 0)
    y, taps = np.zeros(x.shape, x.dtype) if skip is None else x * skip, np.ascontiguousarray(filter)
    for inputs, row in zip(whole, y, strict=True):
        step(taps, inputs, length - 1, min(len(taps), length), row[0])
    return (y, whole[:, max(length - keep, 0) :]), None
