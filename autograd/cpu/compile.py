"""Numba kernels: one decorator, one set of flags, one on-disk cache.

Kernels are serial functions that release the GIL; worker threads call them on slices of the batch. They are compiled at
their first call, once for float32 and once for float64, and cached in a folder named by a hash of every kernel's source,
so a change anywhere, inlined helpers included, recompiles. If no folder is writable they work without a cache.
``fastmath=True`` is never used: its ``nnan`` and ``ninf`` break masks, and ``arcp`` and ``afn`` make 1/√x an estimate where
a loop is packed, but not where LLVM finds at run time that it must not be: results would depend on where arrays lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba.core.event import Listener, install_listener

FLAGS = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "reassoc"},
}
EXACT = {**FLAGS, "fastmath": FLAGS["fastmath"] - {"reassoc"}}  # the order of sums is kept

# LLVM prefers 256-bit vectors even where 512-bit ones are faster: ask for them before anything is compiled.
WIDE_VECTORS = bool(llvm.get_host_cpu_features().get("avx512f"))
if WIDE_VECTORS and not numba.config.CPU_NAME:
    numba.config.CPU_NAME = llvm.get_host_cpu_name()
    numba.config.CPU_FEATURES = llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"

_configuring = threading.Lock()


@cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept, or None if no folder is writable. NUMBA_CACHE_DIR decides where, if set."""
    root = Path(__file__).resolve().parents[1]
    sources = sorted([*root.glob("cpu/*.py"), root / "philox.py", *root.glob("ops/*/cpu.py"),
                      *root.parent.glob("minitv/**/cpu*.py")])
    stamp = hashlib.sha256()
    for source in sources:
        stamp.update(source.read_bytes())
    machine = numba.__version__, platform.python_version(), numba.config.CPU_NAME, numba.config.CPU_FEATURES
    stamp.update(repr(machine).encode())
    places = [numba.config.CACHE_DIR] if numba.config.CACHE_DIR else [
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), tempfile.gettempdir()]
    for place in places:
        folder = Path(place, "minitv", stamp.hexdigest()[:16])
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    return None


def cached() -> bool:
    """Whether kernels of this version were compiled before, so that a run starts at once."""
    folder = cache_directory()
    return folder is not None and any(folder.rglob("*.nbi"))  # the index file of a compiled kernel


class _First(Listener):
    def __init__(self, announce: Callable[[], None]):
        self._announce, self._done = announce, False

    def on_start(self, event) -> None:
        if not self._done:
            self._done = True
            self._announce()

    def on_end(self, event) -> None:
        """Only the first start counts."""


@contextlib.contextmanager
def at_compilation(announce: Callable[[], None]) -> Iterator[None]:
    """Within this, call ``announce`` when a kernel is compiled, rather than read from disk, for the first time."""
    with install_listener("numba:compile", _First(announce)):
        yield


def cpu_kernel(function: Callable) -> Callable:
    """Compile a kernel at its first call, and keep it on disk."""
    kernel = numba.njit(**FLAGS)(function)
    folder = cache_directory()
    if folder is not None:
        with _configuring:  # worker threads import kernels at the same time
            before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
            try:
                with contextlib.suppress(RuntimeError):  # a function typed into an interpreter has no file
                    kernel.enable_caching()
            finally:
                numba.config.CACHE_DIR = before
    return kernel


def inline(function: Callable | None = None, *, exact: bool = False) -> Callable:
    """A helper that disappears into the kernels that call it.

    With ``exact`` its sums are added as they are written, not regrouped, not with those around them either: a difference whose
    digits count, such as that of a sum of x - x₀, belongs into such a helper. Only a product and a sum may become one
    instruction, unless something else needs the product too.
    """
    if function is None:
        return lambda function: inline(function, exact=exact)
    return numba.njit(forceinline=True, **EXACT if exact else FLAGS)(function)
