"""What every benchmark shares: rounds of processes of their own, ratios within a round, host facts, saved results.

A contender is measured by running the benchmark's own file with ``--worker NAME``, in a fresh process that prints one line
of JSON last. Contenders alternate, in turned order every other round, so that a slow minute of the machine meets all of
them; a claim is the median over the rounds of the ratio within a round, beside the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from autograd.cpu.process import processor
from minitv.results import write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")


def run(script: str, arguments: Iterable[object], threads: int, **environment: str) -> dict:
    """The JSON that one process of a benchmark prints last."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), **environment})
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: failed with exit code {result.returncode}, see above")
    return json.loads(result.stdout.splitlines()[-1])


def alternate(contenders: list[str], measure: Callable[[str], dict], rounds: int, key: str, title: str):
    """The results of every contender, one a round, and the reasons of those that were ``skipped``."""
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for name in contenders if number % 2 == 0 else contenders[::-1]:
            if name in skipped:
                continue
            result = measure(name)
            if "skipped" in result:
                skipped[name] = result["skipped"]
                results.pop(name)
                continue
            results[name].append(result)
            print(f"{title}, round {number + 1} of {rounds}: {name} {result[key]:,.4g} {key}", file=sys.stderr)
    return results, skipped


def median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


def ratios(ours: list[dict], theirs: list[dict], key: str) -> list[float]:
    """Ours over theirs: the median, the smallest and the largest of the rounds."""
    quotients = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
    return [round(value, 3) for value in (statistics.median(quotients), min(quotients), max(quotients))]


def of_peak(numbers: dict, threads: int, limits: dict | None) -> dict[str, str]:
    """The share of its threads' arithmetic peak that each contender of a training step reaches; – where it was not measured."""
    if not limits or "mflop_per_token" not in numbers:
        return dict.fromkeys(numbers["tokens_per_s"], "–")
    token_at_peak = numbers["mflop_per_token"] / (1e3 * threads * limits["gflops"])  # in seconds
    return {name: f"{speed * token_at_peak:.0%}".replace("%", " %") for name, speed in numbers["tokens_per_s"].items()}


def machine() -> Path:
    """The folder for times, which mean something beside others of the same processor: benchmarks/results/PROCESSOR.

    A processor that may use only a part of its vectors is another one, with a folder of its own.
    """
    from autograd.cpu.compile import BITS, NATIVE_BITS

    width = f"-{BITS}-bit" if BITS < NATIVE_BITS else ""
    folder = RESULTS / (re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-") + width)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, result: dict, part: str | None = None, folder: Path = RESULTS) -> dict:
    """Write NAME.json, which benchmarks/report.py quotes in the README, as minitv.results.write does; times with `measured`."""
    return write(folder / f"{name}.json", result, part, **({} if folder == RESULTS else measured(folder)))


def measured(folder: Path) -> dict:
    """What is measured of this machine, for the ``host`` of its times, with the processor's kind and what is switched off.

    Limits are the largest that any result in the folder has: a busy machine shows less than it can do.
    """
    import llvmlite.binding as llvm
    from limits import limits

    from autograd.cpu.compile import BITS, NATIVE_BITS

    best = limits()
    for path in folder.glob("*.json"):
        before = json.loads(path.read_text(encoding="utf-8"))["host"].get("limits", {})
        best = {key: np.maximum(value, before.get(key, 0)).tolist() for key, value in best.items()}
    limited = {"limited_by": list(narrow())} if BITS < NATIVE_BITS else {}
    return {"core": llvm.get_host_cpu_name(), "limits": best, **limited}


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a benchmark, with ``--vectors``: for fewer bits it begins anew, as libraries choose when loaded."""
    parser.add_argument("--vectors", type=int, choices=(256, 512),
                        help="bits of the widest vectors, on both sides; results have a folder of their own (default: "
                             "as wide as the processor's)")
    arguments = parser.parse_args()
    if getattr(arguments, "worker", None):  # it has its environment, and PyTorch's memory is measured without Numba
        return arguments
    from autograd.cpu.compile import BITS, NATIVE_BITS

    bits = arguments.vectors or BITS
    if bits > NATIVE_BITS:
        parser.error(f"--vectors: {bits}, but this processor has {NATIVE_BITS}-bit vectors at most")
    if bits < NATIVE_BITS and not narrow().keys() <= os.environ.keys():
        os.environ.update(narrow())
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if bits != BITS:
        parser.error(f"--vectors: {bits}, but NUMBA_CPU_FEATURES leaves {BITS}-bit vectors")
    return arguments


def narrow() -> dict[str, str]:
    """The environment in which nobody uses vectors of more than 256 bits: our kernels, NumPy, its BLAS, and all of PyTorch.

    The processor stays what it is otherwise. NumPy no longer finds what is switched off, so this is of use once.
    """
    import llvmlite.binding as llvm

    features = re.sub(r"[+](avx512\w*)", r"-\1", llvm.get_host_cpu_features().flatten())
    loops = [name for name in np.show_config("dicts")["SIMD Extensions"]["found"] if "512" in name or name == "X86_V4"]
    blas = "Zen" if llvm.get_host_cpu_name().startswith("znver") else "Haswell"
    return {"NUMBA_CPU_NAME": llvm.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features, "OPENBLAS_CORETYPE": blas,
            "NPY_DISABLE_CPU_FEATURES": " ".join(loops), "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2"}


def warn_if_busy() -> None:
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"other programs are running (load {load:.1f}): threads that wait for each other at every operator, as "
              "PyTorch's do, suffer most. Repeat on an idle machine", file=sys.stderr)


def known(names: list[str], allowed, parser: argparse.ArgumentParser, option: str) -> list[str]:
    """The names, or all that are allowed; an unknown one is an error of the command line."""
    names = list(allowed) if names == ["all"] else names
    if unknown := set(names) - set(allowed):
        parser.error(f"{option}: {', '.join(sorted(unknown))} is unknown, allowed: all, {', '.join(allowed)}")
    return names
