"""What the pages of all variants share: kernels of a linear layer, a norm, the feed-forward network and the head; and Half.

A kernel is kernel(x, position, weights, state, memory): it adds half a block, f(norm(x)), to x[B D], one token of each of B
sequences, all at the same position. ``weights`` and ``state`` are named tuples of arrays and numbers, the weights being the
model's own; ``memory`` is scratch memory. A layer that is not there is a Linear without rows, so that a kernel is compiled once
for all options. Where heads do not meet, those of all sequences are the heads of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.ops.gelu.cpu import gelu_row, gelu_tanh_row
from autograd.ops.layer_norm.cpu import layer_norm_rows
from autograd.ops.relu.cpu import relu_row
from autograd.ops.relu_squared.cpu import relu_squared_row
from autograd.ops.rms_norm.cpu import rms_norm_rows

from .. import blocks, nn
from ..models.lm import LanguageModel
from ..ops.gated.cpu import swish

UNIT = 4  # sequences that meet a row of weights together
GELU, GELU_TANH, RELU, RELU_SQUARED, SILU = range(5)


class Linear(NamedTuple):
    """y = W x + b."""

    weight: np.ndarray  # [outputs inputs]
    bias: np.ndarray  # [outputs]


class Norm(NamedTuple):
    """layer_norm if ``centered``, else rms_norm."""

    weight: np.ndarray  # [D]
    bias: np.ndarray  # [D]
    eps: float
    centered: bool


class FeedForwardWeights(NamedTuple):
    norm: Norm
    up: Linear
    gate: Linear
    down: Linear
    activation: int


class HeadWeights(NamedTuple):
    norm: Norm
    linear: Linear


# -- kernels -----------------------------------------------------------------------------------------------------------
@inner
def take(memory, at, size):
    """The next ``size`` numbers of the scratch memory, and where they end."""
    return memory[at : at + size], at + size


@inner
def rows(memory, at, count, size):
    """The same as [count size]."""
    return memory[at : at + count * size].reshape(count, size), at + count * size


@inner
def columns(x, first, size, memory, at):
    """x[:, first : first + size] in scratch memory, and where that ends."""
    part, at = rows(memory, at, len(x), size)
    for b in range(len(x)):
        for c in range(size):
            part[b, c] = x[b, first + c]
    return part, at


@inner
def linear(layer, x, y, add):
    """y[B ·] = x[B ·] Wᵀ + b, added to y if ``add``; four sequences meet two rows of weights at a time."""
    weight, bias, zero = layer.weight, layer.bias, x.dtype.type(0)
    fours, pairs, inputs = len(x) - len(x) % UNIT, len(weight) - len(weight) % 2, weight.shape[1]
    for i in range(0, pairs if fours else 0, 2):
        row, other = weight[i], weight[i + 1]
        for b in range(0, fours, UNIT):
            one, two, three, four = x[b], x[b + 1], x[b + 2], x[b + 3]
            a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
            for j in range(inputs):
                a0 += row[j] * one[j]
                a1 += row[j] * two[j]
                a2 += row[j] * three[j]
                a3 += row[j] * four[j]
                b0 += other[j] * one[j]
                b1 += other[j] * two[j]
                b2 += other[j] * three[j]
                b3 += other[j] * four[j]
            for n, (first, second) in enumerate(((a0, b0), (a1, b1), (a2, b2), (a3, b3))):
                y[b + n, i] = first + bias[i] + (y[b + n, i] if add else zero)
                y[b + n, i + 1] = second + bias[i + 1] + (y[b + n, i + 1] if add else zero)
    for b in range(len(x)):
        row = x[b]
        for i in range(pairs if b < fours else 0, len(weight)):
            total = zero
            for j in range(inputs):
                total += weight[i, j] * row[j]
            y[b, i] = total + bias[i] + (y[b, i] if add else zero)


@cpu_kernel
def norm(x, of, y, spare):
    """y = norm(x), [N D] both; scratch memory for 2 N numbers."""
    count = len(x)
    shifts, scales = spare[:count], spare[count : 2 * count]
    if of.centered:
        layer_norm_rows(x, of.weight, of.bias, of.eps, y, shifts, scales)
    else:
        rms_norm_rows(x, of.weight, of.eps, y, scales)


@cpu_kernel
def activate(x, activation, y, spare):
    """y = f(x), the feed-forward network's function."""
    if activation == GELU:
        gelu_row(x, y, spare)
    elif activation == GELU_TANH:
        gelu_tanh_row(x, y, spare)
    elif activation == RELU:
        relu_row(x, y)
    elif activation == RELU_SQUARED:
        relu_squared_row(x, y)
    else:
        for i in range(x.size):
            y[i] = swish(x.dtype.type(1), x[i])


@cpu_kernel
def feed_forward(x, position, weights, state, memory):
    """x += W₂ f(W₁ h), or W₂ (f(W₁ h) · W₃ h), with h = norm(x)."""
    (count, width), hidden = x.shape, len(weights.up.weight)
    h, at = rows(memory, 0, count, width)
    wide, at = rows(memory, at, count, hidden)
    activated, at = rows(memory, at, count, hidden)
    norm(x, weights.norm, h, memory[at:])
    linear(weights.up, h, wide, False)
    activate(wide.reshape(-1), weights.activation, activated.reshape(-1), memory[at:])
    if len(weights.gate.weight):
        linear(weights.gate, h, wide, False)
        for b in range(count):
            for i in range(hidden):
                activated[b, i] *= wide[b, i]
    linear(weights.down, activated, x, True)


@cpu_kernel
def head(x, weights, logits, memory):
    h, at = rows(memory, 0, x.shape[0], x.shape[1])
    norm(x, weights.norm, h, memory[at:])
    linear(weights.linear, h, logits, False)


# -- wiring ------------------------------------------------------------------------------------------------------------
def linear_of(module: nn.Module) -> Linear:
    """A layer's weights; zeros for a bias that is not there."""
    weight, bias = module.weight.data, getattr(module, "bias", None)
    return Linear(weight, np.zeros(len(weight), weight.dtype) if bias is None else bias.data)


def norm_of(module: nn.Module) -> Norm:
    return Norm(*linear_of(module), module.eps, isinstance(module, nn.LayerNorm))


def activation_of(module: nn.Module) -> int:
    return globals()[module.activation.name.upper()]


class Half:
    """Half of a block for one token after the other: ``half(x, position)`` adds f(norm(x)) to x[B D], of ``batch`` sequences.

    It is made of the weights as they are. A subclass says which module it computes, and has the kernel that does it. The module
    may also be a whole block of a kind of its own, which has no norm before it and makes x anew.
    """

    module: ClassVar[type]
    kernel: ClassVar[Callable]

    def __init__(self, norm: nn.Module | None, module: Any, model: LanguageModel, batch: int = 1):
        like = (norm or model.embed).weight
        self.width, self.dtype, self.batch = like.shape[-1], like.dtype, batch
        self.weights, self.state = self.wire(norm and norm_of(norm), module, model)
        memory = batch * (self.memory(module, model) + 2)  # 2 for ``norm``
        self._arguments = self.weights, self.state, np.empty(memory, self.dtype)
        self._compute = self.kernel.version(np.empty((batch, self.width), self.dtype), 0, *self._arguments)

    @classmethod
    def computes(cls, module: Any) -> bool:
        """Whether it computes this module, with its options."""
        return type(module) is cls.module

    def wire(self, norm: Norm | None, module: Any, model: LanguageModel) -> tuple[NamedTuple, NamedTuple | None]:
        """The kernel's weights and its state."""
        raise NotImplementedError

    def memory(self, module: Any, model: LanguageModel) -> int:
        """How many numbers of scratch memory the kernel takes for a sequence."""
        raise NotImplementedError

    def load(self, state: Any, position: int, rows: slice = slice(None)) -> None:
        """Some sequences go on from the module's state of each of them, or of one for all, after ``position`` tokens."""

    def __call__(self, x: np.ndarray, position: int) -> None:
        self._compute(x, position, *self._arguments)

    def none(self) -> Linear:
        """Stands for a linear layer that is not there."""
        return Linear(np.empty((0, self.width), self.dtype), np.empty(0, self.dtype))


class FeedForward(Half):
    module = blocks.FeedForward
    kernel = staticmethod(feed_forward)

    def wire(self, norm, module, model):
        gate = getattr(module, "gate", None)
        return FeedForwardWeights(norm, linear_of(module.up), self.none() if gate is None else linear_of(gate),
                                  linear_of(module.down), activation_of(module)), None

    def memory(self, module, model):
        return self.width + 3 * len(module.up.weight)


class Head:
    """The logits [B V] of x[B D], valid until the next call."""

    def __init__(self, model: LanguageModel, batch: int):
        weights = HeadWeights(norm_of(model.norm), linear_of(model.head))
        (vocab, width), dtype = weights.linear.weight.shape, weights.linear.weight.dtype
        self._logits = np.empty((batch, vocab), dtype)
        self._arguments = weights, self._logits, np.empty(batch * (width + 2), dtype)
        self._compute = head.version(np.empty((batch, width), dtype), *self._arguments)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self._compute(x, *self._arguments)
        return self._logits
