"""shrink: a call that shows a fault, made as small and as simple as it can be, and written as a line of Python.

A draw is a list of integers (draw.py), so a smaller draw is one with smaller integers: fewer axes, shorter axes, simpler
parameters, plain memory. What still fails then is simplified array by array: zeros, ones, whole numbers, nothing at all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .draw import Draw
from .registry import lookup
from .verify import Attempt, arguments, checks, flat, floats, importable, is_linear, refuses, unflat

PATIENCE, TRIES = 15.0, 600  # seconds, and calls


class _Search:
    """Calls that fail as the first one did, until the patience is over."""

    def __init__(self, attempt: Attempt, error: Exception, dtype):
        self.attempt, self.kind, self.dtype = attempt, type(error), dtype
        self.end, self.tries = time.monotonic() + PATIENCE, 0

    def over(self) -> bool:
        return time.monotonic() > self.end or self.tries >= TRIES

    def draw(self, choices: Sequence[int], sizes=None) -> Draw:
        return Draw.replayed(choices, self.dtype, self.attempt.layouts(), sizes)

    def fails(self, args, params, further: Sequence[int]) -> bool:
        """Whether a call fails in the same way; ``further`` is what the check draws."""
        self.tries += 1
        try:
            refused = refuses(self.attempt.op, self.attempt.route, args, params)
        except Exception:  # no kernel knows such a call
            return False
        return not refused and isinstance(self.failure(args, params, self.draw(further)), self.kind)

    def failure(self, args, params, draw: Draw) -> Exception | None:
        """What is wrong with a call of copies: a route that writes to its inputs must not change what is printed."""
        op = self.attempt.op
        return self.attempt.failure(unflat(op, [x if x is None or not x.flags.writeable else _filled(x, np.array(x))
                                                for x in flat(op, args)]), params, draw)

    def redrawn(self, choices: Sequence[int], sizes) -> tuple | None:
        """(args, params, how many integers decide them, all integers with their least values) of a draw that fails."""
        draw = self.draw(choices, sizes)
        self.tries += 1
        try:
            call = self.attempt.call(draw)
        except Exception:  # these sizes do not go together
            return None
        if call is None:
            return None
        count = len(draw.choices)
        failed = isinstance(self.failure(*call, draw), self.kind)
        return (*call, count, draw.choices) if failed else None


def shrunk(attempt: Attempt, error: Exception, choices: Sequence[int], dtype, sizes) -> str:
    """A line of Python that shows the failure of a draw, or of a smaller one; empty if the draw does not fail again."""
    search, sizes, choices = _Search(attempt, error, dtype), dict(sizes), list(choices)
    best = search.redrawn(choices, sizes)
    if best is None:
        return ""
    best = _smaller(search, best, sizes)
    args, params, count, taken = best
    further = [value for value, _ in taken[count:]]
    args, params, further = _simpler(search, args, params, further)
    return line(attempt, args, params, further)


def _smaller(search: _Search, best: tuple, sizes: dict[str, int]) -> tuple:
    """The smallest draw that still fails: one integer after the other, again until nothing changes."""
    for letter in list(sizes):
        for other in [None, *sorted({1, 2, 3, sizes[letter] // 4, sizes[letter] // 2, sizes[letter] - 1} - {0})]:
            if search.over():
                return best
            trial = {name: size for name, size in sizes.items() if name != letter}
            if other is not None:
                if other >= sizes[letter]:
                    break
                trial[letter] = other
            if found := search.redrawn([value for value, _ in best[3]], trial):
                best = found
                sizes.clear()
                sizes.update(trial)
                break
    changed = True
    while changed:
        changed = False
        for place in range(len(best[3])):
            if place >= len(best[3]):
                break
            value, low = best[3][place]
            for smaller in dict.fromkeys((low, low + 1, low + 2, (low + value) // 2, value - 1)):
                if search.over():
                    return best
                if low <= smaller < value:
                    trial = [v for v, _ in best[3]]
                    trial[place] = smaller
                    if found := search.redrawn(trial, sizes):
                        best, changed = found, True
                        break
    return best


def _simpler(search: _Search, args, params: dict[str, Any], further: list[int]) -> tuple:
    """The same call with simpler arrays and parameters, where it still fails."""
    op = search.attempt.op

    def attempt(values=None, others=None, more=None) -> bool:
        nonlocal args, params, further
        trial = (args if values is None else unflat(op, values), params if others is None else others,
                 further if more is None else more)
        if search.over() or not search.fails(*trial):
            return False
        args, params, further = trial
        return True

    while further and attempt(more=further[:-1]):
        pass
    for name in [name for name in params if name in op.params]:
        attempt(others={key: value for key, value in params.items() if key != name})
    for i, argument in enumerate(arguments(op, args)):
        x = flat(op, args)[i]
        if x is None:
            continue

        def replaced(value, i=i) -> list:
            values = flat(op, args)
            values[i] = value
            return values

        if argument.optional and not op.variadic and attempt(replaced(None)):
            continue
        attempt(replaced(np.array(x, order="C")))
        if i not in floats(op, args):
            continue
        for simple in (np.zeros_like, np.ones_like, lambda x: np.rint(x) + 0, lambda x: np.round(x, 1)):
            if attempt(replaced(_filled(x, simple(np.asarray(x))))):
                break
        x = flat(op, args)[i]
        if x.size <= 16 and x.flags.writeable:
            for at in np.ndindex(x.shape):
                for number in (0, 1, np.rint(x[at])):
                    y = _filled(x, np.asarray(x))
                    y[at] = number
                    if x[at] != number and attempt(replaced(y)):
                        x = y
                        break
    return args, params, further


def _filled(like: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values in the memory layout of another array; one that cannot be written to, if that one cannot."""
    if like.flags.c_contiguous or not like.size:
        found = np.array(values, like.dtype, order="C")
        found.flags.writeable = like.flags.writeable
        return found
    if like.flags.f_contiguous:
        return np.asfortranarray(values, like.dtype)
    if any(stride == 0 and n > 1 for stride, n in zip(like.strides, like.shape, strict=True)):
        return np.broadcast_to(np.array(values[:1], like.dtype), like.shape)
    if like.strides[-1] < 0:
        return np.array(values[..., ::-1], like.dtype, order="C")[..., ::-1]
    return np.repeat(np.array(values, like.dtype), 2, axis=-1)[..., ::2]


# -- the line ----------------------------------------------------------------------------------------------------------
def line(attempt: Attempt, args, params: dict[str, Any], further: Sequence[int]) -> str:
    """Python that makes the call and the check again, by ``reproduce``."""
    op = attempt.op
    where, name = importable(op)
    values = ", ".join(_written(x) for x in flat(op, args))
    rest = [f"[{values}]"] + [repr(params)] * bool(params or further) + [repr(list(further))] * bool(further)
    return (f"import numpy as np; {where}from autograd.shrink import reproduce; "
            f"reproduce({name}, {attempt.route!r}, {attempt.name!r}, {', '.join(rest)})")


def _written(x: np.ndarray | None) -> str:
    if x is None:
        return "None"
    if not x.size:
        return f"np.zeros({x.shape}, np.{x.dtype.name})"
    if x.flags.c_contiguous:
        return _literal(x) if x.flags.writeable else f"np.broadcast_to({_literal(x)}, {x.shape})"  # which is not, either
    if x.flags.f_contiguous:
        return f"np.asfortranarray({_literal(x)})"
    if any(stride == 0 and n > 1 for stride, n in zip(x.strides, x.shape, strict=True)):
        return f"np.broadcast_to({_literal(x[:1])}, {x.shape})"
    if x.strides[-1] < 0:
        return f"{_literal(x[..., ::-1])}[..., ::-1]"
    return f"np.repeat({_literal(x)}, 2, axis=-1)[..., ::2]"


def _literal(x: np.ndarray) -> str:
    kind = f"np.{x.dtype.name}"
    if x.size > 1 and (x == x.flat[0]).all():
        return f"np.full({x.shape}, {_number(x.flat[0])}, {kind})"
    if x.size > 64:
        return _drawn(x)
    text = repr(x.tolist()).replace("inf", "np.inf").replace("nan", "np.nan")
    return f"np.array({text}, {kind})"


def _number(value) -> str:
    return repr(value.item()).replace("inf", "np.inf").replace("nan", "np.nan")


def _drawn(x: np.ndarray) -> str:
    """A large array, from the bytes of its values."""
    import base64
    import zlib

    packed = base64.b85encode(zlib.compress(np.ascontiguousarray(x).tobytes(), 9)).decode()
    return (f"np.frombuffer(bytearray(__import__('zlib').decompress(__import__('base64').b85decode({packed!r}))), "
            f"np.{x.dtype.name}).reshape({x.shape})")


def reproduce(op, route: str, check: str, args: Sequence, params: dict[str, Any] | None = None,
              further: Sequence[int] = ()) -> None:
    """Make one check of one call of an operator: AssertionError, or the operator's own error, if it does not hold.

    ``args`` are the inputs in the order of the signature, ``params`` parameters and tuning numbers; ``further`` decides what
    the check itself draws, as gradients of outputs.
    """
    op = lookup(op)
    known = checks(op, route, is_linear(op))
    if check not in known:
        raise LookupError(f"{op.name}, {route}: no check {check!r}, there are {', '.join(known)}")
    attempt, params = known[check], dict(params or {})
    dtype = next((x.dtype for x in args if x is not None and x.dtype.kind == "f"), np.float64)
    attempt.check(unflat(op, list(args)), params, Draw.replayed(further, dtype, attempt.layouts()))
    print(f"{op.name}, {route}: {check}: it holds")
