"""The record of a variant: everything that is declared of it, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autograd.laws import Edge, Law
from autograd.random import Random

from . import blocks, nn, stack
from .experiment import Experiment, merge
from .models.lm import LanguageModel


@dataclass(frozen=True)
class Page:
    """What a variant's page in the documents says; forms, kernels and laws come from the operators themselves."""

    formula: str
    cost: str  # time and memory of training and of generating, projections included
    state: str  # what generating one more token needs, and how many numbers that is in a layer
    operators: tuple[str, ...]
    golden: str  # what the tests compare it with
    discrepancies: tuple[str, ...]  # between the paper, its code and other code, and what is done here
    review: str  # what the review article that this library follows says of the variant, and whether that is right


@dataclass(frozen=True)
class Variant:
    """One variant of the Transformer: what it is made of, its options, and what a reader of its paper wants to know.

    ``mixer(rng, model, options, layer, dtype)`` and ``channel(...)`` make the two halves of a block, ``block`` joins them,
    ``stack`` makes all layers of them, and ``model`` puts these between an embedding and a head.
    ``tables(rng, model, vocab, dtype)`` draws the embedding and a head that is not tied to it, where the paper has a rule.
    """

    name: str
    summary: str  # a sentence
    paper: str  # authors, year, arXiv id
    mixer: type[nn.Stateful]
    options: type  # the dataclass of the variant's own options
    page: Page
    channel: type[nn.Stateful] | None = blocks.FeedForward
    block: type[blocks.Block] = blocks.PreNorm
    stack: type[stack.Stack] = stack.Stack
    model: type[nn.Module] = LanguageModel
    tables: Callable[..., tuple[nn.Parameter, nn.Parameter]] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)  # defaults of shared options, where the paper has others
    not_causal: str = ""  # why it cannot be made to see the past alone, where that is no matter of a mask
    without: tuple[str, ...] = ()  # shared options that do nothing here
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what differs from the presets of all
    on_tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the same by task, for every preset
    fused: str | None = None  # the module of minitv/decode with kernels for writing
    on_ranks: str = ""  # what ranks that share a sequence exchange; empty: it reads whole sequences only
    identities: list[Law] = field(default_factory=list, compare=False)  # what it is equal to: ``becomes`` declares them

    def becomes(self, other: str, when: str) -> Callable:
        """Declare an identity: restricted as ``when`` says, the variant is another one, or what these words mean.

        The statement is a function of (case, draw), with a case of laws.py, and raises AssertionError if it does not hold.
        """
        return self._identity(Edge(self.name, other, when), f"becomes {other} if {when}")

    def special_case(self, other: str, when: str) -> Callable:
        """Declare the identity from its other end: the variant is what another one becomes."""
        return self._identity(Edge(other, self.name, when), f"is what {other} becomes if {when}")

    def _identity(self, edge: Edge, name: str) -> Callable:
        def declare(statement: Callable) -> Callable:
            self.identities.append(Law(name, statement, edge=edge))
            return statement

        return declare

    @property
    def causal(self) -> bool:
        """Whether an output depends on the past alone, so that the variant can write."""
        return issubclass(self.model, LanguageModel)

    @property
    def reads(self) -> str:
        """What an input is, as a task says it: tokens, unless the model says something else."""
        return getattr(self.model, "reads", "tokens")

    @property
    def writing(self) -> str:
        """How it writes, where the model says that itself."""
        return getattr(self.model, "writing", "")

    def configure(self, preset: str | None = None, *, task: str | None = None, **values: Any) -> Experiment:
        """All options of a run: the defaults, then the preset, then ``values``; UserError names what does not fit."""
        return merge(self, task, preset, ("arguments", values))[0]

    def build(self, model: Any, options: Any, vocab: int, rng: Random, dtype: Any = np.float32, **shape: int) -> Any:
        """A new model with ``model`` options and the variant's own; ``shape`` is what Task.shape says of the inputs."""
        return self.model(self, model, options, vocab, rng, dtype, **shape)
