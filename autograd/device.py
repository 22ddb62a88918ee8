"""The array's type is the device: namespaces, dtypes, transfers.

CuPy is imported by ``gpu()`` alone, when a GPU is asked for. What lies on a GPU is computed while Python goes on; reading
a value waits for it. So range checks of ids there do not wait: they are made with the next read, ``read`` or ``to_numpy``.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np

from .errors import DeviceError, DtypeError

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def is_cupy(x) -> bool:
    """Whether ``x`` is a CuPy array; never imports CuPy."""
    return type(x) is not np.ndarray and type(x).__module__ == "cupy"


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
    if not is_cupy(x):
        x = x if isinstance(x, np.ndarray) else getattr(x, "data", x)
    if not is_cupy(x):
        return plain(x, "to_numpy: the argument")
    read()
    return x.get()


def plain(values, what: str):
    """An array of NumPy or CuPy itself, of lists and numbers too; ``what`` begins the message that refuses a subclass.

    A subclass means more than its numbers (a mask, a unit, another product), except for a file that is mapped into memory.
    """
    if type(values) is np.ndarray or is_cupy(values):
        return values
    if isinstance(values, np.ndarray) and not isinstance(values, np.memmap):
        kind = f"{type(values).__module__}.{type(values).__qualname__}"
        lost = ", without its mask" if isinstance(values, np.ma.MaskedArray) else ""
        raise DtypeError(f"{what} is a {kind}, allowed: plain arrays (np.asarray(...) makes one{lost})")
    return np.asarray(values)


def unscalar(value):
    """A 0-d array instead of the NumPy scalar that reductions and sums of 0-d arrays return."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def overlap(x, y) -> bool:
    """Whether two arrays may share memory: whether the ranges of their addresses meet."""
    if type(x) is type(y) is np.ndarray:
        return np.may_share_memory(x, y)
    xp = namespace(x, y) if is_cupy(x) == is_cupy(y) else None
    return xp is not None and bool(xp.may_share_memory(x, y))


# -- the GPU -----------------------------------------------------------------------------------------------------------
INSTALL = 'pip install "minitv[cuda13]", or "minitv[cuda12]" for an older driver'


@cache
def gpu() -> ModuleType:
    """CuPy, after it has computed something on a card; otherwise DeviceError says what is missing and how to get it."""
    if importlib.util.find_spec("cupy") is None:
        raise DeviceError(f"cuda: CuPy is not installed: {INSTALL}")
    try:
        import cupy
    except Exception as error:  # of whatever kind: a half-installed library fails in many ways
        raise DeviceError(f"cuda: CuPy is installed but cannot be imported ({_first_line(error)}): {INSTALL}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        reason = "it counts 0"
    except Exception as error:
        count, reason = 0, _first_line(error)
    if not count:
        raise DeviceError(f"cuda: CuPy finds no NVIDIA GPU ({reason}): this machine needs one, with its driver; nvidia-smi "
                          "shows both")
    try:
        works = float((cupy.ones(4) + 1).sum()) == 8  # compiles a kernel
    except Exception as error:
        raise DeviceError(f"cuda: there is a GPU, but CuPy cannot compile for it ({_first_line(error)}): CUDA's compiler "
                          f"library NVRTC is missing or does not fit the driver: {INSTALL}") from error
    if not works:
        raise DeviceError("cuda: the GPU computes 4 + 4 wrongly")
    return cupy


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _number(device: str) -> int | None:
    """The card that "cuda" (the current one) or "cuda:1" names; None for "cpu"."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise DeviceError(f"device {device!r} is unknown, allowed: cpu, cuda, cuda:0, cuda:1, ...")
    if device == "cpu":
        return None
    cupy = gpu()
    number = cupy.cuda.runtime.getDevice() if match[1] is None else int(match[1])
    count = cupy.cuda.runtime.getDeviceCount()
    if number >= count:
        raise DeviceError(f"{device} does not exist: this machine has {count} GPU{'s' * (count > 1)}, counted from cuda:0")
    return number


def select(device: str) -> None:
    """Make a card the current one of this thread: new arrays lie there, and kernels run there."""
    number = _number(device)
    if number is not None:
        gpu().cuda.Device(number).use()


def move(array, device: str):
    """The array on "cpu", "cuda" (the current card) or "cuda:1": itself if it lies there, else a copy."""
    number = _number(device)
    if number is None:
        return to_numpy(array)
    if is_cupy(array) and array.device.id == number:
        return array
    with gpu().cuda.Device(number):
        return gpu().asarray(array)


def location(array) -> str:
    """The name of the device on which the array lies: "cpu" or "cuda:0"."""
    return f"cuda:{array.device.id}" if is_cupy(array) else "cpu"


def beside(array, other):
    """The array where ``other`` lies: a NumPy array is copied to the GPU if need be."""
    return array if namespace(other) is np else namespace(other).asarray(array)


class _Waiting(threading.local):
    """Range checks on a GPU whose results nobody has read yet: (lowest, highest, low, high, fail)."""

    def __init__(self):
        self.checks: list[tuple] = []


_waiting = _Waiting()


def check_range(values, low: int, high: int, fail: Callable) -> None:
    """Call ``fail(value)``, which raises, if an integer lies outside low .. high: on a GPU, at the next read."""
    if not values.size:
        return
    lowest, highest = values.min(), values.max()
    if is_cupy(values):
        _waiting.checks.append((lowest, highest, low, high, fail))
        if len(_waiting.checks) >= 1000:
            read()
    elif lowest < low or highest > high:
        fail(int(lowest if lowest < low else highest))


def read(*values) -> list[float]:
    """Numbers, from arrays of one element each. What lies on a GPU comes in one transfer, with the checks that wait."""
    checks, _waiting.checks = _waiting.checks, []
    arrays = [x for check in checks for x in check[:2]] + [v for v in values if is_cupy(v)]
    if not arrays:
        return [float(np.reshape(v, ())) for v in values]
    numbers = iter(namespace(*arrays).stack([a.reshape(()).astype(np.float64) for a in arrays]).get().tolist())
    for _, _, low, high, fail in checks:
        lowest, highest = next(numbers), next(numbers)
        if lowest < low or highest > high:
            fail(int(lowest if lowest < low else highest))
    return [next(numbers) if is_cupy(v) else float(np.reshape(v, ())) for v in values]
