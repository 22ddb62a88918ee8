"""causal_conv1d on the CPU, and sums of any number of taps over the past and the future.

The channels of a vector are copied next to each other, [time, lanes], with PAD rows of zeros before and after, so that
nothing has to look out for the ends. Every sum is then one and the same loop, `_add_products`: eight rows of the result stay
in registers, and each step multiplies one row of the first factor with eight neighbouring rows of the second.

    y[t] = Σ_u taps[u] x[t - u]     steps over taps: x backwards
    gradient of taps[u] = Σ_t g[t] x[t - u]    steps over time: x forwards, eight neighbours backwards
"""

import numpy as np

from ...cpu.compile import cpu_kernel
from ...cpu.vectors import BYTES, copy_rows, repeat, scratch, vectorized

ROWS = 8  # of the result, in registers
PAD = ROWS - 1


@vectorized
def _add_products(out, o, a, i, b, j, step, row, count):
    """out[o + r] += Σ_{s < count} a[i + s] b[j + step s + row r] for r < ROWS; all indices count rows of lanes."""
    lanes = out.lanes

    def body(s, totals):
        factor = a.load((i + s) * lanes)
        return [total + factor * b.load((j + s * step + row * r) * lanes) for r, total in enumerate(totals)]

    for r, total in enumerate(repeat(count, [out.load((o + r) * lanes) for r in range(ROWS)], body)):
        out.store((o + r) * lanes, total)


@cpu_kernel(parts="channels", grain=32)
def _convolve(x, taps, first, bias, shape, y, channels):
    batch, length, width = shape
    count, lanes = taps.size // width, BYTES // x.itemsize
    panel, row_taps = scratch((length + 2 * PAD) * lanes, x), scratch(count * lanes, x)
    sums = scratch(ROWS * lanes, x)
    for left in range(channels[0], channels[1], lanes):
        c = min(left, width - lanes)  # the last vector repeats channels of the one before
        copy_rows(row_taps, 0, lanes, taps, c, width, count)
        for b in range(batch):
            copy_rows(panel, PAD * lanes, lanes, x, b * length * width + c, width, length)
            for t in range(0, length, ROWS):
                copy_rows(sums, 0, lanes, bias, c, 0, ROWS)
                low, high = max(0, t - length + 1 - first), min(count, t + ROWS - first)  # beyond, x is 0
                _add_products(sums, 0, row_taps, low, panel, PAD + t - low - first, -1, 1, high - low)
                copy_rows(y, (b * length + t) * width + c, width, sums, 0, lanes, min(ROWS, length - t))


@cpu_kernel(parts="channels", grain=32)
def _correlate(x, g, first, shape, gtaps, channels):
    batch, length, width = shape
    count, lanes = gtaps.size // width, BYTES // x.itemsize
    panel, panel_g = scratch((length + 2 * PAD) * lanes, x), scratch((length + 2 * PAD) * lanes, x)
    sums = scratch((count + PAD) * lanes, x)
    for left in range(channels[0], channels[1], lanes):
        c = min(left, width - lanes)
        sums[:] = 0
        for b in range(batch):
            copy_rows(panel, PAD * lanes, lanes, x, b * length * width + c, width, length)
            copy_rows(panel_g, PAD * lanes, lanes, g, b * length * width + c, width, length)
            for u in range(0, count, ROWS):
                lag = u + first
                low, high = max(0, lag), min(length, length + lag + PAD)  # beyond, x is 0
                _add_products(sums, u, panel_g, PAD + low, panel, PAD + low - lag, 1, -1, high - low)
        copy_rows(gtaps, c, width, sums, 0, lanes, count)


def widened(x):
    """x in C order with at least a vector of channels."""
    missing = BYTES // x.itemsize - x.shape[-1]
    return np.ascontiguousarray(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing > 0 else x)


def convolve(x, taps, first=0, bias=None):
    """y[b, t] = bias + Σ_u taps[u] x[b, t - first - u], for x[B T C] and taps[U C]; outside of 0 .. T-1, x is 0."""
    y = np.empty_like(x, order="C")
    if x.size:
        wide, taps = widened(x), widened(taps)
        bias = np.zeros(wide.shape[-1], x.dtype) if bias is None else widened(bias)
        target = y if wide.shape == y.shape else np.empty_like(wide)
        _convolve(wide.reshape(-1), taps.reshape(-1), first, bias, wide.shape, target.reshape(-1), (0, wide.shape[2]))
        y = target[..., : x.shape[-1]]
    return y


def correlate(x, g, count, first=0):
    """The gradient of the taps of ``convolve``: [u] = Σ_b Σ_t g[b, t] x[b, t - first - u] for u < count."""
    gtaps = np.zeros((count, max(x.shape[-1], BYTES // x.itemsize)), x.dtype)
    if x.size and count:
        wide = widened(x)
        _correlate(wide.reshape(-1), widened(g).reshape(-1), first, wide.shape, gtaps.reshape(-1), (0, wide.shape[2]))
    return gtaps[:, : x.shape[-1]]


def filtered(x, weight, bias, ahead):
    """``forward`` of depthwise_conv1d, whose outputs see ``ahead`` later positions."""
    taps = weight.T[::-1]  # backwards from the furthest ahead
    return convolve(x, taps, -ahead, bias), (x, taps, bias is not None, ahead)


def forward(x, weight, bias):
    return filtered(x, weight, bias, 0)


def backward(saved, g):
    x, taps, biased, ahead = saved
    gx = convolve(g, taps[::-1], 1 - len(taps) + ahead)
    gweight = correlate(x, g, len(taps), -ahead)[::-1].T
    return gx, gweight, np.add.reduce(g, axis=(0, 1)) if biased else None
