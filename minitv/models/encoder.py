"""Encoder: token ids to logits at every position.

    x = embed[ids] + positions[0 ... T-1];  x = stack(x);  logits = norm(x) Wᵀ

The head W is the embedding itself when tied (Press and Wolf 2017, arXiv 1608.05859): one parameter, one gradient. Positions are
a learned vector each, or sines (Vaswani et al. 2017, arXiv 1706.03762, sections 3.4 and 3.5):

    x = √D embed[ids] + p,   p[t, 2i] = sin(t / 10000^(2i/D)),   p[t, 2i + 1] = cos(t / 10000^(2i/D))
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from autograd import Tensor, embedding, linear, reshape
from autograd.device import beside
from autograd.errors import ShapeError
from autograd.random import Random

from .. import sequence
from ..nn import Dropout, Embedding, Module, norm_of, normal
from ..options import ModelOptions
from ..stack import STACKS


class Encoder(Module):
    """A model of the given variant, a record as in variant.py, that gives ``vocab`` logits for every position.

    ``model`` are the options every variant has, ``options`` the variant's own; the weights follow from ``rng``.
    """

    def __init__(self, variant: Any, model: ModelOptions, options: Any, vocab: int, rng: Random, dtype: Any = np.float32):
        self.variant, self.context = variant, model.context
        std = model.init_std
        self.embed = Embedding(rng.split(0), vocab, model.width, std=std, dtype=dtype)
        self.embed_norm = norm_of(model, model.width, dtype) if model.embed_norm else None
        self.positions = (normal(rng.split(1), (model.context, model.width), std, dtype) if model.positions == "learned"
                          else None)
        self.encoding = model.positions
        self.dropout = Dropout(model.dropout)
        stack = variant.stack if model.stack is None else STACKS[model.stack]
        self.blocks = stack(rng, variant, model, options, dtype)
        self.bounded = self.positions is not None or self.blocks.bounded  # whether it reads no further than the context
        self.norm = None if variant.block.normed else norm_of(model, model.width, dtype)
        self.head = self.embed if model.tied else Embedding(rng.split(4), vocab, model.width, std=std, dtype=dtype)
        if variant.tables is not None and not model.tied:
            self.embed.weight, self.head.weight = variant.tables(rng.split(5), model, vocab, dtype)

    def __call__(self, ids: np.ndarray, rng: Random | None = None, at: np.ndarray | None = None) -> Tensor:
        """Logits [B T V] of ids [B T]; ``rng`` switches dropout on.

        ``at`` asks for some positions alone, N indices into the B T positions row by row, and gets logits [N V].
        """
        x = self.hidden(ids, rng)
        if at is not None:
            x = embedding(reshape(x, (-1, x.shape[2])), beside(at, x.data))  # [N D]
        return self.logits(x)

    def hidden(self, ids: np.ndarray, rng: Random | None = None) -> Tensor:
        """What the last block gives, before the norm and the head."""
        x = self.dropout(self.embedded(ids, sequence.position()), rng and rng.split(0))
        return self.blocks(x, rng and rng.split(1))

    def embedded(self, ids: np.ndarray, start: int) -> Tensor:
        """What the first block reads, [B T D], of ids [B T] at the positions from ``start`` on."""
        ids, weight = self.checked(ids, start), self.embed.weight
        stop = start + ids.shape[1]
        x = self.looked_up(ids)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.encoding == "sinusoidal":
            return x * math.sqrt(x.shape[2]) + Tensor.wrap(beside(sines(start, stop, x.shape[2], x.dtype), weight.data))
        if self.positions is None:
            return x
        return x + (self.positions if stop - start == self.context else self.positions[start:stop])

    def looked_up(self, ids: np.ndarray) -> Tensor:
        """The vectors [B T D] of ids [B T], before any norm and any position."""
        return self.embed(ids)

    def checked(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Ids where the weights lie; ShapeError unless they are [B T] and fit behind ``start`` tokens."""
        if not hasattr(ids, "ndim"):  # a list
            ids = np.asarray(ids)
        if ids.ndim != 2:
            raise ShapeError(f"ids are [B T], the tokens of B sequences; got an array of shape {ids.shape}"
                             + (": ids[None] is one sequence" if ids.ndim == 1 else ""))
        if self.bounded and start + ids.shape[1] > self.context:
            raise ShapeError(f"the model has {self.context} positions; {start} + {ids.shape[1]} tokens do not fit")
        return beside(ids, self.embed.weight.data)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [... V] of what the last block gave, [... D]."""
        return linear(x if self.norm is None else self.norm(x), self.head.weight)


@lru_cache(maxsize=8)
def sines(start: int, stop: int, width: int, dtype) -> np.ndarray:
    """The sinusoidal vectors of positions start ... stop - 1, [T D]."""
    angles = np.arange(start, stop)[:, None] * 10_000.0 ** (-2 * (np.arange(width) // 2) / width)  # [T D]
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(dtype)
