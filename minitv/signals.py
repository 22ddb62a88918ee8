"""What the system asks of a running command: Ctrl-C, SIGTERM, and SIGHUP when a terminal or a connection closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Any

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal ended the command; ``code`` is the exit code that the shell expects."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Worker threads. If a signal or an error ends the block, nobody waits for them, and what is not begun is dropped."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def outcome(future: Future) -> Any:
    """What a future gives. A signal that comes as the wait begins is not heard before it ends, so no wait is long."""
    while True:
        try:
            return future.result(timeout=0.5)
        except TimeoutError:
            if future.done():
                return future.result()


class Stop:
    """Signals raise Stopped, wherever the program is; between ``begin`` and the end they only ask for a stop at the next step.

    ``signal`` is what arrived, also where Stopped was lost, as in a callback of another library.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._stepping = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, for example
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal is not None and not self._stepping and isinstance(error, Exception):
            raise Stopped(self.signal) from error  # a library made another error of it, as an import does

    def begin(self) -> None:
        """From here on the caller looks at ``signal`` after each step."""
        self._stepping = True
        if self.signal is not None:
            raise Stopped(self.signal)

    def _handle(self, number: int, frame: Any) -> None:
        first, self.signal = self.signal is None, number
        if not self._stepping or (not first and number == signal.SIGINT):
            raise Stopped(number)
        # A signal may arrive inside a write to the same stream, so not through it.
        with contextlib.suppress(OSError, ValueError):  # the reader, tee for example, may have died of the same Ctrl-C
            os.write(sys.stderr.fileno(), b"\nstopping after this step and saving (Ctrl-C again: stop now, without saving)\n")
