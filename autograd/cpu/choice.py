"""Which of several ways to compute the same is the fastest on this machine: measured once, and written down.

Ways differ in rounding. So that a run gives the same bits each time, the first process that needs a choice measures, and puts
the answer beside the compiled kernels; every later one reads it. If two processes measure at the same time, the file of one
appears, and both go by it. What cannot be kept is not measured: without a folder that can be written, a rule decides. A new
folder is a new measurement. Where two ways are about as fast, it may come out differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np

from .. import private
from . import companion
from .disk import cache_directory, say
from .process import blas_threads, processor

SECONDS, ROUNDS = 0.08, 5  # all measurements take so long, and every way is measured so often at least
MARGIN = 0.95  # the way of the rule is left for one that takes less than this share of its time
CHOOSES_BLAS = ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "BLIS_ARCH_TYPE")  # what its code depends on
_lock = threading.Lock()


class Choice(NamedTuple):
    """The way that runs, and why."""

    way: str
    why: str


def choose(name: str, ways: Callable[[], Mapping[str, Sequence[Callable]]], rule: str) -> Choice:
    """The way that was written down for this machine, or else the fastest, which then is; by ``rule`` if that is impossible.

    ``ways()`` has for every way the same calls in the same order. BLAS has one thread.
    """
    if companion.alone:  # where kernels do nothing
        return Choice(rule, "by rule: a companion measures nothing")
    with _lock:
        folder = cache_directory()
        if folder is None:
            return Choice(rule, "by rule: no folder keeps what is measured")
        path = folder / f"{name}-{_machine()}.json"
        try:
            found = _read(path) or _keep(path, _measured(ways(), rule))
        except OSError as error:
            say(f"{folder}: {error.strerror}; by rule {rule} computes {name}")
            return Choice(rule, f"by rule: {error.strerror}")
        except (ValueError, KeyError, TypeError):
            say(f"{path}: a damaged file; by rule {rule} computes {name}, and a measurement decides once the file is deleted")
            return Choice(rule, "by rule: the file of what was measured is damaged")
        return found


def kept(name: str) -> Choice | None:
    """The way that was written down, if there is one."""
    folder = cache_directory()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _read(folder / f"{name}-{_machine()}.json") if folder else None
    return None


def _machine() -> str:
    """A hash of what the times depend on; the folder has one of the sources of kernels, and of what Numba compiles for."""
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    facts = (processor(), llvm.get_host_cpu_name(), numba.config.CPU_FEATURES, np.__version__, blas["name"], blas["version"],
             [os.environ.get(name) for name in CHOOSES_BLAS])
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> Choice | None:
    """What a file says; None where there is none. ValueError, KeyError or TypeError if it says nothing of the kind."""
    try:
        with open(path, encoding="utf-8") as file:
            if not private.trusted(os.fstat(file.fileno())):
                raise PermissionError(0, "a file that others could write")
            found = json.load(file)
    except FileNotFoundError:
        return None
    times = found["milliseconds"]
    way, *others = sorted(times, key=lambda name: (name != found["way"], times[name]))
    if way != found["way"]:
        raise ValueError(way)
    shares = ", ".join(f"{times[way] / times[other]:.2f} of the time of {other}" for other in others)
    return Choice(way, f"measured here: {shares}")


def _keep(path: Path, found: dict) -> Choice:
    """Write down what was found, unless another process has done so; then that counts."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(found, file)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike os.replace, this leaves a file that is there
    finally:
        os.unlink(temporary)
    return _read(path)


def _measured(ways: Mapping[str, Sequence[Callable]], rule: str) -> dict:
    """The milliseconds of all calls of each way, of each call the shortest, and the way to go."""
    exact = time.get_clock_info("thread_time").resolution < 1e-5
    clock = time.thread_time if exact else time.perf_counter  # other programs then hardly count
    best = {name: [float("inf")] * len(calls) for name, calls in ways.items()}
    with blas_threads(1):
        for calls in ways.values():
            for call in calls:
                call()
        end, rounds = clock() + SECONDS, 0
        while rounds < ROUNDS or clock() < end:
            rounds += 1
            for i in range(len(ways[rule])):
                for name, calls in ways.items():
                    start = clock()
                    calls[i]()
                    best[name][i] = min(best[name][i], clock() - start)
    times = {name: round(1e3 * sum(seconds), 4) for name, seconds in best.items()}
    fastest = min(times, key=times.get)
    return {"way": fastest if times[fastest] < MARGIN * times[rule] else rule, "milliseconds": times}
