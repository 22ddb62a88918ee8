"""AFT beyond what the registry says: long sequences in float32, mistakes of other code, and the parts of the mixers."""

from __future__ import annotations

import numpy as np
import pytest

from autograd import NonFiniteError, Random, assert_close, check_mode, explain, no_grad
from autograd.verify import check_gradients, check_values, compute, differentiate, forms
from minitv.ops import aft_conv, aft_full, aft_local, aft_simple
from minitv.options import ModelOptions
from minitv.variants.aft import AFTConv, AFTConvOptions, AFTSimple, AFTSimpleOptions

OPERATORS = {op.name: op for op in (aft_simple, aft_full, aft_local, aft_conv)}
LENGTHS = {"aft_full": 600}  # of others 4096
KEYS = {"near 0": lambda rng, *shape: rng.normal(0, 1, shape), "far apart": lambda rng, *shape: rng.normal(0, 30, shape),
        "rising by 120": lambda rng, *shape: rng.normal(0, 1, shape) + np.linspace(-60, 60, shape[1])[:, None],
        "falling by 120": lambda rng, *shape: rng.normal(0, 1, shape) + np.linspace(60, -60, shape[1])[:, None]}
each_operator = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)


def arguments(op, length, channels=3, keys="near 0", low=-3.0, high=3.0):
    """q, k, v and, with one of them, a bias between low and high; float32."""
    rng = np.random.default_rng(length)
    shape = (1, length, channels)
    bias = {"aft_full": (length, length), "aft_local": (length, 16), "aft_conv": (channels, 16)}.get(op.name)
    given = [rng.normal(size=shape), KEYS[keys](rng, *shape), rng.normal(size=shape)]
    given += [] if bias is None else [rng.uniform(low, high, bias)]
    given = [x.astype(np.float32) for x in given]
    return *given, *(None,) * (len(op.signature.inputs) - len(given))


@pytest.mark.parametrize("keys", KEYS)
@each_operator
def test_long_sequences_in_float32(op, keys):
    """Values and all gradients of the kernel, relative to float64."""
    length = LENGTHS.get(op.name, 4096)
    args, params = arguments(op, length, keys=keys), {"causal": True}
    cotangents = [np.random.default_rng(1).normal(size=o.shape) for o in compute(op, forms(op)[0], args, params)]
    check_values(op, "kernel cpu", args, params, reference=forms(op)[0])
    check_gradients(op, "kernel cpu", args, params, cotangents, reference=forms(op)[0])


@each_operator
def test_one_maximum_for_all_positions_is_not_enough(op):
    """Keys that rise by 120: of the first positions, the two products by which others compute nothing is left in float32."""
    q, k, v, *rest = arguments(op, 64, keys="rising by 120", low=0.0, high=0.0)
    e = np.exp(k - k.max(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        others = np.cumsum(e * v, axis=1, dtype=np.float32) / np.cumsum(e, axis=1, dtype=np.float32)
    assert np.isnan(others[:, 0]).all()
    expected = aft_simple.definition(*(x.astype(np.float64) for x in (q, k, v)))[0]
    for route in [*forms(op), "kernel cpu"]:
        assert_close(compute(op, route, (q, k, v, *rest), {})[0], expected, route, terms=64)


@pytest.mark.parametrize("op", [aft_local, aft_conv], ids=lambda op: op.name)
def test_very_negative_biases_keep_their_digits(op):
    """The paper's eq. 6, all keys and e^w - 1 times those of the window, subtracts numbers that are equal in float32."""
    q, k, v, bias, *_ = args = arguments(op, 16, low=-16.0, high=-15.0)  # everything is in the window
    expected = compute(op, "definition", tuple(None if x is None else x.astype(np.float64) for x in args), {})[0]
    for route in [*forms(op), "kernel cpu"]:
        assert_close(compute(op, route, args, {})[0], expected, route, terms=16)
    e, lag = np.exp(k), np.arange(16)[:, None] - np.arange(16)
    factors = np.expm1(bias)[np.arange(16)[:, None], np.abs(lag)] if op is aft_local else np.expm1(bias)[:, np.abs(lag)]
    factors = np.broadcast_to(np.tril(factors), (3, 16, 16))

    def summed(x):
        return np.cumsum(x, axis=1) + np.einsum("cts,bsc->btc", factors, x)

    with np.errstate(all="ignore"):
        others = summed(e * v) / summed(e) / (1 + np.exp(-q))
    assert others.dtype == np.float32 and not np.nanmax(np.abs(others - expected)) < 0.01


def test_a_row_of_biases_may_be_shifted_and_a_column_may_not():
    q, k, v, bias, mask = arguments(aft_full, 7)
    shift = np.arange(7, dtype=np.float32)
    y, rows, columns = (compute(aft_full, "kernel cpu", (q, k, v, b, mask), {"causal": False})[0]
                        for b in (bias, bias + shift[:, None], bias + shift))
    assert_close(rows, y, terms=7)
    assert np.abs(columns - y).max() > 0.1


@each_operator
def test_a_position_that_sees_nothing_is_0_and_asks_for_nothing(op):
    args = list(arguments(op, 5))
    args[[a.name for a in op.signature.inputs].index("mask")] = np.zeros((1, 5), bool)
    for route in [*forms(op), "kernel cpu"]:
        outputs = compute(op, route, args, {})
        assert not outputs[0].any()
        cotangents = [np.ones_like(outputs[0]), *(np.zeros_like(o) for o in outputs[1:])]
        assert not any(g.any() for g in differentiate(op, route, args, {}, cotangents).values()), route


@pytest.mark.parametrize("op", [aft_full, aft_local, aft_conv], ids=lambda op: op.name)
def test_what_spans_more_than_float64_is_left_to_the_form(op):
    args = list(arguments(op, 6))
    args[1] = args[1] + np.float32(700) * (np.arange(6) % 2)[:, None].astype(np.float32)
    assert "not chosen: biases and keys span more than e^600" in explain(op, *args)
    expected = compute(op, "definition", tuple(None if x is None else x.astype(np.float64) for x in args), {})[0]
    assert_close(op(*args)[0].numpy() if op is not aft_full else op(*args).numpy(), expected, terms=6)


# -- AFT-conv ----------------------------------------------------------------------------------------------------------
MODEL = ModelOptions(context=12, layers=1, width=8)


def test_aft_conv_begins_as_aft_simple():
    """Its gains and biases are 0 at first; then the filters' gains learn, and the raw filters do not yet."""
    conv = AFTConv(Random(3), MODEL, AFTConvOptions(window=4), dtype=np.float64)
    simple = AFTSimple(Random(3), MODEL, AFTSimpleOptions(), dtype=np.float64)
    x = np.random.default_rng(0).normal(size=(2, 12, 8))
    with no_grad():
        assert_close(conv(x).numpy(), simple(x).numpy(), terms=12)
    (conv(x) ** 2).sum().backward()
    assert not conv.conv_weight.grad.numpy().any() and conv.conv_gain.grad.numpy().all()


def test_filters_are_standardised():
    mixer = AFTConv(Random(3), MODEL, AFTConvOptions(heads=2, window=5), dtype=np.float64)
    mixer.conv_gain.data[:], mixer.conv_bias.data[:] = [2.0, 3.0], [1.0, -1.0]
    filters = mixer.filters().numpy()
    np.testing.assert_allclose(filters.mean(axis=1), [1, -1])
    np.testing.assert_allclose(filters.std(axis=1), [2, 3])


@pytest.mark.parametrize("op", [op for op in OPERATORS.values() if op is not aft_full], ids=lambda op: op.name)
def test_check_mode_knows_an_empty_state(op):
    """Nothing has left the window, or there is no key: ln 0. Other infinities are still reported."""
    args = list(arguments(op, 10 if op is not aft_simple else 0))
    with check_mode():
        assert np.isneginf(op(*args)[2].numpy()).all()
    args = list(arguments(op, 10))
    args[2][0, 4, 1] = np.inf
    with check_mode(), pytest.raises(NonFiniteError, match=f"the output of {op.name}"):
        op(*args)
