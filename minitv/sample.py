"""Writing text with a trained model, one token at a time from the model's state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from autograd.cpu.process import blas_threads
from autograd.device import select
from autograd.random import Random

from . import checkpoint
from .errors import CheckpointError, UserError, device_errors
from .experiment import Experiment, from_checkpoint
from .models.lm import LanguageModel
from .options import SampleOptions

BLOCK = 64  # random numbers drawn at a time


def choose(logits: np.ndarray, uniform: float, temperature: float = 1.0, top_k: int | None = None,
           top_p: float = 1.0) -> int:
    """Draw an index with probability softmax(logits / temperature), by a number in [0, 1).

    Temperature 0 takes the largest logit. ``top_k`` keeps the k largest; ``top_p`` keeps the smallest set of likeliest
    indices whose probabilities reach p (Holtzman et al. 2020, arXiv 1904.09751).
    """
    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        return int(order[0])
    if top_k is not None:
        order = order[:top_k]
    below = logits[order].astype(np.float64) - logits[order[0]]
    with np.errstate(over="ignore"):  # a tiny temperature: minus infinity, weight 0
        weights = np.exp(below / temperature)
    cumulative = np.cumsum(weights)
    kept = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")) + 1
    cumulative = cumulative[:kept]
    return int(order[min(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(cumulative) - 1)])


def generate(model: LanguageModel, prompt: np.ndarray, tokens: int, rng: Random, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float = 1.0) -> Iterator[int]:
    """Yield ``tokens`` ids that continue the prompt's ids (at least one).

    Where the model ends at its context, as learned positions do, the state is then rebuilt from the last half
    of it, so at least context / 2 tokens are always seen.
    """
    from .decode import decoder  # its kernels, of all variants, are no part of the start of a training run

    history = [int(i) for i in prompt]
    limit = model.context if model.bounded else math.inf
    reader, logits = decoder(model), None
    for i in range(tokens):
        if logits is None or reader.position >= limit:
            keep = len(history) if limit == math.inf else model.context if logits is None else -(-model.context // 2)
            logits = reader.prefill(history[-keep:])
        else:
            logits = reader.step(history[-1])
        if i % BLOCK == 0:
            uniforms = rng.split(i // BLOCK).uniform((BLOCK,), np.float64)
        token = choose(logits, float(uniforms[i % BLOCK]), temperature, top_k, top_p)
        history.append(token)
        yield token


class Trained(NamedTuple):
    """What a checkpoint holds: the experiment, its model, and the task's part of the state."""

    experiment: Experiment
    model: Any
    saved: dict[str, Any]


def load(directory: str, name: str = "last") -> Trained:
    """The experiment and the model of a run's checkpoint."""
    stored = checkpoint.load(directory, name)
    experiment = from_checkpoint(stored.state.get("config"), directory)
    try:
        model = experiment.build(experiment.task.stored_vocab(stored.state))
    except UserError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    checkpoint.check_arrays(model.state(), stored.model, f"{directory}: the model")
    model.load(stored.model)
    return Trained(experiment, model, stored.state)


def _decoded(decoder, ids: Iterator[int]) -> Iterator[str]:
    with blas_threads(1):  # the products of one token are too small to share
        for token in ids:
            yield decoder.feed(token)
    yield decoder.finish()


def stream(directory: str, options: SampleOptions) -> Iterator[str]:
    """Yield pieces of text that continue ``options.prompt``; ends before ``options.stop``."""
    with device_errors():
        select(options.device)
    experiment, model, saved = load(directory, options.checkpoint)
    if not experiment.variant.causal:
        raise UserError(f"{directory}: {experiment.variant.name} sees a whole sequence at once, it cannot write")
    tokenizer = experiment.task.stored_tokenizer(saved)
    model.to(options.device)
    try:
        prompt = tokenizer.encode(options.prompt) if options.prompt else tokenizer.start()
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    ids = generate(model, prompt, options.tokens, Random(options.seed), temperature=options.temperature,
                   top_k=options.top_k, top_p=options.top_p)
    held = ""
    for text in _decoded(tokenizer.decoder(), ids):
        held += text
        if options.stop is None:
            piece, held = held, ""
        else:
            position = held.find(options.stop)
            if position >= 0:
                yield held[:position]
                return
            keep = next(n for n in range(min(len(options.stop) - 1, len(held)), -1, -1)
                        if held.endswith(options.stop[:n]))
            piece, held = held[:len(held) - keep], held[len(held) - keep:]
        if piece:
            yield piece
    if held:
        yield held
