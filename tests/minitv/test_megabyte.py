"""MEGABYTE: what every logit depends on, reading in parts, its options, what it is equal to, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from autograd import Tensor, assert_close, cross_entropy, no_grad, use
from autograd.random import Random
from minitv import cli, sample, variants
from minitv.decode import Decoder, decoder, unread
from minitv.decode.megabyte import Reader
from minitv.errors import UserError
from minitv.models import megabyte
from minitv.models.megabyte import Level
from minitv.nn import Statistics
from minitv.ops import attention
from minitv.options import ModelOptions
from minitv.tasks.images import Images
from minitv.variants.megabyte import AcrossPatches, MegabyteOptions
from tests.minitv import models

GOLDENS = Path(__file__).parents[1] / "goldens"
SMALL = dict(context=12, layers=2, width=16, heads=2)
OPTIONS = {
    "as published": {}, "previous": dict(start="previous"), "first id": dict(pads="first-id"),
    "appendix": dict(pads="first-id", carry_projection=False, local_widths="4"),
    "three levels": dict(patch="2,2", layers=3), "four levels": dict(patch="2,3,2", width=24, layers=5, positions="rope"),
    "across": dict(patch="3", width=12, reach=2, positions="rope", layers=3), "narrow": dict(local_widths="8"),
    "across with alibi": dict(reach=4, positions="alibi"),
    "across levels": dict(patch="2,2", reach=1, positions="none", layers=3),
    "sines": dict(positions="sinusoidal"), "shifted": dict(token_shift=True), "one token": dict(patch="1"),
    "one patch": dict(patch="12", width=24), "reversible": dict(stack="reversible", layers=4),
    "no global blocks": dict(local_layers="2"),
    "previous in levels": dict(patch="3,2", width=12, start="previous", layers=3, bias=True),
}
FEW = ("as published", "three levels", "across")
each_option = pytest.mark.parametrize("options", [pytest.param(value, id=name, marks=[] if name in FEW else pytest.mark.full)
                                                  for name, value in OPTIONS.items()])


def spread(model, by=0.3):
    """The model with weights so large that everything counts."""
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.assign_((parameter.numpy() + by * rng.normal(size=parameter.shape)).astype(parameter.dtype))
    return model


def build(**options):
    return spread(models.build("megabyte", 11, np.float64, **{**SMALL, **options}))


def tokens(length=12, batch=2):
    return np.random.default_rng(1).integers(0, 11, (batch, length))


def dependence(model, length):
    """Which logits [T] change with which tokens [T]."""
    ids = tokens(length, 1)
    before, found = model(ids).numpy()[0], np.zeros((length, length), bool)
    for t in range(length):
        other = ids.copy()
        other[0, t] = (other[0, t] + 4) % 11
        found[:, t] = np.abs(model(other).numpy()[0] - before).max(axis=1) > 1e-9
    return found


def read(model, ids, cuts):
    """Logits of a text that is read in parts, and the state after it."""
    state, parts = model.init_state(len(ids)), []
    for first, last in pairwise((0, *cuts, ids.shape[1])):
        logits, state = model.prefill(ids[:, first:last], state)
        parts.append(logits.numpy())
    return np.concatenate(parts, axis=1), state


# -- what is computed ---------------------------------------------------------------------------------------------------
@each_option
def test_a_logit_depends_on_exactly_the_past(options):
    """Nothing of the future, and nothing of the past is missing; also where the last patch is not full."""
    if options.get("local_layers") == "2":  # then the patches before the last are not seen
        return
    model = build(**options)
    with no_grad():
        for length in (12, 7, 1):
            assert (dependence(model, length) == np.tril(np.ones((length, length), bool))).all()


@pytest.mark.parametrize(("level", "by"), [(0, -1), (0, 1), (1, -1), (1, 1)], ids=["global early", "global late", "local early",
                                                                             "local late"])
def test_a_level_that_reads_a_token_too_early_or_too_late_is_noticed(level, by, monkeypatch):
    """Then logits depend on the future, or something of the past is missing."""
    model, entered = build(), Level.entered

    def shifted(self, history, *rest):
        return entered(self, np.roll(history, by, axis=1) if self is model.blocks.levels[level] else history, *rest)

    monkeypatch.setattr(Level, "entered", shifted)
    past = np.tril(np.ones((12, 12), bool))
    found = dependence(model, 12)
    assert (found & ~past).any() if by < 0 else (past & ~found).any()


@each_option
@pytest.mark.usefixtures("either_way")
def test_any_split_gives_what_the_call_gives(options):
    model = build(**options)
    with no_grad():
        expected = model(tokens()).numpy()
        for cuts in ((), (1,), (3, 5), (4, 8), (2, 6, 7), tuple(range(1, 12))):
            assert_close(read(model, tokens(), cuts)[0], expected, terms=10_000)
        assert_close(model(tokens()[:, :7]).numpy(), expected[:, :7], terms=10_000)  # a patch that is not full


def test_the_state_is_as_large_as_the_page_says():
    model, sizes = build(local_widths="8"), {}
    for length in (5, 8, 12):
        _, state = read(model, tokens(), ()) if length == 12 else read(model, tokens()[:, :length], ())
        (patches, *_), (local, *_) = (level[0] for level in state.levels)
        assert patches.keys.shape == (2, 2, -(-length // 4), 8)  # K = 16 / 2 heads, of every patch that has begun
        sizes[length] = local.keys.shape[2]
        assert state.recent.shape == (2, 3) and state.carries[1].shape == (2, -length % 4, 8)
    assert sizes[5] == 1


@pytest.mark.parametrize("length", [12, 30, 33])
def test_without_learned_positions_a_text_may_be_longer(length):
    model = build(positions="rope", start="previous")
    with no_grad():
        assert_close(read(model, tokens(length), (5, 17 if length > 17 else 6))[0], model(tokens(length)).numpy(), terms=10_000)


# -- what it is equal to ------------------------------------------------------------------------------------------------
def test_patches_of_one_token_with_local_blocks_are_a_flat_model_whose_last_blocks_see_one_token():
    model = build(patch="1", layers=3, local_layers="1", carry_projection=False, pads="first-id")
    level = model.blocks.levels[0]
    x = level.embed(tokens()) + level.positions
    for block in level.stack:
        x = block(x)
    x = level.norm(x) + model.embed.weight[0] + model.blocks.levels[1].positions
    for block in model.blocks.levels[1].stack:
        v = block.mixer.qkv(block.norm1(x))[:, :, 32:]
        x = x + block.mixer.out(v)  # attention to one token is its value
        x = x + block.ffn(block.norm2(x))
    assert_close(model(tokens()).numpy(), model.logits(x).numpy(), terms=10_000)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("length", [12, 7])
def test_attention_across_patches_is_attention_with_a_mask(length):
    model = ModelOptions(context=4, layers=1, width=16, positions="rope")
    mixer = spread(AcrossPatches(Random(0), model, MegabyteOptions(heads=2, reach=2), dtype=np.float64))
    x = Tensor(np.random.default_rng(0).normal(size=(3, length, 16)))
    i, j = np.arange(length)[:, None], np.arange(length)
    y, _ = attention(*mixer._heads(x, 0), (j <= i) & (j >= i // 4 * 4 - 2))
    expected = mixer.out(Tensor(y.numpy().transpose(0, 2, 1, 3).reshape(3, length, 16)))
    assert_close(mixer(x).numpy(), expected.numpy(), terms=1000)


def test_gradients_flow_into_the_patch_before():
    model = build(**OPTIONS["across"])
    x = Tensor(np.random.default_rng(0).normal(size=(1, 9, 12)), requires_grad=True)
    mixer = model.blocks.levels[1].stack[0].mixer
    mixer(x)[0, 3].sum().backward()
    assert (np.abs(x.grad.numpy()[0]).max(axis=1) > 1e-6).tolist() == [False, True, True, True, *[False] * 5]


@pytest.mark.parametrize("length", [12, 7, 2, 1])
def test_strided_logits_are_those_of_first_halves(length):
    """Of two passes, the second of which begins half a patch later; training takes the first alone."""
    strided, plain, ids = build(strided=True), build(), tokens(length)
    with no_grad():
        one, two = plain(ids).numpy(), plain(ids[:, 2:]).numpy() if length > 2 else None
        for t, logits in enumerate(strided(ids).numpy().swapaxes(0, 1)):
            assert_close(logits, one[:, t] if t % 4 < 2 else two[:, t - 2], terms=1000)
        for cuts in ((), (1,), (3, 5), (2, 6, 7)):
            cuts = tuple(cut for cut in cuts if cut < length)
            assert_close(read(strided, ids, cuts)[0], strided(ids).numpy(), terms=10_000)
        with Statistics().part(0):
            assert_close(strided(ids).numpy(), one, terms=1000)


@pytest.mark.parametrize("options", [
    pytest.param(OPTIONS[name], id=name, marks=[] if name in FEW else pytest.mark.full)
    for name in ("as published", "previous", "appendix", "three levels", "four levels", "narrow", "one token", "one patch",
                 "no global blocks", "previous in levels")])
def test_kernels_write_what_the_model_computes(options):
    """From every length of a prompt on, of which short ones are read token by token."""
    model = build(**{"context": 30, **options})
    reader, ids = decoder(model, 3), tokens(30, 3)
    assert type(reader) is Reader
    with no_grad():
        expected = model(ids).numpy()
    for first in (1, 7, 17, 18, 19, 24, 29):
        logits = [reader.prefill(ids[:, :first]).copy(), *(reader.step(token).copy() for token in ids.T[first:])]
        assert_close(np.stack(logits, axis=1), expected[:, first - 1 :], terms=10_000)
        assert reader.position == 30


@pytest.mark.parametrize(("options", "reason"), [
    (dict(strided=True), "they take one pass, and --strided two"), (OPTIONS["reversible"], "they know stacks of blocks x + f("),
    (OPTIONS["across"], "they do not know the module AcrossPatches with its options")], ids=str)
def test_what_no_kernel_knows_takes_the_models_own_step(options, reason):
    model, ids = build(**options), np.array([[1, 5, 2, 2, 7, 4, 3]])
    reader = decoder(model)
    assert type(reader) is Decoder and reason in unread(model)
    reader.prefill(ids[:, :2])
    for position in range(2, 7):
        assert_close(reader.step(ids[:, position]), model(ids[:, : position + 1]).numpy()[:, -1], terms=1000)


# -- another implementation ---------------------------------------------------------------------------------------------
def golden(case):
    with np.load(GOLDENS / "megabyte.npz") as file:
        return {key.removeprefix(f"{case}/"): file[key] for key in file if key.startswith(f"{case}/")}


def verify(entries):
    """A whole model, by the numbers of a file, of which every one is compared or used."""
    entries = dict(entries)
    ids, labels, logits, loss = (entries.pop(key) for key in ("ids", "labels", "logits", "loss"))
    values = {key: entries.pop(key).item() for key in ("heads", "width", "layers", "pads", "start", "carry_projection", "patch",
                                                       "local_widths", "local_layers")}
    positions = "learned" if values["pads"] == "learned" else "none"
    model = models.build("megabyte", 8, np.float64, context=12, positions=positions, **values)
    names = [name for name, _ in model.named_parameters()]
    model.load({name: entries.pop(f"param/{name}") for name in names})
    found = model(ids)
    error = cross_entropy(found, labels)
    error.backward()
    pairs = [(found.numpy(), logits), (error.numpy(), loss)]
    pairs += [(parameter.grad.numpy(), entries.pop(f"grad/{name}")) for name, parameter in model.named_parameters()]
    assert not entries, list(entries)
    for one, other in pairs:
        assert np.abs(one - other).max() <= 1e-10 * max(np.abs(other).max(), 1e-3), "it differs from PyTorch"


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("case", ["learned", "appendix", "previous", "three"])
def test_it_equals_the_equations_of_the_paper_in_pytorch(case):
    verify(golden(case))


@pytest.mark.parametrize("entry", [key for key in golden("previous") if key in ("logits", "loss") or key.startswith("grad/")])
def test_a_megabyte_that_is_off_is_noticed(entry):
    entries = golden("previous")
    entries[entry] = entries[entry] * (1 + 1e-9)
    with use(kernel="none"), pytest.raises(AssertionError, match="differs from PyTorch"):
        verify(entries)


def test_a_patch_of_pixels_is_a_row_or_a_square_and_one_of_sound_a_short_piece():
    """Without other options; the global model reads whole patches of what is predicted."""
    for task, patch in (("images", "8"), ("audio", "16"), ("text", "4")):
        experiment = variants.load("megabyte").configure(task=task)
        assert experiment.mixer.patch == patch
    assert variants.load("megabyte").configure("small", task="images", context=64).mixer.patch == "8"
    pixels = np.arange(64).reshape(1, 8, 8)
    for values, rows in ((dict(scan="raster"), pixels[0]), (dict(scan="patch", patch_side=4),
                          pixels[0].reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16))):
        t = Images(Images.Options(**values), 64, 1, 0)
        inputs, labels = t.sequences(pixels)
        assert np.array_equal(labels.reshape(rows.shape), rows)  # patch k predicts row k
        size = rows.shape[1]
        model = build(context=64, width=2 * size, patch=str(size))
        assert np.array_equal(np.flatnonzero(_read_at(model, inputs, 1)), np.arange(1, size + 1))  # and reads row k - 1


def _read_at(model, ids, patch):
    """Which tokens [T] a position of the global model reads."""
    level = model.blocks.levels[0]
    found = np.zeros(ids.shape[1], bool)
    before = level.entered(ids % 11, 0, 0, patch + 1, None).numpy()[0, patch]
    for t in range(ids.shape[1]):
        other = ids % 11
        other[0, t] = (other[0, t] + 3) % 11
        found[t] = (level.entered(other, 0, 0, patch + 1, None).numpy()[0, patch] != before).any()
    return found


# -- what is refused ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, sentence", [
    (dict(patch="4,x"), "--patch: '4,x', allowed: integers from 1, separated by commas"),
    (dict(patch=""), "--patch: '', allowed: integers"), (dict(patch="0"), "--patch: '0', allowed: integers from 1"),
    (dict(patch="1024,2048", width=2**21 // 2), "--patch 1024,2048: a patch of 2097152 tokens, allowed: 1048576 at most"),
    (dict(patch="3"), "--width: 16 channels are not divided by the 3 tokens that share them, see --patch, allowed: a multiple"),
    (dict(patch="2,2", local_widths="9,8", layers=3), "--local-widths: 9 channels are not divided by the 2 tokens"),
    (dict(local_widths="8,8"), "--local-widths: '8,8', allowed: 1 integer from 1"),
    (dict(local_layers="3"), "--local-layers 3: these are 3 layers, and --layers is 2, allowed: as many at most"),
    (dict(local_layers="-1"), "--local-layers: '-1', allowed: 1 integer from 0"),
    (dict(carry_projection=False), "--no-carry-projection: each of 4 positions gets 4 of 16 channels and has 16, allowed with "
                                   "--local-widths 4"),
    (dict(patch="1", strided=True), "--strided: half of a patch of 1 tokens is no number of tokens, allowed: an even --patch"),
    (dict(reach=5, positions="rope"), "--reach 5: the patch before has fewer positions, allowed: 0 to 4"),
    (dict(reach=2), "--reach 2: with --positions learned a place in the patch before is the same as in this one, allowed: "
                    "--positions rope, alibi, none"),
    (dict(local_widths="6", width=24, patch="2", heads=4), "--heads: 4 heads do not divide the width 6"),
])
def test_options_that_do_not_fit(options, sentence):
    with pytest.raises(UserError) as error:
        models.build("megabyte", 11, **{**SMALL, **options})
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_its_cache_cannot_be_streamed():
    from minitv.variants.attention_sinks import streaming

    with pytest.raises(UserError, match="--window: megabyte has no cache of keys and values that could be cut"):
        streaming(build(positions="rope"), 4, 2)


@pytest.mark.full
@pytest.mark.parametrize("options", [OPTIONS["across"], OPTIONS["previous in levels"], OPTIONS["sines"], dict(strided=True)],
                         ids=str)
def test_it_is_the_same_on_a_gpu(options):
    models.assert_same_on_a_gpu(lambda: spread(models.build("megabyte", 11, np.float32, **{**SMALL, **options})), tokens(11), 6)


def test_ids_are_checked():
    from autograd.errors import DomainError

    for wrong in (-1, 11):
        with pytest.raises(DomainError, match=f"id {wrong} is outside 0 .. 10"):
            build()(np.array([[1, wrong, 2, 3]]))


def test_the_small_preset_has_patches_of_eight_and_a_large_global_model():
    made = variants.load("megabyte").configure("small")
    assert [(size.width, size.layers, size.unit, size.group) for size in made.mixer.levels(made.model)] == \
        [(384, 4, 8, 0), (384, 2, 1, 8)]


# -- from the command line ----------------------------------------------------------------------------------------------
def command(capsys, *words):
    """What a command prints, and its errors."""
    assert cli.main([*map(str, words)]) == 0
    return capsys.readouterr()


def test_it_trains_resumes_writes_and_is_evaluated(tmp_path, capsys, monkeypatch):
    """On bytes, with a context that patches do not divide; a run in two parts is the run in one."""
    monkeypatch.chdir(tmp_path)
    text = Path("t.txt")
    text.write_text("Der Müller mahlt, die Mühle läuft. " * 60, encoding="utf-8")
    shape = ("megabyte", "--data", text, "--tokenizer", "byte", "--context", 10, "--width", 16, "--heads", 2, "--batch", 4,
             "--eval-every", 0, "--threads", 1, "--warmup", 0, "--dropout", 0.1, "--lr", 0.01, "--min-lr", 0.01)
    command(capsys, "train", *shape, "--steps", 6, "--out", "whole")
    command(capsys, "train", *shape, "--steps", 3, "--out", "parts")
    command(capsys, "train", "--resume", "parts", "--steps", 6)
    one, two = (sample.load(name).model.state() for name in ("whole", "parts"))
    assert one.keys() == two.keys() and not [name for name in one if not np.array_equal(one[name], two[name])]
    assert len(command(capsys, "sample", "whole", "--tokens", 30, "--prompt", "Mü").out.encode()) >= 30
    plain, strided = (command(capsys, "eval", "whole", "--data", text, *more).out for more in ((), ("--strided",)))
    assert "in windows of 10\n" in plain and "in windows of 10, in two passes\n" in strided
    trained = sample.load("whole")
    ids = trained.tokenizer.encode("Müller läuft")
    with no_grad():
        found = megabyte.strided(trained.model)(ids[None, :10]).numpy()
        first, second = trained.model(ids[None, :10]).numpy(), trained.model(ids[None, 2:10]).numpy()
    for t in range(10):
        assert np.array_equal(found[0, t], first[0, t] if t % 4 < 2 else second[0, t - 2])


def test_what_has_no_halves_of_patches():
    with pytest.raises(UserError, match="--strided: transformer reads no patches, allowed: megabyte"):
        megabyte.strided(models.build("transformer", 5))
    with pytest.raises(UserError, match="--strided: half of a patch of 1 tokens is no number of tokens"):
        megabyte.strided(build(patch="1"))
