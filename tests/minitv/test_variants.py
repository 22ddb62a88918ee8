"""What is declared of a variant: presets of one size, and options that all do something."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest

from autograd import check_mode
from autograd.random import Random
from minitv import variants
from minitv.config import settings
from minitv.errors import UserError
from minitv.experiment import default_task, namespace
from minitv.options import PRESETS, ModelOptions
from minitv.tasks import load as load_task
from tests.minitv import models
from tests.minitv.models import configure, logits_of, mean_loss

EVERY = list(variants.variants())
SMALL = dict(context=12, layers=2, width=16, dropout=0.3)
VOCAB = 11


@cache
def parameters(variant, preset, **options):
    return sum(parameter.size for parameter in configure(variant, preset=preset, **options).build(65).parameters())


@pytest.mark.full
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", EVERY)
def test_presets_have_as_many_parameters_as_the_transformer(variant, preset):
    expected = parameters("transformer", preset)
    assert parameters(variant, preset) == pytest.approx(expected, rel=0.05)
    if variant == "retnet":
        assert parameters(variant, preset, ffn="glu") == pytest.approx(expected, rel=0.05)


def offered(variant):
    """The options of models that a variant has."""
    record = variants.load(variant)
    known = namespace(record, load_task(default_task(record))).settings
    return [name for name in settings(ModelOptions) if name in known]


def others(setting, value):
    """Other values of an option that are allowed."""
    if setting.type is bool:
        return [not value]
    if setting.choices:
        return [choice for choice in setting.choices if choice != value]
    return [2 * value, value / 2] if setting.type is float else [value + 1, 2 * value]


def behaviour(record, model, mixer):
    """Everything that a model option can change: weights, logits with and without dropout, and how far the model reads."""
    made = record.build(model, mixer, VOCAB, Random(0), np.float64)
    weights, noise = made.state(), np.random.default_rng(0)
    for parameter in made.parameters():  # where weights start at 0, much of a model is not seen
        parameter.assign_(parameter.numpy() + 0.3 * noise.normal(size=parameter.shape))
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 7))
    return {**weights, "logits": logits_of(made, ids).numpy(), "dropped": logits_of(made, ids, Random(2)).numpy(),
            "context": np.array(made.context)}


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def changed(variant, name, value):
    """Whether another value of an option changes anything, or is refused."""
    record, base = variants.load(variant), configure(variant, **SMALL)
    try:
        other = base.replace(**{name: value})
        return not same(behaviour(record, base.model, base.mixer), behaviour(record, other.model, other.mixer))
    except UserError:
        return True


CASES = [(variant, name) for variant in EVERY for name in offered(variant)]


@pytest.mark.full
@pytest.mark.parametrize(("variant", "name"), CASES, ids=map("-".join, CASES))
def test_every_option_of_models_does_something(variant, name):
    setting, value = settings(ModelOptions)[name], getattr(configure(variant, **SMALL).model, name)
    assert any(changed(variant, name, other) for other in others(setting, value)), \
        f"--{name} does nothing in {variant}: name it in the record's `without`"


WITHOUT = [(variant, name) for variant in EVERY for name in variants.load(variant).without]


@pytest.mark.parametrize(("variant", "name"), WITHOUT, ids=map("-".join, WITHOUT))
def test_what_a_variant_is_without_does_nothing(variant, name):
    setting, value = settings(ModelOptions)[name], getattr(configure(variant, **SMALL).model, name)
    assert not any(changed(variant, name, other) for other in others(setting, value))


@pytest.mark.parametrize("variant", EVERY)
def test_check_mode_changes_no_gradient(variant):
    """Kernels then read arrays that are locked against writing."""
    model = models.build(variant, 11, np.float32, context=8, layers=1, width=16)
    ids = np.random.default_rng(0).integers(0, 11, (3, 9))
    gradients = []
    for checked in (False, True):
        model.zero_grad()
        with check_mode() if checked else nullcontext():
            mean_loss(model, ids[:, :-1], ids[:, 1:]).backward()
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        np.testing.assert_array_equal(gradients[1][name], gradient, err_msg=name)
