"""A second process that compiles kernels of the first training step while this one compiles others.

The compiler holds Python's lock, so that threads do not help, and a step is not known before it runs: this process compiles a
kernel where it is first called. The companion takes the same step beforehand, with kernels that do nothing but write down how
they are called; then it compiles what was called, long kernels before others and the last of them first, into the same folder
(disk.py). The two meet in the middle. So that no kernel is compiled twice, the companion asks before it begins one, and this
process waits for one that the companion has begun.

    companion = Companion()
    watch(companion)                     from here on, the first kernel that is not on disk starts it, if nothing did before
    companion.rehearse(step, ...)        what it shall run, a function of a module with arguments that can be pickled
    companion.close()                    after the step, whatever it is doing then

It is a new interpreter on every system, which starts at once where no kernel was ever compiled. Nothing depends on it: it
never runs a kernel, and where it cannot be started or dies, this process compiles what is left. It ends when its standard input
does, which is when this process ends, in any way. There is none where only one core may be used, and without a folder for
kernels it ends at once.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import private
from .process import cores

LARGE = 2**20  # bytes of an array; larger ones are data, of which the companion gets zeros of the same shape
SIZE = struct.Struct("<Q")  # before the pickled step: how long it is
YES, NO = b"y", b"n"

watching: Companion | None = None  # what hears of kernels that are not on disk
alone = False  # no process is started: this is a companion itself


def watch(companion: Companion | None) -> None:
    """Let a companion hear of kernels that are not on disk, or nobody."""
    global watching
    watching = companion


class Companion:
    """The process, and who compiles which kernel; kernels go by the names of their files."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ours: set[str] = set()  # kernels that this process compiles
        self._begun: str | None = None  # what the companion compiles
        self._step: bytes | None = None
        self._process: subprocess.Popen | None = None
        self._closed = alone or cores() < 2 or not sys.executable
        self._started = False
        self.cold = not self._closed and _nothing_compiled()
        if self.cold:
            self._start()

    def missing(self, name: str) -> None:
        """Say that a kernel is not on disk. After this, either it is, or it is for this process to compile."""
        with self._changed:
            self._start()
            while self._begun == name:
                self._changed.wait()
            self._ours.add(name)

    def rehearse(self, step: Callable[..., Any], *arguments: Any) -> None:
        """What the companion shall run, told once; nothing where it cannot be pickled."""
        with self._changed:
            if self._step is None and not self._closed:
                with suppress(Exception):  # whatever a class of the arguments raises
                    self._step = _pickled(step, arguments)
                    self._changed.notify_all()

    def _start(self) -> None:
        if not self._started and not self._closed:
            self._started = True
            threading.Thread(target=self._serve, name="minitv companion", daemon=True).start()

    def close(self) -> None:
        """End the companion."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _serve(self) -> None:
        """Start the companion, tell it the step, and answer what it asks, until it ends."""
        try:
            with self._changed:
                if self._closed:
                    return
                self._process = _started()
            with self._process as process, suppress(OSError):  # it may end at any time
                with self._changed:
                    while self._step is None and not self._closed:
                        self._changed.wait()
                process.stdin.write(SIZE.pack(len(self._step or b"")) + (self._step or b""))
                process.stdin.flush()
                for line in process.stdout:
                    process.stdin.write(self._answer(line.decode().strip()))
                    process.stdin.flush()
        except OSError:  # there is no memory for it, or no right to start it
            pass
        finally:
            self._answer(None)

    def _answer(self, name: str | None) -> bytes:
        """Whether the companion may compile a kernel; when it asks, it has done with the one before."""
        with self._changed:
            free = name not in self._ours and not self._closed
            self._begun = name if free else None
            self._changed.notify_all()
        return YES if free else NO


def _nothing_compiled() -> bool:
    """Whether no kernel lies in any place for kernels; in which folder they would lie, only the compiler knows (disk.py)."""
    folder = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(folder, "minitv")] if folder else private.places("minitv")
    with suppress(OSError):
        return not any(next(folder.glob("*/*.nbc"), None) for folder in folders)
    return False


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj):
        if isinstance(obj, np.ndarray) and obj.nbytes > LARGE:
            return np.zeros, (obj.shape, obj.dtype)
        if isinstance(obj, type(threading.Lock())):
            return threading.Lock, ()
        return NotImplemented


def _pickled(step: Callable[..., Any], arguments: tuple) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump((step, arguments))
    return buffer.getvalue()


def _started() -> subprocess.Popen:
    """The process. What it says to people is lost: it can fail in many ways, none of which is theirs."""
    begin = f"import gc, sys; gc.disable(); sys.path[:] = sys.argv[1:]; from {__package__}.rehearsal import main; main()"
    return subprocess.Popen([sys.executable, "-c", begin, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)
