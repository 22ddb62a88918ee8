"""Tokens per second of our training step and of PyTorch's, on the same model, data and threads.

    python benchmarks/train.py [VARIANT ...] [--preset nanogpt-cpu] [--rounds 5] [--seconds 10] [--threads N] [--save]
    python benchmarks/train.py --device cuda [--preset small]  both on one GPU; threads then concern the host alone
    python benchmarks/train.py --matmul bf16 [--save]        ours with --matmul bf16 against our float32 and PyTorch's autocast
    python benchmarks/train.py --without all [--save]        what each technique is worth: our step without it
    python benchmarks/train.py --profile                     where our step spends its time, by operator
    python benchmarks/train.py all --cold [--save]           how long a user waits at first, with an empty cache of kernels

A step is forward, backward, clipping, AdamW and reading the loss, in float32 but for --matmul. Warm-up is not counted. Beside
the speed stand the first step, in which kernels are loaded, the same with an empty cache of kernels (cold), the process's
largest memory, and the share of the arithmetic peak: the operations that a token needs (arithmetic.py) times the tokens of a
second, over the threads times what a core can do (limits.py). PyTorch is optional: a rival that is missing is skipped, and says
so. Rounds, ratios, --vectors and --save as in benchmarks/rounds.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rivals import language_model
from rounds import alternate, known, machine, measured, median, of_peak, parse, ratios, run, save, warn_if_busy

from autograd import DeviceError
from autograd.cpu.process import cores, peak_mb
from autograd.device import select
from minitv import config, variants
from minitv.experiment import Experiment
from minitv.models.conformer import Conformer
from minitv.models.encdec import EncoderDecoder
from minitv.options import PRESETS
from minitv.task import Batch, Task
from minitv.tasks.pairs import Pair

VOCAB = 65
WARMUP_S = 1.0
UNTUNED = dict(context=128, batch=8, layers=5, heads=8, width=256, dropout=0.1)  # a shape that nothing was tuned for
SHAPES = (*PRESETS, "untuned")
RIVALS = {"eager": "PyTorch eager", "compile": "PyTorch compile"}
FLOAT32 = "float32"  # the contender that is our own step in float32, with --matmul bf16


def rivalled() -> list[str]:
    """The variants that have a rival; they all are trained to give an answer at every position that they write."""
    return [name for name in variants.variants() if importlib.util.find_spec(f"rivals.{name.replace('-', '_')}")]


def writers() -> list[str]:
    """The variants that can write, which all have rivals and read text."""
    return [name for name, entry in variants.variants().items() if entry.load().causal]


class Random(Task):
    """Random tokens, which cost what real ones do."""

    vocab = VOCAB

    def __init__(self, data: Sequence[Any] = ()):
        self._data = data

    def batch(self, step: int) -> Any:
        return self._data[step % len(self._data)] if self._data else super().batch(step)


def experiment(variant: str, preset: str, **values: object) -> Experiment:
    """A variant in a preset, or in the shape that nothing was tuned for."""
    record = variants.load(variant)
    if preset != "untuned":
        return record.configure(preset, **values)
    heads = config.settings(record.options).keys() & {"heads"}
    shape = {name: value for name, value in UNTUNED.items() if name != "heads" or heads}
    if issubclass(record.model, Conformer):
        del shape["context"]  # utterances are as long as they are
    return record.configure("small", **shape, **values)


def task_of(setup: Experiment, data: Sequence[Any] = ()) -> Task:
    """Whose loss is computed: that of an answer at every position, or of a model of sound that of the task speech."""
    return setup.begin() if issubclass(setup.variant.model, Conformer) else Random(data)


def batches(setup: Experiment, count: int = 16) -> list[Any]:
    """Batches [B T] that are the same for all contenders; of a model of pairs, a source is its target."""
    if issubclass(setup.variant.model, Conformer):
        task = task_of(setup)
        return [task.batch(step) for step in range(count)]
    windows = np.random.default_rng(0).integers(0, VOCAB, (count, setup.run.batch, setup.model.context + 1))
    read = [(w[:, :-1].copy(), w[:, 1:].copy()) for w in windows]
    if issubclass(setup.variant.model, EncoderDecoder):
        return [Pair(ids, ids, labels) for ids, labels in read]
    return [Batch(*arrays) for arrays in read]


# -- contenders: each returns (number of parameters, step(index) -> loss) --------------------------------------------
def minitv(variant: str, preset: str, threads: int, device: str = "cpu",
           matmul: str = FLOAT32) -> tuple[int, Callable[[int], float]]:
    """Our training step, as ``minitv train`` takes it."""
    setup = experiment(variant, preset, threads=threads, device=device, matmul=matmul)
    return stepper(setup, batches(setup))


def stepper(setup: Experiment, data: list[Any]) -> tuple[int, Callable[[int], float]]:
    """The same of an experiment, on these batches."""
    from minitv.trainer import Trainer

    trainer = Trainer(setup, task_of(setup, data))
    return trainer.parameters, lambda index: trainer.step(data[index % len(data)], index)


def pytorch(variant: str, preset: str, threads: int, compiled: bool, device: str = "cpu",
            matmul: str = FLOAT32) -> tuple[int, Callable[[int], float]]:
    """The same step with PyTorch's fused parts: native layer_norm and attention, fused AdamW; bf16 is its autocast."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    setup = experiment(variant, preset)
    run = setup.run
    model = language_model(torch, variant, setup.model, setup.mixer, task_of(setup).vocab).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": run.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True, lr=run.lr, betas=(run.beta1, run.beta2))
    forward = torch.compile(model) if compiled else model
    data = [tuple(map(torch.from_numpy, pair)) for pair in batches(setup)]

    def step(index: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(1.0, (index + 1) / (run.warmup + 1))
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=matmul != FLOAT32):
            loss = forward(*(ids.to(device) for ids in data[index % len(data)]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return sum(p.numel() for p in parameters), step


# -- techniques: how to do without each ------------------------------------------------------------------------------
def _without_memory() -> None:
    import minitv.trainer

    minitv.trainer.keep_memory = lambda: None


def _without_large_pages() -> None:
    from autograd.cpu import process

    process._ask_for_large_pages = lambda: None


def _without_forks() -> None:
    from minitv import forks

    forks.AVAILABLE = False


def _without_micro_batches() -> None:
    from minitv.trainer import Trainer

    Trainer.MICRO_BATCH_TOKENS = 10**9


def _without_products() -> None:
    from autograd.cpu import gemm

    gemm.suits = lambda *sizes: False


def _without_tiles() -> None:
    _compile_anew()
    from autograd.cpu import panels

    panels.TILES = False


def _compile_anew() -> None:
    """Compile kernels without the cache, which knows nothing of what a technique changes."""
    from autograd.cpu import compile as compiler

    compiler.cache_directory = lambda: None


def _without_kernel(name: str) -> Callable[[], None]:
    def switch() -> None:
        import minitv.ops  # noqa: F401 - declares attention
        from autograd import REGISTRY

        op = REGISTRY[name]
        op.routes[:] = op.forms.values()

    return switch


TECHNIQUES = {
    "own matrix products": _without_products,
    "fused attention": _without_kernel("attention"),
    "attention's products in register tiles": _without_tiles,
    "fused gelu": _without_kernel("gelu"),
    "fused layer_norm": _without_kernel("layer_norm"),
    "fused cross_entropy": _without_kernel("cross_entropy"),
    "fused dropout": _without_kernel("dropout"),
    "memory kept from step to step": _without_memory,
    "pages of 2 MB": _without_large_pages,
    "workers that are processes": _without_forks,
    "micro-batches of 512 tokens": _without_micro_batches,
}


# -- one process -----------------------------------------------------------------------------------------------------
def work(contender: str, variant: str, preset: str, threads: int, seconds: float, device: str, matmul: str) -> dict:
    """Measure one contender; ``skipped`` holds the reason if it cannot run here."""
    if contender in RIVALS and importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    if contender in TECHNIQUES:
        TECHNIQUES[contender]()
    if contender in RIVALS:
        parameters, step = pytorch(variant, preset, threads, contender == "compile", device, matmul)
    else:
        parameters, step = minitv(variant, preset, threads, device, FLOAT32 if contender == FLOAT32 else matmul)
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
        raise SystemExit(f"{contender}, {variant}, {preset}: the loss is {loss}")
    setup = experiment(variant, preset)
    tokens = setup.run.batch * statistics.mean(batch.length for batch in batches(setup))
    return {"tokens_per_s": count * tokens / elapsed, "ms_per_step": 1e3 * elapsed / count, "first_step_s": first,
            "parameters": parameters, "loss": loss, "peak_mb": peak_mb()}


def start(variant: str, preset: str, threads: int) -> dict:
    """When the first step was taken, and the processor seconds until then, of this process and those that it started."""
    import train  # not this module's name where it is the program, from which another process imports nothing

    setup = experiment(variant, preset, threads=threads)
    (batch,) = batches(setup, 1)
    _, step = train.stepper(setup, [batch])
    step(0)
    ended = time.time()
    return {"ended": ended, "processor_seconds": sum(os.times()[:4])}


def cold(variant: str, preset: str, threads: int, rounds: int) -> dict:
    """The first step with an empty cache of kernels, and with the cache that it has filled."""
    rows: dict[str, list[dict]] = {"cold": [], "cached": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as empty:
            for measured in rows.values():
                began = time.time()
                row = run(__file__, [variant, "--cold", "--worker", "minitv", "--preset", preset, "--threads", threads],
                          threads, NUMBA_CACHE_DIR=empty)
                measured.append({"seconds": row.pop("ended") - began, **row})
    result = {kind: {key: round(median(measured, key), 2) for key in measured[0]} for kind, measured in rows.items()}
    first = result["cold"]
    print(f"{variant:<22} {preset:<12} cold {first['seconds']:6.2f} s, {first['processor_seconds']:6.2f} s of processors; "
          f"cached {result['cached']['seconds']:5.2f} s", flush=True)
    return result


def profile(variant: str, preset: str, seconds: float, matmul: str) -> None:
    """Print the milliseconds and calls of every operator in our step on one thread, forward and backward."""
    from collections import defaultdict

    from autograd import Op
    from autograd.routes import Form, Kernel
    from minitv.optim import AdamW, GradientBuffer
    from minitv.trainer import Trainer

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

    timed(Op, "__call__", lambda op, *_: f"{op.name} forward")
    for route in (Form, Kernel):
        timed(route, "differentiate", lambda route, *_: f"{route.op.name} backward")
    for attribute in ("squares", "update"):
        timed(AdamW, attribute, lambda *_: "AdamW, clipping")
    timed(GradientBuffer, "__call__", lambda *_: "adding up gradients")
    timed(Trainer, "_micro_batch", lambda *_: "the tape itself")
    _, step = minitv(variant, preset, 1, matmul=matmul)
    for index in range(3):
        step(index)
    times.clear()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        step(count)
        count += 1
    print(f"{variant}, {preset}: {1e3 * elapsed / count:.1f} ms a step on one thread, {count} steps")
    for name, (total, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
        print(f"  {name:<26} {1e3 * total / count:9.2f} ms  {100 * total / elapsed:5.1f} %  {calls / count:6.1f} calls")


# -- rounds ----------------------------------------------------------------------------------------------------------
def arithmetic(variant: str, preset: str) -> float:
    """The float operations of a step for a token, as benchmarks/arithmetic.py counts them, in batches of every length."""
    from arithmetic import of_step  # not in the processes of PyTorch, whose memory is measured

    from minitv.trainer import Trainer

    setup = experiment(variant, preset, threads=1)
    trainer = Trainer(setup, task_of(setup))
    try:
        of_lengths = {batch.length: batch for batch in batches(setup)}.values()
        tokens = sum(setup.run.batch * batch.length for batch in of_lengths)
        return sum(of_step(trainer, batch) for batch in of_lengths) / tokens
    finally:
        trainer.close()


def compare(variant: str, preset: str, contenders: list[str], arguments: argparse.Namespace) -> dict:
    """All rounds of a preset: prints its rows, returns its part of the JSON."""
    def measure(name: str, seconds=arguments.seconds, **environment: str) -> dict:
        return run(__file__, [variant, "--worker", name, "--preset", preset, "--threads", arguments.threads,
                              "--seconds", seconds, "--device", arguments.device, "--matmul", arguments.matmul],
                   arguments.threads, **environment)

    results, skipped = alternate(contenders, measure, arguments.rounds, "tokens_per_s", f"{variant}, {preset}")
    sizes = {name: rows[0]["parameters"] for name, rows in results.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"{variant}, {preset}: these are not the same model, parameters: {sizes}")
    report: dict = {"parameters": sizes["minitv"], "ratio": {}, "skipped": skipped}
    if arguments.device == "cpu":
        report["mflop_per_token"] = round(arithmetic(variant, preset) / 1e6, 3)
    for key, digits in (("tokens_per_s", 0), ("first_step_s", 2), ("peak_mb", 0)):
        report[key] = {name: round(median(rows, key), digits) for name, rows in results.items()}
    if not arguments.without:
        with tempfile.TemporaryDirectory() as empty:
            report["cold_first_step_s"] = round(measure("minitv", 0, NUMBA_CACHE_DIR=empty)["first_step_s"], 1)
    shares = of_peak(report, arguments.threads, measured(machine())["limits"])
    for name, rows in results.items():
        speeds, ratio = [row["tokens_per_s"] for row in rows], ""
        if name != "minitv":
            report["ratio"][name] = ratios(results["minitv"], rows, "tokens_per_s")
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*report["ratio"][name])
        title = RIVALS.get(name, f"without {name}" if name in TECHNIQUES else name)
        print(f"{variant:<12} {preset:<12} {title:<38} {report['tokens_per_s'][name]:>8,.0f} "
              f"{f'{min(speeds):,.0f} to {max(speeds):,.0f}':>18} {median(rows, 'ms_per_step'):>8.1f} "
              f"{report['first_step_s'][name]:>8.2f} {report['peak_mb'][name]:>8,.0f} {shares[name]:>8}"
              f"  {ratio}")
    for name, reason in skipped.items():
        print(f"{variant:<12} {preset:<12} {RIVALS.get(name, name):<38} skipped: {reason}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="all, or names of `minitv list` (default: transformer)")
    parser.add_argument("--preset", action="append", choices=SHAPES, help="repeat for several (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time per process (default: 10)")
    parser.add_argument("--threads", type=int, default=cores(), help="for every contender (default: the usable cores)")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or cuda:1")
    parser.add_argument("--matmul", choices=[FLOAT32, "bf16"], default=FLOAT32, help="ours and theirs")
    parser.add_argument("--rivals", default=",".join(RIVALS), help=f"comma-separated (default: {','.join(RIVALS)})")
    parser.add_argument("--without", action="append", default=[], metavar="TECHNIQUE",
                        help=f"compare with our own step without it: all, {', '.join(TECHNIQUES)}")
    parser.add_argument("--profile", action="store_true", help="time of each operator in our step, instead")
    parser.add_argument("--cold", action="store_true", help="measure the first step alone, with an empty cache of kernels")
    parser.add_argument("--save", action="store_true",
                        help="write the result for this machine: train.json, train_bf16.json, without.json or cold.json")
    parser.add_argument("--worker", choices=["minitv", FLOAT32, *RIVALS, *TECHNIQUES],
                        help="measure this contender in this process")
    arguments = parse(parser)
    among = list(variants.variants()) if arguments.cold else rivalled()
    names = known(arguments.variants or ["transformer"], among, parser, "VARIANT")
    presets = arguments.preset or SHAPES
    try:
        select(arguments.device)
    except DeviceError as error:
        parser.error(f"--device: {error}")
    if arguments.rounds < 1 or arguments.threads < 1 or arguments.seconds < 0:
        parser.error("--rounds and --threads start at 1, --seconds at 0")
    if arguments.cold and (arguments.without or arguments.device != "cpu"):
        parser.error("--cold measures our step on the CPU alone")
    if arguments.worker and arguments.cold:
        print(json.dumps(start(names[0], presets[0], arguments.threads)), flush=True)
        return
    if arguments.worker:
        measurement = work(arguments.worker, names[0], presets[0], arguments.threads, arguments.seconds, arguments.device,
                           arguments.matmul)
        print(json.dumps(measurement), flush=True)
        return
    if arguments.profile:
        for variant in names:
            for preset in presets:
                profile(variant, preset, arguments.seconds, arguments.matmul)
        return
    if arguments.cold:
        warn_if_busy()
        result = {"benchmark": "cold", "threads": arguments.threads, "rounds": arguments.rounds, "variants": {}}
        for variant in names:
            result["variants"][variant] = {preset: cold(variant, preset, arguments.threads, arguments.rounds)
                                           for preset in arguments.preset or ["nanogpt-cpu"]}
            if arguments.save:
                save("cold", result, "variants", machine())
        return
    rivals = known([name for name in arguments.rivals.split(",") if name], RIVALS, parser, "--rivals")
    techniques = known(arguments.without, TECHNIQUES, parser, "--without")
    rounded = arguments.matmul != FLOAT32
    contenders = ["minitv", *(techniques or [FLOAT32] * rounded + rivals)]
    warn_if_busy()
    print(f"{arguments.threads} threads, {arguments.rounds} rounds of {arguments.seconds:g} s")
    print(f"{'variant':<12} {'preset':<12} {'':<38} {'tokens/s':>8} {'range':>18} {'ms/step':>8} {'first s':>8} "
          f"{'peak MB':>8} {'of peak':>8}  ours / theirs")
    name = ("without" if techniques else "train") + "_bf16" * rounded + "_gpu" * (arguments.device != "cpu")
    result = {"benchmark": name, "device": arguments.device, "threads": arguments.threads, "rounds": arguments.rounds,
              "seconds": arguments.seconds, "variants": {}}
    for variant in names:
        result["variants"][variant] = {preset: compare(variant, preset, contenders, arguments) for preset in presets}
        if arguments.save:  # at once: what is measured stays, whatever comes later
            save(name, result, "variants", machine())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
