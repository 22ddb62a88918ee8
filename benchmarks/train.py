"""Tokens per second of our training step and of PyTorch's, on the same model, data and threads.

    python benchmarks/train.py [--preset nanogpt-cpu --preset small] [--rounds 5] [--seconds 10] [--threads N] [--save]
    python benchmarks/train.py --profile [--preset nanogpt-cpu]

A step is forward, backward, clipping, AdamW and reading the loss, in float32. Every figure comes from a process of its
own, and the contenders alternate, so that a slow minute of the machine meets all of them; what is reported is the
median over rounds, and the median of the ratios within a round. Warm-up is not counted; the first step, in which
kernels are compiled or loaded, and the process's largest memory are reported beside it. PyTorch is optional: a rival
that is missing is skipped, and says so. ``--profile`` shows where our step spends its time, by operator. The last line
is JSON; ``--save`` writes it to benchmarks/results/train.json, with the facts of the host.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from autograd.device import cores
from minitv.config import Options
from minitv.mixers.transformer import TransformerOptions
from minitv.options import PRESETS, ModelOptions, TrainOptions

VOCAB = 65
WARMUP_S = 1.0
RIVALS = ("eager", "compile")
SHAPES = {  # what --preset accepts: the presets, and a shape that nothing was tuned for
    **{name: preset for name, preset in PRESETS.items()},
    "untuned": dict(context=128, batch=8, layers=5, heads=8, width=256, dropout=0.1),
}
TITLES = {"minitv": "minitv", "eager": "PyTorch eager", "compile": "PyTorch compile"}


def settings(preset: str) -> tuple[ModelOptions, TransformerOptions, TrainOptions]:
    """The options of a preset."""
    options = Options(ModelOptions, TransformerOptions, TrainOptions)
    values, _ = options.merge((f"preset {preset}", SHAPES[preset]))
    return tuple(options.build(values))


def batches(preset: str, count: int = 16) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels [B T] that are the same for all contenders: random tokens cost what real ones do."""
    model, _, run = settings(preset)
    windows = np.random.default_rng(0).integers(0, VOCAB, (count, run.batch, model.context + 1))
    return [(w[:, :-1].copy(), w[:, 1:].copy()) for w in windows]


# -- contenders: each returns (number of parameters, step(index) -> loss) --------------------------------------------
def minitv(preset: str, threads: int) -> tuple[int, Callable[[int], float]]:
    """Our training step, as ``minitv train`` takes it."""
    from dataclasses import replace

    from minitv.train import Trainer

    model, mixer, run = settings(preset)
    trainer = Trainer(variant="transformer", model=model, mixer=mixer, run=replace(run, threads=threads), vocab=VOCAB)
    data = batches(preset)

    def step(index: int) -> float:
        inputs, labels = data[index % len(data)]
        return trainer.step(inputs, labels, index)

    return trainer.parameters, step


def pytorch(preset: str, threads: int, compiled: bool) -> tuple[int, Callable[[int], float]]:
    """The same step with PyTorch's fused parts: scaled_dot_product_attention, native layer_norm, fused AdamW."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options, mixer, run = settings(preset)
    bias, drop = options.bias, options.dropout

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            width, hidden = options.width, options.ffn_multiple * options.width
            self.norm1, self.norm2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
            self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

        def forward(self, x):
            batch, length, width = x.shape
            parts = self.qkv(self.norm1(x)).split(width, dim=2)
            q, k, v = (p.view(batch, length, mixer.heads, width // mixer.heads).transpose(1, 2) for p in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
            x = x + F.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), drop)
            return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), drop)

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, options.width)
            self.positions = nn.Parameter(torch.zeros(options.context, options.width))
            self.blocks = nn.ModuleList(Block() for _ in range(options.layers))
            self.norm = nn.LayerNorm(options.width, bias=bias)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=options.init_std)

        def forward(self, ids, labels):
            x = F.dropout(self.embed(ids) + self.positions[: ids.shape[1]], drop)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.embed.weight)
            return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))

    model = LanguageModel()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": run.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    kwargs = dict(lr=run.lr, betas=(run.beta1, run.beta2))
    try:
        optimizer = torch.optim.AdamW(groups, fused=True, **kwargs)
    except RuntimeError:  # releases before 2.4 have no fused AdamW for CPU tensors
        optimizer = torch.optim.AdamW(groups, foreach=True, **kwargs)
    forward = torch.compile(model) if compiled else model
    data = [(torch.from_numpy(inputs), torch.from_numpy(labels)) for inputs, labels in batches(preset)]

    def step(index: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(1.0, (index + 1) / (run.warmup + 1))
        loss = forward(*data[index % len(data)])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, run.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return sum(p.numel() for p in parameters), step


# -- one process -----------------------------------------------------------------------------------------------------
def work(contender: str, preset: str, threads: int, seconds: float) -> dict:
    """Measure one contender; ``skipped`` holds the reason if it cannot run here."""
    if contender != "minitv" and importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    model, _, run = settings(preset)
    if contender == "minitv":
        parameters, step = minitv(preset, threads)
    else:
        parameters, step = pytorch(preset, threads, compiled=contender == "compile")
    start = time.perf_counter()
    try:
        loss = step(0)
    except Exception as error:
        if contender != "compile":
            raise
        return {"skipped": f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"}
    first = time.perf_counter() - start
    index, start = 1, time.perf_counter()
    while time.perf_counter() - start < WARMUP_S:
        step(index)
        index += 1
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        loss = step(index + count)
        count += 1
    if not math.isfinite(loss):
        raise SystemExit(f"{contender}, {preset}: the loss is {loss}")
    tokens = count * run.batch * model.context
    return {"tokens_per_s": tokens / elapsed, "ms_per_step": 1e3 * elapsed / count, "steps": count,
            "first_step_s": first, "parameters": parameters, "loss": loss, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The largest memory this process has held, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def profile(preset: str, seconds: float) -> None:
    """Print the milliseconds and calls of every operator in our step on one thread, forward and backward."""
    from collections import defaultdict

    from minitv.optim import AdamW, GradientBuffer
    from minitv.train import Trainer

    times: dict[str, list] = defaultdict(lambda: [0.0, 0])
    inner: list[float] = [0.0]  # the time of the calls within a call, innermost last

    def timed(owner, attribute: str, name: Callable[..., str]) -> None:
        function = getattr(owner, attribute)

        def wrapper(*args, **kwargs):
            inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                entry = times[name(*args)]
                entry[0] += elapsed - inner.pop()
                entry[1] += 1
                inner[-1] += elapsed

        setattr(owner, attribute, wrapper)

    machinery = sys.modules["autograd.op"]
    timed(machinery.Op, "__call__", lambda op, *_: f"{op.name} forward")
    for attribute in ("_differentiate_primitive", "_differentiate_kernel"):
        timed(machinery, attribute, lambda node, *_: f"{node.op.name} backward")
    timed(AdamW, "step", lambda *_: "AdamW, clipping")
    timed(GradientBuffer, "__call__", lambda *_: "adding up gradients")
    timed(Trainer, "_micro_batch", lambda *_: "the tape itself")
    _, step = minitv(preset, 1)
    for index in range(3):
        step(index)
    times.clear()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        step(count)
        count += 1
    print(f"{preset}: {1e3 * elapsed / count:.1f} ms a step on one thread, {count} steps")
    for name, (total, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
        print(f"  {name:<26} {1e3 * total / count:9.2f} ms  {100 * total / elapsed:5.1f} %  {calls / count:6.1f} calls")


def host() -> dict:
    """What the figures depend on."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "numba", "torch")
                if importlib.util.find_spec(name)}
    return {"processor": processor, "cores": cores(), "system": platform.system(), "python": platform.python_version(),
            **versions}


# -- rounds ----------------------------------------------------------------------------------------------------------
def measure(contender: str, preset: str, arguments: argparse.Namespace) -> dict:
    """``work`` in a fresh process."""
    threads = str(arguments.threads)
    command = [sys.executable, __file__, "--worker", contender, "--preset", preset, "--threads", threads,
               "--seconds", str(arguments.seconds)]
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{TITLES[contender]} on {preset} failed with exit code {result.returncode}, see above")
    return json.loads(result.stdout.splitlines()[-1])


def compare(preset: str, contenders: list[str], arguments: argparse.Namespace) -> dict:
    """All rounds of a preset: prints its rows, returns its part of the JSON."""
    rounds: dict[str, list[dict]] = {name: [] for name in contenders}
    skipped: dict[str, str] = {}
    for number in range(arguments.rounds):
        for name in contenders if number % 2 == 0 else contenders[::-1]:
            if name in skipped:
                continue
            result = measure(name, preset, arguments)
            if "skipped" in result:
                skipped[name] = result["skipped"]
                rounds[name] = []
                continue
            rounds[name].append(result)
            print(f"{preset}, round {number + 1} of {arguments.rounds}: {TITLES[name]} "
                  f"{result['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    rounds = {name: results for name, results in rounds.items() if results}
    sizes = {name: results[0]["parameters"] for name, results in rounds.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"{preset}: these are not the same model, parameters: {sizes}")

    report: dict = {"parameters": next(iter(sizes.values())), "tokens_per_s": {}, "first_step_s": {}, "peak_mb": {},
                    "ratio": {}, "ratio_range": {}, "skipped": skipped}
    for name, results in rounds.items():
        speeds = [r["tokens_per_s"] for r in results]
        first = statistics.median(r["first_step_s"] for r in results)
        report["tokens_per_s"][name] = round(statistics.median(speeds), 1)
        peak = statistics.median(r["peak_mb"] for r in results)
        report["first_step_s"][name] = round(first, 3)
        report["peak_mb"][name] = round(peak)
        ratio = ""
        if name != "minitv":
            ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(rounds["minitv"], results, strict=True)]
            report["ratio"][name] = round(statistics.median(ratios), 3)
            report["ratio_range"][name] = [round(min(ratios), 3), round(max(ratios), 3)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{preset:<12} {TITLES[name]:<16} {statistics.median(speeds):>10,.0f} "
              f"{f'{min(speeds):,.0f} to {max(speeds):,.0f}':>20} "
              f"{statistics.median(r['ms_per_step'] for r in results):>9.1f} {first:>13.2f} {peak:>8,.0f}  {ratio}")
    for name, reason in skipped.items():
        print(f"{preset:<12} {TITLES[name]:<16} skipped: {reason}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=list(SHAPES),
                        help="model and batch; repeat for several (default: nanogpt-cpu and small)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time per process (default: 10)")
    parser.add_argument("--threads", type=int, default=cores(), help="for every contender (default: the usable cores)")
    parser.add_argument("--rivals", default=",".join(RIVALS), help=f"comma-separated (default: {','.join(RIVALS)})")
    parser.add_argument("--profile", action="store_true", help="time of each operator in our step, instead")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/train.json")
    parser.add_argument("--worker", choices=list(TITLES), help="measure this contender here and print one JSON line")
    arguments = parser.parse_args()
    presets = arguments.preset or ["nanogpt-cpu", "small"]
    if arguments.rounds < 1 or arguments.threads < 1 or arguments.seconds < 0:
        parser.error("--rounds and --threads start at 1, --seconds at 0")
    if arguments.worker:
        for preset in presets:
            print(json.dumps(work(arguments.worker, preset, arguments.threads, arguments.seconds)), flush=True)
        return
    if arguments.profile:
        for preset in presets:
            profile(preset, arguments.seconds)
        return
    rivals = [name for name in arguments.rivals.split(",") if name]
    if unknown := set(rivals) - set(RIVALS):
        parser.error(f"--rivals: {', '.join(sorted(unknown))} is unknown, allowed: {', '.join(RIVALS)}")

    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"other programs are running (load {load:.1f}): threads that wait for each other at every operator, as "
              "PyTorch's do, suffer most. Repeat on an idle machine", file=sys.stderr)
    print(f"{arguments.threads} threads, {arguments.rounds} rounds of {arguments.seconds:g} s")
    print(f"{'preset':<12} {'':<16} {'tokens/s':>10} {'range':>20} {'ms/step':>9} {'first step s':>13} {'peak MB':>8}  "
          "ours / theirs")
    report = {preset: compare(preset, ["minitv", *rivals], arguments) for preset in presets}
    result = {"benchmark": "train", "threads": arguments.threads, "rounds": arguments.rounds,
              "seconds": arguments.seconds, "presets": report}
    if arguments.save:
        path = Path(__file__).with_name("results") / "train.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"host": host(), **result}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
