"""What the tasks share whose sequences are drawn anew at every step: no text, no memory of what was seen."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from autograd.random import Random

from ..config import option, settings, shown
from ..errors import UserError
from ..options import STEPS
from ..task import Batch, Task

HELD_OUT = Random(0).split(2**63)  # the same for every seed of a run: two runs answer the same questions


@dataclass(frozen=True)
class DrawnOptions:
    """sequences that are drawn"""

    eval_examples: int = option(1000, "held-out sequences read at an evaluation", low=1, high=2**20,
                               group=STEPS, resumable=True)


class Drawn(Task):
    """A task that ``draw`` defines; the sequences of a step come from the seed and the step, held-out ones from elsewhere."""

    defaults: ClassVar[dict[str, Any]] = {"batch": 64, "steps": 1000, "eval_every": 100}
    judged = "accuracy", "answer", "answers"
    description = "sequences that are drawn"

    def __init__(self, options: Any, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self._count, self._random = options, batch, Random(seed)
        self.prepare(context)

    def prepare(self, context: int) -> None:
        """Set ``vocab`` and what ``draw`` needs, from the options; UserError where the sequences do not fit the context."""
        raise NotImplementedError

    def draw(self, random: Random, count: int) -> Batch:
        """``count`` sequences, a function of the source alone."""
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        return self.draw(self._random.split(step), self._count)

    def held_out(self) -> Batch:
        return self._held_out

    @functools.cached_property
    def _held_out(self) -> Batch:
        return self.draw(HELD_OUT, self.options.eval_examples)


def check_drawn(options: Any, what: str, *names: str) -> None:
    """Raise UserError if one of these options, which concern data that is drawn, is given beside ``--data``."""
    for name in names if options.data else ():
        setting = settings(type(options))[name]
        if (value := getattr(options, name)) != setting.default:
            raise UserError(f"{setting.flag} {shown(value)}: this is for {what}, and --data gives other ones; allowed with "
                            f"--data: {shown(setting.default)}")


def choose(random: Random, rows: int, among: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Distinct integers below ``among`` [rows count] in the order in which they are drawn without replacement.

    Each is drawn with a probability proportional to its weight [among], by default the same for all: the first arrivals of a
    race in which integer i takes a time from the exponential distribution of rate weights[i] (Efraimidis and Spirakis 2006).
    """
    arrival = random.uniform((rows, among), np.float64)  # [rows among]
    if weights is not None:
        arrival = -np.log1p(-arrival) / weights
    first = np.argpartition(arrival, count - 1, axis=1)[:, :count]  # [rows count]
    return np.take_along_axis(first, np.argsort(np.take_along_axis(arrival, first, axis=1), axis=1), axis=1)


def fitting_length(length: int | None, context: int) -> int:
    """The length of the sequences that ``--length`` asks for, by default the context; UserError where it does not fit."""
    if length is not None and length > context:
        raise UserError(f"--length: sequences of {length} tokens do not fit --context {context}: "
                        "give shorter sequences, or a longer --context")
    return length or context
