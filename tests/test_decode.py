"""Decoders: reading token after token gives the model's own logits, for every option and variant."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autograd import assert_close
from autograd.errors import DomainError, ShapeError
from autograd.random import Random
from minitv import mixers
from minitv.decode import FEW, Decoder, decoder
from minitv.models.lm import LanguageModel
from minitv.nn import ACTIVATIONS, NORMS
from minitv.options import ModelOptions

VOCAB = 11
OPTIONS = {
    "seed": range(99), "context": range(1, 41), "layers": (1, 2, 3), "width": (20, 40), "ffn_multiple": (1, 4),
    "activation": list(ACTIVATIONS), "norm": list(NORMS), "bias": (False, True), "tied": (False, True),
}


def build(variant="transformer", dtype=np.float64, seed=0, own=(), **options):
    """A model whose weights, norms and biases are large enough that everything counts."""
    options = ModelOptions(**{"context": 24, "layers": 2, "width": 16, **options})
    model = LanguageModel(variant, options, mixers.options(variant)(**dict(own)), VOCAB, Random(seed), dtype)
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        noise = 0.3 * rng.normal(size=parameter.shape)
        if ".filters." not in name:  # they are drawn anyway, and in float32 sines of large angles have few digits
            parameter.assign_((parameter.numpy() + noise).astype(dtype))
    return model


def expected(model, ids):
    """The logits after the last of these tokens, by the whole model at once."""
    return model(np.array(ids)[None]).numpy()[0, -1]


def own_options(variant):
    """Options of the variant for which a few values are known that fit every width above."""
    for field in fields(mixers.options(variant)):
        known = {"heads": (1, 2, 5), "window": (field.metadata["low"], 3, 18, 50), "rank": (1, 3, 64)}.get(field.name)
        if choices := field.metadata["choices"] or {bool: (False, True)}.get(type(field.default)) or known:
            yield field.name, (*choices, None) if field.default is None else choices


@pytest.mark.parametrize("variant", mixers.variants())
@settings(max_examples=30)
@given(st.data())
def test_every_step_gives_the_logits_of_the_model(variant, data):
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    options = {name: data.draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    options["own"] = {name: data.draw(st.sampled_from(values)) for name, values in own_options(variant)}
    model, exact = build(variant, dtype, **options), build(variant, **options)
    exact.load(model.state())
    reader = decoder(model)
    length = data.draw(st.sampled_from(range(1, model.context + 1)))  # lists alone are short
    ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
    first = data.draw(st.sampled_from(range(1, length + 1)))
    logits = reader.prefill(ids[:first])
    assert reader.position == first
    assert logits.dtype == dtype
    assert_close(logits, expected(exact, ids[:first]), "prefill", terms=200)
    for position in range(first, len(ids)):
        logits = reader.step(ids[position])
        assert_close(logits, expected(exact, ids[: position + 1]), f"step {position}", terms=200)
    assert reader.position == len(ids)


@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("length", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize("variant", mixers.variants())
def test_a_prefill_starts_over(variant, length, choice):
    own = {name: values[choice % len(values)] for name, values in own_options(variant)}
    model = build(variant, own=own, width=20, context=40)
    reader, ids = decoder(model), np.random.default_rng(0).integers(0, VOCAB, 40)
    for _ in range(2):
        reader.prefill(ids[:5])
        reader.step(3)
        assert_close(reader.prefill(ids[:length]), expected(model, ids[:length]), terms=200)
        for position in range(length, 40):
            assert_close(reader.step(ids[position]), expected(model, ids[: position + 1]), terms=200)


@pytest.mark.parametrize("variant", mixers.variants())
def test_every_variant_has_a_decoder(variant):
    model, ids = build(variant), [1, 5, 2, 2, 7]
    reader = decoder(model)
    reader.prefill(ids[:2])
    for position in range(2, 5):
        logits = reader.step(ids[position])
        assert_close(logits, expected(model, ids[: position + 1]), terms=200)
    assert reader.position == 5


def test_weights_that_changed_need_a_new_decoder():
    model = build()
    before = decoder(model).prefill([1, 2]).copy()
    model.blocks[1].ffn.down.weight.assign_(model.blocks[1].ffn.down.weight.numpy() * 2)
    after = decoder(model).prefill([1, 2])
    assert_close(after, expected(model, [1, 2]), terms=200)
    assert not np.allclose(before, after)


def test_what_the_model_cannot_read_is_refused():
    reader = decoder(build(context=3))
    reader.prefill([1, 2, 3])
    with pytest.raises(ShapeError, match=r"the model has 3 positions; 3 \+ 1 tokens do not fit"):
        reader.step(0)
    for token in (-1, VOCAB):
        with pytest.raises(DomainError, match=rf"the model knows the tokens 0 \.\. 10, got {token}"):
            reader.prefill([token])


def test_another_block_takes_the_models_own_step():
    class Other(type(build().blocks[0])):
        pass

    model = build()
    model.blocks[1].__class__ = Other
    assert type(decoder(model)) is Decoder
