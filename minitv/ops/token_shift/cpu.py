"""token_shift on the CPU: one pass each way, a row of channels at a time."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.vectors import assign


@inner
def mixed(x, before, mix, y):
    """y = mix x + (1 - mix) before, of one position."""
    one = x.dtype.type(1)
    for c in range(x.size):
        y[c] = mix[c] * x[c] + (one - mix[c]) * before[c]


@cpu_kernel(parts="channels", grain=64)
def _forward(x, mix, last, reset, y, channels):
    """``last`` holds the position before the first, and the last one afterwards."""
    batch, length, _ = x.shape
    low, high = channels
    nothing = np.zeros(high - low, x.dtype)
    for b in range(batch):
        for t in range(length):
            before = nothing if reset[b, t] else x[b, t - 1, low:high] if t else last[b, low:high]
            mixed(x[b, t, low:high], before, mix[low:high], y[b, t, low:high])
        if length:
            assign(last[b, low:high], x[b, length - 1, low:high])


@cpu_kernel(parts="channels", grain=64)
def _backward(x, mix, first, reset, g, glast, gx, gmix, channels):
    """``glast`` holds the gradient of the last position, and that of ``first`` afterwards."""
    batch, length, _ = x.shape
    low, high = channels
    one, nothing, share, gshare = x.dtype.type(1), np.zeros(high - low, x.dtype), mix[low:high], gmix[low:high]
    for b in range(batch):
        passed = glast[b, low:high]
        for t in range(length - 1, -1, -1):
            row, grad, out = x[b, t, low:high], g[b, t, low:high], gx[b, t, low:high]
            before = nothing if reset[b, t] else x[b, t - 1, low:high] if t else first[b, low:high]
            for c in range(high - low):
                gshare[c] += grad[c] * (row[c] - before[c])
                out[c] = share[c] * grad[c] + passed[c]
                passed[c] = (one - share[c]) * grad[c]
            if reset[b, t]:
                passed[:] = 0


def forward(x, mix, last, reset):
    batch, length, width = x.shape
    x, mix = np.ascontiguousarray(x), np.ascontiguousarray(mix)
    first = np.zeros((batch, width), x.dtype) if last is None else np.ascontiguousarray(last)
    reset = np.zeros((batch, length), bool) if reset is None else np.ascontiguousarray(reset)
    y, after = np.empty_like(x), first.copy()
    _forward(x, mix, after, reset, y, (0, mix.size))
    return (y, after), (x, mix, first, reset, last is not None)


def backward(saved, g_y, g_last):
    x, mix, first, reset, carried = saved
    gx, gmix, gfirst = np.empty_like(x), np.zeros_like(mix), or_zeros(g_last, first).copy()
    _backward(x, mix, first, reset, np.ascontiguousarray(or_zeros(g_y, x)), gfirst, gx, gmix, (0, mix.size))
    return gx, gmix, gfirst if carried else None
