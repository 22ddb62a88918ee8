"""Tasks: what a model is trained for. A module declares one or several, as ``class Text(Task, name="text", summary="...")``.

A task owns its data, its loss, the figure that says how good a model is, baselines that do not learn, what a person sees while a
model trains, and its part of a checkpoint. The trainer, the command line and the reports know no more of a task than stands
here. ``--task NAME`` chooses one, and its ``Options`` become options of the command.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, cross_entropy, no_grad
from autograd.device import beside, read
from autograd.random import Random

from ..catalogue import Entry, entries

NOTHING = -1  # a label where no answer is asked


class Batch(NamedTuple):
    """Some sequences: what the model reads, and the answers that are asked of it; every array begins with the axis B."""

    inputs: np.ndarray  # ids [B T]
    labels: np.ndarray  # ids [B T], NOTHING where no answer is asked

    def part(self, rows: slice) -> Batch:
        """Some of the sequences."""
        return type(self)(*(array[rows] for array in self))


class Task:
    """A task with ids as inputs and answers; a task of another kind overrides ``loss`` and ``score``.

    ``Task(options, context, batch, seed, saved)`` makes the data of a run: ``context`` is the longest sequence that the model
    reads, ``batch`` the number of sequences in a step, and ``saved`` what ``state`` gave when the run began, if it is resumed
    or only read.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type]  # a dataclass of options, see config.py
    causal: ClassVar[bool] = True  # whether an answer may depend on the past alone
    metric: ClassVar[str] = "accuracy"  # the figure that ``value`` gives, with its unit
    rising: ClassVar[bool] = True  # whether more of it is better

    vocab: int  # ids are 0 ... vocab - 1
    baselines: dict[str, float]  # the metric of methods that do not learn, by name

    def __init_subclass__(cls, *, name: str | None = None, summary: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name, cls.summary = name, summary

    def batch(self, step: int) -> Batch:
        """The sequences of a step: a function of the seed and the step alone, so that a resumed run goes on with its own."""
        raise NotImplementedError

    def held_out(self) -> Batch:
        """Sequences that are not trained on, the same at every evaluation."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch, rng: Random | None = None) -> tuple[Tensor, int]:
        """The sum of the cross-entropies in nats over all answers, and how many there are; ``rng`` switches dropout on."""
        logits, labels = self.answers(model, batch, rng)
        return cross_entropy(logits, beside(labels, logits.data), reduction="sum"), labels.size

    def score(self, model: Any, batch: Batch) -> np.ndarray:
        """Sums over the answers of a batch, which add up over batches: cross-entropy in nats, answers, right answers."""
        with no_grad():
            logits, labels = self.answers(model, batch)
            labels = beside(labels, logits.data)
            right = (logits.data.argmax(-1) == labels).sum()
            return np.array([*read(cross_entropy(logits, labels, reduction="sum").data, right), labels.size])[[0, 2, 1]]

    def value(self, sums: np.ndarray) -> float:
        """The metric, of sums that ``score`` gave."""
        return float(sums[2] / sums[1])

    def show(self, model: Any, step: int) -> str:
        """What a person sees at an evaluation, as lines of text; empty for nothing."""
        return ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the task, as JSON."""
        return {}

    @staticmethod
    def answers(model: Any, batch: Batch, rng: Random | None = None) -> tuple[Tensor, np.ndarray]:
        """Logits [N V] or [B T V] where an answer is asked, and the labels [N] or [B T] there."""
        asked = batch.labels != NOTHING
        if asked.all():
            return model(batch.inputs, rng), batch.labels
        return model(batch.inputs, rng, at=np.flatnonzero(asked)), batch.labels[asked]


def tasks() -> dict[str, Entry]:
    """Every task by name; imports none of them."""
    return entries(__name__, __path__)


def load(name: str) -> type[Task]:
    """The class of a task."""
    return tasks()[name].load()
