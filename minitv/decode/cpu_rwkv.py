"""RWKV's two halves of a block for one token; the state is that of minitv/ops/wkv/cpu.py, with top = p and lag = 0."""

from __future__ import annotations

from autograd.cpu.compile import cpu_kernel

from ..ops.gated.cpu import sigmoid_row
from ..ops.wkv.cpu import _advance, _excess, _shares
from .cpu import activate, linear, norm, take


@cpu_kernel
def _shift(x, before, mix, weight, none, mixed, y):
    """y = W (mix x + (1 - mix) x_{t-1})."""
    one = x.dtype.type(1)
    for c in range(x.size):
        mixed[c] = mix[c] * x[c] + (one - mix[c]) * before[c]
    linear(weight, none, mixed, y, False)


@cpu_kernel
def _wkv(k, v, w, u, a, b, p, y):
    """y = (e^p a + e^(u + k) v) / (e^p b + e^(u + k)); then a, b and p go on."""
    zero = k.dtype.type(0)
    for c in range(k.size):
        past, present = _shares(_excess(p[c], zero, w[c], k[c], u[c]), b[c])
        y[c] = past * a[c] + present * v[c]
        a[c], b[c], top, lag, _, _ = _advance(a[c], b[c], p[c], zero, w[c], k[c], v[c])
        p[c] = top + lag * w[c]


@cpu_kernel
def time_mix(x, affine, eps, centered, mixes, key, value, receptance, out, none, w, u, state, memory):
    h, at = take(memory, 0, x.size)
    mixed, at = take(memory, at, x.size)
    k, at = take(memory, at, x.size)
    v, at = take(memory, at, x.size)
    r, at = take(memory, at, x.size)
    norm(x, affine, eps, centered, h, memory[at:])
    _shift(h, state[0], mixes[0], key, none, mixed, k)
    _shift(h, state[0], mixes[1], value, none, mixed, v)
    _shift(h, state[0], mixes[2], receptance, none, mixed, r)
    state[0] = h
    _wkv(k, v, w, u, state[1], state[2], state[3], mixed)
    sigmoid_row(mixed, r, k)
    linear(out, none, k, x, True)


@cpu_kernel
def channel_mix(x, affine, eps, centered, mixes, key, value, receptance, none, activation, state, memory):
    h, at = take(memory, 0, x.size)
    mixed, at = take(memory, at, x.size)
    r, at = take(memory, at, x.size)
    wide, at = take(memory, at, len(key))
    activated, at = take(memory, at, len(key))
    norm(x, affine, eps, centered, h, memory[at:])
    _shift(h, state, mixes[0], key, none, mixed, wide)
    _shift(h, state, mixes[1], receptance, none, mixed, r)
    state[:] = h
    activate(wide, activation, activated, memory[at:])
    linear(value, none, activated, mixed, False)
    sigmoid_row(mixed, r, h)
    for c in range(x.size):
        x[c] += h[c]
