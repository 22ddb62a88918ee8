"""What is switched on in this thread: recording, checks, forced forms and kernels. Always restored after exceptions."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator


class _State(threading.local):
    recording = True  # operators record nodes for backward
    checking = False  # every output is tested for NaN and infinity; saved arrays become read-only
    complex_step = False  # complex arrays pass through forms, for exact derivatives in autograd.check
    uses: tuple = ()  # the stack of use(...) requests, innermost last
    depth = 0  # how many grad(f) calls are active: inner ones must stay differentiable


STATE = _State()


class _Switch(threading.local, ContextDecorator):  # each thread that enters it has its own stack
    """A context manager and decorator that sets one field of the thread's state."""

    def __init__(self, field: str, value):
        self._field, self._value, self._before = field, value, []

    def __enter__(self):
        self._before.append(getattr(STATE, self._field))
        setattr(STATE, self._field, self._value)
        return self

    def __exit__(self, *_):
        setattr(STATE, self._field, self._before.pop())

    def _recreate_cm(self):
        return type(self)(self._field, self._value)


def no_grad() -> _Switch:
    """Record nothing inside: ``with no_grad(): ...`` or ``@no_grad()``. Per thread, nestable.

    A generator function decorated with it runs its body *after* the decorator has left: open the ``with`` inside.
    """
    return _Switch("recording", False)


def enable_grad() -> _Switch:
    """Record inside, even within ``no_grad``."""
    return _Switch("recording", True)


def check_mode() -> _Switch:
    """Raise NonFiniteError at the first operator whose output or gradient has a NaN or an infinity.

    Arrays that backward will need are made read-only, so writing to one raises at the line that does it. Slow.
    """
    return _Switch("checking", True)
