"""ListOps: its expressions, their values and their distribution."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import numpy as np
import pytest

from autograd import Tensor
from autograd.random import Random
from minitv import tasks, variants
from minitv.compare import Plan
from minitv.errors import UserError
from minitv.experiment import default_task, namespace, possible
from minitv.task import NOTHING
from minitv.tasks.listops import EQUALS, RULE_EXAMPLES, RULES, WORDS, ListOps, write


def task(context: int = 64, batch: int = 64, seed: int = 0, **values) -> ListOps:
    return ListOps(ListOps.Options(**values), context, batch, seed, None)


def parse(words: list[str]) -> tuple[int, int, list[int]]:
    """The value, the depth and the numbers of arguments of an expression, which it takes off the list of words."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), 1, []
    values, depths, counts = [], [], []
    while words[0] != "]":
        value, depth, inner = parse(words)
        values.append(value)
        depths.append(depth)
        counts += inner
    words.pop(0)
    value = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(statistics.median(v)), "[SM": lambda v: sum(v) % 10}[word](values)
    return value, 1 + max(depths), [len(values), *counts]


def theirs(rng: random.Random, depth: int, options) -> list[str]:
    """An expression as Long Range Arena makes one, node by node."""
    if depth == options.depth or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    inner = [theirs(rng, depth + 1, options) for _ in range(rng.randint(2, options.arguments))]
    return [rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), *(word for part in inner for word in part), "]"]


@pytest.mark.parametrize("values", [{}, {"depth": 2, "shortest": 4}, {"depth": 4, "arguments": 2, "shortest": 9, "longest": 20},
                                    {"depth": 10, "arguments": 10, "shortest": 50}])
def test_every_answer_is_the_value_of_its_expression(values):
    t = task(**values)
    inputs, labels = t.batch(2)
    lengths = []
    for row, answers in zip(inputs, labels, strict=True):
        (place,) = np.flatnonzero(answers != NOTHING)
        assert row[place] == EQUALS and set(row[place + 1 :]) <= {len(WORDS) - 1}
        words = write(row[:place]).split()
        lengths.append(len(words))
        value, depth, counts = parse(words)
        assert not words and value == answers[place]
        assert depth <= t.options.depth and 2 <= min(counts) and max(counts) <= t.options.arguments
    assert t.options.shortest <= min(lengths) and max(lengths) <= (t.options.longest or 63) and len(set(lengths)) > 2
    assert max(inputs.max(), labels.max()) < t.vocab


def test_its_expressions_are_distributed_as_long_range_arena_draws_them():
    t = task(batch=3000, shortest=10, longest=40, depth=4, arguments=4)
    ours = [write(row).split()[:-1] for row in t.batch(0).inputs]
    rng, other = random.Random(0), []
    while len(other) < 3000:
        words = theirs(rng, 1, t.options)
        if 10 <= len(words) <= 40:
            other.append(words)

    def figures(expressions):
        counts = [Counter(words) for words in expressions]
        parsed = [parse(list(words)) for words in expressions]
        return {**{word: [count[word] / sum(count.values()) for count in counts] for word in WORDS[:15]},
                **{f"answer {i}": [value == i for value, _, _ in parsed] for i in range(10)},
                "length": [len(words) for words in expressions],
                "depth": [depth for _, depth, _ in parsed],
                "arguments": [np.mean(arguments) for _, _, arguments in parsed],
                "first": [words[1].isdigit() for words in expressions]}

    mine, reference = figures(ours), figures(other)
    for name, values in mine.items():
        error = np.sqrt((np.var(values) + np.var(reference[name])) / 3000)
        assert abs(np.mean(values) - np.mean(reference[name])) < 5 * error, name


def test_a_batch_follows_from_the_seed_and_the_step():
    one, same, other = task(seed=4), task(seed=4), task(seed=5)
    one.batch(0)
    assert np.array_equal(one.batch(9).inputs, same.batch(9).inputs)
    assert not np.array_equal(one.batch(9).inputs, one.batch(8).inputs)
    assert not np.array_equal(one.batch(9).inputs, other.batch(9).inputs)
    assert np.array_equal(one.held_out().inputs, other.held_out().inputs)
    rows = {write(row) for step in range(20) for row in one.batch(step).inputs}
    assert not rows & {write(row) for row in one.held_out().inputs}  # none is trained on
    assert len(rows) == 20 * 64


def test_the_baselines_are_rules_learned_from_other_expressions():
    t = task(context=100, shortest=21, longest=99, eval_examples=4000)  # "more than 20 and fewer than 100"
    pairs = [[(row[0], int(answers.max())) for row, answers in zip(*batch, strict=True)]
             for batch in (t.draw(RULES, RULE_EXAMPLES), t.held_out())]
    majority = Counter(answer for _, answer in pairs[0]).most_common(1)[0][0]
    rule = {first: Counter(answer for word, answer in pairs[0] if word == first).most_common(1)[0][0] for first, _ in pairs[0]}
    assert t.baselines["majority class"] == np.mean([answer == majority for _, answer in pairs[1]])
    assert t.baselines["root operator"] == np.mean([answer == rule[first] for first, answer in pairs[1]])
    # what an independent generator gave for these lengths
    assert abs(t.baselines["majority class"] - 0.114) < 0.02 and abs(t.baselines["root operator"] - 0.241) < 0.025
    assert t.baselines["chance"] == 0.1 and list(WORDS[i] for i in range(10)) == list("0123456789")


def test_an_expression_is_shown_with_both_answers():
    t = task(eval_examples=1)

    class Constant:
        def __call__(self, ids, rng=None, at=None):
            return Tensor(np.eye(t.vocab)[[self.answer] * len(at)])

    model, right = Constant(), int(t.held_out().labels.max())
    model.answer = right
    assert t.show(model, Random(3)).endswith(f"] = {right} (right)")
    model.answer = (right + 1) % 10
    assert t.show(model, Random(3)).endswith(f"] = {model.answer} (wrong, it is {right})")
    model.answer = t.vocab - 1
    assert "= nothing (wrong" in t.show(model, Random(3))
    model.answer = right
    assert t.value(t.score(model, t.held_out())) == np.mean(t.held_out().labels.max(axis=1) == right)


@pytest.mark.parametrize(("context", "values", "words"), [
    (64, {"longest": 64}, "--longest: an expression of 64 tokens and the sign after it .* --context 64: give at most 63"),
    (16, {}, "--shortest: 20 is more than one token less than --context 16, which is 15"),
    (64, {"longest": 10}, "--shortest: 20 is more than --longest 10"),
    (128, {"shortest": 100, "depth": 3, "arguments": 3}, "--shortest: fewer than one of 1000 expressions"),
])
def test_lengths_that_no_expression_has_are_refused(context, values, words):
    with pytest.raises(UserError, match=words):
        task(context, **values)


def test_it_is_for_models_of_the_past_and_of_both_sides():
    for variant in (variants.load("rwkv"), variants.load("encoder")):
        assert "listops" in possible(variant) and namespace(variant, ListOps)
    assert default_task(variants.load("encoder")) == "masked" and default_task(variants.load("rwkv")) == "text"
    with pytest.raises(UserError, match="--task masked: rwkv sees the past alone"):
        namespace(variants.load("rwkv"), tasks.load("masked"))
    with pytest.raises(UserError, match="--task text: encoder sees the whole sequence"):
        namespace(variants.load("encoder"), tasks.load("text"))
    assert {variant.name for variant in Plan(task="listops").variants} == {
        name for name in variants.variants() if variants.load(name).reads == "tokens"}
