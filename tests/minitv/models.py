"""Small models for tests, with the options that ``configure`` gives a variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from autograd import Tensor, assert_close, cross_entropy, no_grad
from autograd.device import beside
from autograd.random import Random
from minitv import variants
from minitv.experiment import Experiment
from minitv.models.conformer import Conformer
from minitv.models.encdec import EncoderDecoder
from minitv.task import Task
from tests.autograd import emulator, fake_cupy

NAMES = [name for name in variants.variants() if variants.load(name).causal]  # those that can write


def configure(variant: str, **values) -> Experiment:
    """The experiment of a variant in the default preset; an option that the variant does not have is an error."""
    return variants.load(variant).configure(**values)


def build(variant: str, vocab: int = 11, dtype=np.float64, seed: int = 0, **values):
    """A new model of a variant."""
    made = configure(variant, **values)
    return made.variant.build(made.model, made.mixer, vocab, Random(seed), dtype)


def logits_of(model, ids, rng=None) -> Tensor:
    """Logits [B T V] of ids [B T]; a model of pairs gets them as sources and as targets, one of sound gets frames of noise."""
    if isinstance(model, Conformer):
        noise = np.random.default_rng(ids).normal(size=(len(ids), 8 * ids.shape[1], model.features))
        return model(noise, rng)[:, : ids.shape[1]]
    return model(ids, ids, rng) if isinstance(model, EncoderDecoder) else model(ids, rng)


def mean_loss(model, ids, labels, rng=None) -> Tensor:
    """The mean cross-entropy in nats of the tokens that follow each position."""
    logits = logits_of(model, ids, rng)
    return cross_entropy(logits, beside(labels, logits.data))


def assert_same_on_a_gpu(make: Callable[[], Any], ids: np.ndarray, cut: int | None = None) -> None:
    """The loss of tokens [B T] and all gradients of the float32 model that ``make`` gives are the same on the emulated GPU, and
    with ``cut`` the logits of the last token, which is read alone after the first so many and the others."""
    if emulator.missing:
        pytest.skip(emulator.missing)

    def results(put: Callable, device: str) -> list[np.ndarray]:
        model = make()
        model.to(device)
        loss = mean_loss(model, put(ids), put(np.roll(ids, -1, 1)))
        loss.backward()
        found = [loss.numpy(), *(p.grad.numpy() for p in model.parameters())]
        if cut is not None:
            with no_grad():
                _, state = model.prefill(put(ids[:, :cut]), model.init_state(len(ids)))
                _, state = model.prefill(put(ids[:, cut:-1]), state)
                found.append(model.prefill(put(ids[:, -1:]), state)[0].numpy())
        return found

    expected = results(np.asarray, "cpu")
    with fake_cupy.installed("fast") as cupy:
        found = results(cupy.asarray, "cuda")
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, terms=10_000)


class Ids(Task):
    """Ids below ``vocab`` as inputs and answers, for a Trainer that gets its batches from a test."""

    baselines: ClassVar[dict[str, float]] = {}

    def __init__(self, vocab: int):
        self.vocab = vocab
