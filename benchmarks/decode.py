"""Tokens per second when writing text, one token at a time, and without our kernels, and PyTorch's.

    python benchmarks/decode.py [VARIANT ...] [--preset nanogpt-cpu ...] [--rounds 5] [--seconds 5] [--threads N] [--save]

All start from one token and write until the context is full, again and again, and draw each token from the softmax of its
logits. PyTorch has the same Transformer and MEGABYTE, with caches of keys and values, and no other variant. Rounds, ratios and
--save as in benchmarks/rounds.py.
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
EAGER = ("transformer", "megabyte")


def minitv(variant: str, preset: str, fused: bool = True):
    """Our own text, as ``minitv sample`` writes it, or without the fused step."""
    from autograd.cpu.process import blas_threads
    from autograd.random import Random
    from minitv import decode, sample

    if not fused:
        decode.decoder = decode.Decoder

    model = experiment(variant, preset).build(VOCAB)
    blas_threads(1).__enter__()
    return lambda index: sum(1 for _ in sample.generate(model, np.array([1]), model.context - 1, Random(index)))


def pytorch(variant: str, preset: str, threads: int):
    import torch

    torch.set_num_threads(threads)
    of = experiment(variant, preset)
    network = language_model(torch, variant, of.model, of.mixer, VOCAB).eval()
    caches, context = load(variant).cache(torch, of.model, of.mixer), of.model.context

    @torch.inference_mode()
    def write(index: int) -> int:
        torch.manual_seed(index)
        token = torch.ones((1, 1), dtype=torch.long)
        for position in range(context - 1):
            logits = network(token, start=position, caches=caches)[0, -1]
            token = torch.multinomial(torch.softmax(logits, -1), 1)[None]
        return context - 1

    return write


def work(contender: str, variant: str, preset: str, threads: int, seconds: float) -> dict:
    """Measure one contender in this process; ``skipped`` holds the reason if it cannot run here."""
    if contender == "eager" and variant not in EAGER:
        return {"skipped": f"only {' and '.join(EAGER)} are written for it"}
    if contender == "eager" and importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    write = pytorch(variant, preset, threads) if contender == "eager" else minitv(variant, preset, contender == "minitv")
    for index in range(3):
        write(index)
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not tokens:
        tokens += write(tokens)
    return {"tokens_per_s": tokens / elapsed, "us_per_token": 1e6 * elapsed / tokens}


def compare(variant: str, preset: str, arguments: argparse.Namespace) -> dict:
    """All rounds of a preset: prints its rows, returns its part of the JSON."""
    def measure(name: str) -> dict:
        return run(__file__, [variant, "--worker", name, "--preset", preset, "--threads", arguments.threads,
                              "--seconds", arguments.seconds], arguments.threads)

    results, skipped = alternate(["minitv", *RIVALS], measure, arguments.rounds, "tokens_per_s", f"{variant}, {preset}")
    speeds = {name: round(median(rows, "tokens_per_s"), 1) for name, rows in results.items()}
    ratio = {name: ratios(results["minitv"], rows, "tokens_per_s") for name, rows in results.items() if name != "minitv"}
    for name, speed in speeds.items():
        quotient = "" if name == "minitv" else "{:.2f} ({:.2f} to {:.2f})".format(*ratio[name])
        print(f"{variant:<12} {preset:<12} {RIVALS.get(name, name):<24} {speed:>10,.0f} tokens/s  "
              f"{1e6 / speed:>8.0f} us/token  {quotient}")
    return {"tokens_per_s": speeds, "ratio": ratio, "skipped": skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="all, or names of `minitv list` (default: transformer)")
    parser.add_argument("--preset", action="append", choices=SHAPES, help="repeat for several (default: all presets)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per process (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="of PyTorch; we write with one (default: all)")
    parser.add_argument("--save", action="store_true", help="write decode.json for this processor")
    parser.add_argument("--worker", choices=["minitv", *RIVALS], help="measure this contender here and print one JSON line")
    arguments = parse(parser)
    names = known(arguments.variants or ["transformer"], writers(), parser, "VARIANT")
    presets = arguments.preset or SHAPES
    if arguments.worker:
        print(json.dumps(work(arguments.worker, names[0], presets[0], arguments.threads, arguments.seconds)))
        return
    warn_if_busy()
    report = {variant: {preset: compare(variant, preset, arguments) for preset in presets} for variant in names}
    result = {"benchmark": "decode", "threads": arguments.threads, "rounds": arguments.rounds, "variants": report}
    if arguments.save:
        save("decode", result, "variants", machine())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
