"""Time per token over the length of the sequence: of a training step, and of writing the next token.

    python benchmarks/scaling.py [VARIANT ...] [--lengths 256,512,...] [--rounds 3] [--threads N] [--save [--name NAME]]
    python benchmarks/scaling.py transformer longnet --lengths 1024,2048,4096,8192,16384,32768 --rounds 1 --save --name long
    python benchmarks/scaling.py retnet hyena --alone --lengths 8192 --save

The model has 2 layers of width 128; a step has as many tokens as the longest sequence (a sequence for each thread at least),
so that only their division into sequences changes. Writing is measured with a state that has read so many tokens. The lengths
alternate within a process, and every variant has processes of its own. ``state_bytes`` is the memory of the state after the
longest. ``ratio`` is the time per token at the longest sequence over that at the shortest, the median over the rounds with the
smallest and the largest. If the Transformer is among the variants, ``crossover`` is the length from which on another one is
faster than it. ``--save`` writes scaling.json in benchmarks/results/PROCESSOR and draws scaling.png beside it (with
matplotlib), where crossovers are dotted lines; with ``--name long`` they are scaling_long.json and scaling_long.png, for other
lengths.

With ``--alone`` a step has one sequence of the longest length, and steps with one thread alternate with steps with all of them;
``ratio`` is how many times as fast these are. ``--save`` then writes alone.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from rounds import known, machine, parse, run, save, warn_if_busy
from train import VOCAB, Random, writers

from autograd import no_grad
from autograd.cpu.process import blas_threads, cores
from minitv import variants
from minitv.compare import state_bytes
from minitv.experiment import Experiment
from minitv.task import Batch
from minitv.timing import crossover

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def experiment(variant: str, length: int, **values: int) -> Experiment:
    return variants.load(variant).configure("tiny", context=length, layers=2, width=128, **values)


def training(variant: str, lengths: list[int], threads: int) -> dict[int, float]:
    """Microseconds per token of a step."""
    from minitv.trainer import Trainer

    tokens, times = max(lengths), {length: [] for length in lengths}
    steps = {}
    for length in lengths:
        batch = max(tokens // length, threads)
        trainer = Trainer(experiment(variant, length, batch=batch, threads=threads), Random())
        ids = np.random.default_rng(0).integers(0, VOCAB, (batch, length + 1))
        steps[length] = trainer, Batch(ids[:, :-1].copy(), ids[:, 1:].copy())
        trainer.step(steps[length][1], 0)
    for index in range(1, 4):
        for length, (trainer, batch) in steps.items():
            start = time.perf_counter()
            trainer.step(batch, index)
            times[length].append(1e6 * (time.perf_counter() - start) / batch.inputs.size)
    return {length: min(durations) for length, durations in times.items()}


def alone(variant: str, length: int, threads: int) -> dict[int, float]:
    """Milliseconds of a step on one sequence, with one thread and with all of them."""
    from minitv.trainer import Trainer

    ids = np.random.default_rng(0).integers(0, VOCAB, (1, length + 1))
    batch, times = Batch(ids[:, :-1].copy(), ids[:, 1:].copy()), {1: [], threads: []}
    trainers = {count: Trainer(experiment(variant, length, batch=1, threads=count), Random()) for count in times}
    for index in range(4):
        for count, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(batch, index)
            times[count].append(1e3 * (time.perf_counter() - start))
    return {count: statistics.median(durations[1:]) for count, durations in times.items()}


def compare_alone(variant: str, length: int, arguments: argparse.Namespace) -> dict:
    """All rounds of ``alone``: prints the variant's row, returns its part of the JSON."""
    rounds = [run(__file__, [variant, "--alone", "--worker", "--lengths", length, "--threads", arguments.threads],
                  arguments.threads) for _ in range(arguments.rounds)]
    one, all_threads = "1", str(arguments.threads)
    quotients = [times[one] / times[all_threads] for times in rounds]
    ratio = [round(x, 2) for x in (statistics.median(quotients), min(quotients), max(quotients))]
    times = {count: round(statistics.median(times[count] for times in rounds), 1) for count in (one, all_threads)}
    print("{:<16} T = {}, batch 1: {:.0f} ms with one thread, {:.0f} ms with {}  {:.2f} times ({:.2f} to {:.2f})".format(
        variant, length, times[one], times[all_threads], all_threads, *ratio), flush=True)
    return {"ms": times, "ratio": ratio}


def writing(variant: str, lengths: list[int]) -> tuple[dict[int, float], int]:
    """Microseconds for the next token after so many, and the bytes of the state after the most."""
    from minitv.decode import decoder

    model = experiment(variant, max(lengths) + 64).build(VOCAB)
    reader, medians = decoder(model), {}
    with blas_threads(1):
        for length in lengths:
            reader.prefill(np.random.default_rng(0).integers(0, VOCAB, (1, length)))
            times = []
            for token in range(48):
                start = time.perf_counter()
                reader.step([token])
                times.append(1e6 * (time.perf_counter() - start))
            medians[length] = statistics.median(times[8:])
    with no_grad():
        _, state = model.prefill(np.zeros((1, max(lengths)), int), model.init_state(1))
    return medians, state_bytes(state)


def picture(results: dict[str, dict], lengths: list[int], name: str) -> None:
    """Both times over the length, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from minitv.picture import COLOURS

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    for axes, part in zip(figure.subplots(1, 2), ("training", "writing"), strict=True):
        for colour, (variant, numbers) in zip(COLOURS, results.items(), strict=False):
            axes.plot(lengths, [numbers[part][str(length)] for length in lengths], marker="o", color=colour, label=variant)
            if (at := numbers.get(f"{part}_crossover")) is not None:
                axes.axvline(at, color=colour, linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="length of the sequence", title=f"{part}: microseconds per token")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(machine() / f"{name}.png", facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names of `minitv list` (default: all)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help=f"default: {','.join(map(str, LENGTHS))}")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant (default: 3)")
    parser.add_argument("--threads", type=int, default=cores(), help="of training (default: the usable cores)")
    parser.add_argument("--alone", action="store_true", help="one sequence of the longest length, with one thread and with all")
    parser.add_argument("--save", action="store_true", help="write scaling.json and scaling.png for this processor")
    parser.add_argument("--name", help="of other files for the results: scaling_NAME.json and scaling_NAME.png")
    parser.add_argument("--worker", action="store_true", help="measure in this process and print one JSON line")
    arguments = parse(parser)
    names = known(arguments.variants or ["all"], writers(), parser, "VARIANT")
    lengths = [int(length) for length in arguments.lengths.split(",")]
    if arguments.alone and arguments.threads < 2:
        parser.error(f"--threads {arguments.threads}: --alone compares one thread with more, allowed: from 2")
    if arguments.worker and arguments.alone:
        print(json.dumps(alone(names[0], max(lengths), arguments.threads)))
        return
    if arguments.worker:
        (variant,) = names
        written, size = writing(variant, lengths)
        print(json.dumps({"training": training(variant, lengths, arguments.threads), "writing": written, "state_bytes": size}))
        return
    warn_if_busy()
    if arguments.alone:
        length = max(lengths)
        result = {"benchmark": "alone", "threads": arguments.threads, "rounds": arguments.rounds, "length": length,
                  "variants": {variant: compare_alone(variant, length, arguments) for variant in names}}
        print(json.dumps(save("alone", result, "variants", machine()) if arguments.save else result))
        return
    report: dict[str, dict] = {}
    for variant in names:
        rounds = [run(__file__, [variant, "--worker", "--lengths", arguments.lengths, "--threads", arguments.threads],
                      arguments.threads) for _ in range(arguments.rounds)]
        report[variant] = {"state_bytes": rounds[0]["state_bytes"]}
        for part in ("training", "writing"):
            times = {str(length): round(statistics.median(r[part][str(length)] for r in rounds), 3) for length in lengths}
            grown = [r[part][str(lengths[-1])] / r[part][str(lengths[0])] for r in rounds]
            report[variant][part] = times
            report[variant][f"{part}_ratio"] = [round(x, 2) for x in (statistics.median(grown), min(grown), max(grown))]
            row = "  ".join(f"{length}: {time:.2f}" for length, time in times.items())
            print(f"{variant:<12} {part:<9} us/token  {row}  grows {statistics.median(grown):.2f} times")
    if dense := report.get("transformer"):
        for numbers in report.values():
            for part in ("training", "writing"):
                if numbers is not dense:
                    at = [[times[part][str(length)] for length in lengths] for times in (numbers, dense)]
                    numbers[f"{part}_crossover"] = crossover(lengths, *at)
    result = {"benchmark": "scaling", "threads": arguments.threads, "rounds": arguments.rounds, "lengths": lengths,
              "variants": report}
    if arguments.save:
        name = f"scaling_{arguments.name}" if arguments.name else "scaling"
        result = save(name, result, "variants", machine())
        picture(result["variants"], lengths, name)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
