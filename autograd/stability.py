"""How the error of each route grows: with the length of the sequence, and with the size of the keys.

Products of large numbers lose digits in every algorithm: a result that depends steeply on its inputs cannot be better than
they are. So what is allowed at a point is what ``check_values`` allows, or CONDITION times what changes if every input is
rounded once more, whichever is larger. An algorithm that loses more than that is unstable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .draw import Draw
from .metric import TOLERANCE, distance
from .op import Op
from .registry import lookup
from .verify import (
    beside_its_size,
    compute,
    differentiable,
    differentiate,
    draw_call,
    flat,
    floats,
    forms,
    importable,
    kernels,
    refuses,
    routes,
    split,
    substitute,
    terms,
    wide,
)

CONDITION = 256.0  # as many roundings as TOLERANCE allows to a result
SMALL = {"B": 1, "H": 1, "G": 1, "K": 8, "V": 4, "C": 4, "D": 8}  # the other sizes


@dataclass
class Point:
    """The largest error of values and of gradients at one length, relative to the largest value, and what is allowed there."""

    values: float = 0.0
    gradients: float = 0.0
    allowed: float = 0.0  # of the one that is nearer to its limit
    share: float = 0.0  # of what is allowed
    calls: int = 0

    def add(self, kind: str, error: float, allowed: float) -> None:
        setattr(self, kind, max(getattr(self, kind), error))
        if error / allowed >= self.share:
            self.share, self.allowed = float(error / allowed), float(allowed)


@dataclass
class Curve:
    """The errors along one route with keys of one size (root mean square), by length."""

    route: str
    scale: float
    points: dict[int, Point] = field(default_factory=dict)
    seed: int = 0
    example: str = ""  # a line of Python that shows a failure at its smallest

    @property
    def failing(self) -> dict[int, Point]:
        """The points where an error is larger than what is allowed."""
        return {length: point for length, point in self.points.items() if not point.share <= 1}

    @property
    def ok(self) -> bool:
        """Whether there are none."""
        return not self.failing


def growing(op: Op) -> str:
    """The input that is scaled: the keys k, or else the first input with a gradient."""
    return "k" if "k" in op.floats else op.floats[0]


def has_length(op: Op) -> bool:
    """Whether the operator reads a sequence, along the letter T, and has a gradient."""
    return op.differentiable and not op.variadic and any("T" in a.dims for a in op.signature.inputs)


def stability(op: Op, lengths: Sequence[int] = (16, 64, 256, 1024), scales: Sequence[float] = (1, 10, 100), seed: int = 0,
              draws: int = 2, along: Callable[[str], bool] | None = None,
              tell: Callable[[str], None] | None = None) -> list[Curve]:
    """A curve for each route and size of the keys, in float32 beside the definition in float64; none without a length T."""
    if not has_length(op):
        return []
    curves = [Curve(route, scale, seed=seed) for route in filter(along, forms(op) + kernels(op)) for scale in scales]
    for length in lengths:
        for scale in scales:
            if tell:
                tell(f"stability, T = {length}, {growing(op)} of size {scale:g}")
            for number in range(draws):
                _measure(op, [c for c in curves if c.scale == scale], length, scale, seed + number)
    return [curve for curve in curves if curve.points]


def example(op: Op, curve: Curve) -> str:
    """A line of Python that shows again, at the smallest length, that an error along a curve is larger than what is allowed."""
    worst = min(curve.failing)
    lengths = sorted({*(2**i for i in range(worst.bit_length()) if 2**i < worst), worst})
    length = next((n for n in lengths if not _again(op, curve.route, n, curve.scale, curve.seed, curve.points[worst].calls).ok),
                  None)
    if length is None:
        return ""
    calls = next(n for n in range(1, curve.points[worst].calls + 1)
                 if not _again(op, curve.route, length, curve.scale, curve.seed, n).ok)
    where, name = importable(op)
    seed = curve.seed + calls - 1
    return (f"{where}from autograd.stability import reproduce; "
            f"reproduce({name}, {curve.route!r}, {length}, {float(curve.scale)!r}, {seed})")


def _again(op: Op, route: str, length: int, scale: float, seed: int, calls: int = 1) -> Curve:
    curve = Curve(route, scale, seed=seed)
    for number in range(calls):
        _measure(op, [curve], length, scale, seed + number)
    return curve


def reproduce(op: Op | str, route: str, length: int, scale: float, seed: int) -> None:
    """Measure one call again, of inputs of this length and this size: AssertionError if the error is larger than allowed."""
    op = lookup(op)
    if route not in routes(op):
        raise LookupError(f"{op.name}: no route {route!r}, there are {', '.join(routes(op))}")
    where = f"{op.name}, {route}: with {growing(op)} of size {scale:g} and T = {length}"
    for point in _again(op, route, length, scale, seed).points.values():
        assert point.share <= 1, f"{where}, {told(point)}"
    print(f"{where}: it holds")


def told(point: Point) -> str:
    """What is wrong at a point, in words."""
    if np.isinf(point.share):
        return "there are numbers that are not finite, or NaN, where the definition has others"
    return f"the error is {point.share:.1f} times what is allowed ({point.allowed:.1e})"


def _of_float32(arrays: Iterable[np.ndarray]) -> bool:
    """Whether float32 has all these numbers: beyond its largest one, infinity is the right answer, and has no digits."""
    return all((np.abs(a) <= np.finfo(np.float32).max).all() for a in arrays if a.dtype.kind == "f")


def _measure(op: Op, curves: list[Curve], length: int, scale: float, seed: int) -> None:
    letters = {letter for a in op.signature.inputs for letter in a.dims}
    sizes = {letter: size for letter, size in {**SMALL, "T": length, "S": length}.items() if letter in letters}
    draw = Draw.seeded(seed, np.float32, sizes=sizes)
    with draw.filled():
        args, params = draw_call(op, "definition", draw)
    place = [a.name for a in op.signature.inputs].index(growing(op))
    x = flat(op, args)[place]
    size = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    args = substitute(op, args, place, (x * (scale / (size or 1.0))).astype(np.float32))
    positions = floats(op, args)
    rounding = np.random.default_rng(seed)
    near = wide(op, args)
    for i in positions:
        x = flat(op, near)[i]
        near = substitute(op, near, i, x * (1 + np.where(rounding.random(x.shape) < 0.5, 1, -1) * 2.0**-24))
    exact, moved = (compute(op, "definition", call, params) for call in (wide(op, args), near))
    if not _of_float32(exact):
        return  # nothing that has digits
    cotangents = [draw.generator().standard_normal(o.shape) if o.dtype.kind == "f" else None for o in exact]
    slopes, turned = (differentiate(op, forms(op)[0], call, split(op, params)[0], cotangents)
                      for call in (wide(op, args), near))
    steep = not _of_float32(slopes.values())
    limit = TOLERANCE[np.dtype(np.float32)] * np.sqrt(max(terms(op, *flat(op, args), *cotangents), 1))

    def compared(point: Point, kind: str, found, expected, others) -> None:
        for one, two, other in zip(found, expected, others, strict=True):
            if two.dtype.kind == "f":
                point.add(kind, distance(one, two), max(limit, CONDITION * distance(other, two)))

    for curve in curves:
        if refuses(op, curve.route, args, params):
            continue
        point = curve.points.setdefault(length, Point())
        point.calls += 1
        compared(point, "values", compute(op, curve.route, args, params), exact, moved)
        if differentiable(op, curve.route) and not steep:
            halves = [None if c is None else c.astype(np.float32) for c in cotangents]
            found = differentiate(op, curve.route, args, params, halves)
            sized = ([beside_its_size(grads[i], flat(op, args)[i], cotangents, exact) for i in positions]
                     for grads in (found, slopes, turned))
            compared(point, "gradients", *sized)

