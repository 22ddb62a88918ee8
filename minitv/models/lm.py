"""LanguageModel: token ids to the logits of the next token, for every variant.

    x = embed[ids] + positions[0 .. T-1];  x = block(x) for every layer;  logits = norm(x) Wᵀ

The head W is the embedding itself when tied (Press and Wolf 2017, arXiv 1608.05859): one parameter, one gradient. Positions,
or a norm of the embedding, are there if the variant asks for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, cross_entropy, linear, reshape
from autograd.device import beside
from autograd.errors import ShapeError
from autograd.random import Random

from ..nn import NORMS, Dropout, Embedding, Module, normal
from ..options import ModelOptions


class State(NamedTuple):
    """How many tokens have been read, and the state of every block."""

    position: int
    blocks: tuple[Any, ...]


class LanguageModel(Module):
    """A causal language model of the given variant, a record as in variant.py.

    ``model`` are the options every variant has, ``options`` the variant's own; the weights follow from ``rng``.
    """

    def __init__(self, variant: Any, model: ModelOptions, options: Any, vocab: int, rng: Random, dtype: Any = np.float32):
        self.context = model.context
        std = model.init_std
        norm = NORMS[model.norm]
        self.embed = Embedding(rng.split(0), vocab, model.width, std=std, dtype=dtype)
        self.embed_norm = norm(model.width, bias=model.bias, dtype=dtype) if model.embed_norm else None
        learned = model.positions == "learned"
        self.positions = normal(rng.split(1), (model.context, model.width), std, dtype) if learned else None
        self.bounded = learned or variant.mixer.bounded
        self.dropout = Dropout(model.dropout)
        self.blocks = [variant.block(model, variant.mixer(rng.split(3, layer), model, options, layer, dtype),
                                     variant.channel(rng.split(2, layer), model, options, layer, dtype), dtype)
                       for layer in range(model.layers)]
        self.norm = norm(model.width, bias=model.bias, dtype=dtype)
        self.head = self.embed if model.tied else Embedding(rng.split(4), vocab, model.width, std=std, dtype=dtype)
        if variant.tables is not None and not model.tied:
            self.embed.weight, self.head.weight = variant.tables(rng.split(5), model, vocab, dtype)

    def __call__(self, ids: np.ndarray, rng: Random | None = None) -> Tensor:
        """Logits [B T V] of the token after each position of ids [B T]; ``rng`` switches dropout on."""
        x = self.dropout(self._embed(ids, 0), rng and rng.split(0))
        for layer, block in enumerate(self.blocks):
            x = block(x, rng and rng.split(1, layer))
        return linear(self.norm(x), self.head.weight)

    def loss(self, ids: np.ndarray, labels: np.ndarray, rng: Random | None = None) -> Tensor:
        """Mean cross-entropy in nats per token."""
        return cross_entropy(self(ids, rng), beside(labels, self.embed.weight.data))

    def init_state(self, batch: int) -> State:
        """The state before the first token."""
        return State(0, tuple(block.init_state(batch) for block in self.blocks))

    def prefill(self, ids: np.ndarray, state: State) -> tuple[Tensor, State]:
        """Logits [B T V] of a segment that continues ``state``, and the state after it."""
        x = self._embed(ids, state.position)
        states = []
        for block, past in zip(self.blocks, state.blocks, strict=True):
            x, past = block.prefill(x, past)
            states.append(past)
        return linear(self.norm(x), self.head.weight), State(state.position + ids.shape[1], tuple(states))

    def step(self, ids: np.ndarray, state: State) -> tuple[Tensor, State]:
        """Logits [B V] after one token per sequence, ids [B], and the state after it."""
        x = self._embed(ids[:, None], state.position)
        x = reshape(x, (x.shape[0], x.shape[2]))
        states = []
        for block, past in zip(self.blocks, state.blocks, strict=True):
            x, past = block.step(x, past)
            states.append(past)
        return linear(self.norm(x), self.head.weight), State(state.position + 1, tuple(states))

    def _embed(self, ids: np.ndarray, start: int) -> Tensor:
        stop = start + ids.shape[1]
        if self.bounded and stop > self.context:
            raise ShapeError(f"the model has {self.context} positions; {start} + {ids.shape[1]} tokens do not fit")
        x = self.embed(beside(ids, self.embed.weight.data))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.positions is None:
            return x
        return x + (self.positions if stop - start == self.context else self.positions[start:stop])
