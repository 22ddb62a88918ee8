"""Sums over rows on a GPU, always in one order: without atomics, which add in any."""

import numpy as np

from ..device import namespace
from .source import Source, ceil_div, columns, contiguous

NUMBERS = {np.dtype(np.float32): ("-DNumber=float",), np.dtype(np.float64): ("-DNumber=double",)}
SOURCE = Source(__file__, NUMBERS.values())


def sum_rows(source, name, across, rows, shape, arrays, numbers):
    """The sum over rows of an array [rows, *shape] that only the kernel ``name`` (*arrays, sums, *numbers, chunk) sees.

    It sums ``chunk`` rows at once, for each of its blocks ``across`` and each chunk into sums[chunks, *shape], as ``sum_rows``
    of kernel.cuh does; here the chunks are summed.
    """
    chunk = max(128, ceil_div(rows, 65535))  # so that the chunks fit into the second size of a grid
    sums = namespace(*arrays).empty((ceil_div(rows, chunk), *shape), np.float32)
    source.launch(name, (across, len(sums)), *arrays, sums, *numbers, chunk)
    return sums.sum(axis=0)


def add_rows(target, ids, rows) -> None:
    """target[ids[i]] += rows[i] for contiguous arrays [V D], [N], [N D] of float32 or float64; ids out of range do nothing."""
    if not rows.size or not target.size:
        return
    xp, (size, width) = namespace(target), target.shape
    order = xp.argsort(ids, kind="stable")
    starts = xp.searchsorted(ids[order], xp.arange(size + 1))
    SOURCE.launch("mtv_rows_add", (size, columns(width)), contiguous(rows), order, starts, target, width,
                  options=NUMBERS[target.dtype])
