"""Optimizer steps on batches of a task, on threads or on a GPU.

Worker threads pull micro-batches of up to 512 tokens from a counter and run the tape on them, with serial kernels and
one-threaded BLAS: a core that is slow for a moment takes fewer. Where the last ones are fewer than workers, as with a single
long sequence, the others take parts of their calls (autograd/cpu/team.py). Which gradients meet in which of the flat buffers,
and in which order, depends on the micro-batch's number alone, so a run is determined by its seed and its number of threads.
Losses and gradients are sums over the answers that a task asks for; they are divided once, by the number of answers in the
whole batch, so that micro-batches with more and with fewer answers add up exactly.

On a GPU one worker takes the whole batch, or as much of it as MICRO_BATCH_TOKENS_GPU allows, and the host reads once a
step: the loss, the norm of the gradient, and whether any id was out of range.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from typing import Any

import numpy as np

from autograd import NonFiniteError, check_mode
from autograd.cpu.companion import Companion, watch
from autograd.cpu.process import blas_threads, cores, keep_memory, uncollected
from autograd.cpu.team import Team
from autograd.device import is_cupy, read, select
from autograd.random import Random
from autograd.state import products

from . import variants
from .experiment import BUFFERS, DROPOUT, Experiment
from .nn import Module, Statistics
from .optim import AdamW, cosine
from .signals import outcome
from .task import Batch, Task


class Trainer:
    """The model of an experiment, its optimizer and the worker threads; ``step`` is an optimizer step on a batch."""

    MICRO_BATCH_TOKENS = 512  # activations of this many tokens stay in a core's private cache
    MICRO_BATCH_TOKENS_GPU = 2**15  # those of `small` then take about 6 GB
    REHEARSED = 2**26  # trained values: of a larger model there may be no room for another one

    def __init__(self, experiment: Experiment, task: Task):
        keep_memory()
        self.experiment, self.run, self.task = experiment, experiment.run, task
        run = self.run
        on_gpu = run.device != "cpu"
        self.workers = 1 if on_gpu else run.threads or cores()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._map = map if on_gpu else self._in_pool  # which card is the current one is a matter of the thread
        self._team = Team(self.workers)
        if on_gpu:
            self.MICRO_BATCH_TOKENS = self.MICRO_BATCH_TOKENS_GPU
            select(run.device)
        self._companion = None if on_gpu or self.workers < 2 else Companion()
        watch(self._companion)
        loading = None if on_gpu else self._pool.submit(_load_compiler)
        # One buffer more than workers: who is ahead goes on with the next micro-batch instead of waiting for its turn.
        most = min(self.workers, run.batch)
        buffers = most + (most > 1)
        copies = 1 if on_gpu else 3 + buffers  # with the optimizer's two averages and the gradients
        self.model = experiment.build(task.vocab, copies).to(run.device)
        self.optimizer = AdamW(self.model, beta1=run.beta1, beta2=run.beta2, weight_decay=run.weight_decay,
                               clip=run.clip, buffers=buffers)
        if self._companion is not None and self._companion.cold:
            with suppress(NotImplementedError):  # not every task makes batches of its own
                self._rehearse(task.batch(0))
        self._began = False  # whether a step was taken
        self.grad_norm = self.lr = math.nan
        self._redrawn = Random(run.seed).split(BUFFERS)
        self._redraws = any(type(module).redraw is not Module.redraw for module in self.model.modules())
        self._dropout = Random(run.seed).split(DROPOUT) if experiment.model.dropout else None
        if loading is not None:
            outcome(loading)  # it may hold BLAS to one thread, and then gives it back what it had
        self._blas = blas_threads(1)
        self._blas.__enter__()

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return self.optimizer.param.size

    def step(self, batch: Batch, step: int) -> float:
        """Forward, backward and update at 0-based ``step``; returns the mean loss in nats over all answers of the batch.

        ``grad_norm`` and ``lr`` hold what was used. A loss or norm that is not finite updates nothing.
        """
        if self._began:
            return self._step(batch, step)
        with self._compiling(batch):
            loss = self._step(batch, step)
        self._began = True
        self._dismiss_companion()
        return loss

    def _step(self, batch: Batch, step: int) -> float:
        slices = self._slices(batch)
        buffers = self.optimizer.buffers
        losses, counts = [math.nan] * len(slices), [0] * len(slices)
        events, statistics = [threading.Event() for _ in slices], Statistics()
        if self._redraws:
            self.model.begin_step(step, self._redrawn)

        def work(i: int) -> None:
            try:
                before = events[i - len(buffers)] if i >= len(buffers) else None
                with statistics.part(i):
                    losses[i], counts[i] = self._micro_batch(batch, slices[i], step, i, buffers[i % len(buffers)], before)
            finally:
                events[i].set()

        self._each(work, len(slices))
        count = sum(counts)
        loss, squares = read(sum(losses), self.optimizer.squares(self._map, self.workers))
        self.lr = cosine(step, lr=self.run.lr, min_lr=self.run.min_lr, warmup=self.run.warmup, steps=self.run.steps)
        self.grad_norm = (self.optimizer.update(self.lr, squares, self._map, self.workers, count=max(count, 1))
                          if math.isfinite(loss) else math.nan)
        if math.isfinite(self.grad_norm):
            statistics.apply()
        return loss / max(count, 1)

    def evaluate(self, batch: Batch) -> np.ndarray:
        """The sums that the task's ``score`` gives, over a whole batch, without dropout."""
        slices = self._slices(batch)
        scores: list = [None] * len(slices)

        def score(i: int) -> None:
            with _not_finite():
                scores[i] = self.task.score(self.model, batch.part(slices[i]))

        with nullcontext() if self._began else self._compiling(batch):
            self._each(score, len(slices))
        return sum(scores)

    def find_nonfinite(self, batch: Batch, step: int) -> str | None:
        """Which operator first makes a NaN or an infinity on this batch, as a sentence; None when none does."""
        self.model.begin_step(step, self._redrawn)
        with check_mode():
            for i, part in enumerate(self._slices(batch)):
                try:
                    with Statistics().part(i):
                        self._micro_batch(batch, part, step, i, lambda parameter, gradient: None)
                except NonFiniteError as error:
                    return str(error)
        return None

    def close(self, wait: bool = True) -> None:
        """Stop the worker threads and give BLAS its threads back; ``wait`` until they have done what they are at."""
        self._dismiss_companion()
        for pool in self._pools.values():
            pool.shutdown(wait, cancel_futures=not wait)
        self._blas.__exit__(None, None, None)

    @contextmanager
    def _compiling(self, batch: Batch) -> Iterator[None]:
        """What happens in here compiles its kernels first, and a companion some of them."""
        self._rehearse(batch)
        with uncollected():
            yield

    def _rehearse(self, batch: Batch) -> None:
        """Tell the companion the first step, on one micro-batch."""
        if self._companion is not None and self.parameters <= self.REHEARSED:
            whole, part = self.experiment, batch.part(self._slices(batch)[0])
            self._companion.rehearse(rehearse, whole.variant.name, whole.task, whole.options, self.task, part)

    def _dismiss_companion(self) -> None:
        """After the first step all kernels are there."""
        if self._companion is not None:
            self._companion.close()
            watch(None)
            self._companion = None

    def _each(self, work: Callable[[int], None], count: int) -> None:
        """``work(i)`` for every i below the count, by all workers: those that are left over help with the last ones."""
        counter, finished = itertools.count(), itertools.count(1)

        def pull(worker: int) -> None:
            try:
                while (i := next(counter)) < count:
                    with self._team if i >= count - count % self.workers else nullcontext():
                        work(i)
            finally:
                last = next(finished) == self.workers
                if last:
                    self._team.dismiss(self.workers - 1)
            if not last:
                self._team.help()

        list(self._map(pull, range(self.workers)))

    def _in_pool(self, function: Callable, items) -> list:
        """``map`` in the worker threads, under the switches of the caller (no_grad, use, check_mode)."""
        started = [self._pool.submit(copy_context().run, function, item) for item in items]
        return list(map(outcome, started))

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """The worker threads of this process: a fork has none of those of its parent."""
        if (process := os.getpid()) not in self._pools:
            self._pools[process] = ThreadPoolExecutor(self.workers, thread_name_prefix="minitv")
        return self._pools[process]

    def _micro_batch(self, batch: Batch, part: slice, step: int, index: int, sink: Callable, before=None):
        rng = self._dropout and self._dropout.split(step, index)
        with _not_finite(), products(self.run.matmul):
            loss, count = self.task.loss(self.model, batch.part(part), rng)
            if before is not None:
                before.wait()
            on_gpu = is_cupy(loss.data)
            value = loss.data if on_gpu else loss.item()  # a GPU is not waited for
            if on_gpu or math.isfinite(value):
                loss.backward(sink=sink)
        return value, count

    def _slices(self, batch: Batch) -> list[slice]:
        """Micro-batches: equal for all workers where that is possible."""
        sequences = len(batch.labels)
        size = max(1, min(-(-sequences // self.workers), self.MICRO_BATCH_TOKENS // max(batch.length, 1)))
        parts = -(-sequences // size)
        edges = [sequences * i // parts for i in range(parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


def rehearse(variant: str, kind: type[Task], options: tuple[Any, ...], task: Task, batch: Batch) -> None:
    """A step of a new model of an experiment: what a companion runs, see autograd/cpu/companion.py."""
    Trainer(Experiment(variants.load(variant), kind, *options), task).step(batch, 0)


def _not_finite() -> np.errstate:
    """NumPy says nothing of numbers that are not finite: a run looks for them itself, and ends with a sentence."""
    return np.errstate(over="ignore", invalid="ignore")


def _load_compiler() -> None:
    """What takes a quarter of a second at the first kernel call, to do while the weights are drawn."""
    with uncollected():
        from autograd.cpu.gemm import prepare

        prepare()
