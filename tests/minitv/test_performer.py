"""Performer: what its random directions must obey, its options, and where its code and others differ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autograd import Tensor, assert_close, no_grad, use
from autograd.random import Random
from minitv.errors import UserError
from minitv.nn import Module
from minitv.ops import attention, favor
from minitv.ops.favor import log_features
from minitv.ops.favor.projection import random_projection
from minitv.options import ModelOptions
from minitv.variants.performer import Performer, PerformerOptions
from tests.minitv import models
from tests.minitv.models import assert_same_on_a_gpu

OPTIONS = {
    "positive": {}, "hyperbolic": dict(features="hyperbolic"), "regularised": dict(features="regularised", orthogonal=False),
    "relu": dict(features="relu"), "relu of the TensorFlow code": dict(features="relu", relu_directions="unscaled"),
    "relu of the JAX code": dict(features="relu", relu_directions="none", relu_offset=0.01),
    "one head, rope": dict(heads=1, positions="rope", random_features=70),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(options, dtype=np.float64, variant="performer"):
    return models.build(variant, 11, dtype, **{"layers": 2, "width": 32, "context": 150, "random_features": 24, **options})


# -- random directions -------------------------------------------------------------------------------------------------
def estimates(x, y, count, draws, **options):
    """Of e^(x · y), from ``count`` features each: [draws]."""
    width, whole = x.size, -(-count // x.size) * x.size  # whole blocks, of whose rows the last may be left out
    rows = random_projection(Random(0), draws * whole, width, **options)
    logs = sum(log_features(z, rows, "positive", 1.0, 1.0) for z in (x, y))
    return np.exp(logs).reshape(draws, whole)[:, :count].mean(axis=1)


X, Y = np.array([0.3, -0.2, 0.4, 0.2]), np.array([0.3, 0.1, 0.3, -0.1])
EXACT, SUM = math.exp(X @ Y), float(np.sum((X + Y) ** 2))


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_mean_over_draws_is_the_softmax_kernel(count, orthogonal):
    """Within 4 standard errors of 10,000 draws: a right generator would fail with one seed in 16,000."""
    found = estimates(X, Y, count, 10_000, orthogonal=orthogonal)
    assert abs(found.mean() - EXACT) < 4 * found.std(ddof=1) / math.sqrt(found.size)


def test_the_error_of_independent_directions_is_that_of_lemma_2_and_falls_as_one_over_their_number():
    expected = EXACT**2 * (math.exp(SUM) - 1)
    for count in (4, 16):
        errors = (estimates(X, Y, count, 20_000, orthogonal=False) - EXACT) ** 2
        assert abs(errors.mean() - expected / count) < 4 * errors.std(ddof=1) / math.sqrt(errors.size)


def test_orthogonal_directions_have_a_smaller_error():
    """By as much as the paper's theorem 2 promises, and with 4 standard errors to spare."""
    width, count = 4, 4
    one, other = ((estimates(X, Y, count, 60_000, orthogonal=flag) - EXACT) ** 2 for flag in (True, False))
    gap = 2 * (count - 1) / (count * (width + 2)) * (EXACT - math.exp(-(X @ X + Y @ Y) / 2)) ** 2
    spread = math.hypot(one.std(ddof=1), other.std(ddof=1)) / math.sqrt(one.size)
    assert one.mean() + gap < other.mean() + 4 * spread and one.mean() + 2 * spread < other.mean()


def test_hyperbolic_features_have_a_smaller_error_than_as_many_positive_ones():
    """Half of (1 - e^(-|x + y|²)) times that of m directions, of which each has two features."""
    rows = random_projection(Random(3), 20_000, 4, orthogonal=False)
    products = (np.exp(sum(log_features(z, sign * rows, "positive", 1.0, 1.0) for z in (X, Y))) for sign in (1, -1))
    errors = (sum(products) / 2 - EXACT) ** 2
    expected = 0.5 * (1 - math.exp(-SUM)) * EXACT**2 * (math.exp(SUM) - 1)
    assert abs(errors.mean() - expected) < 4 * errors.std(ddof=1) / math.sqrt(errors.size)


@pytest.mark.parametrize("fixed", [True, False])
def test_rows_are_orthogonal_in_blocks_and_point_everywhere(fixed):
    width, draws = 5, 3000
    rows = random_projection(Random(4), draws * width + 3, width, fixed=fixed)  # and a part of one more block
    assert np.abs(np.triu(rows[-3:] @ rows[-3:].T, 1)).max() < 1e-9
    rows = rows[:-3].reshape(draws, width, width)
    products = rows @ np.swapaxes(rows, 1, 2)
    assert np.abs(products - products * np.eye(width)).max() < 1e-9
    lengths = np.linalg.norm(rows, axis=2)
    if fixed:
        assert_close(lengths, np.full_like(lengths, math.sqrt(width)))
    else:  # the squared length of a Gaussian vector has mean K and variance 2 K
        assert abs((lengths**2).mean() - width) < 4 * math.sqrt(2 * width / lengths.size)
    first = rows[:, 0]  # without the signs of R its first coordinate is negative in every draw
    assert (np.abs(first.mean(axis=0)) < 4 * first.std(axis=0) / math.sqrt(draws)).all()


def test_raw_qr_is_biased_and_would_be_noticed():
    """What performer-pytorch and the paper's code draw."""
    gaussian = Random(0).normal((20_000, 4, 4), np.float64)
    rows = np.swapaxes(np.linalg.qr(gaussian)[0], 1, 2)
    assert (rows[:, 0, 0] < 0).all()
    rows = rows * np.linalg.norm(Random(1).normal((20_000, 4, 4), np.float64), axis=2, keepdims=True)
    x = np.array([0.5, 0.4, 0.3, 0.2])
    found = np.exp(2 * log_features(x, rows.reshape(-1, 4), "positive", 1.0, 1.0)).reshape(-1, 4).mean(axis=1)
    assert abs(found.mean() - math.exp(x @ x)) > 4 * found.std(ddof=1) / math.sqrt(found.size)


# -- the operator ------------------------------------------------------------------------------------------------------
def test_with_many_features_it_is_attention():
    q, k, v = (0.5 * Random(i).normal((1, 2, 9, 4), np.float64) for i in range(3))
    for causal in (True, False):
        found, *_ = favor(q, k, v, random_projection(Random(5), 40_000, 4), causal=causal)
        assert np.abs(found.numpy() - attention(q, k, v, causal=causal)[0].numpy()).max() < 0.02


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.full)])
@pytest.mark.parametrize("size", [1, 3, 10, 100, 1e-2])
def test_a_last_key_of_any_size_changes_nothing_before_it(size, dtype):
    """Over several chunks, forward; performer-pytorch, with the small numbers that it adds, changes by 2 at outputs of 2."""
    q, k, v = (2 * Random(i).normal((1, 2, 150, 16), dtype) for i in range(3))
    projection = random_projection(Random(5), 40, 16).astype(dtype)
    for last in (149, 100, 1):
        other = k.copy()
        other[:, :, last:] *= dtype(size)
        with no_grad():
            before, after = (favor(q, keys, v, projection)[0].numpy()[:, :, :last] for keys in (k, other))
        assert_close(after, before, terms=16)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.full)])
def test_where_a_chunk_underflows_it_is_computed_pair_by_pair(dtype):
    """Early keys are far below later ones in every feature: e^-3000 relative to the maximum of the chunk."""
    q, k, v = (Random(i).normal((1, 1, 70, 4), dtype) for i in range(3))
    k[:, :, ::3] *= dtype(90)
    k[:, :, :9] *= dtype(90)
    k, projection = np.rint(2 * k) / 2, (np.rint(4 * random_projection(Random(5), 6, 4)) / 4).astype(dtype)
    results = []
    for way in (dict(kernel="cpu"), dict(form="recurrent")):
        tensors = [Tensor(x, requires_grad=True) for x in (q, k.astype(dtype), v)]
        with use("favor", **way):
            y, _, _ = favor(*tensors, projection, scale=0.5)
        (y * np.arange(4, dtype=dtype)).sum().backward()
        results.append([y.numpy(), *(x.grad.numpy() for x in tensors)])
    for found, expected in zip(*results, strict=True):
        assert np.abs(expected).max() > 0
        assert_close(found, expected, terms=1e4)


# -- the mixer ---------------------------------------------------------------------------------------------------------
@each_option
def test_every_option_agrees_in_chunks_and_in_steps(options):
    """Over more than one of the operator's chunks, whose last is shorter."""
    model, ids = build(options), np.random.default_rng(0).integers(0, 11, (2, 150))
    with no_grad():
        expected, state, parts = model(ids).numpy(), model.init_state(2), []
        for start, stop in ((0, 67), (67, 140), *((t, t + 1) for t in range(140, 150))):
            logits, state = model.prefill(ids[:, start:stop], state)
            parts.append(logits.numpy())
    assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


def test_the_state_does_not_grow():
    mixer = Performer(Random(0), ModelOptions(width=32), PerformerOptions(heads=2, random_features=24))
    state = mixer.init_state(3)
    for length in (1, 5, 40):
        _, state = mixer.prefill(Tensor(np.ones((3, length, 32), np.float32)), state)
        assert sum(array.numpy().size for array in (state.mean, state.logsum)) == 3 * 24 * (32 + 2)


@pytest.mark.full
@each_option
@pytest.mark.parametrize("variant", ["performer", "performer-encoder"])
def test_on_a_gpu_the_model_is_the_same(variant, options):
    ids = np.random.default_rng(0).integers(0, 11, (2, 40))
    assert_same_on_a_gpu(lambda: build(options, np.float32, variant), ids)


def test_directions_are_drawn_anew_at_intervals_and_by_layer():
    model = build(dict(redraw=3))
    first = [block.mixer.projection.numpy().copy() for block in model.blocks]
    assert not np.array_equal(*first)
    drawn = []
    for step in range(7):
        model.begin_step(step, Random(9))
        drawn.append(model.blocks[0].mixer.projection.numpy().copy())
    assert all(np.array_equal(a, first[0]) for a in drawn[:3])
    assert all(np.array_equal(a, drawn[3]) for a in drawn[4:6])
    assert not np.array_equal(drawn[3], first[0]) and not np.array_equal(drawn[6], drawn[3])
    assert not np.array_equal(*(block.mixer.projection.numpy() for block in model.blocks))
    model.begin_step(3, Random(9))  # a step that is begun again, or resumed
    assert np.array_equal(model.blocks[0].mixer.projection.numpy(), drawn[3])
    still = build(dict(redraw=0))
    still.begin_step(1000, Random(9))
    assert np.array_equal(still.blocks[0].mixer.projection.numpy(), first[0])


def test_directions_are_saved_and_not_trained():
    model = build({})
    names = {f"blocks.{i}.mixer.projection" for i in range(2)}
    assert names <= set(model.state()) and not names & set(dict(model.named_parameters()))
    other = models.build("performer", 11, np.float64, layers=2, width=32, context=150, random_features=24, seed=1)
    assert not np.array_equal(other.blocks[0].mixer.projection.numpy(), model.blocks[0].mixer.projection.numpy())
    other.load(model.state())
    ids = np.zeros((1, 5), np.intp)
    assert np.array_equal(other(ids).numpy(), model(ids).numpy())


def test_what_the_directions_of_each_feature_map_are():
    def rows(**options):
        options = {"heads": 2, "random_features": 24, **options}
        mixer = Performer(Random(0), ModelOptions(width=32), PerformerOptions(**options), dtype=np.float64)
        return mixer.projection.numpy(), mixer.kernel

    plain, kernel = rows()
    assert plain.shape == (24, 16) and kernel == dict(features="positive", offset=1e-3, causal=True, scale=None)
    both, _ = rows(features="hyperbolic")
    assert both.shape == plain.shape and np.array_equal(both[12:], -both[:12])
    same, _ = rows(features="regularised")
    assert_close(np.linalg.norm(same, axis=1), np.full(24, 4.0))
    relu, kernel = rows(features="relu", relu_directions="none")
    assert np.array_equal(relu, np.eye(16)) and kernel == dict(features="relu", offset=1e-3, causal=True, scale=1.0)
    _, kernel = rows(features="relu")
    assert kernel["scale"] is None and isinstance(Performer, type) and issubclass(Performer, Module)


@pytest.mark.parametrize(("options", "sentence"), [
    (dict(heads=3), "--heads: 3 heads do not divide the width 32"),
    (dict(heads=32, positions="rope"), "--positions rope: it turns pairs of channels, and 32 heads of the width 32 have 1"),
    (dict(features="hyperbolic", random_features=7), "--random-features: hyperbolic features come in pairs, got 7, allowed"),
    (dict(random_features=0), "random_features|--random-features"),
    (dict(relu_offset=0.0), "relu_offset|--relu-offset"),
    (dict(features="softmax"), "softmax"),
    (dict(relu_directions="none"), "--relu-directions: this concerns --features relu, and --features is positive"),
    (dict(features="regularised", relu_offset=0.1), "--relu-offset: this concerns --features relu, and --features is"),
    (dict(redraw=-1), "redraw"),
])
def test_what_does_not_fit_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        build(options)
