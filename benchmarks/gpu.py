"""Everything that needs an NVIDIA GPU, by one command on a machine that has one: tests, sanitizer, training, speed.

    pip install -e ".[test,cuda13]" && python benchmarks/gpu.py [--data tinyshakespeare.txt] [--device cuda] [--only PART ...]

    tests      pytest -m gpu: every operator, form and kernel on the card
    sanitizer  the kernels' tests under each tool of compute-sanitizer (from the CUDA toolkit)
    losses     the first 100 losses of the preset `small` on the CPU and on the GPU
    small      minitv train --preset small: 5000 steps
    nanogpt    the same with batch 64, which is nanoGPT's setting for a GPU, on Tiny Shakespeare: its best is 1.4697 nats
    speed      benchmarks/train.py against PyTorch eager and compiled on the same card

A part that fails does not stop the next. What each found goes to gpu.json in benchmarks/results/PROCESSOR,
with versions and dates.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rounds import ROOT, machine, save
from train import Random, batches, experiment

from autograd import DeviceError
from autograd.device import gpu, select
from minitv.experiment import Experiment
from minitv.trainer import Trainer

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
KERNEL_TESTS = "kernel or attention or words or dropout or adamw"
# Of a loss, relative: in the first half of the steps, and in all. On one CPU another order of sums changes the losses of
# `small` by 1e-7 up to step 50 and, as training amplifies what differs, by 4e-4 up to step 100.
TOLERANCES = 1e-4, 1e-2
NANOGPT = 1.4697  # https://github.com/karpathy/nanoGPT#quick-start


def command(*words: str, **environment: str) -> tuple[int, str]:
    """Run a program in the repository; its exit code and the end of what it wrote, which is also shown."""
    print("$", *words, flush=True)
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
    text = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        text = (text + line)[-20_000:]
    return process.wait(), text


def tests(arguments) -> dict:
    code, text = command(sys.executable, "-m", "pytest", "-m", "gpu", "-q")
    return {"passed": code == 0, "summary": text.strip().splitlines()[-1]}


def sanitizer(arguments) -> dict:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"passed": False, "summary": "compute-sanitizer is not in PATH: it comes with the CUDA toolkit"}
    reports = {}
    for tool in TOOLS:  # without CuPy's pool every array is an allocation of its own, whose ends the tools know
        code, text = command(program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", sys.executable,
                             "-m", "pytest", "-m", "gpu", "-q", "-k", KERNEL_TESTS, MINITV_GPU_POOL="off")
        errors = re.findall(r"ERROR SUMMARY: (.*)", text)
        reports[tool] = {"passed": code == 0, "summary": errors[-1] if errors else text.strip().splitlines()[-1]}
    return {"passed": all(tool["passed"] for tool in reports.values()), **reports}


def first_losses(setup: Experiment, device: str, steps: int) -> list[float]:
    """The losses of the first steps, with whole batches as on a GPU, so that dropout draws the same masks."""
    trainer = Trainer(setup.replace(device=device, threads=1, micro_batch=setup.run.batch), Random())
    try:
        data = batches(setup)
        return [trainer.step(data[i % len(data)], i) for i in range(steps)]
    finally:
        trainer.close()


def losses(arguments, setup: Experiment | None = None, steps: int = 100) -> dict:
    setup = setup or experiment("transformer", "small")
    ours, theirs = (np.array(first_losses(setup, device, steps)) for device in (arguments.device, "cpu"))
    difference = np.abs(ours - theirs) / theirs
    largest = float(difference[:steps // 2].max()), float(difference.max())
    print(f"losses on {arguments.device} and on the CPU differ by at most {largest[0]:.2g} in the first {steps // 2} steps, by "
          f"{largest[1]:.2g} in {steps}, relatively")
    return {"passed": largest[0] < TOLERANCES[0] and largest[1] < TOLERANCES[1], "largest_differences": largest,
            "tolerances": TOLERANCES, "steps": steps, "last": [float(ours[-1]), float(theirs[-1])]}


def trained(arguments, *options: str, name: str) -> dict:
    """A run of ``minitv train``, and what its log says."""
    folder = ROOT / "runs" / name
    start = time.perf_counter()
    code, text = command(sys.executable, "-m", "minitv", "train", "--preset", "small", "--device", arguments.device, "--out",
                         str(folder), "--overwrite", *options)
    if code:
        return {"passed": False, "summary": text.strip().splitlines()[-1]}
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [record["val_loss"] for record in records if "val_loss" in record]
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    return {"passed": True, "best_val_loss": min(held_out), "last_val_loss": held_out[-1],
            "seconds": round(time.perf_counter() - start), "tokens_per_s": float(np.median(speeds)),
            "data": arguments.data or "Python's standard library"}


def small(arguments) -> dict:
    return trained(arguments, *(["--data", arguments.data] if arguments.data else []), name="gpu-small")


def nanogpt(arguments) -> dict:
    if not arguments.data:
        return {"passed": False, "summary": "this needs Tiny Shakespeare: --data FILE"}
    result = trained(arguments, "--data", arguments.data, "--batch", "64", "--seed", "1337", name="gpu-nanogpt")
    return {**result, "nanogpt_best_val_loss": NANOGPT}


def speed(arguments) -> dict:
    code, text = command(sys.executable, "benchmarks/train.py", "--preset", "small", "--device", arguments.device, "--save")
    if code:
        return {"passed": False, "summary": text.strip().splitlines()[-1]}
    result = json.loads(text.strip().splitlines()[-1])["variants"]["transformer"]["small"]
    ratio = result["ratio"].get("eager")
    return {"passed": ratio is not None and ratio[0] >= 1, **result}


PARTS: dict[str, Callable] = {part.__name__: part for part in (tests, sanitizer, losses, small, nanogpt, speed)}


def versions() -> dict:
    """The card, and what drives it."""
    cupy, number = gpu(), gpu().cuda.runtime.getDevice()
    packages = {p.metadata["Name"]: p.version for p in importlib.metadata.distributions()
                if re.match(r"cupy|torch$|nvidia-(cublas|cuda-nvrtc)", p.metadata["Name"] or "")}
    return {"gpu": cupy.cuda.runtime.getDeviceProperties(number)["name"].decode(),
            "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(), "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
            **packages}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text for the runs; Tiny Shakespeare for `nanogpt`")
    parser.add_argument("--device", default="cuda", help="cuda (the default) or cuda:1")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="some of the parts")
    arguments = parser.parse_args()
    if arguments.data and not Path(arguments.data).is_file():
        parser.error(f"--data {arguments.data}: there is no such file")
    arguments.data = arguments.data and str(Path(arguments.data).resolve())
    try:
        select(arguments.device)
        result = {"benchmark": "gpu", **versions(), "parts": {}}
    except DeviceError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 1
    for name in arguments.only:
        try:
            outcome = PARTS[name](arguments)
        except Exception as error:  # the other parts may still tell something
            outcome = {"passed": False, "summary": f"{type(error).__name__}: {error}"}
        result["parts"][name] = outcome
        save("gpu", result, folder=machine())
    for name, outcome in result["parts"].items():
        print(f"{name:<10} {'ok' if outcome['passed'] else 'FAILED'}  {outcome.get('summary', '')}")
    return not all(outcome["passed"] for outcome in result["parts"].values())


if __name__ == "__main__":
    sys.exit(main())
