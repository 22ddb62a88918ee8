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

from minitv.results import host, write

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


def machine() -> Path:
    """The folder for times, which mean something beside others of the same processor: benchmarks/results/PROCESSOR."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", host()["processor"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, result: dict, part: str | None = None, folder: Path = RESULTS) -> dict:
    """Write NAME.json, which benchmarks/report.py quotes in the README, as minitv.results.write does."""
    return write(folder / f"{name}.json", result, part)


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
