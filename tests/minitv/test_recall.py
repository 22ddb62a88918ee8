"""The tasks of recall: their distributions, that each has one answer, their baselines, and what they refuse."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from autograd import Tensor
from autograd.random import Random
from minitv.compare import first_step
from minitv.config import to_json
from minitv.errors import UserError
from minitv.task import NOTHING
from minitv.tasks import load, tasks
from minitv.tasks._drawn import choose
from minitv.tasks.recall import MQAR, AssociativeRecall, Copy, Induction, Recall, SelectiveCopy

NAMES = [name for name, entry in tasks().items() if entry.module.endswith(".recall")]
VARIED = {
    "mqar": [{}, {"random_fillers": True}, {"pairs": 16, "power": 1.0, "symbols": 35}, {"length": 32, "pairs": 4}],
    "associative-recall": [{}, {"absent": True, "length": 11}, {"every_token": False, "symbols": 8},
                           {"question_first": True}],
    "induction": [{}, {"length": 3, "symbols": 3}, {"every_token": True}],
    "copy": [{}, {"repeats": 3, "reverse": True}, {"symbols": 2, "length": 2}],
    "selective-copy": [{}, {"items": 32}, {"symbols": 40, "items": 1}],
}
CASES = [(name, values) for name in NAMES for values in VARIED[name]]


def task(name: str, context: int = 64, batch: int = 64, seed: int = 0, **values):
    cls = load(name)
    return cls(cls.Options(**values), context, batch, seed, None)


class Oracle:
    """A model that gives the answers of a function of the inputs; it knows where they are asked."""

    def __init__(self, vocab: int, answer):
        self.vocab, self.answer = vocab, answer

    def __call__(self, ids, rng=None, at=None):
        answers = np.array([self.answer(row) for row in ids.tolist()])
        answers = answers if at is None else answers.reshape(-1)[at]
        return Tensor(np.eye(self.vocab)[answers])


# -- solvers: what each task asks, in plain Python; they see nothing but the sequence ------------------------------------


def solve_mqar(t, row):
    pairs = dict(zip(row[: 2 * t.options.pairs : 2], row[1 : 2 * t.options.pairs : 2], strict=True))
    return [pairs.get(token, 0) for token in row]


def solve_associative(t, row):
    first = t.options.question_first
    body, asked = (row[1:-1], row[0]) if first else (row[:-2], row[-1])
    return [*row[1:], dict(zip(body[::2], body[1::2], strict=True)).get(asked, t.vocab - 2)]


def solve_induction(t, row):
    return [*row[1:], row[row.index(t.vocab - 1) + 1]]


def solve_copy(t, row):
    n = row.index(t.vocab - 1)
    part = row[:n][::-1] if t.options.reverse else row[:n]
    return [0] * n + part * t.options.repeats


def solve_selective(t, row):
    items = [token for token in row if token < t.vocab - 2]
    return [0] * (len(row) - len(items)) + items


SOLVERS = {"mqar": solve_mqar, "associative-recall": solve_associative, "induction": solve_induction, "copy": solve_copy,
           "selective-copy": solve_selective}


@pytest.mark.parametrize(("name", "values"), CASES)
def test_who_reads_the_sequence_answers_everything_right(name, values):
    t = task(name, eval_examples=50, **values)
    held_out = t.held_out()
    assert held_out.inputs.shape == held_out.labels.shape and held_out.inputs.shape[1] <= 64
    assert held_out.inputs.min() >= 0 and max(held_out.inputs.max(), held_out.labels.max()) < t.vocab
    assert (held_out.labels != NOTHING).any(axis=1).all()
    oracle = Oracle(t.vocab, lambda row: SOLVERS[name](t, row))
    assert t.value(t.score(oracle, held_out)) == 1
    shown = t.show(oracle, Random(3))
    assert re.search(r"(\d+) of \1 right", shown) and "(" not in shown


@pytest.mark.parametrize(("name", "values"), CASES)
def test_a_batch_follows_from_the_seed_and_the_step(name, values):
    one, same, other = (task(name, seed=seed, batch=8, **values) for seed in (5, 5, 6))
    one.batch(0)  # what was drawn before does not matter
    for mine, theirs in zip(one.batch(3), same.batch(3), strict=True):
        assert np.array_equal(mine, theirs) and len(mine) == 8
    if values.get("length", 64) > 3:
        assert not np.array_equal(one.batch(3).inputs, one.batch(4).inputs)
        assert not np.array_equal(one.batch(3).inputs, other.batch(3).inputs)
    assert np.array_equal(one.held_out().inputs, other.held_out().inputs)


@pytest.mark.parametrize(("name", "values"), CASES)
def test_the_baselines_are_what_counting_says(name, values):
    t = task(name, eval_examples=60, **values)
    held_out, expected = t.held_out(), []
    for inputs, labels in zip(held_out.inputs.tolist(), held_out.labels.tolist(), strict=True):
        n = t.options.pairs if name == "mqar" else 0
        values_seen = {
            "mqar": inputs[1 : 2 * n : 2],
            "associative-recall": inputs[2:-1:2] if values.get("question_first") else inputs[1:-2:2],
            "induction": [token for token in inputs if token != t.vocab - 1],
            "copy": inputs[: [*inputs, t.vocab - 1].index(t.vocab - 1)],
            "selective-copy": [token for token in inputs if token < t.vocab - 2],
        }[name]
        counts = Counter(values_seen)
        best = [token for token, count in counts.items() if count == max(counts.values())]
        expected += [(label in best) / len(best) for label in labels if label != NOTHING]
    assert t.baselines["commonest value seen"] == pytest.approx(np.mean(expected))
    if name == "mqar":
        assert t.baselines["commonest value seen"] == pytest.approx(1 / t.options.pairs)
    answers = {int(label) for step in range(40) for label in np.unique(t.batch(step).labels[:, -40:]) if label != NOTHING}
    if not values.get("every_token", name == "associative-recall") and t.values < 70:
        assert len(answers) == pytest.approx(1 / t.baselines["chance"])


# -- mqar ----------------------------------------------------------------------------------------------------------------


def test_mqar_has_the_layout_of_zoology():
    t = task("mqar", context=32, batch=200, pairs=5, symbols=21)
    inputs, labels = t.batch(0)
    keys, values = inputs[:, :10:2], inputs[:, 1:10:2]
    assert keys.min() == 1 and keys.max() == 9 and values.min() == 10 and values.max() == 20
    for row in range(200):
        assert len(set(keys[row])) == len(set(values[row])) == 5
        asked = np.flatnonzero(labels[row] != NOTHING)
        assert sorted(inputs[row, asked]) == sorted(keys[row]) and (asked >= 10).all() and (asked % 2 == 0).all()
        assert (inputs[row, 10:] != 0).sum() == 5


def test_mqar_fills_with_every_token_where_it_is_asked_to():
    values = dict(context=32, batch=300, pairs=4, symbols=12)
    plain, filled = (task("mqar", random_fillers=random, **values).batch(1) for random in (False, True))
    assert np.array_equal(plain.labels, filled.labels)
    free = plain.inputs == 0
    assert np.array_equal(plain.inputs[~free], filled.inputs[~free])
    counts = np.bincount(filled.inputs[free], minlength=12)
    assert len(counts) == 12 and np.abs(counts / counts.sum() - 1 / 12).max() < 0.015


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_mqar_asks_at_distances_of_the_power_law(power):
    """The slot of the key with a given number, against NumPy's choice without replacement, which zoology uses."""
    t = task("mqar", context=40, batch=6000, pairs=4, power=power)
    inputs, labels = t.batch(0)
    slots = (40 - 8) // 2
    p = power * np.arange(1, slots + 1) ** (power - 1)
    rng = np.random.default_rng(0)
    theirs = np.array([rng.choice(slots, 4, replace=False, p=p / p.sum()) for _ in range(6000)])
    rows, places = np.nonzero(labels != NOTHING)
    number = np.argmax(inputs[:, :8:2][rows] == inputs[rows, places][:, None], axis=1)
    ours = np.empty((6000, 4), int)
    ours[rows, number] = (places - 8) // 2
    for k in range(4):
        mine, other = (np.bincount(a[:, k], minlength=slots) for a in (ours, theirs))
        assert (np.abs(mine - other) < 5 * np.sqrt(mine + other + 1)).all()
    if power < 1:
        assert (ours[:, 0] == 0).mean() > (ours[:, 3] == 0).mean() + 0.02  # the first key draws first


def test_choose_draws_one_after_another_without_replacement():
    weights = np.array([0.5, 0.3, 0.2])
    drawn = choose(Random(1), 40_000, 3, 2, weights)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for a in range(3):
        for b in set(range(3)) - {a}:
            expected = weights[a] * weights[b] / (1 - weights[a])
            assert abs(((drawn[:, 0] == a) & (drawn[:, 1] == b)).mean() - expected) < 0.012


# -- the others ----------------------------------------------------------------------------------------------------------


def test_associative_recall_maps_each_key_to_one_value_and_asks_every_key_equally_often():
    t = task("associative-recall", context=20, batch=2000)
    inputs, labels = t.batch(0)
    for row in inputs.tolist():
        assert len(set(zip(row[:-2:2], row[1:-2:2], strict=True))) == len(set(row[:-2:2]))
        assert row[-1] in row[:-2:2] and row[-2] == t.vocab - 1
    assert np.array_equal(labels[:, :-1], inputs[:, 1:])  # every token is trained on
    assert (t.held_out().labels[:, :-1] == NOTHING).all()  # and the last alone is judged
    assert np.abs(np.bincount(inputs[:, -1], minlength=9) / 2000 - 1 / 9).max() < 0.03


def test_associative_recall_may_ask_before_it_tells():
    last, first = (task("associative-recall", context=12, question_first=first).batch(0) for first in (False, True))
    assert np.array_equal(first.inputs[:, 1:-1], last.inputs[:, :-2])  # the pairs
    assert np.array_equal(first.inputs[:, [0, -1]], last.inputs[:, [-1, -2]])  # the key that is asked for, and the sign
    assert np.array_equal(first.labels[:, -1], last.labels[:, -1])


def test_associative_recall_may_ask_for_what_is_not_there():
    t = task("associative-recall", context=8, batch=2000, absent=True)
    inputs, labels = t.batch(0)
    absent = labels[:, -1] == t.vocab - 2
    assert np.array_equal(absent, (inputs[:, :-2:2] != inputs[:, -1:]).all(axis=1))
    assert abs(absent.mean() - (8 / 9) ** 3) < 0.04


def test_induction_puts_the_sign_at_every_place():
    t = task("induction", context=10, batch=4000)
    inputs, _ = t.batch(0)
    assert ((inputs == t.vocab - 1).sum(axis=1) == 2).all() and (inputs[:, -1] == t.vocab - 1).all()
    places = np.bincount((inputs == t.vocab - 1).argmax(axis=1), minlength=8)
    assert len(places) == 8 and np.abs(places / 4000 - 1 / 8).max() < 0.025


def test_copy_feeds_the_answers_back():
    inputs, labels = task("copy", context=9, batch=5, repeats=2, reverse=True).batch(0)
    assert inputs.shape == (5, 9)
    part = inputs[:, :3]
    assert np.array_equal(labels[:, 3:], np.concatenate([part[:, ::-1]] * 2, axis=1))
    assert np.array_equal(inputs[:, 4:], labels[:, 3:-1])


def test_selective_copy_puts_its_tokens_at_every_place():
    t = task("selective-copy", context=20, batch=4000, items=4)
    inputs, labels = t.batch(0)
    assert (inputs[:, -4:] == t.vocab - 1).all() and ((inputs < t.vocab - 2).sum(axis=1) == 4).all()
    assert np.abs((inputs[:, :-4] < t.vocab - 2).mean(axis=0) - 4 / 16).max() < 0.03
    assert (labels[:, :-4] == NOTHING).all()


# -- what a person sees and gets wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_answer_is_shown_beside_the_right_one(name):
    t = task(name, eval_examples=5)
    shown = t.show(Oracle(t.vocab, lambda row: [t.vocab - 1] * len(row)), Random(7))
    assert shown.isascii() and max(map(len, shown.splitlines())) <= 105
    right = int(re.search(r"(\d+) of", shown)[1])
    assert shown.count("(") == (t.held_out().labels[0] != NOTHING).sum() - right


@pytest.mark.parametrize(("name", "context", "values", "words"), [
    ("mqar", 31, {"pairs": 8}, "--pairs: 8 pairs .* 32 tokens, and a sequence has 30: give at most 7"),
    ("mqar", 64, {"symbols": 16}, "--symbols: of 16 tokens 7 are keys, fewer than --pairs 8: give at least 18"),
    ("mqar", 64, {"length": 63}, "--length: 63 is odd"),
    ("mqar", 64, {"length": 128}, "--length: sequences of 128 tokens do not fit --context 64"),
    ("associative-recall", 3, {}, "--context: 3 is too short"),
    ("induction", 2, {}, "--context: 2 is too short"),
    ("copy", 4, {"repeats": 4}, "--repeats: a token and 4 copies do not fit sequences of 4 tokens: give at most 3"),
    ("selective-copy", 12, {}, "--items: 8 .* give at most 6 items"),
])
def test_sequences_that_do_not_fit_are_refused(name, context, values, words):
    with pytest.raises(UserError, match=words):
        task(name, context=context, **values)


@pytest.mark.parametrize("cls", [MQAR, AssociativeRecall, Induction, Copy, SelectiveCopy])
def test_a_task_is_declared_where_it_is_found(cls):
    assert issubclass(cls, Recall) and load(cls.name) is cls and cls.summary == tasks()[cls.name].summary
    assert all(value is None or isinstance(value, int | float) for value in to_json(cls.Options()).values())
    with pytest.raises(UserError, match="eval_examples"):
        cls.Options(eval_examples=0)


def test_the_first_step_that_reaches_an_accuracy():
    assert first_step([(100, 0.2), (200, 0.9), (300, 0.85), (400, 0.99)], MQAR) == 200
    assert first_step([(100, 0.2), (200, 0.89)], MQAR) is None
    assert first_step([(100, 9.0)], load("text")) is None  # which has no goal
