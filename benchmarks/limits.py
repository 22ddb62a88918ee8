"""What one core of this machine can do at most: multiply-adds in registers, and reading and writing memory.

    python benchmarks/limits.py [--vectors 256]

Every result of times has these figures in its ``host`` (rounds.py), and the share of the peak that a step reaches comes from
them. Each is the best of many short measurements, so that other programs hardly count:

    gflops      float32 operations of one core, in 10⁹ a second; a multiply-add is two: chains of them in registers, or our
                matrix product or BLAS's on matrices in the cache, whichever is fastest
    read_gb_s   bytes that a sum reads from an array far larger than the caches, in 10⁹ a second: by one core, and by all
    triad_gb_s  bytes that a = b + s c moves, each array counted once: by one core, and by all
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from autograd.cpu import gemm
from autograd.cpu.compile import BITS, cpu_kernel
from autograd.cpu.process import blas_threads, cores, memory
from autograd.cpu.vectors import repeat, vectorized

LANES = BITS // 32
CHAINS = 12  # more than a core has under way at once, and as few as fit into 16 registers
STEPS = 50_000
SECONDS, ROUNDS = 0.15, 5  # of each measurement
LEAST = 2**28  # bytes of an array, or four times the largest cache


@vectorized
def _multiply_adds(steps, at):
    """CHAINS vectors from this address on, each steps times x = x * y + y."""
    y = at.load(LANES)
    places = [at + 4 * LANES * i for i in range(CHAINS)]
    vectors = repeat(steps, [place.load(LANES) for place in places], lambda _, xs: [x * y + y for x in xs], some=True)
    for place, x in zip(places, vectors, strict=True):
        place.store(x)


@cpu_kernel
def multiply_adds(steps, numbers):
    _multiply_adds(steps, np.int64(numbers.ctypes.data))


@cpu_kernel
def read(a, start, end):
    part, total = a[start:end], a.dtype.type(0)
    for i in range(part.size):
        total += part[i]
    return total


@cpu_kernel
def triad(a, b, c, s, start, end):
    to, left, right = a[start:end], b[start:end], c[start:end]
    for i in range(to.size):
        to[i] = left[i] + s * right[i]


def fastest(call: Callable[[], object]) -> float:
    """The seconds of the shortest of many calls."""
    call()
    best, end, rounds = float("inf"), time.perf_counter() + SECONDS, 0
    while rounds < ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, rounds = min(best, time.perf_counter() - start), rounds + 1
    return best


def gflops() -> float:
    """Of one core, in 10⁹ operations a second."""
    numbers = np.full(CHAINS * LANES, 0.5, np.float32)
    rates = [2 * STEPS * CHAINS * LANES / fastest(lambda: multiply_adds(STEPS, numbers))]
    a, b, out = (np.ones((192, 192), np.float32) for _ in range(3))
    with blas_threads(1):
        rates += [2 * 192**3 / fastest(call) for call in (lambda: np.matmul(a, b, out), lambda: gemm.product(a, b, out))]
    return round(max(rates) / 1e9, 1)


def cache_bytes() -> int:
    """Of the largest cache, where the system tells; 0 elsewhere."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")), default=0)


def bandwidths() -> dict[str, list[float]]:
    """Of memory, in 10⁹ bytes a second, for one core and for all of them."""
    size = min(max(LEAST, 4 * cache_bytes()), memory() // 16) // 4
    a, b, c = (np.ones(size, np.float32) for _ in range(3))

    def rate(threads: int, count: int, kernel: Callable, *arguments: object) -> float:
        """Of a kernel that walks through so many arrays, in as many parts as there are threads."""
        edges = [size * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            seconds = fastest(lambda: list(pool.map(functools.partial(kernel, *arguments), edges[:-1], edges[1:])))
        return round(4 * size * count / seconds / 1e9, 1)

    return {"read_gb_s": [rate(threads, 1, read, a) for threads in (1, cores())],
            "triad_gb_s": [rate(threads, 3, triad, a, b, c, np.float32(0.5)) for threads in (1, cores())]}


@functools.cache
def limits() -> dict:
    """All of them; measured once in a process."""
    return {"gflops": gflops(), **bandwidths()}


if __name__ == "__main__":
    from rounds import parse

    parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    print(json.dumps(limits()))
