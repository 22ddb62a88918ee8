"""Compiled kernels on disk, so that only the first run waits for the compiler.

They lie in a folder named by a hash of the sources of all kernels here, and each under a name with a hash of what else goes
into its code: the helpers it calls and the values of the constants it reads, wherever those come from. A compiled kernel is
code that runs unseen, so it is read only from a file that this user alone could write, and that is whole. Where anything is
wrong, kernels are compiled as if there were no folder, and a line on stderr says so once.
"""

from __future__ import annotations

import contextlib
import dis
import hashlib
import inspect
import os
import pickle
import platform
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import numba
import numpy as np
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from .. import private
from . import companion

SUFFIX = ".nbc"
LIBRARIES = {*sys.stdlib_module_names, "llvmlite", "numba", "numpy", "scipy"}


# -- the folder --------------------------------------------------------------------------------------------------------
@cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept, or None if no folder will do. NUMBA_CACHE_DIR decides where, if set."""
    root = Path(__file__).resolve().parents[1]
    stamp = hashlib.sha256()
    for source in sorted({*root.glob("cpu/*.py"), *root.rglob("cpu*.py"), *root.parent.glob("minitv/**/cpu*.py"),
                          *root.parent.glob("minitv/decode/*.py")}):
        stamp.update(source.read_bytes())
    machine = numba.__version__, platform.python_version(), numba.config.CPU_NAME, numba.config.CPU_FEATURES
    stamp.update(repr(machine).encode())
    folder, reasons = private.first(_places(), stamp.hexdigest()[:16])
    if folder is None:
        say(f"no folder will do, every run compiles: {reasons}")
    return folder


def cached() -> bool:
    """Whether kernels of this version were compiled before, so that a run starts at once."""
    folder = cache_directory()
    return folder is not None and any(folder.glob(f"*{SUFFIX}"))


def _places() -> Iterator[Path]:
    """Where the folder may lie, the best place first. A ~ that stays belongs to a home that does not exist."""
    folder = os.path.expanduser(numba.config.CACHE_DIR)
    if folder:
        if not folder.startswith("~"):
            yield Path(folder, "minitv")
        return
    yield from private.places("minitv")


@cache
def say(text: str) -> None:
    """Tell the user, once, if anybody reads."""
    with contextlib.suppress(OSError, ValueError):
        print(f"kernel cache: {text}", file=sys.stderr, flush=True)


# -- a kernel's files --------------------------------------------------------------------------------------------------
class Kept(NullCache):
    """What Numba asks for the compiled versions of a kernel: a file for each signature and processor.

    A file begins with a hash of its name and its content. It appears at once, under a name that nothing else has, so threads
    and processes may write at the same time.
    """

    writing = True  # until it fails for any kernel

    def __init__(self, function: Callable, folder: Path):
        self._function, self._folder, self._compiled_in = function, folder, None

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def flush(self) -> None:
        """Before the kernel is compiled once more: values may have changed."""
        self._compiled_in = None

    def path(self, signature, codegen) -> Path:
        if self._compiled_in is None:
            self._compiled_in = compiled_in(self._function)
        fields = [getattr(kind, "fields", None) for kind in getattr(signature, "args", signature)]  # of named tuples
        key = repr((self._compiled_in, str(signature), fields, codegen.magic_tuple()))
        name = re.sub(r"[^\w.]", "", f"{self._function.__module__}.{self._function.__qualname__}")[-80:]
        return self._folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}{SUFFIX}"

    def load_overload(self, sig, target_context):
        target_context.refresh()
        path = self.path(sig, target_context.codegen())
        if companion.watching is not None and Kept.writing and not path.exists():
            companion.watching.missing(path.name)
        try:
            with open(path, "rb") as file:
                if not private.trusted(os.fstat(file.fileno())):
                    say(f"{self._folder}: a file that others could write is compiled again")
                    return None
                seal, content = file.read(32), file.read()
            if seal == _seal(path, content):
                return CompileResult._rebuild(target_context, *pickle.loads(content))
        except FileNotFoundError:
            return None
        except Exception:  # a file that cannot be read fails in many ways
            pass
        say(f"{self._folder}: a damaged file is compiled again")
        return None

    def save_overload(self, sig, data) -> None:
        if not Kept.writing or data.library.has_dynamic_globals or any(not part.can_cache for part in data.lifted):
            return
        path, content = self.path(sig, data.codegen), dumps(data._reduce())
        try:
            private.replace(path, lambda file: file.write(_seal(path, content) + content))
        except OSError as error:
            if os.name == "nt" and path.exists():
                return  # another process is reading the same code
            Kept.writing = False
            say(f"{self._folder}: {error.strerror}; what is not kept yet will be compiled again by the next run")


def _seal(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + content).digest()


# -- what a kernel's code depends on -----------------------------------------------------------------------------------
def compiled_in(function: Callable) -> str:
    """A hash of what goes into a function's machine code: its source, and the values of global and enclosing variables.

    Numba compiles those values in, also where the function's module only imports them. Helpers are followed, libraries not.
    """
    stamp, marks, waiting = hashlib.sha256(), set(), [(function, frozenset())]
    while waiting:
        value, names = waiting.pop()
        value = inspect.unwrap(value) if callable(value) else value  # a compiled helper's function
        references, scope = [], {}
        if isinstance(value, ModuleType | FunctionType):
            mark = id(value), names if isinstance(value, ModuleType) else None
            if mark in marks:
                continue
            marks.add(mark)
        if isinstance(value, ModuleType):
            scope = vars(value)
            content = references = sorted(names & scope.keys())
        elif isinstance(value, np.ndarray):
            content = value.dtype.str, value.shape, value.strides, value.tobytes()
        elif isinstance(value, tuple):
            content = type(value), len(value)
            waiting += [(item, names) for item in value]
        elif not isinstance(value, FunctionType | type):
            content = type(value), re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))
        elif (value.__module__ or "").partition(".")[0] in LIBRARIES:
            content = value.__module__, value.__qualname__
        elif isinstance(value, type):
            content = value.__qualname__, _source(getattr(sys.modules.get(value.__module__), "__file__", ""))
        else:
            codes = [value.__code__]
            for code in codes:  # which grows by the functions inside
                codes += [part for part in code.co_consts if isinstance(part, CodeType)]
                waiting += [(part, names) for part in code.co_consts if not isinstance(part, CodeType)]
            enclosing = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            scope = {**value.__globals__, **{name: cell.cell_contents for name, cell in enclosing}}
            references = sorted({name for code in codes for name in (*_globals(code), *code.co_freevars)} & scope.keys())
            names = frozenset(name for code in codes for name in code.co_names)  # attributes of modules among them
            content = value.__qualname__, _source(value.__code__.co_filename), [code.co_code for code in codes], references
            waiting.append((value.__defaults__, names))
        stamp.update(repr(content).encode())
        waiting += [(scope[name], names) for name in references]
    return stamp.hexdigest()


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that code reads; among co_names are also attributes, which may be names of other things."""
    words, shift = code.co_code, sys.version_info >= (3, 11)  # since then its last bit says something else
    for i in range(0, len(words), 2):
        if words[i] == dis.opmap["LOAD_GLOBAL"]:
            high = words[i - 1] << 8 if i and words[i - 2] == dis.EXTENDED_ARG else 0
            yield code.co_names[(high | words[i + 1]) >> shift]


@cache
def _source(path: str) -> bytes:
    """A hash of a file; of nothing where there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        return b""
