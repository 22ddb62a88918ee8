"""Shape strings, axis normalisation, broadcasting and its adjoint: the one place for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from .errors import ShapeError

_ARGUMENT = re.compile(r"(?P<name>\w+)(?P<optional>\?)?(?::(?P<kind>int|bool|const))?\[(?P<dims>[^\]]*)\]")


@dataclass(frozen=True)
class Argument:
    """One input or output of a signature: its name, kind ("float", "int", "bool" or "const") and dimension letters."""

    name: str
    dims: tuple[str, ...]
    kind: str = "float"
    optional: bool = False

    def __str__(self) -> str:
        kind = "" if self.kind == "float" else f":{self.kind}"
        return f"{self.name}{'?' if self.optional else ''}{kind}[{' '.join(self.dims)}]"


@dataclass(frozen=True)
class Signature:
    """A parsed shape string such as ``"x[... D], weight?[D] -> y[... D]"``.

    A letter is a size that must agree wherever it stands; ``...`` is any number of leading axes, broadcast together;
    ``*`` alone means that the operator checks the shape itself; a number is that exact size.
    ``?`` marks an optional input, ``:int`` and ``:bool`` plain integer and boolean arrays, ``:const`` a plain float array
    that has no gradient and keeps its own dtype.
    """

    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]

    @staticmethod
    @cache
    def parse(text: str) -> Signature:
        """Read a shape string; a malformed one raises ShapeError."""
        sides = text.split("->")
        if len(sides) != 2:
            raise ShapeError(f"signature {text!r} needs exactly one '->'")
        parsed = []
        for side in sides:
            arguments = []
            for match in _ARGUMENT.finditer(side):
                dims = tuple(match["dims"].split())
                if "..." in dims[1:] or ("*" in dims and len(dims) > 1):
                    raise ShapeError(f"signature {text!r}: '...' stands first and '*' alone in {match[0]!r}")
                arguments.append(Argument(match["name"], dims, match["kind"] or "float", bool(match["optional"])))
            if re.sub(r"[,\s]", "", _ARGUMENT.sub("", side)):
                raise ShapeError(f"signature {text!r}: cannot read {side.strip()!r}")
            parsed.append(tuple(arguments))
        return Signature(*parsed)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"

    @property
    def states(self) -> set[str]:
        """What a call hands on to the next: the optional inputs that have an output of the same name."""
        return {a.name for a in self.inputs if a.optional} & {a.name for a in self.outputs}

    @property
    def elementwise(self) -> bool:
        """Whether every argument is ``[...]``: plain NumPy broadcasting."""
        return all(a.dims == ("...",) for a in self.inputs + self.outputs)


def bind(name: str, argument: Argument, shape: tuple[int, ...], bound: dict[str, object]) -> None:
    """Bind the letters of one argument into ``bound``; a disagreement raises ShapeError."""
    dims = argument.dims
    if dims and dims[0] == "...":
        fixed = dims[1:]
        split = len(shape) - len(fixed)
        if split >= 0:
            lead = shape[:split]
            known = bound.get("...")
            if known is not None and known != lead:
                try:
                    lead = np.broadcast_shapes(known, lead)
                except ValueError:
                    raise ShapeError(
                        f"{name}: the leading axes {shape[:split]} of {argument} with shape {shape} do not broadcast "
                        f"with {known}"
                    ) from None
            bound["..."] = lead
        shape_tail = shape[split:] if split >= 0 else shape
    else:
        fixed, shape_tail = dims, shape
    if len(shape_tail) != len(fixed):
        raise ShapeError(f"{name}: {argument} has {len(fixed)} axes in its signature, but got shape {shape}")
    for letter, size in zip(fixed, shape_tail, strict=True):
        expected = int(letter) if letter.isdigit() else bound.setdefault(letter, size)
        if letter.isdigit() and expected != size:
            raise ShapeError(f"{name}: {argument} needs an axis of {letter}, got {size} (shape {shape})")
        if expected != size:
            raise ShapeError(f"{name}: {argument} has {letter} = {size}, but {letter} is {expected} (shape {shape})")


def normalize_axis(name: str, axis: int, ndim: int) -> int:
    """The axis counted from the front; out of range raises ShapeError."""
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise ShapeError(f"{name}: axis must be an integer, got {axis!r}")
    if not -ndim <= axis < ndim:
        raise ShapeError(f"{name}: axis {axis} does not exist in an array with {ndim} axes")
    return int(axis) % ndim


def normalize_axes(name: str, axis, ndim: int) -> tuple[int, ...]:
    """``None`` (all), an integer or a tuple (any order, mixed signs, possibly empty) as sorted axes from the front."""
    if axis is None:
        return tuple(range(ndim))
    entries = axis if isinstance(axis, tuple | list) else (axis,)
    axes = sorted(normalize_axis(name, a, ndim) for a in entries)
    if len(set(axes)) != len(axes):
        raise ShapeError(f"{name}: axis {axis!r} names an axis twice")
    return tuple(axes)


def reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after a reduction with keepdims."""
    return tuple(1 if i in axes else n for i, n in enumerate(shape))


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of ``shape`` can be broadcast to ``target``."""
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False))


def broadcast_axes(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of ``target`` along which an array of ``shape`` was repeated: broadcasting's adjoint sums over them."""
    lead = len(target) - len(shape)
    return tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and target[lead + i] != 1
    )
