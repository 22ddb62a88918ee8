"""Statements of a review of Transformer variants, each with what the papers say and an experiment that measures it here.

The review is the blog article "A Review for Transformer Variants" of 2023. A module belongs to one of its systems, and declares
a function for each statement:

    @claim(1, "Transformer", "Time grows as T log T times d.", place="section Transformer", paper="O(T² d + T d²): ...")
    def time(measure):
        '''The exponents in T of attention alone and of a whole layer.'''
        fit = measure.exponent("T", {T: call for T in sizes})
        return WRONG(f"Attention grows as {fit}.", attention=fit)

The docstring says what is measured. ``measure`` (measure.py) has all that measures, and everything seeded. The function
compares what it measured and returns a verdict with a sentence about it and the numbers for a file. The verdict follows from
the numbers, so another machine may come to another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..catalogue import imported, modules
from ..config import choose
from ..errors import UserError


@dataclass(frozen=True)
class Finding:
    """What a run found out about a statement: the verdict, a sentence with what was measured, and the numbers by name."""

    verdict: Verdict
    measured: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What can be said of a statement; ``VERDICT(sentence, name=number, ...)`` is a Finding."""

    name: str

    def __call__(self, measured: str, **numbers: Any) -> Finding:
        return Finding(self, measured, numbers)

    def __str__(self) -> str:
        return self.name


RIGHT = Verdict("right")
CONDITIONS = Verdict("right with conditions")
WRONG = Verdict("wrong")
UNTESTABLE = Verdict("cannot be tested at this size")
UNDECIDED = Verdict("not decided in this run")  # what was measured does not tell, as on a busy machine: run it again
VERDICTS = (RIGHT, CONDITIONS, WRONG, UNTESTABLE, UNDECIDED)
REAL = (RIGHT, CONDITIONS, WRONG)


@dataclass(frozen=True)
class Claim:
    """A statement of the review, and the experiment that judges it."""

    number: int
    system: str
    statement: str  # in our words
    place: str  # in the review
    paper: str  # what the literature says
    test: Callable[[Any], Finding]

    @property
    def experiment(self) -> str:
        """What is measured, in a sentence."""
        return " ".join(inspect.getdoc(self.test).split())

    @property
    def command(self) -> str:
        """What shows it."""
        return f"minitv claims {self.number} --full"


_claims: dict[int, Claim] = {}


def claim(number: int, system: str, statement: str, *, place: str, paper: str) -> Callable[[Callable], Callable]:
    """Declare a statement; the function below it takes a Measure and returns a Finding."""
    def declare(test: Callable) -> Callable:
        if not test.__doc__:
            raise UserError(f"claim {number}: {test.__name__} has no docstring, which says what is measured")
        other = _claims.get(number)
        if other is not None and (other.test.__module__, other.test.__name__) != (test.__module__, test.__name__):
            raise UserError(f"claim {number} is declared twice: in {other.test.__module__} and in {test.__module__}")
        _claims[number] = Claim(number, system, statement, place, paper, test)
        return test

    return declare


def claims() -> dict[int, Claim]:
    """Every statement by its number."""
    for module in modules(__name__, __path__):
        imported(f"{__name__}.{module}")
    return dict(sorted(_claims.items()))


def chosen(words: Sequence[str]) -> list[Claim]:
    """The statements that numbers and names of systems mean, all without any; UserError for another word."""
    every = claims()
    systems = {each.system.lower(): each.system for each in every.values()}
    picked = set()
    for word in words:
        if word.isdecimal() and int(word) in every:
            picked.add(int(word))
        elif word.isdecimal():
            raise UserError(f"there is no claim {word}, allowed: {', '.join(map(str, every))}")
        else:
            system = systems[choose("claim or system", word.lower(), systems)]
            picked |= {number for number, each in every.items() if each.system == system}
    return [each for number, each in every.items() if number in picked or not words]
