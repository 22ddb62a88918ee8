"""long_conv position by position, as a model generates: each output as soon as its input is known.

A convolution has no state of fixed size: every input meets every later output, each pair with a tap of its own. There are two
ways. The *direct* sum Σ_s filter_s x_{t-s} costs t products per channel at position t, O(T²) for T positions. The *relaxed*
convolution (van der Hoeven 2002, doi 10.1006/jsco.2002.0562; in language models Oncescu et al. 2024, arXiv 2410.12982) costs
O(T log² T). It cuts the past into blocks whose sizes are the binary digits of t. A block of n inputs adds something to each of
the n outputs after it, and all these sums are computed at once, by one Fourier transform, when the block is formed:

    t = 11 = 8 + 2 + 1     x₀ ... x₇ | x₈ x₉ | x₁₀ |     y₁₁ = filter₀ x₁₁ + one number that each of the three blocks has ready

Once x₁₁ is there, t is 12 = 8 + 4. So x₁₁ and the blocks of 1 and 2 become one block of 4, which computes its sums for y₁₂ to
y₁₅; the block of 8 had its sums for y₈ to y₁₅ ready from the start. In this way every input meets every later output once.
A block of n is formed once in 2 n positions and costs O(n log n), so each of the log T sizes costs O(log T) per position.

Transforms of few points are slower than direct sums. So the sizes here are multiples of ``block``, and the inputs since the
last multiple are summed directly. With a block as long as the sequence, all of them are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from autograd import Tensor, concat, flip, getitem, sum
from autograd.device import namespace

BLOCK = 64  # the smallest block, and fewer inputs than this are summed directly; the fastest size on a CPU


class Block(NamedTuple):
    """A block of n inputs, and the sums that they add to the n outputs after them."""

    inputs: Tensor  # [B n D]
    ahead: Tensor  # [B n D]


class Past(NamedTuple):
    """All inputs so far: blocks, the largest first, and the inputs after them, which are fewer than ``block``."""

    blocks: tuple[Block, ...]
    recent: Tensor  # [B r D]

    @property
    def position(self) -> int:
        """The number of inputs so far."""
        return self.recent.shape[1] + int(np.sum([block.inputs.shape[1] for block in self.blocks], dtype=int))


def begin(batch: int, filter: Tensor) -> Past:
    """The past before the first input, with the width, dtype and device of the filter [L D]."""
    taps = filter.data
    return Past((), Tensor(namespace(taps).zeros((batch, 0, taps.shape[1]), taps.dtype)))


def read(x: Tensor, past: Past, filter: Tensor, skip: Tensor | None = None, *, convolve: Callable,
         block: int) -> tuple[Tensor, Past]:
    """The outputs y[B T D] for the next inputs x[B T D], and the past with these inputs.

    A text may be cut into calls anywhere. ``convolve`` is long_conv or one of its forms; filter[L D], skip[D].
    """
    if x.shape[1] == 1:
        return _read_one(x, past, filter, skip, block, convolve)
    history = concat([*(b.inputs for b in past.blocks), past.recent], axis=1)
    y, _ = convolve(x, filter, skip, None, history)
    inputs, blocks, start = concat([history, x], axis=1), [], 0
    count = inputs.shape[1] // block
    for digit in reversed(range(count.bit_length())):
        if count >> digit & 1:
            stop = start + (block << digit)
            blocks.append(close(_rows(inputs, start, stop), filter, convolve))
            start = stop
    return y, Past(tuple(blocks), _rows(inputs, start, None))


def _read_one(x, past, filter, skip, block, convolve):
    blocks, recent = past.blocks, concat([past.recent, x], axis=1)
    taps = min(recent.shape[1], filter.shape[0])
    y = sum(_rows(recent, recent.shape[1] - taps, None) * flip(filter[:taps], axis=0), axis=1, keepdims=True)  # [B 1 D]
    if skip is not None:
        y = y + skip * x
    after = recent.shape[1] - 1  # positions between a block and this one
    for inputs, ahead in reversed(blocks):
        y = y + _rows(ahead, after, after + 1)
        after += inputs.shape[1]
    if recent.shape[1] < block:
        return y, Past(blocks, recent)
    merged = [recent]
    while blocks and blocks[-1].inputs.shape[1] == int(np.sum([part.shape[1] for part in merged])):
        merged.insert(0, blocks[-1].inputs)
        blocks = blocks[:-1]
    return y, Past((*blocks, close(concat(merged, axis=1), filter, convolve)), _rows(x, 1, None))


def close(inputs: Tensor, filter: Tensor, convolve: Callable) -> Block:
    """The block of inputs[B n D], with the sums for the n outputs after it: n inputs of 0 follow."""
    nothing = Tensor(namespace(inputs.data).zeros_like(inputs.data))
    return Block(inputs, convolve(nothing, filter, None, None, inputs)[0])


def _rows(x, start, stop):
    return getitem(x, key=(slice(None), slice(start, stop)))
