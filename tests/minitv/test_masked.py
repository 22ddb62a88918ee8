"""Masked text: which tokens are hidden and how, the baselines, and what is shown."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from autograd import Tensor
from autograd.random import Random
from minitv import cli
from minitv.errors import UserError
from minitv.log import read_log
from minitv.sample import load
from minitv.task import NOTHING
from minitv.tasks.masked import Bigrams, Masked

TEXT = "the cat sat on the mat and the dog ate the cake of the cat; " * 60


@pytest.fixture
def task(tmp_path):
    def make(text: str = TEXT, context: int = 20, batch: int = 16, seed: int = 0, **values) -> Masked:
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8")
        return Masked(Masked.Options(data=str(path), **values), context, batch, seed, None)

    return make


def test_the_shares_are_those_of_the_options(task):
    t = task(context=40, batch=64, mask_rate=0.3, mask_share=0.5, random_share=0.2)
    fates, words = np.zeros(3), set()
    for step in range(30):
        ids, _ = t._windows.batch(step)
        inputs, labels = t.batch(step)
        asked = labels != NOTHING
        assert (asked.sum(axis=1) == 12).all()  # 0.3 of 40
        assert np.array_equal(labels[asked], ids[asked]) and np.array_equal(inputs[~asked], ids[~asked])
        changed = asked & (inputs != t.mask) & (inputs != ids)
        fates += (asked & (inputs == t.mask)).sum(), changed.sum(), (asked & (inputs == ids)).sum()
        words |= set(inputs[changed].tolist())
    v = t.tokenizer.vocab
    expected = np.array([0.5, 0.2 * (1 - 1 / v), 0.3 + 0.2 / v])
    assert np.abs(fates / fates.sum() - expected).max() < 0.012
    assert words == set(range(v)) and t.vocab == v + 1 == t.mask + 1


def test_every_place_is_asked_equally_often(task):
    t = task(batch=64)
    asked = np.mean([(t.batch(step).labels != NOTHING).mean(axis=0) for step in range(60)], axis=0)
    assert np.abs(asked - 3 / 20).max() < 0.03
    assert (task(context=3, mask_rate=0.01).batch(0).labels != NOTHING).sum(axis=1).tolist() == [1] * 16


def test_a_batch_follows_from_the_seed_and_the_step(task):
    one, same, other = task(seed=1), task(seed=1), task(seed=2)
    one.batch(0)
    for mine, theirs in zip(one.batch(7), same.batch(7), strict=True):
        assert np.array_equal(mine, theirs)
    assert not np.array_equal(one.batch(7).labels, one.batch(6).labels)
    assert not np.array_equal(one.batch(7).labels, other.batch(7).labels)
    for mine, theirs in zip(one.held_out(), other.held_out(), strict=True):
        assert np.array_equal(mine, theirs)  # the same blanks for every seed, at every rate of training
    assert np.array_equal(one.held_out().labels, task(mask_rate=0.5).held_out().labels)


def test_the_mask_fits_whatever_the_type_of_the_text(task):
    t = task("".join(map(chr, range(32, 287))) * 20, tokenizer="byte", mask_share=1.0, random_share=0.0)
    inputs, labels = t.hide(np.arange(240, dtype=np.uint8).reshape(4, 60), 0.2, t._random)
    assert t.mask == 256 and ((inputs == 256) == (labels != NOTHING)).all() and labels.max() < 240


def test_a_resumed_task_has_the_tokenizer_of_its_beginning_and_no_other_text(task, tmp_path):
    t = task()
    saved = t.state()
    again = Masked(t.options, 20, 16, 0, saved)
    assert again.vocab == t.vocab and np.array_equal(again.batch(2).inputs, t.batch(2).inputs)
    with pytest.raises(UserError, match="is not the text this run began with"):
        (tmp_path / "text.txt").write_text("x" + TEXT)
        Masked(t.options, 20, 16, 0, saved)


# -- baselines -------------------------------------------------------------------------------------------------------------


def counted(t: Masked) -> tuple[dict[str, float], dict[str, float]]:
    """The bits of both baselines and their shares of right answers, token by token."""
    ids, v = t.corpus.training.tolist(), t.tokenizer.vocab
    kinds = len(set(ids))
    p = [(ids.count(b) + kinds / v) / (len(ids) + kinds) for b in range(v)]
    pairs = list(itertools.pairwise(ids))
    after = {a: [pairs.count((a, b)) for b in range(v)] for a in range(v)}

    def given(a, b):
        n, distinct = sum(after[a]), sum(count > 0 for count in after[a])
        return (after[a][b] + distinct * p[b]) / (n + distinct) if n else p[b]

    rates, hits, o = [[], []], [[], []], t.options
    for inputs, labels in zip(*(array.tolist() for array in t.held_out()), strict=True):
        for i, label in enumerate(labels):
            if label == NOTHING:
                continue
            left = inputs[i - 1] if i else t.mask
            right = inputs[i + 1] if i + 1 < len(inputs) else t.mask
            for k in range(2):
                weight = []
                for x in range(v):
                    w = p[x] if k == 0 or left == t.mask else given(left, x)
                    if k and right != t.mask:
                        w *= given(x, right)
                    if inputs[i] != t.mask:  # what is readable there
                        w *= o.random_share / v + o.kept_share * (inputs[i] == x)
                    weight.append(w)
                rates[k].append(-math.log2(weight[label] / sum(weight)))
                hits[k].append(weight.index(max(weight)) == label)
    return tuple({"unigram": np.mean(values[0]), "bigram": np.mean(values[1])} for values in (rates, hits))


@pytest.mark.parametrize("values", [{}, {"eval_mask_rate": 0.5}, {"mask_share": 1.0, "random_share": 0.0},
                                    {"mask_share": 0.5, "random_share": 0.0}, {"mask_share": 0.0, "random_share": 1.0}])
def test_the_baselines_are_what_counting_says(task, values, monkeypatch):
    monkeypatch.setattr("minitv.tasks.masked.CHUNK", 100)  # several chunks, the last one shorter
    t = task(TEXT[:1500] + "zebras", eval_tokens=100, **values)
    bits, right = counted(t)
    assert t.baselines == pytest.approx(bits, rel=1e-9) and t.accuracies == pytest.approx(right)
    if values.get("random_share") != 1:
        assert t.baselines["bigram"] < t.baselines["unigram"]


def test_estimates_add_up_to_one():
    table = Bigrams(np.array([0, 1, 2, 0, 1, 1, 4], np.uint8), 6)  # 3 and 5 do not occur, nothing follows 4
    assert np.exp(table.alone(2)).sum(axis=1) == pytest.approx(1)
    unknown = np.full(6, 6)
    assert np.exp(table.between(np.arange(6), unknown)).sum(axis=1) == pytest.approx(1)
    assert np.exp(table.between(unknown, np.arange(6))).sum() == pytest.approx(1)  # Σ over x and b of p(x) p(b | x)


# -- what a person sees and gets wrong ---------------------------------------------------------------------------------------


class Answers:
    """A model that knows the labels of the first windows and is wrong at every ``wrong``-th blank."""

    def __init__(self, t: Masked, wrong: int):
        self.t, self.wrong = t, wrong

    def __call__(self, ids, rng=None, at=None):
        labels = self.t.held_out().labels[: len(ids)].reshape(-1)[at].copy()
        labels[:: self.wrong] = (labels[:: self.wrong] + 1) % self.t.vocab
        return Tensor(50 * np.eye(self.t.vocab)[labels])


def test_blanks_are_shown_filled(task):
    t = task(mask_share=1.0, random_share=0.0)
    text = t.show(Answers(t, 3), Random(0))
    *lines, summary = text.splitlines()
    assert summary.startswith("4 of 6 blanks right") and text.isascii()
    assert sum(line.count("|") for line in lines) == 2
    original = t.tokenizer.decode(t.corpus.held_out[:20])
    restored = re.sub(r"\[(?:[^]|]*\|)?([^]]*)\]", r"\1", lines[0])
    assert restored == original


def test_a_newline_in_a_blank_does_not_break_the_line(task):
    t = task("\n\n" * 800 + "a", eval_tokens=20)
    shown = t.show(Answers(t, 10**6), Random(0))
    assert "[\\n]" in shown and "[\n]" not in shown


def test_the_metric_is_bits_and_falls(task):
    t = task()
    assert not t.rising and not t.causal and "bits" in t.metric

    class Uniform:
        def __call__(self, ids, rng=None, at=None):
            return Tensor(np.zeros((len(at), t.vocab)))

    assert t.value(t.score(Uniform(), t.held_out())) == pytest.approx(math.log2(t.vocab))


def test_shares_above_one_are_refused():
    with pytest.raises(UserError, match=r"--random-share: 0.3 and --mask-share 0.8 are more than 1 together"):
        Masked.Options(random_share=0.3)
    assert Masked.Options(mask_share=0.7, random_share=0.3).kept_share == 0
    with pytest.raises(UserError, match="mask_rate"):
        Masked.Options(mask_rate=0.0)


# -- accuracy beside the bits --------------------------------------------------------------------------------------------------


def test_the_share_of_right_blanks_is_told_beside_the_bits(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    tiny = ["--task", "masked", "--data", "text.txt", "--layers", "1", "--width", "16", "--heads", "2", "--context", "20",
            "--steps", "2", "--batch", "4", "--eval-tokens", "200", "--threads", "1", "--warmup", "1"]
    assert cli.main(["train", "encoder", "--out", "run", *tiny]) == 0
    shown = capfd.readouterr().err
    header, records = read_log("run")
    trained = load("run")
    task = trained.experiment.begin(trained.saved)
    right = asked = 0
    for inputs, labels in zip(*task.held_out(), strict=True):
        answers = trained.model(inputs[None]).numpy()[0].argmax(axis=-1)
        right, asked = right + int((answers == labels).sum()), asked + int((labels != NOTHING).sum())
    assert records[-1]["val_accuracy"] == right / asked and header["accuracies"] == task.accuracies
    assert re.search(rf"bits per masked token, accuracy {right / asked:.3f}, (better|no better|behind)", shown)
    assert cli.main(["eval", "run"]) == 0
    assert re.search(rf"accuracy +{right / asked:.4f}\n", capfd.readouterr().out)
    assert cli.main(["eval", "run", "--data", "text.txt"]) == 2
    assert "--data: a model of the task masked is asked for the tokens of the text" in capfd.readouterr().err
    assert cli.main(["compare", "encoder", "--out", "runs", *tiny]) == 0
    lines = capfd.readouterr().out.splitlines()
    place = lines[0].index("accuracy") + len("accuracy")
    assert lines[1][:place].split()[-1] == f"{right / asked:.3f}"
    assert lines[-1][:place].split()[-1] == f"{task.accuracies['bigram']:.3f}"
