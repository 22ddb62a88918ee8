"""Copies of a process that share the steps of a training: the same bits as threads give, and no way to be left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest

from autograd import node, tensor, use
from autograd.errors import DomainError
from minitv import forks, variants
from minitv.errors import RunError
from minitv.experiment import possible
from minitv.task import Batch
from minitv.trainer import Trainer

pytestmark = pytest.mark.skipif(not forks.AVAILABLE, reason="processes are copied on Linux alone")

TINY = dict(context=16, layers=2, width=16, batch=6, dropout=0.1, micro_batch=1, warmup=0)


@contextmanager
def training(name: str = "transformer", threads: int = 2, **options) -> Iterator[tuple]:
    """A trainer and the batches of its task."""
    variant = variants.load(name)
    sound = dict(context=320, longest=1, conv_norm="batch") if variant.reads != "tokens" else {}
    setup = variant.configure(task=possible(variant)[0], threads=threads, **{**TINY, **sound, **options})
    task = setup.begin()
    trainer = Trainer(setup, task)
    try:
        yield trainer, task
    finally:
        trainer.close()


def take(trainer: Trainer, task, steps: int) -> list[float]:
    """The losses of the first steps."""
    return [trainer.step(task.batch(step), step) for step in range(steps)]


def after(steps: int, name: str, threads: int, **options):
    """The numbers of some steps, and all that is saved afterwards."""
    with training(name, threads, **options) as (trainer, task):
        numbers = []
        for step in range(steps):
            numbers += [trainer.step(task.batch(step), step), trainer.grad_norm]
        assert (trainer._forks is not None) == (threads > 1 and forks.AVAILABLE)
        return numbers, {**trainer.model.state(), **trainer.optimizer.state()}


@pytest.mark.parametrize("name", ["transformer", "performer", "conformer",  # dropout, what is drawn anew, what is counted
                                  *(pytest.param(name, marks=pytest.mark.full) for name in ("reformer", "rwkv"))])
def test_copies_give_the_bits_of_threads(name, monkeypatch):
    numbers, arrays = after(4, name, 3)
    monkeypatch.setattr(forks, "AVAILABLE", False)
    for threads in (1, 3):
        others, theirs = after(4, name, threads)
        assert others == numbers
        assert all(theirs[key].tobytes() == arrays[key].tobytes() for key in arrays)


@pytest.mark.parametrize("batch", [5, 6, 7, 16])
def test_shares_need_not_be_equal(batch, monkeypatch):
    with training(batch=batch, threads=3) as (trainer, task):
        found = take(trainer, task, 3)
        assert (trainer._forks is not None) == (batch != 7)  # 2, 2 and 3: one worker would wait for a third of the time
    monkeypatch.setattr(forks, "AVAILABLE", False)
    with training(batch=batch, threads=1) as (trainer, task):
        assert take(trainer, task, 3) == found


def test_more_micro_batches_than_before_need_more_buffers():
    with training(batch=4) as (trainer, task), training(batch=4, threads=1) as (other, _):
        for step in range(4):
            batch = task.batch(step)
            if step == 2:
                batch = Batch(*(np.concatenate([array] * 3) for array in batch))
            assert trainer.step(batch, step) == other.step(batch, step)


def test_a_switch_is_obeyed_by_threads():
    with training() as (trainer, task):
        trainer.step(task.batch(0), 0)
        with use(kernel="none"):
            trainer.step(task.batch(1), 1)
        assert trainer._forks is None


@pytest.mark.parametrize("name", ["performer", "conformer"])  # of which buffers are drawn anew, and count
def test_copies_see_the_buffers_of_steps_that_threads_take(name):
    options = dict(redraw=2) if name == "performer" else {}
    with training(name, **options) as (trainer, task), training(name, threads=1, **options) as (other, _):
        for step in range(6):
            with use(kernel="none") if step == 2 else nullcontext():
                assert trainer.step(task.batch(step), step) == other.step(task.batch(step), step)
            if step == 3:
                for one in (trainer, other):
                    for _, buffer in one.model.named_buffers():
                        buffer.assign_(1.5 * buffer.data)
        assert trainer._forks is not None
        assert all(mine.data.tobytes() == theirs.data.tobytes() for (_, mine), (_, theirs)
                   in zip(trainer.model.named_buffers(), other.model.named_buffers(), strict=True))


def test_an_error_in_a_copy_is_raised_here():
    with training() as (trainer, task):
        take(trainer, task, 2)
        ids, labels = (array.copy() for array in task.batch(2))
        ids[-1, -1] = task.vocab  # in the share of the copy
        with pytest.raises(DomainError, match="embedding: id"):
            trainer.step(Batch(ids, labels), 2)
        assert np.isfinite(trainer.step(task.batch(2), 2))


def test_a_copy_that_was_killed_is_named():
    with training() as (trainer, task):
        take(trainer, task, 2)
        (process,) = trainer._forks._processes
        os.kill(process, signal.SIGKILL)
        with pytest.raises(RunError, match=f"process {process}, which computes a part of each step, has ended"):
            trainer.step(task.batch(2), 2)
        assert np.isfinite(trainer.step(task.batch(2), 2))  # with another copy


def test_threads_compute_where_the_system_permits_no_more_processes(monkeypatch):
    made = []

    def fork():
        if made:
            raise BlockingIOError("Resource temporarily unavailable")
        made.append(fork_of_the_system())
        return made[-1]

    fork_of_the_system = os.fork
    monkeypatch.setattr(os, "fork", fork)
    numbers = []
    for threads in (3, 1):
        with training(threads=threads) as (trainer, task):
            numbers.append(take(trainer, task, 3))
            assert trainer._forks is None
    assert numbers[0] == numbers[1]
    with pytest.raises(ChildProcessError):  # the one that was made has ended
        os.waitpid(made[0], os.WNOHANG)


def test_nothing_is_left_when_a_training_is_closed_or_forgotten():
    with training() as (trainer, task):
        take(trainer, task, 2)
        processes = trainer._forks._processes
    forgotten = forks.Forks(1, lambda number: number)
    assert forgotten.ask(0, forks.packed()) == 0
    processes = [*processes, *forgotten._processes]
    del forgotten
    for process in processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, os.WNOHANG)


def test_copies_that_somebody_else_has_waited_for_are_no_error():
    with training() as (trainer, task):
        take(trainer, task, 2)
        (process,) = trainer._forks._processes
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_batch_that_cannot_be_sent_is_for_threads():
    class Mine(Batch):
        """A class that another process does not find."""

    with training() as (trainer, task), training(threads=1) as (other, _):
        for step in range(3):
            batch = Mine(*task.batch(step))
            assert trainer.step(batch, step) == other.step(batch, step)
        assert trainer._forks is None


def test_a_copy_that_a_user_makes_trains_on_its_own():
    with training() as (trainer, task):
        take(trainer, task, 2)
        before = trainer.optimizer.param.copy()
        if (process := os.fork()) == 0:
            code = 1
            with suppress(BaseException):
                trainer.step(task.batch(2), 2)
                code = 0 if (trainer.optimizer.param != before).any() else 2
                trainer.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert (trainer.optimizer.param == before).all()
        assert np.isfinite(trainer.step(task.batch(2), 2))


def test_a_signal_as_copies_are_made_waits_until_they_are_known(monkeypatch):
    """It is raised once, in this process, when all are made."""
    def fork():
        processes.append(fork_of_the_system())
        os.kill(os.getpid(), signal.SIGINT)
        return processes[-1]

    fork_of_the_system = os.fork
    monkeypatch.setattr(os, "fork", fork)
    owner, made, processes, over = os.getpid(), [], [], threading.Event()
    other = threading.Thread(target=over.wait)  # takes the signal, if the main thread blocks it
    other.start()
    with pytest.raises(KeyboardInterrupt) as kept:  # with the frames in which it was raised
        made.append(forks.Forks(2, lambda number: number))
    over.set()
    assert os.getpid() == owner and not made and len(processes) == 2  # a copy would have gone on from here
    for process in processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, os.WNOHANG)
    del kept


def test_locks_are_free_in_a_copy():
    taken, free = threading.Event(), threading.Event()

    def hold():
        with node._claiming, tensor._adding:
            taken.set()
            free.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    copies = forks.Forks(1, lambda number: node._claiming.acquire(timeout=1) and tensor._adding.acquire(timeout=1))
    thread.join()
    assert copies.ask(0, forks.packed())


class Unusual(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def test_an_error_that_cannot_be_sent_says_what_it_is():
    def serve(number):
        raise Unusual(1, 2)

    with pytest.raises(RuntimeError, match=r"^Unusual: 1 and 2$"):
        forks.Forks(1, serve).ask(0, forks.packed())


KILLED = """
import os, signal, sys
from tests.minitv.test_forks import take, training

with training() as (trainer, task):
    take(trainer, task, 2)
    print(trainer._forks._processes[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_copies_die_with_a_process_that_is_killed():
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    process, end = int(done.stdout), time.monotonic() + 10
    while os.path.exists(f"/proc/{process}") and open(f"/proc/{process}/stat").read().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)
