"""CUDA kernels on a CPU, for tests: the text that CuPy compiles with NVRTC is compiled with g++ and run on one thread.

    f = Module(text, ("-DWIDTH=64",)).get_function("mtv_attention_forward")
    f(grid, (128,), (q, k, v, y, np.int32(T)))                 # NumPy arrays in place of CuPy's

A block's threads are fibers, and its shared memory starts as garbage. In mode "check" every load and store is watched.
Reported as KernelError, with file, line, block and thread: races in shared and in global memory (between barriers,
between blocks, plain against atomic), reads and writes out of bounds, misaligned vectors, reads of shared memory that
nobody wrote, another thread's locals, signed overflow, bad shifts, division by zero. Mode "fast" watches nothing. In both:
divergent barriers, waits without an end (who waits where), returns before a barrier, lanes missing from a mask.

Not covered: inline PTX, tensor cores, cooperative groups, dynamic shared memory, 16-bit types, waiting for another
block. g++ does not contract a*b+c and has its own libm, so floats agree with a GPU to rounding, integers exactly.
Time and registers say nothing about a GPU. Needs g++ on x86-64 Linux.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from autograd import KernelError
from autograd.cuda.source import Signature, signatures

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-g1", "-gdwarf-4", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", f"-I{HERE}")
MODES = {  # flags of a kernel, flags of the runtime
    "fast": (("-O2",), ("-O2",)),
    "check": (("-O1", "-fsanitize=thread",
               "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"), ("-O2", "-DCHECK")),
}

missing = None
if platform.machine() != "x86_64" or platform.system() != "Linux":
    missing = "the emulator of CUDA kernels needs x86-64 Linux"
elif shutil.which("g++") is None:
    missing = "the emulator of CUDA kernels needs g++"


class _Launch(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint), ("strict", ctypes.c_int), ("seed", ctypes.c_int),
                ("stacks", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("arrays", ctypes.c_int),
                ("starts", ctypes.c_void_p), ("sizes", ctypes.c_void_p), ("items", ctypes.c_void_p),
                ("error", ctypes.c_char_p), ("error_size", ctypes.c_size_t)]


def _folder() -> Path:
    folder = Path(os.environ.get("MINITV_EMULATOR_CACHE", Path(tempfile.gettempdir(), f"minitv-emulator-{os.getuid()}")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _aside(path: Path) -> Path:
    """Where a file is made before it gets its name: another process may be making the same one."""
    return path.with_suffix(f".{os.getpid()}.tmp")


def _built(command: tuple[str, ...], key: str, suffix: str) -> Path:
    """What a compiler makes, from the cache if it was made before."""
    path = _folder() / f"{key}{suffix}"
    if not path.exists():
        aside = _aside(path)
        result = subprocess.run([*command, "-o", str(aside)], capture_output=True, encoding="utf-8", errors="replace")
        if result.returncode:
            raise KernelError(f"g++ refuses the kernel:\n{result.stderr}")
        os.replace(aside, path)
    return path


@cache
def _stamp() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[hc]*")))


def _key(*parts) -> str:
    return hashlib.sha256(_stamp() + repr(parts).encode()).hexdigest()[:20]


@cache
def _library(text: str, options: tuple[str, ...], mode: str) -> tuple[ctypes.PyDLL, Path]:
    kernel_flags, runtime_flags = MODES[mode]
    exports = "\n".join(f"EXPORT({name})" for name in signatures(text, options))
    source = f'#include "cuda.h"\n#line 1 "kernel.cu"\n{text}\n#line 1 "exports"\n{exports}\n'
    defines = tuple(option for option in options if option.startswith("-D"))
    key = _key(source, defines, FLAGS, MODES[mode])
    path = _folder() / f"{key}.cpp"
    aside = _aside(path)
    aside.write_text(source, encoding="utf-8")
    os.replace(aside, path)
    warnings = "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"
    runtime = _built(("g++", *FLAGS, *runtime_flags, "-c", str(HERE / "runtime.cpp")), _key(runtime_flags), ".o")
    kernel = _built(("g++", *FLAGS, *kernel_flags, *warnings, *defines, "-c", str(path)), key, ".o")
    library = _built(("g++", "-shared", str(kernel), str(runtime)), key, ".so")
    return ctypes.PyDLL(str(library)), library  # PyDLL keeps the interpreter's lock: the runtime has one of everything


@cache
def _stacks(library: ctypes.PyDLL) -> int:
    library.make_stacks.restype = ctypes.c_void_p
    return library.make_stacks()


class Module:
    """What cupy.RawModule is: a compiled text. ``seed`` shuffles the order of threads and blocks."""

    first = None  # the library that made the stacks, one set of them for the process

    def __init__(self, code: str, options: tuple[str, ...] = (), mode: str = "check", seed: int = 0):
        if missing:
            raise KernelError(missing)
        self._signatures = signatures(code, tuple(o for o in options if o.startswith("-D")))
        self._library, self._path = _library(code, tuple(options), mode)
        self._mode, self._seed = mode, seed
        Module.first = Module.first or self._library

    def get_function(self, name: str):
        launch, signature = getattr(self._library, f"launch_{name}"), self._signatures[name]

        def function(grid, block, args):
            self._run(launch, signature, grid, block, args)

        return function

    def deduced(self, name: str) -> list[str]:
        """The types of a kernel's parameters as the compiler has them: "const float32*"."""
        text = ctypes.create_string_buffer(2048)
        getattr(self._library, f"signature_{name}")(text, ctypes.c_size_t(2048))
        return text.value.decode().split(",")[:-1]

    def _run(self, launch, signature: Signature, grid, block, args) -> None:
        assert tuple(block) == (signature.block,), f"{signature.name}: a block of {block} threads"
        slots, watched, written = [], [], []
        for parameter, value in zip(signature.parameters, args, strict=True):
            if not parameter.pointer:
                slots.append(ctypes.create_string_buffer(value.tobytes(), value.dtype.itemsize))
                continue
            memory = _memory(value)
            if self._mode == "check":
                copy, owner = _fenced(memory)
                watched.append((copy, owner))
                if not parameter.const:
                    written.append((memory, copy))
                memory = copy
            slots.append(ctypes.c_void_p(memory.ctypes.data))
        arrays = [copy for copy, _ in watched]
        starts = (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
        sizes = (ctypes.c_size_t * len(arrays))(*[a.nbytes for a in arrays])
        items = (ctypes.c_int * len(arrays))(*[min(a.itemsize, 4) for a in arrays])
        arguments = (ctypes.c_void_p * len(slots))(*map(ctypes.addressof, slots))
        error = ctypes.create_string_buffer(2048)
        given = _Launch((ctypes.c_uint * 3)(*(*grid, 1, 1)[:3]), signature.block, 1, self._seed, _stacks(Module.first),
                        ctypes.addressof(arguments), len(arrays), ctypes.addressof(starts), ctypes.addressof(sizes),
                        ctypes.addressof(items), ctypes.cast(error, ctypes.c_char_p), 2048)
        if launch(ctypes.byref(given)):
            found = re.sub(r"@([0-9a-f]+)", lambda match: "at " + self._place(int(match[1], 16)), error.value.decode())
            raise KernelError(f"{signature.name}: {found}")
        for i, (memory, copy) in enumerate(written):
            others = [_memory(a) for p, a in zip(signature.parameters, args, strict=True) if p.pointer]
            overlaps = sum(np.may_share_memory(memory, other) for other in others)
            assert overlaps < 2, f"{signature.name}: what it writes (array {i} of these) is also another argument"
            memory[...] = copy

    def _place(self, address: int) -> str:
        result = subprocess.run(["addr2line", "-e", str(self._path), hex(address - 1)], capture_output=True, text=True)
        *_, folder, file = result.stdout.split()[0].split("/")
        return f"{folder}/{file}" if file.startswith(("gpu.cu:", "rows.cu:")) else file


def _memory(array: np.ndarray) -> np.ndarray:
    """All that lies between the first and the last element of an array, flat."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    assert min(array.strides) >= 0 and not any(s % array.itemsize for s in array.strides)
    span = 1 + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) // array.itemsize
    return np.lib.stride_tricks.as_strided(array, (span if array.size else 0,), (array.itemsize,))


def _fenced(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy on a 64-byte boundary with memory around it that belongs to nobody, and the owner of all that."""
    fence = max(4096, array.nbytes)
    owner = np.full(array.nbytes + 2 * fence + 64, 0xFF, np.uint8)
    start = fence + -(owner.ctypes.data + fence) % 64
    copy = owner[start:start + array.nbytes].view(array.dtype)
    copy[...] = array
    return copy, owner
