"""Halves of blocks, x ← x + f(norm(x)), for one token after the other, each one kernel call: weights, state and scratch memory.

What a half computes stands with its kernel, in cpu.py and cpu_<variant>.py.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor, no_grad

from .. import blocks
from ..models.lm import LanguageModel
from ..nn import LayerNorm, Module
from ..ops import long_conv
from ..ops.long_conv import online
from ..ops.retention import NORMALIZATIONS
from ..variants import aft, hyena, retnet, rwkv, transformer
from . import cpu, cpu_aft, cpu_hyena, cpu_retnet, cpu_rwkv, cpu_transformer


def affine(module: Module) -> tuple[np.ndarray, np.ndarray]:
    """The weight and the bias of a linear layer or norm; zeros for a bias that is not there."""
    weight, bias = module.weight.data, getattr(module, "bias", None)
    return weight, np.zeros(len(weight), weight.dtype) if bias is None else bias.data


def normed(module: Module) -> tuple[np.ndarray, float, bool]:
    """What cpu.norm has to know of a norm."""
    return np.stack(affine(module)), module.eps, isinstance(module, LayerNorm)


def activation(module: Module) -> int:
    """What cpu.activate has to know of a feed-forward network."""
    return getattr(cpu, module.activation.name.upper())


class Half:
    """Half of a block for one token after the other: ``half(x, position)`` adds f(norm(x)) to x[D].

    It is made of the weights as they are.
    """

    def __init__(self, norm: Module, module: Module, model: LanguageModel):
        self.norm, self.width, self.dtype = normed(norm), model.embed.weight.shape[1], model.embed.weight.dtype

    def load(self, state) -> None:
        """Go on from a state of the module, of one sequence; a module without one has None."""

    def nothing(self) -> tuple[np.ndarray, np.ndarray]:
        """A linear layer without rows, which stands for one that is not there."""
        return np.empty((0, self.width), self.dtype), np.empty(0, self.dtype)

    def memory(self, *sizes: int) -> np.ndarray:
        """Scratch memory, with two numbers for ``norm``."""
        return np.empty(sum(sizes) + 2, self.dtype)


class FeedForward(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        gated = getattr(module, "gate", None) is not None
        self._given = (*self.norm, *affine(module.up), *(affine(module.gate) if gated else self.nothing()),
                       *affine(module.down), activation(module), self.memory(self.width, 3 * len(module.up.weight)))

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu.feed_forward(x, *self._given)


class Head:
    """The logits [V] of x[D], valid until the next call."""

    def __init__(self, model: LanguageModel):
        self._logits = np.empty(len(model.head.weight), model.head.weight.dtype)
        self._given = (*normed(model.norm), *affine(model.head), self._logits,
                       np.empty(model.head.weight.shape[1] + 2, self._logits.dtype))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        cpu.head(x, *self._given)
        return self._logits


class Attention(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        size, context = self.width // module.heads, model.context
        self._keys = np.zeros((module.heads, size, context), self.dtype)
        self._values = np.zeros((module.heads, context, size), self.dtype)
        self._given = (*self.norm, *affine(module.qkv), *affine(module.out), self._keys, self._values,
                       self.memory(5 * self.width, context))

    def load(self, state) -> None:
        seen = state.keys.shape[2]
        self._keys[:, :, :seen] = state.keys.data[0].swapaxes(1, 2)
        self._values[:, :seen] = state.values.data[0]

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_transformer.step(x, position, *self._given)


class TimeMix(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        self._state = np.empty((4, self.width), self.dtype)
        matrices = [getattr(module, name).data for name in ("key", "value", "receptance", "out")]
        self._given = (*self.norm, np.stack([module.mix_k.data, module.mix_v.data, module.mix_r.data]), *matrices,
                       np.zeros(self.width, self.dtype), -np.exp(module.time_decay.data), module.time_first.data, self._state,
                       self.memory(5 * self.width))

    def load(self, state) -> None:
        for row, part in zip(self._state, state, strict=True):
            row[:] = part.data[0]

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_rwkv.time_mix(x, *self._given)


class ChannelMix(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        hidden = len(module.key)
        self._state = np.empty(self.width, self.dtype)
        self._given = (*self.norm, np.stack([module.mix_k.data, module.mix_r.data]), module.key.data, module.value.data,
                       module.receptance.data, np.zeros(max(hidden, self.width), self.dtype), activation(module), self._state,
                       self.memory(3 * self.width, 3 * hidden))

    def load(self, state) -> None:
        self._state[:] = state.channel_x.data[0]

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_rwkv.channel_mix(x, *self._given)


class Retention(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        self._state = [part.data[0] for part in module.init_state(1)[:3]]
        values, size = len(module.v.weight), self._state[0].shape[2]
        linears = [array for part in (module.qk, module.v, module.gate, module.out) for array in affine(part)]
        self._given = (*self.norm, *linears, np.array(module.rotation["angles"]), module.rotation["pairing"] == "adjacent",
                       self.dtype.type(module.scale), module.decay.data, NORMALIZATIONS.index(module.normalization),
                       *self._state,
                       np.stack([np.ones(size, self.dtype), np.zeros(size, self.dtype)]), retnet.EPS,
                       module.head_norm == "layer_norm", self.memory(3 * self.width, 3 * values))

    def load(self, state) -> None:
        for own, part in zip(self._state, state[:3], strict=True):
            own[:] = part.data[0]

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_retnet.step(x, position, *self._given)


class AFT(Half):
    """What all have: the projections, and ``state``, the mean [a, b, top] of the keys that no bias concerns any more."""

    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        self._shared, qkv = self.width // module.sizes[1], affine(module.qkv)
        if self._shared > 1:
            parts = (np.split(x, np.cumsum(module.sizes)[:-1]) for x in qkv)
            qkv = [np.concatenate([q, self._spread(k), v]) for q, k, v in parts]
        out = self.nothing() if module.out is None else affine(module.out)
        self._projections, self._state = (*self.norm, *qkv, *out), np.empty((3, self.width), self.dtype)

    def _spread(self, x: np.ndarray, axis: int = 0) -> np.ndarray:
        """What the channels of a head share, for each of them: H numbers along the axis become D."""
        return np.repeat(x, self._shared, axis=axis)

    def _start(self, average, logsum) -> None:
        self._state[0], self._state[1], self._state[2] = average, 1, logsum


class AFTSimple(AFT):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        self._given = *self._projections, self._state, self.memory(4 * self.width)

    def load(self, state) -> None:
        self._start(state.average.data[0], state.logsum.data[0])

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_aft.simple(x, *self._given)


class AFTLocal(AFT):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        self._keys, self._values = np.empty((2, self._size(module, model), self.width), self.dtype)
        self._newest = 0
        self._given = (*self._projections, *self._biases(module), self._keys, self._values, self._state,
                       self.memory((7 + cpu_aft.BLOCK) * self.width))

    def _size(self, module, model) -> int:
        return min(module.window, model.context)

    def _biases(self, module) -> tuple[np.ndarray, ...]:
        """u, v and filters."""
        return module.pos_u.data, module.pos_v.data, np.empty((0, 1), self.dtype)

    def load(self, state) -> None:
        self._start(state.average.data[0], self._spread(state.logsum.data[0]))
        self._fill(state)

    def _fill(self, state) -> None:
        """The state's newest keys and values go into the ring; where there were none, they are never read."""
        there = state.keys.shape[1]
        self._newest = min(there, len(self._keys) - 1)
        first = there - self._newest
        self._keys[:self._newest] = self._spread(state.keys.data[0, first:], axis=1)
        self._values[:self._newest] = state.values.data[0, first:]

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_aft.windowed(x, position, self._newest, *self._given)
        self._newest = (self._newest + 1) % len(self._keys)


class AFTFull(AFTLocal):
    def _size(self, module, model) -> int:
        return model.context

    def load(self, state) -> None:
        self._start(0, -np.inf)
        self._fill(state)


class AFTConv(AFTLocal):
    def _biases(self, module) -> tuple[np.ndarray, ...]:
        none = np.empty((0, 1), self.dtype)
        with no_grad():
            filters = self._spread(module.filters().data)
        return none, none, np.ascontiguousarray(filters.T)


class LongConvolution(Half):
    def __init__(self, norm, module, model):
        super().__init__(norm, module, model)
        project, taps = affine(module.project), np.ascontiguousarray(module.short.data.T[::-1])  # the first is the present
        bias = np.zeros_like(project[1]) if module.short_bias is None else module.short_bias.data
        self._block, self._context, self._recent = online.BLOCK, model.context, np.zeros_like(taps)
        self._filters, self._inputs, self._sums = (
            np.zeros((module.order - 1, model.context, self.width), self.dtype) for _ in range(3))
        self._given = (*self.norm, *project, taps, bias, module.skip.data.reshape(-1, self.width), *affine(module.out),
                       self._filters, self._recent, self._inputs, self._sums, self.memory(self.width, taps.shape[1]))

    def load(self, state) -> None:
        position, recent = state.pasts[0].position, state.recent.data[0]
        self._recent[np.arange(position - len(recent), position) % len(self._recent)] = recent
        self._sums[:] = 0
        for o, past in enumerate(state.pasts):
            self._filters[o], start = state.filters[o].data, 0
            for block in past.blocks:
                start = self._join(o, start, block)
            self._inputs[o, start:position] = past.recent.data[0]

    def _join(self, o: int, start: int, block: online.Block) -> int:
        """Take a block of convolution o that begins here; where it ends."""
        inputs, ahead = (a.data[0] for a in block)
        stop = start + len(inputs)
        self._inputs[o, start:stop] = inputs
        self._sums[o, stop : stop + len(ahead)] += ahead[: self._context - stop]
        return stop

    def __call__(self, x: np.ndarray, position: int) -> None:
        cpu_hyena.step(x, position, position - position % self._block, *self._given)
        stop = position + 1
        count, rest = divmod(stop, self._block)
        if not rest and stop < self._context:
            start = stop - self._block * (count & -count)
            for o, filter in enumerate(self._filters):
                inputs = Tensor.wrap(self._inputs[o, None, start:stop])
                self._join(o, start, online.close(inputs, Tensor.wrap(filter), long_conv))


HALVES = {
    blocks.FeedForward: FeedForward,
    aft.AFTConv: AFTConv,
    aft.AFTFull: AFTFull,
    aft.AFTLocal: AFTLocal,
    aft.AFTSimple: AFTSimple,
    hyena.Hyena: LongConvolution,
    retnet.FeedForward: FeedForward,
    retnet.Retention: Retention,
    rwkv.ChannelMix: ChannelMix,
    rwkv.TimeMix: TimeMix,
    transformer.Attention: Attention,
}
