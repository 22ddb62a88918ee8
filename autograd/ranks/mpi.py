"""Ranks that MPI has started: ``mpiexec -n 4 ...`` or ``srun ...``, with mpi4py and any MPI that it finds.

Calls are begun and then asked for, so that a rank which waits can look around (``waiting``), and leaves its core to others.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from ..errors import RankError
from . import Communicator

INSTALL = 'pip install "minitv[mpi]"'
SPIN, NAP = 0.002, 0.001  # seconds that a rank asks again at once, and the longest that it sleeps between two questions


def missing() -> str | None:
    """What keeps processes from finding each other, or None."""
    if importlib.util.find_spec("mpi4py") is None:
        return f"mpi4py is not installed: {INSTALL}"
    return None


def world() -> MPI:
    """All ranks of the job; RankError says what is missing."""
    if reason := missing():
        raise RankError(reason)
    try:
        from mpi4py import MPI as library
    except Exception as error:  # of whatever kind: it looks for a library of the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RankError(f"mpi4py finds no MPI ({reason}): {INSTALL}") from error
    return MPI(library.COMM_WORLD.Dup())


class MPI(Communicator):
    """A rank of an mpi4py communicator; arrays are NumPy arrays. ``waiting()`` is called now and then while it waits.

    ``calls`` counts what this process has waited for with success.
    """

    kind = "MPI"
    calls = 0

    def __init__(self, comm: Any, waiting: Callable[[], Any] | None = None):
        super().__init__(comm.Get_rank(), comm.Get_size())
        self.comm, self.waiting = comm, waiting

    def barrier(self) -> None:
        self._wait([self.comm.Ibarrier()])

    def split(self, color: int) -> Communicator:
        return MPI(self.comm.Split(color, self.rank), self.waiting)

    def abort(self, code: int = 1) -> NoReturn:
        self.comm.Abort(code)
        raise RankError("MPI did not end the job")

    def _exchange(self, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        requests = [self.comm.Irecv(_bytes(array), i) for i, array in enumerate(incoming)
                    if array is not None and i != self.rank]
        requests += [self.comm.Isend(_bytes(array), i) for i, array in enumerate(outgoing)
                     if array is not None and i != self.rank]
        self._wait(requests)

    def _gather(self, array: Any, out: Any) -> None:
        self._wait([self.comm.Iallgather(_bytes(array), _bytes(out))])

    def _broadcast(self, array: Any, root: int) -> None:
        self._wait([self.comm.Ibcast(_bytes(array), root)])

    def _wait(self, requests: list[Any]) -> None:
        """Until all are done. MPI goes on with them when it is asked, so it is asked often at first."""
        from mpi4py.MPI import Request

        begun = looked = time.perf_counter()
        nap = NAP / 32
        while not Request.Testall(requests):
            now = time.perf_counter()
            if now - begun > SPIN:
                time.sleep(nap)
                nap = min(2 * nap, NAP)
            else:
                time.sleep(0)
            if self.waiting is not None and now - looked > 0.1:
                looked = now
                self.waiting()
        MPI.calls += 1


def _bytes(array: np.ndarray) -> np.ndarray:
    """The memory of a C-contiguous array, of any dtype, such as those that MPI has no word for."""
    return array.reshape(-1).view(np.uint8)
