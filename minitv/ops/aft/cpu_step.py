"""AFT at one position: a mean over the past is three numbers a channel, mean[3 C], relative to its largest exponent:

    a = Σ e^(k_s + w_ts - top) v_s        b = Σ e^(k_s + w_ts - top)        y_t = sigmoid(q_t) a / b

Exponents x = k + w join it in blocks. Before the first a = b = 0 and top is LOWEST, so that x = -∞ is no key; where all x are
finite, a mean that nothing has joined may have b = 1 and top = -∞.
"""

from __future__ import annotations

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.math import exp

from . import common
from .cpu import LOWEST


@inner
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


def _mean(exponents, v):
    """a, b and top [3 B C] of everything, x and v[B S C] from the oldest to the newest."""
    mean = np.zeros((3, len(v), v.shape[2]), v.dtype)
    mean[2] = LOWEST
    highest, newest_first, v = np.empty(v.shape[2], v.dtype), np.ascontiguousarray(exponents[:, ::-1]), np.ascontiguousarray(v)
    for b in range(len(v)):
        state = np.ascontiguousarray(mean[:, b])
        join(newest_first[b], v[b], v.shape[1] - 1, state, highest)
        mean[:, b] = state
    return mean


def _read(q, exponents, v):
    """y[B 1 C], which is 0 where there is no key, and the mean."""
    mean, y = _mean(exponents, v), np.empty(q.shape, q.dtype)
    there = mean[1] > 0
    gated_mean(np.ascontiguousarray(q).reshape(-1), np.where(there, mean, 1).reshape(3, -1), y.reshape(-1))
    return np.where(there[:, None], y, 0), mean


def _state(mean):
    """average and logsum [B C]."""
    a, b, top = mean
    with np.errstate(divide="ignore"):
        return np.divide(a, b, out=np.zeros_like(a), where=b > 0), np.log(b) + top


def simple_forward(q, k, v, mask, average, logsum):
    k, v = common.everything(k, v, mask, average, logsum)
    y, mean = _read(q, k, v)
    return (y, *_state(mean)), None


def full_forward(q, k, v, bias, mask):
    k, v = common.everything(k, v, mask)
    return _read(q, k + bias[0, :, None], v)[0], None


def local_forward(q, k, v, bias, mask, average, logsum, keys, values):
    """Also aft_conv's: bias[H W] for every head, where 1 may stand for H."""
    bias = bias.T  # [W H]
    k, v = common.everything(k, v, mask, average, logsum, keys, values)
    near, reach, size = min(len(bias), k.shape[1]), len(bias) - 1, v.shape[2] // k.shape[2]
    exponents = k.copy()
    exponents[:, k.shape[1] - near :] += bias[:near][::-1]
    y, _ = _read(q, np.repeat(exponents, size, axis=2), v)
    left = max(k.shape[1] - reach, 0)
    average, logsum = _state(_mean(np.repeat(k[:, :left], size, axis=2), v[:, :left]))
    return (y, average, logsum[:, ::size], common.newest(k, reach, -math.inf), common.newest(v, reach, 0)), None


def local_supports(v, causal):
    if not v.shape[2]:
        return "needs at least one channel"
    return None if causal else "a window that looks ahead"


conv_forward, conv_supports = local_forward, local_supports
