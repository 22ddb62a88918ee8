"""Small models for tests, with the options that ``configure`` gives a variant."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from autograd import Tensor, cross_entropy
from autograd.device import beside
from autograd.random import Random
from minitv import variants
from minitv.experiment import Experiment
from minitv.task import Task

NAMES = [name for name in variants.variants() if variants.load(name).causal]  # those that can write


def configure(variant: str, **values) -> Experiment:
    """The experiment of a variant in the default preset; an option that the variant does not have is an error."""
    return variants.load(variant).configure(**values)


def build(variant: str, vocab: int = 11, dtype=np.float64, seed: int = 0, **values):
    """A new model of a variant."""
    made = configure(variant, **values)
    return made.variant.build(made.model, made.mixer, vocab, Random(seed), dtype)


def mean_loss(model, ids, labels, rng=None) -> Tensor:
    """The mean cross-entropy in nats of the tokens that follow each position."""
    logits = model(ids, rng)
    return cross_entropy(logits, beside(labels, logits.data))


class Ids(Task):
    """Ids below ``vocab`` as inputs and answers, for a Trainer that gets its batches from a test."""

    baselines: ClassVar[dict[str, float]] = {}

    def __init__(self, vocab: int):
        self.vocab = vocab
