"""The memory that a model takes, known before any of it is taken.

Weights are made by ``array``. While ``measured`` builds a model, it makes stand-ins that repeat one number and take no memory,
and adds up what they stand for. So a size that no machine holds is refused at once, with the memory that it would take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from decimal import Decimal
from typing import Any

import numpy as np

from autograd.cpu.process import memory

from .errors import UserError

_measuring: ContextVar[list[int] | None] = ContextVar("bytes of every array of the model that is measured", default=None)


def array(shape: tuple[int, ...], dtype: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The new array [shape] that ``make()`` gives, as ``dtype``; UserError before that if the machine cannot hold it."""
    check(bytes_of(shape, dtype), f"an array of {' x '.join(map(_number, shape))} numbers in the model")
    if (sizes := _measuring.get()) is None:
        return np.asarray(make(), dtype, order="C")
    sizes.append(bytes_of(shape, dtype))
    return np.broadcast_to(np.zeros((), dtype), shape)


def measured(build: Callable[[], Any]) -> int:
    """The bytes of all weights and tables of the model that ``build()`` makes."""
    token = _measuring.set([])
    try:
        build()
        return sum(_measuring.get() or ())
    finally:
        _measuring.reset(token)


def check(size: int, what: str) -> None:
    """Raise UserError if the machine has less than ``size`` bytes."""
    if size > memory():
        raise UserError(f"{what} would take {text(size)} of memory, and this machine has {text(memory())}: choose a smaller "
                        "model, such as fewer --layers, a smaller --width or a shorter --context")


def bytes_of(shape: tuple[int, ...], dtype: Any) -> int:
    """The bytes of an array, however large."""
    return math.prod(map(int, shape)) * np.dtype(dtype).itemsize


def text(size: int) -> str:
    """A number of bytes for people: 12.3 MiB, 3.6 TiB, 1.5e+280 EiB."""
    for i, unit in enumerate(("KiB", "MiB", "GiB", "TiB", "PiB"), 1):
        if size < 1000 * 2 ** (10 * i):
            return f"{size / 2 ** (10 * i):.1f} {unit}"
    return f"{_number(size >> 60)} EiB"


def _number(value: int) -> str:
    return str(value) if value < 10**15 else f"{Decimal(value):.1e}"
