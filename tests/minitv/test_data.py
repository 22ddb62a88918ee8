"""Batches and windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd.random import Random
from minitv import data
from minitv.data import Batches, shuffled, windows
from minitv.errors import UserError

# Batches


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_batches(batch, context, extra, seed, step):
    ids = np.arange(context + 1 + extra) * 7
    batches = Batches(ids, batch, context, seed)
    inputs, labels = batches.batch(step)
    assert inputs.shape == labels.shape == (batch, context) and inputs.dtype == labels.dtype == np.intp
    assert (labels == inputs + 7).all() and (np.diff(inputs, axis=1) == 7).all()
    assert inputs.min() >= 0 and labels.max() <= ids[-1]
    batches.batch(step + 1)
    for again in (batches, Batches(ids, batch, context, seed)):
        assert (again.batch(step)[0] == inputs).all()


def test_a_window_may_begin_anywhere():
    inputs, labels = Batches(np.arange(8), 200, 5, 1).batch(0)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2} and labels.max() == 7


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_no_part_is_seen_twice_before_every_part_was_seen(context, extra, batch, seed):
    ids = np.arange(context + extra)
    batches = Batches(ids, batch, context, seed)
    windows = max(1, len(ids) // context - 1)
    starts = np.concatenate([batches.batch(step)[0][:, 0] for step in range(3 * windows // batch + 1)])
    for epoch in range(len(starts) // windows):
        seen = np.sort(starts[epoch * windows:(epoch + 1) * windows])
        assert (np.diff(seen) == context).all()  # they touch and do not overlap
        assert seen[0] < 2 * context and len(ids) - seen[-1] <= 3 * context  # from end to end


def test_passes_over_the_text_differ():
    batches = Batches(np.arange(1000), 99, 10, 5)
    first, second = batches.batch(0)[0][:, 0], batches.batch(1)[0][:, 0]
    assert set(np.diff(np.sort(first))) == set(np.diff(np.sort(second))) == {10}
    assert first.min() != second.min() and (np.argsort(first) != np.argsort(second)).any()


def test_batches_differ_by_seed_and_step():
    ids = np.arange(10_000)
    draws = [Batches(ids, 4, 8, seed).batch(step)[0][:, 0] for seed in range(3) for step in range(3)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 9


def test_batches_of_a_text_that_is_too_short():
    with pytest.raises(UserError, match="the text of the batches has 5 tokens, and --context 5 needs at least 6"):
        Batches(np.arange(5), 1, 5, 0)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_an_order_that_is_not_stored_is_a_permutation(n, seed):
    assert np.sort(shuffled(np.arange(n), n, Random(seed))).tolist() == list(range(n))


def test_an_order_that_is_not_stored_is_random():
    n = 10**11  # where an array of it would not fit
    first, second = (shuffled(np.arange(1000), n, Random(seed)) for seed in range(2))
    assert len(set(first) & set(second)) == 0 and len(set(first.tolist())) == 1000
    for order in (first, second):
        assert abs(order.mean() / n - 0.5) < 0.05 and abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.15
    assert (shuffled(np.arange(500, 1000), n, Random(0)) == first[500:]).all()


def test_windows_of_a_large_text_are_not_listed(monkeypatch):
    batch, context, ids = 7, 5, np.arange(5 * 300 + 3)
    stored = np.concatenate([Batches(ids, batch, context, 1).batch(step)[0][:, 0] for step in range(100)])
    monkeypatch.setattr(data, "STORED", 10)
    starts = np.concatenate([Batches(ids, batch, context, 1).batch(step)[0][:, 0] for step in range(100)])
    for epoch in range(len(starts) // 299):
        some = slice(epoch * 299, (epoch + 1) * 299)
        assert (np.sort(starts[some]) == np.sort(stored[some])).all()  # the same windows, in another order
        assert (starts[some] != stored[some]).any()


def test_batches_are_those_of_earlier_versions():
    """A resumed run goes on with the batches that its version of the library would have drawn."""
    ids = np.arange(1000)
    starts = [Batches(ids, 4, 8, 3).batch(step)[0][:, 0].tolist() for step in (0, 1, 31)]
    assert starts == [[789, 501, 877, 421], [413, 733, 621, 189], [87, 375, 95, 767]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_narrow_ids_become_wide_in_batches(dtype):
    ids = np.arange(200).astype(dtype)
    for inputs, labels in (Batches(ids, 3, 7, 0).batch(0), windows(ids, 7, 70)):
        assert inputs.dtype == labels.dtype == np.intp and (labels == inputs + 1).all()
        assert inputs.flags.c_contiguous and labels.flags.c_contiguous


# Windows


@given(st.integers(1, 12), st.integers(1, 200), st.integers(0, 250))
def test_windows(context, extra, tokens):
    ids = np.arange(context + extra)
    inputs, labels = windows(ids, context, tokens)
    count = len(inputs)
    assert inputs.shape == labels.shape == (count, context) and inputs.dtype == ids.dtype
    assert (labels == inputs + 1).all() and (np.diff(inputs, axis=1) == 1).all()
    assert count == max(1, min(tokens // context, (len(ids) - 1) // context))
    starts = inputs[:, 0]
    steps = np.diff(starts)
    assert starts[0] == 0 and labels.max() <= ids[-1] and (steps >= context).all()
    assert steps.size == 0 or np.ptp(steps) <= 1  # evenly spaced
    assert len(ids) - 1 - starts[-1] <= (len(ids) - 1) / count + 1  # up to the end


def test_windows_that_cover_everything():
    inputs, labels = windows(np.arange(13), 4, 10**9)
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] and labels[-1, -1] == 12


def test_windows_of_a_text_that_is_too_short():
    with pytest.raises(UserError, match="the text of the windows has 4 tokens, and --context 4 needs at least 5"):
        windows(np.arange(4), 4, 100)
