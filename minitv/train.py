"""Training: Trainer takes optimizer steps, train() is the whole run behind ``minitv train``.

Worker threads pull micro-batches of up to 512 tokens from a counter and run the tape on them, with serial kernels and
one-threaded BLAS: a core that is slow for a moment takes fewer. Which gradients meet in which of the flat buffers, and
in which order, depends on the micro-batch's number alone, so a run is determined by its seed and its number of threads.

On a GPU one worker takes the whole batch, or as much of it as MICRO_BATCH_TOKENS_GPU allows, and the host reads once a
step: the loss, the norm of the gradient, and whether any id was out of range.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np

from autograd import NonFiniteError, check_mode, no_grad
from autograd.cpu.process import blas_threads, cores, keep_memory, peak_mb
from autograd.cuda.blas import allow_tf32
from autograd.device import is_cupy, namespace, read, select
from autograd.random import Random

from . import __version__, checkpoint
from .config import to_json
from .data import Batches, Corpus, load_text, split, windows
from .errors import RunError, UserError, device_errors, quoted
from .lock import held
from .log import DAMAGED, LOG, Log
from .models.lm import LanguageModel
from .ngram import ngram_bpc
from .optim import AdamW, cosine
from .options import ModelOptions, TrainOptions
from .report import CURVE, Progress, count, duration, plot
from .sample import generate
from .tokenizer import TOKENIZERS, from_json

WEIGHTS, BATCHES, DROPOUT, SAMPLES = range(4)  # the independent random streams of a run


class Trainer:
    """A model, its optimizer and the worker threads; ``step`` is one optimizer step on a batch."""

    MICRO_BATCH_TOKENS = 512  # activations of this many tokens stay in a core's private cache
    MICRO_BATCH_TOKENS_GPU = 2**15  # those of `small` then take about 6 GB

    def __init__(self, variant: str, model: ModelOptions, mixer, run: TrainOptions, vocab: int):
        keep_memory()
        self.run = run
        on_gpu = run.device != "cpu"
        self.workers = 1 if on_gpu else min(run.threads or cores(), run.batch)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="minitv")
        self._map = map if on_gpu else self._in_pool  # which card is the current one is a matter of the thread
        if on_gpu:
            self.MICRO_BATCH_TOKENS = self.MICRO_BATCH_TOKENS_GPU
            allow_tf32(run.tf32)
            select(run.device)
        else:
            self._pool.submit(_load_compiler)
        random = Random(run.seed)
        self.model = LanguageModel(variant, model, mixer, vocab, random.split(WEIGHTS)).to(run.device)
        # One buffer more than workers: who is ahead goes on with the next micro-batch instead of waiting for its turn.
        self.optimizer = AdamW(self.model, beta1=run.beta1, beta2=run.beta2, weight_decay=run.weight_decay,
                               clip=run.clip, buffers=self.workers + (self.workers > 1))
        self.grad_norm = self.lr = math.nan
        self._dropout = random.split(DROPOUT) if model.dropout else None
        self._blas = blas_threads(1)
        self._blas.__enter__()

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return self.optimizer.param.size

    def step(self, inputs: np.ndarray, labels: np.ndarray, step: int) -> float:
        """Forward, backward and update on ids [B T] at 0-based ``step``; returns the mean loss in nats per token.

        ``grad_norm`` and ``lr`` hold what was used. A loss or norm that is not finite updates nothing.
        """
        slices = self._slices(len(inputs), inputs.shape[1])

        buffers, counter = self.optimizer.buffers, itertools.count()
        losses, written = [math.nan] * len(slices), [threading.Event() for _ in slices]

        def work(worker: int) -> None:
            while (i := next(counter)) < len(slices):
                try:
                    before = written[i - len(buffers)] if i >= len(buffers) else None
                    losses[i] = self._micro_batch(inputs, labels, slices[i], step, i, buffers[i % len(buffers)], before)
                finally:
                    written[i].set()

        list(self._map(work, range(self.workers)))
        loss, squares = read(sum(losses), self.optimizer.squares(self._map, self.workers))
        self.lr = cosine(step, lr=self.run.lr, min_lr=self.run.min_lr, warmup=self.run.warmup, steps=self.run.steps)
        self.grad_norm = (self.optimizer.update(self.lr, squares, self._map, self.workers) if math.isfinite(loss)
                          else math.nan)
        return loss

    def evaluate(self, inputs: np.ndarray, labels: np.ndarray) -> float:
        """Mean loss in nats per token of windows [N T], without dropout."""
        slices = self._slices(len(inputs), inputs.shape[1])

        def work(part: slice) -> float:
            return self.model.loss(inputs[part], labels[part]).item() * (part.stop - part.start)

        with no_grad():
            return sum(self._map(work, slices)) / len(inputs)

    def find_nonfinite(self, inputs: np.ndarray, labels: np.ndarray, step: int) -> str | None:
        """Which operator first makes a NaN or an infinity on this batch, as a sentence; None when none does."""
        with check_mode():
            for i, part in enumerate(self._slices(len(inputs), inputs.shape[1])):
                try:
                    self._micro_batch(inputs, labels, part, step, i, lambda parameter, gradient: None)
                except NonFiniteError as error:
                    return str(error)
        return None

    def close(self) -> None:
        """Stop the worker threads and give BLAS its threads back."""
        self._pool.shutdown()
        self._blas.__exit__(None, None, None)

    def _in_pool(self, function: Callable, items) -> list:
        """``map`` in the worker threads, under the switches of the caller (no_grad, use, check_mode)."""
        started = [self._pool.submit(copy_context().run, function, item) for item in items]
        return [future.result() for future in started]

    def _micro_batch(self, inputs, labels, part: slice, step: int, index: int, sink: Callable, before=None):
        rng = self._dropout and self._dropout.split(step, index)
        loss = self.model.loss(inputs[part], labels[part], rng)
        share = (part.stop - part.start) / len(inputs)
        if before is not None:
            before.wait()
        on_gpu = is_cupy(loss.data)
        value = (loss.data if on_gpu else loss.item()) * share  # a GPU is not waited for
        if on_gpu or math.isfinite(value):
            loss.backward(share, sink=sink)
        return value

    def _slices(self, sequences: int, length: int) -> list[slice]:
        """Micro-batches: equal for all workers where that is possible."""
        size = max(1, min(-(-sequences // self.workers), self.MICRO_BATCH_TOKENS // length))
        parts = -(-sequences // size)
        edges = [sequences * i // parts for i in range(parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _load_compiler() -> None:
    """What takes a quarter of a second at the first kernel call, to do while the weights are drawn."""
    from autograd.cpu.gemm import prepare

    prepare()


class _Stop:
    """Ctrl-C and SIGTERM ask for a stop at the next step boundary; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # A signal may arrive inside a write to the same stream, so not through it.
        with contextlib.suppress(OSError):  # the reader, tee for example, may have died of the same Ctrl-C
            os.write(2, b"\nstopping after this step and saving (Ctrl-C again: stop now, without saving)\n")


def train(variant: str, model: ModelOptions, mixer, run: TrainOptions) -> int:
    """The whole run: data, baseline, steps, evaluations, samples, log and checkpoints in ``run.out``.

    Returns the exit code: 0, or 130 and 143 when Ctrl-C or SIGTERM stopped it (saved). UserError tells a user's mistake.
    """
    started = time.perf_counter()
    with device_errors():
        select(run.device)
    directory = Path(run.out or run.resume or f"runs/{variant}")
    with held(directory):
        return _train(variant, model, mixer, run, directory, started)


def _train(variant: str, model: ModelOptions, mixer, run: TrainOptions, directory: Path, started: float) -> int:
    resumed = checkpoint.load_run(run.resume) if run.resume else None
    if resumed is None:
        _check_free(directory, run.overwrite)
    corpus = load_text(run.data)
    if resumed is None:
        tokenizer = TOKENIZERS[run.tokenizer].train(corpus.text)
    else:
        state = resumed.state
        tokenizer = from_json(state.task.get("tokenizer"))
        if corpus.sha256 != state.task.get("corpus_sha256"):
            began = quoted(state.config.run.get("data") or "the default text")
            raise UserError(f"--resume {run.resume}: {corpus.description} is not the text this run began with; give that one "
                            f"({began}) with --data")
    ids = tokenizer.encode(corpus.text)
    training, held_out = split(ids, model.context)
    print(f"text      {corpus.description}: {count(len(corpus.text))} characters, sha256 {corpus.sha256[:16]}",
          file=sys.stderr)

    trainer = Trainer(variant, model, mixer, run, tokenizer.vocab)
    try:
        from autograd.cpu import compile as compiler  # the compiler, which a thread of the trainer is loading

        session = _Session(trainer, variant, model, mixer, run, corpus, tokenizer, directory, started)
        with compiler.at_compilation(_announce_compilation):
            return session.go(training, held_out, resumed)
    finally:
        trainer.close()


def _announce_compilation() -> None:
    from autograd.cpu.disk import cache_directory

    kept = ", cached for the next run" if cache_directory() else ""
    print(f"compiling kernels, up to 15 s{kept}", file=sys.stderr, flush=True)


def _check_free(directory: Path, overwrite: bool) -> None:
    """Refuse to write over another run, or over what is not a run."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory}: this is a file, a folder is needed")
    saved = [name for name in checkpoint.NAMES if checkpoint.exists(directory, name)]
    foreign = [directory / name for name in checkpoint.NAMES if (directory / name).exists() and name not in saved]
    if foreign:
        raise UserError(f"--out {directory}: {foreign[0]} is in the way, it is not a minitv checkpoint")
    if (saved or (directory / LOG).exists()) and not overwrite:
        resume = f"continue it with --resume {directory}, " if "last" in saved else ""
        raise UserError(f"{directory} holds a run already: {resume}replace it with --overwrite, or choose another --out")


def _remove_run(directory: Path) -> None:
    """Remove what another run left in its folder."""
    for name in (LOG, DAMAGED, CURVE):
        (directory / name).unlink(missing_ok=True)
    for name in checkpoint.NAMES:
        checkpoint.remove(directory, name)


class _Session:
    """The state of one run that is going on."""

    def __init__(self, trainer, variant, model, mixer, run, corpus: Corpus, tokenizer, directory: Path, started: float):
        self.trainer, self.run, self.model = trainer, run, model
        self.variant, self.mixer = variant, mixer
        self.corpus, self.tokenizer, self.directory = corpus, tokenizer, directory
        self.started = started
        self.best = math.inf
        self.elapsed_before = 0.0
        self.bits = self.held_bits = 1 / math.log(2)  # bits per character of a loss of one nat per token
        self.baseline: list[float] = []

    def go(self, training: np.ndarray, held_out: np.ndarray, resumed) -> int:
        run, trainer = self.run, self.trainer
        spelled, held_spelled = (max(self.tokenizer.characters_in(ids), 1) for ids in (training, held_out))
        per_char, held_per_char = len(training) / spelled, len(held_out) / held_spelled
        self.bits, self.held_bits = per_char / math.log(2), held_per_char / math.log(2)
        first = 0
        if resumed is not None:
            first = self._restore(resumed)
            if first >= run.steps:
                raise UserError(f"--steps: this run has done {first} steps; to continue it, ask for more than that")
        self.baseline = [bits * held_per_char for bits in ngram_bpc(training, held_out, self.tokenizer.vocab)]
        orders = "  ".join(f"{order}: {bits:.3f}" for order, bits in enumerate(self.baseline))
        print(f"n-grams   bits per character by order  {orders}", file=sys.stderr)
        workers = f"{trainer.workers} worker thread{'s' * (trainer.workers > 1)}" if run.device == "cpu" else run.device
        print(f"model     {self.variant}, {count(trainer.parameters)} parameters, {workers}, folder {self.directory}",
              file=sys.stderr)

        batches = Batches(training, run.batch, self.model.context, Random(run.seed).split(BATCHES).seed)
        inputs, labels = windows(held_out, self.model.context, run.eval_tokens)
        if resumed is None:  # not before: all checks have passed, so a mistake costs no finished run
            if run.overwrite and (reason := trainer.find_nonfinite(*batches.batch(0), 0)):
                raise self._nonfinite(reason, 0, f"{self.directory} still holds the run before. ")
            _remove_run(self.directory)
        header = self._header(per_char, held_per_char, len(training), len(held_out))
        with (
            Log(self.directory, header, resume_step=first if resumed else None) as log,
            Progress(run.steps, start=first) as progress,
            _Stop() as stop,
        ):
            if log.note:
                progress.text(f"note      {log.note}")
            clock, since, rate = time.perf_counter(), 0, math.nan
            for step in range(first, run.steps):
                loss = self._step(batches.batch(step), step, progress)
                done, since = step + 1, since + 1
                rate = since * run.batch * self.model.context / (time.perf_counter() - clock)
                record = {"step": done, "loss": loss, "bpc": loss * self.bits, "tokens_per_s": round(rate, 1),
                          "elapsed_s": round(self._elapsed(), 3), "lr": trainer.lr, "grad_norm": trainer.grad_norm}
                progress.update(done, loss=loss, bpc=loss * self.bits, tokens_per_s=rate)
                evaluate = run.eval_every and (done % run.eval_every == 0 or done == run.steps)
                if evaluate:
                    record["val_loss"] = self._evaluate(inputs, labels, step)
                    record["peak_mb"] = peak_mb()
                if evaluate or done % run.log_every == 0 or done in (1, run.steps):
                    log.write(record)
                if evaluate:
                    self._report(done, record["val_loss"], progress)
                stopped = stop.signal  # read once: a signal after this line is for the next step
                if evaluate or done == run.steps or stopped:
                    if not namespace(trainer.optimizer.param).isfinite(trainer.optimizer.param).all():
                        raise self._nonfinite("the new weights", step)
                    self._save(done, record.get("val_loss"))
                if evaluate or done % run.log_every == 0 or done == 1:
                    clock, since = time.perf_counter(), 0  # the speed of the steps alone
                if stopped and done < run.steps:
                    progress.text(f"stopped after step {done}; continue with: minitv train --resume {self.directory}")
                    return 128 + stopped
        self._finish()
        return 0

    def _step(self, batch, step: int, progress: Progress) -> float:
        trainer = self.trainer
        if self.run.check and (reason := trainer.find_nonfinite(*batch, step)):
            raise self._nonfinite(reason, step)
        loss = trainer.step(*batch, step)
        if not math.isfinite(loss) or not math.isfinite(trainer.grad_norm):
            raise self._nonfinite(trainer.find_nonfinite(*batch, step) or "the norm of the gradient", step)
        return loss

    def _evaluate(self, inputs: np.ndarray, labels: np.ndarray, step: int) -> float:
        loss = self.trainer.evaluate(inputs, labels)
        if not math.isfinite(loss):  # before these weights replace the last good checkpoint
            raise self._nonfinite(self.trainer.find_nonfinite(inputs, labels, step) or "the held-out loss", step)
        return loss

    def _nonfinite(self, reason: str, step: int, kept: str | None = None) -> RunError:
        if kept is None:
            found = [self.directory / name for name in checkpoint.NAMES if checkpoint.exists(self.directory, name)]
            kept = f"The last good checkpoint is {found[0]}. " if found else "No checkpoint was saved before it. "
        return RunError(f"step {step + 1} made a number that is not finite, first at {reason}. {kept}"
                        "A lower --lr or a smaller --clip often helps")

    def _report(self, step: int, loss: float, progress: Progress) -> None:
        bits = loss * self.held_bits
        beaten = [order for order, baseline in enumerate(self.baseline) if bits < baseline]
        if len(beaten) == len(self.baseline):
            verdict = "better than every n-gram"
        elif beaten:
            verdict = f"better than the n-gram of order {min(beaten, key=lambda order: self.baseline[order])}"
        else:
            verdict = "no better than counting characters yet"
        progress.text(f"step {step}: held-out loss {loss:.4f} nats, {bits:.3f} bits per character, {verdict}")
        if self.run.sample_tokens:
            rng = Random(self.run.seed).split(SAMPLES, step)
            ids = generate(self.trainer.model, self.tokenizer.start(), self.run.sample_tokens, rng, temperature=0.8)
            text = self.tokenizer.decode(list(ids))
            progress.text("\n".join("    " + line for line in text.split("\n")))

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.started

    def _header(self, per_char: float, held_per_char: float, training: int, held_out: int) -> dict[str, Any]:
        import numba
        import scipy

        return {
            "config": self._config(),
            "variant": self.variant,
            "parameters": self.trainer.parameters,
            "corpus": {"description": self.corpus.description, "sha256": self.corpus.sha256,
                       "size_bytes": self.corpus.size_bytes, "training_tokens": training, "held_out_tokens": held_out},
            "tokens_per_char": {"training": per_char, "held_out": held_per_char},
            "ngram_bpc": self.baseline,
            "threads": self.trainer.workers,
            "device": self.run.device,
            "versions": {"minitv": __version__, "python": platform.python_version(), "numpy": np.__version__,
                         "numba": numba.__version__, "scipy": scipy.__version__},
        }

    def _config(self) -> dict[str, Any]:
        return {"variant": self.variant, "model": to_json(self.model), "mixer": to_json(self.mixer),
                "run": to_json(dataclasses.replace(self.run, resume=None))}

    def _save(self, step: int, loss: float | None) -> None:
        better = loss is not None and loss < self.best
        if better:
            self.best = loss
        state = {
            "config": self._config(),
            "tokenizer": self.tokenizer.to_json(),
            "step": step,
            "random": {"seed": self.run.seed},  # every draw is a function of the seed and the step
            "data_position": step,
            "corpus_sha256": self.corpus.sha256,
            "best_loss": self.best if math.isfinite(self.best) else None,
            "elapsed_s": self._elapsed(),
            "threads": self.trainer.workers,
            "device": self.run.device,
        }
        model, optimizer = self.trainer.model.state(), self.trainer.optimizer.state()
        # "last" comes last: a run killed between the two then finds this best loss again when it is resumed.
        for name in ("best", "last") if better else ("last",):
            checkpoint.save(self.directory, name, model=model, optimizer=optimizer, state=state)

    def _restore(self, resumed) -> int:
        state, where = resumed.state, str(self.run.resume)
        self.elapsed_before = state.elapsed_s
        checkpoint.check_arrays(self.trainer.model.state(), resumed.model, f"{where}: the model")
        checkpoint.check_arrays(self.trainer.optimizer.state(), resumed.optimizer, f"{where}: the optimizer")
        self.trainer.model.load(resumed.model)
        self.trainer.optimizer.load(resumed.optimizer)
        # Losses on other held-out tokens do not compare.
        same = state.config.run.get("eval_tokens") == self.run.eval_tokens
        self.best = state.best_loss if same and state.best_loss is not None else math.inf
        what = "dropout" if self.model.dropout else "the last bits of the results"
        if state.device != self.run.device:
            print(f"note      this run was on {quoted(state.device)} and is now on {self.run.device}: {what} will differ",
                  file=sys.stderr)
        elif state.threads != self.trainer.workers:
            print(f"note      this run had {state.threads} worker threads and now has {self.trainer.workers}: {what} "
                  "will differ", file=sys.stderr)
        return state.step

    def _finish(self) -> None:
        print(f"done in {duration(self._elapsed())}; write text with: minitv sample {self.directory}", file=sys.stderr)
        try:
            print(f"curve: {plot(self.directory)}", file=sys.stderr)
        except UserError as error:
            print(f"no picture of the curve: {error}", file=sys.stderr)
