"""MEGABYTE: a token is a step of the local model, and every P tokens one of the global model before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models.megabyte import Level, Megabyte
from ..variants import megabyte
from . import FEW, Decoder, FusedDecoder, shared, transformer
from .shared import FeedForward


class Attention(transformer.Attention):
    """Its cache is written anew from the first place of every group on."""

    module = megabyte.Attention


HALVES = Attention, FeedForward


class LevelReader:
    """One level for one position after the other: x[B d] by the last tokens, and what it gives to the level inside."""

    def __init__(self, level: Level, halves: list[Any], inner: Level | None, batch: int):
        self.size, self.halves = level.size, halves
        self.table = level.embed.weight.data
        dtype, channels = self.table.dtype, self.table.shape[1]
        self.padded, self.pads = level.padded, np.repeat(self.table[:1], self.size.unit, axis=0)
        if level.pads is not None:
            self.pads = level.pads.data
        self.positions = None if level.positions is None else level.positions.data
        self.x, self.y = np.empty((batch, self.size.unit, channels), dtype), np.empty((batch, self.size.width), dtype)
        self.carry = np.zeros((batch, max(self.size.group, 1), self.size.width), dtype)  # [B n d], from the level around
        self.inner = inner and inner.size.group
        if inner is not None:
            self.matrix = None if level.project is None else level.project.weight.data
            self._norm = shared.norm_of(level.norm), self.y, np.empty(2 * batch, dtype)
            self._compute = shared.norm.version(self.y, *self._norm)

    def step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """What the position gives, [B d], that begins when ``position`` tokens stood before the last of ``tokens`` [B n]."""
        unit, group = self.size.unit, self.size.group
        place = position // unit % group if group else position // unit
        if self.padded and not place:
            self.x[:] = self.pads
        else:
            new = min(unit, position + 1)
            self.x[:, : unit - new] = self.pads[: unit - new]
            self.x[:, unit - new :] = self.table[tokens[:, -new:]]
            if self.positions is not None and not group:
                self.x[:, unit - new :] += self.positions[position + 1 - new : position + 1]
        x = self.x.reshape(len(self.x), -1)
        if group:
            x += self.carry[:, place]
            if self.positions is not None:
                x += self.positions[place]
        for half in self.halves:
            half(x, place)
        return x

    def down(self, x: np.ndarray) -> np.ndarray:
        """What the positions of the level inside get, [B n d']."""
        self._compute(x, *self._norm)
        parts = self.y.reshape(len(x), self.inner, -1)
        return parts if self.matrix is None else parts @ self.matrix.T


class Reader(FusedDecoder):
    """The decoder of a Megabyte."""

    def __init__(self, model: Megabyte, batch: int = 1):
        Decoder.__init__(self, model, batch)
        levels, halves = model.blocks.levels, iter(self.halves())
        self._levels = [LevelReader(level, [half for _ in level.stack for half in next(halves)], inner, batch)
                        for level, inner in zip(levels, [*levels[1:], None], strict=True)]
        self._head, self._position, self._vocab = shared.Head(model, batch), 0, model.embed.weight.shape[0]
        self._tokens = np.empty((batch, 0), np.intp)  # the last ones, at most a patch

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        ids = self._known(ids)
        self._tokens = self._of_all(ids[:, :0] if ids.shape[1] <= FEW else ids[:, -self.model.patch :])
        return super().prefill(ids)

    def _load(self, rows, position):
        for level, states, carry in zip(self._levels, self._state.levels, self._state.carries, strict=True):
            for half, state in zip(level.halves, (state for block in states for state in block), strict=True):
                half.load(state, position, rows)
            if rest := carry.shape[1]:
                level.carry[rows, -rest:] = carry.data

    def step(self, ids: np.ndarray) -> np.ndarray:
        position, patch = self._position, self.model.patch
        self._check(ids, self._vocab)
        self._tokens = np.concatenate([self._tokens[:, max(self._tokens.shape[1] + 1 - patch, 0):],
                                       np.asarray(ids, np.intp)[:, None]], axis=1)  # [B n]
        for i, level in enumerate(self._levels):
            if position % level.size.unit == 0:
                x = level.step(self._tokens, position)
                if level.inner:
                    self._levels[i + 1].carry[:] = level.down(x)
        self._position += 1
        return self._head(x)


READER = Reader


def refused(model: Megabyte) -> str | None:
    """Why no kernels can read a model, beside what holds for all variants."""
    return "they take one pass, and --strided two" if model.stride else None
