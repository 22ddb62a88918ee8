"""attention where it takes more than one tile: groups, windows, sinks, segments and dilations, against the form.

That each of them is the mask that it stands for, and much else, are laws, which test_operators.py tries at small sizes.
"""

from __future__ import annotations

import numpy as np
import pytest

from autograd import DomainError, ShapeError, Tensor, use
from autograd.verify import check_gradients, check_values
from minitv.ops import attention, merge_heads, split_heads
from tests.autograd.operator_checks import marks

# heads, heads of k and v, queries, keys, channels of k, of v; inputs that are there; parameters
CASES = {
    "grouped heads": ((4, 2, 70, 70, 33, 8), "", {}),
    "one head of keys": ((3, 1, 40, 170, 8, 40), "mask", {"causal": False, "dropout": 0.3, "seed": 7}),
    "a window": ((2, 2, 300, 300, 4, 4), "", {"window": 40}),
    "a window in both directions": ((2, 1, 200, 200, 4, 4), "slopes", {"window": 33, "sinks": 3, "causal": False}),
    "a window and sinks": ((2, 1, 290, 300, 4, 4), "sink", {"window": 20, "sinks": 4}),
    "many sinks": ((2, 2, 300, 300, 4, 4), "sink slopes", {"window": 9, "sinks": 150, "dropout": 0.2}),
    "more sinks than keys": ((2, 2, 40, 30, 4, 4), "", {"window": 9, "sinks": 50, "causal": False}),
    "segments": ((2, 2, 200, 210, 4, 4), "mask", {"segment": 64}),
    "a dilation": ((4, 2, 200, 200, 4, 4), "sink", {"segment": 150, "dilation": 3, "dropout": 0.3}),
    "a dilation without segments": ((4, 4, 130, 90, 4, 4), "slopes", {"dilation": 2, "offsets": "block", "causal": False}),
    "a dilated window": ((2, 1, 400, 400, 4, 4), "mask sink", {"segment": 399, "dilation": 2, "window": 70, "sinks": 5}),
}
PLACES = ["kernel cpu", "kernel cuda on emulator"]


def call(name):
    (heads, groups, queries, keys, width, out), present, params = CASES[name]
    rng = np.random.default_rng(len(name))

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    mask = rng.random((1, 1, queries, keys)) < 0.7 if "mask" in present else None
    args = (draw(1, heads, queries, width), draw(1, groups, keys, width), draw(1, groups, keys, out), mask,
            draw(heads) if "sink" in present else None, np.abs(draw(heads)) if "slopes" in present else None)
    return args, params, [draw(1, heads, queries, out), draw(1, heads, queries)]


@pytest.mark.parametrize(("route", "name"), [pytest.param(route, name, marks=marks(route)) for route in PLACES
                                             for name in CASES])
def test_structures_over_several_tiles(route, name):
    args, params, cotangents = call(name)
    check_values(attention, route, args, params, reference="form parallel")
    check_gradients(attention, route, args, params, cotangents, reference="form parallel")


def test_a_window_reads_nothing_before_it():
    """Keys that no query sees are never multiplied, so they may hold anything."""
    q, k, v = (np.random.default_rng(i).standard_normal((1, 1, 300, 4)).astype(np.float32) for i in range(3))
    expected = [x.data[:, :, -1:] for x in attention(q, k, v, window=10, sinks=2)]
    k[:, :, 2:-10] = v[:, :, 2:-10] = np.nan
    for found in (attention(q[:, :, -1:], k, v, window=10, sinks=2), attention(q[:, :, -4:], k, v, window=7, sinks=2)):
        assert all(np.isfinite(x.data).all() for x in found)
    for one, two in zip(attention(q[:, :, -1:], k, v, window=10, sinks=2), expected, strict=True):
        np.testing.assert_allclose(one.data, two, rtol=1e-5)


def test_a_gradient_of_lse_alone():
    """d lse_i / d S_ij = P_ij: with q = 0, each of the keys seen has the same share."""
    q, k = np.zeros((1, 1, 3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    query = Tensor(q, requires_grad=True)
    _, lse = attention(query, k, k, scale=1.0)
    np.testing.assert_allclose(lse.data.ravel(), np.log([1, 2, 3]), rtol=1e-6)
    lse.sum().backward()
    np.testing.assert_allclose(query.grad.data[0, 0], [k[0, 0, :n].mean(0) for n in (1, 2, 3)], rtol=1e-6)


@pytest.mark.parametrize(("error", "words", "options"), [
    (DomainError, ["window", "0", "at least 1"], {"window": 0}), (DomainError, ["window", "2.0"], {"window": 2.0}),
    (DomainError, ["sinks", "-1", "at least 0"], {"sinks": -1}), (DomainError, ["sinks", "None"], {"sinks": None}),
    (DomainError, ["segment", "0"], {"segment": 0}), (DomainError, ["dilation", "0"], {"dilation": 0}),
    (DomainError, ["offsets", "'blocks'", "modulo, block"], {"offsets": "blocks"})])
def test_refuses(error, words, options):
    x = np.ones((1, 2, 3, 4))
    with pytest.raises(error) as caught:
        attention(x, x, x, **options)
    assert all(word in str(caught.value) for word in ["attention", *words])


@pytest.mark.parametrize("groups", [0, 3, 8])
def test_heads_that_do_not_divide_are_refused(groups):
    q, k = np.ones((1, 4, 3, 2)), np.ones((1, groups, 3, 2))
    with pytest.raises(ShapeError, match=f"G = {groups} heads, which do not divide the H = 4"):
        attention(q, k, k)


def test_heads_that_lie_side_by_side_are_merged_without_a_copy():
    x = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 20)
    one, two = split_heads.definition(x, heads=(2, 3))
    whole = np.concatenate([one, two], axis=1).transpose(0, 2, 1, 3).copy()  # [B T heads K]
    a, b = (Tensor.wrap(part) for part in np.split(whole.transpose(0, 2, 1, 3), [2], axis=1))
    merged = merge_heads([a, b])
    assert np.array_equal(merged.data, x) and np.shares_memory(merged.data, whole)
    some = Tensor.wrap(b.data[:, :2])
    for parts in ([b, a], [a, some], [b], [a, a], [a, Tensor(b.data)], [a, Tensor.wrap(b.data[::-1])], [some, a, some]):
        expected = merge_heads.definition([part.data for part in parts])
        assert np.array_equal(merge_heads(parts).data, expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_of_queries_keys_and_values_go_through_split_heads(groups):
    values = np.random.default_rng(0).standard_normal((2, 5, (3 + 2 * groups) * 4)).astype(np.float32)
    gradients = []
    for kernel in ("cpu", "none"):
        x = Tensor(values, requires_grad=True)
        with use("attention", kernel=kernel):
            y, _ = attention(*split_heads(x, heads=(3, groups, groups)), causal=True)
        (y * y).sum().backward()
        gradients.append(x.grad.data)
    assert np.allclose(*gradients, rtol=1e-4, atol=1e-5)
