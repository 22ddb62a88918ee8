"""Several ranks: the bytes that they send, and how fast many of them would be.

    python benchmarks/scale.py --bytes [VARIANT ...] [--save]
    python benchmarks/scale.py --measure [VARIANT ...] [--rounds 3] [--save]
    python benchmarks/scale.py --simulate [VARIANT ...] [--tokens 2048] [--alpha S --beta S] [--save]

``--bytes`` lets ranks share a sequence, as threads of one process, and counts what they send in a training step of a model of 2
layers of width 128: forward, backward, for one sequence, without the sum of gradients. What a rank sends follows from the
shapes alone, so it is the same on every machine. ``--save`` writes ranks_bytes.json in benchmarks/results and draws
ranks_bytes.png beside it (with matplotlib), where a dotted line is what sending all keys and values would take.

``--measure`` takes training steps with one rank and with two that mpiexec starts, one thread each, of a model of 2 layers of
width 128. Variants that can share one sequence of 4096 tokens; the others share a batch of 16 sequences of 256. ``strong`` is
the time of one rank for all of it over twice the time of two ranks, ``weak`` the time of one rank for half of it over the time
of two for all of it. ``--save`` writes ranks_measured.json in benchmarks/results/PROCESSOR.

``--simulate`` replays a training step on 1 to 4096 ranks that share one sequence, each with so many tokens of it, so that the
text grows with their number. The model has 4 layers of width 128. One rank out of the middle of so many is run here, with
a communicator that takes all messages and gives zeros: the times between its messages are the compute, and who sends how much
to whom is known exactly. A message of n bytes takes alpha + n beta seconds; both are measured by a ping-pong of two processes
(mpiexec), unless they are given. The gradients are summed as autograd/ranks does it. ``efficiency`` is the time of a step on
one rank over that on R ranks. ``--save`` writes ranks_simulated.json in benchmarks/results/PROCESSOR and draws
ranks_simulated.png beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rounds import RESULTS, known, machine, parse, save, warn_if_busy

from autograd import cross_entropy
from autograd.cpu.process import blas_threads
from autograd.random import Random
from autograd.ranks import Communicator
from autograd.ranks.threads import run
from minitv import variants
from minitv.sequence import Share, sharing

VOCAB = 64
RANKS = tuple(2**i for i in range(13))
LENGTHS, SHARERS = (256, 512, 1024, 2048, 4096), (2, 4, 8, 16)
LAYERS, WIDTH = 4, 128
MODELS = ("longnet", "retnet")
SAMPLES = 9  # ranks whose messages stand for those of all


def build(variant: str, context: int, **values: Any):
    experiment = variants.load(variant).configure(context=context, **values)
    return experiment.variant.build(experiment.model, experiment.mixer, VOCAB, Random(0))


def step(model, part: Share, ids: np.ndarray) -> None:
    """Forward and backward of one sequence, of which this rank has a share."""
    with sharing(part):
        cross_entropy(model(ids), np.roll(ids, -1, axis=1), reduction="sum").backward(sink=lambda parameter, gradient: None)


# -- bytes -------------------------------------------------------------------------------------------------------------
def sent(variant: str, length: int, ranks: int) -> int:
    """By the rank that sends most."""
    def work(communicator: Communicator) -> int:
        part = Share(communicator, length // ranks)
        step(build(variant, length, layers=2, width=128), part, np.zeros((1, part.length), np.intp))
        return communicator.sent

    return max(run(ranks, work))


def everything(length: int, ranks: int) -> int:
    """If a rank of the same model sent all its keys and values to all others, and their gradients came back."""
    return 2 * 2 * 2 * (length // ranks) * 128 * 4 * (ranks - 1)


def count_bytes(names: list[str], ranks: int) -> dict:
    report = {}
    for name in names:
        by_length = {str(length): sent(name, length, ranks) for length in LENGTHS}
        by_ranks = {str(count): sent(name, LENGTHS[-1], count) for count in SHARERS}
        report[name] = {"length": by_length, "ranks": by_ranks}
        print(f"{name:<16} " + "  ".join(f"T = {n}: {b / 1e3:,.1f} kB" for n, b in by_length.items()), flush=True)
        print(f"{'':<16} " + "  ".join(f"R = {n}: {b / 1e3:,.1f} kB" for n, b in by_ranks.items()), flush=True)
    return {"benchmark": "ranks_bytes", "ranks": ranks, "lengths": list(LENGTHS), "variants": report,
            "everything": {str(length): everything(length, ranks) for length in LENGTHS}}


def picture_of_bytes(result: dict) -> None:
    """Over the length of the sequence, on logarithmic axes."""
    lengths = result["lengths"]
    lines = {variant: [numbers["length"][str(n)] / 1e3 for n in lengths] for variant, numbers in result["variants"].items()}
    lines["all keys and values"] = [result["everything"][str(n)] / 1e3 for n in lengths]
    draw(RESULTS / "ranks_bytes.png", lengths, lines, "length of the sequence",
         f"kB that a rank sends in a step, {result['ranks']} ranks", yscale="log")


def picture_of_efficiency(result: dict) -> None:
    """Over the number of ranks."""
    lines = {variant: [parts["efficiency"] for parts in of_ranks.values()] for variant, of_ranks in result["variants"].items()}
    counts = [int(ranks) for ranks in next(iter(result["variants"].values()))]
    draw(machine() / "ranks_simulated.png", counts, lines, "ranks",
         f"efficiency of a step, {result['tokens']} tokens a rank, simulated", ylim=(0, 1.05))


def draw(path: Path, x: list[int], lines: dict[str, list[float]], xlabel: str, title: str, **axis: Any) -> None:
    from matplotlib.figure import Figure

    from minitv.picture import COLOURS

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, (name, y) in zip(itertools.cycle(COLOURS), lines.items(), strict=False):
        rule = dict(color="#888888", linestyle=":") if name not in variants.variants() else dict(color=colour, marker="o")
        axes.plot(x, y, label=name, **rule)
    axes.set(xscale="log", xlabel=xlabel, title=title, **axis)
    axes.set_xticks(x, [str(value) for value in x], rotation=45 if len(x) > 8 else 0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, facecolor="white")


# -- simulation --------------------------------------------------------------------------------------------------------
class Event(NamedTuple):
    """What a rank does between two points of a step: it computes, sends, and waits for what it receives, ranks by distance."""

    seconds: float
    out: dict[int, int]  # bytes
    into: dict[int, int]


class Alone(Communicator):
    """A rank among others that do not exist: they take what is sent, and send zeros at once."""

    kind = "alone"

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self.events: list[Event] = []
        self.since = 0.0

    def begin(self) -> None:
        self.events, self.since = [], time.perf_counter()

    def end(self) -> list[Event]:
        return [*self.events, Event(time.perf_counter() - self.since, {}, {})]

    def _exchange(self, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        seconds = time.perf_counter() - self.since
        out, into = ({rank - self.rank: block.nbytes for rank, block in enumerate(blocks)
                      if block is not None and rank != self.rank} for blocks in (outgoing, incoming))
        for block in incoming:
            if block is not None:
                block[...] = 0
        self.events.append(Event(seconds, out, into))
        self.since = time.perf_counter()


def patterns(length: int) -> dict[str, str]:
    """LongNet's default patterns for a text that is longer than a context may be."""
    rungs = ((length - 1) // 32).bit_length() + 1
    return {"segments": ",".join(f"{32 << i}:{1 << i}" for i in range(rungs))}


class Traces:
    """What ranks do in a step of one sequence of which each has so many tokens."""

    def __init__(self, variant: str, tokens: int):
        self.variant, self.tokens = variant, tokens
        self.ids = np.random.default_rng(0).integers(0, VOCAB, (1, tokens))
        self.gradient = 4 * sum(p.size for p in self.model(1).parameters())  # bytes

    def model(self, ranks: int):
        more = patterns(ranks * self.tokens) if self.variant == "longnet" else {}
        return build(self.variant, 64, layers=LAYERS, width=WIDTH, **more)

    def measure(self, rounds: int) -> None:
        """What the rank in the middle does, for every number of ranks by turns: of every time the median of the rounds."""
        models = {ranks: self.model(ranks) for ranks in RANKS}
        found = [{ranks: self.of(model, ranks // 2, ranks) for ranks, model in models.items()} for _ in range(rounds + 1)][1:]
        self.middle = {ranks: tuple([event._replace(seconds=statistics.median(half[i].seconds for half in times))
                                     for i, event in enumerate(times[0])]
                                    for times in zip(*(one[ranks] for one in found), strict=True)) for ranks in RANKS}

    def of(self, model, rank: int, ranks: int) -> tuple[list[Event], list[Event]]:
        """Forward and backward of a rank."""
        alone = Alone(rank, ranks)
        with sharing(Share(alone, self.tokens) if ranks > 1 else None):
            alone.begin()
            loss = cross_entropy(model(self.ids), np.roll(self.ids, -1, axis=1), reduction="sum")
            forward = alone.end()
            alone.begin()
            loss.backward(sink=lambda parameter, gradient: None)
            return forward, alone.end()

    def replay(self, ranks: int, alpha: float, beta: float) -> dict[str, float]:
        """The seconds of a step, and what they consist of."""
        def most(event: Event) -> float:
            return (alpha * max(len(event.out), len(event.into))
                    + beta * max(sum(event.out.values()), sum(event.into.values())))

        forward, backward = self.middle[ranks]
        compute = sum(event.seconds for event in (*forward, *backward))
        if all(abs(other) == 1 for event in forward for other in (*event.out, *event.into)):
            total = max(chained(backward, ranks, chained(forward, ranks, [0.0] * ranks, -1, alpha, beta), 1, alpha, beta))
        else:
            model = self.model(ranks)
            places = sorted({min(ranks * i // (SAMPLES - 1), ranks - 1) for i in range(SAMPLES)})
            events = zip(*((*f, *b) for f, b in (self.of(model, rank, ranks) for rank in places)), strict=True)
            total = compute + sum(max(map(most, same)) for same in events)  # all wait for the one that has most to do
        gradients = 2 * (ranks - 1) * (alpha + beta * self.gradient / ranks)  # Communicator.sum: every rank a part
        return {"seconds": total + gradients, "compute": compute, "exchange": total - compute, "gradients": gradients}


def chained(events: list[Event], ranks: int, begin: list[float], source: int, alpha: float, beta: float) -> list[float]:
    """When each rank ends, if all do the same but for the ends of the chain, and each waits for its neighbour ``source``."""
    ends, came = [0.0] * ranks, []
    for rank in range(ranks)[::-source]:
        now, sent, received = begin[rank], [], 0
        for event in events:
            now += event.seconds
            for size in event.out.values():
                now += alpha
                sent.append(now + beta * size)
            if event.into:
                if came:
                    now = max(now, came[received])
                received += 1
        ends[rank], came = now, sent
    return ends


def simulate(names: list[str], tokens: int, alpha: float, beta: float, rounds: int) -> dict:
    report = {}
    print(f"a message of n bytes takes {1e6 * alpha:.3g} us + n / {1e-9 / beta:.3g} GB/s")
    for name in names:
        traces, report[name] = Traces(name, tokens), {}
        with blas_threads(1):
            traces.measure(rounds)
            for ranks in RANKS:
                parts = traces.replay(ranks, alpha, beta)
                parts["efficiency"] = report[name].get("1", parts)["seconds"] / parts["seconds"]
                report[name][str(ranks)] = {key: round(value, 6) for key, value in parts.items()}
                print(f"{name:<8} {ranks:>4} ranks, {ranks * tokens:>9,} tokens: {1e3 * parts['seconds']:10,.1f} ms, of which "
                      f"compute {1e3 * parts['compute']:,.1f}, exchange and waiting {1e3 * parts['exchange']:,.1f}, sum of "
                      f"gradients {1e3 * parts['gradients']:,.1f}; efficiency {parts['efficiency']:.3f}", flush=True)
        print(f"{name:<8} {breaks_first(report[name])}")
    return {"benchmark": "ranks_simulated", "threads": 1, "rounds": rounds, "tokens": tokens, "layers": LAYERS, "width": WIDTH,
            "alpha_us": 1e6 * alpha, "beta_gb_s": 1e-9 / beta, "variants": report}


def breaks_first(of_ranks: dict[str, dict]) -> str:
    """From which number of ranks on the efficiency is below one half, and what takes most of the time then."""
    words = {"exchange": "what layers exchange, and waiting for it", "gradients": "the sum of the gradients",
             "more": "what layers compute more than on one rank"}
    for ranks, parts in of_ranks.items():
        parts = parts | {"more": parts["compute"] - of_ranks["1"]["compute"]}
        if parts["efficiency"] < 0.5:
            return f"below one half from {ranks} ranks on: first of all by {words[max(words, key=parts.get)]}"
    return f"above one half up to {ranks} ranks; most of the loss there is {words[max(words, key=parts.get)]}"


def pingpong() -> None:
    """On both of two ranks: prints alpha and 1 / beta as JSON, the medians of many messages."""
    from autograd.ranks.mpi import world

    ranks, times = world(), {}
    for size, count in ((8, 2000), (2**22, 60)):
        block, durations = np.zeros(size, np.uint8), []
        for _ in range(count):
            start = time.perf_counter()
            for turn in (0, 1):
                if ranks.rank == turn:
                    ranks.exchange([None if i == turn else block for i in range(2)], [None, None])
                else:
                    ranks.exchange([None, None], [block if i == turn else None for i in range(2)])
            durations.append((time.perf_counter() - start) / 2)
        times[size] = statistics.median(durations)
    if ranks.rank == 0:
        print(json.dumps({"alpha": times[8], "beta": (times[2**22] - times[8]) / 2**22}))


# -- measurement -------------------------------------------------------------------------------------------------------
def steps(variant: str) -> None:
    """On every rank: prints the milliseconds of a step on all the work, and on one rank also on half of it, as JSON."""
    from train import Random as AnyText

    from minitv.job import launched
    from minitv.task import Batch
    from minitv.trainer import Trainer

    ranks = Communicator()
    if launched() is not None:
        from autograd.ranks.mpi import world

        ranks = world()
    shares, sizes = bool(variants.load(variant).on_ranks), {}
    for part in ("all", "half")[:3 - ranks.size]:
        rows, length = (1, 4096) if shares else (16, 256)
        if part == "half":
            rows, length = (1, 2048) if shares else (8, 256)
        experiment = variants.load(variant).configure(context=length, layers=2, width=128, batch=rows, threads=1,
                                                      sequence_ranks=ranks.size if shares else 1)
        ids = np.random.default_rng(0).integers(0, VOCAB, (rows, length + 1))
        sizes[part] = Trainer(experiment, AnyText(), ranks), Batch(ids[:, :-1].copy(), ids[:, 1:].copy()), []
    for number in range(6):
        for trainer, batch, times in sizes.values():
            start = time.perf_counter()
            trainer.step(batch, number)
            times.append(1e3 * (time.perf_counter() - start))
    if ranks.rank == 0:
        print(json.dumps({part: statistics.median(times[1:]) for part, (*_, times) in sizes.items()}))


def launch(ranks: int, *arguments: str) -> dict:
    """The JSON that this script prints last on so many ranks."""
    if ranks > 1 and shutil.which("mpiexec") is None:
        raise SystemExit('scale.py: two ranks need mpiexec: pip install "minitv[mpi]"')
    before = ["mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py"] if ranks > 1 else [sys.executable]
    result = subprocess.run([*before, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(result.stdout.splitlines()[-1])


def measure(names: list[str], rounds: int) -> dict:
    found: dict[str, list[tuple[dict, dict]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append((launch(1, name, "--steps"), launch(2, name, "--steps")))
    report = {}
    for name, pairs in found.items():
        ms = {key: statistics.median(pair[side][part] for pair in pairs)
              for key, side, part in (("one", 0, "all"), ("half", 0, "half"), ("two", 1, "all"))}
        ratios = {"strong": [one["all"] / two["all"] / 2 for one, two in pairs],
                  "weak": [one["half"] / two["all"] for one, two in pairs]}
        report[name] = {"shares": "a sequence" if variants.load(name).on_ranks else "a batch",
                        "ms": {key: round(value, 1) for key, value in ms.items()},
                        **{key: [round(x, 3) for x in (statistics.median(values), min(values), max(values))]
                           for key, values in ratios.items()}}
        print(f"{name:<12} shares {report[name]['shares']}: {ms['one']:,.0f} ms with one rank, {ms['two']:,.0f} with two; "
              "efficiency strong {:.2f}, weak {:.2f}".format(report[name]["strong"][0], report[name]["weak"][0]), flush=True)
    return {"benchmark": "ranks_measured", "threads": 1, "rounds": rounds, "variants": report}


def network() -> tuple[float, float]:
    """alpha and beta of two processes on this machine."""
    found = launch(2, "--pingpong")
    return found["alpha"], found["beta"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names of `minitv list` (default: all that can; "
                        f"{' and '.join(MODELS)} with --simulate)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bytes", action="store_true", help="count what ranks send")
    what.add_argument("--simulate", action="store_true", help="replay a step on 1 to 4096 ranks")
    what.add_argument("--measure", action="store_true", help="time steps of one rank and of two")
    what.add_argument("--steps", action="store_true", help="one side of --measure, on every rank")
    what.add_argument("--pingpong", action="store_true", help="measure messages of two ranks that mpiexec has started")
    parser.add_argument("--ranks", type=int, default=4, help="with --bytes: for the sequences of all lengths (default: 4)")
    parser.add_argument("--tokens", type=int, default=2048, help="with --simulate: of each rank (default: 2048)")
    parser.add_argument("--rounds", type=int, default=3, help="with --measure and --simulate (default: 3)")
    parser.add_argument("--alpha", type=float, help="seconds that a message takes without its bytes")
    parser.add_argument("--beta", type=float, help="seconds for a byte")
    parser.add_argument("--save", action="store_true", help="write the results")
    arguments = parse(parser)
    if arguments.pingpong:
        return pingpong()
    if arguments.steps:
        return steps(*arguments.variants)
    able = [name for name in variants.variants() if variants.load(name).on_ranks]
    if arguments.measure:
        names = known(arguments.variants or [*MODELS, "transformer"], variants.variants(), parser, "VARIANT")
        warn_if_busy()
        result = measure(names, arguments.rounds)
        print(json.dumps(save("ranks_measured", result, "variants", machine()) if arguments.save else result))
        return None
    names = known(arguments.variants or (["all"] if arguments.bytes else list(MODELS)), able, parser, "VARIANT")
    if arguments.bytes:
        result = count_bytes(names, arguments.ranks)
        if arguments.save:
            result = save("ranks_bytes", result, "variants")
            picture_of_bytes(result)
    else:
        if (arguments.alpha is None) != (arguments.beta is None):
            parser.error("--alpha and --beta: give both or none")
        warn_if_busy()
        given = arguments.alpha is not None
        alpha, beta = (arguments.alpha, arguments.beta) if given else network()
        result = simulate(names, arguments.tokens, alpha, beta, arguments.rounds)
        if arguments.save:
            result = save("ranks_simulated", result | {"network": "given" if given else "ping-pong"}, "variants", machine())
            picture_of_efficiency(result)
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
