"""AFT: its half of a block for one token. A mean over the past is three numbers a channel, as in the operators' step:

    a = Σ e^(k_s + w_ts - top) v_s        b = Σ e^(k_s + w_ts - top)        y_t = sigmoid(q_t) a / b

Keys and values of the window lie in rings, position t in row t modulo their size; what has left them is such a mean, with
w = 0. AFT-full's window is the context, in AFT-simple nothing is in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd import no_grad
from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.vectors import assign

from ..ops.aft.cpu_step import gated_mean, join, place
from ..variants import aft
from .shared import FeedForward, Half, Linear, Norm, columns, linear, linear_of, norm, rows

BLOCK = 16  # lags whose exponents are made at a time: they stay in the nearest cache, and a and b are rescaled rarely


class Weights(NamedTuple):
    norm: Norm
    qkv: Linear
    out: Linear  # without rows in a model without output projection
    pos_u: np.ndarray  # [context rank], the bias w = u vᵀ
    pos_v: np.ndarray  # [context rank]
    filters: np.ndarray  # [window D], or the biases by lag


class State(NamedTuple):
    keys: np.ndarray  # [B window D]
    values: np.ndarray  # [B window D]
    mean: np.ndarray  # [B 3 D], a, b and top of what no bias concerns any more


@inner
def _project(x, weights, memory):
    """q, k, v and scratch memory, [B D] each, and where what is left of that begins."""
    count, width = x.shape
    h, at = rows(memory, 0, count, width)
    qkv, at = rows(memory, at, count, 3 * width)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qkv, h, qkv, False)
    q, at = columns(qkv, 0, width, memory, at)
    k, at = columns(qkv, width, width, memory, at)
    v, at = columns(qkv, 2 * width, width, memory, at)
    return q, k, v, h, at


@inner
def _add(y, out, x):
    """x ← x + W y + bias."""
    if len(out.weight):
        linear(out, y, x, True)
    else:
        for b in range(len(x)):
            for c in range(x.shape[1]):
                x[b, c] += y[b, c]


@cpu_kernel
def simple(x, position, weights, state, memory):
    q, k, v, h, _ = _project(x, weights, memory)
    for b in range(len(x)):
        join(k[b : b + 1], v[b : b + 1], 0, state.mean[b], h[b])
        gated_mean(q[b], state.mean[b], h[b])
    _add(h, weights.out, x)


@inner
def _exponents(keys, newest, weights, position, lag, x):
    """k_s + w_ts for s = position - lag, position - lag - 1, ..., the first of which has the newest key."""
    by_lag = len(weights.filters) > 0
    for i in range(x.shape[0]):
        s = place(newest, i, len(keys))
        if by_lag:
            for c in range(x.shape[1]):
                x[i, c] = keys[s, c] + weights.filters[lag + i, c]
        else:
            bias = x.dtype.type(0)
            for r in range(weights.pos_u.shape[1]):
                bias += weights.pos_u[position, r] * weights.pos_v[position - lag - i, r]
            for c in range(x.shape[1]):
                x[i, c] = keys[s, c] + bias


@cpu_kernel
def windowed(x, position, weights, state, memory):
    """The token's key and value become the newest of the rings, and the oldest leave the window."""
    width, size = x.shape[1], state.keys.shape[1]
    newest, seen = position % size, min(position + 1, size)
    q, k, v, h, at = _project(x, weights, memory)
    mean, at = rows(memory, at, 3, width)
    exponents, at = rows(memory, at, BLOCK, width)
    for b in range(len(x)):
        keys, values, past = state.keys[b], state.values[b], state.mean[b]
        assign(keys[newest], k[b])
        assign(values[newest], v[b])
        assign(mean.reshape(-1), past.reshape(-1))
        for lag in range(0, seen, BLOCK):
            block, first = exponents[: min(BLOCK, seen - lag)], place(newest, lag, size)
            _exponents(keys, first, weights, position, lag, block)
            join(block, values, first, mean, h[b])
        gated_mean(q[b], mean, h[b])
        if seen == size:
            oldest = place(newest, size - 1, size)
            join(keys[oldest : oldest + 1], values, oldest, past, k[b])
    _add(h, weights.out, x)


class AFT(Half):
    """What all have: projections, in which what the channels of a head share is there for each of them, and a mean."""

    def wire(self, norm, module, model):
        self._shared, qkv = self.width // module.sizes[1], linear_of(module.qkv)
        if self._shared > 1:
            parts = (np.split(x, np.cumsum(module.sizes)[:-1]) for x in qkv)
            qkv = Linear(*(np.concatenate([q, self._spread(k), v]) for q, k, v in parts))
        out = self.none() if module.out is None else linear_of(module.out)
        ring, mean = (self.batch, self.window(module, model), self.width), (self.batch, 3, self.width)
        return (Weights(norm, qkv, out, *self.biases(module)),
                State(np.empty(ring, self.dtype), np.empty(ring, self.dtype), np.empty(mean, self.dtype)))

    def window(self, module, model) -> int:
        """How many keys and values the rings have."""
        raise NotImplementedError

    def biases(self, module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """pos_u, pos_v and filters; without rows where there are none."""
        return (np.empty((0, 1), self.dtype),) * 3

    def load(self, state, position, rows=slice(None)):
        self._begin(state.average.data, self._spread(state.logsum.data, axis=1), rows)

    def _begin(self, average, logsum, rows: slice) -> None:
        mean = self.state.mean[rows]
        mean[:, 0], mean[:, 1], mean[:, 2] = average, 1, logsum

    def _spread(self, x: np.ndarray, axis: int = 0) -> np.ndarray:
        """H numbers along the axis become D."""
        return np.repeat(x, self._shared, axis=axis)


class Simple(AFT):
    module = aft.AFTSimple
    kernel = staticmethod(simple)

    def window(self, module, model):
        return 0

    def memory(self, module, model):
        return 7 * self.width


class Local(AFT):
    module = aft.AFTLocal
    kernel = staticmethod(windowed)

    def window(self, module, model):
        return min(module.window, model.context)

    def memory(self, module, model):
        return (10 + BLOCK) * self.width

    def biases(self, module):
        return module.pos_u.data, module.pos_v.data, np.empty((0, 1), self.dtype)

    def load(self, state, position, rows=slice(None)):
        super().load(state, position, rows)
        self._fill(state, position, rows)

    def _fill(self, state, position: int, rows: slice) -> None:
        """The newest keys and values go into the rings; the row of the next token stays as it is."""
        size = self.state.keys.shape[1]
        count = min(position, size - 1)
        places, first = np.arange(position - count, position) % size, state.keys.shape[1] - count
        self.state.keys[rows, places] = self._spread(state.keys.data[:, first:], axis=2)
        self.state.values[rows, places] = state.values.data[:, first:]


class Full(Local):
    module = aft.AFTFull

    def window(self, module, model):
        return model.context

    def load(self, state, position, rows=slice(None)):
        self._begin(0, -np.inf, rows)
        self._fill(state, position, rows)


class Conv(Local):
    module = aft.AFTConv

    def window(self, module, model):
        return module.window

    def biases(self, module):
        none = np.empty((0, 1), self.dtype)
        with no_grad():
            filters = self._spread(module.filters().data)
        return none, none, np.ascontiguousarray(filters.T)


HALVES = Simple, Local, Full, Conv, FeedForward
