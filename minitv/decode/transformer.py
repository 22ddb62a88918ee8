"""The Transformer and its relatives: attention of one token, with the cache of keys and values.

Where a complete segment becomes a few mixtures of keys and values, they take its place, and the next token's follow them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor
from autograd.cpu.compile import cpu_kernel, inner

from ..ops.attention.cpu import step
from ..ops.rope import Rotation
from ..ops.rope.cpu import rotate, turn
from ..variants import roformer, transformer
from .shared import FeedForward, Half, Linear, Norm, columns, linear, linear_of, norm, rows, take


class Turns(NamedTuple):
    """How queries and keys are turned: a Rotation as kernels read it."""

    angles: np.ndarray  # of the pairs, radians a position; empty: nothing is turned
    growth: np.ndarray  # of the pairs of a query for each position, its logarithm
    gain: float
    centre: int
    interleaved: bool


class Weights(NamedTuple):
    norm: Norm
    qkv: Linear
    out: Linear
    sink: np.ndarray  # [B·H], a score of each head that belongs to no token; -inf is none
    turns: Turns
    segment: int = 2**62  # tokens that become mixtures; of no text by default
    mixtures: int = 0


class Cache(NamedTuple):
    """Keys are kept transposed, so that the scores of a query are sums of whole vectors."""

    keys: np.ndarray  # [B·G head_dim columns]
    values: np.ndarray  # [B·G columns head_dim]


def column(position, segment, mixtures):
    """Where the cache has the key of a position, until its segment is complete."""
    return position // segment * mixtures + position % segment


_column = inner(column)


@inner
def _turn_heads(position, turns, sign, x, heads, size, cos, sin, y):
    """y = x[heads size], turned by the position; pairs grow with their growth times ``sign``."""
    position -= turns.centre
    turn(position, turns.angles, cos, sin)
    for j in range(cos.size):
        factor = turns.gain * math.exp(sign * turns.growth[j] * position)
        cos[j], sin[j] = cos[j] * factor, sin[j] * factor
    one, tables = x.dtype.type(1), (cos.reshape(1, 1, cos.size), sin.reshape(1, 1, cos.size))
    rotate((x, (0, size, 0)), (1, heads, 1, size), tables[0], tables[1], turns.interleaved, one, one, y, (0, 1))


@inner
def turned(position, turns, q, k, heads, groups, size, memory, at):
    """q[heads size] and k[groups size], turned where they are to be, and where the scratch memory that they take ends."""
    if not turns.angles.size:
        return q, k, at
    both, at = take(memory, at, q.size + k.size)
    cos, at = take(memory, at, turns.angles.size)
    sin, at = take(memory, at, turns.angles.size)
    _turn_heads(position, turns, 1.0, q, heads, size, cos, sin, both[: q.size])
    _turn_heads(position, turns, -1.0, k, groups, size, cos, sin, both[q.size :])
    return both[: q.size], both[q.size :], at


@inner
def append(cache, last, k, v):
    """k and v, [B·G·head_dim], become a column of the cache."""
    groups, size, _ = cache.keys.shape
    for g in range(groups):
        for c in range(size):
            cache.keys[g, c, last] = k[g * size + c]
            cache.values[g, last, c] = v[g * size + c]


@cpu_kernel
def attend(x, position, weights, cache, memory):
    """x += W attention(q, k, v) with q, k, v = W' norm(x); k and v join the cache."""
    (count, width), (groups, size, _), heads = x.shape, cache.keys.shape, weights.sink.size
    shared = groups * size // count  # numbers of a token's keys
    last = _column(position, weights.segment, weights.mixtures)
    scale = x.dtype.type(1 / np.sqrt(size))
    h, at = rows(memory, 0, count, width)
    y, at = rows(memory, at, count, width)
    qkv, at = rows(memory, at, count, width + 2 * shared)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.qkv, h, qkv, False)
    q, at = columns(qkv, 0, width, memory, at)
    k, at = columns(qkv, width, shared, memory, at)
    v, at = columns(qkv, width + shared, shared, memory, at)
    queries, keys, at = turned(position, weights.turns, q.reshape(-1), k.reshape(-1), heads, groups, size, memory, at)
    append(cache, last, keys, v.reshape(-1))
    lse, at = take(memory, at, heads)
    step(queries, cache.keys, cache.values, last + 1, scale, weights.sink, y.reshape(-1), lse, memory[at:])
    linear(weights.out, y, x, True)


def turns_of(rotation: Rotation | None) -> Turns:
    rotation = rotation or Rotation(())
    growth = np.array(rotation.growth or (0.0,) * len(rotation.angles))
    return Turns(np.array(rotation.angles, np.float64), growth, float(rotation.gain), rotation.centre,
                 rotation.pairing == "interleaved")


class Cached(Half):
    """A half whose state has keys and values, as Cache has them, and grows where a model reads beyond its room."""

    def empty(self, groups: int, size: int, columns: int) -> Cache:
        groups *= self.batch
        return Cache(np.zeros((groups, size, columns), self.dtype), np.zeros((groups, columns, size), self.dtype))

    def write(self, first: int, keys: Tensor, values: Tensor, rows: slice = slice(None)) -> None:
        """Keys and values [n G T K] of some sequences, or [1 G T K] for all, become columns from ``first`` on."""
        stop = first + keys.shape[2]
        self.make_room(stop)
        for place, part in ((self.state.keys[:, :, first:stop], keys.data.swapaxes(2, 3)),
                            (self.state.values[:, first:stop], values.data)):
            place.reshape(self.batch, len(place) // self.batch, *place.shape[1:])[rows] = part

    def no_sink(self, heads: int) -> np.ndarray:
        return np.full(self.batch * heads, -np.inf, self.dtype)

    def scores(self, heads: int) -> int:
        """How many numbers of memory the scores of a query take at the end, for the heads that share a key."""
        groups, _, columns = self.state.keys.shape
        return heads * self.batch // groups * columns

    def make_room(self, columns: int) -> None:
        groups, _, room = self.state.keys.shape
        if columns <= room:
            return
        more = max(columns, 2 * room) - room
        self.state = self.state._replace(keys=np.pad(self.state.keys, ((0, 0), (0, 0), (0, more))),
                                         values=np.pad(self.state.values, ((0, 0), (0, more), (0, 0))))
        memory = self._arguments[2].size + self.weights.sink.size // groups * more  # the scores of a query
        self._arguments = self.weights, self.state, np.empty(memory, self.dtype)


class Attention(Cached):
    """Its cache has room for the context at first."""

    module = transformer.Attention
    kernel = staticmethod(attend)

    def wire(self, norm, module, model):
        return self.wired(norm, module, module.kv_heads, module.rotation, model.context)

    def wired(self, norm: Norm, module: Any, groups: int, rotation: Rotation | None, columns: int,
              **segments: int):
        """Weights, and an empty cache of ``columns`` keys and values in each of ``groups`` heads."""
        size = self.width // module.heads
        return Weights(norm, linear_of(module.qkv), linear_of(module.out), self.no_sink(module.heads), turns_of(rotation),
                       **segments), self.empty(groups, size, columns)

    def memory(self, module, model):
        return 11 * self.width + module.heads + self.scores(module.heads)

    def load(self, state, position, rows=slice(None)):
        self.write(0, state.keys, state.values, rows)

    def __call__(self, x, position):
        self.make_room(column(position, self.weights.segment, self.weights.mixtures) + 1)
        super().__call__(x, position)


class Rotary(Attention):
    module = roformer.Rotary

    @classmethod
    def computes(cls, module):
        return super().computes(module) and not module.dynamic


def refused(model) -> str | None:
    """Why nothing here can read a model, or None."""
    bert = isinstance(model, roformer.Ends) and (model.segments is not None or model.transform is not None)
    return "they know neither segments nor BERT's output" if bert else None


HALVES = Attention, Rotary, FeedForward
