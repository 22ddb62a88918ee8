"""What a companion does (companion.py): a step with kernels that do nothing, to know which it calls, and their compilation.

A kernel here only makes zeros of all arrays that it is called with, so that what comes next finds numbers, and says yes. Where
the step goes wrong because of that, it ends there, and what was called until then is compiled.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import numba
import numpy as np
from numba.core.registry import cpu_target

from . import companion
from .companion import SIZE, YES
from .compile import Kernel, writable
from .disk import Kept, cache_directory

LONG = 2000  # bytes of Python's code: a kernel of more takes seconds, the others are done while the other process has one

Called = list[tuple[Kernel, Any]]  # kernels, and types or a signature for each


def main() -> None:
    """Rehearse the step that standard input brings, then compile what it calls, the last kernel first, and long ones before."""
    companion.alone = True
    if cache_directory() is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process: the other one decides
    questions = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what other code prints is no question
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, answers), daemon=True).start()
    cpu_target.typing_context.refresh()  # takes its time, while the other process makes its model
    cpu_target.target_context.refresh()
    called = rehearse(answers.get())
    for kernel, kinds in sorted(reversed(called), key=lambda call: len(call[0].py_func.__code__.co_code) < LONG):
        if isinstance(kernel._cache, Kept) and Kept.writing:
            path = kernel._cache.path(kinds, cpu_target.target_context.codegen())
            if not path.exists():
                questions.write(path.name.encode() + b"\n")
                if answers.get() == YES:
                    kernel.compile(kinds)
    os._exit(0)  # a thread still listens


def _listen(stream: BinaryIO, answers: queue.SimpleQueue[bytes]) -> None:
    """Pass on what the other process says, and end this one when it has ended."""
    (size,) = SIZE.unpack(stream.read(SIZE.size).ljust(SIZE.size, b"\0"))
    part = stream.read(size)
    while part:
        answers.put(part)
        part = stream.read(1)
    os._exit(0)


def rehearse(step: bytes) -> Called:
    """The kernels that a pickled step calls, and the types with which it does, in the order of their first calls."""
    called: dict[tuple[Kernel, tuple], None] = {}
    declared: set[Kernel] = set()  # those that are compiled for types of which no call is

    def declare(kernel: Kernel, signature) -> None:
        declared.add(kernel)
        called.setdefault((kernel, signature))

    def note(kernel: Kernel, *arguments):
        if kernel not in declared:
            called.setdefault((kernel, tuple(writable(numba.typeof(argument)) for argument in arguments)))
        return _clear

    instead = {"compile": declare, "disable_compile": lambda kernel: None, "_compile_for_args": note}
    before = {name: getattr(Kernel, name) for name in instead}
    _set(instead)
    with suppress(Exception):
        function, arguments = pickle.loads(step)
        function(*arguments)
    _set(before)
    return list(called)


def _set(methods: Mapping[str, Callable]) -> None:
    for name, function in methods.items():
        setattr(Kernel, name, function)


def _clear(*arguments) -> bool:
    for argument in arguments:
        if type(argument) is tuple:
            _clear(*argument)
        elif isinstance(argument, np.ndarray) and argument.flags.writeable:
            argument[...] = 0
    return True
