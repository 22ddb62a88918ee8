"""Numba kernels: one decorator, one set of flags.

Kernels are serial functions that release the GIL; worker threads call them on slices of the batch, or on parts of one call,
see team.py. They are compiled at their first call, once for float32 and once for float64, and kept on disk for later runs
(disk.py).
``fastmath=True`` is never used: its ``nnan`` and ``ninf`` break masks, and ``arcp`` and ``afn`` make 1/√x an estimate where
a loop is packed, but not where LLVM finds at run time that it must not be: results would depend on where arrays lie.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types
from numba.core.event import Listener, install_listener
from numba.core.registry import CPUDispatcher

from .disk import Kept, cache_directory
from .pipeline import InnerCompiler, KernelCompiler
from .team import Cut

FLAGS = {
    "nogil": True,
    "no_cfunc_wrapper": True,  # nobody calls them from C
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "reassoc"},
}
EXACT = {**FLAGS, "fastmath": FLAGS["fastmath"] - {"reassoc"}}  # sums in the order in which they are written
INLINED = {"forceinline": True, "no_cpython_wrapper": True, "pipeline_class": InnerCompiler}  # besides, for overloads


def vector_bits(features: str) -> int:
    """The widest vectors of floats that a processor with these features, as LLVM writes them, multiplies and adds at once."""
    present = {name[1:] for name in features.split(",") if name.startswith("+")}
    return next((bits for bits, needed in ((512, {"avx512f"}), (256, {"avx2", "fma"})) if needed <= present), 128)


NATIVE_BITS = vector_bits(llvm.get_host_cpu_features().flatten())
BITS = NATIVE_BITS  # of what is compiled: NUMBA_CPU_FEATURES may leave out what the processor has
if numba.config.CPU_FEATURES is not None:
    BITS = min(BITS, vector_bits(numba.config.CPU_FEATURES))

# LLVM prefers 256-bit vectors even where 512-bit ones are faster: ask for them before anything is compiled.
WIDE_VECTORS = BITS == 512
if WIDE_VECTORS and not numba.config.CPU_NAME:
    numba.config.CPU_NAME = llvm.get_host_cpu_name()
    numba.config.CPU_FEATURES = llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"


def unavailable() -> str | None:
    """Why no kernel can be compiled here, or None."""
    return "Numba's compiler is switched off by NUMBA_DISABLE_JIT" if numba.config.DISABLE_JIT else None


def cpu_kernel(function: Callable | None = None, *, parts: str = "", sums: str = "", grain: int = 1) -> Callable:
    """Compile a kernel at its first call, and keep it on disk.

    ``parts`` names the arguments of which a part of a call sees a part, and ``sums`` those to which every part adds; see
    team.Cut. A part has at least ``grain`` units.
    """
    if function is None:
        return lambda function: cpu_kernel(function, parts=parts, sums=sums, grain=grain)
    if unavailable():
        return function
    kind = Divisible if parts else Kernel
    kernel = kind(function, targetoptions={**FLAGS, "nopython": True}, pipeline_class=KernelCompiler)
    if parts:
        kernel.cut = Cut(function, parts, sums, grain)
    if os.path.exists(function.__code__.co_filename) and (folder := cache_directory()) is not None:  # not typed by hand
        kernel._cache = Kept(function, folder)  # as enable_caching() does, which takes the folder from a global
    return kernel


class Kernel(CPUDispatcher):
    """A kernel. It has one version for arrays that may be written to and for those that may not, where Numba makes one for
    each combination: a kernel writes only to what its caller has allocated, which the checks of operators prove.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._served = []  # the types that a version was registered for besides its own: Numba forgets those that nobody holds
        self._versions: dict[tuple, Callable] = {}

    def version(self, *arguments) -> Callable:
        """What runs with arguments of these types: to let Numba look for it at every call costs as much as an array."""
        kinds = _kind(arguments)
        if kinds not in self._versions:
            self._versions[kinds] = self.compile(tuple(_writable(numba.typeof(argument)) for argument in arguments))
        return self._versions[kinds]

    def recompile(self) -> None:
        self._versions.clear()
        super().recompile()

    def _compile_for_args(self, *arguments):
        """What Numba calls, where it knows no version for these arguments."""
        version, kinds = self.version(*arguments), tuple(map(numba.typeof, arguments))
        if kinds not in self.overloads:
            self._insert([kind._code for kind in kinds], version, False)
            self._served.append(kinds)
        return version


class Divisible(Kernel):
    """A kernel whose calls several threads can share."""

    def __call__(self, *arguments):
        return self.cut(super().__call__, arguments)


def _kind(argument) -> tuple | type:
    """What the type of an argument depends on; Numba's own types take a hundred times as long to make."""
    if isinstance(argument, np.ndarray):
        flags = argument.flags
        return argument.dtype, argument.ndim, flags.c_contiguous, flags.f_contiguous, flags.aligned
    return (type(argument), *map(_kind, argument)) if isinstance(argument, tuple) else type(argument)


def _writable(kind: types.Type) -> types.Type:
    """The type of the same argument, with arrays that may be written to."""
    if isinstance(kind, types.Array):
        return kind.copy(readonly=False)
    if isinstance(kind, types.BaseTuple):
        return types.BaseTuple.from_types(tuple(map(_writable, kind)), getattr(kind, "instance_class", None))
    return kind


class Inner(CPUDispatcher):
    """A function that only kernels call: without an entry for Python and, unless said, without versions for constants."""

    def get_call_template(self, args, kws):
        """As Numba's, which makes a version for each combination of constant arguments."""
        return super().get_call_template(args if self.constants else [types.unliteral(kind) for kind in args], kws)

    def __call__(self, *args):
        raise TypeError(f"{self.__name__} is for use inside kernels")


def inner(function: Callable | None = None, *, constants: bool = False, **flags) -> Callable:
    """Compile a function that only kernels call, with ``constants`` once for each combination of constant arguments.

    A loop whose steps are known is faster, but each version takes the compiler a quarter of a second.
    """
    if function is None:
        return lambda function: inner(function, constants=constants)
    if unavailable():
        return function
    options = {**FLAGS, "nopython": True, "no_cpython_wrapper": True, **flags}
    dispatcher = Inner(function, targetoptions=options, pipeline_class=InnerCompiler)
    dispatcher.constants = constants
    return dispatcher


def inline(function: Callable | None = None, *, exact: bool = False) -> Callable:
    """A function that disappears into the kernels that call it.

    With ``exact`` no sum in it is regrouped, not with those around it either: for differences whose digits count.
    """
    if function is None:
        return lambda function: inline(function, exact=exact)
    return inner(function, forceinline=True, fastmath=(EXACT if exact else FLAGS)["fastmath"])


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
