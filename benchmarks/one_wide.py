"""What sharing and dropping feed-forward networks costs and gains: One Wide FFN's trade at a small size.

    python benchmarks/one_wide.py [MODE ...] [--rules reverse,sort,add] [--steps 1000] [--seeds 1] [--rounds 5] [--save]

The modes have the paper's names (arXiv 2309.01826, Tables 2 to 4). Each is trained for each rule of the task pairs, from
scratch and with the same batches, and is then asked for held-out pairs: the share of targets that it writes without a mistake.
One Wide FFN has as many weights as the Transformer, the others have fewer.

The speed of writing does not depend on what was learned. A process with new weights reads sources of ``--length`` tokens and
writes as many tokens, one after the other, for one source and for ``--batch`` sources at once, in the sizes of ``--presets``.
Contenders alternate, and ``ratio`` is the speed over that of the Transformer within a round: the median, the smallest and the
largest. The time includes that of reading the source, which is given beside it. ``--save`` writes
benchmarks/results/one_wide.json, which benchmarks/report.py quotes; modes that were measured before with the same settings stay
there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from rounds import alternate, known, median, ratios, run, save, warn_if_busy

from autograd import no_grad
from autograd.cpu.process import blas_threads, cores
from minitv import variants
from minitv.experiment import Experiment
from minitv.options import PRESETS
from minitv.trainer import Trainer

BASE = "Transformer"
MODES = {  # the variant, and its options
    BASE: ("encoder-decoder", {}),
    "SharedEnc": ("one-wide-ffn", dict(share="encoder", drop="none", widen=1.0)),
    "SharedDec": ("one-wide-ffn", dict(share="decoder", drop="none", widen=1.0)),
    "SharedEncSharedDec": ("one-wide-ffn", dict(share="each", drop="none", widen=1.0)),
    "SharedEncDec": ("one-wide-ffn", dict(share="all", drop="none", widen=1.0)),
    "NoEnc": ("one-wide-ffn", dict(share="none", drop="encoder", widen=1.0)),
    "NoDec": ("one-wide-ffn", dict(share="none", drop="decoder", widen=1.0)),
    "NoEncNoDec": ("one-wide-ffn", dict(share="none", drop="both")),
    "SharedEncNoDec": ("one-wide-ffn", dict(share="encoder", drop="decoder", widen=1.0)),
    "One Wide FFN": ("one-wide-ffn", {}),
}
RULES = ("reverse", "sort", "add")
VOCAB = 65
WARM = 3  # targets that are not timed


def experiment(mode: str, preset: str, **values: object) -> Experiment:
    variant, options = MODES[mode]
    return variants.load(variant).configure(preset, task="pairs", **options, **values)


def accuracy(mode: str, rule: str, seed: int, arguments: argparse.Namespace) -> float:
    """The share of held-out targets that a newly trained model writes without a mistake."""
    longest = {"longest": arguments.digits} if rule == "add" else {}
    setup = experiment(mode, "tiny", rule=rule, layers=arguments.layers, steps=arguments.steps, lr=arguments.lr, seed=seed,
                       threads=arguments.threads, eval_examples=arguments.examples, **longest)
    task, begin = setup.begin(), time.perf_counter()
    trainer = Trainer(setup, task)
    try:
        for step in range(setup.run.steps):
            loss = trainer.step(task.batch(step), step)
            if step % 100 == 99 or step == setup.run.steps - 1:
                print(f"\r{mode}, {rule}, seed {seed}: step {step + 1}, loss {loss:.4f}, {time.perf_counter() - begin:.0f} s ",
                      end="", flush=True)
        share = task.value(trainer.evaluate(task.held_out()))
    finally:
        trainer.close()
    print(f" sequence accuracy {share:.3f}")
    return round(share, 4)


def writing(mode: str, preset: str, batch: int, length: int, seconds: float) -> dict[str, float]:
    """Tokens per second, and the milliseconds of reading the sources."""
    model, rng = experiment(mode, preset).build(VOCAB), np.random.default_rng(0)
    source, target = (rng.integers(0, VOCAB, (batch, length)) for _ in range(2))
    reads, times, begin = [], [], time.perf_counter()
    with no_grad(), blas_threads(1):
        while len(times) < WARM + 3 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            state = model.begin(source)
            reads.append(time.perf_counter() - start)
            for t in range(length):
                _, state = model.prefill(target[:, t : t + 1], state)
            times.append(time.perf_counter() - start)
    return {"tokens_per_s": batch * length / statistics.median(times[WARM:]), "read_ms": 1e3 * statistics.median(reads[WARM:])}


def speeds(modes: list[str], preset: str, batch: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """The speed of writing of every mode, beside the Transformer's in the same rounds."""
    def measure(mode: str) -> dict:
        return run(__file__, [mode, "--worker", preset, "--batch", batch, "--length", arguments.length, "--seconds",
                              arguments.seconds], 1)

    contenders = list(dict.fromkeys([BASE, *modes]))
    results, _ = alternate(contenders, measure, arguments.rounds, "tokens_per_s", f"writing, {preset}, {batch} at once")
    return {mode: {"tokens_per_s": round(median(rows, "tokens_per_s"), 1), "read_ms": round(median(rows, "read_ms"), 3),
                   "ratio": ratios(rows, results[BASE], "tokens_per_s")} for mode, rows in results.items() if mode in modes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"{', '.join(MODES)} (default: all)")
    parser.add_argument("--rules", default=",".join(RULES), help=f"of the task pairs (default: {','.join(RULES)})")
    parser.add_argument("--digits", type=int, default=4, help="--longest of sums; numbers have half of it (default: 4)")
    parser.add_argument("--layers", type=int, default=2, help="of encoder and decoder (default: 2)")
    parser.add_argument("--steps", type=int, default=1000, help="of each training (default: 1000)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: 0.003)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each mode and rule (default: 1)")
    parser.add_argument("--examples", type=int, default=1000, help="held-out pairs (default: 1000)")
    parser.add_argument("--presets", default="tiny,small", help="sizes whose speed is measured (default: tiny,small)")
    parser.add_argument("--batch", type=int, default=32, help="sources at once (default: 32)")
    parser.add_argument("--length", type=int, default=48, help="tokens of a source and of a target (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per mode and size (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per process (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="of training; one writes (default: the usable cores)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/one_wide.json")
    parser.add_argument("--worker", choices=PRESETS, help="measure the speed of one mode in this process, in this size")
    arguments = parser.parse_args()
    modes = known(arguments.modes or ["all"], MODES, parser, "MODE")
    if arguments.worker:
        print(json.dumps(writing(modes[0], arguments.worker, arguments.batch, arguments.length, arguments.seconds)))
        return
    rules = known(arguments.rules.split(","), RULES, parser, "--rules")
    presets = known(arguments.presets.split(","), PRESETS, parser, "--presets")
    warn_if_busy()
    report: dict[str, dict] = {}
    for mode in modes:
        setup = experiment(mode, "tiny", layers=arguments.layers)
        report[mode] = {"sizes": setup.build(VOCAB).sizes()._asdict()}
    for preset in presets:
        for batch in (1, arguments.batch):
            for mode, numbers in speeds(modes, preset, batch, arguments).items():
                report[mode].setdefault("writing", {}).setdefault(preset, {})[str(batch)] = numbers
                print(f"{mode:<20} {preset:<12} {batch:>3} at once: {numbers['tokens_per_s']:>9,.0f} tokens/s, "
                      f"{numbers['ratio'][0]:.2f} times the {BASE}, source read in {numbers['read_ms']:.2f} ms")
    for rule in rules:
        for mode in modes:
            report[mode].setdefault("accuracy", {})[rule] = [accuracy(mode, rule, seed, arguments)
                                                             for seed in range(arguments.seeds)]
    result = {"benchmark": "one_wide", "threads": arguments.threads, "rounds": arguments.rounds,
              "options": {name: value for name, value in vars(arguments).items()
                          if name not in ("modes", "threads", "rounds", "save", "worker")}, "modes": report}
    if arguments.save:
        save("one_wide", result, "modes")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
