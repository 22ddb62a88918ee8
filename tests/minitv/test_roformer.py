"""RoFormer: its angles and options, and what they change in a model. What every variant must do is in test_lm.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autograd import Tensor, assert_close, no_grad
from autograd.errors import DomainError, ShapeError
from minitv.errors import UserError
from minitv.ops import attention, rope, split_heads
from minitv.ops.rope import RAMPS, SCALINGS, Rotation, Scaling, half_order, repaired, rope_angles, xpos_growth
from tests.minitv import models
from tests.minitv.models import assert_same_on_a_gpu

VOCAB, CONTEXT = 11, 8
OPTIONS = {
    "plain": {}, "half": dict(pairing="half", heads=2), "partial": dict(rotated=0.5, base=100.0), "xpos": dict(xpos=True),
    "linear": dict(scaling="linear", scaling_factor=4.0), "ntk": dict(scaling="ntk", scaling_factor=4.0),
    "dynamic": dict(scaling="dynamic-ntk", scaling_factor=4.0, trained_context=5),
    "yarn": dict(scaling="yarn", scaling_factor=4.0, rotated=0.5), "code": dict(scaling="yarn", scaling_factor=4.0,
                                                                              yarn_ramp="pairs"),
    "llama3": dict(scaling="llama3", scaling_factor=4.0, trained_context=64),
    "bert": dict(norms="after", embed_norm=True, segments=2, output="bert", bias=True, activation="relu"),
    "bert's output": dict(output="bert", tied=False, activation="silu"), "segments": dict(segments=1),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(variant="roformer", *, dtype=np.float64, spread=0.3, **options):
    model = models.build(variant, VOCAB, dtype, **{"context": CONTEXT, "layers": 2, "width": 32, **options})
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.assign_((parameter.numpy() + spread * rng.normal(size=parameter.shape)).astype(dtype))
    return model


def tokens(length, batch=2, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


# -- angles ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent.parent / "goldens" / "angles.npz") as file:
        return dict(file)


@pytest.mark.parametrize("kind", ["linear", "dynamic-ntk", "yarn", "llama3", "ntk"])
def test_scaled_angles_are_those_of_other_packages(kind, golden):
    scaling = Scaling(16, kind=kind, factor=4.0, length=64, ramp="pairs")
    key = kind.removesuffix("-ntk")
    assert np.array(scaling.angles(256)) == pytest.approx(golden[f"{key}/angles"], rel=1e-6)
    assert scaling.gain == pytest.approx(golden.get(f"{key}/gain", 1.0))


def test_xpos_has_the_products_of_another_package(golden):
    """Its window is centred on its middle, ours begins at 0: products do not depend on it."""
    rotation = Rotation(rope_angles(16), growth=xpos_growth(16))
    q, k = rotation.queries(golden["xpos/q"]).numpy(), rotation.keys(golden["xpos/k"]).numpy()
    np.testing.assert_allclose(q @ np.swapaxes(k, 2, 3), golden["xpos/products"], atol=2e-6)  # its tables are float32


def test_what_the_scalings_promise():
    plain = np.array(rope_angles(32))

    def scaled(kind, **more):
        return np.array(Scaling(32, **{"kind": kind, "factor": 8.0, "length": 256, **more}).angles(2048))

    assert_close(scaled("none"), plain)
    assert_close(scaled("linear"), plain / 8)
    for kind in ("ntk", "dynamic-ntk"):
        kept = scaled(kind, factor=8.0 if kind == "ntk" else 1.0)  # 1 · 2048 / 256 - 0 = 8
        assert kept[0] == 1 and kept[-1] == pytest.approx(plain[-1] / 8)
    turns = 256 * plain / (2 * np.pi)
    for kind, fast in (("yarn", 32), ("llama3", 4)):
        ratio = scaled(kind) / plain
        assert (ratio[turns >= fast] == 1).all() and ratio[turns <= 1] == pytest.approx(1 / 8)
        assert (np.diff(ratio) <= 0).all() and ((ratio > 0.13) & (ratio < 0.99)).any()
    assert_close(np.array(Scaling(32, kind="dynamic-ntk", factor=8.0, length=256).angles(256)), plain)
    assert Scaling(2, kind="ntk", factor=8.0).angles() == (1,) and Scaling(0, kind="yarn", factor=8.0).angles() == ()


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("ramp", RAMPS)
def test_a_factor_of_one_scales_nothing(kind, ramp):
    scaling = Scaling(16, kind=kind, factor=1.0, length=64, ramp=ramp)
    assert_close(np.array(scaling.angles(64)), np.array(rope_angles(16)))
    assert scaling.gain == 1


@pytest.mark.parametrize(("change", "sentence"), [
    ({"kind": "cubic"}, "Scaling: kind is 'cubic', allowed: none, linear, ntk, dynamic-ntk, yarn, llama3"),
    ({"ramp": "steep"}, "Scaling: ramp is 'steep', allowed: turns, pairs"),
    ({"factor": 0.5}, "Scaling: factor is 0.5, allowed: a number from 1"),
    ({"length": 0}, "Scaling: length is 0, allowed: an integer from 1"),
])
def test_wrong_scalings(change, sentence):
    with pytest.raises(DomainError) as caught:
        Scaling(8, **change)
    assert str(caught.value) == sentence


def test_growth_that_no_number_holds():
    x = np.ones((1, 1, 2, 4), np.float32)
    with pytest.raises(DomainError, match=r"a growth of 0\.1 for each position is beyond float32, allowed: .* up to 887"):
        rope(x, angles=(1.0, 1.0), growth=(0.1, 0.0), start=1000)
    with pytest.raises(DomainError, match=r"growth must be a tuple of a number for each of the 2 angles, or \(\), got"):
        rope(x, angles=(1.0, 1.0), growth=(0.1,))


# -- keys in a cache ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("growth", [(), xpos_growth(8)], ids=["turned", "growing"])
def test_cached_keys_move(growth):
    rotation, k = Rotation(rope_angles(8), "half", growth=growth), np.random.default_rng(0).normal(size=(2, 3, 5, 8))
    moved = rotation.moved(rotation.keys(k, 40), -37)
    assert_close(moved.numpy(), rotation.keys(k, 3).numpy(), terms=64)


# -- pairings ----------------------------------------------------------------------------------------------------------
def test_the_order_from_one_pairing_to_the_other():
    assert half_order(6).tolist() == [0, 2, 4, 1, 3, 5] and half_order(7, 4).tolist() == [0, 2, 1, 3, 4, 5, 6]
    for width, turned in ((7, 3), (4, 6), (4, -2)):
        with pytest.raises(ShapeError, match=f"half_order: {turned} channels of {width} cannot be turned in pairs, allowed"):
            half_order(width, turned)
    weight = np.arange(24).reshape(12, 2)
    assert np.array_equal(repaired(repaired(weight, 2, "half"), 2, "interleaved"), weight)
    with pytest.raises(ShapeError, match="repaired: 5 heads do not divide 12 rows"):
        repaired(weight, 5, "half")
    with pytest.raises(DomainError, match="repaired: pairing is 'both', allowed: interleaved, half"):
        repaired(weight, 2, "both")


@pytest.mark.parametrize("variant", ["roformer", "roformer-encoder", "roformer-linear"])
@pytest.mark.parametrize("rotated", [1.0, 0.5])
def test_a_model_of_one_pairing_becomes_one_of_the_other(variant, rotated):
    first, ids = build(variant, rotated=rotated, bias=True), tokens(CONTEXT)
    second, turned = build(variant, rotated=rotated, bias=True, pairing="half"), round(rotated * 8)
    state = first.state()
    for name in [name for name in state if ".qkv." in name]:
        q, k, v = np.split(state[name], 3)
        state[name] = np.concatenate([repaired(q, 4, "half", turned), repaired(k, 4, "half", turned), v])
    assert not np.allclose(second(ids).numpy(), first(ids).numpy())
    second.load(state)
    assert_close(second(ids).numpy(), first(ids).numpy(), terms=1000)


# -- models ------------------------------------------------------------------------------------------------------------
@each_option
def test_every_option_reads_in_parts_what_it_reads_at_once(options):
    """Over several trained contexts, and positions after the first in float64 as exact as at once."""
    model, ids = build(**options), tokens(3 * CONTEXT + 1)
    with no_grad():
        expected, state, parts = model(ids).numpy(), model.init_state(2), []
        for start, stop in ((0, 4), (4, 5), (5, 21), (21, 22), (22, 25)):
            logits, state = model.prefill(ids[:, start:stop], state)
            parts.append(logits.numpy())
    assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


@pytest.mark.parametrize(("variant", "options"), [
    ("roformer", {}), ("roformer", OPTIONS["xpos"]), ("roformer", OPTIONS["dynamic"]), ("roformer-linear", {}),
    ("roformer-linear", dict(feature="relu"))], ids=str)
def test_nothing_of_the_future_is_seen_however_large_it_is(variant, options):
    mixer, rng = build(variant, **options).blocks[0].mixer, np.random.default_rng(0)
    x = rng.normal(size=(2, 20, 32))
    before = mixer(Tensor(x)).numpy()
    for scale in (1, 3, 10, 100):
        for cut in (1, 7, 19):
            changed = x.copy()
            changed[:, cut:] = scale * rng.normal(size=changed[:, cut:].shape)
            np.testing.assert_allclose(mixer(Tensor(changed)).numpy()[:, :cut], before[:, :cut], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(xpos=True), dict(scaling="yarn", scaling_factor=4.0)], ids=str)
def test_scores_depend_on_distances_only(options):
    mixer, x = build(**options).blocks[0].mixer, Tensor(np.random.default_rng(0).normal(size=(2, 9, 32)))
    one, two = ([turned.numpy() for turned in mixer._heads(x, start)] for start in (0, 1000))
    assert not np.allclose(one[0], two[0])
    assert_close(two[0] @ np.swapaxes(two[1], 2, 3), one[0] @ np.swapaxes(one[1], 2, 3), terms=10_000)
    assert_close(two[2], one[2])


def test_dynamic_angles_are_those_of_the_length():
    """The last trained context of a text of 20 positions is attention with the angles of 20 positions, all keys included."""
    mixer = build(**OPTIONS["dynamic"]).blocks[0].mixer
    x = Tensor(np.random.default_rng(0).normal(size=(2, 20, 32)))
    q, k, v = split_heads(mixer.qkv(x), heads=mixer.parts)
    angles = Scaling(8, kind="dynamic-ntk", factor=4.0, length=5).angles(20)
    y, _ = attention(rope(q, angles=angles), rope(k, angles=angles), v)
    merged = y.numpy()[:, :, 15:].transpose(0, 2, 1, 3).reshape(2, 5, 32)
    assert_close(mixer(x).numpy()[:, 15:], mixer.out(Tensor(merged)).numpy(), terms=1000)


def test_the_encoder_turns_by_the_length_of_its_call():
    model = build("roformer-encoder", **OPTIONS["dynamic"])
    plain = build("roformer-encoder")
    plain.load(model.state())
    assert_close(model(tokens(5)).numpy(), plain(tokens(5)).numpy())
    assert not np.allclose(model(tokens(8)).numpy(), plain(tokens(8)).numpy())


def test_the_shared_option_is_the_same_code():
    """--positions rope of the transformer is roformer with its defaults."""
    ids, rotary, plain = tokens(2 * CONTEXT), build(), build("transformer", positions="rope")
    plain.load(rotary.state())
    assert np.array_equal(plain(ids).numpy(), rotary(ids).numpy())


def test_the_state_of_the_linear_one_does_not_grow():
    model = build("roformer-linear")
    for length in (1, 30):
        _, state = model.prefill(tokens(length), model.init_state(2))
        for S, z in (block[0] for block in state.blocks):
            assert S.shape == (2, 4, 8, 8) and z.shape == (2, 4, 8)


@pytest.mark.full
@pytest.mark.parametrize(("variant", "options"), [
    ("roformer", OPTIONS["xpos"]), ("roformer", OPTIONS["dynamic"]), ("roformer", OPTIONS["half"]), ("roformer-linear", {}),
    ("roformer", OPTIONS["bert"]),
    ("transformer", dict(positions="alibi"))], ids=str)
def test_on_a_gpu_the_model_is_the_same(variant, options):
    assert_same_on_a_gpu(lambda: build(variant, dtype=np.float32, spread=0.1, **options), tokens(2 * CONTEXT), 9)


@pytest.mark.parametrize("feature", ["elu", "relu"])
def test_features_are_positive(feature):
    mixer, x = build("roformer-linear", feature=feature).blocks[0].mixer, np.linspace(-5, 5, 21)
    found = mixer._positive(Tensor(x)).numpy()
    assert_close(found, np.maximum(x, 0) if feature == "relu" else np.where(x > 0, x + 1, np.exp(x)))


@pytest.mark.parametrize(("variant", "options", "sentence"), [
    ("roformer", {"heads": 5}, "--heads: 5 heads do not divide the width 32"),
    ("roformer-linear", {"heads": 5}, "--heads: 5 heads do not divide the width 32"),
    ("roformer", {"heads": 32}, "--heads: 32 heads of the width 32 have 1 channels each, allowed: an even number, because "),
    ("roformer", {"rotated": 0.3}, "--rotated: 0.3 of 8 channels are 2.4, allowed: a share that is an even number of channels"),
    ("roformer-linear", {"rotated": 0.125}, "--rotated: 0.125 of 8 channels are 1, allowed: a share that is an even number"),
    ("roformer", {"rotated": 0.0}, "rotated: 0.0 is too small, allowed: a number above 0 up to 1"),
    ("roformer", {"pairing": "both"}, "pairing: 'both' is unknown, allowed: interleaved, half"),
    ("roformer", {"scaling": "linear"}, "--scaling linear: --scaling-factor 1 changes no angle, allowed: a number above 1"),
    ("roformer", {"scaling_factor": 4.0}, "--scaling-factor 4: nothing is scaled, because --scaling is none, allowed: 1"),
    ("roformer", {"yarn_ramp": "pairs"}, "--yarn-ramp pairs: --scaling is none, allowed: turns"),
    ("roformer", {"trained_context": 4}, "--trained-context: --scaling none does not depend on it, allowed: none"),
    ("roformer", {"positions": "rope"}, "--positions rope: roformer cannot turn queries and keys, because it turns them"),
    ("roformer", {"xpos": True, "context": 10**5}, "--xpos: a context of 100000 positions is too long for it, allowed: up to"),
])
def test_wrong_options(variant, options, sentence):
    with pytest.raises(UserError) as caught:
        build(variant, **options)
    assert sentence in str(caught.value)
