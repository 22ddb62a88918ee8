"""verify: the proof that an operator is what it claims to be, along every route, as one table.

    print(verify(my_operator))     routes × values, gradients, derivatives, second order, laws, adjoint, repeatability
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from .draw import Draw, draw_inputs
from .errors import AutogradError, DeviceError
from .metric import recorded
from .op import Op
from .registry import lookup
from .shrink import shrunk
from .verify import DTYPES, IDENTITY, LAW, PLACES, Attempt, checks, declared, dtypes, is_linear, parsed, routes, split


@dataclass
class Row:
    """One check along one route, over all draws: the largest error relative to what is allowed, and the first failure."""

    route: str
    check: str
    error: float = 0.0
    allowed: float = 0.0
    draws: int = 0
    failure: str = ""
    example: str = ""  # a line of Python that shows the failure at its smallest

    @property
    def verdict(self) -> str:
        """What the check says."""
        return "FAILS" if self.failure else "holds" if self.draws else "not run"

    def measured(self, errors: list[tuple[float, float]]) -> None:
        """Keep the largest of these errors, relative to what is allowed."""
        for difference, allowed in errors:
            if allowed and difference * (self.allowed or 1.0) >= self.error * allowed:  # exact comparisons have no size
                self.error, self.allowed = difference, allowed


@dataclass
class Report:
    """What ``verify`` found; as text it is a table."""

    op: Op
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check ran, and none failed."""
        return bool(self.op.forms) and all(row.draws and not row.failure for row in self.rows)

    def __str__(self) -> str:
        failures = [f"\n{r.route}, {r.check}: {r.failure}" + (f"\nto see it again: {r.example}" if r.example else "")
                    for r in self.rows if r.failure]
        return "\n".join([f"{self.op.name}: {self.op.signature}", *lines(self.rows), *self.notes, *failures])


def lines(rows: list[Row]) -> list[str]:
    """The table of what was found."""
    cells = [("route", "check", "error", "allowed", "calls", "")]
    cells += [(r.route, r.check, _number(r.error) if r.allowed else "", _number(r.allowed) if r.allowed else "",
               str(r.draws), r.verdict) for r in _together(rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    return ["  ".join(cell.rjust(w) if 1 < i < 5 else cell.ljust(w)
                      for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in cells]


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


KINDS = {LAW: ("law", "laws"), IDENTITY: ("identity", "identities")}
MOST, LARGE = 20, 3  # draws for each call that a route takes; calls of a chosen size
AT_SHAPE = ", this shape"  # behind the name of a check


def _together(rows: list[Row]) -> list[Row]:
    """The rows of a table: the laws that hold along a route are one, and so are the identities."""
    table: list[Row] = []
    whole: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kind = next((kind for kind in KINDS if row.check.startswith(kind)), None)
        if kind is None or not row.draws or row.failure:
            table.append(row)
        elif (row.route, kind) not in whole:
            whole[row.route, kind] = [row]
            table.append(row)
        else:
            whole[row.route, kind].append(row)
    for (_, kind), members in whole.items():
        sums = replace(members[0], check=f"{len(members)} {KINDS[kind][len(members) > 1]}", draws=sum(r.draws for r in members))
        for other in members:
            sums.measured([(other.error, other.allowed)])
        table[next(i for i, row in enumerate(table) if row is members[0])] = sums
    return table


def verify(op: Op | str, draws: int = 20, seed: int = 0, *, sizes: Mapping[str, int] | None = None,
           along: Callable[[str], bool] | None = None, among: Callable[[str], tuple] | None = None,
           tell: Callable[[str], None] | None = None) -> Report:
    """Every route of an operator against its definition, its derivatives and its laws, on seeded draws.

    The report has a row for each route and check, with the largest relative error and what was allowed where it was largest;
    ``report.ok`` says whether all were run and hold. A failure names the draw's seed, and is made as small as it can be: the
    row's ``example`` is a line of Python that shows it again. What is declared wrongly raises.

    ``sizes`` are those of three more calls, by letters of the signature: values and gradients are then compared at this shape.
    Of the routes those count for which ``along(route)`` is true, and of the dtypes those of ``among(route)``; ``tell`` hears
    what is being checked.
    """
    op = lookup(op)
    report, linear, edges = Report(op), is_linear(op), smallest(op)
    report.notes += [f"{op.name} has no form"] * (not op.forms)
    report.notes += [f"{route} has no gradient" for route in op.routes if op.differentiable and not route.differentiable]
    for route in filter(along, routes(op)):
        try:
            with PLACES[parsed(route)[2]]():
                pass
        except DeviceError as error:
            report.notes.append(f"{route}: not run: {error}")
            continue
        for name, attempt in checks(op, route, linear).items():
            if tell:
                tell(f"{route}, {name}")
            row = Row(route, name)
            report.rows.append(row)
            for number in range(MOST * draws):  # some routes take few of the calls that are drawn for their operator
                if row.draws == draws or not _tried(attempt, row, number, seed + number, None, among):
                    break
            if attempt.of_any_size and not row.failure:
                fixed = getattr(declared(op, route), "sizes", {})
                all(edge.keys() & fixed.keys() or _tried(attempt, row, number, seed + number, edge, among)
                    for number, edge in enumerate(edges))
            if sizes and attempt.of_any_size and not row.failure:
                row = Row(route, f"{name}{AT_SHAPE}")
                report.rows.append(row)
                all(_tried(attempt, row, number, seed + number, sizes, among) for number in range(LARGE))
    return report


def letters(op: Op) -> dict[str, int]:
    """The letters of the signature whose sizes may be chosen, which some draws ask for, and the least size of each."""
    found: dict[str, int] = {}
    for seed in range(20):
        draw = Draw.seeded(seed)
        draw_inputs(op, draw)
        found |= draw.letters
    found.pop("", None)  # sizes without a letter
    return found


def smallest(op: Op) -> list[dict[str, int]]:
    """Sizes where an algorithm that is right elsewhere may be wrong, and which random draws may miss: each letter of the
    signature that can be chosen, alone, at its least size and one above it.
    """
    found = []
    for letter, least in letters(op).items():
        for size in (least, least + 1):
            draw = Draw.seeded(0, sizes={letter: size})
            with suppress(AutogradError, ValueError, TypeError, IndexError, ArithmeticError), draw.filled():
                args, params = draw_inputs(op, draw)
                op.accept(args, split(op, params)[0])  # not all sizes go together
                found.append({letter: size})
    return found


def _tried(attempt: Attempt, row: Row, number: int, seed: int, sizes, among) -> bool:
    """Check one seeded call; False after a failure."""
    kinds = dtypes(attempt.op, attempt.route) if among is None else among(attempt.route)
    if attempt.exact and np.float64 not in kinds:
        kinds = DTYPES[1:]  # a derivative is checked in float64
    dtype = np.float64 if attempt.exact else kinds[number % len(kinds)]
    draw = Draw.seeded(seed, dtype, attempt.layouts(), sizes)
    inner, taken = draw.integer, []
    draw.integer = lambda low, high: taken.append(inner(low, high)) or taken[-1]
    if (call := attempt.call(draw)) is None:
        return True
    row.draws += 1
    with recorded() as errors:
        error = attempt.failure(*call, draw)
    row.measured(errors)
    if error is None:
        return True
    shape = "".join(f" {letter}={size}" for letter, size in draw.sizes.items())
    row.failure = f"seed {seed}, {np.dtype(dtype)}{shape}: {type(error).__name__}: {error}"
    row.example = shrunk(attempt, error, taken, dtype, draw.sizes)
    return False
