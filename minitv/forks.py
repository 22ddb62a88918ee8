"""Copies of this process, made by fork, that compute parts of every training step.

Threads take turns in Python: in a step of small layers they wait for each other for a fifth of the time. Copies do not. What
they have in common are arrays of ``shared``; messages are pickled. A copy knows what this process knew when it was made.

There are none but on Linux: the libraries of other systems do not survive a fork, or there is none.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from autograd.cpu.process import return_memory

from .errors import RunError
from .signals import NUMBERS

AVAILABLE = sys.platform == "linux"
DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG of sys/prctl.h


def shared(like: np.ndarray) -> np.ndarray:
    """Zeros as many as ``like`` has numbers, which this process and its later copies see and write."""
    return np.frombuffer(mmap.mmap(-1, max(1, like.nbytes)), like.dtype, like.size)


def packed(*message: Any) -> bytes | None:
    """A message for ``Forks.ask``; None where a part of it cannot be pickled."""
    with suppress(Exception):  # classes raise what they like
        return bytes(ForkingPickler.dumps(message))
    return None


class Forks:
    """``count`` copies of this process; copy i answers ``ask(i, packed(...))`` by ``serve(i, ...)``.

    They are made by the main thread, with which they end, while no other thread computes. OSError where the system permits no
    more processes.
    """

    def __init__(self, count: int, serve: Callable[..., Any]):
        self.owner = os.getpid()
        self._ends: list[Connection] = []
        self._processes: list[int] = []
        self._end = weakref.finalize(self, _end, self.owner, self._ends, self._processes)
        return_memory()  # else every page that is free is copied when it is used
        came: list[int] = []  # signals wait until each copy is known here and knows that it is one
        before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in NUMBERS
                  if signal.getsignal(number) is not None}
        try:
            try:
                for number in range(count):
                    self._fork(partial(serve, number))
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
            for number in came:
                signal.raise_signal(number)
        except BaseException:  # the system refuses, or a signal came
            self.close()
            raise

    def _fork(self, serve: Callable[..., Any]) -> None:
        """Make one more copy."""
        ours, theirs = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of other threads: they are idle
            process = os.fork()
        if process == 0:
            _live(self.owner, theirs, [*self._ends, ours], serve)
        self._ends.append(ours)
        self._processes.append(process)
        theirs.close()

    def ask(self, number: int, message: bytes) -> Any:
        """What copy ``number`` answers; raises what it has raised."""
        try:
            self._ends[number].send_bytes(message)
            well, answer = self._ends[number].recv()
        except (EOFError, OSError):
            raise RunError(f"process {self._processes[number]}, which computes a part of each step, has ended: something "
                           "killed it, perhaps the system, because no memory was left") from None
        if not well:
            raise answer
        return answer

    def close(self) -> None:
        """End the copies, whatever they are doing."""
        self._end()


def _end(owner: int, ends: Sequence[Connection], processes: Sequence[int]) -> None:
    if os.getpid() != owner:  # in a copy of this process, these are names of processes that are not its children
        return
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for process in processes:
        with suppress(ChildProcessError):  # where SIGCHLD is ignored, the system has forgotten it
            os.waitpid(process, 0)
    for end in ends:
        end.close()


def _live(owner: int, end: Connection, others: Sequence[Connection], serve: Callable[..., Any]) -> None:
    """The life of a copy, from which it does not return."""
    try:
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all; this process's parent obeys them
        signal.set_wakeup_fd(-1)
        ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)
        if os.getppid() != owner:
            return
        for other in others:
            other.close()
        gc.freeze()  # what is there is not searched again, which would write to every page of it
        while True:
            content = end.recv_bytes()
            try:
                answer = True, serve(*pickle.loads(content))
            except BaseException as error:
                answer = False, _portable(error)
            end.send(answer)
    except (EOFError, OSError):
        pass  # nobody asks any more
    finally:
        os._exit(0)


def _portable(error: BaseException) -> BaseException:
    """The error, or what it says where it cannot be sent."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # of whatever kind: classes of errors may need more than their message
        return RuntimeError(f"{type(error).__name__}: {error}")
