"""What a task is: the data of a run, its loss, and the figure that says how good a model is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, cross_entropy, no_grad
from autograd.device import beside, read
from autograd.random import Random

from .errors import CheckpointError, UserError

EVERYTHING = "everything"  # stands in a state in place of a hash: other data, all of which is held out
NOTHING = -1  # a label where no answer is asked


class Batch(NamedTuple):
    """Some sequences: what the model reads, and the answers that are asked of it; every array begins with the axis B.

    A task whose model reads several arrays has a tuple of its own, in their order, with the labels at its end.
    """

    inputs: np.ndarray  # ids [B T]
    labels: np.ndarray  # ids [B T], NOTHING where no answer is asked

    def part(self, rows: slice) -> Batch:
        """Some of the sequences."""
        return type(self)(*(array[rows] for array in self))

    @property
    def length(self) -> int:
        """The positions of a sequence, by which micro-batches are sized."""
        return self.inputs.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens are read, for the speed of a run."""
        return self.inputs.size


@dataclass(frozen=True)
class NoOptions:
    """no options"""


class Task:
    """A task with ids as inputs and answers; a task of another kind overrides ``loss`` and ``score``.

    ``Task(options, context, batch, seed, saved)`` makes the data of a run: ``context`` is the longest sequence that the model
    reads, ``batch`` the number of sequences in a step, and ``saved`` what ``state`` gave when the run began, if it is resumed
    or only read.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type] = NoOptions  # a dataclass of options, see config.py
    reads: ClassVar[str] = "tokens"  # what an input is: tokens, or frames of sound; a model says the same of itself
    causal: ClassVar[bool | None] = True  # whether an answer may depend on the past alone; None: on the past or on both sides
    defaults: ClassVar[dict[str, Any]] = {}  # of the options that all tasks share, such as context and steps
    metric: ClassVar[str] = "accuracy"  # the figure that ``value`` gives, with its unit
    unit: ClassVar[str] = "accuracy"  # the same, as short as the status line needs it
    key: ClassVar[str] = "accuracy"  # its name in the log
    rising: ClassVar[bool] = True  # whether more of it is better
    tells_accuracy: ClassVar[bool] = False  # whether the share of right answers is told beside a metric that is another one
    goal: ClassVar[float | None] = None  # a value of the metric; compare says after how many steps each variant reached it
    after: ClassVar[str] = "what it learned is in {directory}"  # what can be done after a run
    writes: ClassVar[tuple[str, ...]] = ()  # the options of `minitv sample` that concern what a model of it writes
    suffix: ClassVar[str] = ""  # of the file that a model of it writes, where that is no text

    hashed: ClassVar[str] = ""  # where a state has the hash of the data, if a trained model can be judged by other data
    judged: ClassVar[tuple[str, str, str] | None] = None  # `minitv eval` without text: metric, what has a loss, what counts

    vocab: int  # ids are 0 ... vocab - 1
    baselines: dict[str, float]  # the metric of methods that do not learn, by name
    accuracies: dict[str, float]  # their share of right answers, where that is told beside the metric
    description: str  # of the data in a few words, where it is judged

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
        if getattr(model, "loss_chunks", 1) > 1:
            return model.loss(batch.inputs, batch.labels, NOTHING, rng)
        logits, labels = self.answers(model, batch, rng)
        return cross_entropy(logits, beside(labels, logits.data), reduction="sum"), labels.size

    def score(self, model: Any, batch: Batch) -> np.ndarray:
        """Sums over the answers of a batch, which add up over batches: cross-entropy in nats, answers, right answers."""
        with no_grad():
            logits, labels = self.answers(model, batch)
            labels = beside(labels, logits.data)
            counted = self.key == "accuracy" or self.tells_accuracy
            right = (logits.data.argmax(-1) == labels).sum() if counted else 0
            return np.array([*read(cross_entropy(logits, labels, reduction="sum").data, right), labels.size])[[0, 2, 1]]

    def value(self, sums: np.ndarray) -> float:
        """The metric, of sums that ``score`` gave."""
        return float(sums[2] / sums[1])

    def accuracy(self, sums: np.ndarray) -> float | None:
        """The share of right answers, of sums that ``score`` gave, where it is told beside the metric; None elsewhere."""
        return float(sums[2] / sums[1]) if self.tells_accuracy else None

    def interval(self, sums: np.ndarray) -> tuple[float, float] | None:
        """Bounds between which the metric lies with a confidence of 95 %, where the task knows them."""
        return None

    def remarks(self, sums: np.ndarray) -> list[str]:
        """What else a reader of the metric must know of the data, of sums that ``score`` gave, as sentences."""
        return []

    def training_value(self, loss: float) -> float | None:
        """The metric on a training batch, where the mean loss in nats says it; None elsewhere."""
        return None

    def asked(self, sums: np.ndarray) -> int:
        """How many answers the metric is a mean of, of sums that ``score`` gave."""
        return int(sums[1])

    def verdict(self, value: float, answers: int) -> str:
        """How a value of the metric, from so many answers, compares with the baselines, as a part of a sentence.

        An accuracy is better when it is so by two standard errors of guessing at the baseline's rate.
        """
        def margin(base: float) -> float:
            return 2 * math.sqrt(base * (1 - base) / answers) if self.key == "accuracy" else 0.0

        sign = 1 if self.rising else -1
        ranks = {name: sign * base for name, base in self.baselines.items()}  # larger is better
        beaten = [name for name, base in self.baselines.items() if sign * (value - base) > margin(base)]
        ahead = [name for name in ranks if name not in beaten]
        if not ahead:
            return "better than every baseline"
        if not beaten:
            return "no better than any baseline yet"
        return f"better than {max(beaten, key=ranks.get)}, behind {min(ahead, key=ranks.get)}"

    def about(self) -> list[tuple[str, str]]:
        """Lines (label, text) at the beginning of a run: the data and the baselines."""
        bases = "  ".join(f"{name}: {value:.3f}" for name, value in self.baselines.items())
        if self.tells_accuracy:
            bases += "; accuracy of  " + "  ".join(f"{name}: {value:.3f}" for name, value in self.accuracies.items())
        return [("task", f"{self.name}: {self.summary}"), ("baselines", f"{self.metric} of  {bases}")]

    def header(self) -> dict[str, Any]:
        """What the first line of a log says of the data, besides the metric and the baselines."""
        return {}

    def word(self, token: int) -> str:
        """How a token is written for a person."""
        return str(token)

    @classmethod
    def asked_of(cls, options: Any, tokenizer: Any, ids: np.ndarray) -> Batch:
        """What is read and asked for, where a text of ids [N] is one sequence; UserError where the task reads no text."""
        raise UserError(f"--text: a model of the task {cls.name} reads no text")

    def show(self, model: Any, rng: Random) -> str:
        """What a person sees at an evaluation, as lines of text; empty for nothing."""
        return ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the task, as JSON."""
        return {}

    @classmethod
    def shape(cls, options: Any) -> dict[str, int]:
        """What a model must know of the inputs besides the vocabulary, by the names of its arguments."""
        return {}

    @classmethod
    def stored_vocab(cls, saved: Mapping[str, Any]) -> int:
        """The number of ids, from a checkpoint's state."""
        if type(vocab := saved.get("vocab")) is not int or vocab < 1:
            raise CheckpointError("the checkpoint has no vocab, a positive integer")
        return vocab

    @classmethod
    def stored_tokenizer(cls, saved: Mapping[str, Any]) -> Any:
        """What turns text into ids and back, from a checkpoint's state; UserError where a task has no text."""
        raise UserError(f"the task {cls.name} has no text to write")

    @classmethod
    def write_file(cls, run: Any, options: Any, path: Any) -> str:
        """Write what a trained model of the task makes up into a file, and say what that is; for a task with a ``suffix``.

        ``run`` is a Trained as in sample.py, ``options`` are those of `minitv sample`.
        """
        raise NotImplementedError

    @classmethod
    def of_other_data(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's state for a task with other data, all of which is held out; UserError where data is drawn."""
        if not cls.hashed:
            raise UserError(f"--data: the sequences of the task {cls.name} are drawn, and the held-out ones are always the "
                            "same")
        return {**saved, cls.hashed: EVERYTHING}

    @classmethod
    def holds_out_all(cls, saved: Mapping[str, Any] | None) -> bool:
        """Whether a state is one that ``of_other_data`` gave."""
        return saved is not None and saved.get(cls.hashed) == EVERYTHING

    @classmethod
    def imported(cls, folder: Any, vocab: int) -> dict[str, Any] | None:
        """A checkpoint's state for a model of another program, which lies in a folder, with so many ids or classes.

        None where the model reads tokens, of which a checkpoint keeps the same for every task.
        """
        return None

    @classmethod
    def exported(cls, saved: Mapping[str, Any]) -> dict[str, bytes]:
        """Files by their names that other programs want beside a model with this state: what ``imported`` reads."""
        return {}

    @staticmethod
    def inherited(saved: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a new run on other data takes over of a checkpoint's state, when it begins with its weights."""
        return None

    @staticmethod
    def answers(model: Any, batch: Batch, rng: Random | None = None) -> tuple[Tensor, np.ndarray]:
        """Logits [N V] or [B T V] where an answer is asked, and the labels [N] or [B T] there."""
        *read, labels = batch
        questions = labels != NOTHING
        if questions.all():
            return model(*read, rng), labels
        return model(*read, rng, at=np.flatnonzero(questions)), labels[questions]
