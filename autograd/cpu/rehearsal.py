"""What a companion does (companion.py): a step with kernels that do nothing, to know which it calls, and their compilation.

A kernel here only makes zeros of all arrays that it is called with, so that what comes next finds numbers, and says yes. Where
the step goes wrong because of that, it ends there, and what was called until then is compiled.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

import numba
import numpy as np
from numba.core.registry import cpu_target

from . import companion
from .companion import SIZE, YES
from .compile import Kernel, writable
from .disk import Kept

Called = list[tuple[Kernel, tuple[numba.types.Type, ...]]]


def main() -> None:
    """Rehearse the step that standard input brings, then compile what it calls, the last kernel first."""
    companion.alone = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process: the other one decides
    questions = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what other code prints is no question
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, answers), daemon=True).start()
    cpu_target.typing_context.refresh()  # takes its time, while the other process makes its model
    cpu_target.target_context.refresh()
    gc.disable()  # this process ends soon
    for kernel, kinds in reversed(rehearse(answers.get())):
        if isinstance(kernel._cache, Kept):
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

    def note(kernel: Kernel, *arguments):
        called.setdefault((kernel, tuple(writable(numba.typeof(argument)) for argument in arguments)))
        return _clear

    compiling, Kernel._compile_for_args = Kernel._compile_for_args, note
    try:
        with suppress(Exception):
            function, arguments = pickle.loads(step)
            function(*arguments)
    finally:
        Kernel._compile_for_args = compiling
    return list(called)


def _clear(*arguments) -> bool:
    for argument in arguments:
        if type(argument) is tuple:
            _clear(*argument)
        elif isinstance(argument, np.ndarray) and argument.flags.writeable:
            argument[...] = 0
    return True
