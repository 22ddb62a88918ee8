"""Comparing variants: the same data, batches, number of tokens and schedule for all, one process a run.

    plan = Plan(["transformer", "rwkv"], task="mqar")
    compare(plan.runs({"lr": Sweep((1e-3, 3e-3))}, directory=Path("runs/mqar"), seeds=3), Path("runs/mqar"))

A run that is finished is not repeated, one that was interrupted continues, and one that fails does not stop the others. What a
folder holds counts only if it is the same experiment: the same options, the same data, the same held-out part.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from autograd import no_grad
from autograd.cpu.process import blas_threads
from autograd.random import Random

from . import checkpoint, files, tasks, variants
from .config import Options, Sweep, encode, shown, table, to_json
from .errors import CheckpointError, UserError, naming
from .experiment import (
    DEFAULT_TASK,
    Experiment,
    combine,
    default_task,
    elsewhere,
    from_checkpoint,
    namespace,
    preset_layers,
    suits,
)
from .files import PICTURE, TABLE
from .lock import held
from .log import ACCURACY, LOG, read_log
from .options import DEFAULT_PRESET
from .picture import Line, about, curves, draw, look
from .report import count
from .sample import generate, load
from .schema import RunState
from .signals import NUMBERS
from .task import Task

DIRECTORY = "runs/compare"  # unless another is asked for
BEGIN_AGAIN = "choose another --out, or begin again with --overwrite"


class Plan:
    """Which variants are compared on which task, and the options that at least one of them has."""

    def __init__(self, names: Sequence[str] = (), *, task: str | None = None, preset: str | None = None):
        if len(set(names)) < len(names):
            raise UserError(f"{max(names, key=names.count)} is given twice")
        every = [variants.load(name) for name in names or variants.variants()]
        usual = default_task(every[0]) if names else DEFAULT_TASK
        self.task = tasks.load(usual if task is None else task)
        self.preset = DEFAULT_PRESET if preset is None else preset
        self.variants = every if names else [variant for variant in every if suits(variant, self.task)]
        self._namespaces = {variant.name: namespace(variant, self.task) for variant in self.variants}
        self._layers = {variant.name: preset_layers(variant, self.task, self.preset) for variant in self.variants}
        self.options = Options.union(self._namespaces.values(), without=("resume", "init_from", "sample_tokens"),
                                     elsewhere=elsewhere)

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of each option that all variants share, and "by variant" where they differ."""
        tables = [self._namespaces[v.name].merge(*self._layers[v.name])[0] for v in self.variants]
        values = {name: [part[name] for part in tables if name in part] for name in self.options.settings}
        return {name: every[0] if all(value == every[0] for value in every) else "by variant"
                for name, every in values.items()} | {"out": DIRECTORY}

    def runs(self, values: Mapping[str, Any], *, directory: Path, seeds: int = 1, overwrite: bool = False,
             source: str = "arguments") -> list[Run]:
        """Every variant with every seed and every combination of the values of sweeps, each with the options that it has."""
        for name in values:
            if name not in self.options.settings:
                raise UserError(f"{source}: unknown option {name!r}{elsewhere(name)}")
        runs = []
        for variant in self.variants:
            options = {k: v for k, v in values.items() if k in self._namespaces[variant.name].settings}
            sweeps = [name for name, value in options.items() if isinstance(value, Sweep)]
            for combination in itertools.product(*(options[name] for name in sweeps)):
                point = dict(zip(sweeps, combination, strict=True))
                try:
                    layer = source, {**options, **point}
                    experiment, sources = combine(variant, self.task, *self._layers[variant.name], layer)
                    experiment.size(1)  # what does not fit is told now, not when its turn comes
                except UserError as error:
                    raise UserError(f"{variant.name}: {error}") from None
                words = [f"{name.replace('_', '-')}-{shown(value)}" for name, value in point.items()]
                quiet = {"sample_tokens": 0} if "sample_tokens" in sources else {}
                for seed in range(experiment.run.seed, experiment.run.seed + seeds):
                    folder = directory / "-".join([variant.name, *words, str(seed)])
                    one = experiment.replace(seed=seed, out=str(folder), **quiet)
                    sources |= dict(variant=source, task=source)
                    runs.append(Run(one, folder, one.rows(sources), point, overwrite))
        return sorted(runs, key=lambda run: run.seed)


@dataclass(frozen=True)
class Run:
    """One experiment with one seed: its folder, its options as rows for a --config file, and what is swept."""

    experiment: Experiment
    directory: Path
    rows: list[tuple[str, str, Any, str]]
    swept: dict[str, Any]
    overwrite: bool = False

    @property
    def variant(self) -> str:
        return self.experiment.variant.name

    @property
    def seed(self) -> int:
        return self.experiment.run.seed

    @property
    def steps(self) -> int:
        return self.experiment.run.steps

    @property
    def name(self) -> str:
        return ", ".join([self.variant, *(f"{name} {shown(value)}" for name, value in self.swept.items()), f"seed {self.seed}"])

    @cached_property
    def _stored(self) -> RunState | None:
        """The state of the folder's checkpoint, if it counts."""
        if self.overwrite or not checkpoint.exists(self.directory):
            return None
        return checkpoint.read_run(self.directory)

    def done(self) -> int:
        """How many steps are saved and count."""
        return 0 if self._stored is None else self._stored.step

    def check(self) -> None:
        """Raise UserError if the folder holds a run that is not this experiment."""
        with naming(self.directory, CheckpointError):
            before = from_checkpoint(self._stored.config)
        for (what, new), old in zip((("the variant", self.variant), ("the task", self.experiment.task.name)),
                                    (before.variant.name, before.task.name), strict=True):
            if new != old:
                raise UserError(f"{self.directory} holds a run in which {what} is {old}, not {new}: {BEGIN_AGAIN}")
        old = before.identity()
        for name, value in self.experiment.identity().items():
            if old[name] != value:
                raise UserError(f"{self.directory} holds a run in which {name} is {shown(old[name])}, not {shown(value)}: "
                                f"{BEGIN_AGAIN}")

    def check_data(self, data: Mapping[str, Any]) -> None:
        """Raise UserError if the folder holds a run on other data; ``data`` is what a checkpoint would say of it."""
        for name, value in data.items():
            if self._stored.task.get(name) != value:
                raise UserError(f"{self.directory} holds a run on other data (its {name} differs): {BEGIN_AGAIN}")

    def train(self) -> int:
        """Train in a process of its own, from where the folder's checkpoint ends; returns the exit code."""
        step = self.done()
        if step >= self.steps or (step and self._stored.ended):
            return 0
        command = [sys.executable, "-m", "minitv", "train", self.variant]
        if step:
            command += ["--resume", str(self.directory), "--steps", str(self.steps)]
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = self.directory.with_name(self.directory.name + ".toml")
            files.replace(file, encode(table(self.rows) + "\n"))
            command += ["--config", str(file), "--overwrite"]
        return _wait(subprocess.Popen(command))


def _wait(child: subprocess.Popen) -> int:
    """The exit code of a training run, or that of a signal which came when the run was just done.

    A terminal sends Ctrl-C to the run as well, other signals are handed on: it saves and ends, however long that takes.
    """
    asked: list[int] = []  # the signals that came

    def hand_on(number: int, frame: Any) -> None:
        asked.append(number)
        child.send_signal(number)

    numbers = [number for number in NUMBERS if number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in numbers}
    code = None
    try:
        while code is None:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                asked.append(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code or (128 + asked[0] if asked else 0)


def compare(runs: list[Run], directory: Path) -> int:
    """Train all runs, print and save the table, draw the curves; returns 0, 1 if a run failed, 130 if it was stopped."""
    with held(directory):  # each run holds its own folder
        return _compare(runs, directory)


def _compare(runs: list[Run], directory: Path) -> int:
    data: dict[str, dict[str, Any]] = {}  # what a checkpoint says of it, by the options that it depends on
    for run in runs:
        if run.done():
            run.check()
            key = json.dumps([to_json(run.experiment.data), run.experiment.model.context])
            if key not in data:
                data[key] = run.experiment.begin().state()
            run.check_data(data[key])
    failures = []
    for number, run in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {run.name}, folder {run.directory}", file=sys.stderr, flush=True)
        if code := run.train():
            if code in (130, -2, 143, -15, 129, -1):
                print("stopped; the same command goes on from here", file=sys.stderr)
                return 130
            failures.append(run)
            print(f"{run.name}: failed with exit code {code}; the others go on", file=sys.stderr)
    results = [measure(run) for run in runs if run not in failures]
    if not results:
        return 1
    task = runs[0].experiment.task
    rows = summary(results, task)
    metric = {"name": task.metric, "key": field(task), "rising": task.rising}
    contents = {"metric": metric, "runs": results, "variants": rows}
    files.replace(directory / TABLE, (json.dumps(contents, indent=1) + "\n").encode())
    print(text(rows, results[0]["baselines"], task, results[0]["accuracies"]))
    if any(run.swept for run in runs):
        print("\nall runs\n" + every(results, task))
    try:
        print(f"curves: {picture(runs, results, rows, directory / PICTURE)}", file=sys.stderr)
    except UserError as error:
        print(f"no picture of the curves: {error}", file=sys.stderr)
    return 1 if failures else 0


def field(task: type[Task]) -> str:
    """The metric's name in the table's file: bits_per_char, accuracy."""
    return task.unit.replace("/", "_per_").replace(" ", "_")


def measure(run: Run) -> dict[str, Any]:
    """What one finished run gave: the log's figures, the state's size after a full context, and the speed of writing."""
    task = run.experiment.task
    header, records = read_log(run.directory)
    if header.get("parameters") is None:  # of a log that was damaged, for example
        raise CheckpointError(f"{run.directory / LOG}: the header has no parameters; begin again with --overwrite")
    points = curves(run.directory).held_out
    values = [value for _, value in points]
    losses = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    speeds = [record["tokens_per_s"] for record in records if record.get("tokens_per_s") and record["step"] > 1]
    right = [record[ACCURACY] for record in records if record.get(ACCURACY) is not None]
    low, high = f"val_{task.key}_low", f"val_{task.key}_high"
    bounds = [[record[low], record[high]] for record in records if record.get(low) is not None]
    state, speed = _writing(run.directory) or (None, None)
    return {"variant": run.variant, "folder": run.directory.name, "seed": run.seed, "swept": run.swept,
            "parameters": header["parameters"], "steps": run.steps, "lr": run.experiment.run.lr,
            field(task): values[-1] if values else None, "interval": bounds[-1] if bounds else None,
            "val_loss": losses[-1] if losses else None,
            **({"accuracy": right[-1] if right else None} if task.tells_accuracy else {}),
            "steps_to_goal": first_step(points, task),
            "ngram_bpc": header.get("ngram_bpc"), "baselines": header.get("baselines") or {},
            "accuracies": header.get("accuracies") or {},
            "tokens_per_s": statistics.median(speeds) if speeds else None,
            "peak_mb": max((record.get("peak_mb") or 0 for record in records), default=0) or None,
            "state_bytes": state, "decode_tokens_per_s": speed}


def first_step(points: Sequence[tuple[int, float]], task: type[Task]) -> int | None:
    """The first of the steps (step, metric) at which the metric reached the task's goal; None if it never did."""
    if task.goal is None:
        return None
    return next((step for step, value in points if (value >= task.goal if task.rising else value <= task.goal)), None)


def _writing(directory: Path) -> tuple[int, float] | None:
    """The size of the state and the tokens per second of a model that can write; an answer is to a source of full length."""
    trained = load(str(directory))
    if not (trained.answers or trained.experiment.variant.causal):
        return None
    context, model = trained.model.context, trained.model
    if trained.answers:
        model = model.given(np.zeros(context, np.intp))
    with no_grad(), blas_threads(1):
        _, state = model.prefill(np.zeros((1, context), np.intp), model.init_state(1))
        size = state_bytes(state)
        rates = []
        for seed in range(4):  # the first compiles
            start = time.perf_counter()
            tokens = sum(1 for _ in generate(model, np.zeros(1, np.intp), max(context - 1, 1), Random(seed)))
            rates.append(tokens / (time.perf_counter() - start))
    return size, statistics.median(rates[1:])


def state_bytes(state: Any) -> int:
    """The memory of a model's state."""
    return sum(array.nbytes for array in _arrays(state))


def _arrays(state: Any) -> Iterator[np.ndarray]:
    """The arrays in a tree of tuples."""
    if isinstance(state, tuple | list):
        for part in state:
            yield from _arrays(part)
    elif hasattr(state, "data") and hasattr(state.data, "nbytes"):
        yield state.data


def summary(results: list[dict[str, Any]], task: type[Task]) -> list[dict[str, Any]]:
    """One row a variant, the best first: the mean over seeds, and the standard deviation of the metric.

    Of a sweep, the values count whose mean held-out loss over the seeds is lowest.
    """
    key, rows = field(task), []
    for variant in dict.fromkeys(result["variant"] for result in results):
        groups: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            if result["variant"] == variant:
                groups.setdefault(json.dumps(result["swept"]), []).append(result)
        best = min(groups.values(), key=lambda runs: statistics.mean(
            math.inf if run["val_loss"] is None else run["val_loss"] for run in runs))
        values = [run[key] for run in best if run[key] is not None]
        row = {"variant": variant, "seeds": len(best), "swept": best[0]["swept"],
               key: statistics.mean(values) if values else None,
               "spread": statistics.stdev(values) if len(values) > 1 else None,
               "interval": best[0].get("interval") if len(best) == 1 else None}
        if task.tells_accuracy:
            shares = [run["accuracy"] for run in best if run["accuracy"] is not None]
            row["accuracy"] = statistics.mean(shares) if shares else None
        for name in ("parameters", "lr", "tokens_per_s", "peak_mb", "state_bytes", "decode_tokens_per_s"):
            numbers = [run[name] for run in best if run[name] is not None]
            row[name] = statistics.median(numbers) if numbers else None
        steps = statistics.median(run.get("steps_to_goal") or math.inf for run in best)
        row["steps_to_goal"] = steps if math.isfinite(steps) else None
        rows.append(row)
    sign = -1 if task.rising else 1
    return sorted(rows, key=lambda row: math.inf if row[key] is None else sign * row[key])


def _cell(value: Any, form: Any) -> str:
    return "–" if value is None else form(value)


def _swept(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that are swept for at least one variant."""
    return list(dict.fromkeys(name for result in results for name in result["swept"]))


def _values(swept: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Cells with the values of swept options; a variant may not have all of them."""
    texts = {name: f"{value:g}" if isinstance(value, float) else shown(value) for name, value in swept.items()}
    return [texts.get(name, "") for name in names]


def text(rows: list[dict[str, Any]], baselines: Mapping[str, float], task: type[Task],
         accuracies: Mapping[str, float] = MappingProxyType({})) -> str:
    """The table as a reader wants it, the best variant first, the baselines on the same data and their accuracies below."""
    key, swept, told = field(task), _swept(rows), ["accuracy"] * task.tells_accuracy
    lines = [["variant", *swept, "parameters", task.unit, *told, "tokens/s", "peak MB", "state kB", "generated tokens/s"]]
    if task.goal is not None:
        lines[0].append(f"steps to {task.goal:g}")
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        if row.get("interval"):
            spread = " ({:.3f} to {:.3f})".format(*row["interval"])
        lines.append([row["variant"], *_values(row["swept"], swept), count(row["parameters"]),
                      _cell(row[key], lambda value: f"{value:.3f}") + spread,
                      *(_cell(row[name], lambda value: f"{value:.3f}") for name in told), _cell(row["tokens_per_s"], count),
                      _cell(row["peak_mb"], count), _cell(row["state_bytes"], lambda size: f"{size / 1e3:.1f}"),
                      _cell(row["decode_tokens_per_s"], count)])
        if task.goal is not None:
            lines[-1].append(_cell(row["steps_to_goal"], count))
    lines += [[name, *("" for _ in swept), "", f"{value:.3f}", *(f"{accuracies[name]:.3f}" for _ in told)]
              for name, value in baselines.items()]
    return _aligned(lines)


def every(results: list[dict[str, Any]], task: type[Task]) -> str:
    """All runs of a sweep, one a line."""
    key, swept = field(task), _swept(results)
    lines = [["variant", *swept, "seed", task.unit]]
    lines += [[run["variant"], *_values(run["swept"], swept), str(run["seed"]), _cell(run[key], lambda value: f"{value:.3f}")]
              for run in results]
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines if len(line) > i) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths, strict=False))).rstrip() for line in lines)


def picture(runs: list[Run], results: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> Path:
    """The held-out curves of all variants in one picture: the mean over seeds, and every seed thinly."""
    lines, logs = [], []
    keys = {(result["variant"], json.dumps(result["swept"]), result["seed"]) for result in results}
    for row in rows:
        style, swept = look(row["variant"]), json.dumps(row["swept"])
        seeds = [curves(run.directory) for run in runs
                 if (run.variant, json.dumps(run.swept)) == (row["variant"], swept) and (run.variant, swept, run.seed) in keys]
        logs += seeds
        series = [dict(log.held_out) for log in seeds]
        if len(series) > 1:
            lines += [Line(log.held_out, "", style, 0.6) for log in seeds]
        mean = [(step, statistics.mean(points[step] for points in series)) for step in series[0]
                if all(step in points for points in series)]
        if mean:
            lines.append(Line(mean, row["variant"], style, marker="full", best=True))
    if not lines:
        raise UserError("no run was evaluated (--eval-every 0)")
    return draw(path, lines, logs[0].baselines, logs[0].metric, title=f"held-out data, {results[0]['steps']} steps",
                about=about(logs), rising=logs[0].rising)
