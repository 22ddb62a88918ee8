"""Shifted: half of a mixer's channels one position late."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import Tensor
from autograd.random import Random
from minitv.nn import Linear, Stateful
from minitv.options import ModelOptions
from minitv.shift import Shifted
from minitv.variants.transformer import Attention, TransformerOptions


class Plain(Stateful):
    """A mixer that gives back what it reads."""

    def __init__(self):
        self.unit = Linear(Random(0), 1, 1, dtype=np.float64)

    def __call__(self, x, rng=None):
        return x

    def init_state(self, batch):
        return ()

    def prefill(self, x, state):
        return x, state


def attention(width: int) -> Attention:
    return Attention(Random(1), ModelOptions(width=width, context=16, init_std=0.5), TransformerOptions(heads=2), 0, np.float64)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_the_first_half_of_the_channels_is_late(width):
    x = np.random.default_rng(0).normal(size=(2, 4, width))
    late = width // 2
    expected = x.copy()
    expected[:, 0, :late] = 0
    expected[:, 1:, :late] = x[:, :-1, :late]
    np.testing.assert_allclose(Shifted(Plain(), width, np.float64)(Tensor(x)).data, expected, rtol=1e-12, atol=1e-15)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_a_prefill_in_any_parts_is_the_call(parts):
    mixer = Shifted(attention(6), 6, np.float64)
    x = np.random.default_rng(1).normal(size=(3, sum(parts), 6))
    state, out, start = mixer.init_state(3), [], 0
    for size in parts:
        y, state = mixer.prefill(Tensor(x[:, start : start + size]), state)
        out.append(y.data)
        start += size
    np.testing.assert_allclose(np.concatenate(out, axis=1), mixer(Tensor(x)).data, rtol=1e-12, atol=1e-12)


def test_its_parameters_and_their_gradients_are_the_mixers():
    inner = attention(4)
    mixer = Shifted(inner, 4, np.float64)
    assert mixer.parameters() == inner.parameters()
    assert [name for name, _ in mixer.named_parameters()] == [f"mixer.{name}" for name, _ in inner.named_parameters()]
    x = np.random.default_rng(2).normal(size=(1, 5, 4))
    by_hand = np.concatenate([np.pad(x[:, :-1, :2], ((0, 0), (1, 0), (0, 0))), x[..., 2:]], axis=2)
    gradients = []
    for module, given_x in ((mixer, x), (inner, by_hand)):
        module.zero_grad()
        (module(Tensor(given_x)) ** 2).sum().backward()
        gradients.append([p.grad.data.copy() for p in inner.parameters()])
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_the_past_is_untouched_by_the_future():
    mixer = Shifted(attention(4), 4, np.float64)
    x = np.random.default_rng(3).normal(size=(1, 6, 4))
    spoilt = x.copy()
    spoilt[:, 4:] += 1
    assert np.array_equal(mixer(Tensor(x)).data[:, :4], mixer(Tensor(spoilt)).data[:, :4])
