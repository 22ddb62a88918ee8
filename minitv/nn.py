"""Building blocks with parameters: Module, Parameter, Linear, Embedding, norms and Dropout.

A module has no training flag: randomness is an argument. ``module(x, rng)`` drops values, ``module(x)`` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from autograd import Tensor, dropout, embedding, gelu, gelu_tanh, layer_norm, linear, relu_squared, rms_norm, silu, to_numpy
from autograd.device import move
from autograd.errors import ShapeError
from autograd.random import Random

M = TypeVar("M", bound="Module")

ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu_squared": relu_squared, "silu": silu}


class Parameter(Tensor):
    """A leaf tensor that an optimiser updates."""

    __slots__ = ()

    def __init__(self, data, *, dtype=None):
        super().__init__(data, dtype=dtype, requires_grad=True)


class Module:
    """A part of a network: its parameters and modules are its attributes (lists of modules included)."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every distinct parameter once, with its dotted name, in the order of declaration; tied ones come once."""
        seen: set[int] = set()
        for name, parameter in self._walk(prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _walk(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value._walk(f"{prefix}{name}.")
            elif isinstance(value, list | tuple):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield from item._walk(f"{prefix}{name}.{i}.")

    def parameters(self) -> list[Parameter]:
        """Every distinct parameter once."""
        return [p for _, p in self.named_parameters()]

    def state(self) -> dict[str, np.ndarray]:
        """Copies of all parameters by name, as NumPy arrays."""
        return {name: np.array(to_numpy(p.data)) for name, p in self.named_parameters()}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Overwrite all parameters in place; names and shapes must match exactly (ShapeError lists what does not)."""
        own = dict(self.named_parameters())
        wrong = [f"{n} is missing" for n in own if n not in arrays]
        wrong += [f"{n} is unknown" for n in arrays if n not in own]
        wrong += [f"{n} has shape {arrays[n].shape}, expected {p.shape}" for n, p in own.items()
                  if n in arrays and arrays[n].shape != p.shape]
        if wrong:
            raise ShapeError("load: " + "; ".join(wrong))
        for name, parameter in own.items():
            parameter.assign_(arrays[name].astype(parameter.dtype, copy=False))

    def to(self: M, device: str) -> M:
        """Move all parameters to "cpu", "cuda" (the current card) or "cuda:1", forget their gradients, and return the module.

        An optimiser made before holds on to the old ones.
        """
        for parameter in self.parameters():
            parameter.data, parameter.grad = move(parameter.data, device), None
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None


def normal(rng: Random, shape: tuple[int, ...], std: float, dtype) -> Parameter:
    """A parameter drawn from N(0, std²)."""
    return Parameter((rng.normal(shape, np.float64) * std).astype(dtype))


class Linear(Module):
    """y = x Wᵀ + b with W[out, in] from N(0, std²) and b = 0."""

    def __init__(self, rng: Random, inputs: int, outputs: int, *, std: float, bias: bool = True, dtype=np.float32):
        self.weight = normal(rng, (outputs, inputs), std, dtype)
        self.bias = Parameter(np.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(Module):
    """Rows of a table W[vocab, width] from N(0, std²) by integer ids."""

    def __init__(self, rng: Random, vocab: int, width: int, *, std: float, dtype=np.float32):
        self.weight = normal(rng, (vocab, width), std, dtype)

    def __call__(self, ids: np.ndarray) -> Tensor:
        return embedding(self.weight, ids)


class LayerNorm(Module):
    """Rows to mean 0 and variance 1, times a gain that starts at 1, plus an offset that starts at 0."""

    def __init__(self, width: int, *, bias: bool = True, eps: float = 1e-5, dtype=np.float32):
        self.weight = Parameter(np.ones(width, dtype))
        self.bias = Parameter(np.zeros(width, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(Module):
    """Rows divided by their root mean square, times a gain that starts at 1."""

    def __init__(self, width: int, *, bias: bool = False, eps: float = 1e-5, dtype=np.float32):
        self.weight = Parameter(np.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


NORMS: dict[str, type[Module]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class Dropout(Module):
    """Values dropped with probability p when a random source is given, else the identity."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return x if rng is None or not self.p else dropout(x, p=self.p, seed=rng.seed)
