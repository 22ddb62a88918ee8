"""What the trainer promises to the parts of a model: one worker and four agree, and a step that fails leaves no trace."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from autograd import assert_close
from autograd.cpu import team
from autograd.random import Random
from minitv import variants
from minitv.experiment import WEIGHTS, Experiment
from minitv.nn import Buffer, gather
from minitv.stack import Reversible
from minitv.task import Batch, Task
from minitv.trainer import Trainer
from tests.autograd.test_team import fine

VOCAB, CONTEXT, BATCH = 9, 6, 8


class Shuffled(Task):
    """Random ids; a third of the answers is not asked, and not equally many in every sequence."""

    vocab = VOCAB

    def __init__(self):
        self.data = Random(4)

    def batch(self, step):
        ids = self.data.split(step).integers(0, VOCAB, (BATCH, CONTEXT))
        return Batch(ids, np.where(ids % 3 == 0, -1, (ids + 1) % VOCAB))


def counting(kind):
    """A mixer that keeps the running mean of what it reads, subtracts it, and multiplies by a random vector of each step."""

    class Counting(kind):
        def __init__(self, rng, model, options, layer=0, dtype=np.float32):
            super().__init__(rng, model, options, layer, dtype)
            self.mean = Buffer(np.zeros(model.width, dtype))
            self.factor = Buffer(np.ones(model.width, dtype))

        def __call__(self, x, rng=None):
            gather(self, x.data.sum(axis=(0, 1)), x.shape[0] * x.shape[1])
            return super().__call__((x - self.mean) * self.factor, rng)

        def add_statistics(self, total, count):
            self.mean.assign_(0.5 * self.mean.data + 0.5 * total / count)

        def redraw(self, step, rng):
            self.factor.assign_(rng.uniform(self.factor.shape, self.factor.dtype))

    return Counting


@pytest.fixture
def make(monkeypatch):
    """Trainers of small float64 models of a transformer's record with some fields changed."""
    monkeypatch.setattr(Experiment, "build", lambda self, vocab, copies=1: self.variant.build(
        self.model, self.mixer, vocab, Random(self.run.seed).split(WEIGHTS), np.float64))
    made = []

    def trainer(threads=1, micro=None, options=(), **changes):
        variant = replace(variants.load("transformer"), **changes)
        experiment = variant.configure(context=CONTEXT, layers=2, width=8, heads=2, batch=BATCH, threads=threads, warmup=0,
                                       micro_batch=micro, **dict(options))
        made.append(Trainer(experiment, Shuffled()))
        return made[-1]

    yield trainer
    for one in made:
        one.close()


def train(trainer, steps=3):
    losses = [trainer.step(trainer.task.batch(step), step) for step in range(steps)]
    return [np.array(losses), *trainer.model.state().values()]


@pytest.mark.parametrize("stack", ["residual", "reversible"])
def test_one_worker_and_four_agree(make, stack):
    changes = dict(mixer=counting(variants.load("transformer").mixer), options=dict(stack=stack))
    alone, together = train(make(micro=BATCH, **changes)), train(make(threads=4, micro=1, **changes))
    for one, other in zip(alone, together, strict=True):
        assert_close(other, one, terms=10_000)
    again = train(make(threads=1, micro=1, **changes))
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))
    means = [value for name, value in make(**changes).model.state().items() if name.endswith("mean")]
    assert len(means) == 2 and not any(mean.any() for mean in means)


def test_workers_without_a_micro_batch_help_the_others(make, monkeypatch):
    """Two micro-batches and one worker or five, with calls cut however small they are: the same, and the same bits."""
    alone = train(make(micro=BATCH))
    monkeypatch.setattr(team, "spans", fine)
    five, again = train(make(threads=5)), train(make(threads=1))
    for one, other, third in zip(alone, five, again, strict=True):
        assert_close(other, one, terms=10_000)
        assert np.array_equal(other, third)


def test_what_was_counted_is_the_mean_over_the_whole_batch(make):
    kind, seen = counting(variants.load("transformer").mixer), []

    class Watched(kind):
        def add_statistics(self, total, count):
            seen.append(count)
            super().add_statistics(total, count)

    train(make(threads=4, micro=2, mixer=Watched), steps=2)
    assert seen == [BATCH * CONTEXT] * 4  # two layers, two steps


def test_a_step_that_fails_leaves_buffers_as_they_were(make):
    trainer = make(mixer=counting(variants.load("transformer").mixer))
    weight = trainer.model.blocks[1].mixer.out.weight
    weight.assign_(np.where(np.arange(weight.size).reshape(weight.shape) == 0, math.inf, weight.numpy()))
    with np.errstate(all="ignore"):
        assert not math.isfinite(trainer.step(trainer.task.batch(0), 0))
        assert trainer.find_nonfinite(trainer.task.batch(0), 0).startswith("the output of linear")
    assert not trainer.model.blocks[0].mixer.mean.numpy().any()


def test_a_resumed_run_draws_the_same(make):
    changes = dict(mixer=counting(variants.load("transformer").mixer))
    through, half = make(**changes), make(**changes)
    train(through, 4)
    train(half, 2)
    resumed = make(**changes)
    resumed.model.load(half.model.state())
    resumed.optimizer.load(half.optimizer.state())
    for step in (2, 3):
        resumed.step(resumed.task.batch(step), step)
    assert all(np.array_equal(a, b) for a, b in
               zip(through.model.state().values(), resumed.model.state().values(), strict=True))


@pytest.mark.full
def test_the_reversible_stack_trains_as_the_plain_sums_do(make, monkeypatch):
    options = dict(stack="reversible", dropout=0.2)
    reversible = train(make(threads=3, micro=1, options=options))

    def plain(self, x, rng=None):
        one, two = x, x
        for layer, block in enumerate(self.blocks):
            for branch in block.branches:
                one, two = two, one + branch(two, rng and rng.split(layer))
        return (one + two) * 0.5

    monkeypatch.setattr(Reversible, "__call__", plain)
    for one, other in zip(reversible, train(make(threads=3, micro=1, options=options)), strict=True):
        assert_close(one, other, terms=10_000)
