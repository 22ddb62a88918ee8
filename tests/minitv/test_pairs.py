"""Pairs: which are drawn and which are held out, files, the metric, what is shown, and answers from the command line."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest

import minitv
from autograd.random import Random
from minitv import cli
from minitv.errors import UserError
from minitv.models.encdec import PADDING
from minitv.sample import load
from minitv.task import NOTHING
from minitv.tasks.pairs import DIGITS, Pairs, encoded, is_held_out
from minitv.trainer import Trainer
from tests.minitv import models


def task(context: int = 32, batch: int = 64, seed: int = 0, saved=None, **values) -> Pairs:
    return Pairs(Pairs.Options(**values), context, batch, seed, saved)


def texts(t: Pairs, batch) -> list[tuple[str, str]]:
    """What a batch says, read back."""
    def text(row):
        (end,) = np.flatnonzero(row == t.end)
        assert (row[end + 1 :] == PADDING).all()
        return t.tokenizer.decode(row[:end])

    assert (batch.inputs[:, 0] == t.end).all() and ((batch.inputs == PADDING) == (batch.labels == NOTHING)).all()
    assert (batch.inputs[:, 1:] == np.where(batch.labels[:, 1:] == NOTHING, PADDING, batch.labels[:, :-1])).all()
    return [(text(source), text(labels)) for source, labels in zip(batch.source, batch.labels, strict=True)]


def right(source: str) -> str:
    if "+" in source:
        return str(sum(map(int, source.split("+"))))
    return "".join(sorted(source[1:])) if source[0] == "s" else source.removeprefix("r")[::-1]


# -- drawn -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ["reverse", "sort", "add", "all"])
def test_every_target_follows_from_its_source(rule):
    t = task(rule=rule, longest=7, shortest=2, batch=300)
    found = texts(t, t.batch(3))
    for source, target in found:
        assert target == (right(source) if rule != "sort" else "".join(sorted(source)))
        digits = [part for part in source.strip("rs").split("+")]
        assert all(2 <= len(part) <= (4 if "+" in source else 7) for part in digits)
        assert len(digits) == 1 or not any(part.startswith("0") for part in digits)
    assert len({len(source) for source, _ in found}) > 4 and len(set(found)) > 250
    if rule == "all":
        kinds = [sum(source[0] == mark for source, _ in found) for mark in "rs"]
        assert all(60 < n < 140 for n in (*kinds, 300 - sum(kinds)))


def test_a_batch_follows_from_the_seed_and_the_step():
    one, same, other = task(seed=4), task(seed=4), task(seed=5)
    one.batch(0)
    for mine, theirs in zip(one.batch(9), same.batch(9), strict=True):
        assert np.array_equal(mine, theirs)
    assert texts(one, one.batch(9)) != texts(one, one.batch(8)) != texts(other, other.batch(8))
    assert np.array_equal(one.held_out().source, other.held_out().source)


def test_no_source_is_on_both_sides():
    t = task(longest=3)
    seen = {source for step in range(60) for source, _ in texts(t, t.batch(step))}
    held_out = {source for source, _ in texts(t, t.held_out())}
    assert not seen & held_out and len(seen) > 500 and len(held_out) > 50
    share = np.mean([is_held_out(str(i)) for i in range(20_000)])
    assert abs(share - 0.1) < 0.01


def test_micro_batches_and_lengths():
    batch = task(batch=10).batch(0)
    assert batch.length == batch.source.shape[1] + batch.inputs.shape[1]
    part = batch.part(slice(2, 5))
    assert type(part) is type(batch) and np.array_equal(part.labels, batch.labels[2:5]) and len(part.source) == 3


def test_the_baselines():
    t = task(rule="sort", longest=2, eval_examples=500)
    pairs = texts(t, t.held_out())
    assert t.baselines["copy of the source"] == np.mean([source == "".join(sorted(source)) for source, _ in pairs]) > 0.1
    assert 0 <= t.baselines["commonest target"] < 0.3
    assert task(rule="add", longest=4).baselines["copy of the source"] == 0


@pytest.mark.parametrize(("values", "words"), [
    (dict(shortest=5, longest=4), "--shortest: 5 is more than --longest 4"),
    (dict(longest=32), "--longest: a source of 32 characters and its end do not fit --context 32: give fewer digits"),
    (dict(longest=31, rule="add"), "--longest: a source of 33 characters"),
    (dict(shortest=3, longest=4, rule="all"), "--shortest: 3 is more than the 2 digits that a number has with --longest 4"),
    (dict(data="x", rule="sort"), "--rule sort: this is for pairs that are drawn, and --data gives other ones"),
    (dict(data="x", longest=3), "--longest 3: this is for pairs that are drawn"),
    (dict(encoding="klingon"), "--encoding: 'klingon' is unknown"),
])
def test_what_does_not_go_together_is_a_sentence(values, words):
    with pytest.raises(UserError, match=words):
        task(**values)


def test_so_few_sources_that_none_is_held_out():
    if any(map(is_held_out, DIGITS)):
        t = task(longest=1, eval_examples=5)
        assert {source for source, _ in texts(t, t.held_out())} == set(filter(is_held_out, DIGITS))
    else:
        with pytest.raises(UserError, match=r"--longest: 1 digits make so few sources that none is held out"):
            task(longest=1).held_out()


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path):
    def make(text: str, name: str = "pairs.tsv"):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return str(path)

    return make


LINES = [f"source {i}\ttarget of {i % 7}" for i in range(200)]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_file_has_both_parts(file, ends):
    t = task(data=file(ends.join(LINES) + ends), batch=50, eval_examples=10_000)
    held_out = texts(t, t.held_out())
    number = 200 - len(held_out)
    assert 5 < len(held_out) < 40 and all(is_held_out(source) for source, _ in held_out)
    trained = [pair for step in range(number) for pair in texts(t, t.batch(step))]
    whole = sorted(trained[:number])
    assert sorted([*whole, *held_out]) == sorted(tuple(line.split("\t")) for line in LINES)
    for start in range(0, 50 * number, number):  # every pass has each pair once, in an order of its own
        assert sorted(trained[start : start + number]) == whole
    assert trained[:number] != trained[number : 2 * number]
    assert t.vocab == len(set("".join(LINES)) - {"\t"}) + 1
    commonest = Counter(target for _, target in whole).most_common(1)[0][0]
    assert t.baselines["commonest target"] == np.mean([target == commonest for _, target in held_out])
    assert t.about()[0][1].endswith(t.sha256[:16])
    assert len(task(data=t.options.data, eval_examples=3).examples) == 3


@pytest.mark.parametrize(("lines", "words"), [
    (["a\tb", "no tab here"], "line 2, 'no tab here': it has no tab, allowed: a source, a tab and a target"),
    (["a\tb\tc"], r"line 1, 'a\\tb\\tc': it has 2 tabs"),
    (["a\tb", "", "c\td"], "line 2, '': it is empty"),
    (["\tb"], "line 1, .* its source is empty"),
    (["a\t"], "line 1, .* its target is empty"),
    (["a\tb", "a" * 32 + "\tb"], "line 2: its source has 32 characters, and with its end it does not fit --context 32"),
    (["a\t" + "b" * 40], "line 1: its target has 40 characters"),
    (["a\tb"], r"has 1 pairs, and none of them is (held out|to train on): one of 10 different sources"),
    ([""], "line 1, '': it is empty"),
])
def test_a_line_that_is_no_pair_is_a_sentence(file, lines, words):
    with pytest.raises(UserError, match=words) as error:
        task(data=file("\n".join(lines)))
    assert "pairs.tsv" in str(error.value)


def test_files_that_are_no_text(file, tmp_path):
    (tmp_path / "latin").write_bytes("é\tè\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 text: .* give another encoding with --encoding NAME$"):
        task(data=str(tmp_path / "latin"))
    with pytest.raises(UserError, match="there is no such file or folder"):
        task(data=str(tmp_path / "missing"))


def test_a_resumed_run_reads_the_same_file(file):
    data = file("\n".join(LINES))
    saved = task(data=data).state()
    again = task(data=data, saved=saved)
    assert np.array_equal(again.batch(2).source, task(data=data).batch(2).source)
    with pytest.raises(UserError, match="this run began with the pairs of another file"):
        task(data=file("\n".join([*LINES, "more\tof it"]), "other.tsv"), saved=saved)
    with pytest.raises(UserError, match="--data is not given: this run began with the pairs of another file"):
        task(saved=saved)
    with pytest.raises(UserError, match="this run began with pairs that are drawn, without --data"):
        task(data=file("\n".join(f"{i}\t{i}" for i in range(99))), saved=task().state())
    inherited = Pairs.inherited(saved)
    assert task(data=file("\n".join(LINES[::-1])), saved=inherited).vocab == again.vocab
    with pytest.raises(UserError, match=r"--rule add: the model does not know '\+', it knows"):
        task(rule="add", saved=Pairs.inherited(task().state()))


# -- the metric --------------------------------------------------------------------------------------------------------
def test_a_target_counts_when_it_is_written_without_a_mistake():
    """What the metric reads off one pass over the right targets is what greedy answers give."""
    t = task(longest=2, eval_examples=400)
    held_out = t.held_out()
    for seed in range(3):
        model = models.build("encoder-decoder", t.vocab, seed=seed, width=16, layers=1)
        noise = np.random.default_rng(seed)
        for parameter in model.parameters():
            parameter.assign_(parameter.numpy() + noise.normal(size=parameter.shape))
        sums = sum(t.score(model, held_out.part(slice(start, start + 90))) for start in range(0, 400, 90))
        found = [t.tokenizer.decode(ids) if len(ids) < held_out.labels.shape[1] and (ids < t.end).all() else None
                 for ids in model.greedy(held_out.source, held_out.labels.shape[1])]
        hits = [answer == target for answer, (_, target) in zip(found, t.examples, strict=True)]
        assert sums[4] == sum(hits) and t.value(sums) == np.mean(hits) and t.asked(sums) == 400
        assert sums[1] == (held_out.labels != NOTHING).sum()
    assert sum(hits) < 400


class Knowing:
    """A model that answers everything right, or with the source."""

    def __init__(self, t: Pairs, knows: bool):
        self.t, self.knows = t, knows

    def greedy(self, source, limit):
        rows = [row[: int(np.argmax(row == self.t.end))] for row in source]
        return [row[::-1] if self.knows else row for row in rows]


def test_pairs_are_shown_with_answers():
    t = task(longest=9, shortest=4)
    lines = t.show(Knowing(t, True), Random(1)).split("\n")
    assert len(lines) == 4 and all(line.split(" → ")[0][::-1] == line.split(" → ")[1] for line in lines)
    lines = t.show(Knowing(t, False), Random(1)).split("\n")
    assert all("   wrong, it is " in line or line.split(" → ")[0] == line.split(" → ")[1] for line in lines)


# -- from the command line ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that reverses strings of up to two digits, not always right."""
    folder = str(tmp_path_factory.mktemp("runs") / "pairs")
    argv = ["train", "one-wide-ffn", "--out", folder, "--longest", "2", "--width", "32", "--layers", "1", "--steps", "70",
            "--lr", "1e-2", "--warmup", "5", "--eval-every", "35", "--threads", "1", "--eval-examples", "20", "--context", "8"]
    assert cli.main(argv) == 0
    return folder


def test_a_run_says_what_it_is_made_of(run, capsys):
    assert cli.main(["train", "--resume", run, "--steps", "71"]) == 0
    lines = capsys.readouterr().err
    assert "weights   " in lines and "executed (a shared one once for each layer)" in lines
    assert "cost      " in lines and "for a token of the target" in lines and "sequence accuracy" in lines and " → " in lines
    assert "minitv sample" in lines and "--prompt SOURCE" in lines


def test_a_source_is_answered(run, capsys):
    model = load(run).model
    tokenizer = load(run).tokenizer
    for prompt in ("31", "7"):
        source = np.array([*tokenizer.encode(prompt), model.end])
        expected = tokenizer.decode(model.greedy(source[None], 8)[0])
        assert cli.main(["sample", run, "--prompt", prompt]) == 0
        assert capsys.readouterr().out == expected + "\n"
        assert cli.main(["sample", run, "--prompt", prompt, "--beam", "3", "--length-penalty", "0.5"]) == 0
        assert capsys.readouterr().out == tokenizer.decode(model.beam(source, 3, 8, 0.5)[0].ids) + "\n"
    source = np.array([*tokenizer.encode("31"), model.end])
    assert minitv.load(run).write("31") == tokenizer.decode(model.greedy(source[None], 8)[0])
    assert cli.main(["sample", run, "--prompt", "31", "--temperature", "2", "--count", "3", "--tokens", "1"]) == 0
    assert capsys.readouterr().out.count("--- text ") == 3


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_source_may_come_from_standard_input_with_the_end_of_its_line(run, monkeypatch, capsys, end):
    assert cli.main(["sample", run, "--prompt", "31"]) == 0
    written = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"31{end}".encode())))
    assert cli.main(["sample", run, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == written


@pytest.mark.parametrize(("argv", "words"), [
    (["--prompt", ""], "--prompt: one-wide-ffn answers a source: give one"),
    (["--prompt", "3a"], "--prompt: the character 'a' (U+0061) at offset 1 is unknown"),
    (["--prompt", "12345678"], "--prompt: the source has 8 tokens, and one-wide-ffn was trained with --context 8: allowed"),
    (["--prompt", "3", "--window", "4"], "--window: this says nothing to a model of the task pairs, allowed: --prompt"),
    (["--prompt", "3", "--length-penalty", "2"], "--length-penalty 2: it ranks the answers of a beam, give --beam N"),
    (["--prompt", "3", "--beam", "2", "--temperature", "1"], "--beam 2: a beam draws nothing"),
    (["--prompt", "3", "--beam", "2", "--top-k", "1"], "--top-k: this changes what is drawn, and --beam 2 draws nothing"),
    (["--prompt", "3", "--beam", "2", "--min-p", "0.1"], "--min-p: this changes what is drawn"),
    (["--prompt", "3", "--beam", "0"], "--beam: 0 is too small"),
])
def test_what_cannot_be_answered_is_a_sentence(run, capsys, argv, words):
    assert cli.main(["sample", run, *argv]) == 2
    assert words in capsys.readouterr().err


def test_pairs_of_a_file_are_evaluated(run, file, capsys):
    tokenizer, model = load(run).tokenizer, load(run).model
    sources = [str(i) for i in range(10, 80)]
    written = [tokenizer.decode(ids) for ids in model.greedy(encoded([(s, s) for s in sources], tokenizer).source, 8)]
    right = [text if i % 3 else "999" for i, text in enumerate(written)]  # as the model writes, but for every third
    path = file("".join(f"{source}\t{target}\n" for source, target in zip(sources, right, strict=True)))
    hits = sum(text == target for text, target in zip(written, right, strict=True))
    assert hits > 40 and all(written)
    assert cli.main(["eval", run, "--data", path]) == 0
    out = capsys.readouterr().out
    assert f"{hits / 70:.4f} sequence accuracy, better than" in out and "70 pairs" in out and "all of it" in out
    assert cli.main(["eval", run]) == 0
    assert "pairs that are drawn, what is held out" in (out := capsys.readouterr().out) and "20 pairs" in out
    for argv, words in ((["--data", file("31 13", "other")], "line 1, '31 13': it has no tab"),
                        (["--data", file("3x\t4", "third")], "third: the model does not know 'x', it knows the"),
                        (["--data", path, "--per-character"], "--per-character: the task pairs has no text to continue"),
                        (["--data", path, "--strided"], "--strided: one-wide-ffn reads no patches")):
        assert cli.main(["eval", run, *argv]) == 2
        assert words in capsys.readouterr().err


def test_it_predicts_no_text(run, capsys):
    assert cli.main(["convert", run]) == 2
    assert "one-wide-ffn is no language model with heads of keys and values that could be shared" in capsys.readouterr().err
    for argv, words in ((["eval", run, "--text", "31"], "--text: the task pairs has no text to continue"),
                        (["stream", run], "one-wide-ffn answers a source, it cannot")):
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="one-wide-ffn answers a source, it cannot predict the next token"):
        minitv.load(run).loss("31")


def test_a_model_of_texts_has_no_beam(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 60)
    assert cli.main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "1", "--width", "8",
                     "--layers", "1", "--context", "8", "--eval-every", "0"]) == 0
    assert cli.main(["sample", str(tmp_path / "run"), "--beam", "2"]) == 2
    assert "--beam: this says nothing to a model of the task text, allowed: --prompt" in capsys.readouterr().err


@pytest.mark.full
def test_variants_are_compared_on_pairs(tmp_path, capsys):
    argv = ["compare", "--task", "pairs", "--width", "16", "--layers", "1", "--steps", "2", "--eval-every", "2",
            "--longest", "3", "--eval-examples", "10", "--threads", "1", "--context", "8", "--out", str(tmp_path / "c")]
    assert cli.main(argv) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert {"encoder-decoder", "one-wide-ffn", "copy"} <= rows.keys()
    assert all(len(rows[name]) >= 7 for name in ("encoder-decoder", "one-wide-ffn"))  # with a state and a speed of writing


@pytest.mark.full
def test_a_small_model_learns_to_reverse():
    """In few steps it is far better than the baselines at strings that it has never seen."""
    t = task(longest=3, batch=64)
    made = models.configure("one-wide-ffn", width=32, steps=150, lr=1e-2, warmup=20, threads=1, batch=64, context=8)
    trainer = Trainer(made, t)
    try:
        losses = [trainer.step(t.batch(step), step) for step in range(150)]
        value = t.value(trainer.evaluate(t.held_out()))
    finally:
        trainer.close()
    assert losses[-1] < 0.5 * losses[0] and value > 2 * max(t.baselines.values()), (value, losses[::15])
