"""Ranks: the processes of one job, and the few words in which they talk.

    ranks = mpi.world()                     or Communicator(), which is alone; or nccl.NCCL(mpi.world()) for arrays on cards
    ranks.sum(gradient)                     in place
    everybody = ranks.gather(mine)          [R ...]
    mine = ranks.reduce_scatter(shares)     of shares [R ...]

Every rank calls the same words in the same order, with arrays of the same shapes and dtypes; ``exchange`` concerns those ranks
alone that send or receive something. Sums are made in the order of ranks, whatever carries the bytes, so that all kinds give
the same bits. A kind is a file: it says how blocks are exchanged, and the words follow from that.

| file | kind |
|---|---|
| this one | one rank that is alone |
| `threads.py` | threads of one process, for tests |
| `mpi.py` | processes that MPI has started (mpi4py), with NumPy arrays |
| `nccl.py` | the same with a card each, and CuPy arrays |
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from ..device import is_cupy, namespace
from ..errors import ShapeError

SMALL = 2**16  # bytes of an array that every rank sums on its own


class Communicator:
    """A rank that is alone, and the words of all kinds: ``rank`` is the number of this one, ``size`` how many there are.

    ``sent`` counts the bytes that this rank has given to others.
    """

    kind = "none"

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size, self.sent = rank, size, 0

    def sum(self, array: Any) -> None:
        """array[...] = the sum over all ranks, in place; the array is C-contiguous."""
        _contiguous("sum", array)
        if self.size == 1:
            return
        flat = array.reshape(-1)
        if array.nbytes <= SMALL:
            flat[...] = _in_order(self.gather(flat))
            return
        edges = [flat.size * i // self.size for i in range(self.size + 1)]  # each rank sums a part
        parts = [flat[a:b] for a, b in pairwise(edges)]
        blocks = namespace(flat).empty((self.size, len(parts[self.rank])), flat.dtype)
        self.exchange(parts, list(blocks))
        parts[self.rank][...] = _in_order(blocks)
        self.exchange([parts[self.rank]] * self.size, parts)

    def gather(self, array: Any) -> Any:
        """The arrays of all ranks [R ...], on every rank."""
        array = namespace(array).ascontiguousarray(array).reshape(array.shape)
        out = namespace(array).empty((self.size, *array.shape), array.dtype)
        self.sent += array.nbytes * (self.size - 1)
        out[self.rank] = array
        if self.size > 1:
            self._gather(array, out)
        return out

    def reduce_scatter(self, array: Any) -> Any:
        """The sum over ranks of array[R ...] at this rank's index, [...]: what each rank has for this one, added up."""
        if len(array) != self.size:
            raise ShapeError(f"reduce_scatter: array has {len(array)} blocks, allowed: one for each of {self.size} ranks")
        xp = namespace(array)
        blocks = xp.empty((self.size, *array.shape[1:]), array.dtype)
        self.exchange([xp.ascontiguousarray(block).reshape(block.shape) for block in array], list(blocks))
        return _in_order(blocks)

    def exchange(self, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        """Send outgoing[i] to rank i, and fill incoming[i] with what rank i sends here; None where nothing is sent.

        Arrays are C-contiguous, and what one rank sends has the size that the other one expects.
        """
        for blocks in (outgoing, incoming):
            if len(blocks) != self.size:
                raise ShapeError(f"exchange: {len(blocks)} blocks, allowed: one for each of {self.size} ranks, or None")
            for block in blocks:
                if block is not None:
                    _contiguous("exchange", block)
        self.sent += sum(block.nbytes for i, block in enumerate(outgoing) if block is not None and i != self.rank)
        mine = incoming[self.rank]
        if mine is not None and mine is not outgoing[self.rank]:
            mine[...] = outgoing[self.rank]
        if self.size > 1:
            self._exchange(outgoing, incoming)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """array[...] = that of rank ``root``, in place; the array is C-contiguous."""
        _contiguous("broadcast", array)
        if self.rank == root:
            self.sent += array.nbytes * (self.size - 1)
        if self.size > 1:
            self._broadcast(array, root)

    def barrier(self) -> None:
        """Go on when all ranks are here."""
        self.gather(np.zeros(1, np.uint8))

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """What each rank has to say, of any length, on every rank."""
        sizes = self.gather(np.array(len(content), np.int64)).tolist()
        block = np.zeros(max(sizes), np.uint8)
        block[: len(content)] = np.frombuffer(content, np.uint8)
        return [row[:size].tobytes() for row, size in zip(self.gather(block), sizes, strict=True)]

    def split(self, color: int) -> Communicator:
        """The communicator of the ranks that give the same color, in the same order."""
        return Communicator()

    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks at once, wherever they are, with an exit code."""
        os._exit(code)

    # -- what a kind has of its own; ``array`` and ``out`` are C-contiguous, and this rank's own block is there already

    def _exchange(self, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        raise NotImplementedError

    def _gather(self, array: Any, out: Any) -> None:
        self._exchange([array.reshape(-1)] * self.size, list(out.reshape(self.size, -1)))

    def _broadcast(self, array: Any, root: int) -> None:
        nothing = [None] * self.size
        incoming = [array if i == root else None for i in range(self.size)]
        self._exchange([array] * self.size if self.rank == root else nothing, incoming)


def pieces(array: Any, nbytes: int) -> list[Any]:
    """A C-contiguous array as flat views of at most so many bytes."""
    flat = array.reshape(-1)
    length = max(1, nbytes // flat.itemsize)
    return [flat[i * length:(i + 1) * length] for i in range(math.ceil(flat.size / length))]


def _in_order(blocks: Any) -> Any:
    """The sum of blocks[R ...] over the first axis: the first and the second, then the third, ..."""
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return total


def _contiguous(word: str, array: Any) -> None:
    if not (is_cupy(array) or isinstance(array, np.ndarray)) or not array.flags.c_contiguous:
        raise ShapeError(f"{word}: a {type(array).__name__} that is not contiguous in memory, allowed: a C-contiguous array")
