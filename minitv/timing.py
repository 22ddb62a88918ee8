"""The time of calls: the shortest of many, several that alternate, and where one curve of times falls below another."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from autograd import Tensor, gradients, no_grad

K = TypeVar("K", bound=Hashable)

SHORT_S, MANY = 0.002, 50  # a shorter call is repeated within a round, so often unless something else is asked for
PATIENCE = 10  # how much longer than asked for rounds may take where the clock stands still, as while a call waits


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit into ``seconds`` (at least three), after one that is not counted."""
    return min(alternating({"": call}, seconds, 3)[""])


def alternating(calls: Mapping[K, Callable[[], object]], seconds: float, rounds: int = 5,
                most: int = MANY, clock: Callable[[], float] = time.perf_counter) -> dict[K, list[float]]:
    """The seconds of each call in every round; a slow moment of the machine meets all of them.

    Each is called once without being counted, and then once a round, in turned order every other round, as long as ``seconds``
    are not over, and at least ``rounds`` times. Of a short call a round keeps the fastest of several, ``most`` at most. With
    time.thread_time as ``clock``, the time is that of the processor in this thread, and other programs hardly count.
    """
    def timed(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    times: dict[K, list[float]] = {name: [] for name in calls}
    repeats = {}
    with _undisturbed():
        for name, call in calls.items():
            call()
            repeats[name] = max(1, min(most, round(SHORT_S / max(timed(call), 1e-9))))
        end, latest, done = clock() + seconds, time.perf_counter() + PATIENCE * seconds, 0
        while done < rounds or (clock() < end and time.perf_counter() < latest):
            for name in list(calls)[:: -1 if done % 2 else 1]:
                times[name].append(min(timed(calls[name]) for _ in range(repeats[name])))
            done += 1
    return times


@contextmanager
def _undisturbed():
    """Python's garbage collector waits."""
    running = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def inference(function: Callable, *inputs: Any, **params: Any) -> Callable[[], Any]:
    """A call of ``function`` without the tape."""
    def call() -> Any:
        with no_grad():
            return function(*inputs, **params)

    return call


def training(function: Callable, *inputs: Any, weights: Sequence[Tensor] = (), **params: Any) -> Callable[[], list[Tensor]]:
    """A call of ``function``, and then the gradients of the sum of its outputs for every array of floats and every weight.

    ``inputs`` are arrays, None, or what else the function takes.
    """
    def call() -> list[Tensor]:
        arrays = [Tensor.wrap(x, True) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in inputs]
        outputs = function(*arrays, **params)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(y, Tensor)]
        leaves = [x for x, given in zip(arrays, inputs, strict=True) if x is not given]
        return gradients(outputs, [*leaves, *weights], [Tensor.wrap(np.ones_like(y.data)) for y in outputs])

    return call


def crossover(sizes: Sequence[float], values: Sequence[float], others: Sequence[float]) -> float | None:
    """The size, between two that were measured, from which on ``values`` are below ``others``; None without one."""
    gaps = [math.log(value / other) for value, other in zip(values, others, strict=True)]
    last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=-1)  # the last size where they are not
    if last < 0 or last == len(gaps) - 1:
        return None
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    return round(sizes[last] * (sizes[last + 1] / sizes[last]) ** share)
