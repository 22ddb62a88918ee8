"""CUDA kernels: what a gpu.cu declares, checked and launched on CuPy arrays.

An operator's folder has ``gpu.cu``, the kernels, and beside it ``gpu.py``, the host side, with the protocol of
``cpu.py``: ``forward``, ``backward``, and ``supports``, which says why it cannot run. It begins with

    SOURCE = Source(__file__)

and launches with ``SOURCE.launch("mtv_gelu_forward", elements(n), x, y, n)``. Names, argument types and the size of a block
are read from the signatures in gpu.cu and stand nowhere else, ``SOURCE["STEPS"]`` is a number that it defines; the launcher,
the compiler check and the emulator of the tests share them. CuPy checks no argument: a wrong width or a missing one would
read garbage, so ``launch`` does. Sums over rows are in rows.py.

Rules for gpu.cu:

- C++17 in ASCII without templates of kernels, inline PTX or cooperative groups; the one include is ``"kernel.cuh"``. No
  ``INFINITY``, ``NAN``, ``uint32_t``: NVRTC has none of them.
- ``extern "C" __global__ void __launch_bounds__(THREADS) mtv_<operator>_<what>(...)``: one-dimensional blocks, a multiple
  of 32 threads. THREADS is a number, or a name that ``#define`` or an option ``-DTHREADS=128`` gives one; so may an option
  name a type.
- Pointers to what is only read are ``const T* __restrict__``. Sizes are ``int``, offsets and counts of elements ``long
  long``. No structures, no pointers to pointers.
- Sums in an order that the sizes alone decide: partial sums of fixed chunks and a second kernel (or one CuPy sum) over
  them, no atomics on floats. Running maxima and sums are float at least.
- No return before a barrier or a shuffle, except of a whole warp before a shuffle; masks name all lanes.
- At most 48 kB of shared memory, all of it static, declared in kernels or functions that are no templates. Nothing is
  assumed about memory that nobody wrote.
- ``g`` is the gradient that comes in, ``g_<output>`` if there are several, ``gx`` that of x. B, H, T, C, K and V are sizes:
  of the batch, heads, positions, channels, and channels of keys and of values.

Rules for gpu.py: allocate with the namespace of the arrays, make contiguous what is not (or pass ``Strided(x)`` and the
strides). An empty grid launches nothing, so that only outputs that are not empty all the same need a value then.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..device import gpu, is_cupy, namespace
from ..errors import KernelError
from ..registry import REGISTRY

HERE = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17",)  # of every compilation
DTYPES = {"float": "float32", "double": "float64", "int": "int32", "unsigned": "uint32", "long long": "int64",
          "unsigned long long": "uint64", "bool": "bool"}

_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\w+)\)\s+(\w+)\(([^)]*)\)')
_PARAMETER = re.compile(r"(const )?([\w ]+?)(\*)?(?: __restrict__)? (\w+)")
_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')
_DEFINE = re.compile(r"^#define (\w+) (\d+)\s*(?://.*)?$", re.MULTILINE)


class Parameter(NamedTuple):
    """One parameter of a kernel: its dtype's name, and whether it is a pointer to such values, read only if ``const``."""

    name: str
    dtype: str
    pointer: bool
    const: bool


@dataclass(frozen=True)
class Signature:
    """A kernel as its file declares it."""

    name: str
    block: int
    parameters: tuple[Parameter, ...]


class Strided(NamedTuple):
    """An array that a kernel reads through strides which it is given, so that it need not be contiguous."""

    array: Any


class Source:
    """The kernels of one file, compiled once for each of ``variants``: tuples of options such as ``("-DWIDTH=64",)``.

    The first variant is meant where no options are given.
    """

    def __init__(self, host: str | Path, variants: Iterable[tuple[str, ...]] = ((),)):
        self.path = Path(host).with_suffix(".cu")
        self.variants = tuple(variants)

    def __repr__(self) -> str:
        return f"Source({str(self.path)!r})"

    @cached_property
    def text(self) -> str:
        """The file with what it includes: CuPy's cache of compiled kernels does not look into included files."""
        name = f"{self.path.parent.name}/{self.path.name}"
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate(self.path.read_text("utf-8").splitlines(), 2):
            included = _INCLUDE.fullmatch(line)
            if included is None:
                lines.append(line)
            else:
                header = (HERE / included[1]).read_text("utf-8")
                lines += [f'#line 1 "{included[1]}"', header, f'#line {number} "{name}"']
        return "\n".join(lines) + "\n"

    def __getitem__(self, name: str) -> int:
        """A number that the file gives a name with ``#define``."""
        if name not in self._numbers:
            raise KernelError(f"{self.path.name} defines no number {name!r}, it has {', '.join(self._numbers) or 'none'}")
        return self._numbers[name]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: int(number) for name, number in _DEFINE.findall(self.text)}

    def kernels(self, options: tuple[str, ...] | None = None) -> dict[str, Signature]:
        """The signature of every kernel under these options."""
        options = self.variants[0] if options is None else options
        if options not in self.variants:
            raise KernelError(f"{self.path.name}: no variant {options}, declared: {self.variants}")
        return signatures(self.text, options)

    def launch(self, name: str, grid, *args, options: tuple[str, ...] | None = None) -> None:
        """Run a kernel, unless its grid is empty; what does not fit its signature raises KernelError.

        ``grid`` is one size or a tuple of up to three: a number of blocks, or what the size of a block makes one, such as
        ``elements(n)``. None is an array that the kernel does not read this time.
        """
        cupy = gpu()
        function, block, converters = _prepared(cupy, self, self.variants[0] if options is None else options, name)
        grid = tuple([size(block) if callable(size) else size for size in (grid if isinstance(grid, tuple) else (grid,))])
        if min(grid) < 0 or grid[0] > 2**31 - 1 or max(grid[1:], default=0) > 65535:
            raise KernelError(f"{name}: a grid of {grid} blocks; no size is negative, the first at most 2**31 - 1, the others "
                              "65535")
        if len(args) != len(converters):
            raise KernelError(f"{name}: takes {len(converters)} arguments, got {len(args)}")
        card = cupy.cuda.runtime.getDevice()
        args = tuple([convert(value, card) for convert, value in zip(converters, args, strict=True)])
        if 0 not in grid:
            function(grid, (block,), args)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up: the number of blocks for a elements."""
    return -(-a // b)


def elements(n: int, times: int = 1) -> Callable[[int], int]:
    """A thread for each of n elements; ``times`` as many blocks."""
    return lambda block: times * ceil_div(n, block)


def apply(source: Source, kernel: str, *arrays):
    """What a kernel that makes one element of each element of its arrays gives, an array like the first."""
    arrays = [contiguous(x) for x in arrays]
    out = namespace(*arrays).empty_like(arrays[0])
    source.launch(kernel, elements(out.size), *arrays, out, out.size)
    return out


def warps(n: int) -> Callable[[int], int]:
    """A warp for each of n rows."""
    return lambda block: ceil_div(n, block // 32)


def columns(n: int) -> int:
    """A block for every 32 columns, which its warps share."""
    return ceil_div(n, 32)


def contiguous(x):
    """The array, copied if its elements do not lie in order; None stays."""
    return x if x is None or x.flags.c_contiguous else namespace(x).ascontiguousarray(x)


def strided(x):
    """[B H T d] for a kernel that takes strides: the array, and how many elements lie between batches, heads and rows.

    It is copied if its channels are not contiguous.
    """
    if x.strides[3] != x.itemsize or min(x.strides) < 0:
        x = contiguous(x)
    return Strided(x), tuple(s // x.itemsize for s in x.strides[:3])


def float32_only(*values) -> str | None:
    """``supports`` of a kernel that takes float32 alone."""
    for value in values:
        if value is not None and value.dtype.kind == "f" and value.dtype != np.float32:
            return f"needs float32, got {value.dtype}"
    return None


def manifest() -> list[tuple[Source, tuple[str, ...]]]:
    """Every source of the declared operators with each of its variants."""
    modules = {kernel.module for op in REGISTRY.values() for kernel in op.kernels.values() if kernel.device == "cuda"}
    sources = {getattr(importlib.import_module(module), "SOURCE", None) for module in modules} - {None}
    return [(source, options) for source in sorted(sources, key=lambda s: s.path) for options in source.variants]


@cache
def signatures(text: str, options: tuple[str, ...] = ()) -> dict[str, Signature]:
    """The kernels that a text declares, by name; what is not declared by the rules above raises KernelError."""
    words = dict(_DEFINE.findall(text)) | dict(option.removeprefix("-D").split("=") for option in options)
    table = {}
    for threads, name, parameters in _KERNEL.findall(text):
        block = int(words.get(threads, threads))
        if block % 32 or not 32 <= block <= 1024:
            raise KernelError(f"{name}: a block of {block} threads, allowed: a multiple of 32 up to 1024")
        parsed = []
        for declaration in parameters.split(","):
            match = _PARAMETER.fullmatch(" ".join(declaration.split()))
            dtype = match and DTYPES.get(words.get(match[2], match[2]))
            if dtype is None:
                raise KernelError(f"{name}: cannot read the parameter {declaration.strip()!r}")
            parsed.append(Parameter(match[4], dtype, bool(match[3]), bool(match[1])))
        table[name] = Signature(name, block, tuple(parsed))
    if len(table) != text.count("__global__"):
        raise KernelError(f"of {text.count('__global__')} kernels, {len(table)} are declared as this module's docstring says")
    return table


@cache
def _prepared(cupy, source: Source, options: tuple[str, ...], name: str):
    """The compiled kernel, the size of its blocks, and what checks and converts each argument."""
    kernels = source.kernels(options)
    if name not in kernels:
        raise KernelError(f"{source.path.name} has no kernel {name!r}, it has {', '.join(kernels)}")
    signature = kernels[name]
    converters = [(_array if p.pointer else _scalar)(name, p) for p in signature.parameters]
    return _module(cupy, source, options).get_function(name), signature.block, converters


@cache
def _module(cupy, source: Source, options: tuple[str, ...]):
    return cupy.RawModule(code=source.text, options=(*OPTIONS, *options))


def _array(name: str, parameter: Parameter):
    dtype = np.dtype(parameter.dtype)

    def convert(value, card: int):
        if value is None and parameter.const:
            return gpu().empty(0, dtype)
        array = value.array if type(value) is Strided else value
        if not is_cupy(array):
            raise KernelError(f"{name}: {parameter.name} is a CuPy array, got {type(array).__name__}")
        if array.dtype != dtype:
            raise KernelError(f"{name}: {parameter.name} has dtype {array.dtype}, the kernel takes {parameter.dtype}")
        if array is value and not array.flags.c_contiguous:
            raise KernelError(f"{name}: {parameter.name} is not contiguous")
        if array.data.device_id != card and array.size:
            raise KernelError(f"{name}: {parameter.name} lies on cuda:{array.data.device_id}, but cuda:{card} is selected")
        return array

    return convert


def _scalar(name: str, parameter: Parameter):
    dtype = np.dtype(parameter.dtype)
    number, limits = dtype.type, None if dtype.kind == "f" else np.iinfo(dtype)
    low, high = (0, 0) if limits is None else (int(limits.min), int(limits.max))

    def convert(value, card: int):
        if limits is None:
            if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                return number(value)
        elif isinstance(value, int | np.integer | np.bool_):
            if low <= value <= high:
                return number(value)
            raise KernelError(f"{name}: {parameter.name} = {value} does not fit into {parameter.dtype}")
        raise KernelError(f"{name}: {parameter.name} is a number of {parameter.dtype}, got {type(value).__name__}")

    return convert
