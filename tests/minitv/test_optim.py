"""AdamW over a flat buffer against the operator's definition, clipping, and the schedule."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from autograd import REGISTRY, Tensor
from minitv.nn import Linear, Module, Parameter
from minitv.optim import AdamW, cosine

ADAMW = REGISTRY["adamw"]


class Small(Module):
    """Vectors before and between matrices, a scalar, and one matrix under two names."""

    def __init__(self, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.gain = Parameter(rng.normal(size=5).astype(dtype))
        self.first = Parameter(rng.normal(size=(7, 5)).astype(dtype))
        self.scale = Parameter(np.array(1.5, dtype))
        self.second = Parameter(rng.normal(size=(3, 2, 11)).astype(dtype))
        self.tied = self.first


def gradients_of(model, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=p.shape) * size).astype(p.dtype) for name, p in model.named_parameters()}


def feed(buffer, model, gradients):
    for name, parameter in model.named_parameters():
        if name in gradients:
            buffer(parameter, Tensor(gradients[name]))


def reference(model, gradient_steps, lrs, *, clip, weight_decay, beta1=0.9, beta2=0.99, eps=1e-8):
    """Parameters after the steps by the definition of the operator adamw, each parameter for itself."""
    values = {name: p.numpy().copy().reshape(-1) for name, p in model.named_parameters()}
    moments = {name: (np.zeros_like(v), np.zeros_like(v)) for name, v in values.items()}
    matrix = {name: p.ndim >= 2 for name, p in model.named_parameters()}
    for step, (gradients, lr) in enumerate(zip(gradient_steps, lrs, strict=True), 1):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for name, value in values.items():
            gradient = gradients.get(name, np.zeros_like(value)).reshape(-1)
            settings = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step, scale=scale)
            decayed = value.size if matrix[name] else 0
            param, m, v = ADAMW.definition(value, gradient, *moments[name], decayed=decayed, **settings)
            values[name], moments[name] = np.asarray(param), (np.asarray(m), np.asarray(v))
    return values, moments


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("workers", [1, 3])
def test_steps_are_the_definition(clip, workers):
    model = Small()
    steps = [gradients_of(model, seed) for seed in range(4)]
    lrs = [0.1, 0.03, 0.2, 0.01]
    values, moments = reference(model, steps, lrs, clip=clip, weight_decay=0.3)
    optimizer = AdamW(model, weight_decay=0.3, clip=clip, buffers=workers)
    with ThreadPoolExecutor(workers) as pool:
        for gradients, lr in zip(steps, lrs, strict=True):
            for buffer in optimizer.buffers:  # the workers' parts add up to the gradient
                feed(buffer, model, {name: g / workers for name, g in gradients.items()})
            norm = optimizer.step(lr, pool.map if workers > 1 else map)
            assert norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in gradients.values())), rel=1e-12)
    state = optimizer.state()
    assert state["steps"] == 4
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.numpy().reshape(-1), values[name], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(state[f"m.{name}"].reshape(-1), moments[name][0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(state[f"v.{name}"].reshape(-1), moments[name][1], rtol=1e-10, atol=1e-12)
        assert state[f"m.{name}"].shape == parameter.shape


def test_without_gradients_only_matrices_shrink():
    model = Small()
    before = model.state()
    optimizer = AdamW(model, weight_decay=0.5)
    assert optimizer.step(0.1) == 0.0
    after = model.state()
    for name in ("first", "second"):
        np.testing.assert_allclose(after[name], before[name] * (1 - 0.1 * 0.5), rtol=1e-14)
    for name in ("gain", "scale"):
        assert np.array_equal(after[name], before[name])


def test_a_parameter_without_a_gradient_counts_as_zero_and_not_as_the_last_one():
    model = Small()
    optimizer = AdamW(model, weight_decay=0.0, clip=0.0)
    first, second = gradients_of(model, 0), gradients_of(model, 1)
    del second["gain"]
    values, _ = reference(model, [first, second], [0.1, 0.1], clip=0, weight_decay=0.0)
    for gradients in (first, second):
        feed(optimizer.buffers[0], model, gradients)
        optimizer.step(0.1)
    np.testing.assert_allclose(model.gain.numpy(), values["gain"], rtol=1e-12)


def test_contributions_to_one_parameter_add_up():
    model = Small()
    optimizer = AdamW(model, clip=0.0, buffers=2)
    for buffer in optimizer.buffers:
        for part in (1.0, 2.0):
            feed(buffer, model, {name: np.full(p.shape, part) for name, p in model.named_parameters()})
    assert optimizer.step(0.1) == pytest.approx(6.0 * math.sqrt(optimizer.param.size), rel=1e-12)
    np.testing.assert_allclose(optimizer.m, 0.1 * 6.0, rtol=1e-12)


def test_a_tied_parameter_is_there_once():
    model = Small()
    optimizer = AdamW(model)
    assert optimizer.param.size == 5 + 35 + 1 + 66
    assert optimizer.decayed == 35 + 66
    assert {name for name in optimizer.state() if name.startswith("m.")} == {"m.gain", "m.first", "m.scale", "m.second"}
    feed(optimizer.buffers[0], model, gradients_of(model, 0))
    optimizer.step(0.1)
    assert model.tied is model.first and np.shares_memory(model.tied.data, optimizer.param)


def test_parameters_become_views_and_keep_their_values():
    model = Small()
    before = model.state()
    optimizer = AdamW(model)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.numpy(), before[name]) and np.shares_memory(parameter.data, optimizer.param)
    model.load({name: value + 1 for name, value in before.items()})
    assert optimizer.param.sum() == pytest.approx(sum(v.sum() + v.size for v in before.values()), rel=1e-12)


@pytest.mark.parametrize("factor, clipped", [(0.999, False), (1.001, True), (1e6, True), (1e-6, False)])
def test_clipping_begins_at_the_limit(factor, clipped):
    model = Small()
    optimizer = AdamW(model, clip=2.0)
    gradients = gradients_of(model, 0)
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    gradients = {name: g * (2.0 * factor / norm) for name, g in gradients.items()}
    feed(optimizer.buffers[0], model, gradients)
    returned = optimizer.step(0.1)
    assert returned == pytest.approx(2.0 * factor, rel=1e-12)  # the norm before clipping
    used = np.linalg.norm(optimizer.m) / (1 - 0.9)
    assert used == pytest.approx(2.0 if clipped else 2.0 * factor, rel=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    model = Small()
    optimizer = AdamW(model)
    feed(optimizer.buffers[0], model, gradients_of(model, 0))
    optimizer.step(0.1)
    parameters, moments = model.state(), optimizer.state()
    gradients = gradients_of(model, 1)
    gradients["second"][1, 1, 3] = bad
    feed(optimizer.buffers[0], model, gradients)
    assert not math.isfinite(optimizer.step(0.1))
    assert all(np.array_equal(value, parameters[name]) for name, value in model.state().items())
    assert all(np.array_equal(value, moments[name]) for name, value in optimizer.state().items())
    # and the next step knows nothing of it
    other = Small()
    fresh = AdamW(other)
    for seed in (0, 2):
        feed(fresh.buffers[0], other, gradients_of(other, seed))
        fresh.step(0.1)
    feed(optimizer.buffers[0], model, gradients_of(model, 2))
    optimizer.step(0.1)
    assert np.array_equal(optimizer.param, fresh.param)


def test_state_and_load_continue_exactly():
    def steps(model, optimizer, seeds):
        for seed in seeds:
            feed(optimizer.buffers[0], model, gradients_of(model, seed))
            optimizer.step(0.05)

    straight = Small(np.float32)
    optimizer = AdamW(straight)
    steps(straight, optimizer, range(6))

    first = Small(np.float32)
    before = AdamW(first)
    steps(first, before, range(3))
    second = Small(np.float32)
    after = AdamW(second)
    second.load(first.state())
    after.load(before.state())
    steps(second, after, range(3, 6))
    assert after.steps == 6
    assert all(np.array_equal(after.state()[name], value) for name, value in optimizer.state().items())
    assert np.array_equal(after.param, optimizer.param)


def test_a_step_makes_an_older_graph_refuse_backward():
    from autograd import mean
    from autograd.errors import GraphError
    from autograd.random import Random

    layer = Linear(Random(0), 3, 2, std=0.1, dtype=np.float64)
    optimizer = AdamW(layer)
    loss = mean(layer(layer(Tensor(np.ones((4, 3))))[:, :1] * Tensor(np.ones((4, 3)))))
    optimizer.step(0.1)
    with pytest.raises(GraphError):
        loss.backward()


SCHEDULE = dict(lr=1.0, min_lr=0.1, warmup=10, steps=110)


def test_schedule_end_points():
    assert cosine(0, **SCHEDULE) == pytest.approx(1 / 11)  # never zero: the first step already moves
    assert cosine(9, **SCHEDULE) == pytest.approx(10 / 11)
    assert cosine(10, **SCHEDULE) == 1.0
    assert cosine(60, **SCHEDULE) == pytest.approx(0.55)
    assert 0.1 < cosine(109, **SCHEDULE) < 0.1005
    assert cosine(110, **SCHEDULE) == pytest.approx(0.1) == cosine(10_000, **SCHEDULE)


def test_schedule_rises_then_falls():
    rates = [cosine(step, **SCHEDULE) for step in range(111)]
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 5), (5, 5), (50, 5)])
def test_schedule_of_short_runs(warmup, steps):
    rates = [cosine(step, lr=1.0, min_lr=0.1, warmup=warmup, steps=steps) for step in range(steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)


def test_before_the_first_step_the_number_of_steps_says_all():
    model = Small()
    optimizer = AdamW(model)
    before = optimizer.state()
    feed(optimizer.buffers[0], model, gradients_of(model, 0))
    optimizer.step(0.1)
    assert optimizer.expected(AdamW.fresh()).keys() == {"steps"}
    assert optimizer.expected(before).keys() == optimizer.expected({"steps": np.array(3)}).keys() == before.keys()
    optimizer.load(AdamW.fresh())
    assert all(np.array_equal(value, before[name]) for name, value in optimizer.state().items())
