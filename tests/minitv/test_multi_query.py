"""Multi-query and grouped-query attention: shared heads, their sizes, and what makes them of a trained model."""

import numpy as np
import pytest

from minitv import cli, sample, variants
from minitv.errors import UserError
from minitv.variants.multi_query import repeated

from . import models

VOCAB, SMALL = 11, dict(context=12, layers=2, width=16, heads=4, ffn_multiple=4)


def size(variant, **options):
    return sum(parameter.size for parameter in variants.load(variant).configure(**options).build(65).parameters())


@pytest.mark.parametrize("preset", ["tiny", "nanogpt-cpu", pytest.param("small", marks=pytest.mark.full)])
@pytest.mark.parametrize("variant", ["multi-query", "grouped-query"])
def test_presets_have_the_size_of_the_transformer(variant, preset):
    assert size(variant, preset=preset) == size("transformer", preset=preset)


def expanded(shared, bias):
    """The Transformer whose heads have the keys and values of their groups."""
    whole = models.build("transformer", VOCAB, np.float64, bias=bias, **SMALL)
    whole.load(repeated(shared.state(), 4))
    return whole


@pytest.mark.parametrize("own", [dict(kv_heads=1, bias=True), dict(kv_heads=2), dict(layer_kv_heads="2,1")])
def test_shared_heads_are_repeated_heads_when_training_and_writing(own):
    shared = models.build("grouped-query", VOCAB, np.float64, **own, **SMALL)
    whole = expanded(shared, own.get("bias", False))
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 12))
    expected = whole(ids).numpy()
    np.testing.assert_allclose(shared(ids).numpy(), expected, rtol=0, atol=1e-12)
    first, state = shared.prefill(ids[:, :5], shared.init_state(2))
    second, _ = shared.prefill(ids[:, 5:], state)
    np.testing.assert_allclose(np.concatenate([first.numpy(), second.numpy()], axis=1), expected, rtol=0, atol=1e-12)


def test_the_cache_has_one_entry_for_each_group():
    model = models.build("grouped-query", VOCAB, np.float64, layer_kv_heads="4,1", **SMALL)
    _, state = model.prefill(np.zeros((3, 7), int), model.init_state(3))
    assert [mixer.keys.shape for mixer, _ in state.blocks] == [(3, 4, 7, 4), (3, 1, 7, 4)]


@pytest.mark.parametrize("own, sentence", [
    (dict(kv_heads=3), "--kv-heads: 3 heads of keys and values do not divide 4 heads, allowed: 1, 2, 4"),
    (dict(kv_heads=8), "--kv-heads: 8 heads of keys and values do not divide 4 heads, allowed: 1, 2, 4"),
    (dict(layer_kv_heads="2"), "--layer-kv-heads: '2' is not one number for each of 2 layers, allowed: 2 positive"),
    (dict(layer_kv_heads="2,x"), "--layer-kv-heads: '2,x' is not one number"),
    (dict(layer_kv_heads="2,0"), "--layer-kv-heads: '2,0' is not one number"),
    (dict(layer_kv_heads="2,3"), "--layer-kv-heads: 3 heads of keys and values do not divide"),
])
def test_what_does_not_divide_is_refused(own, sentence):
    with pytest.raises(UserError) as caught:
        models.build("grouped-query", VOCAB, **own, **SMALL)
    assert str(caught.value).startswith(sentence)


@pytest.fixture
def trained(tmp_path, capsys):
    """The folder of a small Transformer that was trained for a few steps."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    out = str(tmp_path / "run")
    assert cli.main(["train", "--data", str(text), "--context", "8", "--layers", "2", "--width", "16", "--heads", "4", "--bias",
                     "--batch", "4", "--steps", "4", "--eval-every", "0", "--positions", "rope", "--out", out]) == 0
    capsys.readouterr()
    return out


@pytest.mark.parametrize("pool", ["mean", *(pytest.param(pool, marks=pytest.mark.full) for pool in ("first", "random"))])
def test_a_trained_model_is_converted_head_by_head(trained, tmp_path, pool):
    out = str(tmp_path / pool)
    assert cli.main(["convert", trained, "--kv-heads", "2", "--pool", pool, "--out", out]) == 0
    old, new = sample.load(trained).model.state(), sample.load(out).model.state()
    for name, array in old.items():
        if ".qkv." not in name:
            np.testing.assert_array_equal(new[name], array)
            continue
        rows = array.reshape(3, 4, 4, *array.shape[1:])  # [q, k or v; H, K, ..]
        np.testing.assert_array_equal(new[name][:16], array[:16])
        shared = new[name][16:].reshape(2, 2, 4, *array.shape[1:])
        for part in range(2):
            for group in range(2):
                members = rows[1 + part, 2 * group : 2 * group + 2]
                if pool == "mean":
                    np.testing.assert_allclose(shared[part, group], members.mean(axis=0), rtol=1e-6, atol=1e-9)
                elif pool == "first":
                    np.testing.assert_array_equal(shared[part, group], members[0])
                elif name.endswith("weight"):
                    assert not np.isin(shared[part, group], members).any()


def test_the_same_number_of_heads_changes_nothing_and_the_run_goes_on(trained, tmp_path, capsys):
    out = str(tmp_path / "all")
    assert cli.main(["convert", trained, "--kv-heads", "4", "--out", out]) == 0
    text = "the lazy fox"
    assert sample.load(out).loss(text) == pytest.approx(sample.load(trained).loss(text), rel=1e-6)
    more = str(tmp_path / "more")
    data = str(tmp_path / "text.txt")
    assert cli.main(["train", "--init-from", out, "--data", data, "--steps", "2", "--eval-every", "0", "--out", more]) == 0
    assert cli.main(["train", "--resume", out, "--steps", "2"]) == 0
    assert sample.load(more).experiment.variant.name == sample.load(out).experiment.variant.name == "grouped-query"
    capsys.readouterr()
    assert cli.main(["convert", trained, "--kv-heads", "3", "--out", str(tmp_path / "no")]) == 2
    assert cli.main(["convert", trained, "--kv-heads", "2", "--out", out]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "3 heads of keys and values do not divide 4 heads, allowed: 1, 2, 4" in first and "there is a run" in second
