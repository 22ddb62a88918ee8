"""Stacks and blocks: mixed, shared and absent parts, blocks of every kind, and the reversible stack."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from autograd import Tensor, gradients, no_grad, sum, tanh
from autograd.random import Random
from minitv import variants
from minitv.blocks import Block, FeedForward, Macaron, Parallel, PostNorm, PreNorm
from minitv.errors import UserError
from minitv.laws import Kept
from minitv.nn import Linear, Stateful
from minitv.options import ModelOptions
from minitv.stack import Reversible, Stack, cycle

pytestmark = pytest.mark.usefixtures("either_way")
MODEL = ModelOptions(context=12, layers=3, width=16, bias=True)
VOCAB, BATCH = 11, 2
BLOCKS = [PreNorm, PostNorm, Parallel, Macaron]
every_variant = pytest.mark.parametrize("name", [name for name in variants.variants() if variants.load(name).causal
                                                 and variants.load(name).block.branches is not Block.branches])


def record(name="transformer", **changes):
    return replace(variants.load(name), **changes)


def wanted(name, model):
    """The options with what the variant reads instead of learned positions."""
    return replace(model, **{k: v for k, v in variants.load(name).overrides.items() if k in ("positions", "embed_norm")})


def build(variant=None, model=MODEL, own=(), dtype=np.float64):
    """A language model whose weights are large enough that everything counts."""
    variant = variant or record()
    made = variant.build(model, variant.options(**dict(own)), VOCAB, Random(0), dtype)
    rng = np.random.default_rng(0)
    for name, parameter in made.named_parameters():
        noise = 0 if ".filters." in name else 0.3 * rng.normal(size=parameter.shape)
        parameter.assign_((parameter.numpy() + noise).astype(dtype))
    return made


def tokens(length=12):
    return np.random.default_rng(1).integers(0, VOCAB, (BATCH, length))


def check_prefill(model):
    """Prefill over parts is the call."""
    ids, state, parts = tokens(), model.init_state(BATCH), []
    with no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            logits, state = model.prefill(ids[:, start:stop], state)
            parts.append(logits.numpy())
        np.testing.assert_allclose(np.concatenate(parts, axis=1), model(ids).numpy(), rtol=1e-9, atol=1e-10)


# -- blocks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("channel", [FeedForward, None], ids=["with", "without"])
def test_blocks_of_every_kind(block, channel):
    if block is Macaron and channel is None:
        return
    model = build(record(block=block, channel=channel))
    check_prefill(model)
    sum(tanh(model(tokens()))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and np.abs(parameter.grad.numpy()).max() > 0, name
    assert ("ffn" in {part for name, _ in model.named_parameters() for part in name.split(".")}) == (channel is not None)


def test_blocks_compute_what_they_say():
    x, rng = Tensor(np.random.default_rng(0).normal(size=(2, 5, 16))), Random(3)
    for kind in BLOCKS:
        b = build(record(block=kind), replace(MODEL, dropout=0.3)).blocks[1]
        for r in (None, rng):
            s = [r and r.split(i) for i in range(3)]
            if kind is PreNorm:
                y = x + b.mixer(b.norm1(x), s[0])
                y = y + b.ffn(b.norm2(y), s[1])
            elif kind is PostNorm:
                y = b.norm1(x + b.mixer(x, s[0]))
                y = b.norm2(y + b.ffn(y, s[1]))
            elif kind is Parallel:
                z = b.norm1(x)
                y = x + b.mixer(z, s[0]) + b.ffn(z, s[1])
            else:
                y = x + 0.5 * b.ffn(b.norm1(x), s[0])
                y = y + b.mixer(b.norm2(y), s[1])
                y = y + 0.5 * b.ffn2(b.norm3(y), s[2])
            np.testing.assert_allclose(b(x, r).numpy(), y.numpy(), rtol=1e-12, atol=1e-12)


def test_a_model_ends_with_one_norm():
    assert build(record(block=PostNorm)).norm is None
    assert all(build(record(block=block)).norm is not None for block in BLOCKS if block is not PostNorm)


def test_channel_mixers_of_a_block_are_different_ones():
    model = build(record(block=Macaron))
    weights = [ffn.up.weight.numpy() for block in model.blocks for ffn in (block.ffn, block.ffn2)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


# -- parts of layers ---------------------------------------------------------------------------------------------------
class Last(Stateful):
    """y = x W, or of the position before if ``back``."""

    back = False

    def __init__(self, rng, model, options, layer=0, dtype=np.float32):
        self.linear = Linear(rng, model.width, model.width, std=0.5, dtype=dtype)
        self.layer = layer

    @classmethod
    def of_layer(cls, options, layer):
        return cycle("--pattern", "here,back", {"here": Last, "back": Back}, layer)

    def __call__(self, x, rng=None):
        return self.prefill(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch):
        return self.constant(0.0, batch, 1, 16)

    def prefill(self, x, state):
        from autograd import concat

        y = concat([state, x], axis=1)
        return self.linear(y[:, :-1] if self.back else x), y[:, -1:]


class Back(Last):
    back = True


class Wide(FeedForward):
    shared = True


class Sometimes(FeedForward):
    @classmethod
    def of_layer(cls, options, layer):
        return cls if layer == 1 else None


@pytest.mark.parametrize("stack", [Stack, Reversible])
def test_mixed_layers(stack):
    model = build(record(mixer=Last, stack=stack))
    assert [type(block.mixer) for block in model.blocks] == [Last, Back, Last]
    assert [block.mixer.layer for block in model.blocks] == [0, 1, 2]
    check_prefill(model)


def test_an_unknown_layer_in_a_pattern():
    assert cycle("--layers", " a, b,a ", {"a": Last, "b": Back}, 4) is Back
    with pytest.raises(UserError, match=r"--layers: '' is unknown, allowed: names separated by commas, each of a, b"):
        cycle("--layers", "a,", {"a": Last, "b": Back}, 0)


@pytest.mark.parametrize("stack", [Stack, Reversible])
@pytest.mark.parametrize("block", [PreNorm, Macaron])
def test_a_shared_channel_mixer_is_one_object(block, stack):
    """Counted and saved once; its gradient is the sum over the layers of a model in which each has a copy."""
    shared, copies = (build(record(block=block, stack=stack, channel=channel)) for channel in (Wide, FeedForward))
    names = [name for name, _ in shared.named_parameters()]
    assert [name for name in names if "ffn" in name and not name.startswith("blocks.0.")] == []
    values = shared.state()
    copies.load({name: values[name if name in values else "blocks.0." + name.split(".", 2)[2]] for name in copies.state()})
    ids = tokens()
    np.testing.assert_array_equal(shared(ids).numpy(), copies(ids).numpy())
    for model in (shared, copies):
        sum(tanh(model(ids))).backward()
    of_copies = {name: p.grad.numpy() for name, p in copies.named_parameters()}
    for name, parameter in shared.named_parameters():
        expected = of_copies[name]
        if "ffn" in name:
            part = name.split(".", 2)[2]
            expected = np.sum([of_copies[f"blocks.{i}.{part}"] for i in range(3)], axis=0)
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("stack", [Stack, Reversible])
def test_a_channel_mixer_in_some_layers_only(stack):
    model = build(record(channel=Sometimes, stack=stack))
    assert [block.ffn is not None for block in model.blocks] == [False, True, False]
    check_prefill(model)


# -- the reversible stack ----------------------------------------------------------------------------------------------
@every_variant
def test_a_reversible_model_reads_in_parts(name):
    check_prefill(build(record(name, stack=Reversible), wanted(name, MODEL)))


@pytest.mark.parametrize("block", [PreNorm, Parallel, Macaron])
def test_reversible_blocks_of_other_kinds(block):
    found, expected = (build(record(block=block, stack=stack)) for stack in (Reversible, Kept))
    one, other = ([*gradients(sum(tanh(m(tokens(), Random(2)))), m.parameters())] for m in (found, expected))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-10)
    check_prefill(found)


def test_a_block_that_cannot_be_undone():
    with pytest.raises(UserError, match="--stack reversible: the blocks of transformer normalise the sum"):
        build(record(block=PostNorm, stack=Reversible))


def test_the_option_chooses_the_stack():
    for choice, own, expected in ((None, Stack, Stack), (None, Reversible, Reversible), ("reversible", Stack, Reversible),
                                  ("residual", Reversible, Stack)):
        assert type(build(record(stack=own), replace(MODEL, stack=choice)).blocks) is expected


def activations(stack, layers):
    """Bytes that a pass forward and backward needs at most, beside the weights and the gradients of one layer."""
    options = ModelOptions(context=256, layers=layers, width=32, dropout=0.1)
    variant = record(stack=stack)
    model = variant.build(options, variant.options(), VOCAB, Random(0))
    x = Tensor(np.random.default_rng(0).normal(size=(8, 256, 32)).astype(np.float32), requires_grad=True)

    def run():
        sum(model.blocks(x, Random(1))).backward(sink=lambda leaf, gradient: None)

    run()  # whatever is kept from the first call on
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.full
def test_memory_of_a_reversible_stack_does_not_grow_with_its_depth():
    two, twelve = (activations(Reversible, layers) for layers in (2, 12))
    assert twelve < 1.02 * two, (two, twelve)
    one, all_kept = (activations(Stack, layers) for layers in (1, 12))
    # What one layer needs for a moment is part of every peak, and in forms that is much.
    assert twelve < 1.2 * one and all_kept > 6 * twelve, (one, twelve, all_kept)
