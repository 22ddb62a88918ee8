"""What is switched on here: recording, checks, forced forms and kernels. Always restored after exceptions.

Switches are context variables: each thread and each asyncio task has its own. A thread that works for another runs in a copy
of that one's context, ``contextvars.copy_context().run(...)``, as the workers of minitv's trainer do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass

PRODUCTS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Switches:
    """The position of every switch, and the contexts that are entered, the innermost last."""

    entered: tuple = ()
    recording: bool = True  # operators record nodes for backward
    checking: bool = False  # every output is tested for NaN and infinity; saved arrays become read-only
    complex_step: bool = False  # complex arrays pass through forms, for exact derivatives in autograd.check
    products: str = PRODUCTS[0]  # how the operator linear multiplies
    watcher: Callable | None = None  # is told of every call of an operator, see watch
    depth: int = 0  # how many grad(f) calls are active: inner ones must stay differentiable
    uses: tuple = ()  # the use(...) requests among what is entered


_current = ContextVar("autograd switches", default=Switches())  # noqa: B039 (it is frozen)
switches = _current.get  # the Switches of this thread or task


class Switch(ContextDecorator):
    """A context manager and decorator that sets some of the switches; without any it is a request, see ``use``."""

    def __init__(self, **positions):
        self._positions = positions

    def __enter__(self):
        _enter((*switches().entered, self))
        return self

    def __exit__(self, *_):
        entered = switches().entered
        if self in entered:  # the last time only: a generator may leave its block late
            last = len(entered) - 1 - entered[::-1].index(self)
            _enter(entered[:last] + entered[last + 1 :])


def _enter(entered: tuple) -> None:
    positions: dict = {}
    for switch in entered:
        positions.update(switch._positions)
    _current.set(Switches(entered, uses=tuple(s for s in entered if not s._positions), **positions))


def no_grad() -> Switch:
    """Record nothing inside: ``with no_grad(): ...`` or ``@no_grad()``; nestable.

    A generator function decorated with it runs its body *after* the decorator has left: open the ``with`` inside.
    """
    return Switch(recording=False)


def enable_grad() -> Switch:
    """Record inside, even within ``no_grad``."""
    return Switch(recording=True)


def products(kind: str) -> Switch:
    """How the operator ``linear`` multiplies inside, forward and in the gradients of what it computed there.

    ``float32``, or with factors that are rounded to the nearest of fewer bits and sums in float32: ``bf16`` to 8 bits,
    where a processor has AVX512-BF16 or on a GPU, ``tf32`` to 11 bits on a GPU. Every array stays float32; float64 is refused.
    """
    if kind not in PRODUCTS:
        raise ValueError(f"products: {kind!r} is unknown, allowed: {', '.join(PRODUCTS)}")
    return Switch(products=kind)


def watch(see: Callable) -> Switch:
    """Tell ``see(op, args, kwargs, result)`` of every call of an operator inside, after it.

    What forms and gradients call on their way is part of such a call, and is not told.
    """
    return Switch(watcher=see)


def watched(op, args: tuple, kwargs: dict):
    """A call of an operator, and telling the watcher of it."""
    see = switches().watcher
    with Switch(watcher=None):
        result = op(*args, **kwargs)
    see(op, args, kwargs, result)
    return result


def check_mode() -> Switch:
    """Raise NonFiniteError at the first operator whose output or gradient has a NaN or an infinity.

    Outputs are compared with the operator's signature too. Arrays that backward will need are made read-only, so writing to
    one raises at the line that does it. Slow.
    """
    return Switch(checking=True)
