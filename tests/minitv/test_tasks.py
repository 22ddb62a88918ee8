"""Every task in a whole run, from the command line, with two variants where there are two: an interrupted run ends the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from minitv import checkpoint, cli, variants
from minitv.experiment import suits
from minitv.task import Task
from minitv.tasks import load, tasks

QUICK = ("text", "masked", "speech", "pairs")  # of the kinds of tasks one each


def couples():
    """Tasks, each with up to two variants that it is for; without --full few tasks, and one variant for each."""
    for task in tasks():
        suitable = [name for name in ("transformer", "rwkv", "encoder", "conformer", "one-wide-ffn", "encoder-decoder")
                    if suits(variants.load(name), load(task))]
        yield from (pytest.param(task, name, marks=[pytest.mark.full] * (i > 0 or task not in QUICK))
                    for i, name in enumerate(suitable[:2]))


def records(folder) -> tuple[dict, list[dict]]:
    first, *rest = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return first, rest


@pytest.mark.parametrize(("task", "variant"), list(couples()))
def test_a_run_that_is_interrupted_ends_as_one_that_is_not(task, variant, tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_text("the cat sat on the mat and the dog ate the cake of the cat; " * 60)
    cls = load(task)
    few = [*["--data", str(data)] * hasattr(cls.Options(), "tokenizer"),
           *(["--eval-tokens", "200"] if hasattr(cls.Options(), "eval_tokens") else ["--eval-examples", "20"])]
    run = ["train", variant, "--task", task, "--width", "8", "--layers", "1", "--batch", "4", "--threads", "1", "--warmup", "1",
           *few]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*run, "--steps", "6", "--eval-every", "3", "--out", str(whole)]) == 0
    printed = capsys.readouterr().err
    assert all(name in printed for name in ("task ", "model ", f" {cls.unit}") if task != "text" or name != "task ")

    assert cli.main([*run, "--steps", "6", "--eval-every", "3", "--minutes", "1e-9", "--out", str(parts)]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(parts), "--minutes", "none"]) == 0
    one, other = (checkpoint.load(str(folder)).model for folder in (whole, parts))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)

    header, lines = records(whole)
    assert header["task"] == task and header["baselines"] and header["metric"]["rising"] == cls.rising
    values = [line[f"val_{cls.key}"] for line in lines if f"val_{cls.key}" in line]
    assert len(values) >= 2 and all(math.isfinite(value) for value in values)
    assert values[-1] == next(line[f"val_{cls.key}"] for line in records(parts)[1] if line["step"] == 6)


@pytest.mark.full
@pytest.mark.parametrize("task", [name for name in tasks() if load(name).suffix])
@pytest.mark.parametrize("variant", [name for name in variants.variants() if variants.load(name).causal])
def test_every_causal_variant_begins_without_knowledge_of_images_and_sound_and_learns(variant, task):
    experiment = variants.load(variant).configure(task=task, context=64, width=32, layers=2, batch=2)
    data = experiment.begin()
    model, batch = experiment.build(data.vocab), data.batch(0)
    sums = data.score(model, batch)
    assert abs(data.value(sums) - math.log2(data.vocab)) < 1 and sums[1] == batch.labels.size
    for _ in range(3):
        loss, count = data.loss(model, batch)
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.assign_(parameter.numpy() - np.float32(0.03 / count) * parameter.grad.numpy())
        model.zero_grad()
    assert data.score(model, batch)[0] < sums[0]


def test_an_accuracy_that_chance_explains_is_no_better_than_the_baseline():
    class Guessing(Task):
        baselines = {"chance": 0.125}  # noqa: RUF012

    task = Guessing()
    assert task.verdict(0.132, 2000) == "no better than any baseline yet"
    assert task.verdict(0.132, 20_000) == task.verdict(0.2, 2000) == "better than every baseline"
    assert task.verdict(0.1, 20_000) == "no better than any baseline yet"
