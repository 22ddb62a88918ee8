"""Modules: buffers, what is drawn anew before a step, and statistics that do not depend on how a step is divided."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import numpy as np
import pytest

from autograd import Tensor, assert_close, no_grad, sum, tanh
from autograd.errors import ShapeError
from autograd.random import Random
from autograd.reversible import reversible
from minitv.nn import Buffer, Linear, Module, Parameter, Stateful, Statistics, gather, undrawn
from minitv.optim import AdamW
from minitv.shift import Shifted
from tests.autograd import fake_cupy
from tests.minitv.models import build


class Features(Module):
    """y = tanh(x W) with random features W, drawn anew every 3 steps, and a table that follows from the width."""

    def __init__(self, width, dtype=np.float64):
        self.gain = Parameter(np.ones(width, dtype))
        self.features = Buffer(Random(0).normal((width, width), dtype))
        self.table = Buffer(np.arange(width, dtype=dtype), saved=False)

    def __call__(self, x):
        return tanh(x @ self.features) * self.gain + self.table

    def redraw(self, step, rng):
        if step % 3 == 0:
            self.features.assign_(rng.normal(self.features.shape, self.features.dtype))


class Rows(Stateful):
    """Parameters in a list."""

    def __init__(self):
        self.rows = [Parameter(np.full(2, i, float)) for i in range(3)]


def test_arrays_in_lists_are_found_and_a_state_needs_one():
    module = Rows()
    assert [name for name, _ in module.named_parameters()] == ["rows.0", "rows.1", "rows.2"]
    module.load({name: array + 1 for name, array in module.state().items()})
    assert [row.numpy()[0] for row in module.rows] == [1, 2, 3]
    assert module.constant(2.0, 3).dtype == np.float64
    shifted = Shifted(Stateful(), 4, np.float32)  # whose mixer has no array
    assert shifted.constant(0.0, 1).dtype == np.float32
    with pytest.raises(TypeError, match="Stateful has no parameter and no buffer"):
        shifted.mixer.constant(0.0, 1)


class Pair(Module):
    def __init__(self):
        self.first, self.second = Features(4), Features(4)
        self.again = self.first


# -- buffers -----------------------------------------------------------------------------------------------------------
def test_buffers_are_saved_and_restored_and_not_optimised():
    module, other = Pair(), Pair()
    assert [name for name, _ in module.named_parameters()] == ["first.gain", "second.gain"]
    assert [name for name, _ in module.named_buffers()] == ["first.features", "first.table", "second.features", "second.table"]
    assert list(module.state()) == ["first.gain", "first.features", "second.gain", "second.features"]
    assert AdamW(module).param.size == 8
    other.begin_step(0, Random(5))
    assert not np.array_equal(other.first.features.numpy(), module.first.features.numpy())
    module.load(other.state())
    assert np.array_equal(other.first.features.numpy(), module.first.features.numpy())
    with pytest.raises(ShapeError, match=r"load: first.features is missing; first.table is unknown"):
        module.load({**{n: a for n, a in other.state().items() if n != "first.features"}, "first.table": np.zeros(4)})


def test_a_training_step_leaves_buffers_alone():
    module = Features(4)
    optimizer, before = AdamW(module), module.features.numpy().copy()
    sum(module(Tensor(np.ones((2, 4))))).backward(sink=optimizer.buffers[0])
    optimizer.step(0.1)
    assert np.array_equal(module.features.numpy(), before) and not np.array_equal(module.gain.numpy(), np.ones(4))


def test_buffers_move_with_the_module(monkeypatch):
    moved = []
    monkeypatch.setattr("minitv.nn.move", lambda array, device: moved.append((array.shape, device)) or array)
    Features(4).to("cuda")
    assert moved == [((4,), "cuda"), ((4, 4), "cuda"), ((4,), "cuda")]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_buffers(duplicate):
    module = Features(4)
    other = duplicate(module)
    assert list(other.state()) == ["gain", "features"] and type(other.table) is Buffer and not other.table.requires_grad
    other.features.assign_(np.zeros((4, 4)))
    assert module.features.numpy().all()


# -- what is drawn anew ------------------------------------------------------------------------------------------------
def test_what_is_drawn_depends_on_the_step_and_the_place_alone():
    def features(*steps):
        module = Pair()
        for step in steps:
            module.begin_step(step, Random(9))
        return [module.first.features.numpy(), module.second.features.numpy()]

    through, resumed, other = features(*range(5)), features(3, 4), features(0)
    assert all(np.array_equal(a, b) for a, b in zip(through, resumed, strict=True))
    assert not np.array_equal(*through) and not np.array_equal(through[0], other[0])


# -- statistics --------------------------------------------------------------------------------------------------------
class Centered(Module):
    """y = x - mean, with the running mean of all rows that training saw."""

    def __init__(self, width):
        self.mean, self.steps = Buffer(np.zeros(width)), 0

    def __call__(self, x):
        gather(self, x.data.sum(axis=(0, 1)), x.shape[0] * x.shape[1])
        return x - self.mean

    def add_statistics(self, total, count):
        self.steps += 1
        self.mean.assign_(0.9 * self.mean.data + 0.1 * total / count)


class Model(Module):
    def __init__(self, width):
        self.centered = Centered(width)
        self.linear = Linear(Random(0), width, width, std=1.0, dtype=np.float64)

    def __call__(self, x):
        return self.linear(self.centered(x))


def train(workers, parts, steps=3):
    """A trainer's step: micro-batches in any order on threads, the statistics once."""
    model, rng = Model(5), np.random.default_rng(0)
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(steps):
            x, statistics = rng.normal(size=(12, 7, 5)) + np.arange(5), Statistics()
            edges = np.linspace(0, 12, parts + 1).astype(int)

            def micro_batch(i, x=x, statistics=statistics, edges=edges):
                with statistics.part(i):
                    sum(model(Tensor(x[edges[i] : edges[i + 1]]))).backward(sink=lambda leaf, gradient: None)

            jobs = [pool.submit(copy_context().run, micro_batch, i) for i in reversed(range(parts))]
            for job in jobs:
                job.result()
            assert not np.array_equal(model.centered.mean.numpy(), x.mean(axis=(0, 1)))
            statistics.apply()
    return model.centered


def test_one_worker_and_four_agree():
    alone, together = train(1, 1), train(4, 12)
    assert alone.steps == together.steps == 3
    assert_close(together.mean.numpy(), alone.mean.numpy(), terms=100)
    assert np.array_equal(train(4, 12).mean.numpy(), together.mean.numpy()), "the order of threads changes bits"
    rng, expected = np.random.default_rng(0), np.zeros(5)
    for _ in range(3):
        expected = 0.9 * expected + 0.1 * (rng.normal(size=(12, 7, 5)) + np.arange(5)).mean(axis=(0, 1))
    assert_close(alone.mean.numpy(), expected, terms=100)


def test_what_another_rank_counted_lies_where_the_model_does():
    """On a GPU too, where NumPy arrays do not add to those of a model."""
    with fake_cupy.installed("fast") as cupy:
        model = Model(3)
        modules = list(model.modules())
        mine, theirs = Statistics(), Statistics()
        for index, statistics in enumerate((mine, theirs)):
            with statistics.part(index):
                gather(model.centered, cupy.asarray(np.full(3, index + 1.0)), cupy.asarray(2.0), 4)
        mine.decode(theirs.encoded(modules), modules, cupy.zeros(1))
        found = []
        model.centered.add_statistics = lambda *sums: found.extend(sums)
        mine.apply()
        assert [type(value) for value in found[:2]] == [type(cupy.zeros(1))] * 2
        assert found[0].get().tolist() == [3, 3, 3] and found[1].get() == 4 and found[2] == 8


def test_nothing_is_counted_outside_a_training_step():
    model, statistics = Model(5), Statistics()
    with statistics.part(0):
        pass
    with no_grad():
        model(Tensor(np.ones((1, 2, 5))))
    statistics.apply()
    assert model.centered.steps == 0


def test_a_module_that_runs_twice_counts_twice_and_a_recomputation_does_not():
    model, statistics = Model(5), Statistics()
    x = Tensor(np.arange(10.0).reshape(1, 2, 5), requires_grad=True)
    with statistics.part(0):
        one, two = reversible([(model, model.parameters())] * 2, x, x)
        sum(one + two).backward()
    seen = []
    model.centered.add_statistics = lambda total, count: seen.append((total, count))
    statistics.apply()
    (total, count), = seen
    read = [x.numpy(), x.numpy() + model.linear(x).numpy()]
    assert count == 4
    assert_close(total, np.concatenate(read).sum(axis=(0, 1)), terms=100)


def test_gathering_without_a_rule_is_an_error():
    module, statistics = Features(2), Statistics()
    with statistics.part(0):
        gather(module, 1)
    with pytest.raises(NotImplementedError, match="Features gathers statistics and does not say what becomes of them"):
        statistics.apply()


def test_what_a_checkpoint_overwrites_is_not_drawn():
    """Tables that follow from the options are made all the same, as they are in no checkpoint."""
    drawn = build("hyena", width=8, layers=1, context=4)
    with undrawn():
        model = build("hyena", width=8, layers=1, context=4)
    assert not any(array.numpy().any() for array in model.saved().values())
    tables = [(buffer.numpy(), other.numpy()) for (_, buffer), (_, other) in zip(
        model.named_buffers(), drawn.named_buffers(), strict=True) if not buffer.saved]
    assert tables and all(np.array_equal(one, other) for one, other in tables)
    model.load(drawn.state())
    assert all(np.array_equal(array, model.state()[name]) for name, array in drawn.state().items())
