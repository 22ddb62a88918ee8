"""What every step of a decoder has: halves of blocks, x ← x + f(norm(x)) for one token, each of one kernel call.

A half of the class ``Half`` holds the weights and the state of its module. Here are its parts, the feed-forward network, and
the head; mixers have a file of their own, cpu_<variant>.py.
"""

from __future__ import annotations

import numpy as np

from autograd.kernel_math import exp
from autograd.kernels import cpu_kernel
from autograd.ops.gelu.cpu import _gelu, _gelu_tanh
from autograd.ops.layer_norm.cpu import _forward as _layer_norm
from autograd.ops.rms_norm.cpu import _forward as _rms_norm

from ..models.lm import LanguageModel
from ..nn import LayerNorm, Module

GELU, GELU_TANH, RELU_SQUARED, SILU = range(4)


@cpu_kernel
def take(memory, at, size):
    """The next ``size`` numbers of the scratch memory, and where they end."""
    return memory[at : at + size], at + size


@cpu_kernel
def linear(weight, bias, x, y, add):
    """y = W x + b, added to y if ``add``."""
    zero = x.dtype.type(0)
    for i in range(weight.shape[0]):
        total = zero
        for j in range(weight.shape[1]):
            total += weight[i, j] * x[j]
        y[i] = total + bias[i] + (y[i] if add else zero)


@cpu_kernel
def norm(x, affine, eps, centered, y, spare):
    """y = norm(x), by layer_norm or rms_norm; ``affine`` [2, width] are weight and bias."""
    width = x.size
    row, out, means, scales = x.reshape(1, width), y.reshape(1, width), spare[:1], spare[1:2]
    if centered:
        _layer_norm(row, affine[0], affine[1], eps, out, means, scales)
    else:
        _rms_norm(row, affine[0], eps, out, scales)


@cpu_kernel
def activate(x, activation, y, spare):
    """y = f(x), the feed-forward network's function."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    if activation == GELU:
        _gelu(x, y, spare)
    elif activation == GELU_TANH:
        _gelu_tanh(x, y, spare)
    elif activation == RELU_SQUARED:
        for i in range(x.size):
            y[i] = x[i] * x[i] if x[i] > 0 or x[i] != x[i] else zero
    else:
        for i in range(x.size):
            y[i] = x[i] / (one + exp(-x[i]))


@cpu_kernel
def _feed_forward(x, affine, eps, centered, up, up_bias, gate, gate_bias, down, down_bias, activation, memory):
    """x += W₂ f(W₁ h), or W₂ (f(W₁ h) · W₃ h), with h = norm(x); a gate W₃ without rows is no gate."""
    h, at = take(memory, 0, x.size)
    wide, at = take(memory, at, len(up))
    activated, at = take(memory, at, len(up))
    norm(x, affine, eps, centered, h, memory[at:])
    linear(up, up_bias, h, wide, False)
    activate(wide, activation, activated, memory[at:])
    if len(gate):
        linear(gate, gate_bias, h, wide, False)
        for i in range(wide.size):
            activated[i] *= wide[i]
    linear(down, down_bias, activated, x, True)


@cpu_kernel
def _head(x, affine, eps, centered, weight, bias, logits, memory):
    h, at = take(memory, 0, x.size)
    norm(x, affine, eps, centered, h, memory[at:])
    linear(weight, bias, h, logits, False)


def affine(module: Module) -> tuple[np.ndarray, np.ndarray]:
    """The weight and the bias of a linear layer or norm; zeros for a bias that is not there."""
    weight, bias = module.weight.data, getattr(module, "bias", None)
    return weight, np.zeros(len(weight), weight.dtype) if bias is None else bias.data


def normed(module: Module) -> tuple[np.ndarray, float, bool]:
    """What ``norm`` has to know of a norm."""
    return np.stack(affine(module)), module.eps, isinstance(module, LayerNorm)


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
        _feed_forward(x, *self._given)


def activation(module: Module) -> int:
    """What ``activate`` has to know of a feed-forward network."""
    return {"gelu": GELU, "gelu_tanh": GELU_TANH, "relu_squared": RELU_SQUARED, "silu": SILU}[module.activation.name]


class Head:
    """The logits [V] of x[D], valid until the next call."""

    def __init__(self, model: LanguageModel):
        self._logits = np.empty(len(model.head.weight), model.head.weight.dtype)
        self._given = (*normed(model.norm), *affine(model.head), self._logits,
                       np.empty(model.head.weight.shape[1] + 2, self._logits.dtype))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        _head(x, *self._given)
        return self._logits
