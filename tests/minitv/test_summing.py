"""Sums in a fixed order: the same bits for any number of threads and ranks, of single numbers and of whole training steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd.ranks import Communicator
from autograd.ranks.threads import run
from minitv import tasks, variants
from minitv.experiment import possible
from minitv.optim import GradientBuffer
from minitv.summing import Gradients, Plan, halves, share
from minitv.trainer import Trainer

TINY = dict(context=32, layers=2, width=16, batch=6, dropout=0.1, micro_batch=1, warmup=0)


def buffer(values) -> GradientBuffer:
    return GradientBuffer({}, np.array(values, np.float32))


def summed(values: np.ndarray, ranks: Communicator, order: list[int]) -> np.ndarray:
    """The sum of values[N D] as a step makes it, with this rank's micro-batches coming in some order."""
    gradients = Gradients(Plan(len(values), ranks.size), [], lambda: buffer(np.full(values.shape[1], np.nan)),
                          lambda left, right: np.add(left.flat, right.flat, out=left.flat))
    for i in order:
        taken = gradients.take()
        taken.flat[...] = values[i]
        gradients.put(i, taken)
    total, pairs = gradients.finish(ranks)
    for left, right in pairs:
        left.flat += right.flat
    return total.flat.copy()


def definition(values: np.ndarray, start: int, stop: int) -> np.ndarray:
    if stop - start == 1:
        return values[start]
    (a, b), (c, d) = halves((start, stop))
    return definition(values, a, b) + definition(values, c, d)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_the_order_of_additions_depends_on_the_number_of_micro_batches_alone(count, size, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, 3)).astype(np.float32)
    expected = definition(values, 0, count)
    orders = [rng.permutation(share(count, rank, size)).tolist() for rank in range(size)]
    assert sorted(itertools.chain(*orders)) == list(range(count))
    for found in run(size, lambda ranks: summed(values, ranks, orders[ranks.rank])):
        assert found.tobytes() == expected.tobytes()


def test_the_left_part_is_the_largest_power_of_two_that_leaves_something():
    assert halves((0, 6)) == ((0, 4), (4, 6)) and halves((0, 8)) == ((0, 4), (4, 8)) and halves((4, 7)) == ((4, 6), (6, 7))
    assert Plan(8, 4).tops == [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)]]
    assert Plan(8).tops == [[(0, 4), (4, 8)]]
    assert Plan(2, 3).tops == [[], [(0, 1)], [(1, 2)]]


def test_few_buffers_are_needed():
    """One worker that takes micro-batches in order never has more than one for each level, and the one it fills."""
    made = []
    gradients = Gradients(Plan(64), [], lambda: made.append(buffer([0])) or made[-1], lambda left, right: None)
    for i in range(64):
        gradients.put(i, gradients.take())
    assert len(made) == 7


@given(st.integers(1, 70), st.integers(1, 6))
def test_how_many_buffers_a_rank_needs_is_known(count, size):
    plan = Plan(count, size)
    for rank in range(size):
        made = []
        gradients = Gradients(plan, [], lambda made=made: made.append(buffer([0])) or made[-1], lambda left, right: None)
        for i in share(count, rank, size):
            gradients.put(i, gradients.take())
        assert len(made) == plan.buffers[rank]


def trained(name: str, size: int, threads: int, steps: int = 2, **options):
    """What is left of some steps of a variant on so many ranks: losses, norms, held-out sums, weights and buffers."""
    variant = variants.load(name)
    values = {"task": possible(variant)[0], **TINY, **variant_options(variant), **options}
    experiment = variant.configure(threads=threads, **values)

    def rank(ranks):
        data = experiment.begin()
        trainer = Trainer(experiment, data, ranks)
        try:
            numbers = []
            for step in range(steps):
                numbers += [trainer.step(data.batch(step), step), trainer.grad_norm]
            numbers += trainer.evaluate(data.held_out().part(slice(0, 5))).tolist()
            return numbers, {**trainer.model.state(), **trainer.optimizer.state()}
        finally:
            trainer.close()

    return run(size, rank)


def variant_options(variant) -> dict:
    """What a variant of sound needs beside the sizes of these tests: utterances of a digit are longer than the others."""
    return dict(context=320, longest=1) if variant.reads != "tokens" else {}


def assert_same(results, numbers, arrays):
    for found, state in results:
        assert found == numbers
        assert state.keys() == arrays.keys()
        assert all(state[key].tobytes() == arrays[key].tobytes() for key in arrays)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "longnet" else pytest.mark.full)
                                  for name in variants.variants()])
def test_two_ranks_train_as_one_does(name):
    (numbers, arrays), = trained(name, 1, 1)
    assert np.isfinite(numbers).all()
    assert_same(trained(name, 2, 2), numbers, arrays)


ON_TASK = {"images": dict(context=64, side=8), "audio": dict(context=64)}


@pytest.mark.full
@pytest.mark.parametrize("task", tasks.tasks())
def test_two_ranks_train_as_one_does_for_every_task(task):
    name = next(name for name in variants.variants() if task in possible(variants.load(name)))
    (numbers, arrays), = trained(name, 1, 1, task=task, **ON_TASK.get(task, {}))
    assert np.isfinite(numbers).all()
    assert_same(trained(name, 2, 2, task=task, **ON_TASK.get(task, {})), numbers, arrays)


@pytest.mark.full
def test_ranks_without_micro_batches_take_part():
    (numbers, arrays), = trained("transformer", 1, 1, micro_batch=3)
    assert_same(trained("transformer", 4, 1, micro_batch=3), numbers, arrays)


@pytest.mark.full
@pytest.mark.parametrize("size, threads", [(1, 3), (3, 1), (4, 2), (5, 1)])
def test_any_number_of_ranks_and_threads_gives_the_same_bits(size, threads):
    (numbers, arrays), = trained("transformer", 1, 1, 3)
    assert_same(trained("transformer", size, threads, 3), numbers, arrays)


def test_ranks_and_threads_without_work_are_told_how_to_get_some():
    experiment = variants.load("transformer").configure(context=32, layers=1, width=16, batch=4, threads=1)
    data = experiment.begin()
    for ranks, threads, unlike, said in ((4, 1, False, "2 of 4 ranks have none: a smaller --micro-batch"),
                                         (1, 5, False, "2 micro-batches, for 5 threads: a smaller --micro-batch"),
                                         (2, 1, True, "of different kinds: all take the weights that rank 0 computes"),
                                         (2, 2, False, None)):
        trainer = Trainer(experiment.replace(threads=threads), data, Communicator(0, ranks), unlike=unlike)
        trainer.close()
        notes = trainer.notes(data.batch(0))
        assert [said in note for note in notes] == [True] * (said is not None)


@pytest.mark.full
def test_unlike_processors_have_the_weights_of_rank_0():
    """A rank whose update differs, as another processor's may, takes part with rank 0's weights all the same."""
    experiment = variants.load("transformer").configure(**{**TINY, "dropout": 0.0, "threads": 1})

    def rank(ranks):
        data = experiment.begin()
        trainer = Trainer(experiment, data, ranks, unlike=True)
        trainer.optimizer.param[...] *= np.float32(1 + 1e-7 * ranks.rank)  # drawn a bit differently
        trainer.align()
        assert len(set(ranks.gather_bytes(trainer.optimizer.param.tobytes()))) == 1
        update = trainer.optimizer.update
        if ranks.rank == 1:
            trainer.optimizer.update = lambda lr, *more, **others: update(lr * 1.0001, *more, **others)
        losses = [trainer.step(data.batch(step), step) for step in range(2)]
        trainer.close()
        return losses, trainer.optimizer.param.copy()

    (one, weights), (other, same) = run(2, rank)
    assert one == other and np.array_equal(weights, same)
