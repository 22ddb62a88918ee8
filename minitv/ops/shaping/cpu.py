"""shaping on the CPU: one pass each way; forward carries the mean from token to token, backward the sum R from the last one."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.compile import cpu_kernel


@cpu_kernel
def _forward(a, v, alpha, beta, gamma, past, causal, y, mean):
    """``mean`` holds the mean of the past, and afterwards that of all."""
    batch, length, width = v.shape
    one = v.dtype.type(1)
    for b in range(batch):
        if not causal:
            for t in range(length):
                share = one / v.dtype.type(past + t + 1)
                for c in range(width):
                    mean[b, c] += (v[b, t, c] - mean[b, c]) * share
        for t in range(length):
            share = one / v.dtype.type(past + t + 1)
            for c in range(width):
                m = mean[b, c] + (v[b, t, c] - mean[b, c]) * share if causal else mean[b, c]
                y[b, t, c] = alpha[c] * v[b, t, c] + beta[c] * a[b, t, c] - gamma[c] * m
                mean[b, c] = m


@cpu_kernel
def _backward(a, v, alpha, beta, gamma, mean, past, causal, g, gmean, ga, gv, sums):
    """``gmean`` holds the gradient of the last mean, and afterwards that of the first; ``sums`` [3 D] that of the gains."""
    batch, length, width = v.shape
    zero, one, before = v.dtype.type(0), v.dtype.type(1), v.dtype.type(past)
    all_of_them = one / v.dtype.type(max(past + length, 1))
    r = np.empty(width, v.dtype)
    for b in range(batch):
        for c in range(width):
            r[c] = zero
            gmean[b, c] *= all_of_them
        if not causal:
            for t in range(length):
                for c in range(width):
                    r[c] += g[b, t, c] * all_of_them
        for t in range(length - 1, -1, -1):
            share = one / v.dtype.type(past + t + 1) if causal else zero
            for c in range(width):
                r[c] += g[b, t, c] * share
                ga[b, t, c] = beta[c] * g[b, t, c]
                gv[b, t, c] = alpha[c] * g[b, t, c] - gamma[c] * r[c] + gmean[b, c]
                sums[0, c] += g[b, t, c] * v[b, t, c]
                sums[1, c] += g[b, t, c] * a[b, t, c]
                sums[2, c] -= v[b, t, c] * r[c]
        for c in range(width):
            sums[2, c] -= before * mean[b, c] * r[c]
            gmean[b, c] = before * (gmean[b, c] - gamma[c] * r[c])


def forward(a, v, alpha, beta, gamma, mean, past, causal):
    batch, width = v.shape[0], v.shape[2]
    a, v = np.ascontiguousarray(a), np.ascontiguousarray(v)
    gains = [np.repeat(gain, width // len(alpha)) for gain in (alpha, beta, gamma)]  # [D]
    first = np.zeros((batch, width), v.dtype) if mean is None or not past else np.array(mean, order="C")
    y, last = np.empty_like(v), first.copy()
    _forward(a, v, *gains, past, causal, y, last)
    return (y, last), (a, v, *gains, first, past, causal, len(alpha), mean is not None)


def backward(saved, g_y, g_mean):
    *inputs, heads, carried = saved
    v, first = inputs[1], inputs[5]
    ga, gv, gmean = np.empty_like(v), np.empty_like(v), or_zeros(g_mean, first).copy(order="C")
    sums = np.zeros((3, v.shape[2]), v.dtype)
    _backward(*inputs, np.ascontiguousarray(or_zeros(g_y, v)), gmean, ga, gv, sums)
    return ga, gv, *sums.reshape(3, heads, -1).sum(axis=2), gmean if carried else None
