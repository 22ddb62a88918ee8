"""Optimizer steps on batches of a task, on threads, on ranks, or on a GPU.

A batch is cut into micro-batches, by its sizes alone: of up to 512 tokens on a CPU, and two at least. Each rank has a share of
them, and its worker threads pull them from a counter and run the tape on them, with serial kernels and one-threaded BLAS: a
core that is slow for a moment takes fewer. Where the last ones are fewer than workers, as with a single long sequence, the
others take parts of their calls (autograd/cpu/team.py). From the second step on, on Linux, the workers are copies of this
process, if all of them get about as many micro-batches (forks.py).

Gradients are added up in a fixed tree over the numbers of the micro-batches (summing.py), and whatever else is a sum in their
order. So a run is determined by its seed: on the same kind of processor, any number of threads and ranks gives the same bits.
Losses and gradients are sums over the answers that a task asks for; they are divided once, by the number of answers in the
whole batch, so that micro-batches with more and with fewer answers add up exactly.

With --sequence-ranks R the ranks are divided into lines of R that share the same sequences (sequence.py): the micro-batches are
shared by the lines, and the ranks of a line take one after the other together, each its positions; all threads of a rank work
on it. What such a step computes equals that of one rank to rounding.

Ranks exchange gradients when the share of each is computed, in buckets: until then the last micro-batch is missing everywhere.

On a GPU one worker takes the whole batch, or as much of it as MICRO_BATCH_TOKENS_GPU allows, and the host reads once a
step: the loss, the norm of the gradient, and whether any id was out of range.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from typing import Any

import numpy as np
import safetensors.numpy

from autograd import NonFiniteError, check_mode
from autograd.cpu.companion import Companion, watch
from autograd.cpu.process import blas_threads, cores, keep_memory, uncollected
from autograd.cpu.team import Team
from autograd.device import is_cupy, read, select
from autograd.random import Random
from autograd.ranks import Communicator
from autograd.state import Switches, products, switches

from . import forks, variants
from .errors import UserError
from .experiment import BUFFERS, DROPOUT, Experiment
from .nn import Module, Statistics
from .optim import AdamW, cosine
from .sequence import Share, sharing
from .signals import outcome
from .summing import Gradients, plan, share
from .task import Batch, Task


class Trainer:
    """The model of an experiment, its optimizer and the worker threads; ``step`` is an optimizer step on a batch.

    With ``ranks`` every rank has a trainer, and all call the same methods with the same batches: each computes its share. Where
    they have processors of different kinds (``unlike``), whose weights would drift apart bit by bit, rank 0's are everybody's.
    ``threads`` are those of a run that asks for none; by default all cores.
    """

    MICRO_BATCH_TOKENS = 512  # activations of this many tokens stay in a core's private cache
    MICRO_BATCH_TOKENS_GPU = 2**15  # those of `small` then take about 6 GB
    LEAST = 2  # micro-batches of a batch on a CPU: more would be smaller, and NumPy's calls would take longer than what they do
    REHEARSED = 2**26  # trained values: of a larger model there may be no room for another one

    def __init__(self, experiment: Experiment, task: Task, ranks: Communicator | None = None, *,
                 threads: int | None = None, unlike: bool = False):
        keep_memory()
        self.experiment, self.run, self.task = experiment, experiment.run, task
        self.ranks, self._unlike = ranks or Communicator(), unlike
        run = self.run
        self._lines: tuple[Communicator, Communicator] | None = None
        self.sent = 0  # bytes that the layers of the rank that sends most sent to those of its line, in the last step
        on_gpu = run.device != "cpu"
        self.workers = 1 if on_gpu else run.threads or threads or cores()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._started: list[Future] = []
        self._map = map if on_gpu else self._in_pool  # which card is the current one is a matter of the thread
        self._team, self._alone = Team(self.workers), Team(1)
        if on_gpu:
            self.MICRO_BATCH_TOKENS, self.LEAST = self.MICRO_BATCH_TOKENS_GPU, self.ranks.size // run.sequence_ranks
            select(run.device)
        self._forkable = forks.AVAILABLE and not on_gpu
        self._forks: forks.Forks | None = None
        self._shared: list[list] = []  # the gradient buffers of each process
        self._companion = None if on_gpu or self.workers < 2 or self.ranks.size > 1 else Companion()
        watch(self._companion)
        loading = None if on_gpu else self._pool.submit(_load_compiler)
        # Of a buffer for each worker and of those in which sums wait for others.
        parts = min(run.batch, max(self.LEAST, run.batch * experiment.model.context // self.MICRO_BATCH_TOKENS))
        buffers = sum(plan(parts, self.workers).buffers)
        copies = 1 if on_gpu else 3 + buffers  # with the optimizer's two averages and the gradients
        self.model = experiment.build(task.vocab, copies).to(run.device)
        self.optimizer = AdamW(self.model, beta1=run.beta1, beta2=run.beta2, weight_decay=run.weight_decay, clip=run.clip)
        self._buffers = list(self.optimizer.buffers)  # those that are free
        if self._companion is not None and self._companion.cold:
            with suppress(NotImplementedError):  # not every task makes batches of its own
                self._rehearse(task.batch(0))
        self._began = False  # whether a step was taken
        self.grad_norm = self.lr = math.nan
        self._redrawn = Random(run.seed).split(BUFFERS)
        modules = list(self.model.modules())
        self._redraws = any(type(module).redraw is not Module.redraw for module in modules)
        self._counts = any(type(module).add_statistics is not Module.add_statistics for module in modules)
        self._dropout = Random(run.seed).split(DROPOUT) if experiment.model.dropout else None
        if loading is not None:
            outcome(loading)  # it may hold BLAS to one thread, and then gives it back what it had
        self._blas = blas_threads(1)
        self._blas.__enter__()

    @property
    def line(self) -> Communicator:
        """The ranks that share sequences with this one."""
        return self._divided()[0]

    @property
    def across(self) -> Communicator:
        """The ranks that have the same positions of other sequences."""
        return self._divided()[1]

    def _divided(self) -> tuple[Communicator, Communicator]:
        """Divide the ranks at the first use, which is one of all ranks together; they are made one after the other."""
        if self._lines is None:  # no cached_property: before Python 3.12 it has a lock that ranks in threads share
            count = self.run.sequence_ranks
            self._lines = ((Communicator(), self.ranks) if count == 1 else
                           (self.ranks.split(self.ranks.rank // count), self.ranks.split(self.ranks.rank % count)))
        return self._lines

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return self.optimizer.param.size

    def align(self) -> None:
        """Give all ranks the first weights of rank 0, whose last bits other kinds of processors draw in another way."""
        if self._unlike:
            for array in self.model.saved().values():
                self.ranks.broadcast(array.data)

    def notes(self, batch: Batch) -> list[str]:
        """What a user of several threads or ranks should know of a batch, as sentences."""
        parts, notes = len(self._slices(batch)), []
        ranks = self.across.size
        if ranks > parts:
            notes.append(f"a batch is cut into {parts} micro-batches, so {ranks - parts} of {ranks} ranks have none: a smaller "
                         "--micro-batch gives all of them work")
        elif self.line.size == 1 < self.workers and ranks * self.workers > 2 * parts:
            notes.append(f"a batch is cut into {parts} micro-batches, for {ranks * self.workers} threads: a smaller "
                         "--micro-batch gives more of them work of their own")
        if self._unlike:
            notes.append("the ranks have processors of different kinds: all take the weights that rank 0 computes, and the "
                         "last bits depend on which kind computes what")
        return notes

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
        mine, before = share(len(slices), self.across.rank, self.across.size), self.line.sent
        losses, counts, statistics = [math.nan] * len(slices), [0] * len(slices), Statistics()
        optimizer = self.optimizer
        message = self._message(batch, step, len(slices))
        if self._redraws:
            self.model.begin_step(step, self._redrawn)
        if message is not None:
            gradients = self._by_forks(batch, step, message, losses, counts, statistics)
        else:
            gradients = Gradients(plan(len(slices), self.across.size), self._buffers, optimizer.buffer, optimizer.add)

            def work(i: int) -> None:
                losses[i], counts[i] = self._add_micro_batch(batch, slices[i], step, i, gradients, statistics)

            self._each(work, mine)
        if self.line.size > 1:
            self.sent = int(self.ranks.gather(np.array(self.line.sent - before)).max())
        if self.across.size > 1:
            self._gather(losses, counts, mine, statistics)
        count = sum(counts)
        total, pairs = gradients.finish(self.across)
        if self.line.size > 1:
            for left, right in pairs:
                optimizer.add(left, right)
            self.line.sum(total.flat)
            pairs = []
        loss, squares = read(sum(losses), optimizer.squares(self._map, pairs, total))
        self.lr = cosine(step, lr=self.run.lr, min_lr=self.run.min_lr, warmup=self.run.warmup, steps=self.run.steps)
        self.grad_norm = (optimizer.update(self.lr, squares, self._map, count=max(count, 1)) if math.isfinite(loss)
                          else math.nan)
        if self._unlike:
            norm = np.array(self.grad_norm)
            self.ranks.broadcast(optimizer.param)
            self.ranks.broadcast(norm)
            self.grad_norm = float(norm)
        if math.isfinite(self.grad_norm):
            statistics.apply()
        return loss / max(count, 1)

    def _add_micro_batch(self, batch: Batch, rows: slice, step: int, index: int, gradients: Gradients,
                         statistics: Statistics) -> tuple:
        """Add the gradient of a micro-batch to the others; returns its loss and the number of its answers."""
        buffer = gradients.take()
        with statistics.part(index):
            found = self._micro_batch(batch, rows, step, index, buffer, self.line)
        buffer.finish()
        gradients.put(index, buffer)
        return found

    # -- workers that are processes --------------------------------------------------------------------------------------
    def _message(self, batch: Batch, step: int, count: int) -> bytes | None:
        """What copies of this process hear of a step of so many micro-batches that they share; None where threads take it.

        Threads take the first step, whose kernels are compiled once; steps on a GPU, of several ranks, and outside the main
        thread, with which copies would end; steps under a switch, which copies would not know of; and those in which the
        largest share would be more than 5/4 of the mean.
        """
        if self._forks is not None and self._forks.owner != os.getpid():  # in a copy that somebody else has made
            self._end_forks()
            self._lay(lambda like: np.empty(like.size, like.dtype))
        if not (self._forkable and self._began and self.workers > 1 and self.ranks.size == 1
                and threading.current_thread() is threading.main_thread() and switches() == Switches()
                and 4 * -(-count // self.workers) * self.workers <= 5 * count):
            return None
        most, message = max(plan(count, self.workers).buffers), forks.packed(batch, step)
        if message is None:
            self._end_forks()
            self._forkable = False
        elif not self._shared or most > len(self._shared[0]):
            self._end_forks()
            if all(future.done() for future in self._started):  # none is left of a step that was interrupted
                self._fork(most)
        return message if self._forks is not None else None

    def _fork(self, buffers: int) -> None:
        """Make copies of this process with so many buffers for gradients each; nothing where the system refuses."""
        self._buffers.clear()
        try:
            self._lay(forks.shared)
            self._shared = [[self.optimizer.buffer(forks.shared(self.optimizer.param)) for _ in range(buffers)]
                            for _ in range(self.workers)]
            self._forks = forks.Forks(self.workers - 1, lambda number, *message: self._portion(number + 1, *message))
        except OSError:  # there is no memory, or there are no more processes for this user
            self._end_forks()
            self._forkable = False

    def _lay(self, make: Callable[[np.ndarray], np.ndarray]) -> None:
        """Let parameters and buffers lie in flat arrays that ``make`` gives for others of the same size."""
        self.optimizer.move(make(self.optimizer.param))
        for _, buffer in self.model.named_buffers():
            if buffer.saved and buffer.size:
                flat = make(buffer.data)
                flat[...] = buffer.data.reshape(-1)
                buffer.data = flat.reshape(buffer.shape)

    def _by_forks(self, batch: Batch, step: int, message: bytes, losses: list, counts: list[int],
                  statistics: Statistics) -> Gradients:
        """Let all processes compute their shares: fills in the lists, and returns the sums of the gradients."""
        gradients = Gradients(plan(len(losses), self.workers), [], self.optimizer.buffer, self.optimizer.add)

        def portion(number: int) -> tuple:
            return self._portion(0, batch, step) if number == 0 else self._forks.ask(number - 1, message)

        try:
            portions = self._map(portion, range(self.workers))
        except BaseException:
            self._end_forks()  # answers may be on their way
            raise
        for number, (found, sums, counted) in enumerate(portions):
            for i, (loss, answers) in zip(share(len(losses), number, self.workers), found, strict=True):
                losses[i], counts[i] = loss, answers
            gradients.sums |= {node: self._shared[number][place] for node, place in sums.items()}
            if self._counts:
                statistics.decode(counted, list(self.model.modules()), self.optimizer.param)
        return gradients

    def _portion(self, number: int, batch: Batch, step: int) -> tuple:
        """The share of process ``number``: losses and counts, where the sums of gradients lie, and what was counted."""
        slices, statistics, buffers = self._slices(batch), Statistics(), self._shared[number]
        gradients = Gradients(plan(len(slices), self.workers), list(buffers), self.optimizer.buffer, self.optimizer.add)
        with self._alone:
            found = [self._add_micro_batch(batch, slices[i], step, i, gradients, statistics)
                     for i in share(len(slices), number, self.workers)]
        places = {id(buffer): place for place, buffer in enumerate(buffers)}
        return (found, {node: places[id(buffer)] for node, buffer in gradients.sums.items()},
                statistics.encoded(list(self.model.modules())) if self._counts else b"")

    def _end_forks(self) -> None:
        if self._forks is not None:
            self._forks.close()
        self._forks, self._shared = None, []

    def _gather(self, losses: list, counts: list[int], mine: range, statistics: Statistics) -> None:
        """Fill in what the other ranks have of a step: the losses, how many answers there are, and what modules counted."""
        part = slice(mine.start, mine.stop)
        table = np.zeros((len(losses), 2))
        table[part, 0], table[part, 1] = read(*losses[part]), counts[part]
        for rank, others in enumerate(self.across.gather(table)):
            theirs = share(len(losses), rank, self.across.size)
            for i in theirs:
                losses[i], counts[i] = others[i, 0], int(others[i, 1])
        if self._counts:
            modules = list(self.model.modules())
            for content in self.across.gather_bytes(statistics.encoded(modules)):
                statistics.decode(content, modules, self.optimizer.param)

    def evaluate(self, batch: Batch) -> np.ndarray:
        """The sums that the task's ``score`` gives, over a whole batch, without dropout."""
        slices = self._slices(batch)
        mine = share(len(slices), self.across.rank, self.across.size)
        scores: list = [None] * len(slices)

        def score(i: int) -> None:
            with _not_finite(), sharing(part := self._share(batch, self.line)):
                scores[i] = self.task.score(self.model, _positions(batch.part(slices[i]), part))
            if part is not None:
                scores[i] = np.array(scores[i], np.float64)
                self.line.sum(scores[i])

        with nullcontext() if self._began else self._compiling(batch):
            self._each(score, mine)
        if self.across.size > 1:
            own = safetensors.numpy.save({str(i): np.asarray(scores[i]) for i in mine})
            for content in self.across.gather_bytes(own):
                for i, values in safetensors.numpy.load(content).items():
                    scores[int(i)] = values
        return sum(scores)

    def find_nonfinite(self, batch: Batch, step: int) -> str | None:
        """Which operator first makes a NaN or an infinity on this batch, as a sentence; None when none does.

        Here sequences are whole: a rank that stopped in the middle would leave those of its line waiting.
        """
        self.model.begin_step(step, self._redrawn)
        slices, reason = self._slices(batch), ""
        with check_mode():
            for i in share(len(slices), self.ranks.rank, self.ranks.size):
                try:
                    with Statistics().part(i):
                        self._micro_batch(batch, slices[i], step, i, lambda parameter, gradient: None, Communicator())
                except NonFiniteError as error:
                    reason = str(error) + (f" on rank {self.ranks.rank}" if self.ranks.size > 1 else "")
                    break
        return next((content.decode() for content in self.ranks.gather_bytes(reason.encode()) if content), None)

    def close(self, wait: bool = True) -> None:
        """Stop the worker threads and give BLAS its threads back; ``wait`` until they have done what they are at."""
        self._dismiss_companion()
        self._end_forks()
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

    def _each(self, work: Callable[[int], None], numbers: range) -> None:
        """``work(i)`` for every number, by all workers: those that are left over help with the last ones.

        Sums inside a call are cut alike in every call, so that their bits do not depend on who helps.
        """
        counter, finished = itertools.count(), itertools.count(1)
        count = len(numbers)

        def pull(worker: int) -> None:
            try:
                # Ranks of a line send in the same order, so that one worker takes all, and the others help.
                while (worker == 0 or self.line.size == 1) and (i := next(counter)) < count:
                    with self._team if self.line.size > 1 or i >= count - count % self.workers else self._alone:
                        work(numbers[i])
            finally:
                last = next(finished) == self.workers
                if last:
                    self._team.dismiss(self.workers - 1)
            if not last:
                self._team.help()

        list(self._map(pull, range(self.workers)))

    def _in_pool(self, function: Callable, items) -> list:
        """``map`` in the worker threads, under the switches of the caller (no_grad, use, check_mode)."""
        self._started = [self._pool.submit(copy_context().run, function, item) for item in items]
        return list(map(outcome, self._started))

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """The worker threads of this process: a fork has none of those of its parent."""
        if (process := os.getpid()) not in self._pools:
            self._pools[process] = ThreadPoolExecutor(self.workers, thread_name_prefix="minitv")
        return self._pools[process]

    def _micro_batch(self, batch: Batch, rows: slice, step: int, index: int, sink: Callable, line: Communicator):
        rng = self._dropout and self._dropout.split(step, index)
        part = self._share(batch, line)
        with _not_finite(), products(self.run.matmul), sharing(part):
            loss, count = self.task.loss(self.model, _positions(batch.part(rows), part), rng)
            on_gpu = is_cupy(loss.data) and part is None
            value = loss.data if on_gpu else loss.item()  # a GPU is not waited for
            if part is not None:  # all of a line go back, or none
                sums = np.array([value, count])
                line.sum(sums)
                value, count = float(sums[0]), int(sums[1])
            if on_gpu or math.isfinite(value):
                loss.backward(sink=sink)
        return value, count

    def _share(self, batch: Batch, line: Communicator) -> Share | None:
        """The positions of a batch that this rank has, if it shares them with a line; UserError if that is not possible."""
        if line.size == 1:
            return None
        if type(batch) is not Batch:
            raise UserError(f"--sequence-ranks {line.size}: the sequences of the task {self.task.name} are not of one kind, "
                            "allowed: 1")
        if batch.length % line.size:
            raise UserError(f"--sequence-ranks {line.size}: it does not divide the {batch.length} positions of a sequence, "
                            f"allowed: a divisor of {batch.length}")
        return Share(line, batch.length // line.size)

    def _slices(self, batch: Batch) -> list[slice]:
        """Micro-batches, of as equal sizes as possible; neither threads nor, on a CPU, ranks change them."""
        sequences = len(batch.labels)
        if self.run.micro_batch is not None:
            parts = -(-sequences // self.run.micro_batch)
        else:
            size = max(1, self.MICRO_BATCH_TOKENS * self.line.size // max(batch.length, 1))
            parts = max(-(-sequences // size), min(self.LEAST, sequences))
        edges = [sequences * i // parts for i in range(parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _positions(batch: Batch, part: Share | None) -> Batch:
    """The positions of a batch that a rank has."""
    if part is None:
        return batch
    return Batch(*(array[:, part.start:part.start + part.length] for array in batch))


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
