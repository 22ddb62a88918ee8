"""Hyena's mixer for one token. Long convolutions are those of minitv/ops/long_conv/online.py, in arrays for the whole context:

    y_t = sums_t + skip a_t + Σ_{s = border .. t} filter_{t-s} a_s         border: the last multiple of the block size

A block that ends adds what its inputs contribute to the positions after it to their sums.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.kernels import cpu_kernel

from ..ops.long_conv import online
from .cpu import Half, affine, linear, norm, take


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
def _step(x, past, border, affine, eps, centered, project, project_bias, short, short_bias, skip, out, out_bias, filters,
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


class LongConvolution(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        project, taps = affine(module.project), np.ascontiguousarray(module.short.data.T[::-1])  # the first is the present
        bias = np.zeros_like(project[1]) if module.short_bias is None else module.short_bias.data
        self._block, self._context, self._recent = module.online_block, model.context, np.zeros_like(taps)
        self._filters, self._inputs, self._sums = (
            np.zeros((module.order - 1, model.context, self.width), self.dtype) for _ in range(3))
        self._given = (*self.norm, *project, taps, bias, module.skip.data.reshape(-1, self.width), *affine(module.out),
                       self._filters, self._recent, self._inputs, self._sums, self.memory(self.width, taps.shape[1]))

    def load(self, state) -> None:
        position, recent = state.pasts[0].position, state.recent.data[0]
        self._recent[np.arange(position - len(recent), position) % len(self._recent)] = recent
        self._sums[:] = 0
        for o, past in enumerate(state.pasts):
            self._filters[o], start = state.filters[o].data, 0
            for block in past.blocks:
                start = self._join(o, start, block)
            self._inputs[o, start:position] = past.recent.data[0]

    def _join(self, o: int, start: int, block: online.Block) -> int:
        """Take a block of convolution o that begins here; where it ends."""
        inputs, ahead = (a.data[0] for a in block)
        stop = start + len(inputs)
        self._inputs[o, start:stop] = inputs
        self._sums[o, stop : stop + len(ahead)] += ahead[: self._context - stop]
        return stop

    def __call__(self, x: np.ndarray, position: int) -> None:
        _step(x, position, position - position % self._block, *self._given)
        stop = position + 1
        count, rest = divmod(stop, self._block)
        if not rest and stop < self._context:
            start = stop - self._block * (count & -count)
            for o, filter in enumerate(self._filters):
                inputs = Tensor.wrap(self._inputs[o, None, start:stop])
                self._join(o, start, online.close(inputs, Tensor.wrap(filter)))
