"""Hyena: its mixer for one token. Long convolutions are those of minitv/ops/long_conv/online.py, in arrays for the context:

    y_t = sums_t + skip a_t + Σ_{s = border .. t} filter_{t-s} a_s         border: the last multiple of the block size

A block that ends adds what its inputs contribute to the positions after it to their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd import Tensor
from autograd.cpu.compile import cpu_kernel
from autograd.cpu.vectors import assign

from ..ops import long_conv
from ..ops.long_conv import online
from ..ops.long_conv.cpu import step
from ..variants import hyena
from .shared import FeedForward, Half, Linear, Norm, linear, linear_of, norm, rows, take


class Weights(NamedTuple):
    norm: Norm
    project: Linear
    taps: np.ndarray  # [taps (order + 1) D] of the short convolution, the present first
    bias: np.ndarray  # [(order + 1) D]
    skip: np.ndarray  # [order-1 D]
    filters: np.ndarray  # [order-1 context D]
    out: Linear
    block: int


class State(NamedTuple):
    """Row t of ``recent``, modulo their number, is what the short convolution read at position t."""

    recent: np.ndarray  # [B taps (order + 1) D]
    inputs: np.ndarray  # [B order-1 context D]
    sums: np.ndarray  # [B order-1 context D], what blocks that have ended add to later positions


@cpu_kernel
def mix(x, position, weights, state, memory):
    """x += W (v · gate) after all long convolutions; the token's projections and inputs of these join the state."""
    (count, width), orders, taps = x.shape, state.inputs.shape[1], weights.taps
    h, at = rows(memory, 0, count, width)
    projected, at = rows(memory, at, count, taps.shape[1])
    z, at = take(memory, at, taps.shape[1])
    v, newest = z[(orders + 1) * width :], position % len(taps)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.project, h, projected, False)
    for b in range(count):
        assign(state.recent[b, newest], projected[b])
        assign(z, weights.bias)
        step(taps, state.recent[b], newest, min(len(taps), position + 1), z)
        for o in range(orders):
            gate, inputs, ready, skip = (orders - o) * width, state.inputs[b, o], state.sums[b, o, position], weights.skip[o]
            for c in range(width):
                inputs[position, c] = v[c] * z[gate + c]
            for c in range(width):
                v[c] = ready[c] + skip[c] * inputs[position, c]
            step(weights.filters[o], inputs, position, position % weights.block + 1, v)
        for c in range(width):
            h[b, c] = v[c] * z[c]
    linear(weights.out, h, x, True)


class LongConvolutions(Half):
    module = hyena.Hyena
    kernel = staticmethod(mix)

    def wire(self, norm, module, model):
        project, taps = linear_of(module.project), np.ascontiguousarray(module.short.data.T[::-1])
        bias = np.zeros_like(project.bias) if module.short_bias is None else module.short_bias.data
        shape = module.order - 1, model.context, self.width
        filters, inputs, sums = (np.zeros((*batch, *shape), self.dtype) for batch in ((), (self.batch,), (self.batch,)))
        weights = Weights(norm, project, taps, bias, module.skip.data.reshape(-1, self.width), filters, linear_of(module.out),
                          online.BLOCK)
        return weights, State(np.zeros((self.batch, *taps.shape), self.dtype), inputs, sums)

    def memory(self, module, model):
        return self.width + 2 * len(module.short)

    def load(self, state, position, rows=slice(None)):
        recent, count = state.recent.data, self.state.recent.shape[1]
        self.state.recent[rows, np.arange(position - recent.shape[1], position) % count] = recent
        self.state.sums[rows] = 0
        for o, past in enumerate(state.pasts):
            self.weights.filters[o], start = state.filters[o].data, 0
            for block in past.blocks:
                start = self._join(o, start, block, rows)
            self.state.inputs[rows, o, start:position] = past.recent.data

    def _join(self, o: int, start: int, block: online.Block, rows: slice = slice(None)) -> int:
        """Take a block of convolution o that begins here, of some sequences; where it ends."""
        inputs, ahead = (a.data for a in block)
        stop = start + inputs.shape[1]
        self.state.inputs[rows, o, start:stop] = inputs
        later = self.state.sums[rows, o, stop : stop + ahead.shape[1]]
        later += ahead[:, : later.shape[1]]
        return stop

    def __call__(self, x, position):
        super().__call__(x, position)
        stop, size = position + 1, self.weights.block
        count, rest = divmod(stop, size)
        if not rest and stop < self.state.inputs.shape[2]:
            start = stop - size * (count & -count)
            for o, filter in enumerate(self.weights.filters):
                inputs = Tensor.wrap(self.state.inputs[:, o, start:stop])
                self._join(o, start, online.close(inputs, Tensor.wrap(filter), long_conv))


HALVES = LongConvolutions, FeedForward
