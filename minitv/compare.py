"""Comparing variants: the same text, batches, number of tokens and schedule for all, one process a run.

A run that is finished is not repeated, one that was interrupted continues, and one that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint, files
from .config import encode, shown, table
from .errors import UserError
from .log import read_log
from .options import RESUMABLE
from .report import count, curves, draw

TABLE, PICTURE = "compare.json", "compare.png"
COLOURS = ("#1f4e9c", "#c0392b", "#1e8449", "#8e44ad", "#b7770d", "#117a8b", "#7b3f00", "#5d6d7e", "#d81b60", "#2e4053")


@dataclass(frozen=True)
class Run:
    """One variant with one seed: its folder and all options, as rows for a --config file and as the checkpoint has them."""

    variant: str
    seed: int
    directory: Path
    rows: list[tuple[str, str, Any, str]]
    config: dict[str, Any]
    overwrite: bool = False

    @property
    def steps(self) -> int:
        return self.config["run"]["steps"]

    def done(self) -> int:
        """How many steps are saved and count."""
        if self.overwrite or not checkpoint.exists(self.directory):
            return 0
        return checkpoint.read_run(self.directory).step

    def check(self) -> None:
        """Raise UserError if the folder holds a run that cannot become this one."""
        if self.overwrite or not checkpoint.exists(self.directory):
            return
        stored = checkpoint.read_run(self.directory).config
        for part in ("model", "mixer", "run"):
            for name, value in self.config[part].items():
                old = getattr(stored, part).get(name, value)
                if old != value and name not in (*RESUMABLE, "out", "overwrite"):
                    raise UserError(f"{self.directory} holds a run in which {name} is {shown(old)}, not {shown(value)}: "
                                    "choose another --out, or begin again with --overwrite")

    def train(self) -> int:
        """Train in a process of its own, from where the folder's checkpoint ends; returns the exit code."""
        done = self.done()
        if done >= self.steps:
            return 0
        command = [sys.executable, "-m", "minitv", "train", self.variant]
        if done:
            command += ["--resume", str(self.directory), "--steps", str(self.steps)]
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            settings = self.directory.with_suffix(".toml")
            files.replace(settings, encode(table(self.rows) + "\n"))
            command += ["--config", str(settings), "--overwrite"]
        return _wait(subprocess.Popen(command))


def _wait(child: subprocess.Popen) -> int:
    """The exit code of a training run. A terminal sends Ctrl-C to it as well: it saves and ends, however long that takes."""
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def compare(runs: list[Run], directory: Path) -> int:
    """Train all runs, print and save the table, draw the curves; returns 0, 1 if a run failed, 130 if it was stopped."""
    for run in runs:
        run.check()
    directory.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, run in enumerate(runs, 1):
        name = f"{run.variant}, seed {run.seed}"
        print(f"run {number} of {len(runs)}: {name}, folder {run.directory}", file=sys.stderr, flush=True)
        if code := run.train():
            if code in (130, -2, 143, -15):
                print("stopped; the same command goes on from here", file=sys.stderr)
                return 130
            failed.append(run)
            print(f"{name}: failed with exit code {code}; the others go on", file=sys.stderr)
    results = [measure(run) for run in runs if run not in failed]
    if not results:
        return 1
    rows = summary(results)
    files.replace(directory / TABLE, (json.dumps({"runs": results, "variants": rows}, indent=1) + "\n").encode())
    print(text(rows, results[0]["ngram_bpc"]))
    try:
        print(f"curves: {picture(runs, results, directory / PICTURE)}", file=sys.stderr)
    except UserError as error:
        print(f"no picture of the curves: {error}", file=sys.stderr)
    return 1 if failed else 0


def measure(run: Run) -> dict[str, Any]:
    """What one finished run gave: the log's figures, the state's size after a full context, and the speed of writing."""
    header, records = read_log(run.directory)
    _, held_out = curves(header, records)
    speeds = [record["tokens_per_s"] for record in records if record["step"] > 1]
    state, speed = _writing(run.directory)
    return {"variant": run.variant, "seed": run.seed, "parameters": header["parameters"], "steps": run.steps,
            "lr": run.config["run"]["lr"], "bits_per_char": held_out[-1][1] if held_out else None,
            "ngram_bpc": header["ngram_bpc"], "tokens_per_s": statistics.median(speeds) if speeds else None,
            "peak_mb": max((record.get("peak_mb") or 0 for record in records), default=0) or None,
            "state_bytes": state, "decode_tokens_per_s": speed}


def _writing(directory: Path) -> tuple[int, float]:
    from autograd import no_grad
    from autograd.cpu.process import blas_threads
    from autograd.random import Random

    from .sample import generate, load

    model, tokenizer = load(str(directory))
    context = model.context
    with no_grad(), blas_threads(1):
        _, state = model.prefill(np.zeros((1, context), np.intp), model.init_state(1))
        size = sum(array.nbytes for array in _arrays(state))
        rates = []
        for seed in range(4):  # the first compiles
            start = time.perf_counter()
            written = sum(1 for _ in generate(model, tokenizer.start(), max(context - 1, 1), Random(seed)))
            rates.append(written / (time.perf_counter() - start))
    return size, statistics.median(rates[1:])


def _arrays(state: Any) -> Iterator[np.ndarray]:
    """The arrays in a tree of tuples."""
    if isinstance(state, tuple | list):
        for part in state:
            yield from _arrays(part)
    elif hasattr(state, "data") and hasattr(state.data, "nbytes"):
        yield state.data


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: the mean over seeds, and the standard deviation of the bits per character."""
    rows = []
    for variant in dict.fromkeys(result["variant"] for result in results):
        own = [result for result in results if result["variant"] == variant]
        bits = [result["bits_per_char"] for result in own if result["bits_per_char"] is not None]
        row = {"variant": variant, "seeds": len(own), "bits_per_char": statistics.mean(bits) if bits else None,
               "spread": statistics.stdev(bits) if len(bits) > 1 else None}
        for key in ("parameters", "lr", "tokens_per_s", "peak_mb", "state_bytes", "decode_tokens_per_s"):
            values = [result[key] for result in own if result[key] is not None]
            row[key] = statistics.median(values) if values else None
        rows.append(row)
    return sorted(rows, key=lambda row: math.inf if row["bits_per_char"] is None else row["bits_per_char"])


def text(rows: list[dict[str, Any]], ngrams: list[float]) -> str:
    """The table as a reader wants it, the best variant first, the n-grams of the same text below."""
    def shown(value, form) -> str:
        return "–" if value is None else form(value)

    lines = [["variant", "parameters", "bits/char", "tokens/s", "peak MB", "state kB", "written tokens/s"]]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        lines.append([row["variant"], count(row["parameters"]), shown(row["bits_per_char"], lambda b: f"{b:.3f}") + spread,
                      shown(row["tokens_per_s"], count), shown(row["peak_mb"], count), f"{row['state_bytes'] / 1e3:.1f}",
                      count(row["decode_tokens_per_s"])])
    for order, bits in enumerate(ngrams):
        lines.append([f"n-gram order {order}", "", f"{bits:.3f}"])
    widths = [max(len(line[i]) for line in lines if len(line) > i) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths, strict=False))).rstrip() for line in lines)


def picture(runs: list[Run], results: list[dict[str, Any]], path: Path) -> Path:
    """The held-out curves of all variants in one picture: the mean over seeds, and every seed thinly."""
    lines = []
    for number, variant in enumerate(dict.fromkeys(result["variant"] for result in results)):
        colour = COLOURS[number % len(COLOURS)]
        done = {result["seed"] for result in results if result["variant"] == variant}
        series = [curves(*read_log(run.directory))[1] for run in runs if run.variant == variant and run.seed in done]
        if len(series) > 1:
            lines += [(points, "", colour, 0.6) for points in series]
        steps = [step for step, _ in series[0] if all(step in dict(points) for points in series)]
        mean = [(step, statistics.mean(dict(points)[step] for points in series)) for step in steps]
        if mean:
            lines.append((mean, variant, colour, 2.0))
    if not lines:
        raise UserError("no run was evaluated (--eval-every 0)")
    return draw(path, lines, results[0]["ngram_bpc"], f"held-out text, {results[0]['steps']} steps")
