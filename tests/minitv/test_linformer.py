"""Linformer and its causal relative: sharing, projections, padding, what they are equal to, and what they refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from autograd import Tensor, assert_close, no_grad
from autograd.random import Random
from minitv import tasks, variants
from minitv.errors import UserError
from minitv.experiment import default_task, namespace
from minitv.nn import Buffer, Parameter
from minitv.options import ModelOptions
from minitv.variants.linformer import Linformer, LinformerOptions, SegmentAttention, SegmentOptions
from tests.minitv import models
from tests.minitv.models import assert_same_on_a_gpu, mean_loss

CONTEXT, WIDTH, HEADS, VOCAB = 12, 8, 2, 11
EVERY = {
    "headwise": {}, "none": dict(sharing="none"), "key-value": dict(sharing="key-value"), "bias": dict(bias=True),
    "layerwise": dict(sharing="layerwise"), "reversible": dict(stack="reversible", sharing="layerwise"),
    "frozen": dict(frozen_projection=True), "mean": dict(projection="mean"), "max": dict(projection="max"),
    "convolution": dict(projection="convolution", bias=True), "convolutions": dict(projection="convolution", sharing="none"),
    "depthwise": dict(projection="depthwise", sharing="none"),
}
each_option = pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)


def build(variant, dtype=np.float64, **options):
    """A small model whose weights are large enough that everything counts."""
    made = models.build(variant, VOCAB, dtype, **{"context": CONTEXT, "layers": 2, "width": WIDTH, "heads": HEADS, **options})
    rng = np.random.default_rng(0)
    for parameter in made.parameters():
        parameter.assign_((parameter.numpy() + 0.3 * rng.normal(size=parameter.shape)).astype(dtype))
    return made


def mixer(dtype=np.float64, context=CONTEXT, bias=False, layer=0, layers=2, **options):
    model = ModelOptions(context=context, layers=layers, width=WIDTH, bias=bias)
    return Linformer(Random(0), model, LinformerOptions(heads=HEADS, **options), layer, dtype)


def segments(bias=False, context=CONTEXT, **options):
    model = ModelOptions(context=context, layers=2, width=WIDTH, bias=bias, init_std=0.5)
    return SegmentAttention(Random(0), model, SegmentOptions(heads=HEADS, **options), dtype=np.float64)


def tokens(length=CONTEXT, batch=3):
    return np.random.default_rng(1).integers(0, VOCAB, (batch, length))


def inputs(length=CONTEXT, batch=3, seed=1):
    return Tensor(np.random.default_rng(seed).normal(size=(batch, length, WIDTH)))


# -- what they are equal to --------------------------------------------------------------------------------------------
def loop(layer, x):
    """Outputs of the causal relative token by token, x[T D] -> y[T D]."""
    q, k, v = np.split(x @ layer.qkv.weight.numpy().T, 3, axis=1)
    size, y = WIDTH // HEADS, np.zeros_like(x)
    for t in range(len(x)):
        first = t // layer.segment * layer.segment
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            keys, values = [], []
            for start in range(0, first, layer.segment):
                rows = slice(start, start + layer.segment)
                keys.append(layer.E.weight.numpy()[0] @ k[rows, part])
                values.append(layer.F.weight.numpy()[0] @ v[rows, part])
            keys, values = np.concatenate([*keys, k[first : t + 1, part]]), np.concatenate([*values, v[first : t + 1, part]])
            weights = np.exp(keys @ q[t, part] / math.sqrt(size))
            y[t, part] = weights @ values / weights.sum()
    return y @ layer.out.weight.numpy().T


@pytest.mark.parametrize(("segment", "summaries"), [(4, 2), (5, 3), (1, 1), (12, 4)])
def test_the_causal_relative_is_a_loop_over_tokens(segment, summaries):
    layer, x = segments(segment=segment, summaries=summaries), inputs()
    for row, y in zip(x.numpy(), layer(x).numpy(), strict=True):
        assert_close(y, loop(layer, row), terms=1000)


def test_the_order_of_the_products_counts_with_biases_alone():
    x = inputs()
    plain, other = mixer(), mixer(projection_order="input")
    assert_close(other(x).numpy(), plain(x).numpy(), terms=100)
    keys, rows = mixer(bias=True), mixer(bias=True, projection_order="input")
    for layer in (keys, rows):
        layer.k.bias.assign_(np.linspace(-2, 2, WIDTH))
        layer.v.bias.assign_(np.linspace(1, 2, WIDTH))
    slow = mixer(bias=True)
    slow.load(keys.state())
    slow.early = False  # E (x Wᵀ + b) as the paper has it
    assert_close(keys(x).numpy(), slow(x).numpy(), terms=100)
    assert np.abs(keys(x).numpy() - rows(x).numpy()).max() > 0.01


@pytest.mark.parametrize("kind", ["mean", "max", "convolution", "depthwise"])
@pytest.mark.parametrize("sharing", ["none", "headwise"])
def test_windows_are_what_they_say(kind, sharing):
    """Over 11 tokens, of which the last two are a window of their own."""
    layer = mixer(projection=kind, sharing=sharing, projected_length=4)
    x = np.random.default_rng(2).normal(size=(2, HEADS, 11, 4))
    y = layer.E(Tensor(x)).numpy()
    assert y.shape == (2, HEADS, 4, 4)
    for b, h, n in np.ndindex(2, HEADS, 4):
        window = x[b, h, 3 * n : 3 * n + 3]
        weight = layer.E.weight.numpy()[h if sharing == "none" else 0] if "w" in kind or "v" in kind else None
        expected = {"mean": lambda w=window: w.mean(axis=0), "max": lambda w=window: w.max(axis=0),
                    "convolution": lambda w=window, m=weight: np.einsum("jk,jkl->l", w, m[: len(w)]),
                    "depthwise": lambda w=window, m=weight: (w * m[: len(w)]).sum(axis=0)}[kind]()
        assert_close(y[b, h, n], expected, terms=100)


# -- sharing, sizes, first weights -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("sharing", "matrices"), [("none", 288), ("headwise", 24), ("key-value", 12), ("layerwise", 1)])
def test_twelve_layers_of_twelve_heads_have_as_many_matrices_as_in_the_paper(sharing, matrices):
    model = models.build("linformer", VOCAB, context=8, layers=12, width=12, heads=12, projected_length=2, sharing=sharing)
    assert sum(p.size for name, p in model.named_parameters() if ".E." in name or ".F." in name) == 2 * 8 * matrices


@pytest.mark.parametrize("variant", ["linformer", "linformer-segment"])
def test_one_projection_of_all_layers_has_the_sum_of_their_gradients(variant):
    model = build(variant, sharing="layerwise", layers=3)
    assert len({id(block.mixer.E) for block in model.blocks} | {id(block.mixer.F) for block in model.blocks}) == 1
    apart = build(variant, sharing="key-value", layers=3)
    state = model.state()
    apart.load({name: state["blocks.0.mixer.E.weight" if ".E." in name else name] for name in apart.state()})
    ids = tokens()
    for one in (model, apart):
        mean_loss(one, ids, ids).backward()
    total = sum(block.mixer.E.weight.grad.numpy() for block in apart.blocks)
    assert_close(model.blocks[0].mixer.E.weight.grad.numpy(), total, terms=1000)


def test_a_length_for_each_layer():
    model = build("linformer", layer_lengths="6, 3")
    assert [block.mixer.E.weight.shape for block in model.blocks] == [(1, 6, CONTEXT), (1, 3, CONTEXT)]
    assert build("linformer").blocks[0].mixer.E.weight.shape == (1, 3, CONTEXT)  # a quarter
    assert build("linformer", context=2).blocks[0].mixer.E.weight.shape == (1, 1, 2)


def test_segments_cost_least_by_default():
    sizes = {context: segments(context=context) for context in (1, 3, 12, 64, 256, 1024)}
    assert {context: (layer.segment, layer.rows) for context, layer in sizes.items()} == {
        1: (1, 1), 3: (3, 3), 12: (4, 4), 64: (16, 4), 256: (32, 4), 1024: (64, 4)}


@pytest.mark.parametrize(("init", "deviation", "most"), [("xavier", math.sqrt(1 / 320), math.sqrt(3 / 320)),
                                                         ("uniform", math.sqrt(1 / 192), 1 / 8), ("normal", 1 / 8, None)])
def test_first_weights_of_projections(init, deviation, most):
    layer = mixer(context=256, projection_init=init, sharing="none")
    for weight in (layer.E.weight.numpy(), layer.F.weight.numpy()):
        assert weight.shape == (HEADS, 64, 256)
        assert weight.std() == pytest.approx(deviation, rel=0.02)
        assert most is None or 0.99 * most < np.abs(weight).max() <= most
    assert not np.array_equal(layer.E.weight.numpy(), layer.F.weight.numpy())


@pytest.mark.parametrize("variant", ["linformer", "linformer-segment"])
def test_frozen_projections_are_saved_and_not_trained(variant):
    model = build(variant, frozen_projection=True)
    projections = [projection for block in model.blocks for projection in (block.mixer.E, block.mixer.F)]
    assert all(isinstance(projection.weight, Buffer) for projection in projections)
    assert not [name for name, _ in model.named_parameters() if ".E." in name] and "blocks.0.mixer.E.weight" in model.state()
    assert isinstance(build(variant).blocks[0].mixer.E.weight, Parameter)


# -- both directions ---------------------------------------------------------------------------------------------------
@each_option
def test_padding_changes_nothing(options):
    """Whatever stands there; and a text that is shorter than the context uses the first columns of E."""
    layer = build("linformer", **options).blocks[0].mixer
    short, length = inputs(7), 7
    padded = np.concatenate([short.numpy(), np.full((3, CONTEXT - length, WIDTH), np.nan)], axis=1)
    seen = np.broadcast_to(np.arange(CONTEXT) < length, (3, CONTEXT))
    y, expected = layer(Tensor(padded), seen=seen).numpy()[:, :length], layer(short).numpy()
    if "projection" not in options:  # a window without text is a key of zeros
        assert_close(y, expected, terms=1000)
    zeros = np.where(seen[:, :, None], padded, 0)
    assert np.isfinite(y).all() and np.array_equal(layer(Tensor(zeros), seen=seen).numpy()[:, :length], y)


@each_option
def test_every_weight_has_its_gradient(options):
    model, ids = build("linformer", **options), tokens(8)
    check_slope(model, ids[:, :-1], ids[:, 1:])


def check_slope(model, ids, labels):
    mean_loss(model, ids, labels).backward()
    rng, before = np.random.default_rng(0), model.state()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    direction = {name: rng.normal(size=g.shape) / max(1.0, np.linalg.norm(g)) for name, g in gradients.items()}
    assert all(np.abs(g).max() > 0 for g in gradients.values())

    def along(h):
        model.load({name: value + h * direction[name] if name in direction else value for name, value in before.items()})
        return mean_loss(model, ids, labels).item()

    h = 1e-5
    slope = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert slope == pytest.approx(sum((g * direction[name]).sum() for name, g in gradients.items()), rel=1e-7)


def test_every_output_sees_every_token():
    """Which is why it refuses a causal task."""
    model, ids = build("linformer"), tokens()
    before, changed = model(ids).numpy(), ids.copy()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert (np.abs(model(changed).numpy() - before).max(axis=2) > 1e-9).all()
    record = variants.load("linformer")
    assert default_task(record) == "masked" and not record.causal
    with pytest.raises(UserError, match=r"--task text: linformer sees the whole sequence .*; every row of E k mixes all "
                                        r"positions, so that no mask .*; linformer-segment is a relative"):
        namespace(record, tasks.load("text"))


def test_how_far_it_reads():
    assert mixer().bounded and not mixer(projection="mean").bounded
    assert build("linformer", positions="none", projection="mean")(tokens(20)).shape == (3, 20, VOCAB)
    assert build("linformer-segment", positions="none")(tokens(20)).shape == (3, 20, VOCAB)


# -- the causal relative -----------------------------------------------------------------------------------------------
@each_option
def test_reading_in_parts_is_the_call(options):
    model, ids = build("linformer-segment", segment=4, summaries=2, **options), tokens()
    with no_grad():
        expected = model(ids).numpy()
        for cuts in ((0, 5, 6, 12), (0, 4, 8, 12), (0, 1, 11, 12), range(13)):
            state, parts = model.init_state(3), []
            for start, stop in pairwise(cuts):
                logits, state = model.prefill(ids[:, start:stop], state)
                parts.append(logits.numpy())
            assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


def test_the_state_has_the_size_it_promises():
    model = build("linformer-segment", segment=4, summaries=2)
    for length, mixed, exact in ((3, 0, 3), (4, 2, 0), (11, 4, 3)):
        _, state = model.prefill(tokens(length), model.init_state(3))
        for block, _ in state.blocks:
            assert [part.shape for part in block] == [(3, HEADS, n, 4) for n in (mixed, mixed, exact, exact)]


@pytest.mark.parametrize("scale", [1, 3, 10, 100])
@pytest.mark.parametrize("projection", ["linear", "max"])
def test_no_later_token_is_seen_however_large(scale, projection):
    layer, x = segments(segment=4, summaries=2, projection=projection), inputs().numpy()
    before = layer(Tensor(x)).numpy()
    for t in range(1, CONTEXT):
        changed = x.copy()
        changed[:, t] *= -scale
        after = layer(Tensor(changed)).numpy()
        np.testing.assert_allclose(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-13)
        assert np.abs(after[:, t:] - before[:, t:]).max() > 1e-6


@pytest.mark.full
@pytest.mark.parametrize("variant", ["linformer", "linformer-segment"])
@each_option
def test_on_a_gpu_the_model_is_the_same(variant, options):
    assert_same_on_a_gpu(lambda: build(variant, np.float32, **options), tokens(), 9 if variant == "linformer-segment" else None)


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("variant", "options", "sentence"), [
    ("linformer", dict(heads=3), "--heads: 3 heads do not divide the width 8"),
    ("linformer", dict(projected_length=13), "--projected-length: 13 mixtures are more than the context of 12 positions, "
                                             "allowed: 1 to 12"),
    ("linformer", dict(projected_length=5, projection="mean"), "--projected-length: 5 windows do not divide 12 positions, "
                                                               "allowed with --projection mean: a divisor of 12"),
    ("linformer", dict(layer_lengths="3"), "--layer-lengths: '3' is not one number for each of 2 layers, allowed: 2 positive"),
    ("linformer", dict(layer_lengths="3,x"), "--layer-lengths: '3,x' is not one number for each of 2 layers"),
    ("linformer", dict(layer_lengths="3,0"), "--layer-lengths: '3,0' is not one number for each of 2 layers"),
    ("linformer", dict(layer_lengths="3,40"), "--layer-lengths: 40 mixtures are more than the context of 12 positions"),
    ("linformer", dict(layer_lengths="3,4", projected_length=3), "--projected-length says the same for all layers"),
    ("linformer", dict(layer_lengths="3,4", sharing="layerwise"), "--layer-lengths: 3,4 are several lengths, and --sharing "
                                                                  "layerwise has one projection for all layers"),
    ("linformer", dict(sharing="none", projection_order="input"), "--projection-order input: it needs one projection for all "
                                                                  "channels, allowed with --projection linear or mean"),
    ("linformer", dict(positions="rope"), "--positions rope: linformer cannot turn queries and keys, because a mixture of"),
    ("linformer", dict(sharing="heads"), "sharing: 'heads' is unknown, allowed: none, headwise, key-value, layerwise"),
    ("linformer", dict(token_shift=True), "--token-shift: linformer sees both sides of a position"),
    ("linformer-segment", dict(segment=13), "--segment: 13 tokens are more than the context of 12, allowed: 1 to 12"),
    ("linformer-segment", dict(segment=3, summaries=4), "--summaries: 4 mixtures are more than the 3 tokens of a segment, "
                                                        "allowed: 1 to 3"),
    ("linformer-segment", dict(segment=6, summaries=4, projection="max"), "--summaries: 4 windows do not divide 6 positions, "
                                                                          "allowed with --projection max: a divisor of 6"),
    ("linformer-segment", dict(positions="rope"), "--positions rope: linformer-segment cannot turn queries and keys"),
])
def test_wrong_options(variant, options, sentence):
    with pytest.raises(UserError) as caught:
        build(variant, **options)
    assert sentence in str(caught.value)
