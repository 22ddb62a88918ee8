"""AFT at one position: a mean over the past is three numbers a channel, mean[3 C], relative to its largest exponent:

    a = Σ e^(k_s + w_ts - top) v_s        b = Σ e^(k_s + w_ts - top)        y_t = sigmoid(q_t) a / b

Exponents x = k + w join it in blocks. Before the first a = 0, b = 1 and top = -∞: what is finite counts it e^-∞ times.
"""

from __future__ import annotations

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp


@cpu_kernel
def place(newest, lag, size):
    """Where in a ring of that size lies what came ``lag`` positions before the newest."""
    return newest - lag if newest >= lag else newest - lag + size


@cpu_kernel
def join(exponents, values, newest, mean, highest):
    """a ← a + Σ e^x v and b ← b + Σ e^x, relative to a new top; row i of the exponents x[. C] is that of lag i in the ring
    values[. C]. ``highest`` [C] is scratch memory.
    """
    a, b, top = mean[0], mean[1], mean[2]
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
        s = place(newest, i, len(values))
        for c in range(top.size):
            e = exp(exponents[i, c] - top[c])
            a[c] += e * values[s, c]
            b[c] += e


@cpu_kernel
def gated_mean(q, mean, y):
    """y = sigmoid(q) a / b"""
    a, b, one = mean[0], mean[1], y.dtype.type(1)
    for c in range(y.size):
        y[c] = a[c] / (b[c] * (one + exp(-q[c])))
