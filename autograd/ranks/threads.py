"""Ranks that are threads of one process: parallel code runs in tests without MPI, and with any number of ranks.

    results = run(3, lambda ranks: ranks.gather(np.array([ranks.rank])))
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, NoReturn, TypeVar

from ..errors import RankError
from . import Communicator

T = TypeVar("T")

PATIENCE = 60.0  # seconds that a rank waits for the others


class _World:
    """What the threads share: what was sent and not read yet, and the error that came first."""

    def __init__(self, size: int):
        self.size = size
        self.sent: dict[tuple[int, int], deque] = {(a, b): deque() for a in range(size) for b in range(size)}
        self.worlds: dict[Any, _World] = {}  # of splits
        self.changed = threading.Condition()
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """End all ranks; the first error is the one that is told."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()
            worlds = list(self.worlds.values())
        for world in worlds:
            world.fail(error)

    def send(self, source: int, target: int, array: Any) -> None:
        """A copy waits until it is read: the array may change at once."""
        with self.changed:
            self.sent[source, target].append(array.copy())
            self.changed.notify_all()

    def receive(self, source: int, target: int) -> Any:
        """The oldest array that was not read yet."""
        waiting = self.sent[source, target]
        with self.changed:
            came = self.changed.wait_for(lambda: waiting or self.error, PATIENCE)
            if waiting:
                return waiting.popleft()
            raise RankError(f"another rank has ended: {self.error}" if came else
                            f"another rank did not come within {PATIENCE:.0f} s") from self.error


class Threads(Communicator):
    """A rank that is a thread; ``run`` makes them."""

    kind = "threads"

    def __init__(self, world: _World, rank: int):
        super().__init__(rank, world.size)
        self._world, self._splits = world, 0

    def split(self, color: int) -> Communicator:
        colors = [int(other) for other in self.gather_bytes(str(color).encode())]
        ranks = [rank for rank, other in enumerate(colors) if other == color]
        self._splits += 1
        with self._world.changed:
            world = self._world.worlds.setdefault((self._splits, color), _World(len(ranks)))
        self.barrier()
        return Threads(world, ranks.index(self.rank))

    def abort(self, code: int = 1) -> NoReturn:
        error = RankError(f"rank {self.rank} ended the job with code {code}")
        self._world.fail(error)
        raise error

    def _exchange(self, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        for other, array in enumerate(outgoing):
            if array is not None and other != self.rank:
                self._world.send(self.rank, other, array)
        for other, array in enumerate(incoming):
            if array is not None and other != self.rank:
                array.reshape(-1)[...] = self._world.receive(other, self.rank).reshape(-1)


def run(size: int, function: Callable[[Communicator], T]) -> list[T]:
    """``function(communicator)`` on so many ranks at once; raises what the first of them that failed raised."""
    world, results = _World(size), [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = function(Threads(world, rank))
        except BaseException as error:
            world.fail(error)

    threads = [threading.Thread(target=copy_context().run, args=(work, rank), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.error is not None:
        raise world.error
    return results
