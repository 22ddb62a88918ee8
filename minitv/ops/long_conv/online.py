"""long_conv position by position: each output as soon as its input is known, the state an explicit value.

The *direct* way sums over all inputs for each output: t products a channel at position t. The *relaxed* way (van der Hoeven
2002, doi 10.1006/jsco.2002.0562; in language models Oncescu et al. 2024, arXiv 2410.12982) keeps the past in blocks whose
sizes are the binary digits of t. A block has ready what its inputs add to as many positions after it:

    t = 11 = 1011₂     x₀ … x₇ | x₈ x₉ | x₁₀ |     y₁₁ = filter₀ x₁₁ + a value that each of the three blocks has ready

With x₁₁, the blocks of 2 and 1 become one of 4, by one convolution. Every input meets every later output in exactly one
block, and T positions take T log² T. Here sizes are multiples of ``block``, and the inputs since the last multiple are summed
directly: with a block as long as the sequence, all are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from autograd import Tensor, concat, flip, getitem, sum
from autograd.device import namespace

BLOCK = 64  # inputs that are summed one by one, those before in blocks; where a CPU is fastest


class Block(NamedTuple):
    """Inputs [B n D], and what they add to the n outputs after them, [B n D]."""

    inputs: Tensor
    ahead: Tensor


class Past(NamedTuple):
    """What has been read: blocks, the largest first, and the inputs [B r D] after them."""

    blocks: tuple[Block, ...]
    recent: Tensor

    @property
    def position(self) -> int:
        """How many inputs have been read."""
        return self.recent.shape[1] + int(np.sum([block.inputs.shape[1] for block in self.blocks], dtype=int))


def begin(batch: int, filter: Tensor) -> Past:
    """Nothing has been read; what will be is of the filter's width and dtype, on its device."""
    taps = filter.data
    return Past((), Tensor(namespace(taps).zeros((batch, 0, taps.shape[1]), taps.dtype)))


def read(x: Tensor, past: Past, filter: Tensor, skip: Tensor | None = None, *, convolve: Callable,
         block: int) -> tuple[Tensor, Past]:
    """The outputs for the next inputs x[B T D], and the past with them: ``convolve``, long_conv or one of its forms, over all
    inputs, cut anywhere.
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
    y = sum(_rows(recent, recent.shape[1] - taps, None) * flip(filter[:taps], axis=0), axis=1, keepdims=True)
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
    """The block of these inputs."""
    nothing = Tensor(namespace(inputs.data).zeros_like(inputs.data))
    return Block(inputs, convolve(nothing, filter, None, None, inputs)[0])


def _rows(x, start, stop):
    return getitem(x, key=(slice(None), slice(start, stop)))
