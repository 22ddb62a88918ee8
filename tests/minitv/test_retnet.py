"""RetNet's options: where its paper and its codes differ. What every variant must do is in test_lm.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autograd import assert_close, no_grad
from autograd.random import Random
from minitv.errors import UserError
from minitv.options import ModelOptions
from minitv.variants.retnet import Retention, RetNetOptions
from tests.minitv import models
from tests.minitv.models import assert_same_on_a_gpu

OPTIONS = {
    "paper": {}, "torchscale": dict(head_norm="rms_norm", ffn="glu", ffn_width=1.6875, value_width=1.6875, out_gain=0.5),
    "experiments": dict(decay="range", normalization="decay"), "fla": dict(rotation="rope", normalization="none"),
    "deepnet": dict(deepnet=True, heads=2), "pairs": dict(heads=32),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(options, dtype=np.float64):
    return models.build("retnet", 11, dtype, **{"layers": 2, "width": 64, **options})


@each_option
def test_every_option_agrees_in_chunks_and_in_steps(options):
    """Over more than one of the operator's chunks, whose last is shorter."""
    model, ids = build(options), np.random.default_rng(0).integers(0, 11, (2, 150))
    with no_grad():
        expected, state, parts = model(ids).numpy(), model.init_state(2), []
        for part in (ids[:, :67], ids[:, 67:140]):
            logits, state = model.prefill(part, state)
            parts.append(logits.numpy())
        for t in range(140, 150):
            logits, state = model.prefill(ids[:, t : t + 1], state)
            parts.append(logits.numpy())
    assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


@pytest.mark.full
@each_option
def test_on_a_gpu_the_model_is_the_same(options):
    assert_same_on_a_gpu(lambda: build(options, np.float32), np.random.default_rng(0).integers(0, 11, (2, 70)), 66)


def test_both_schedules_of_decays():
    mixers = (Retention(Random(0), ModelOptions(width=48), RetNetOptions(heads=3, decay=kind), dtype=np.float64)
              for kind in ("powers", "range"))
    powers, between = (mixer.decay.numpy() for mixer in mixers)
    assert_close(powers, np.array([31 / 32, 63 / 64, 127 / 128]))
    assert_close(between, 1 - 1 / np.array([32, 128, 512]))


def test_first_weights_are_those_of_torchscale():
    wide, bound = ModelOptions(layers=2, width=256, ffn_multiple=2), 2**-2.5 * math.sqrt(6 / 512)
    plain, other = (Retention(Random(0), wide, RetNetOptions(**options)) for options in ({}, dict(out_gain=0.5, deepnet=True)))
    assert 0.99 * bound < np.abs(plain.qk.weight.numpy()).max() <= bound
    assert 0.99 * math.sqrt(6 / 768) < np.abs(plain.out.weight.numpy()).max() <= math.sqrt(6 / 768)
    factor = (8 * wide.layers) ** -0.25
    for name, ratio in dict(qk=1, v=factor, gate=1, out=0.5 * factor).items():
        assert_close(getattr(other, name).weight.numpy(), np.float32(ratio) * getattr(plain, name).weight.numpy())


def test_a_head_of_two_channels_turns_by_one_radian_as_in_torchscale():
    """The exponent j / (K/2 - 1) is 0/0 there; torchscale's angles are 1 / 10000^linspace(0, 1, K/2)."""
    for heads in (32, 16, 8):
        mixer = Retention(Random(0), ModelOptions(width=64), RetNetOptions(heads=heads))
        assert_close(np.array(mixer.rotation["angles"]), 1 / 10_000 ** np.linspace(0, 1, 32 // heads))


@pytest.mark.parametrize(("options", "sentence"), [
    ({"heads": 5}, "--heads: 5 heads of the width 64 have 12.8 channels each, allowed: an even number"),
    ({"heads": 64}, "--heads: 64 heads of the width 64 have 1 channels each, allowed: an even number"),
    ({"value_width": 0.005}, "--value-width: 4 heads do not divide 0.005 · 64 = 0"),
    ({"value_width": 1.02}, "--value-width: 4 heads do not divide 1.02 · 64 = 65"),
    ({"decay": "linear"}, "decay: 'linear' is unknown, allowed: powers, range"),
])
def test_wrong_options(options, sentence):
    with pytest.raises(UserError) as caught:
        build(options)
    assert sentence in str(caught.value)
