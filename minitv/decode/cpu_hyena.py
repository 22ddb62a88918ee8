"""Hyena's mixer for one token. Long convolutions are those of minitv/ops/long_conv/online.py, in arrays for the whole context:

    y_t = sums_t + skip a_t + Σ_{s = border .. t} filter_{t-s} a_s         border: the last multiple of the block size

A block that ends adds what its inputs contribute to the positions after it to their sums.
"""

from __future__ import annotations

from autograd.cpu.compile import cpu_kernel

from .cpu import linear, norm, take


@cpu_kernel
def _short(recent, taps, bias, past, y):
    """y = bias + Σ_s taps_s z_{t-s} for t = past; z_u is row u modulo their number."""
    for c in range(y.size):
        y[c] = bias[c]
    for s in range(min(len(taps), past + 1)):
        row = (past - s) % len(taps)
        for c in range(y.size):
            y[c] += taps[s, c] * recent[row, c]


@cpu_kernel
def _long(inputs, filters, sums, skip, o, border, past, y):
    """The sum above of convolution o for t = past."""
    for c in range(y.size):
        y[c] = sums[o, past, c] + skip[o, c] * inputs[o, past, c]
    for s in range(border, past + 1):
        for c in range(y.size):
            y[c] += filters[o, past - s, c] * inputs[o, s, c]


@cpu_kernel
def step(x, past, border, affine, eps, centered, project, project_bias, short, short_bias, skip, out, out_bias, filters,
          recent, inputs, sums, memory):
    """The token follows ``past`` others; its projections and the inputs of its long convolutions join theirs."""
    width, count = x.size, len(inputs)
    h, at = take(memory, 0, width)
    z, at = take(memory, at, len(project))
    v = z[(count + 1) * width :]
    norm(x, affine, eps, centered, h, memory[at:])
    linear(project, project_bias, h, recent[past % len(short)], False)
    _short(recent, short, short_bias, past, z)
    for o in range(count):
        gate = (count - o) * width
        for c in range(width):
            inputs[o, past, c] = v[c] * z[gate + c]
        _long(inputs, filters, sums, skip, o, border, past, v)
    for c in range(width):
        v[c] *= z[c]
    linear(out, out_bias, v, x, True)
