"""Decoders: reading token after token gives the model's own logits, for every option and variant."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import Tensor, assert_close, layer_norm, use
from autograd.errors import DomainError, ShapeError
from autograd.random import Random
from minitv import decode, variants
from minitv.decode import FEW, Decoder, FusedDecoder, decoder, retnet, shared, unread
from minitv.laws import FADED, check_writing
from minitv.nn import ACTIVATIONS, NORMS
from minitv.ops import wkv
from minitv.ops.aft import cpu_step as aft_step
from minitv.ops.attention import cpu as attention_cpu
from minitv.ops.long_conv import online
from minitv.ops.wkv import EMPTY
from minitv.ops.wkv import cpu as wkv_cpu
from minitv.options import PRESETS
from tests.conftest import full
from tests.minitv import models

VARIANTS = [name for name in variants.variants() if variants.load(name).fused]
each_variant = pytest.mark.parametrize("variant", VARIANTS)
VOCAB = 11
OPTIONS = {
    "seed": range(99), "context": range(1, 41), "layers": (1, 2, 3), "width": (20, 40), "ffn_multiple": (1, 4),
    "activation": list(ACTIVATIONS), "norm": list(NORMS), "bias": (False, True), "tied": (False, True),
    "ffn_gate": (False, True), "norm_eps": (1e-5, 0.1),
}


def build(variant="transformer", dtype=np.float64, seed=0, own=(), **options):
    """A model whose weights, norms and biases are large enough that everything counts."""
    model = models.build(variant, VOCAB, dtype, seed, **{"context": 24, "layers": 2, "width": 16, **options, **dict(own)})
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        noise = 0.3 * rng.normal(size=parameter.shape)
        if ".filters." not in name:  # they are drawn anyway, and in float32 sines of large angles have few digits
            parameter.assign_((parameter.numpy() + noise).astype(dtype))
    return model


def drawn(length, batch=1, seed=0):
    """Ids of several sequences [B T]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def expected(model, ids):
    """The logits after the last of these tokens, by the whole model at once and without kernels."""
    with use(kernel="none"):
        return model(ids).numpy()[:, -1]


def own_options(variant):
    """Options of the variant with the values to draw, which fit every width above: an integer's smallest and its default."""
    known = {"heads": (1, 2, 5), "kv_heads": (1,), "value_width": (1.5, 2.0), "scaling": ("none",),
             "yarn_ramp": ("turns",), "reach": (0,), "strided": (False,), "carry_projection": (True,),
             "norms": ("before",), "segments": (0,), "output": ("linear",)}
    for field in fields(variants.load(variant).options):
        kinds = {bool: (False, True), int: [(field.metadata["low"] or 0) + more for more in (0, 1, 2, 7)] + [field.default]}
        if choices := known.get(field.name) or field.metadata["choices"] or kinds.get(type(field.default)):
            yield field.name, (*choices, None) if field.default is None else choices


@each_variant
@given(st.data())
def test_every_step_gives_the_logits_of_the_model(variant, data):
    dtype = data.draw(st.sampled_from([np.float32, np.float64] if full() else [np.float32]))
    without = variants.load(variant).without
    options = {name: data.draw(st.sampled_from(values)) for name, values in OPTIONS.items() if name not in without}
    options["own"] = {name: data.draw(st.sampled_from(values)) for name, values in own_options(variant)}
    model, exact = build(variant, dtype, **options), build(variant, **options)
    exact.load(model.state())
    length = data.draw(st.sampled_from(range(1, model.context + 1)))
    ids = drawn(length, data.draw(st.sampled_from([1, 2, 6])), data.draw(st.integers(0, 99)))
    check_writing(model, exact, ids, data.draw(st.sampled_from(range(1, length + 1))))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("first", [1, 100, 256])
def test_blocks_of_hyena_of_all_sizes(first, dtype, monkeypatch):
    """300 positions are blocks of 8, 16, ... 256, which end while reading at once, while writing, or never."""
    monkeypatch.setattr(online, "BLOCK", 8)
    own = {"order": 3}
    model, exact = (build("hyena", d, own=own, context=300) for d in (dtype, np.float64))
    exact.load(model.state())
    reader = decoder(model, 2)
    assert type(reader) is FusedDecoder
    for seed in range(2):  # the second time after the first
        ids = drawn(300, 2, seed)
        logits = [reader.prefill(ids[:, :first]).copy(), *(reader.step(i).copy() for i in ids.T[first:])]
        assert_close(np.stack(logits, axis=1), exact(ids).numpy()[:, first - 1 :], terms=200)


@pytest.mark.full
@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("length", [1, FEW, FEW + 1, 40])
@each_variant
def test_a_prefill_starts_over(variant, length, choice):
    own = {name: values[choice % len(values)] for name, values in own_options(variant)}
    model = build(variant, own=own, width=20, context=40)
    reader, ids = decoder(model, 5), drawn(40, 5)
    for _ in range(2):
        reader.prefill(ids[:, :5])
        reader.step([3] * 5)
        assert_close(reader.prefill(ids[:, :length]), expected(model, ids[:, :length]), terms=200)
        for position in range(length, 40):
            assert_close(reader.step(ids[:, position]), expected(model, ids[:, : position + 1]), terms=200)


@pytest.mark.parametrize("length", [1, FEW, FEW + 1])
@each_variant
def test_sequences_that_begin_alike_are_read_once(variant, length):
    model, ids = build(variant, np.float32, context=40), drawn(length + 3, 6)
    ids[:, :length] = ids[0, :length]
    for kind in (decoder, Decoder):
        alike, apart = kind(model, 6), kind(model, 6)
        logits = [reader.prefill(ids[:rows, :length]) for reader, rows in ((alike, 1), (apart, 6))]
        assert logits[0].shape == (6, VOCAB)
        assert_close(*logits, terms=200)
        for position in range(length, length + 3):
            assert_close(alike.step(ids[:, position]), apart.step(ids[:, position]), terms=200)


@pytest.mark.parametrize("variant", ["transformer", "retnet", "hyena"])
def test_a_long_prompt_is_read_by_all_cores(variant, monkeypatch):
    """With the logits that one core gives, and the same bits each time."""
    model, ids = build(variant, width=64, context=2048), drawn(2048)
    monkeypatch.setattr(decode, "cores", lambda: 3)
    shared = [decoder(model).prefill(ids).copy() for _ in range(2)]
    np.testing.assert_array_equal(*shared)
    monkeypatch.setattr(decode, "cores", lambda: 1)
    assert_close(decoder(model).prefill(ids), shared[0], terms=200)


@each_variant
def test_without_kernels_a_decoder_takes_the_models_own_step(variant):
    model, ids = build(variant), drawn(5, 2)
    reader = Decoder(model, 2)
    with use(kernel="none"):
        reader.prefill(ids[:, :2])
        for position in range(2, 5):
            logits = reader.step(ids[:, position])
            assert_close(logits, expected(model, ids[:, : position + 1]), terms=200)
    assert reader.position == 5


@pytest.mark.parametrize("first", [3, 5000])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not build(v).bounded])
def test_a_sequence_may_be_longer_than_the_context(variant, first):
    model, exact = build(variant, np.float32), build(variant)
    exact.load(model.state())
    reader, plain, ids = FusedDecoder(model), Decoder(exact), drawn(first + 3 * model.context)
    for each in reader, plain:
        each.prefill(ids[:, :first])
    for position in range(first, ids.shape[1]):
        token = ids[:, position]
        assert_close(reader.step(token), plain.step(token), f"step {position}", terms=FADED.get(variant, 200))
    assert reader.position == plain.position == ids.shape[1]


@pytest.mark.parametrize("rotation", ["retnet", "rope"])
def test_retention_turns_by_large_angles(rotation):
    model, exact = (build("retnet", dtype, own={"rotation": rotation, "heads": 1}) for dtype in (np.float32, np.float64))
    exact.load(model.state())
    (block, same), rng = (model.blocks[0], exact.blocks[0]), np.random.default_rng(0)
    past = same.mixer.init_state(1)
    state = type(past)(*(Tensor(rng.uniform(1, 2, part.shape)) for part in past[:3]), 10**6 + 1)
    half = retnet.Retention(block.norm1, block.mixer, model)
    half.load(state, state.position)
    x = rng.normal(size=(1, 16)).astype(np.float32)
    y = x.astype(np.float64) + same.mixer.prefill(same.norm1(Tensor(x[None].astype(np.float64))), state)[0].numpy()[0]
    half(x, 10**6 + 1)
    assert_close(x, y, terms=200)


def test_weights_that_changed_need_a_new_decoder():
    model, ids = build(), np.array([[1, 2]])
    before = decoder(model).prefill(ids).copy()
    model.blocks[1].ffn.down.weight.assign_(model.blocks[1].ffn.down.weight.numpy() * 2)
    after = decoder(model).prefill(ids)
    assert_close(after, expected(model, ids), terms=200)
    assert not np.allclose(before, after)


def test_what_the_model_cannot_read_is_refused():
    reader = decoder(build(context=3), 2)
    reader.prefill([[1, 2, 3]])
    with pytest.raises(ShapeError, match=r"the model has 3 positions; 3 \+ 1 tokens do not fit"):
        reader.step([0, 0])
    for token in (-1, VOCAB):
        with pytest.raises(DomainError, match=rf"the model knows the tokens 0 \.\. 10, got {token}"):
            reader.prefill([[0], [token]])
    for ids in ([1, 2], [[1], [2], [3]]):
        with pytest.raises(ShapeError, match=r"prefill: ids have the shape .*, allowed: \[B T\] with 1 or 2 rows"):
            reader.prefill(ids)


@pytest.mark.parametrize(("options", "reason"), [
    (dict(positions="sinusoidal"), "they know learned positions, rope and none, not sinusoidal"),
    (dict(positions="alibi"), "they know learned positions, rope and none, not alibi"),
    (dict(variant="roformer", own=dict(scaling="dynamic-ntk")), "they do not know the module Rotary with its options"),
    (dict(variant="roformer", own=dict(segments=2)), "they know neither segments nor BERT's output"),
    (dict(variant="roformer", own=dict(output="bert")), "they know neither segments nor BERT's output"),
    (dict(variant="roformer", own=dict(norms="after")), "they know stacks of blocks x + f(norm(x)) alone"),
    (dict(stack="reversible"), "they know stacks of blocks x + f(norm(x)) alone"),
    (dict(token_shift=True), "they do not know the module Shifted with its options")], ids=str)
def test_what_no_kernel_knows_takes_the_models_own_step(options, reason):
    model, ids = build(**options), drawn(5)
    reader = decoder(model)
    assert type(reader) is Decoder and reason in unread(model)
    reader.prefill(ids[:, :2])
    for position in range(2, 5):
        assert_close(reader.step(ids[:, position]), expected(model, ids[:, : position + 1]), terms=200)


@pytest.mark.parametrize(("variant", "options"), [
    ("transformer", dict(positions="none")), ("transformer", dict(positions="rope")),
    ("roformer", dict(own=dict(pairing="half", rotated=0.5, scaling="yarn", scaling_factor=4.0))),
    ("roformer", dict(own=dict(xpos=True)))], ids=str)
def test_a_cache_grows_beyond_the_context(variant, options):
    model, ids = build(variant, context=8, **options), drawn(40, 2)
    reader, plain = decoder(model, 2), Decoder(model, 2)
    assert type(reader) is FusedDecoder
    for first in (3, 30):
        assert_close(reader.prefill(ids[:, :first]), plain.prefill(ids[:, :first]), terms=200)
        for token in ids.T[first:]:
            assert_close(reader.step(token), plain.step(token), terms=200)


def test_positions_that_no_kernel_needs():
    model, ids = build(positions="none"), drawn(3)
    reader = decoder(model)
    assert type(reader) is FusedDecoder
    assert_close(reader.prefill(ids), expected(model, ids), terms=200)


def test_a_window_longer_than_the_context_is_kept_where_there_are_no_positions():
    model = build("aft-conv", positions="none", context=4, own={"window": 7})
    reader, plain, ids = decoder(model, 2), Decoder(model, 2), drawn(30, 2)
    assert type(reader) is FusedDecoder
    for first in (1, 20):
        for each in (reader, plain):
            each.prefill(ids[:, :first])
        for token in ids.T[first:]:
            assert_close(reader.step(token), plain.step(token), terms=200)


@each_variant
@pytest.mark.parametrize("preset", [pytest.param(name, marks=[] if name == "nanogpt-cpu" else pytest.mark.full)
                                    for name in PRESETS])
def test_every_page_serves_every_preset(variant, preset):
    made = variants.load(variant).configure(preset)
    small = replace(made.model, layers=2)  # as many as the layers inside a patch
    model = made.variant.build(small, made.mixer, VOCAB, Random(0))
    assert unread(model) is None


def test_another_block_takes_the_models_own_step():
    class Other(type(build().blocks[0])):
        pass

    model = build()
    model.blocks[1].__class__ = Other
    assert type(decoder(model)) is Decoder


# -- what kernels of decoding compute, by itself -------------------------------------------------------------------------
# Keys and decays are multiples of 1/256, so that adding a large constant loses nothing; bonuses are not.
CONSTANT = {np.float32: 2.0**13, np.float64: 2.0**40}
each_dtype = pytest.mark.parametrize("dtype", CONSTANT, ids=lambda t: t.__name__)


def multiples(seed, *shape, dtype, scale=4.0):
    return (np.rint(np.random.default_rng(seed).normal(size=shape) * scale * 64) / 256).astype(dtype)


@each_dtype
def test_a_constant_added_to_all_keys_changes_nothing_in_rwkv(dtype):
    width, k, v = 5, multiples(0, 20, 5, dtype=dtype), multiples(1, 20, 5, dtype=dtype)
    w, u = -np.abs(multiples(2, width, dtype=dtype)) - dtype(1 / 256), np.linspace(-1, 1.3, width).astype(dtype)

    def outputs(keys):
        a, b, p, y = np.zeros(width, dtype), np.zeros(width, dtype), np.full(width, EMPTY, dtype), np.empty_like(k)
        for t in range(len(k)):
            wkv_cpu.step(keys[t], v[t], w, u, a, b, p, y[t])
        return y

    exact = wkv.definition(*(x.astype(np.float64) for x in (k[None], v[None], w, u)))[0][0]
    assert_close(outputs(k), exact, terms=16)
    assert_close(outputs(k + dtype(CONSTANT[dtype])), exact, terms=16)


@each_dtype
def test_a_constant_added_to_all_keys_changes_nothing_in_aft(dtype):
    width, keys, values = 5, multiples(4, 20, 5, dtype=dtype), multiples(5, 20, 5, dtype=dtype)

    def mean(keys):
        state = np.array([np.zeros(width), np.ones(width), np.full(width, -np.inf)], dtype)
        for t in range(0, len(keys), 4):  # lags count back from the newest
            aft_step.join(keys[t : t + 4][::-1].copy(), values[t : t + 4], 3, state, np.empty(width, dtype))
        return state[0] / state[1]

    weights = np.exp(keys.astype(np.float64))
    assert_close(mean(keys), (weights * values).sum(0) / weights.sum(0), terms=16)
    assert_close(mean(keys + dtype(CONSTANT[dtype])), mean(keys), terms=16)


@each_dtype
def test_a_constant_added_to_all_keys_changes_nothing_in_attention(dtype):
    query, keys, values = (np.rint(multiples(i, *shape, dtype=dtype, scale=8.0))
                           for i, shape in enumerate([(4,), (4, 20), (20, 4)]))

    def mean(keys):
        y = np.empty(4, dtype)
        attention_cpu.step(query, keys[None], values[None], 20, dtype(0.25), np.full(1, -np.inf, dtype), y, np.empty(1, dtype),
                           np.empty(20, dtype))
        return y

    weights = np.exp(0.25 * (query.astype(np.float64) @ keys))
    assert_close(mean(keys), weights @ values / weights.sum(), terms=16)
    assert_close(mean(keys + dtype(CONSTANT[dtype])), mean(keys), terms=16)


@each_dtype
@pytest.mark.parametrize("mean", [1e4, -1e6], ids="mean {:g}".format)
def test_the_norm_of_values_far_from_0(dtype, mean):
    x, affine = (mean + np.random.default_rng(0).normal(size=(3, 40))).astype(dtype), np.ones((2, 40), dtype)
    y = np.empty_like(x)
    shared.norm(x, shared.Norm(*affine, 1e-5, True), y, np.empty(6, dtype))
    assert_close(y, layer_norm.definition(x.astype(np.float64), *affine), terms=40)


@each_dtype
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_infinities(name, dtype):
    x = np.array([-np.inf, -1, 0, 1, np.inf, np.nan], dtype)
    y = np.empty_like(x)
    shared.activate(x, getattr(shared, name.upper()), y, np.empty_like(x))
    with np.errstate(all="ignore"):
        assert_close(y, ACTIVATIONS[name](Tensor(x)))
    assert y[0] == 0 and y[4] == np.inf and np.isnan(y[5])
