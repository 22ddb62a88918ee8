"""Reversible chains: values and gradients are those of the plain loop, and memory does not grow with their length."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from autograd import GraphError, Random, Tensor, assert_close, dropout, gradients, layer_norm, linear, no_grad, sum, tanh, use
from autograd.reversible import noted, recomputed, replaying, reversible
from autograd.routes import Kernel

WIDTH = 6


def parameter(rng, *shape):
    return Tensor(rng.normal(size=shape), requires_grad=True)


def chain(length, seed=0, p=0.3):
    """Steps with weights of their own, one that all share, and dropout."""
    rng, shared = np.random.default_rng(seed), parameter(np.random.default_rng(seed + 1), WIDTH)

    def step(k):
        weight = parameter(rng, WIDTH, WIDTH)
        return lambda x: dropout(tanh(linear(x, weight)) * shared, p=p, seed=Random(seed).split(k).seed), (weight, shared)

    return [step(k) for k in range(length)]


def plain(steps, x0, x1):
    for f, _ in steps:
        x0, x1 = x1, x0 + f(x1)
    return x0, x1


def leaves(steps):
    return list({id(p): p for _, parameters in steps for p in parameters}.values())


def slopes(run, steps, inputs, loss):
    return gradients(loss(*run(steps, *inputs)), [*inputs, *leaves(steps)])


LOSSES = {
    "both": lambda a, b: sum(a * a) + sum(tanh(b) * a),
    "the last": lambda a, b: sum(b * b * b),
    "the one before": lambda a, b: sum(a * a),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_values_and_gradients_are_those_of_the_loop(length, loss):
    rng, steps = np.random.default_rng(0), chain(length)
    inputs = parameter(rng, 3, WIDTH), parameter(rng, 3, WIDTH)
    for one, other in zip(reversible(steps, *inputs), plain(steps, *inputs), strict=True):
        assert np.array_equal(one.numpy(), other.numpy())
    for one, other in zip(slopes(reversible, steps, inputs, loss), slopes(plain, steps, inputs, loss), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-10, atol=1e-12)


def test_one_tensor_may_be_both_inputs():
    x, steps = parameter(np.random.default_rng(0), 3, WIDTH), chain(4)
    one, other = (gradients(LOSSES["both"](*run(steps, x, x)), [x])[0] for run in (reversible, plain))
    assert_close(one.numpy(), other.numpy(), terms=100)


def test_inputs_that_require_nothing():
    steps, x = chain(3), Tensor(np.random.default_rng(0).normal(size=(3, WIDTH)))
    found, expected = (gradients(LOSSES["both"](*run(steps, x, x)), leaves(steps)) for run in (reversible, plain))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.numpy(), other.numpy(), terms=100)
    with no_grad():
        assert not reversible(steps, x, x)[0].requires_grad
    assert not reversible([(tanh, ())], x, x)[1].requires_grad


def test_a_graph_that_is_kept_gives_the_same_again():
    x, steps = parameter(np.random.default_rng(0), 3, WIDTH), chain(4)
    loss = LOSSES["both"](*reversible(steps, x, x))
    first, second = (gradients(loss, [x, *leaves(steps)], retain=retain) for retain in (True, False))
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True))
    with pytest.raises(GraphError, match="already released"):
        loss.backward()


def test_a_part_of_the_gradients():
    """The last step's own weight leads nowhere else, and the first one's lies at the end of everything."""
    x, steps = parameter(np.random.default_rng(0), 3, WIDTH), chain(4)
    for own in (steps[0][1][0], steps[-1][1][0]):
        one, other = (gradients(LOSSES["the last"](*run(steps, x, x)), [own])[0] for run in (reversible, plain))
        assert_close(one.numpy(), other.numpy(), terms=100)


def test_gradients_go_to_the_sink():
    x, steps, found = Tensor(np.ones((2, WIDTH))), chain(3), []
    LOSSES["both"](*reversible(steps, x, x)).backward(sink=lambda leaf, gradient: found.append(id(leaf)))
    shared = steps[0][1][1]
    assert sorted(found) == sorted([*(id(p) for p in leaves(steps)), id(shared), id(shared)])  # once for each use
    assert all(p.grad is None for p in leaves(steps))


def test_threads_share_the_parameters():
    rng, steps = np.random.default_rng(0), chain(6)
    inputs = [Tensor(rng.normal(size=(3, WIDTH))) for _ in range(8)]

    def run(x):
        return [g.numpy() for g in gradients(LOSSES["both"](*reversible(steps, x, x)), leaves(steps))]

    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(run, inputs), map(run, inputs), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_function_knows_that_it_runs_again():
    seen = []

    def f(x):
        seen.append(replaying())
        return tanh(x)

    x = Tensor(np.ones(3), requires_grad=True)
    sum(reversible([(f, ())] * 2, x, x)[1]).backward()
    assert seen == [False, False, True, True] and not replaying()


def test_the_forms_that_were_asked_for_run_again(monkeypatch):
    ran, run = [], Kernel.run
    monkeypatch.setattr(Kernel, "run", lambda self, *call: ran.append(self.op.name) or run(self, *call))
    x = Tensor(np.random.default_rng(0).normal(size=(2, WIDTH)), requires_grad=True)
    for request, expected in (({"kernel": "none"}, 0), ({"kernel": "cpu"}, 4)):
        with use("layer_norm", **request):
            loss = sum(reversible([(layer_norm, ())] * 2, x, x)[1])
        loss.backward()
        assert ran.count("layer_norm") == expected


def test_what_would_be_lost_or_wrong_is_refused():
    x, weight = Tensor(np.ones((2, WIDTH)), requires_grad=True), Tensor(np.ones(WIDTH), requires_grad=True)
    undeclared = sum(reversible([(lambda x: x * weight, ())], x, x)[1])
    with pytest.raises(GraphError, match=r"function 1 uses a tensor of shape \(6,\) that requires a gradient"):
        undeclared.backward()
    steps = [(lambda x: x * weight, (weight,))]
    with pytest.raises(GraphError, match="reversible: there is no second derivative"):
        gradients(sum(reversible(steps, x, x)[1]), [x], create_graph=True)
    loss = sum(reversible(steps, x, x)[1])
    weight.assign_(np.zeros(WIDTH))
    with pytest.raises(GraphError, match="reversible: argument 'parameters' was updated in place"):
        loss.backward()
    pair = reversible(steps, x, x)
    pair[1].assign_(np.zeros((2, WIDTH)))
    with pytest.raises(GraphError, match="reversible: its output was updated in place"):
        sum(pair[1]).backward()


def test_underflow_in_a_function_runs_it_once_more():
    """np.errstate(under="raise") makes an operator raise; backward then computes the step again, from the same pair."""
    steps = [(lambda x: x * 1e-200 * 1e-200, ()), *chain(2)]
    x = Tensor(np.ones((2, WIDTH)), requires_grad=True)
    with np.errstate(under="raise"):
        one, other = (gradients(LOSSES["both"](*run(steps, x, x)), [x])[0] for run in (reversible, plain))
    assert_close(one.numpy(), other.numpy(), terms=100)


def peak(run, length):
    """Bytes that a pass forward and backward needs beside the weights and their gradients, at most."""
    steps, x = chain(length), Tensor(np.random.default_rng(0).normal(size=(5_000, WIDTH)), requires_grad=True)
    tracemalloc.start()
    try:
        LOSSES["both"](*run(steps, x, x)).backward()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_length():
    assert peak(reversible, 24) < 1.1 * peak(reversible, 4)
    assert peak(plain, 24) > 3 * peak(plain, 4)


def test_what_is_noted_is_made_once():
    """Also where backward does not come to the pairs in order, and comes twice."""
    made = []

    def f(x):
        factors = [noted(lambda: made.append(len(made)) or made[-1]) for _ in range(2)]
        return x * float(factors[0]) + tanh(x) * float(factors[1])

    x = Tensor([0.3, -0.7], requires_grad=True)
    outputs = reversible([(f, ())] * 3, x, x)
    assert made == list(range(6))
    first = [g.numpy() for g in gradients(sum(outputs[0] * outputs[1]), [x], retain=True)]
    again = [g.numpy() for output in outputs for g in gradients(sum(output), [x], retain=True)]
    assert made == list(range(6)) and len(again) == 2
    factors = iter(range(6))
    one, two = x, x
    for _ in range(3):
        one, two = two, one + two * float(next(factors)) + tanh(two) * float(next(factors))
    assert_close(first[0], gradients(sum(one * two), [x])[0].numpy())
    assert noted(lambda: 7) == 7


def test_what_is_computed_again_gives_the_same_gradients_in_less_memory():
    rng = np.random.default_rng(0)
    weight, x = parameter(rng, WIDTH, WIDTH), parameter(rng, 4, WIDTH)

    def f(x):
        return sum(tanh(linear(x, weight)) * 2.0)  # of another shape than x

    expected = [g.numpy() for g in gradients(f(x), [x, weight])]
    for one, other in zip(gradients(recomputed(f, [weight], x), [x, weight]), expected, strict=True):
        assert_close(one.numpy(), other)
    assert recomputed(f, [weight], x).item() == f(x).item()
