"""The mixer protocol, for every variant: all ways through a model compute the same."""

import dataclasses
import inspect
import math
import sys

import numpy as np
import pytest

from autograd import Tensor
from autograd.errors import ShapeError
from autograd.random import Random
from minitv import cli, variants
from minitv.errors import UserError
from minitv.nn import Module, Parameter
from tests.minitv import models
from tests.minitv.models import mean_loss

pytestmark = pytest.mark.usefixtures("either_way")
VOCAB, CONTEXT, BATCH, WIDTH, LAYERS = 11, 12, 3, 16, 2
SMALL = dict(context=CONTEXT, layers=LAYERS, width=WIDTH, bias=True)
TOLERANCE = dict(rtol=1e-9, atol=1e-11)

every_variant = pytest.mark.parametrize("variant", models.NAMES)


def build(variant, dtype=np.float64, seed=0, vocab=VOCAB, spread=True, **options):
    """A small model; ``spread`` makes its weights large, so that attention and gates are far from uniform."""
    made = models.build(variant, vocab, dtype, seed, **{**SMALL, **options})
    if spread:
        rng = np.random.default_rng(seed)
        for parameter in made.parameters():
            parameter.assign_((parameter.numpy() + 0.3 * rng.normal(size=parameter.shape)).astype(dtype))
    return made


def tokens(length, batch=BATCH, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def arrays(state):
    """Every array in a state, which is a tree of tuples, lists, dicts and tensors."""
    if isinstance(state, Tensor):
        yield state.numpy()
    elif isinstance(state, np.ndarray):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from arrays(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from arrays(value)
    elif dataclasses.is_dataclass(state):
        yield from arrays([getattr(state, field.name) for field in dataclasses.fields(state)])


@every_variant
def test_the_mixer_alone_keeps_the_protocol(variant):
    mixer = build(variant).blocks[0].mixer
    x = Tensor(np.random.default_rng(0).normal(size=(2, 7, WIDTH)))
    y, _ = mixer.prefill(x, mixer.init_state(2))
    np.testing.assert_allclose(y.numpy(), mixer(x).numpy(), **TOLERANCE)
    state = mixer.init_state(2)
    for t in range(7):
        z, state = mixer.prefill(x[:, t : t + 1], state)
        np.testing.assert_allclose(z.numpy()[:, 0], y.numpy()[:, t], **TOLERANCE)


def test_the_cache_of_the_transformer_has_the_size_it_promises():
    model = build("transformer")
    state = model.init_state(BATCH)
    assert sum(array.size for array in arrays(state.blocks)) == 0
    for length in (1, 5):
        _, after = model.prefill(tokens(length), state)
        assert sum(array.size for array in arrays(after.blocks)) == 2 * BATCH * length * WIDTH * LAYERS
        assert {array.dtype for array in arrays(after.blocks)} == {np.dtype(np.float64)}


@every_variant
def test_positions_end_at_the_context(variant):
    model = build(variant)
    if not model.bounded:
        assert model(tokens(CONTEXT + 1)).shape == (BATCH, CONTEXT + 1, VOCAB)
        return
    sentence = "the model has 12 positions; 0 \\+ 13 tokens do not fit"
    with pytest.raises(ShapeError, match=sentence):
        model(tokens(CONTEXT + 1))
    _, state = model.prefill(tokens(CONTEXT), model.init_state(BATCH))
    with pytest.raises(ShapeError, match="12 \\+ 1 tokens do not fit"):
        model.prefill(np.zeros((BATCH, 1), np.intp), state)


# -- weights


@every_variant
def test_tied_weights_are_one_object(variant):
    tied, free = build(variant, tied=True), build(variant, tied=False)
    assert tied.head.weight is tied.embed.weight
    assert free.head.weight is not free.embed.weight
    assert not np.array_equal(free.head.weight.numpy(), free.embed.weight.numpy())
    names = [name for name, _ in tied.named_parameters()]
    assert "embed.weight" in names and "head.weight" not in names
    assert "head.weight" in [name for name, _ in free.named_parameters()]


@every_variant
def test_names_are_distinct_and_in_order(variant):
    model = build(variant, tied=True)
    names = [name for name, _ in model.named_parameters()]
    assert len(set(names)) == len(names) and names[0] == "embed.weight"
    kinds = [name.split(".")[0] for name in names]
    assert [k for i, k in enumerate(kinds) if k not in kinds[:i]] == \
        ["embed", *(part for part in ("embed_norm", "positions") if getattr(model, part) is not None), "blocks", "norm"]
    assert names == [name for name, _ in build(variant, tied=True, seed=5).named_parameters()]
    layers = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    assert layers == sorted(layers) and set(layers) == {0, 1}


def test_the_names_of_the_transformer():
    names = [name for name, _ in build("transformer", layers=1).named_parameters()]
    block = ("norm1.weight", "norm1.bias", "mixer.qkv.weight", "mixer.qkv.bias", "mixer.out.weight", "mixer.out.bias",
             "norm2.weight", "norm2.bias", "ffn.up.weight", "ffn.up.bias", "ffn.down.weight", "ffn.down.bias")
    assert names == ["embed.weight", "positions", *(f"blocks.0.{name}" for name in block), "norm.weight", "norm.bias"]


@every_variant
def test_weights_follow_from_the_seed(variant):
    one, same, other = (build(variant, seed=seed, spread=False).state() for seed in (0, 0, 1))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["embed.weight"], other["embed.weight"])


@every_variant
def test_load_is_exact_and_all_or_nothing(variant):
    model, other = build(variant, seed=0), build(variant, seed=1)
    model.load(other.state())
    assert np.array_equal(model(tokens(5)).numpy(), other(tokens(5)).numpy())
    before = model.state()
    with pytest.raises(ShapeError) as error:
        changed = {name: value for name, value in build(variant, seed=2).state().items() if name != "norm.weight"}
        model.load({**changed, "embed.weight": np.zeros((2, 2)), "foreign": np.zeros(3)})
    sentence = f"load: norm.weight is missing; foreign is unknown; embed.weight has shape (2, 2), expected ({VOCAB}, 16)"
    assert str(error.value) == sentence
    assert all(np.array_equal(value, before[name]) for name, value in model.state().items())


def test_modules_in_lists_and_shared_modules():
    class Leaf(Module):
        def __init__(self):
            self.weight = Parameter(np.zeros(2))

    class Tree(Module):
        def __init__(self):
            self.leaves = [Leaf(), Leaf()]
            self.again = self.leaves[0]
            self.own = Parameter(np.zeros(1))

    tree = Tree()
    assert [name for name, _ in tree.named_parameters()] == ["leaves.0.weight", "leaves.1.weight", "own"]
    assert len(tree.parameters()) == 3


@pytest.mark.parametrize("given, base", [(None, 0.02 * math.sqrt(6)), (0.03, 0.03)], ids=["by width", "given"])
def test_initial_weights_of_the_transformer(given, base):
    model = build("transformer", np.float32, vocab=200, spread=False, context=64, layers=3, width=128, init_std=given)
    residual = base / math.sqrt(2 * 3)
    for name, parameter in model.named_parameters():
        value = parameter.numpy().astype(np.float64)
        assert value.dtype == np.float64 and parameter.dtype == np.float32
        if parameter.ndim == 1:
            assert (value == (1 if "norm" in name and "weight" in name else 0)).all(), name
            continue
        std = residual if name.endswith(("mixer.out.weight", "ffn.down.weight")) else base
        error = 5 / math.sqrt(value.size)  # five standard errors
        assert abs(value.mean()) < std * error, name
        assert value.std() == pytest.approx(std, rel=error), name
        assert 3.5 < np.abs(value).max() / std < 6.5, name  # a normal's tail, not cut off


@every_variant
@pytest.mark.parametrize("std", [0.02, *(pytest.param(std, marks=pytest.mark.full) for std in (1e-3, None))])
def test_the_first_loss_is_that_of_guessing(variant, std):
    """A normalised row times a row of the head with length s gives logits from N(0, s²), which cost s² / 2 nats."""
    # Where blocks start as the identity, a tied head echoes.
    given = {} if "init_std" in variants.load(variant).without else {"init_std": std}
    model = build(variant, spread=False, tied=False, **given)
    ids = tokens(CONTEXT + 1, batch=200)
    expected = math.log(VOCAB) + np.square(model.head.weight.numpy()).sum(axis=1).mean() / 2
    assert mean_loss(model, ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("change", [dict(bias=False), dict(norm="rms_norm"), dict(activation="relu_squared"),
                                    dict(activation="silu"), dict(activation="gelu_tanh"), dict(ffn_multiple=1),
                                    dict(ffn_gate=True), dict(norm_eps=0.1), dict(norm="rms_norm", norm_eps=0.1)])
def test_model_options_change_the_model(change):
    model, plain = build("transformer", **change), build("transformer")
    ids = tokens(CONTEXT + 1)
    mean_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert mean_loss(model, ids[:, :-1], ids[:, 1:]).item() != mean_loss(plain, ids[:, :-1], ids[:, 1:]).item()
    if "bias" in change:
        assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="--heads: 3 heads do not divide the width 16"):
        build("transformer", heads=3)


# -- dropout


@every_variant
def test_dropout_only_with_a_random_source(variant):
    dropped = build(variant, dropout=0.5)
    plain, ids = build(variant), tokens(CONTEXT)
    plain.load(dropped.state())
    expected = plain(ids).numpy()
    assert np.array_equal(dropped(ids).numpy(), expected)
    assert np.array_equal(plain(ids, Random(3)).numpy(), expected)  # nothing to drop
    one, same, other = (dropped(ids, Random(seed)).numpy() for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.allclose(one, expected) and not np.allclose(one, other)


@every_variant
def test_layers_drop_independently(variant):
    """The masks of two layers with equal weights and inputs differ."""
    model = build(variant, dropout=0.5)
    x = Tensor(np.random.default_rng(0).normal(size=(2, 5, WIDTH)))
    block, rng = model.blocks[0], Random(7)
    assert not np.allclose(block(x, rng.split(1, 0)).numpy(), block(x, rng.split(1, 1)).numpy())


@every_variant
def test_every_variant_has_a_page(variant, capsys):
    record = variants.load(variant)
    assert cli.main(["explain", variant]) == 0
    taught = inspect.getdoc(sys.modules[variants.variants()[variant].module])
    assert taught and taught in capsys.readouterr().out
    rows = variants.describe(record)
    assert [label for label, _ in rows[:4]] == ["paper", "formula", "cost", "state"] and rows[-1][0] == "the review"
    assert all(text.strip() and "\n" not in text and "|" not in text for _, text in rows)
    operators = record.page.operators
    assert operators and {label for label, _ in rows} >= {*operators, "equals"}
