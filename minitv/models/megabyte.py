"""Megabyte: a language model of levels, each of which reads the text in units of another size.

The outermost level has a position for every patch of the text, the innermost one for every token. In between there may be more:
a position of level i is a unit of u_i tokens, and n_i of them make one position of level i - 1, so u_{i-1} = n_i u_i.

    units    e[a] = the embeddings E_i of the u_i tokens that end with token a u_i, side by side      [d_i]
    in       x[a] = e[a] + carry[a], with a pad in place of e[a] at the first position of a group
    out      y = norm(stack(x)) in every group of n_i positions; level 0 is one group
    carry    the n_{i+1} parts of y[a], each times W_i, go to the positions of level i + 1 that lie in it
    logits   of the innermost level, where a position is a token

Position a is the first one that sees token a u_i. Its output serves to predict the tokens a u_i + 1 .. (a + 1) u_i. So it sees
all tokens before those which it helps to predict, and no others. variants/megabyte.py teaches the paper, whose equations have
their numbers here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, broadcast_to, concat, embedding, reshape, where
from autograd.device import beside, namespace
from autograd.random import Random

from ..blocks import Block
from ..errors import UserError
from ..nn import Embedding, Linear, Module, norm_of, normal, training
from ..options import ModelOptions
from ..stack import STACKS
from .encoder import sines
from .lm import LanguageModel


class Size(NamedTuple):
    """What a level is: its width d, its number of blocks, its unit u in tokens, and the n positions of a group.

    The outermost level has a single group, and its n is 0. ``mixer`` is the class that mixes its positions; with ``whole`` it
    reads all groups of a text at once, and sees to it itself what a position may see.
    """

    width: int
    layers: int
    unit: int
    group: int
    mixer: Any
    whole: bool


class Nothing(Module):
    """The stack of a level without blocks: y = x."""

    def __iter__(self):
        return iter(())

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return x

    def init_state(self, batch: int) -> tuple:
        return ()

    def prefill(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        return x, state


class Level(Module):
    """One level: from what is known of the text to a vector for each of its positions."""

    def __init__(self, rng: Random, variant: Any, model: ModelOptions, options: Any, size: Size, inner: Size | None,
                 vocab: int, embed: Embedding | None, dtype: Any):
        self.size, std = size, model.init_std
        channels = size.width // size.unit  # of a token
        self.embed = embed or Embedding(rng.split(0), vocab, channels, std=std, dtype=dtype)
        self.padded = bool(size.group) and options.start == "pad"  # whether groups begin with a pad
        pads = size.unit if self.padded else size.unit - 1
        self.pads = normal(rng.split(1), (pads, channels), std, dtype) if pads and options.pads == "learned" else None
        places = (size.group, size.width) if size.group else (model.context, channels)
        self.positions = normal(rng.split(2), places, std, dtype) if model.positions == "learned" else None
        self.sines = model.positions == "sinusoidal"
        self.stack = Nothing()
        if size.layers:
            stack = variant.stack if model.stack is None else STACKS[model.stack]
            shape = replace(model, width=size.width, layers=size.layers, context=size.group or model.context)
            self.stack = stack(rng.split(3), replace(variant, mixer=size.mixer), shape, options, dtype)
        self.norm = self.project = None
        if inner is not None:
            self.norm = norm_of(model, size.width, dtype)
            if options.carry_projection:
                self.project = Linear(rng.split(4), size.width // inner.group, inner.width, std=std, bias=False,
                                      dtype=dtype)

    def entered(self, history: np.ndarray, first: int, start: int, stop: int, carry: Tensor | None) -> Tensor:
        """x [B A d] of the positions from ``start`` to ``stop`` - 1, by the ``history`` of tokens [B ..] from ``first`` on."""
        unit, width = self.size.unit, self.size.width
        low, high = (start - 1) * unit + 1, (stop - 1) * unit + 1  # the tokens of these units, from ``low`` to ``high`` - 1
        x = self.embed(history[:, max(low, 0) - first : high - first])  # (1) [B .. d/u]
        batch, _, channels = x.shape
        if self.sines:
            x = x * math.sqrt(channels)
        if not self.size.group:
            x = self._placed(x, range(max(low, 0), high))
        if low < 0:  # before the text
            x = concat([broadcast_to(self._pads(unit - 1), shape=(batch, unit - 1, channels)), x], axis=1)
        x = reshape(x, (batch, stop - start, width))  # (2) [B A d]
        if not self.size.group:
            return x
        places = np.arange(start, stop) % self.size.group
        if self.padded:
            begins = beside((places == 0)[:, None], x.data)  # [A 1]
            x = where(begins, reshape(self._pads(unit), (width,)), x)
        return self._placed(x + carry, places)  # (4)

    def read(self, x: Tensor, start: int, state: tuple | None, rng: Random | None = None) -> tuple[Tensor, tuple | None]:
        """y [B A d] of positions from ``start`` on; without a state they are whole groups, and nothing is kept."""
        group, (batch, length, width) = self.size.group, x.shape
        if self.size.whole:  # (3)
            return (self.stack(x, rng), None) if state is None else self.stack.prefill(x, state)
        if state is None:  # (5)
            return reshape(self.stack(reshape(x, (-1, group, width)), rng), x.shape), None
        running = min(-start % group, length)  # positions of a group that has begun before
        whole = (length - running) // group * group
        parts = []
        if running:
            y, state = self.stack.prefill(x[:, :running], state)
            parts.append(y)
        if whole:
            parts.append(self.read(x[:, running : running + whole], 0, None)[0])
        if running + whole < length:
            y, state = self.stack.prefill(x[:, running + whole :], self.stack.init_state(batch))
            parts.append(y)
        return concat(parts, axis=1), state

    def carried(self, y: Tensor, group: int) -> Tensor:
        """What ``group`` positions of the next level get of each of these: [B A·group d'] of y [B A d]."""
        batch, length, width = y.shape
        y = reshape(self.norm(y), (batch, length * group, width // group))
        return y if self.project is None else self.project(y)

    def _pads(self, count: int) -> Tensor:
        """The vectors [count d/u] of what stands before the text or a group."""
        if self.pads is not None:
            return self.pads[:count]
        return embedding(self.embed.weight, beside(np.zeros(count, np.intp), self.embed.weight.data))

    def _placed(self, x: Tensor, places: Any) -> Tensor:
        """x [B n ..] with vectors of its places [n]."""
        if self.positions is not None:
            return x + embedding(self.positions, beside(np.asarray(places, np.intp), x.data))
        if not self.sines:
            return x
        table = sines(0, max(places, default=0) + 1, x.shape[2], x.dtype)
        return x + Tensor.wrap(beside(table[np.asarray(places, np.intp)], x.data))


class Levels(Module):
    """The levels, the outermost first; indices are of all their blocks."""

    def __init__(self, levels: list[Level]):
        self.levels = levels

    def members(self):
        """The levels by their numbers."""
        return ((str(i), level) for i, level in enumerate(self.levels))

    @property
    def stacks(self) -> list[Any]:
        """The stacks of those levels that have blocks."""
        return [level.stack for level in self.levels if level.size.layers]

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all levels."""
        return [block for level in self.levels for block in level.stack]

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self):
        return iter(self.blocks)

    def __getitem__(self, layer: int) -> Block:
        return self.blocks[layer]


class State(NamedTuple):
    """How many tokens have been read, the last ones of them [B ..], and of each level the state of its running group, and what
    the positions to come get from the level above, [B .. d].
    """

    position: int
    recent: Any
    levels: tuple[Any, ...]
    carries: tuple[Tensor, ...]


class Strided(NamedTuple):
    """The states of the two passes; the second one begins half a patch later."""

    position: int
    passes: tuple[State, State]


class Megabyte(LanguageModel):
    """A language model of levels: logits [B T V] of ids [B T], each of which depends on exactly the tokens up to it."""

    def __init__(self, variant: Any, model: ModelOptions, options: Any, vocab: int, rng: Random, dtype: Any = np.float32):
        self.variant, self.context, self.encoding = variant, model.context, model.positions
        self.embed_norm = self.positions = None  # levels have positions of their own
        self.bounded = model.positions == "learned"
        sizes = options.levels(model)
        width, std = sizes[-1].width, model.init_std
        self.embed = Embedding(rng.split(0), vocab, width, std=std, dtype=dtype)
        self.blocks = Levels([Level(rng.split(7, i), variant, model, options, size, inner, vocab,
                                    None if inner else self.embed, dtype)
                              for i, (size, inner) in enumerate(zip(sizes, [*sizes[1:], None], strict=True))])
        self.norm = norm_of(model, width, dtype)
        self.head = self.embed if model.tied else Embedding(rng.split(4), vocab, width, std=std, dtype=dtype)
        self.patch = sizes[0].unit
        self.stride = self.patch // 2 if options.strided else 0

    def hidden(self, ids: np.ndarray, rng: Random | None = None) -> Tensor:
        ids = self.checked(ids, 0)
        x, length = self._whole(ids, rng), ids.shape[1]
        if not self.stride or training() or length <= self.stride:
            return x
        other = self._whole(ids[:, self.stride :], rng)
        return self._chosen(x, concat([x[:, : self.stride], other], axis=1), 0)

    def init_state(self, batch: int) -> State | Strided:
        levels = self.blocks.levels
        xp, dtype = namespace(self.embed.weight.data), self.embed.weight.dtype
        state = State(0, xp.zeros((batch, 0), np.intp), tuple(level.stack.init_state(batch) for level in levels),
                      tuple(Tensor(xp.zeros((batch, 0, level.size.width), dtype)) for level in levels))
        return Strided(0, (state, state)) if self.stride else state

    def prefill(self, ids: np.ndarray, state: State | Strided, last: bool = False) -> tuple[Tensor, State | Strided]:
        ids, start = self.checked(ids, state.position), state.position
        if not self.stride:
            x, state = self._read(ids, state)
            return self.logits(x[:, -1:] if last else x), state
        one, two = state.passes
        x, one = self._read(ids, one)
        early = min(max(self.stride - start, 0), ids.shape[1])  # tokens before the second pass
        if early < ids.shape[1]:
            y, two = self._read(ids[:, early:], two)
            x = self._chosen(x, concat([x[:, :early], y], axis=1), start)
        return self.logits(x[:, -1:] if last else x), Strided(start + ids.shape[1], (one, two))

    def _chosen(self, one: Tensor, two: Tensor, start: int) -> Tensor:
        """At every position from ``start`` on the pass in which it is in the first half of its patch."""
        places = np.arange(start, start + one.shape[1]) % self.patch
        return where(beside((places < self.stride)[:, None], one.data), one, two)

    def _whole(self, ids: Any, rng: Random | None) -> Tensor:
        """What the innermost level gives, [B T d], of a text from its beginning; the last patch is filled up and cut."""
        xp, length = namespace(ids), ids.shape[1]
        ids = xp.concatenate([ids, xp.zeros((len(ids), -length % self.patch), ids.dtype)], axis=1)
        carry = None
        for i, level in enumerate(self.blocks.levels):
            x = level.entered(ids, 0, 0, ids.shape[1] // level.size.unit, carry)
            x, _ = level.read(x, 0, None, rng and rng.split(i))
            if level.norm is not None:
                carry = level.carried(x, self.blocks.levels[i + 1].size.group)
        return x if x.shape[1] == length else x[:, :length]

    def _read(self, ids: Any, state: State) -> tuple[Tensor, State]:
        """The same of a text that continues ``state``, and the state after it."""
        position, recent, states, carries = state
        xp, levels = namespace(ids), self.blocks.levels
        history = xp.concatenate([recent, ids.astype(recent.dtype, copy=False)], axis=1)
        first, end = position - recent.shape[1], position + ids.shape[1]
        states, carries, x = list(states), list(carries), None
        for i, level in enumerate(levels):
            start, stop = -(-position // level.size.unit), -(-end // level.size.unit)
            if start == stop:
                continue
            x = level.entered(history, first, start, stop, carries[i][:, : stop - start])
            x, states[i] = level.read(x, start, states[i])
            carries[i] = carries[i][:, stop - start :]
            if level.norm is not None:
                carries[i + 1] = concat([carries[i + 1], level.carried(x, levels[i + 1].size.group)], axis=1)
        keep = min(self.patch - 1, history.shape[1])
        return x, State(end, history[:, history.shape[1] - keep :], tuple(states), tuple(carries))


def strided(model: LanguageModel) -> Megabyte:
    """The same model, with the same weights, which takes two passes unless it is trained; UserError if it has no patches."""
    if not isinstance(model, Megabyte):
        raise UserError(f"--strided: {model.variant.name} reads no patches, allowed: megabyte")
    if model.patch % 2:
        raise UserError(f"--strided: {odd(model.patch)}")
    model = copy.copy(model)
    model.stride = model.patch // 2
    return model


def odd(patch: int) -> str:
    """Why a patch has no halves."""
    return f"half of a patch of {patch} tokens is no number of tokens, allowed: an even --patch"
