"""This process on its machine: the cores it may use, its locks and the threads of BLAS, its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache


@cache
def processor() -> str:
    """Its name, with family and model where the system tells: names alike hide different processors, these numbers do not."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        facts = {}  # of the first core
        for line in file:
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
        if "model name" in facts:
            return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()  # on Windows with both numbers


def cores() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mb() -> float | None:
    """The largest memory this process has held, in MB (10⁶ bytes), and what its children hold besides at this moment; None
    where the system does not tell.
    """
    with suppress(OSError):  # Linux; ru_maxrss begins with the memory of the process that started this one
        if own := _kilobytes("/proc/self/status", "VmHWM:"):
            return (own + _of_children()) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _kilobytes(path: str, *entries: str) -> int:
    """The sum of these entries of a file of /proc."""
    with open(path, encoding="ascii", errors="replace") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(entries))


def _of_children() -> int:
    """The kilobytes of memory that belong to a child of this process alone, of all of them."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            for child in file.read().split():
                with suppress(OSError):
                    total += _kilobytes(f"/proc/{child}/smaps_rollup", "Private_")
    return total


@cache
def memory() -> int:
    """The bytes of memory that this process can ever have; those of 47 address bits where the system does not tell."""
    sizes = [2**47]
    with suppress(AttributeError, ValueError, OSError):  # Windows
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:  # a container's
        sizes.append(int(file.read()))
    with suppress(ImportError):
        import resource

        if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            sizes.append(limit)
    return min(size for size in sizes if size > 0)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage in here: most of what the compiler makes stays, and to look at it takes a tenth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def free_in_forks() -> threading.Lock:
    """A lock that no copy of this process finds taken by a thread which the copy does not have."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


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
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # the most that older releases take
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)
        _ask_for_large_pages()


@cache
def _ask_for_large_pages() -> None:
    """Ask Linux for pages of 2 MB where the heap grows next: a step touches more of 4 kB than a processor remembers.

    The block that is allocated for it is never touched, and its end stays the end of the heap.
    """
    size, page, huge = 2**29, 2**21, 14  # MADV_HUGEPAGE of mman.h
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        start = -(-block // page) * page
        libc.madvise(start, (block + size - start) // page * page, huge)
        libc.free(block)


def return_memory() -> None:
    """Give the system what is free, where the C library is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
