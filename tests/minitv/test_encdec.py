"""Encoder-decoders: padding, caches, answers, and which layers share a feed-forward network."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autograd import Tensor, assert_close, cross_entropy, no_grad, use
from autograd.errors import DomainError, ShapeError
from autograd.random import Random
from minitv import variants
from minitv.decode import decoder
from minitv.errors import UserError
from minitv.experiment import default_task, namespace, possible
from minitv.models.encdec import PADDING, CrossAttention, EncoderDecoder, Reader, Writer, padded
from minitv.optim import AdamW
from minitv.sample import generate
from minitv.tasks import load as load_task
from minitv.variants.transformer import Attention
from tests.minitv import models
from tests.minitv.models import assert_same_on_a_gpu

VOCAB, END = 7, 6
MODES = {
    "encoder-decoder": None, "one-wide": {}, "shared-encoder": dict(drop="none"), "each": dict(share="each", drop="none"),
    "all": dict(share="all", drop="none", widen=1.0), "no-encoder": dict(share="none", drop="encoder"),
    "pairs-of-layers": dict(layers=3, share="each", drop="none", share_every=2, decoder_layers=1),
    "nothing": dict(share="none", drop="both"),
}
QUICK = ("encoder-decoder", "one-wide", "all")
each_mode = pytest.mark.parametrize("mode", [pytest.param(mode, marks=[] if mode in QUICK else pytest.mark.full)
                                             for mode in MODES])


def build(mode="one-wide", dtype=np.float64, spread=0.3, **options):
    name = mode if mode == "encoder-decoder" else "one-wide-ffn"
    model = models.build(name, VOCAB, dtype, **{"layers": 2, "width": 16, "context": 12, **(MODES[mode] or {}), **options})
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.assign_((parameter.numpy() + spread * rng.normal(size=parameter.shape)).astype(dtype))
    return model


def pairs(sizes=((3, 5), (6, 2), (1, 4)), seed=1, **lengths):
    """Sources [B S] and targets [B T] of some lengths."""
    rng = np.random.default_rng(seed)
    source = padded([rng.integers(0, END, n) for n, _ in sizes], END, lengths.get("source"))
    target = padded([rng.integers(0, END, n) for _, n in sizes], END, lengths.get("target"))
    begun = np.concatenate([np.full((len(target), 1), END), target[:, :-1]], axis=1)
    return source, np.where(target == PADDING, PADDING, begun)


# -- padding and caches ------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("forms_unless_full")
@each_mode
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_padding_changes_nothing(mode, positions):
    """Each pair alone gives the same logits as among longer ones, and with more padding."""
    model, (source, target) = build(mode, positions=positions), pairs()
    expected, wide = model(source, target).numpy(), model(*pairs(source=11, target=12)).numpy()
    for row in range(3):
        s, t = (ids[row, ids[row] != PADDING] for ids in (source, target))
        alone = model(s[None], t[None]).numpy()[0]
        for other in (expected, wide):
            assert_close(other[row, : len(t)], alone, terms=10_000)


@pytest.mark.usefixtures("forms_unless_full")
@each_mode
def test_padding_changes_no_gradient(mode):
    found = []
    for lengths in ({}, dict(source=12, target=12)):
        model, (source, target) = build(mode, positions="sinusoidal"), pairs(**lengths)
        at = np.flatnonzero(target != PADDING)
        cross_entropy(model(source, target, at=at), np.arange(len(at)) % VOCAB, reduction="sum").backward()
        found.append([parameter.grad.numpy() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, terms=10_000)


@each_mode
@pytest.mark.parametrize("kernel", ["cpu", "none"])
def test_reading_in_parts_is_the_call(mode, kernel):
    with use(kernel=kernel):
        model, (source, target) = build(mode), pairs(((3, 8), (6, 8), (1, 8)))
        with no_grad():
            expected, state, parts = model(source, target).numpy(), model.begin(source), []
            for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
                logits, state = model.prefill(target[:, start:stop], state)
                parts.append(logits.numpy())
        assert state.position == 9
        assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


def test_a_target_depends_on_its_past_and_on_the_whole_source():
    model, (source, target) = build(), pairs(((6, 6),))
    base = model(source, target).numpy()[0]
    for place in range(6):
        other = target.copy()
        other[0, place] = (other[0, place] + 1) % VOCAB
        changed = np.abs(model(source, other).numpy()[0] - base).max(axis=1) > 1e-9
        assert changed.tolist() == [t >= place for t in range(7)]
        other = source.copy()
        other[0, place] = (other[0, place] + 1) % END
        assert (np.abs(model(other, target).numpy()[0] - base).max(axis=1) > 1e-9).all()


def test_some_positions_alone():
    model, (source, target) = build(), pairs()
    at = np.array([0, 7, 7, 13])
    assert_close(model(source, target, at=at).numpy(), model(source, target).numpy().reshape(-1, VOCAB)[at], terms=100)


def test_what_does_not_fit_is_a_sentence():
    model = build(positions="learned")
    with pytest.raises(ShapeError, match=r"ids are \[B T\]"):
        model(np.zeros(3, int), np.zeros((1, 3), int))
    with pytest.raises(ShapeError, match=r"the model has 12 positions; 0 \+ 13 tokens do not fit"):
        model(np.zeros((1, 13), int), np.zeros((1, 3), int))
    with pytest.raises(DomainError):
        model(np.full((1, 3), VOCAB), np.zeros((1, 3), int))


def test_the_model_on_a_gpu_is_that_on_the_cpu():
    ids = pairs(((3, 8), (6, 8), (1, 8)))[0]
    assert_same_on_a_gpu(lambda: build(dtype=np.float32), np.where(ids < 0, 2, ids))


def without_a_mask(call, place):
    """The same function without its argument ``seen``, which stands at a place."""
    return lambda *args: call(*args[:place], None, *args[place + 1 :])


def padding():
    test_padding_changes_nothing("one-wide", "sinusoidal")


def parts():
    test_reading_in_parts_is_the_call("one-wide", "none")


PLANTED = {
    "the encoder sees padding": (padding, Reader, "__call__", without_a_mask(Reader.__call__, 2)),
    "cross-attention sees padding": (padding, CrossAttention, "__call__", without_a_mask(CrossAttention.__call__, 3)),
    "positions begin anew": (parts, EncoderDecoder, "_entered",
                             lambda self, ids, start, *rest, entered=EncoderDecoder._entered: entered(self, ids, 0, *rest)),
    "a part sees later tokens": (parts, Attention, "causal", False),
    "the past is forgotten": (parts, Writer, "prefill", lambda self, y, past, *rest, prefill=Writer.prefill: prefill(
        self, y, type(past)(*(x[:, :, :0] for x in past)), *rest)),
    "only the end of the source is read": (test_a_target_depends_on_its_past_and_on_the_whole_source, EncoderDecoder, "encode",
                                       lambda self, source, *rest, encode=EncoderDecoder.encode: encode(
                                           self, source[:, -2:], *rest)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_an_error_that_is_planted_is_noticed(planted, monkeypatch):
    law, owner, name, wrong = PLANTED[planted]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        law()


# -- answers -----------------------------------------------------------------------------------------------------------
def talkative(mode="one-wide"):
    """A model whose targets have different lengths, and 16 sources."""
    model = build(mode, tied=False)
    model.head.weight.assign_(model.head.weight.numpy() * np.where(np.arange(VOCAB)[:, None] == END, 0.6, 1.0))
    return model, pairs([(1 + n % 6, 1) for n in range(16)])[0]


def written(model, source, limit):
    """The likeliest targets by reading the whole target anew for every token."""
    ids = [END]
    while len(ids) <= limit:
        ids.append(int(model(source[None], np.array([ids])).numpy()[0, -1].argmax()))
        if ids[-1] == END:
            return ids[1:-1]
    return ids[1:]


@pytest.mark.parametrize("mode", [*QUICK, "nothing"])
def test_greedy_answers_are_those_of_reading_anew(mode):
    model, source = talkative(mode)
    for limit in (0, 1, 8):
        found = model.greedy(source, limit)
        for row, ids in zip(source, found, strict=True):
            assert ids.tolist() == written(model, row[row != PADDING], limit)
    assert len({len(ids) for ids in found}) > 2, found


def test_a_beam_of_one_is_greedy_and_a_model_with_a_source_is_a_language_model():
    model, source = talkative()
    for row, ids in zip(source, model.greedy(source, 8), strict=True):
        row = row[row != PADDING]
        assert model.beam(row, 1, 8)[0].ids.tolist() == ids.tolist()
        read = generate(model.given(row), np.array([END]), 8, Random(0), temperature=0)
        assert list(itertools.takewhile(lambda token: token != END, read)) == ids.tolist()
    reader = decoder(model.given(row))
    assert_close(reader.prefill([[END, 2]]), model(row[None], np.array([[END, 2]])).numpy()[:, -1], terms=10_000)
    assert_close(reader.step([3]), model(row[None], np.array([[END, 2, 3]])).numpy()[:, -1], terms=10_000)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_a_beam_wide_enough_finds_the_best_of_all_targets(penalty):
    model, limit = build(spread=0.5), 3
    source = np.array([3, 1, 4, END])
    best = []
    for length in range(limit):
        for ids in itertools.product(range(END), repeat=length):
            logits = model(source[None], np.array([[END, *ids]])).numpy()[0]
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            total = sum(logs[t, token] for t, token in enumerate([*ids, END]))
            best.append((total / (length + 1) ** penalty, total, ids))
    best.sort(reverse=True)
    found = model.beam(source, VOCAB**limit, limit, penalty)
    assert len(found) == len(best)
    for hypothesis, (score, total, ids) in zip(found[:20], best, strict=False):
        assert tuple(hypothesis.ids) == ids
        assert math.isclose(hypothesis.score, score, rel_tol=1e-9)
        assert math.isclose(hypothesis.log_probability, total, rel_tol=1e-9)


def test_a_larger_beam_and_targets_without_an_end():
    model, source = build(spread=0.5), np.array([3, 1, END])
    scores = [model.beam(source, size, 3, 0.0)[0].log_probability for size in (1, 3, 300)]
    assert scores[0] <= scores[2] and scores[1] <= scores[2] and len(model.beam(source, 3, 8)) == 3
    model = build(spread=0.5, tied=False)
    model.head.weight.assign_(np.where(np.arange(VOCAB)[:, None] == END, 0.0, model.head.weight.numpy()))
    (best, *others) = model.beam(source, 2, 4)
    assert len(best.ids) == 4 and others and best.score >= others[0].score
    assert math.isclose(best.score, best.log_probability / 4)


# -- networks ----------------------------------------------------------------------------------------------------------
def networks(model):
    return [[layer.ffn for layer in side] for side in (model.encoder, model.decoder)]


def test_which_layers_share_and_which_have_none():
    one = build()
    (a, b), none = networks(one)
    assert a is b and none == [None, None] and all(layer.norm3 is None for layer in one.decoder)
    assert one.encoder[0].norm2 is not one.encoder[1].norm2
    sides = networks(build("each"))
    assert all(a is b for a, b in sides) and sides[0][0] is not sides[1][0]
    assert len({id(ffn) for side in networks(build("all")) for ffn in side}) == 1
    assert len({id(ffn) for side in networks(build("encoder-decoder")) for ffn in side}) == 4
    (a, b, c), (d,) = networks(build("pairs-of-layers"))
    assert a is b and c is not a and d not in (a, b, c)
    assert networks(build("nothing")) == [[None, None], [None, None]]
    assert networks(build("no-encoder"))[0] == [None, None] and None not in networks(build("no-encoder"))[1]


@pytest.mark.parametrize("options", [
    {}, dict(share="all", drop="none"), dict(share="each", drop="none"), dict(share="none", drop="decoder"),
    dict(share="encoder", drop="none"), dict(share="none", drop="none"),
    dict(share="decoder", drop="encoder", decoder_layers=3), dict(share="each", drop="none", share_every=2, layers=4),
])
def test_widened_networks_have_the_weights_of_those_that_went(options):
    shape = {"layers": 2, "width": 24, "ffn_multiple": 2.5}
    shape |= {name: options[name] for name in ("layers", "decoder_layers") if name in options}
    one, base = (models.build(name, VOCAB, **{**shape, **more})
                 for name, more in (("one-wide-ffn", options), ("encoder-decoder", {})))
    matrices = [sum(p.size for p in model.parameters() if p.ndim == 2) for model in (one, base)]
    assert matrices[0] == matrices[1]
    narrow = models.build("one-wide-ffn", VOCAB, **{**shape, **options, "widen": 1.0})
    assert {ffn.up.weight.shape[0] for side in networks(narrow) for ffn in side if ffn} == {60}


def test_a_shared_network_is_the_same_network_everywhere():
    """Values; and its gradient is the sum of those that the layers have when each has a copy."""
    one = build("all")
    base = build("encoder-decoder")
    weights = one.state()
    for name in base.state():
        inside = ".".join(name.split(".")[2:])
        weights[name] = weights[f"encoder.0.{inside}" if inside.startswith("ffn") else name]
    base.load({name: weights[name] for name in base.state()})
    source, target = pairs()
    gradients = []
    for model in (one, base):
        logits = model(source, target)
        (logits * np.random.default_rng(5).normal(size=logits.shape)).sum().backward()
        gradients.append((logits.numpy(), {name: p.grad.numpy() for name, p in model.named_parameters()}))
    assert_close(gradients[0][0], gradients[1][0], terms=1000)
    for part in ("up.weight", "down.weight"):
        copies = [gradient for name, gradient in gradients[1][1].items() if name.endswith(f"ffn.{part}")]
        assert len(copies) == 4
        assert_close(gradients[0][1][f"encoder.0.ffn.{part}"], sum(copies), terms=1000)


def test_a_shared_network_is_saved_optimised_and_counted_once():
    one = build()
    names = [name for name in one.state() if ".ffn." in name]
    assert names == ["encoder.0.ffn.up.weight", "encoder.0.ffn.down.weight"]
    optimizer = AdamW(one)
    assert optimizer.param.size == sum(array.size for array in one.state().values()) == one.sizes().unique
    other = build(spread=0.9)
    other.load(one.state())
    source, target = pairs()
    assert np.array_equal(other(source, target).numpy(), one(source, target).numpy())
    assert other.encoder[0].ffn is other.encoder[1].ffn


@each_mode
def test_gradients_are_slopes(mode):
    model, (source, target) = build(mode), pairs()
    labels = np.where(target == PADDING, 0, target)

    def loss():
        return cross_entropy(model(source, target), labels)

    loss().backward()
    rng = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        direction, start, step = rng.normal(size=parameter.shape), parameter.numpy().copy(), 1e-6
        values = []
        for sign in (1, -1):
            parameter.assign_(start + sign * step * direction)
            values.append(loss().item())
        parameter.assign_(start)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((parameter.grad.numpy() * direction).sum(), rel=1e-5, abs=1e-8), name


def test_the_sizes_that_a_run_prints():
    d, f = 16, 64
    base, one = (models.build(name, VOCAB, width=d, ffn_multiple=4.0, layers=2).sizes()
                 for name in ("encoder-decoder", "one-wide-ffn"))
    assert base.encoder == 2 * (4 * d * d + 2 * d * f) and base.memory == one.memory == 2 * 2 * d * d
    assert base.decoder == 2 * (6 * d * d + 2 * d * f) + VOCAB * d and base.unique == base.executed
    assert one.encoder == 2 * (4 * d * d + 2 * d * 4 * f) and one.decoder == 2 * 6 * d * d + VOCAB * d
    assert one.executed - one.unique == 2 * d * 4 * f
    lines = dict(models.build("one-wide-ffn", VOCAB, width=d, ffn_multiple=4.0, layers=2).about())
    assert "unique" in lines["weights"] and "executed" in lines["weights"] and "token of the target" in lines["cost"]


def test_a_wide_network_starts_with_outputs_of_the_usual_size():
    sizes = []
    for widen in (1.0, 8.0):
        model = models.build("one-wide-ffn", VOCAB, width=64, ffn_multiple=4.0, widen=widen)
        x = Tensor(np.random.default_rng(0).normal(size=(4, 50, 64)))
        sizes.append(model.encoder[0].ffn(x).numpy().std())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


# -- options and tasks -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "words"), [
    (dict(share="decoder"), "--share decoder: the layers of the decoder have no feed-forward network with --drop decoder"),
    (dict(share="each", drop="encoder"), "--share each: the layers of the encoder have no"),
    (dict(share="none", share_every=2), "--share-every 2: with --share none no layers"),
    (dict(share="none", drop="both", widen=2.0), "--widen 2: with --drop both there is no feed-forward network"),
    (dict(heads=5), "--heads: 5 heads do not divide the width"),
    (dict(positions="alibi"), "--positions alibi: one-wide-ffn cannot add distances to scores"),
])
def test_what_does_not_go_together_is_a_sentence(options, words):
    with pytest.raises(UserError, match=words):
        models.build("one-wide-ffn", VOCAB, **options)


def test_its_task_is_pairs_and_no_other():
    for name in ("one-wide-ffn", "encoder-decoder"):
        record = variants.load(name)
        assert possible(record) == ["pairs"] and default_task(record) == "pairs" and not record.causal
        with pytest.raises(UserError, match=r"--task text: .* reads pairs of sequences, and this task has tokens; "
                                            r"tasks for it: pairs; variants for this task: aft-conv"):
            namespace(record, load_task("text"))
    with pytest.raises(UserError, match=r"--task pairs: transformer reads tokens, and this task has pairs of sequences; .*"
                                        r" variants for this task: encoder-decoder, one-wide-ffn"):
        namespace(variants.load("transformer"), load_task("pairs"))
