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

from ..ops.aft.cpu_step import gated_mean, join, place
from ..variants import aft
from .shared import FeedForward, Half, Linear, Norm, linear, linear_of, norm, take

BLOCK = 16  # lags whose exponents are made at a time: they stay in the nearest cache, and a and b are rescaled rarely


class Weights(NamedTuple):
    norm: Norm
    qkv: Linear
    out: Linear  # without rows in a model without output projection
    u: np.ndarray  # [context rank], the bias w = u vᵀ
    v: np.ndarray  # [context rank]
    filters: np.ndarray  # [window D], or the biases by lag


class State(NamedTuple):
    keys: np.ndarray  # [window D]
    values: np.ndarray  # [window D]
    mean: np.ndarray  # [3 D], a, b and top of what no bias concerns any more


@inner
def _project(x, weights, memory):
    """q, k and v, [1 D] each, a vector of scratch memory, and where what is left of that begins."""
    width = x.size
    h, at = take(memory, 0, width)
    qkv, at = take(memory, at, 3 * width)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qkv, h, qkv, False)
    return qkv[:width], qkv[width : 2 * width].reshape(1, width), qkv[2 * width :].reshape(1, width), h, at


@inner
def _add(q, mean, out, y, x):
    """x ← x + W (sigmoid(q) a / b) + bias."""
    gated_mean(q, mean, y)
    if len(out.weight):
        linear(out, y, x, True)
    else:
        for c in range(x.size):
            x[c] += y[c]


@cpu_kernel
def simple(x, position, weights, state, memory):
    q, k, v, h, _ = _project(x, weights, memory)
    join(k, v, 0, state.mean, h)
    _add(q, state.mean, weights.out, h, x)


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
            for r in range(weights.u.shape[1]):
                bias += weights.u[position, r] * weights.v[position - lag - i, r]
            for c in range(x.shape[1]):
                x[i, c] = keys[s, c] + bias


@cpu_kernel
def windowed(x, position, weights, state, memory):
    """The token's key and value become the newest of the rings, and the oldest leave the window."""
    width, size = x.size, len(state.keys)
    newest, rows = position % size, min(position + 1, size)
    q, k, v, h, at = _project(x, weights, memory)
    sums, at = take(memory, at, 3 * width)
    exponents, at = take(memory, at, BLOCK * width)
    mean = sums.reshape(3, width)
    for c in range(width):
        state.keys[newest, c], state.values[newest, c] = k[0, c], v[0, c]
        mean[0, c], mean[1, c], mean[2, c] = state.mean[0, c], state.mean[1, c], state.mean[2, c]
    for lag in range(0, rows, BLOCK):
        count, first = min(BLOCK, rows - lag), place(newest, lag, size)
        block = exponents[: count * width].reshape(count, width)
        _exponents(state.keys, first, weights, position, lag, block)
        join(block, state.values, first, mean, h)
    _add(q, mean, weights.out, h, x)
    if rows == size:
        oldest = place(newest, size - 1, size)
        join(state.keys[oldest : oldest + 1], state.values, oldest, state.mean, h)


class AFT(Half):
    """What all have: projections, in which what the channels of a head share is there for each of them, and a mean."""

    def wire(self, norm, module, model):
        self._shared, qkv = self.width // module.sizes[1], linear_of(module.qkv)
        if self._shared > 1:
            parts = (np.split(x, np.cumsum(module.sizes)[:-1]) for x in qkv)
            qkv = Linear(*(np.concatenate([q, self._spread(k), v]) for q, k, v in parts))
        out, rings = self.none() if module.out is None else linear_of(module.out), (self.window(module, model), self.width)
        return (Weights(norm, qkv, out, *self.biases(module)),
                State(np.empty(rings, self.dtype), np.empty(rings, self.dtype), np.empty((3, self.width), self.dtype)))

    def window(self, module, model) -> int:
        """How many keys and values the rings have."""
        raise NotImplementedError

    def biases(self, module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u, v and filters; without rows where there are none."""
        return (np.empty((0, 1), self.dtype),) * 3

    def load(self, state, position):
        self._begin(state.average.data[0], self._spread(state.logsum.data[0]))

    def _begin(self, average, logsum) -> None:
        self.state.mean[0], self.state.mean[1], self.state.mean[2] = average, 1, logsum

    def _spread(self, x: np.ndarray, axis: int = 0) -> np.ndarray:
        """H numbers along the axis become D."""
        return np.repeat(x, self._shared, axis=axis)


class Simple(AFT):
    module = aft.AFTSimple
    kernel = staticmethod(simple)

    def window(self, module, model):
        return 0

    def memory(self, module, model):
        return 4 * self.width


class Local(AFT):
    module = aft.AFTLocal
    kernel = staticmethod(windowed)

    def window(self, module, model):
        return min(module.window, model.context)

    def memory(self, module, model):
        return (7 + BLOCK) * self.width

    def biases(self, module):
        return module.pos_u.data, module.pos_v.data, np.empty((0, 1), self.dtype)

    def load(self, state, position):
        super().load(state, position)
        self._fill(state, position)

    def _fill(self, state, position: int) -> None:
        """The newest keys and values go into the rings; the row of the next token stays as it is."""
        count = min(position, len(self.state.keys) - 1)
        rows = np.arange(position - count, position) % len(self.state.keys)
        first = state.keys.shape[1] - count
        self.state.keys[rows] = self._spread(state.keys.data[0, first:], axis=1)
        self.state.values[rows] = state.values.data[0, first:]


class Full(Local):
    module = aft.AFTFull

    def window(self, module, model):
        return model.context

    def load(self, state, position):
        self._begin(0, -np.inf)
        self._fill(state, position)


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
