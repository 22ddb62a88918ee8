"""Models: positions of every kind, logits at some positions only, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autograd import Tensor, assert_close, cross_entropy
from autograd.errors import DomainError, ShapeError
from autograd.random import Random
from minitv import variants
from minitv.errors import UserError
from minitv.models.encoder import Encoder, sines
from minitv.options import ModelOptions
from minitv.variants.transformer import alibi_slopes

pytestmark = pytest.mark.usefixtures("either_way")
MODEL, VOCAB = ModelOptions(context=12, layers=2, width=16), 11


def build(name="transformer", own=(), **options):
    variant = variants.load(name)
    instead = {k: v for k, v in variant.overrides.items() if k in ("positions", "embed_norm")}
    made = variant.build(replace(MODEL, **{**instead, **options}), variant.options(**dict(own)), VOCAB, Random(0), np.float64)
    rng = np.random.default_rng(0)
    for parameter in made.parameters():
        parameter.assign_(parameter.numpy() + 0.3 * rng.normal(size=parameter.shape))
    return made


def tokens(length=12, batch=3):
    return np.random.default_rng(1).integers(0, VOCAB, (batch, length))


# -- logits at some positions -------------------------------------------------------------------------------------------
def test_logits_at_some_positions_are_those_of_all():
    model, ids, at = build(), tokens(), np.array([0, 3, 17, 35, 17])
    logits = model(ids, at=at)
    assert logits.shape == (5, VOCAB)
    assert_close(logits.numpy(), model(ids).numpy().reshape(-1, VOCAB)[at], terms=100)
    assert model(ids, at=np.zeros(0, np.intp)).shape == (0, VOCAB)
    with pytest.raises(DomainError):
        model(ids, at=np.array([36]))


def test_gradients_of_a_loss_at_some_positions():
    """They are those of a loss over all positions that counts these alone."""
    model, ids, at = build(), tokens(), np.array([1, 8, 30])
    labels = np.array([2, 5, 7])
    cross_entropy(model(ids, at=at), labels).backward()
    some = [p.grad.numpy() for p in model.parameters()]
    model.zero_grad()
    cross_entropy(model(ids).reshape(-1, VOCAB)[at], labels).backward()
    for one, p in zip(some, model.parameters(), strict=True):
        assert_close(one, p.grad.numpy(), terms=1000)


# -- positions ----------------------------------------------------------------------------------------------------------
def test_sines_are_those_of_the_paper():
    table = sines(0, 50, 6, np.dtype(np.float64))
    for t in (0, 1, 49):
        for i in range(3):
            assert table[t, 2 * i] == pytest.approx(np.sin(t / 10_000 ** (2 * i / 6)), abs=1e-14)
            assert table[t, 2 * i + 1] == pytest.approx(np.cos(t / 10_000 ** (2 * i / 6)), abs=1e-14)
    assert np.array_equal(sines(7, 9, 6, np.dtype(np.float64)), table[7:9])
    assert sines(0, 3, 5, np.dtype(np.float32)).shape == (3, 5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_positions_of_every_kind(positions):
    """Reading in parts is the call; only learned vectors end at the context, and only without any the order is lost."""
    model, ids = build(positions=positions), tokens()
    state, parts = model.init_state(3), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits, state = model.prefill(ids[:, start:stop], state)
        parts.append(logits.numpy())
    np.testing.assert_allclose(np.concatenate(parts, axis=1), model(ids).numpy(), rtol=1e-9, atol=1e-10)
    assert ("positions" in [name for name, _ in model.named_parameters()]) == (positions == "learned") == model.bounded
    if not model.bounded:
        assert model(tokens(30)).shape == (3, 30, VOCAB)
    model, turned = build(positions=positions, layers=1), ids[:, [1, 0, *range(2, 12)]]  # two layers count by their masks
    same = np.allclose(model(ids).numpy()[:, -1], model(turned).numpy()[:, -1], atol=1e-9)
    assert same == (positions == "none")


def test_with_rope_only_distances_count():
    """One layer, and a beginning that the last token cannot tell from nothing: a shift of all positions changes no logits."""
    model, ids = build(positions="rope", layers=1), tokens(6)
    _, state = model.prefill(tokens(4), model.init_state(3))
    block = state.blocks[0][0]
    hidden = type(block)(block.keys[:, :, :0], block.values[:, :, :0])
    assert_close(model.prefill(ids, state._replace(blocks=((hidden, None),)))[0].numpy(), model(ids).numpy(), terms=100)


def test_sinusoidal_positions_suit_every_variant_but_a_streaming_one():
    for name in variants.variants():
        if variants.load(name).causal and name != "attention-sinks":
            assert np.isfinite(build(name, positions="sinusoidal")(tokens()).numpy()).all()
    with pytest.raises(UserError, match="--positions sinusoidal: a vector for each place of the text"):
        build("attention-sinks", positions="sinusoidal")


def test_with_alibi_scores_fall_by_the_slopes_of_its_paper():
    assert alibi_slopes(1) == [2**-8] and alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    model, ids = build(positions="alibi", layers=1), tokens()
    mixer = model.blocks[0].mixer
    x = Tensor(np.random.default_rng(0).normal(size=(2, 9, 16)))
    q, k, v = (part.numpy() for part in mixer._heads(x, 0))
    distance = np.arange(9)[:, None] - np.arange(9)
    weights = np.exp(q @ np.swapaxes(k, 2, 3) / 2 - np.array(alibi_slopes(4))[:, None, None] * distance) * (distance >= 0)
    y = (weights / weights.sum(3, keepdims=True)) @ v
    assert_close(mixer(x).numpy(), mixer.out(Tensor(y.transpose(0, 2, 1, 3).reshape(2, 9, 16))).numpy(), terms=1000)
    assert model(ids).shape == (3, 12, VOCAB)


def test_alibi_where_there_are_no_scores():
    with pytest.raises(UserError, match=r"--positions alibi: rwkv cannot .* no scores .* allowed: learned, sinusoidal, none"):
        build("rwkv", positions="alibi")
    with pytest.raises(UserError, match=r"--positions alibi: encoder .* both sides .* learned, sinusoidal, rope, none"):
        build("encoder", positions="alibi")


def test_rope_where_nothing_can_be_turned():
    with pytest.raises(UserError, match=r"--positions rope: retnet .*it turns them already, by the angles"):
        build("retnet", positions="rope")
    with pytest.raises(UserError, match="--positions rope: rwkv cannot turn queries and keys, because it has no products"):
        build("rwkv", positions="rope")
    with pytest.raises(UserError, match="it turns pairs of channels, and 16 heads of the width 16 have 1 channels each"):
        build(own={"heads": 16}, positions="rope")


# -- shapes -------------------------------------------------------------------------------------------------------------
def test_ids_without_a_batch_get_a_sentence():
    model = build()
    with pytest.raises(ShapeError, match=r"ids are \[B T\], .* of B sequences; got an array of shape \(12,\): ids\[None\]"):
        model(tokens()[0])
    with pytest.raises(ShapeError, match=r"got an array of shape \(1, 3, 12\)$"):
        model(tokens()[None])


def test_a_model_that_cannot_write_is_an_encoder():
    variant = replace(variants.load("transformer"), model=Encoder)
    model = variant.build(MODEL, variant.options(), VOCAB, Random(0))
    assert model(tokens()).shape == (3, 12, VOCAB) and not hasattr(model, "prefill") and not variant.causal
