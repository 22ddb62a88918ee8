"""Tokens per second when writing text, one token at a time, and PyTorch's, with the same model and a cache of keys and values.

    python benchmarks/decode.py [--preset nanogpt-cpu ...] [--rounds 5] [--seconds 5] [--threads N] [--save]

Both start from one token and write until the context is full, again and again; both draw each token from the softmax of
its logits. Rounds, ratios and --save as in benchmarks/rounds.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time

import numpy as np
from rivals import language_model, transformer
from rounds import alternate, median, ratios, run, save, warn_if_busy
from train import SHAPES, VOCAB, settings

from autograd.device import cores

RIVALS = {"eager": "PyTorch eager", "operators": "through our operators"}


def minitv(preset: str, fused: bool = True):
    """Our own text, as ``minitv sample`` writes it, or without the fused step."""
    from autograd.device import blas_threads
    from autograd.random import Random
    from minitv import sample
    from minitv.decode import Decoder
    from minitv.models.lm import LanguageModel

    if not fused:
        sample.decoder = Decoder

    model, mixer, _ = settings("transformer", preset)
    made = LanguageModel("transformer", model, mixer, VOCAB, Random(0))
    blas_threads(1).__enter__()
    return lambda index: sum(1 for _ in sample.generate(made, np.array([1]), model.context - 1, Random(index)))


def pytorch(preset: str, threads: int):
    import torch

    torch.set_num_threads(threads)
    model, mixer, _ = settings("transformer", preset)
    made = language_model(torch, "transformer", model, mixer, VOCAB).eval()
    caches = transformer.cache(torch, model, mixer)

    @torch.inference_mode()
    def write(index: int) -> int:
        torch.manual_seed(index)
        token = torch.ones((1, 1), dtype=torch.long)
        for position in range(model.context - 1):
            logits = made(token, start=position, caches=caches)[0, -1]
            token = torch.multinomial(torch.softmax(logits, -1), 1)[None]
        return model.context - 1

    return write


def work(contender: str, preset: str, threads: int, seconds: float) -> dict:
    """Measure one contender in this process."""
    if contender == "eager" and importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    write = pytorch(preset, threads) if contender == "eager" else minitv(preset, contender == "minitv")
    for index in range(3):
        write(index)
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not tokens:
        tokens += write(tokens)
    return {"tokens_per_s": tokens / elapsed, "us_per_token": 1e6 * elapsed / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=SHAPES, help="repeat for several (default: all presets)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per process (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="of PyTorch; we write with one (default: all)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/decode.json")
    parser.add_argument("--worker", choices=["minitv", *RIVALS], help="measure this contender here and print one JSON line")
    arguments = parser.parse_args()
    presets = arguments.preset or SHAPES
    if arguments.worker:
        print(json.dumps(work(arguments.worker, presets[0], arguments.threads, arguments.seconds)))
        return
    warn_if_busy()
    report = {}
    for preset in presets:
        def measure(name: str, preset=preset) -> dict:
            return run(__file__, ["--worker", name, "--preset", preset, "--threads", arguments.threads,
                                  "--seconds", arguments.seconds], arguments.threads)

        results, skipped = alternate(["minitv", *RIVALS], measure, arguments.rounds, "tokens_per_s", preset)
        speeds = {name: round(median(rows, "tokens_per_s"), 1) for name, rows in results.items()}
        ratio = {name: ratios(results["minitv"], rows, "tokens_per_s") for name, rows in results.items() if name != "minitv"}
        report[preset] = {"tokens_per_s": speeds, "ratio": ratio, "skipped": skipped}
        for name, speed in speeds.items():
            found = "" if name == "minitv" else "{:.2f} ({:.2f} to {:.2f})".format(*ratio[name])
            print(f"{preset:<12} {RIVALS.get(name, name):<24} {speed:>10,.0f} tokens/s  {1e6 / speed:>8.0f} us/token  {found}")
    result = {"benchmark": "decode", "threads": arguments.threads, "rounds": arguments.rounds, "presets": report}
    if arguments.save:
        save("decode", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
