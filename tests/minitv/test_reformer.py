"""Reformer: what it sees, its hashes, its chain, its options. What every variant must do is in test_lm.py."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from autograd import Tensor, assert_close, gradients, no_grad
from autograd.random import Random
from minitv.errors import UserError
from minitv.ops import bucket_order, lsh_attention, lsh_buckets
from minitv.ops.lsh import factors_of
from minitv.options import ModelOptions
from minitv.stack import Reversible
from minitv.task import Batch, Task
from minitv.trainer import Trainer
from minitv.variants import reformer
from minitv.variants.reformer import AxialPositions, LSHAttention, ReformerOptions
from tests.minitv import models
from tests.minitv.models import Ids, assert_same_on_a_gpu, mean_loss

VOCAB, LENGTH = 11, 24
CODES = dict(attend="chunks", wrap="previous", correction=False, scale="root")
OPTIONS = {
    "rounds": dict(rounds=3, eval_rounds=5), "mixers": dict(mixers="local,lsh,full"), "rope": dict(positions="rope"),
    "full below": dict(full_below=7), "window": dict(window=3), "multiset": dict(correction=False, scale="root"),
    "axial": dict(axial="3x8"), "concat": dict(streams="concat", tied=False), "parts": dict(ffn_chunks=3, loss_chunks=2),
    "residual": dict(stack="residual"), "head size": dict(head_size=6, mixers="lsh,local", positions="rope", local_chunk=4),
    "chunked": dict(mixers="chunked,lsh", chunk=4, head_size=3, attention_bias=False, bias=True, head_bias=True),
    "chunked rope": dict(mixers="chunked", chunk=30, local_chunk=5, positions="rope"),
    "factors": dict(buckets=24, factors="2,6,2"), "widths": dict(axial="3x8", axial_widths="5,11"),
}


def build(dtype=np.float64, **options):
    """A model whose weights are large enough that everything counts."""
    model = models.build("reformer", VOCAB, dtype, **{"context": LENGTH, "layers": 2, "width": 16, "chunk": 6, **options})
    noise = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.assign_((parameter.numpy() + 0.3 * noise.normal(size=parameter.shape)).astype(dtype))
    return model


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_agrees_in_parts_and_in_steps(options):
    model, ids, parts = build(**options), tokens(), []
    with no_grad():
        expected, state = model(ids).numpy(), model.init_state(2)
        for start, stop in ((0, 5), (5, 6), (6, 19), (19, 20), (20, LENGTH)):
            logits, state = model.prefill(ids[:, start:stop], state)
            parts.append(logits.numpy())
    assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


# -- what is seen ------------------------------------------------------------------------------------------------------
def leak(options, scale):
    """How much outputs change before a position whose input is another one, in a layer with keys of this scale."""
    rng, model = np.random.default_rng(1), ModelOptions(context=LENGTH, width=16, layers=1)
    mixer = LSHAttention(Random(0), model, ReformerOptions(heads=2, chunk=4, rounds=2, **options), dtype=np.float64)
    mixer.qkv.weight.assign_(scale * rng.normal(size=mixer.qkv.weight.shape))
    x, worst = rng.normal(size=(2, LENGTH, 16)), 0.0
    for cut in (1, 7, LENGTH - 1):
        for factor in (-1, 3, 10):
            other = x.copy()
            other[:, cut:] = factor * rng.normal(size=other[:, cut:].shape)
            with no_grad():
                change = mixer(Tensor(other)).numpy()[:, :cut] - mixer(Tensor(x)).numpy()[:, :cut]
            worst = max(worst, float(np.abs(change).max()))
    return worst


@pytest.mark.parametrize("scale", [1, 3, 10, 100])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"full_below": 6}, {"correction": False}], ids=str)
def test_what_comes_later_changes_nothing(options, scale):
    assert leak(options, scale) <= 1e-12


@pytest.mark.parametrize("options", [CODES, {"attend": "chunk"}], ids=["codes", "chunk"])
def test_with_chunks_what_is_seen_depends_on_the_future(options):
    """The published pattern is causal in its values alone: the cuts of the order move with every token."""
    assert leak(options, 1) > 1e-3


def test_chunks_that_hold_whole_buckets_see_what_buckets_show():
    rng = np.random.default_rng(0)
    q, v = rng.normal(size=(2, 1, 2, 20, 4))
    buckets = np.stack([rng.permutation(np.repeat(np.arange(5), 4)) for _ in range(6)]).reshape(1, 2, 3, 20)
    whole = lsh_attention(q, q, v, buckets).numpy()
    assert_close(lsh_attention(q, q, v, buckets, chunk=4).numpy(), whole)


def test_full_attention_below_the_context_is_the_mixer_full():
    full, below, ids = build(mixers="full"), build(full_below=LENGTH), tokens()
    state = below.state()
    state |= {name: value for name, value in full.state().items()}
    below.load(state)
    with no_grad():
        assert_close(below(ids).numpy(), full(ids).numpy(), terms=1000)


# -- hashes ------------------------------------------------------------------------------------------------------------
def test_vectors_meet_more_often_the_nearer_they_are():
    """The spec's probabilities for 16 buckets and 16 channels, within four standard deviations of 20 000 draws."""
    rng, count = np.random.default_rng(0), 20_000
    rotations = rng.normal(size=(1, count, 16, 8))
    expected = {1: 1.0, 0.9: 0.60, 0.7: 0.37, 0.4: 0.19, 0: 0.064, -0.5: 0.007, -1: 0.0}
    for cosine, probability in expected.items():
        x = np.zeros((1, 1, 2, 16))
        x[..., 0, 0], x[..., 1, 0], x[..., 1, 1] = 1, cosine, math.sqrt(1 - cosine**2)
        buckets = lsh_buckets(x, rotations)[0, 0]
        met = float((buckets[:, 0] == buckets[:, 1]).mean())
        assert abs(met - probability) <= 4 * math.sqrt(probability * (1 - probability) / count) + 0.006, cosine


def test_factors_are_even_and_make_about_as_many_buckets():
    assert [factors_of(n) for n in (2, 128, 130, 256, 512, 1024, 2048)] == [
        (2,), (128,), (16, 10), (16, 16), (32, 16), (32, 32), (64, 32)]


def test_the_order_does_not_overflow():
    """bucket · T + t would not fit into 32 bits."""
    length, labels = 40_000, 70_000
    buckets = np.random.default_rng(0).integers(0, labels, (1, 1, 2, length))
    order, place = bucket_order(buckets, count=labels)
    assert np.array_equal(order, np.argsort(buckets, axis=-1, kind="stable"))
    assert np.array_equal(np.take_along_axis(place, order, -1), np.broadcast_to(np.arange(length), order.shape))


def test_rotations_are_drawn_anew_in_every_step_and_saved():
    model = build()
    saved = {name: value for name, value in model.state().items() if "rotations" in name}
    model.begin_step(0, Random(1))
    first = model.state()
    model.begin_step(1, Random(1))
    assert len(saved) == 2
    for name, value in saved.items():
        assert not np.array_equal(value, first[name]) and not np.array_equal(first[name], model.state()[name])


def test_more_rounds_when_it_is_not_trained(monkeypatch):
    seen, hashed = [], reformer.lsh_buckets
    monkeypatch.setattr(reformer, "lsh_buckets", lambda q, r, **kwargs: seen.append(r.shape[1]) or hashed(q, r, **kwargs))
    experiment = models.configure("reformer", context=LENGTH, layers=1, width=16, rounds=1, eval_rounds=4, batch=2, threads=1)
    trainer = Trainer(experiment, Ids(VOCAB))
    batch = Batch(tokens(), tokens(1))
    trainer.step(batch, 0)
    assert set(seen) == {1}
    trainer.evaluate(batch)
    trainer.close()
    assert seen[-1] == 4


# -- the chain ---------------------------------------------------------------------------------------------------------
def plain(self, x, rng=None):
    one, two = x, x
    for layer, block in enumerate(self.blocks):
        for branch in block.branches:
            one, two = two, one + branch(two, rng and rng.split(layer))
    return self.joined(one, two)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"ffn_chunks": 3}, CODES], ids=["buckets", "parts", "codes"])
def test_the_chain_trains_as_the_plain_sums_do(options, monkeypatch):
    model, ids = build(dropout=0.2, **options), tokens()

    def slopes():
        return [g.numpy() for g in gradients(mean_loss(model, ids, np.roll(ids, -1, 1), Random(3)), model.parameters())]

    found = slopes()
    monkeypatch.setattr(Reversible, "__call__", plain)
    for one, other in zip(found, slopes(), strict=True):
        assert_close(one, other, terms=10_000)


def test_backward_reads_the_buckets_of_the_first_pass(monkeypatch):
    """Were they made again, this hash, which is another one in every call, would spoil the chain."""
    calls, model, ids = [], build(), tokens()

    def other(q, rotations, factors):
        calls.append(q.shape)
        return np.random.default_rng(len(calls)).integers(0, 4, (*q.shape[:2], 2, q.shape[2]))

    monkeypatch.setattr(reformer, "lsh_buckets", other)
    found = gradients(mean_loss(model, ids, ids), model.parameters())
    assert len(calls) == 2
    calls.clear()
    monkeypatch.setattr(Reversible, "__call__", plain)
    for one, two in zip(found, gradients(mean_loss(model, ids, ids), model.parameters()), strict=True):
        assert_close(one.numpy(), two.numpy(), terms=10_000)


# -- parts -------------------------------------------------------------------------------------------------------------
class Some(Task):
    """A third of the answers is not asked."""

    vocab = VOCAB


def test_a_loss_in_parts_is_the_loss():
    labels = np.where(tokens() % 3 == 0, -1, tokens(1))
    losses, slopes = [], []
    for chunks in (1, 5, 100):
        model = build(loss_chunks=chunks)
        loss, count = Some().loss(model, Batch(tokens(), labels))
        losses.append(loss.item())
        slopes.append([g.numpy() for g in gradients(loss, model.parameters())])
        assert count == (labels >= 0).sum()
    assert_close(np.array(losses), np.full(3, losses[0]))
    for other in slopes[1:]:
        for one, two in zip(other, slopes[0], strict=True):
            assert_close(one, two, terms=1000)


@pytest.mark.full
def test_chunks_of_the_text_are_the_same_on_a_gpu():
    options = dict(mixers="chunked", chunk=5, head_size=6, head_bias=True, streams="concat", tied=False)
    assert_same_on_a_gpu(lambda: build(np.float32, **options), tokens(), 9)


@pytest.mark.parametrize("option", ["ffn_chunks", "loss_chunks"])
def test_parts_save_memory(option):
    def peak(chunks):
        model = models.build("reformer", 4000 if option == "loss_chunks" else 10, np.float32, context=512, layers=1, width=32,
                             ffn_width=80.0 if option == "ffn_chunks" else 1.0, **{option: chunks})
        ids = np.random.default_rng(0).integers(0, 10, (1, 512))
        tracemalloc.start()
        Task().loss(model, Batch(ids, ids))[0].backward()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(16) < 0.5 * peak(1)


def test_axial_positions_are_digits_of_the_position():
    positions = AxialPositions(Random(0), (3, 2, 4), (3, 3, 4), 1.0, np.float64)
    tables = [table.numpy() for table in positions.tables]
    assert [table.shape for table in tables] == [(3, 3), (2, 3), (4, 4)]
    expected = [np.concatenate([tables[0][p // 8], tables[1][p // 4 % 2], tables[2][p % 4]]) for p in range(24)]
    assert np.array_equal(positions(0, 24).numpy(), np.array(expected))
    assert np.array_equal(positions(5, 9).numpy(), np.array(expected[5:9]))


@pytest.mark.parametrize(("options", "sentence"), [
    ({"heads": 5}, "--heads: 5 heads do not divide the width 16"),
    ({"heads": 16, "positions": "rope"}, "--positions rope: it turns pairs of channels, and 16 heads of the width 16 have 1"),
    ({"buckets": 7}, "--buckets: 7 is odd, allowed: an even number, half of them for each sign"),
    ({"buckets": 1}, "buckets: 1 is too small, allowed: an integer from 2"),
    ({"chunk": 0}, "chunk: 0 is too small, allowed: an integer from 1"),
    ({"rounds": 0}, "rounds: 0 is too small, allowed: an integer from 1 up to 64"),
    ({"wrap": "same"}, "--wrap same: this is about chunks, allowed with --attend bucket: none"),
    ({"window": 4, "attend": "chunks"}, "--window 4: this is about whole buckets, allowed with --attend chunks: none"),
    ({"mixers": "lsh,far"}, "--mixers: 'far' is unknown, allowed: names separated by commas, each of lsh, local, full, "
     "chunked"),
    ({"axial": "4x5"}, "--axial: '4x5', allowed: two numbers or more such as 8x8, whose product is the context, 24, at"),
    ({"axial": "24"}, "--axial: '24', allowed: two numbers or more"),
    ({"axial": "ax3"}, "--axial: 'ax3', allowed: two numbers or more"),
    ({"axial": "4x6", "positions": "none"}, "--axial 4x6: it is a kind of learned positions, allowed: --positions learned"),
    ({"axial": "4x6", "axial_widths": "4,5"}, "--axial-widths: '4,5', allowed: 2 positive integers separated by commas, whose "
     "sum is the width, 16"),
    ({"buckets": 8, "factors": "4,4"}, "--factors: '4,4', allowed: even integers separated by commas, whose product is the "
     "number of buckets, 8"),
    ({"buckets": 9, "factors": "3,3"}, "--buckets: 9 is odd"), ({"buckets": 6, "factors": "3,2"}, "--factors: '3,2', allowed"),
    ({"axial_widths": "8,8"}, "--axial-widths 8,8: this concerns --axial, give both"),
    ({"head_size": 3, "positions": "rope"}, "--positions rope: it turns pairs of channels, and 4 heads have 3 channels each"),
    ({"streams": "concat"}, "--streams concat: the head reads 2 D channels of a reversible stack, allowed with --no-tied"),
    ({"streams": "concat", "tied": False, "stack": "residual"}, "without --stack"),
])
def test_wrong_options(options, sentence):
    with pytest.raises(UserError) as caught:
        build(**options)
    assert sentence in str(caught.value)
