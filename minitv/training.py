"""A training run: the data, the baselines, the steps, evaluations, examples, log and checkpoints behind ``minitv train``."""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autograd.cpu.process import peak_mb, processor
from autograd.device import namespace
from autograd.random import Random

from . import __version__, checkpoint, job
from .errors import CheckpointError, RunError, UserError, device_errors, naming, quoted
from .experiment import SHOWN, Experiment, from_checkpoint
from .lock import LOCK, held
from .log import ACCURACY, DAMAGED, LOG, Log
from .optim import cosine
from .options import TrainOptions
from .picture import CURVE, READINGS, plot, plot_readings
from .report import Progress, count, duration, tell
from .signals import Stop, Stopped
from .task import Task
from .together import agree, card, check, checksum, content, in_turn, program, see, threads
from .trainer import Trainer

LONG_S = 3600  # a run that takes longer says so
TIMED_STEPS = 5  # from which the length of a run is estimated

OnStep = Callable[[dict[str, Any]], Any]


class Outcome(NamedTuple):
    """Where a run lies, and the signal that stopped it after it was saved, or None."""

    directory: Path
    signal: int | None

    @property
    def code(self) -> int:
        """The exit code of the process: 0, or 130, 143 and 129 for Ctrl-C, SIGTERM and SIGHUP."""
        return 0 if self.signal is None else 128 + self.signal


def train(experiment: Experiment, *, on_step: OnStep | None = None) -> Outcome:
    """The whole run: data, baselines, steps, evaluations, examples, log and checkpoints in ``run.out``.

    ``on_step(record)`` sees what each step gave, and ends the run when it returns False. UserError tells a user's mistake.
    """
    started, run, ranks = time.perf_counter(), experiment.run, job.here().ranks
    check(experiment, ranks)
    first = ranks.rank == 0  # the rank that writes and speaks
    with Stop() as stop, device_errors(), ExitStack() as lock:
        agree(ranks, program, experiment)  # before anything that follows from options: ranks would wait for each other
        ranks = card(run.device, ranks)
        _check_products(run)
        resumed = None
        if run.resume:
            directory = checkpoint.run_folder(run.resume)
            if first:
                lock.enter_context(held(directory))  # before the checkpoint is read: another run may still write it
            see(directory, ranks)
            with job.here().files():
                resumed = checkpoint.load_run(run.resume)
            _go_on_from(directory)
        origin = checkpoint.load_run(run.init_from) if run.init_from and resumed is None else None
        if resumed is None:
            directory = Path(ranks.gather_bytes(str(_folder(experiment)).encode())[0].decode())
            if first:
                lock.enter_context(_new(directory, run.overwrite))
            see(directory, ranks)
            job.here().note(f"{job.NOTHING}, with --overwrite")  # the folder is this run's
        experiment = experiment.replace(out=str(directory))
        with in_turn(ranks), job.here().files():
            task = _begin(experiment, resumed, origin)
        if first:
            for label, text in task.about():
                tell(text, f"{label:<9} ")
        kinds, workers = set(ranks.gather_bytes(processor().encode())), threads(ranks)
        with in_turn(ranks):
            trainer = Trainer(experiment, task, ranks, threads=workers, unlike=len(kinds) > 1)
        try:
            if origin is not None:
                checkpoint.check_arrays(trainer.model.saved(), origin.model, f"--init-from {run.init_from}: the model")
                trainer.model.load(origin.model)
            trainer.align()
            session = _Session(experiment, task, trainer, directory, started, stop, on_step)
            outcome = Outcome(directory, session.go(resumed))
        except BaseException:  # a thread may be compiling for many seconds
            trainer.close(wait=False)
            raise
        trainer.close()
        return outcome


def _go_on_from(directory: Path) -> None:
    """Where the job goes on if a rank ends from here on."""
    job.here().note(f"Continue with: {job.prefix()}minitv train --resume {directory}")


def _check_products(run: TrainOptions) -> None:
    """UserError if this processor has no instruction for the products that were asked for."""
    if run.matmul == "bf16" and run.device == "cpu":
        from autograd.cpu.bf16 import missing

        if reason := missing():
            raise UserError(f"--matmul bf16: {reason}, allowed: float32")


def _begin(experiment: Experiment, resumed: checkpoint.Checkpoint | None, origin: checkpoint.Checkpoint | None) -> Task:
    """The task's data, as the checkpoint that the run goes on from had it."""
    run = experiment.run
    if resumed is None:
        if origin is None:
            return experiment.begin()
        with naming(f"--init-from {run.init_from}"):
            task = experiment.begin(experiment.task.inherited(origin.state.task))
            known = from_checkpoint(origin.state.config).task.stored_vocab(origin.state.task)
            if known != task.vocab:
                raise UserError(f"its model knows {known} different tokens, and the task {task.name} has {task.vocab}: allowed "
                                "is a run whose tokens are as many")
        return task
    with naming(f"--resume {run.resume}"):
        task = experiment.begin(resumed.state.task)
        if missing := [key for key in task.state() if key not in resumed.state.task]:
            raise CheckpointError(f"the checkpoint has no {missing[0]}")
    return task


def _folder(experiment: Experiment) -> Path:
    """Where a new run goes: the folder that was asked for, or the next free one of the usual name."""
    run, task = experiment.run, experiment.task
    if run.out is not None:
        return Path(run.out)
    name = experiment.variant.name if task.name == "text" else f"{experiment.variant.name}-{task.name}"
    folders = (Path("runs", name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in folders if run.overwrite or not _occupied(folder))


def _occupied(folder: Path) -> bool:
    """Whether a folder, or a file of its name, holds anything of a run."""
    if folder.exists() and not folder.is_dir():
        return True
    return any((folder / name).exists() for name in (*checkpoint.NAMES, LOG, LOCK)) or any(
        checkpoint.exists(folder, name) for name in checkpoint.NAMES)


@contextmanager
def _new(directory: Path, overwrite: bool) -> Iterator[None]:
    """Hold the folder of a new run; UserError if that would write over another run, or over what is not a run."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory}: this is a file, a folder is needed")
    with held(directory):
        _check_free(directory, overwrite)
        yield


def _check_free(directory: Path, overwrite: bool) -> None:
    """Refuse to write over another run, or over what is not a run."""
    saved = [name for name in checkpoint.NAMES if checkpoint.exists(directory, name)]
    foreign = [directory / name for name in checkpoint.NAMES if (directory / name).exists() and name not in saved]
    if foreign:
        raise UserError(f"--out {directory}: {foreign[0]} is in the way, it is not a minitv checkpoint")
    if (saved or (directory / LOG).exists()) and not overwrite:
        resume = f"continue it with --resume {directory}, " if "last" in saved else ""
        raise UserError(f"{directory} holds a run already: {resume}replace it with --overwrite, or choose another --out")


def _remove_run(directory: Path) -> None:
    """Remove what another run left in its folder."""
    for name in (LOG, DAMAGED, CURVE, READINGS):
        (directory / name).unlink(missing_ok=True)
    for name in checkpoint.NAMES:
        checkpoint.remove(directory, name)


class _Unwritten:
    """The log of a rank that writes none."""

    note = ""
    last: Mapping[str, Any] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        self.last = record

    def __enter__(self) -> _Unwritten:
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to close."""


class _Session:
    """The state of one run that is going on."""

    def __init__(self, experiment: Experiment, task: Task, trainer: Trainer, directory: Path, started: float, stop: Stop,
                 on_step: OnStep | None):
        self.experiment, self.task, self.trainer = experiment, task, trainer
        self.run, self.directory, self.started, self.stop, self.on_step = experiment.run, directory, started, stop, on_step
        self.ranks, self.first = trainer.ranks, trainer.ranks.rank == 0  # the first one writes and speaks
        self.best, self.best_step = math.inf, 0  # the lowest held-out loss, in nats an answer
        self.unimproved = 0  # evaluations in a row that did not improve it
        self.last_loss = math.nan  # the newest one
        self.last_value = math.nan  # of the metric, at the last evaluation
        self.answers = 0  # that are asked of the held-out data
        self.elapsed_before = 0.0
        self.progress: Progress | None = None

    def go(self, resumed: checkpoint.Checkpoint | None) -> int | None:
        """Train to the end; returns the signal that stopped it, or None."""
        from autograd.cpu import compile as compiler  # the compiler, which a thread of the trainer is loading

        run, trainer, first = self.run, self.trainer, 0
        if resumed is not None:
            before = from_checkpoint(resumed.state.config)
            first = self._restore(resumed, before)
            if first >= run.steps:
                raise UserError(f"--steps: this run has done {first} steps; to continue it, ask for more than that")
            self._note_jump(before.run, first)
        if run.steps <= run.warmup:
            self._note(f"the learning rate rises for {run.warmup} steps (--warmup) and this run ends after {run.steps}: "
                       f"it never reaches --lr {run.lr:g}")
        workers = f"{trainer.workers} worker thread{'s' * (trainer.workers > 1)}" if run.device == "cpu" else run.device
        if self.ranks.size > 1:
            workers = f"{self.ranks.size} ranks of {workers}"
        name, size = self.experiment.variant.name, count(trainer.parameters)
        tell(f"{name}, {size} parameters, {workers}, folder {self.directory}", "model     ")
        for label, text in trainer.model.about():
            tell(text, f"{label:<9} ")
        for note in trainer.notes(self.task.batch(first)):
            self._note(note)
        agree(self.ranks, content, self.task, trainer.optimizer.param, first)
        with compiler.at_compilation(self._announce_compilation):
            if resumed is None:  # not before: all checks have passed, so a mistake costs no finished run
                if run.overwrite and (reason := trainer.find_nonfinite(self.task.batch(0), 0)):
                    raise self._nonfinite(reason, 0, f"{self.directory} still holds the run before. ")
                if self.first:
                    _remove_run(self.directory)
            log = Log(self.directory, self._header(), resume_step=first if resumed else None) if self.first else _Unwritten()
            try:
                with log, Progress(run.steps, start=first) as self.progress:
                    if log.note:
                        self._note(log.note)
                    return self._steps(first, log)
            except Stopped:
                if (log.last["step"] if log.last else 0) <= first:
                    tell("the first step was not done: nothing was saved")
                    if resumed is None and self.first:  # a log without a step is no run
                        log.path.unlink(missing_ok=True)
                raise

    def _steps(self, first: int, log: Log | _Unwritten) -> int | None:
        run, trainer, task, progress = self.run, self.trainer, self.task, self.progress
        here, longest = job.here(), 0.0
        held_out = task.held_out()
        if first == 0 and run.eval_every:
            log.write({"step": 0, **self._evaluate(held_out, 0)})
        timed = time.perf_counter()
        clock, since, rate = time.perf_counter(), 0, math.nan
        for step in range(first, run.steps):
            batch = task.batch(step)
            begun = time.perf_counter()
            loss = self._step(batch, step)
            if step > first:  # which compiles
                longest = max(longest, time.perf_counter() - begun)
                here.limit = max(job.BUSY, 10 * longest)
            if step == first:
                self.stop.begin()  # not before: the first step compiles, which takes longer than anyone waits after Ctrl-C
                if trainer.sent:
                    tell(f"{run.sequence_ranks} share each sequence; the layers of a rank send up to "
                         f"{trainer.sent / 1e3:,.1f} kB a step", "ranks     ")
            number, since = step + 1, since + 1
            rate = since * batch.tokens / (time.perf_counter() - clock)
            record = {"step": number, "loss": loss, **self._training_value(loss), "tokens_per_s": round(rate, 1),
                      "elapsed_s": round(self._elapsed(), 3), "lr": trainer.lr, "grad_norm": trainer.grad_norm}
            progress.update(number, loss=loss, metric=self._shown_metric(loss), tokens_per_s=rate)
            evaluate = run.eval_every and (number % run.eval_every == 0 or number == run.steps)
            if evaluate:
                here.limit = None
                record |= self._evaluate(held_out, step)
                record["peak_mb"] = peak_mb()
            if evaluate or number % run.log_every == 0 or number in (1, run.steps):
                log.write(record)
            if evaluate and self.first:
                self._report(number, record)
            reason = None  # why the run ends here
            if run.patience and evaluate:
                self.unimproved = 0 if record["val_loss"] < self.best else self.unimproved + 1
                if self.unimproved >= run.patience:
                    reason = f"the held-out loss has not improved for {self.unimproved} evaluations (--patience)"
            if run.minutes is not None and self._elapsed() - self.elapsed_before >= 60 * run.minutes:
                reason = f"{run.minutes:g} minutes are over (--minutes)"
            if self.on_step is not None and self.on_step(record) is False:
                reason = "on_step returned False"
            stopped, reason = self._agreed(self.stop.signal, reason, step)  # a signal after this line is for the next step
            if evaluate or number == run.steps or stopped or reason or (run.save_every and number % run.save_every == 0):
                if not namespace(trainer.optimizer.param).isfinite(trainer.optimizer.param).all():
                    raise self._nonfinite("the new weights", step)
                self._save(number, record.get("val_loss"), None if stopped else reason)
            if evaluate or number % run.log_every == 0 or number == 1:
                clock, since = time.perf_counter(), 0  # the speed of the steps alone
            if number == first + 1:
                timed = time.perf_counter()  # the first step compiles
            elif number == first + 1 + TIMED_STEPS:
                self._warn_if_long((time.perf_counter() - timed) / TIMED_STEPS * (run.steps - number))
            if number < run.steps and (stopped or reason):
                because = "" if stopped else f": {reason}"
                tell(f"stopped after step {number}{because}; continue with: {job.prefix()}minitv train --resume "
                     f"{self.directory}")
                if stopped:
                    return stopped
                break
        self._finish()
        return None

    def _agreed(self, stopped: int | None, reason: str | None, step: int) -> tuple[int | None, str | None]:
        """Which signal came to any rank, and why the run ends here for any: the same on all of them."""
        if self.ranks.size == 1:
            return stopped, reason
        word = json.dumps([stopped, reason, self.trainer.grad_norm]).encode()
        words = [json.loads(word) for word in self.ranks.gather_bytes(word)]
        for rank, (*_, norm) in enumerate(words):
            if norm != words[0][2]:
                raise RunError(f"step {step + 1}: rank {rank} has another gradient than rank 0, its norm is {norm:.9g} and not "
                               f"{words[0][2]:.9g}, so their weights differ; {self._saved()}")
        return next((word[0] for word in words if word[0]), None), next((word[1] for word in words if word[1]), None)

    def _step(self, batch, step: int) -> float:
        trainer = self.trainer
        if self.run.check and (reason := trainer.find_nonfinite(batch, step)):
            raise self._nonfinite(reason, step)
        loss = trainer.step(batch, step)
        if not math.isfinite(loss) or not math.isfinite(trainer.grad_norm):
            raise self._nonfinite(trainer.find_nonfinite(batch, step) or "the norm of the gradient", step)
        return loss

    def _evaluate(self, held_out, step: int) -> dict[str, float]:
        """The held-out loss in nats an answer, the task's metric, and what the modules of the model tell of themselves."""
        sums = self.trainer.evaluate(held_out)
        loss = float(sums[0] / max(sums[1], 1))
        if not math.isfinite(loss):  # before these weights replace the last good checkpoint
            raise self._nonfinite(self.trainer.find_nonfinite(held_out, step) or "the held-out loss", step)
        self.answers = self.task.asked(sums)
        bounds = dict(zip(self._bounds, self.task.interval(sums) or (), strict=False))
        accuracy = self.task.accuracy(sums)
        return {"val_loss": loss, f"val_{self.task.key}": self.task.value(sums), **bounds,
                **({} if accuracy is None else {ACCURACY: accuracy}), **self.trainer.model.all_readings()}

    @property
    def _bounds(self) -> tuple[str, str]:
        """The names of a record for the bounds of the metric."""
        return f"val_{self.task.key}_low", f"val_{self.task.key}_high"

    def _training_value(self, loss: float) -> dict[str, float]:
        value = self.task.training_value(loss)
        return {} if value is None else {self.task.key: value}

    def _shown_metric(self, loss: float) -> tuple[str, float]:
        """The metric of the status line: of this batch, or of the last evaluation."""
        value = self.task.training_value(loss)
        return self.task.unit, self.last_value if value is None else value

    def _nonfinite(self, reason: str, step: int, note: str | None = None) -> RunError:
        if note is None:
            saved = self._saved()
            note = f"{saved[0].upper()}{saved[1:]}. "
        return RunError(f"step {step + 1} made a number that is not finite, first at {reason}. {note}"
                        "A lower --lr or a smaller --clip often helps")

    def _saved(self) -> str:
        """What there is to go back to, as a part of a sentence."""
        saved = [self.directory / name for name in checkpoint.NAMES if checkpoint.exists(self.directory, name)]
        return f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was saved before it"

    def _report(self, step: int, record: Mapping[str, Any]) -> None:
        task, value = self.task, record[f"val_{self.task.key}"]
        self.last_loss, self.last_value = record["val_loss"], value
        verdict, low, high = task.verdict(value, self.answers), *map(record.get, self._bounds)
        bounds = "" if low is None else f" (95 %: {low:.3f} to {high:.3f})"
        right = f", accuracy {record[ACCURACY]:.3f}" if task.tells_accuracy else ""
        tell(f"step {step}: held-out loss {record['val_loss']:.4f} nats, {value:.3f}{bounds} {task.metric}{right}, {verdict}")
        if text := task.show(self.trainer.model, Random(self.run.seed).split(SHOWN, step)):
            self.progress.text("\n".join("    " + line for line in text.split("\n")))

    def _announce_compilation(self) -> None:
        from autograd.cpu.disk import cache_directory

        note = ", cached for the next run" if cache_directory() else ""
        self._note(f"compiling kernels, up to 15 s{note}", label="")

    def _warn_if_long(self, seconds: float) -> None:
        if seconds > LONG_S and self.run.minutes is None:
            self._note(f"this run will take about {duration(seconds)}; it can be stopped with Ctrl-C and continued with "
                       "--resume, and --minutes or --steps end it earlier")

    def _note(self, text: str, label: str = "note      ") -> None:
        tell(text, label)

    def _note_jump(self, before: TrainOptions, first: int) -> None:
        """Say how the learning rate jumps when more steps than before stretch its schedule."""
        now = self.run
        if before.steps != now.steps:
            old, new = (cosine(step, lr=run.lr, min_lr=run.min_lr, warmup=run.warmup, steps=run.steps)
                        for step, run in ((first - 1, before), (first, now)))
            self._note(f"the run was planned for {before.steps} steps and is now for {now.steps}: its learning rate goes from "
                       f"{old:.3g} to {new:.3g} at step {first + 1}")

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.started

    def _header(self) -> dict[str, Any]:
        import numba
        import scipy

        task = self.task
        return {
            "config": self.experiment.to_json(),
            "variant": self.experiment.variant.name,
            "task": task.name,
            "metric": {"name": task.metric, "key": task.key, "rising": task.rising},
            "baselines": task.baselines,
            **({"accuracies": task.accuracies} if task.tells_accuracy else {}),
            "parameters": self.trainer.parameters,
            **({"readings": readings} if (readings := list(self.trainer.model.all_readings())) else {}),
            **task.header(),
            "threads": self.trainer.workers,
            "device": self.run.device,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"minitv": __version__, "python": platform.python_version(), "numpy": np.__version__,
                         "numba": numba.__version__, "scipy": scipy.__version__},
        }

    def _save(self, step: int, loss: float | None, ended: str | None) -> None:
        better = loss is not None and loss < self.best
        if better:
            self.best, self.best_step = loss, step
        state = {
            "config": self.experiment.to_json(),
            **self.task.state(),
            "vocab": self.task.vocab,
            "step": step,
            "best_loss": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "unimproved": self.unimproved,
            "ended": ended,
            "elapsed_s": self._elapsed(),
            "threads": self.trainer.workers,
            "device": self.run.device,
        }
        if self.ranks.size > 1:
            self._check_weights(step)
        if self.first:
            model, optimizer = self.trainer.model.state(), self.trainer.optimizer.state()
            # "last" comes last: a run killed between the two then finds this best loss again when it is resumed.
            with job.here().files():
                for name in ("best", "last") if better else ("last",):
                    checkpoint.save(self.directory, name, model=model, optimizer=optimizer, state=state)
        self.ranks.barrier()
        _go_on_from(self.directory)

    def _check_weights(self, step: int) -> None:
        """RunError if ranks have different weights: nothing that cannot be trusted is saved."""
        weights = self.ranks.gather(np.array(checksum(self.trainer.optimizer.param), np.int64))
        for rank in np.flatnonzero(weights != weights[0]):
            raise RunError(f"step {step}: rank {rank} has other weights than rank 0, which damaged memory may have changed; "
                           f"{self._saved()}")

    def _restore(self, resumed: checkpoint.Checkpoint, before: Experiment) -> int:
        state, where = resumed.state, str(self.run.resume)
        self.elapsed_before = state.elapsed_s
        checkpoint.check_arrays(self.trainer.model.saved(), resumed.model, f"{where}: the model")
        expected = self.trainer.optimizer.expected(resumed.optimizer)
        checkpoint.check_arrays(expected, resumed.optimizer, f"{where}: the optimizer")
        self.trainer.model.load(resumed.model)
        self.trainer.optimizer.load(resumed.optimizer)
        same = before.identity("data") == self.experiment.identity("data")
        if same and state.best_loss is not None:  # losses on other held-out data do not compare
            self.best, self.best_step = state.best_loss, state.best_step
            self.unimproved = state.unimproved if state.unimproved < self.run.patience else 0
        what = "dropout" if self.experiment.model.dropout else "the last bits of the results"
        if state.device != self.run.device:
            self._note(f"this run was on {quoted(state.device)} and is now on {self.run.device}: {what} will differ")
        return state.step

    def _finish(self) -> None:
        if not self.first:
            return
        task = self.task
        tell(f"done in {duration(self._elapsed())}; {task.after.format(directory=self.directory)}")
        if self.best_step and self.last_loss > self.best:
            self._note(f"the held-out loss was lowest at step {self.best_step} ({self.best:.4f} nats, {self.last_loss:.4f} at "
                       "the end); those weights are the checkpoint 'best': --checkpoint best")
        try:
            tell(f"curve: {plot([self.directory])}")
            if path := plot_readings(self.directory):
                tell(f"readings: {path}")
        except UserError as error:
            tell(f"no picture of the curve: {error}")
