"""Reformer's synthetic task at a small size: write a word again, and read it with other rounds of hashing than in training.

    python benchmarks/duplication.py [--word 127] [--steps 600] [--threads N] [--save]

The paper (arXiv 2001.04451, section 5.1, Table 2) trains models of one layer on 0w0w, where w has 511 symbols, for 150 000
steps: with full attention, and with 4, 2 and 1 rounds of hashing. Each is then evaluated with full attention and with 8, 4, 2
and 1 rounds. Here the task is ``copy``, which has no first 0, and words are shorter. A row of the table is a model, a column
what it is evaluated with, a number the share of right answers in the second half, in percent. Rotations of evaluation are
drawn ``--draws`` times, and the mean is given. ``--save`` writes benchmarks/results/duplication.json, which
benchmarks/report.py quotes.

The paper's pattern, which the last lines check: more rounds in evaluation are better, and so are more in training; a model that
was trained with full attention loses most with few rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import numpy as np
from rounds import save, warn_if_busy

from autograd.cpu.process import cores
from autograd.random import Random
from minitv import variants
from minitv.experiment import Experiment
from minitv.trainer import Trainer

TRAINED = {"full": {"mixers": "full"}, "LSH-4": {"rounds": 4}, "LSH-2": {"rounds": 2}, "LSH-1": {"rounds": 1}}
EVALUATED = {"full": {"mixers": "full"}, **{f"LSH-{rounds}": {"mixers": "lsh", "rounds": rounds, "eval_rounds": None}
                                            for rounds in (8, 4, 2, 1)}}


def trained(experiment: Experiment, title: str) -> tuple[Trainer, list[float]]:
    """The trainer after all steps, and the loss of every hundredth step in nats."""
    task, losses, begin = experiment.begin(), [], time.perf_counter()
    trainer = Trainer(experiment, task)
    for step in range(experiment.run.steps):
        loss = trainer.step(task.batch(step), step)
        if step % 100 == 99:
            losses.append(round(loss, 4))
            print(f"\r{title}: step {step + 1}, loss {loss:.3f}, {time.perf_counter() - begin:.0f} s ", end="", flush=True)
    print()
    return trainer, losses


def accuracy(trainer: Trainer, experiment: Experiment, draws: int) -> float:
    """Right answers of the trained weights in another experiment's model, in percent: the mean over draws of its rotations."""
    own, model = trainer.model, experiment.build(trainer.task.vocab)
    weights = {name: parameter.numpy() for name, parameter in own.named_parameters()}
    found = []
    for draw in range(draws):
        model.begin_step(draw, Random(1))
        model.load({**model.state(), **weights})
        trainer.model = model
        sums = trainer.evaluate(trainer.task.held_out())
        found.append(100 * float(sums[2] / sums[1]))
    trainer.model = own
    return round(float(np.mean(found)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--word", type=int, default=127, help="symbols of a word (default: 127)")
    parser.add_argument("--symbols", type=int, default=128, help="different symbols, the sign among them (default: 128)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: 128)")
    parser.add_argument("--heads", type=int, default=4, help="default: 4")
    parser.add_argument("--buckets", type=int, default=16, help="of a round (default: 16)")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step (default: 32)")
    parser.add_argument("--steps", type=int, default=600, help="of each of the four models (default: 600)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: 0.003)")
    parser.add_argument("--draws", type=int, default=4, help="rotations of an evaluation (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--threads", type=int, default=cores(), help="worker threads (default: the usable cores)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/duplication.json")
    arguments = parser.parse_args()
    warn_if_busy()
    length = 2 * arguments.word
    base = variants.load("reformer").configure(
        task="copy", context=length, symbols=arguments.symbols, layers=1, width=arguments.width, heads=arguments.heads,
        buckets=arguments.buckets, ffn_width=1.0, batch=arguments.batch, steps=arguments.steps, lr=arguments.lr, warmup=100,
        seed=arguments.seed, threads=arguments.threads, eval_examples=256, tied=False)
    table, losses = {}, {}
    for name, options in TRAINED.items():
        trainer, losses[name] = trained(base.replace(**options), name)
        table[name] = {how: accuracy(trainer, base.replace(**other), 1 if how == "full" else arguments.draws)
                       for how, other in EVALUATED.items()}
        trainer.close()
    print(f"\n{'trained':<10}" + "".join(f"{how:>8}" for how in EVALUATED))
    for name, row in table.items():
        print(f"{name:<10}" + "".join(f"{value:>8.1f}" for value in row.values()))
    rounds = [how for how in EVALUATED if how != "full"]
    pattern = {
        "more rounds in evaluation are better": all(row[a] >= row[b] - 1 for row in table.values()
                                                    for a, b in itertools.pairwise(rounds)),
        "more rounds in training are better, evaluated with one": table["LSH-4"]["LSH-1"] >= table["LSH-1"]["LSH-1"] - 1,
        "full attention loses most with one round": min(table, key=lambda name: table[name]["LSH-1"]) == "full",
    }
    for statement, holds in pattern.items():
        print(f"{statement}: {'yes' if holds else 'no'}")
    result = {"benchmark": "duplication", "threads": arguments.threads, "rounds": 1,
              "options": {k: v for k, v in vars(arguments).items() if k not in ("save", "threads")},
              "accuracy": table, "losses": losses, "pattern": pattern}
    if arguments.save:
        save("duplication", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
