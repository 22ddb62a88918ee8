"""The array's type is the device: namespaces, dtypes, transfers and threads."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager, suppress
from types import ModuleType

import numpy as np

from .errors import DtypeError

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def is_cupy(x) -> bool:
    """Whether ``x`` is a CuPy array; never imports CuPy."""
    return type(x) is not np.ndarray and type(x).__module__.partition(".")[0] == "cupy"


def namespace(*arrays) -> ModuleType:
    """The module (numpy or cupy) that owns the arrays; a mixture raises DtypeError naming both."""
    cupy = [is_cupy(a) for a in arrays if a is not None]
    if not any(cupy):
        return np
    if not all(cupy):
        raise DtypeError("NumPy and CuPy arrays are mixed in one call: move one with autograd.to_numpy or cupy.asarray")
    return sys.modules["cupy"]


def device_name(x) -> str:
    """The kernel family that runs on this array: "cpu" or "cuda"."""
    return "cuda" if is_cupy(x) else "cpu"


def to_numpy(x) -> np.ndarray:
    """The values as a NumPy array (a copy only if they live on a GPU)."""
    x = getattr(x, "data", x) if not isinstance(x, np.ndarray) else x
    return x.get() if is_cupy(x) else np.asarray(x)


def unscalar(value):
    """A 0-d array instead of the NumPy scalar that reductions and sums of 0-d arrays return."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def cores() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mb() -> float | None:
    """The largest memory this process has held, in MB (10⁶ bytes); None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def blas_threads(count: int):
    """Hold every BLAS library in the process to ``count`` threads.

    Worker threads each call BLAS on their own slice of the batch; a second level of threads below them would make
    them wait for each other.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=count, user_api="blas"):
        yield


def keep_memory() -> None:
    """Let the C library keep freed memory for the next allocation, where it is glibc; once, before threads start.

    By default it hands large arrays back to the system when they are freed, so that every step of a training run
    takes the same pages again, zeroed one by one. One heap for all threads is reused best.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of malloc.h
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the most that older releases take
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)
