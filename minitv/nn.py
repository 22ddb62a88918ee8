"""Building blocks with parameters: Module, Parameter, Linear, Embedding, norms and Dropout.

A module has no training flag: randomness is an argument. ``module(x, rng)`` drops values, ``module(x)`` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np

from autograd import (
    Tensor,
    dropout,
    embedding,
    gelu,
    gelu_tanh,
    layer_norm,
    linear,
    relu_squared,
    reshape,
    rms_norm,
    silu,
    to_numpy,
)
from autograd.device import move, namespace
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


def uniform(rng: Random, shape: tuple[int, ...], bound: float, dtype) -> Parameter:
    """A parameter drawn from [-bound, bound)."""
    return Parameter(((2 * rng.uniform(shape, np.float64) - 1) * bound).astype(dtype))


class Stateful(Module):
    """A module that can read a sequence in parts: ``prefill(x[B T D], state)`` gives y[B T D] and the state after it."""

    bounded: ClassVar[bool] = False  # whether sequences end at the model's context

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position: x[B D], state -> y[B D], the state after it."""
        y, state = self.prefill(reshape(x, (x.shape[0], 1, x.shape[1])), state)
        return reshape(y, x.shape), state

    def constant(self, value: float, *shape: int) -> Tensor:
        """An array for a state, of the parameters' dtype and where they lie."""
        data = self.parameters()[0].data
        return Tensor(namespace(data).full(shape, value, data.dtype))


class Linear(Module):
    """y = x Wᵀ + b with W[out, in] from N(0, std²), or uniform up to ``bound`` if that is given, and b = 0."""

    def __init__(self, rng: Random, inputs: int, outputs: int, *, std: float = 0.0, bound: float | None = None,
                 bias: bool = True, dtype=np.float32):
        shape = outputs, inputs
        self.weight = normal(rng, shape, std, dtype) if bound is None else uniform(rng, shape, bound, dtype)
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
