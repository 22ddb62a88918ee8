"""Writing text with a trained model, one token at a time from the model's state."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autograd.cpu.process import blas_threads, cores
from autograd.device import select
from autograd.random import Random

from . import checkpoint
from .errors import CheckpointError, RunError, UserError, device_errors, naming
from .evaluate import Evaluation, evaluate
from .experiment import Experiment, from_checkpoint
from .models.encdec import EncoderDecoder, padded
from .models.lm import LanguageModel
from .nn import undrawn
from .options import OF_SOME, SampleOptions
from .signals import outcome
from .signals import threads as worker_threads
from .variants.attention_sinks import cache_of, streaming

BLOCK = 64  # random numbers drawn at a time, and tokens that a thread writes before it waits for others
MANY = 1000  # numbers of which the order is found another way
GROUP = 32  # sequences that a thread writes side by side, at most: a step of more takes as much longer
WORK = 2**23  # sequences of a thread times weights, at least: with fewer, threads wait longer for Python's lock than they save


def choose(logits: np.ndarray, uniforms: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
           min_p: float = 0.0) -> np.ndarray:
    """Draw an index [B] for every row of logits [B V], with probability softmax(logits / temperature), by numbers in [0, 1).

    Temperature 0 takes the largest logit. ``top_k`` keeps the k largest; of these, ``top_p`` keeps the smallest set of
    likeliest indices whose probabilities reach p (Holtzman et al. 2020, arXiv 1904.09751); ``min_p`` drops what is less
    likely than min_p times the likeliest (Nguyen et al. 2024, arXiv 2407.01082). RunError when a logit is NaN, or the largest
    of a row is infinite.
    """
    (batch, vocab), best = logits.shape, logits.argmax(axis=1)  # or the first that is NaN
    starts = np.arange(0, batch * vocab, vocab)  # of the rows, in all that follows
    largest = logits.take(best + starts)
    if not (finite := np.isfinite(largest)).all():
        b = finite.argmin()
        raise RunError(f"the model gives token {best[b]} the logit {largest[b]}, so that no token can be drawn: its weights, "
                       "or what it computes from them, are not finite")
    if temperature == 0:
        return best
    order, starts = _falling(logits), starts[:, None]
    below = logits.take(order[:, :top_k] + starts).astype(np.float64) - largest[:, None]
    with np.errstate(over="ignore"):  # a tiny temperature: minus infinity, weight 0
        weights = np.exp(below / temperature)  # relative to the likeliest
    cumulative = weights.cumsum(axis=1)
    kept = (cumulative < top_p * cumulative[:, -1:]).sum(axis=1, keepdims=True)  # the place of the last one
    if min_p:
        kept = np.minimum(kept, (weights >= min_p).sum(axis=1, keepdims=True) - 1)
    totals = cumulative.take(kept + starts // vocab * weights.shape[1])
    places = (cumulative <= uniforms[:, None] * totals).sum(axis=1, keepdims=True)
    return order.take(np.minimum(places, kept) + starts)[:, 0]


def _falling(logits: np.ndarray) -> np.ndarray:
    """The indices [B V] of logits from the largest down, equal ones in order: a stable sort, of many in a third of its time.

    A float32 is an integer that grows as the number does, once the sign is taken care of. With the index behind it no two
    are equal, so that any sort is stable, and the fastest one will do.
    """
    if logits.dtype != np.float32 or logits.shape[1] < MANY:
        return (-logits).argsort(axis=1, kind="stable")
    bits = (np.float32(0) - logits).view(np.uint32)  # of 0 - x, where -0 and 0 are the same
    bits = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(2**31))
    keys = bits.astype(np.uint64) << np.uint64(32) | np.arange(logits.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(2**32 - 1)).astype(np.intp)


def penalise(logits: np.ndarray, mask: np.ndarray, penalty: float) -> np.ndarray:
    """Logits [B V] in which every token of the ``mask`` [B V] is less likely: l / penalty if l > 0, else l · penalty.

    Keskar et al. 2019 (arXiv 1909.05858, section 4.1) divide the logits of all tokens in the text so far, however often each is
    there, before the temperature. A negative logit would become more likely by that: it is multiplied, as others do who use it.
    """
    return np.where(mask, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def generate(model: LanguageModel, prompt: np.ndarray, tokens: int | None, rng: Random, **options: Any) -> Iterator[int]:
    """Yield ``tokens`` ids that continue the prompt's ids [T]; ``options`` are those of ``together``."""
    return (int(row[0]) for row in together(model, np.asarray(prompt)[None], tokens, [rng], **options))


def together(model: LanguageModel, prompts: np.ndarray, tokens: int | None, rngs: Sequence[Random], *,
             threads: int | None = None, **options: Any) -> Iterator[np.ndarray]:
    """Yield ids [B], ``tokens`` times or without end where that is None, which continue B prompts of equal length side by side.

    Prompts [B T] have at least one id each; one prompt [1 T] is that of all. Each sequence has its own source of randomness, so
    that it is what ``generate`` gives alone, unless two ids are equally likely to rounding. ``choose`` draws an id, among the
    first ids alone where ``among`` says how many; ``penalise`` applies before it to every id of the prompt and of what has been
    generated. Where the model ends at its context, as learned positions do, the state is then rebuilt from the last half of it,
    so at least context / 2 tokens are always seen.

    The sequences are shared by so many ``threads``, by default as many as there are usable cores, where kernels write: they
    compute without Python's lock. What is written is the same, to the last bit, for any number of them.
    """
    prompts = np.asarray(prompts, np.intp)
    fused, parts = _parts(model, len(rngs), threads or cores())
    groups = [_group(model, prompts if len(prompts) == 1 else prompts[part], tokens, rngs[part], **options) for part in parts]
    return groups[0] if len(groups) == 1 else _joined(groups, len(groups) if fused else 0)


def _parts(model: LanguageModel, batch: int, threads: int) -> tuple[bool, list[slice]]:
    """Whether kernels write B sequences, and groups of these: one for a thread, or of a size that threads do not change."""
    from .decode import UNIT, unread  # its kernels, of all variants, are no part of the start of a training run

    fused, units, edges = not unread(model), -(-batch // UNIT), range(0, batch, GROUP)
    if fused:
        count = max(1, min(threads, units, batch * sum(weight.size for weight in model.parameters()) // WORK))
        edges = [UNIT * (units * i // count) for i in range(count)]
    return fused, [slice(a, b) for a, b in itertools.pairwise([*edges, batch])]


def _joined(groups: list[Iterator[np.ndarray]], threads: int) -> Iterator[np.ndarray]:
    """What groups of sequences write, side by side; each thread goes on with one for a while, under the caller's switches."""
    def written(group: Iterator[np.ndarray]) -> list[np.ndarray]:
        return list(itertools.islice(group, BLOCK))

    with worker_threads(threads or 1) as pool:
        while True:
            started = [pool.submit(copy_context().run, written, group) for group in groups] if threads else groups
            chunks = list(map(outcome if threads else written, started))
            if not chunks[0]:
                return
            yield from map(np.concatenate, zip(*chunks, strict=True))


def _group(model: LanguageModel, prompts: np.ndarray, tokens: int | None, rngs: Sequence[Random], *, temperature: float = 1.0,
           top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0,
           repetition_penalty: float = 1.0, among: int | None = None) -> Iterator[np.ndarray]:
    """The same by one decoder, in the thread that asks for the ids."""
    from .decode import decoder

    batch = len(rngs)
    history = list(np.broadcast_to(prompts, (batch, prompts.shape[1])).T)
    if not history:
        raise UserError("prompt: it is empty, and the first token needs one before it: give at least one id")
    limit = model.context if model.bounded else math.inf
    reader, logits, ids, mask = decoder(model, batch), None, None, None
    for i in itertools.count() if tokens is None else range(tokens):
        if logits is None or reader.position >= limit:
            keep = len(history) if limit == math.inf else model.context if logits is None else -(-model.context // 2)
            logits = reader.prefill(prompts[:, -keep:] if logits is None else np.stack(history[-keep:], axis=1))
        else:
            logits = reader.step(ids)
        if i % BLOCK == 0:
            uniforms = np.stack([rng.split(i // BLOCK).uniform((BLOCK,), np.float64) for rng in rngs], axis=1)  # [BLOCK B]
        scores = logits
        if repetition_penalty != 1:
            if mask is None:
                mask = np.zeros(logits.shape, bool)
                for earlier in history:
                    mask[np.arange(batch), earlier] = True
            scores = penalise(logits, mask, repetition_penalty)
        ids = choose(scores[:, :among], uniforms[i % BLOCK], temperature, top_k, top_p, min_p)  # [B]
        history.append(ids)
        if mask is not None:
            mask[np.arange(batch), ids] = True
        del history[:-model.context]  # no more is read again
        yield ids


def written(model: LanguageModel, prompts: np.ndarray, tokens: int, rngs: Sequence[Random], *, threads: int | None = None,
            **options: Any) -> np.ndarray:
    """The ids [N tokens] that continue prompts [N T], or one of all [1 T], some at a time; options as for ``together``."""
    prompts = np.broadcast_to(prompts, (len(rngs), np.shape(prompts)[1]))
    rows = [together(model, prompts[part], tokens, rngs[part], threads=threads, **options) for part in _turns(rngs, threads)]
    return np.concatenate([np.reshape(list(ids), (tokens, -1)).T for ids in rows])


def _turns(items: Sequence, threads: int | None) -> list[slice]:
    """The sequences that are written one after the other: a group for each thread at a time."""
    size = GROUP * (threads or cores())
    return [slice(i, i + size) for i in range(0, len(items), size)]


class Trained(NamedTuple):
    """What a checkpoint holds: the experiment, its model, the task's part of the state, and the steps that were done."""

    experiment: Experiment
    model: Any
    saved: dict[str, Any]
    step: int

    @property
    def tokenizer(self) -> Any:
        """What turns text into ids and back; UserError where the task has no text."""
        return self.experiment.task.stored_tokenizer(self.saved)

    def evaluate(self, text: str) -> Evaluation:
        """How well the model predicts a text: ``loss`` in nats per token, ``bits_per_character``, each character's surprise."""
        self.check_causal("predict the next token")
        tokenizer = self.tokenizer
        return evaluate(self.model, tokenizer.encode(text), tokenizer.length(text))

    def loss(self, text: str) -> float:
        """The mean surprise of the model at a text, in nats per token after the first."""
        return self.evaluate(text).loss

    def write(self, prompt: str = "", tokens: int = 200, **options: Any) -> str:
        """The text that the model continues a prompt with; ``options`` are those of ``minitv sample``, such as temperature."""
        task = self.experiment.task
        if task.suffix:
            raise UserError(f"write: a model of the task {task.name} writes no text, it makes a file with `minitv sample`")
        if not self.answers:
            self.check_causal("write")
        config = SampleOptions(prompt=prompt, tokens=tokens, **options)
        alone = "count", "checkpoint", "device", "threads", "out", "complete", "seconds"
        if wrong := [name for name in alone if name in options]:
            raise UserError(f"write: {wrong[0]} is an option of `minitv sample` alone; a run that is loaded writes one text, "
                            "with its weights where they are")
        check_options(task, config)
        return "".join(self.pieces(config, [config.seed])[0])

    @property
    def answers(self) -> bool:
        """Whether the model answers a source, in place of continuing a text."""
        return isinstance(self.model, EncoderDecoder)

    def check_causal(self, purpose: str) -> None:
        """Raise UserError if the model does not continue texts; ``purpose`` says what for it must."""
        if not self.experiment.variant.causal:
            does = "answers a source" if self.answers else "sees a whole sequence at once"
            raise UserError(f"{self.experiment.variant.name} {does}, it cannot {purpose}")

    def pieces(self, options: SampleOptions, seeds: Sequence[int]) -> list[Iterator[str]]:
        """The texts of some seeds, each in pieces; they are written side by side, and end before ``options.stop``."""
        if self.answers:
            return [_until(options.stop, self._answer(options, seed)) for seed in seeds]
        self.check_causal("write")
        tokenizer = self.tokenizer
        with naming("--prompt"):
            prompt = tokenizer.start(options.prompt)
        model = self.model
        if options.window is not None or options.sinks is not None:
            model = streaming(model, *cache_of(model, options.window, options.sinks))
        rows = self._drawn(model, prompt, options, seeds, 0.8, tokenizer.spelled)
        # What one text has read of the rows waits for the others.
        return [_until(options.stop, _decoded(tokenizer.decoder(prompt), map(operator.itemgetter(i), copy)))
                for i, copy in enumerate(itertools.tee(rows, len(seeds)))]

    @staticmethod
    def _drawn(model: Any, prompt: np.ndarray, options: SampleOptions, seeds: Sequence[int], temperature: float,
               among: int | None = None) -> Iterator[np.ndarray]:
        """The ids [B] that ``together`` draws; ``temperature`` stands for an option that is not given."""
        return together(model, np.asarray(prompt)[None], options.tokens, list(map(Random, seeds)), among=among,
                        **options.drawing(temperature))

    def _answer(self, options: SampleOptions, seed: int) -> Iterator[str]:
        """The target of the source ``options.prompt``, token after token; of a beam as a whole."""
        model, tokenizer, name = self.model, self.tokenizer, self.experiment.variant.name
        with naming("--prompt"):
            if not options.prompt:
                raise UserError(f"{name} answers a source: give one")
            source = tokenizer.encode(options.prompt)
            if len(source) >= model.context:
                raise UserError(f"the source has {len(source)} tokens, and {name} was trained with --context {model.context}: "
                                f"allowed are {model.context - 1}")
        source, limit = padded([source], model.end)[0], min(options.tokens, model.context)
        if options.beam is not None:
            with blas_threads(1):
                best = model.beam(source, options.beam, limit, options.length_penalty)[0]
            yield tokenizer.decode(best.ids)
            return
        rows = self._drawn(model.given(source), np.array([model.end]), replace(options, tokens=limit), [seed], 0.0)
        ids = itertools.takewhile(lambda token: token != model.end, map(operator.itemgetter(0), rows))
        yield from _decoded(tokenizer.decoder(), ids)


def load(directory: str, name: str = "last") -> Trained:
    """The experiment and the model of a run's checkpoint."""
    snapshot = checkpoint.map_run(directory, name)
    with closing(snapshot.model):
        with naming(directory, CheckpointError), undrawn():
            experiment = from_checkpoint(snapshot.state.config)
            model = experiment.build(experiment.task.stored_vocab(snapshot.state.task))
        checkpoint.check_arrays(model.saved(), snapshot.model, f"{directory}: the model")
        model.load(snapshot.model)
    return Trained(experiment, model, snapshot.state.task, snapshot.state.step)


def _decoded(decoder, ids: Iterator[int]) -> Iterator[str]:
    with blas_threads(1):  # the products of one token are too small to share
        for token in ids:
            yield decoder.feed(token)
    yield decoder.finish()


def open_run(directory: str, name: str, device: str, purpose: str, *,
             others: Callable[[Trained], bool] = lambda run: False) -> Trained:
    """A run's checkpoint with its causal model on a device, for a task with text; ``purpose`` says in an error what for.

    ``others`` says of which other runs this will do, too.
    """
    with device_errors():
        select(device)
    run = load(directory, name)
    with naming(directory):
        if not others(run):
            run.check_causal(purpose)
            _ = run.tokenizer  # there is one
    run.model.to(device)
    return run


def streams(directory: str, options: SampleOptions) -> Iterator[tuple[int, Iterator[str]]]:
    """Yield ``options.count`` texts that continue or answer ``options.prompt``, each as its seed and its pieces.

    The seeds are ``options.seed`` and those after it. A text ends before ``options.stop``.
    """
    run = open_run(directory, options.checkpoint, options.device, "write", others=lambda run: run.answers)
    yield from texts(run, options)


def texts(run: Trained, options: SampleOptions) -> Iterator[tuple[int, Iterator[str]]]:
    """The same for a run that is open."""
    check_options(run.experiment.task, options)
    seeds = range(options.seed, options.seed + (options.count or 1))
    for part in _turns(seeds, options.threads):
        yield from zip(seeds[part], run.pieces(options, seeds[part]), strict=True)


def write_file(run: Trained, directory: str, options: SampleOptions) -> tuple[Path, str]:
    """Write what a model makes up that writes no text; gives the file, and what it holds in words."""
    task = run.experiment.task
    check_options(task, options)
    path = Path(options.out) if options.out else checkpoint.run_folder(directory) / f"sample{task.suffix}"
    if path.suffix.lower() != task.suffix:
        raise UserError(f"--out {path}: a model of {task.name} writes a file that ends with {task.suffix}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out {path}: {'this is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")
    with blas_threads(1):
        return path, task.write_file(run, options, path)


def check_options(task: Any, options: SampleOptions) -> None:
    """Raise UserError if an option was given that concerns what models of other tasks write."""
    usual = SampleOptions()
    for name in OF_SOME:
        if name not in task.writes and getattr(options, name) != getattr(usual, name):
            others = f", allowed: {', '.join(map(_flag, task.writes))}" if task.writes else ""
            raise UserError(f"{_flag(name)}: this says nothing to a model of the task {task.name}{others}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _until(stop: str | None, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces up to the first occurrence of ``stop``, which may lie across several."""
    held = ""
    for text in pieces:
        held += text
        if stop is None:
            piece, held = held, ""
        else:
            position = held.find(stop)
            if position >= 0:
                yield held[:position]
                return
            keep = next(n for n in range(min(len(stop) - 1, len(held)), -1, -1) if held.endswith(stop[:n]))
            piece, held = held[:len(held) - keep], held[len(held) - keep:]
        if piece:
            yield piece
    if held:
        yield held
