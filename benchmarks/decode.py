"""Tokens per second when writing text, one token at a time, and without our kernels, and PyTorch's.

    python benchmarks/decode.py [VARIANT ...] [--preset nanogpt-cpu ...] [--rounds 5] [--seconds 5] [--threads N] [--save]
    python benchmarks/decode.py --batch 16 --batch 64 [--save]          so many texts side by side, also against one alone

All start from one token and write until the context is full, again and again, and draw each token from the softmax of its
logits. A step reads the weights of all layers once, whatever the number of texts: how many bytes that is, and which share of
the speed of memory it needs, stands in the table. PyTorch has the same Transformer and MEGABYTE, with caches of keys and
values, and no other variant. Rounds, ratios and --save as in benchmarks/rounds.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time

import numpy as np
from rivals import language_model, load
from rounds import alternate, known, machine, median, parse, ratios, run, save, warn_if_busy
from train import SHAPES, VOCAB, experiment, writers

from autograd.cpu.process import cores

RIVALS = {"eager": "PyTorch eager", "operators": "through our operators"}
ALONE = "alone"  # the contender that is our own writing of one text, where several are written
EAGER = ("transformer", "megabyte")


def minitv(variant: str, preset: str, threads: int, batch: int, fused: bool = True):
    """Our own texts, as ``minitv sample`` writes them, or without the fused step."""
    from autograd.cpu.process import blas_threads
    from autograd.random import Random
    from minitv import decode, sample

    if not fused:
        decode.unread = lambda model: "the operators are measured"

    model = experiment(variant, preset).build(VOCAB)
    blas_threads(1).__enter__()

    def write(index: int) -> int:
        rngs = list(map(Random(index).split, range(batch)))
        return sum(map(len, sample.together(model, np.array([[1]]), model.context - 1, rngs, threads=threads)))

    return write


def bytes_of_step(variant: str, preset: str) -> int:
    """How many bytes of weights a step reads: all but the rows of tables that other tokens and positions have."""
    model = experiment(variant, preset).build(VOCAB)
    tables = {id(table) for table in (model.embed.weight, model.positions)} - {id(model.head.weight)}
    return sum(parameter.data.nbytes for parameter in model.parameters() if id(parameter) not in tables)


def pytorch(variant: str, preset: str, threads: int, batch: int):
    import torch

    torch.set_num_threads(threads)
    of = experiment(variant, preset)
    network = language_model(torch, variant, of.model, of.mixer, VOCAB).eval()
    caches, context = load(variant).cache(torch, of.model, of.mixer, batch), of.model.context

    @torch.inference_mode()
    def write(index: int) -> int:
        torch.manual_seed(index)
        tokens = torch.ones((batch, 1), dtype=torch.long)
        for position in range(context - 1):
            logits = network(tokens, start=position, caches=caches)[:, -1]
            tokens = torch.multinomial(torch.softmax(logits, -1), 1)
        return batch * (context - 1)

    return write


def work(contender: str, variant: str, preset: str, threads: int, seconds: float, batch: int) -> dict:
    """Measure one contender in this process; ``skipped`` holds the reason if it cannot run here."""
    if contender == "eager" and variant not in EAGER:
        return {"skipped": f"only {' and '.join(EAGER)} are written for it"}
    if contender == "eager" and importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    if contender == "eager":
        write = pytorch(variant, preset, threads, batch)
    else:
        write = minitv(variant, preset, threads, 1 if contender == ALONE else batch, contender != "operators")
    for index in range(3 if batch == 1 else 1):
        write(index)
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not tokens:
        tokens += write(tokens)
    return {"tokens_per_s": tokens / elapsed, "us_per_token": 1e6 * elapsed / tokens}


def compare(variant: str, preset: str, batch: int, arguments: argparse.Namespace) -> dict:
    """All rounds of a preset: prints its rows, returns its part of the JSON."""
    def measure(name: str) -> dict:
        return run(__file__, [variant, "--worker", name, "--preset", preset, "--threads", arguments.threads,
                              "--seconds", arguments.seconds, "--batch", batch], arguments.threads)

    what = f"{variant}, {preset}" + (f", {batch} texts" if batch > 1 else "")
    contenders = ["minitv", *RIVALS, *([ALONE] if batch > 1 else [])]
    results, skipped = alternate(contenders, measure, arguments.rounds, "tokens_per_s", what)
    speeds = {name: round(median(rows, "tokens_per_s"), 1) for name, rows in results.items()}
    ratio = {name: ratios(results["minitv"], rows, "tokens_per_s") for name, rows in results.items() if name != "minitv"}
    for name, speed in speeds.items():
        quotient = "" if name == "minitv" else "{:.2f} ({:.2f} to {:.2f})".format(*ratio[name])
        print(f"{what:<36} {RIVALS.get(name, name):<24} {speed:>10,.0f} tokens/s  {1e6 / speed:>8.0f} us/token  {quotient}")
    return {"batch": batch, "tokens_per_s": speeds, "ratio": ratio, "skipped": skipped,
            "bytes_of_step": bytes_of_step(variant, preset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="all, or names of `minitv list` (default: transformer)")
    parser.add_argument("--preset", action="append", choices=SHAPES, help="repeat for several (default: all presets)")
    parser.add_argument("--batch", type=int, action="append", metavar="N",
                        help="texts that are written side by side; repeat for several (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per process (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="one text is written by one of ours (default: all)")
    parser.add_argument("--save", action="store_true",
                        help="write decode.json, or together.json of several texts, for this processor")
    parser.add_argument("--worker", choices=["minitv", *RIVALS, ALONE],
                        help="measure this contender here and print one JSON line")
    arguments = parse(parser)
    names = known(arguments.variants or ["transformer"], writers(), parser, "VARIANT")
    presets, batches = arguments.preset or SHAPES, arguments.batch or [1]
    if min(batches) < 1 or (1 in batches and len(batches) > 1):
        parser.error(f"--batch: {batches}, allowed: 1 alone, or numbers above it")
    if arguments.worker:
        print(json.dumps(work(arguments.worker, names[0], presets[0], arguments.threads, arguments.seconds, batches[0])))
        return
    warn_if_busy()
    report = {variant: {preset if batch == 1 else f"{preset}, {batch} texts": compare(variant, preset, batch, arguments)
                        for preset in presets for batch in batches} for variant in names}
    name = "decode" if batches == [1] else "together"
    result = {"benchmark": name, "threads": arguments.threads, "rounds": arguments.rounds, "variants": report}
    if arguments.save:
        save(name, result, "variants", machine())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
