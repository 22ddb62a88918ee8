"""Measure: time, memory, states and small trainings for the statements of the review, everything seeded.

- Times are the processor's in one thread, so that other programs count little. Calls that are compared alternate, and the
  fastest of several counts.
- Memory is the peak of what NumPy allocates during a call. A compiled kernel allocates a little besides, a few rows or one
  head's keys and values, which is not counted, nor are the weights and inputs that exist before the call.
- An exponent is the slope of a line through the logarithms of at least six sizes and values, by least squares. Its interval is
  that of Student's t at 95 %, so a curve that is no line has a wide one. For times, the interval also holds the slopes that the
  first and the second half of the rounds give alone: where the machine was busy for a while, they differ.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.special import stdtrit

from autograd import no_grad
from autograd.cpu.process import blas_threads, keep_memory

from .. import api
from ..compare import state_bytes
from ..config import shown
from ..decode import decoder
from ..log import read_log
from ..sample import Trained
from ..timing import alternating, inference

K = TypeVar("K", bound=Hashable)

SIZES = 6  # of a fit, at least
CONFIDENCE = 0.95
VOCAB = 64  # ids of a model that is not trained


@dataclass(frozen=True)
class Fit:
    """value = c · size^exponent through ``points`` (size, value), and the bounds of the exponent's 95 % interval."""

    name: str  # of the size
    exponent: float
    low: float
    high: float
    points: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """The numbers for a file."""
        points = {f"{size:g}": float(f"{value:.5g}") for size, value in self.points}
        return {"exponent": round(self.exponent, 4), "low": round(self.low, 4), "high": round(self.high, 4), "points": points}

    def __str__(self) -> str:
        exponent, low, high = (f"{round(x, 2) + 0.0:.2f}" for x in (self.exponent, self.low, self.high))  # 0.0 makes -0.0 0.0
        return f"{self.name}^{exponent} ({low} to {high})"

    def nearest(self, growths: Mapping[str, float | Callable[[float], float]]) -> str | None:
        """Which of several growths, each an exponent or a function of the size, the whole interval is nearest to.

        A function counts by its slope over the same sizes, T log T for example by about 1.1. None where the interval is nearer
        to one growth at one end and to another at the other, so that they cannot be told apart.
        """
        slopes = {name: slope([(size, growth(size)) for size, _ in self.points])[0] if callable(growth) else float(growth)
                  for name, growth in growths.items()}
        best = {min(slopes, key=lambda name: abs(slopes[name] - at)) for at in (self.low, self.exponent, self.high)}
        return best.pop() if len(best) == 1 else None


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The slope of the logarithms of (size, value), and half the width of its 95 % interval."""
    x, y = np.log(np.array(points, np.float64)).T
    x = x - x.mean()
    squares = float(x @ x)
    exponent = float(x @ y) / squares
    if len(points) < 3:
        return exponent, math.inf
    rest = y - y.mean() - exponent * x
    freedom = len(points) - 2
    return exponent, float(stdtrit(freedom, (1 + CONFIDENCE) / 2) * math.sqrt(float(rest @ rest) / freedom / squares))


class Run(NamedTuple):
    """A small training that is done."""

    trained: Trained
    value: float  # of the task's metric on held-out data, at the last evaluation
    interval: tuple[float, float] | None  # of the metric at 95 %, where the task knows it
    loss: float  # on held-out data, in nats an answer
    baselines: dict[str, float]  # the metric of what does not learn
    records: list[dict[str, Any]]  # of log.jsonl
    parameters: int
    folder: Path  # as long as the Measure is open

    @property
    def model(self) -> Any:
        """The model with the last weights."""
        return self.trained.model


class Measure:
    """What an experiment measures with. ``full`` asks for more and larger sizes; close it, or use it in a ``with``."""

    def __init__(self, full: bool = False, progress: Callable[[str], None] = lambda text: None):
        keep_memory()  # as a training does; else large arrays cost a page fault for every 4 kB, in every call
        self.full, self.progress = full, progress
        self.begin(0)
        self._runs: dict[str, Run] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def begin(self, number: int) -> None:
        """Before the experiment of a statement: it draws the same numbers whatever was measured before."""
        self.rng = np.random.default_rng(number)

    def close(self) -> None:
        """Remove the folders of all trainings."""
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Measure:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- sizes and arrays

    def sizes(self, fast: K, full: K) -> K:
        """One of two values, as --full says."""
        return full if self.full else fast

    def normal(self, *shape: int) -> np.ndarray:
        """Numbers from N(0, 1), float32."""
        return self.rng.standard_normal(shape, np.float32)

    def ids(self, *shape: int, vocab: int = VOCAB) -> np.ndarray:
        """Ids of tokens."""
        return self.rng.integers(0, vocab, shape)

    def model(self, variant: str, **options: Any) -> Any:
        """A new model with the options of ``minitv train``, for ``vocab`` ids."""
        return api.build(variant, **{"vocab": VOCAB, **options})

    def layer(self, variant: str, length: int, width: int, **options: Any) -> Callable[[], Any]:
        """A call of a layer of a new model, its mixer and what follows it, over x[1 length width], without the tape."""
        return inference(self.model(variant, context=length, width=width, layers=1, **options).blocks[0],
                         self.normal(1, length, width))

    # -- time

    def times(self, calls: Mapping[K, Callable[[], object]], seconds: float | None = None) -> dict[K, list[float]]:
        """The seconds of calls that alternate, in each of five rounds or more; ``seconds`` in all unless calls are long."""
        seconds = self.sizes(1.5, 6.0) if seconds is None else seconds
        with blas_threads(1), np.errstate(all="ignore"):
            return alternating(calls, seconds, clock=time.thread_time)

    def seconds(self, call: Callable[[], object]) -> float:
        """The fastest of several calls."""
        return min(self.times({"": call})[""])

    def ratio(self, call: Callable[[], object], other: Callable[[], object]) -> Ratio:
        """The time of a call over that of another; they alternate."""
        times = self.times({0: call, 1: other})
        quotients = [a / b for a, b in zip(times[0], times[1], strict=True)]
        halves = [_least(times, half) for half in _halves(times)]
        values = [each[0] / each[1] for each in (*halves, _least(times))]
        return Ratio(values[-1], min(values), max(values), float(np.median(quotients)))

    def exponent(self, name: str, values: Mapping[float, Callable[[], object] | float], seconds: float | None = None) -> Fit:
        """The exponent with which values grow over sizes; values are numbers, or calls whose times are measured."""
        if len(values) < SIZES:
            raise ValueError(f"an exponent needs at least {SIZES} sizes, got {len(values)}")
        if not all(map(callable, values.values())):
            return fitted(name, [(size, float(value)) for size, value in values.items()])
        self.progress(f"times of {name} = {', '.join(map(shown, values))}")
        times = self.times(values, seconds)
        alone = [slope(list(_least(times, half).items()))[0] for half in _halves(times)]
        return fitted(name, list(_least(times).items()), alone)

    def steps(self, model: Any, positions: Sequence[int], count: int = 32) -> dict[int, list[float]]:
        """The seconds of each of ``count`` tokens that a model writes after so many; positions alternate, tokens are fused."""
        readers = {position: decoder(model) for position in positions}
        with blas_threads(1):
            for position, reader in readers.items():
                reader.prefill(self.ids(position)[None])
            calls = {position: functools.partial(reader.step, [0]) for position, reader in readers.items()}
            return alternating(calls, 0.0, count, 1, time.thread_time)

    # -- memory

    def memory(self, call: Callable[[], object]) -> int:
        """The peak of the bytes that NumPy allocates during a call, what it returns included; kernels' own are not counted."""
        call()  # compiles, and fills caches
        gc.collect()
        traced = tracemalloc.is_tracing()
        if not traced:
            tracemalloc.start()
        try:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            kept = call()
            _, peak = tracemalloc.get_traced_memory()
            del kept
        finally:
            if not traced:
                tracemalloc.stop()
        return peak - before

    def state_bytes(self, model: Any, t: int) -> int:
        """The memory of the state of a model that has read t tokens."""
        with no_grad():
            state = model.init_state(1)
            if t:
                _, state = model.prefill(np.zeros((1, t), np.intp), state)
        return state_bytes(state)

    # -- training

    def train(self, variant: str, **options: Any) -> Run:
        """A small training with the options of ``minitv train`` (task=, preset=, steps=, ...); the same one is done once."""
        key = json.dumps([variant, options], sort_keys=True)
        if key not in self._runs:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="minitv-claims-")
            folder = Path(self._folder.name) / str(len(self._runs))
            label = f"training {variant}" + (f" for {options['task']}" if "task" in options else "")

            def on_step(record: dict[str, Any]) -> None:
                if record["step"] % 50 == 0:
                    self.progress(f"{label}, step {record['step']}")

            self.progress(label)
            with contextlib.redirect_stderr(io.StringIO()):  # a training talks
                trained = api.train(variant, out=str(folder), on_step=on_step, **options)
            self._runs[key] = _run(trained, folder)
        return self._runs[key]


@dataclass(frozen=True)
class Ratio:
    """The time of a call over that of another, of the fastest of each; the smallest and largest of the rounds' halves."""

    value: float
    low: float
    high: float
    median: float  # of the quotients within a round

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    def __float__(self) -> float:
        return self.value


def fitted(name: str, points: list[tuple[float, float]], alone: list[float] | None = None) -> Fit:
    """The exponent of points (size, value), whose interval also holds the exponents ``alone``."""
    exponent, half = slope(points)
    slopes = [exponent - half, exponent + half, *(alone or [])]
    return Fit(name, exponent, min(slopes), max(slopes), tuple(points))


def _halves(times: Mapping[Any, list[float]]) -> tuple[slice, slice]:
    """The first and the second half of the rounds."""
    rounds = len(next(iter(times.values())))
    return slice(0, rounds // 2), slice(rounds // 2, rounds)


def _least(times: Mapping[K, list[float]], rounds: slice = slice(None)) -> dict[K, float]:
    """The fastest of some rounds of each call."""
    return {name: min(each[rounds]) for name, each in times.items()}


def _run(trained: Trained, folder: Path) -> Run:
    header, records = read_log(folder)
    key = header["metric"]["key"]
    last = [record for record in records if record.get(f"val_{key}") is not None][-1]
    low, high = (last.get(f"val_{key}_{bound}") for bound in ("low", "high"))
    return Run(trained, last[f"val_{key}"], None if low is None else (low, high), last["val_loss"], header["baselines"],
               records, header["parameters"], folder)


def lower(values: Sequence[float], others: Sequence[float]) -> bool | None:
    """Whether all of several seeds are below all others: True, False where they are above, None where they overlap."""
    return True if max(values) < min(others) else False if min(values) > max(others) else None


def span(values: Sequence[float]) -> str:
    """The mean of several seeds, and the smallest and largest."""
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")
