"""Simplified blocks: the identity at the start, and what the options choose. What every variant must do is in test_lm.py."""

from __future__ import annotations

import numpy as np
import pytest

import minitv
from autograd import Tensor, assert_close, no_grad, sum
from autograd.random import Random
from minitv.decode import FusedDecoder, decoder, unread
from minitv.errors import UserError
from minitv.log import read_log
from minitv.optim import AdamW
from minitv.options import ModelOptions
from minitv.variants.simplified import Bidirectional, ShapedAttention, SimplifiedOptions
from tests.autograd import emulator, fake_cupy
from tests.minitv import models
from tests.minitv.models import mean_loss

OPTIONS = {
    "sas-p": {}, "sas": dict(block="serial"), "without-norms": dict(normed_layers="first"),
    "sas-without-norms": dict(normed_layers="first", block="serial"), "no-matrices": dict(value_matrices="none"),
    "all-matrices": dict(value_matrices="all", output_matrices=True, matrix_gain=0.2), "qk-norm": dict(qk_norm=True),
    "skip": dict(skip=True), "rope": dict(positions="rope"), "shifted": dict(skip=True, token_shift=True),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(options, dtype=np.float64, variant="simplified", spread=True, **more):
    model = models.build(variant, 11, dtype, **{"layers": 2, "width": 16, "context": 12, "bias": True, **options, **more})
    rng = np.random.default_rng(0)
    for parameter in model.parameters() if spread else ():
        parameter.assign_((parameter.numpy() + 0.3 * rng.normal(size=parameter.shape)).astype(dtype))
    return model


def tokens(length=12):
    return np.random.default_rng(1).integers(0, 11, (2, length))


def in_parts(mixer, x, *cuts):
    state, parts = mixer.init_state(len(x.numpy())), []
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        y, state = mixer.prefill(x[:, start:stop], state)
        parts.append(y.numpy())
    return np.concatenate(parts, axis=1)


# -- the start ---------------------------------------------------------------------------------------------------------
@each_option
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("variant", ["simplified", "simplified-bert"])
def test_attention_starts_as_the_identity(variant, options, dtype):
    """To the last bits, in the call and in every part, with keys far from 0."""
    if variant == "simplified-bert":
        options = {name: value for name, value in options.items() if name != "token_shift"}
    model, x = build(options, dtype, variant, spread=False), np.random.default_rng(2).normal(size=(2, 50, 16)).astype(dtype)
    for block in model.blocks:
        mixer = getattr(block.mixer, "mixer", block.mixer)
        mixer.qk.assign_(np.where(np.arange(32)[:, None] < 16, 0, 10 * mixer.qk.numpy()).astype(dtype))
        found = [mixer(Tensor(x)).numpy()]
        if mixer.causal:
            found += [in_parts(mixer, Tensor(x), *cuts) for cuts in ((17, 18, 40), range(1, 50))]
        for y in found:
            assert np.abs(y - x).max() <= 4 * np.finfo(dtype).eps * np.abs(x).max()


def test_at_the_start_both_blocks_are_one_function():
    """Without a second norm exactly, and with it but for its eps: a norm of what is normalised changes nothing."""
    for normed, allowed in (("first", 1e-14), ("every", 1e-4)):
        one, other = (build(dict(block=block, normed_layers=normed), spread=False)(tokens()).numpy()
                      for block in ("parallel", "serial"))
        assert 0 < np.abs(one).max() and np.abs(one - other).max() <= allowed * np.abs(one).max()


def test_the_first_step_moves_queries_and_not_keys():
    model = build({}, spread=False)
    mean_loss(model, tokens(), np.roll(tokens(), -1, 1)).backward()
    for block in model.blocks:
        queries, keys = np.split(block.mixer.qk.grad.numpy(), 2)
        assert np.abs(queries).max() > 0 and not keys.any()
        assert_close(block.mixer.beta.grad.numpy(), -block.mixer.gamma.grad.numpy(), terms=1000)
    model.blocks[0].mixer.qk.assign_(np.zeros((32, 16)))  # keys of 0 besides would never learn
    model.zero_grad()
    mean_loss(model, tokens(), np.roll(tokens(), -1, 1)).backward()
    assert not model.blocks[0].mixer.qk.grad.numpy().any()


def test_the_gain_of_the_feed_forward_network_follows_the_depth():
    assert build({}, layers=18, spread=False).blocks[3].ffn.gain.item() == pytest.approx(0.1)
    assert build({}, layers=2, spread=False).blocks[1].ffn.gain.item() == pytest.approx(0.3)
    assert build(dict(ffn_gain=0.05), spread=False).blocks[1].ffn.gain.item() == pytest.approx(0.05)


# -- later -------------------------------------------------------------------------------------------------------------
@each_option
def test_every_option_agrees_in_parts_and_in_steps(options):
    model, ids = build(options), tokens()
    with no_grad():
        expected, state, parts = model(ids).numpy(), model.init_state(2), []
        for start, stop in ((0, 5), (5, 7), *((t, t + 1) for t in range(7, 12))):
            logits, state = model.prefill(ids[:, start:stop], state)
            parts.append(logits.numpy())
    assert_close(np.concatenate(parts, axis=1), expected, terms=10_000)


@each_option
def test_a_block_is_what_its_equations_say(options):
    model, x = build({**options, "dropout": 0.0}), Tensor(np.random.default_rng(3).normal(size=(2, 9, 16)))
    for block in model.blocks:
        z = x if block.norm1 is None else block.norm1(x)
        h = block.mixer(z) + x if options.get("skip") else block.mixer(z)
        if options.get("block") == "serial":
            y = block.skip * h + block.ffn(h if block.norm2 is None else block.norm2(h))
        else:
            y = h + block.ffn(z)
            assert block.norm2 is block.skip is None
        assert_close(block(x).numpy(), y.numpy(), terms=1000)
    without = options.get("normed_layers") == "first"
    assert [block.norm1 is None for block in model.blocks] == [False, without]


def test_a_model_without_norms_keeps_two():
    """Where the embeddings come in, and where the logits are made."""
    names = {name for name, _ in build(dict(normed_layers="first", block="serial")).named_parameters() if "norm" in name}
    assert names == {"blocks.0.norm1.weight", "blocks.0.norm1.bias", "norm.weight"}


def test_only_the_first_layer_has_a_matrix_of_values():
    def matrices(**options):
        return [(block.mixer.values is not None, block.mixer.out is not None) for block in build(options).blocks]

    assert matrices() == [(True, False), (False, False)]
    assert matrices(value_matrices="all", output_matrices=True) == [(True, True)] * 2
    assert matrices(value_matrices="none") == [(False, False)] * 2


def test_dropout_keeps_the_identity():
    """Dropped is A alone: without it and C, dropout changes nothing."""
    for kind in (ShapedAttention, Bidirectional):
        mixer = kind(Random(0), ModelOptions(width=16, dropout=0.9), SimplifiedOptions(), 1, np.float64)
        x = Tensor(np.random.default_rng(0).normal(size=(2, 6, 16)))
        assert not np.allclose(mixer(x, Random(1)).numpy(), x.numpy())
        for gain in (mixer.beta, mixer.gamma):
            gain.assign_(np.zeros(4))
        assert np.array_equal(mixer(x, Random(1)).numpy(), x.numpy())


def test_attention_of_both_directions_sees_all():
    for kind, sees in ((ShapedAttention, False), (Bidirectional, True)):
        mixer = kind(Random(0), ModelOptions(width=16), SimplifiedOptions(), 1, np.float64)
        mixer.gamma.assign_(np.full(4, 0.5))
        x = Tensor(np.random.default_rng(0).normal(size=(1, 6, 16)), requires_grad=True)
        sum(mixer(x)[:, 2]).backward()
        assert (np.abs(x.grad.numpy()[0, 3:]).max() > 0) == sees


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_kernels_write_beyond_the_context(positions):
    model, ids = build(dict(positions=positions, block="serial"), np.float32), np.resize(tokens(), (2, 40))
    exact = build(dict(positions=positions, block="serial"))
    expected, reader = exact(ids).numpy(), decoder(model, 2)
    assert type(reader) is FusedDecoder
    for first in (3, 20):  # read by the kernels, and by the model
        found = [reader.prefill(ids[:, :first]).copy(), *(reader.step(token).copy() for token in ids.T[first:])]
        assert_close(np.stack(found, axis=1), expected[:, first - 1 :], terms=1000)


def test_kernels_know_no_shift():
    assert unread(build(OPTIONS["shifted"])) == "they know stacks of blocks x + f(norm(x)) alone"


# -- a run -------------------------------------------------------------------------------------------------------------
def test_a_run_writes_down_its_gains_resumes_and_writes(tmp_path):
    """At every evaluation; bit for bit what it would have been without a stop."""
    data = tmp_path / "text.txt"
    data.write_text("abcdefgh " * 400)
    options = dict(data=str(data), context=8, layers=2, width=16, batch=4, threads=1, eval_every=2, lr=1e-2, warmup=1,
                   sample_tokens=0)
    whole = minitv.train("simplified", steps=4, out=str(tmp_path / "whole"), **options)
    part = str(tmp_path / "part")
    minitv.train("simplified", steps=4, out=part, on_step=lambda record: record["step"] < 2, **options)
    again = minitv.train(resume=part)
    assert whole.write("ab", tokens=20, seed=1) == again.write("ab", tokens=20, seed=1)
    (header, records), (_, others) = (read_log(str(tmp_path / name)) for name in ("whole", "part"))
    evaluated = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 4]
    gains = {name: p.numpy().mean() for name, p in whole.model.named_parameters() if p.ndim == 1 and "norm" not in name}
    assert set(header["readings"]) == set(gains) and len(gains) == 2 * 5 + 2
    for name, value in gains.items():
        assert evaluated[-1][name] == others[-1][name] == pytest.approx(value, rel=1e-6)
        assert evaluated[-1][name] != evaluated[0][name]
    assert (tmp_path / "whole" / "readings.png").exists() == (tmp_path / "whole" / "curve.png").exists()


# -- sizes -------------------------------------------------------------------------------------------------------------
def test_a_block_has_a_sixth_less_weights():
    """10 D² instead of 12 D², and D² more in the first layer."""
    def weights(variant, layer):
        block = models.build(variant, 11, np.float32, layers=2, width=32, ffn_multiple=4).blocks[layer]
        return np.sum([p.size for p in block.parameters() if p.ndim == 2])

    assert weights("transformer", 1) == 12 * 32**2 and weights("simplified", 1) == 10 * 32**2
    assert weights("simplified", 0) == 11 * 32**2


def test_the_state_is_a_cache_and_a_mean():
    model = build({})
    _, state = model.prefill(tokens(7), model.init_state(2))
    for mixed, fed in state.blocks:
        assert fed is None and sum_of_sizes(mixed) == 2 * (2 * 7 + 1) * 16
    values = state.blocks[0][0].values.numpy().transpose(0, 2, 1, 3).reshape(2, 7, 16)
    assert_close(state.blocks[0][0].mean.numpy(), values.mean(axis=1), terms=100)


def sum_of_sizes(state):
    return np.sum([array.numpy().size for array in state])


def test_weight_decay_leaves_gains_alone():
    """They would fall to 0, and the identity with them."""
    model = build(OPTIONS["all-matrices"] | dict(block="serial"))
    gains = [p for name, p in model.named_parameters() if name.split(".")[-1] in ("alpha", "beta", "gamma", "gain", "skip")]
    assert len(gains) == 2 * (3 + 1 + 1 + 1 + 4) and all(gain.ndim == 1 for gain in gains)
    assert AdamW(model).decayed == np.sum([p.size for p in model.parameters() if p.ndim == 2])


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "said"), [
    (dict(heads=3), "--heads: 3 heads do not divide the width 16"),
    (dict(positions="alibi"), "--positions alibi: simplified cannot add distances .* starts as the identity only where all"),
    (dict(positions="rope", heads=16), "--positions rope: it turns pairs of channels"),
    (dict(token_shift=True), "--token-shift: half of the channels .* allowed: --skip beside it"),
    (dict(stack="reversible"), "--stack reversible: the blocks of simplified need not add to x"),
    (dict(matrix_gain=0.2, value_matrices="none"), "--matrix-gain: 0.2 is given and --value-matrices is none"),
    (dict(ffn_gain=0.0), "ffn_gain: 0.0 is too small, allowed: a number above 0 or none"),
])
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        build(options)


@pytest.mark.full
@each_option
def test_on_a_gpu_the_model_is_the_same(options):
    if emulator.missing:
        pytest.skip(emulator.missing)
    ids = tokens()

    def run(put, device):
        model = build(options, np.float32)
        model.to(device)
        loss = mean_loss(model, put(ids), put(np.roll(ids, -1, 1)))
        loss.backward()
        with no_grad():
            _, state = model.prefill(put(ids[:, :8]), model.init_state(2))
            logits, _ = model.prefill(put(ids[:, 8:9]), state)
        return [loss.numpy(), logits.numpy(), *(p.grad.numpy() for p in model.parameters())]

    expected = run(np.asarray, "cpu")
    with fake_cupy.installed("fast") as cupy:
        found = run(cupy.asarray, "cuda")
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, terms=10_000)
