"""Blocks: how a mixer of positions and a mixer of channels are joined.

A block is ``Block(model, mixer, *channels, dtype)`` with ``channels`` mixers of channels, each None where the layer has none.
It has the protocol of what it joins, see nn.Stateful; its state is the tuple of their states.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor
from autograd.random import Random

from .nn import ACTIVATIONS, Dropout, Linear, Module, Parameter, Stateful, norm_of
from .options import ModelOptions


class FeedForward(Stateful):
    """y = f(x W₁ᵀ + b) W₂ᵀ + b at every position, hidden size ``ffn_multiple`` widths; it has no state.

    With ``ffn_gate`` y = (f(x W₁ᵀ + b) ∘ (x W₃ᵀ + b)) W₂ᵀ + b (Shazeer 2020, arXiv 2002.05202), with f = silu LLaMA's SwiGLU.
    """

    pointwise = True
    gate: Linear | None = None

    def __init__(self, rng: Random, model: ModelOptions, options=None, layer: int = 0, dtype=np.float32):
        hidden = max(1, round(self.multiple(model, options) * model.width))
        self.up = Linear(rng.split(0), model.width, hidden, std=model.init_std, bias=model.bias, dtype=dtype)
        self.down = Linear(rng.split(1), hidden, model.width, std=model.output_std, bias=model.bias, dtype=dtype)
        if model.ffn_gate:
            self.gate = Linear(rng.split(2), model.width, hidden, std=model.init_std, bias=model.bias, dtype=dtype)
        self._finish(model)

    def _finish(self, model: ModelOptions) -> None:
        """What does not depend on the hidden size."""
        self.activation = ACTIVATIONS[model.activation]
        self.dropout = Dropout(model.dropout)

    def multiple(self, model: ModelOptions, options: Any) -> float:
        """The hidden size in widths."""
        return model.ffn_multiple

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self.down(self.hidden(x)), rng)

    def hidden(self, x: Tensor) -> Tensor:
        """What W₂ multiplies, [B T F]."""
        y = self.activation(self.up(x))
        return y if self.gate is None else y * self.gate(x)

    def init_state(self, batch: int) -> None:
        return None

    def prefill(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        return self(x), None


class Branch(NamedTuple):
    """What a block adds to x: scale · Σ module(norm(x)). Module i takes stream ``first`` + i of the block's randomness."""

    norm: Module
    modules: tuple[Stateful, ...]
    first: int
    scale: float = 1.0

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        x = self.norm(x)
        return self._sum([module(x, rng and rng.split(self.first + i)) for i, module in enumerate(self.modules)])

    def prefill(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        """The same of a segment that continues the block's state, and the new states of the branch's own modules."""
        x = self.norm(x)
        read = [module.prefill(x, past) for module, past in zip(self.modules, state[self.first :], strict=False)]
        return self._sum([y for y, _ in read]), tuple(past for _, past in read)

    def parameters(self) -> list[Parameter]:
        """Every distinct parameter once."""
        return list({id(p): p for module in (self.norm, *self.modules) for p in module.parameters()}.values())

    def _sum(self, parts: list[Tensor]) -> Tensor:
        y = parts[0]
        for part in parts[1:]:
            y = y + part
        return y if self.scale == 1 else y * self.scale


class Block(Module):
    """x ← x + branch(x) for each branch, one after the other.

    A block of another kind has no branches, and overrides the three functions below.
    """

    channels: ClassVar[int] = 1  # how many mixers of channels it joins
    normed: ClassVar[bool] = False  # whether its output is normalised, so that the model needs no norm before its head
    lossy: ClassVar[str] = "normalise the sum of x and what they add to it"  # what hides x, in one without branches

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ()

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        for branch in self.branches:
            x = x + branch(x, rng)
        return x

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first position."""
        return tuple(module.init_state(batch) for branch in self.branches for module in branch.modules)

    def prefill(self, x: Tensor, state: tuple, last: bool = False) -> tuple[Tensor, tuple]:
        """The call on a segment that continues ``state``, or of it the last position alone; and the state after it.

        A block of another kind gives the whole.
        """
        after: tuple = ()
        for number, branch in enumerate(self.branches, 1):
            if last and number == len(self.branches) and all(module.pointwise for module in branch.modules):
                x = x[:, -1:]  # [B 1 D]
            y, states = branch.prefill(x, state)
            x, after = x + y, after + states
        return x[:, -1:] if last else x, after


class PreNorm(Block):
    """x ← x + mixer(norm(x)); x ← x + ffn(norm(x)): GPT-2's block (Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: Stateful | None = None, *, dtype=np.float32):
        self.norm1 = _norm(model, dtype)
        self.mixer = mixer
        self.norm2 = _norm(model, dtype) if ffn else None
        self.ffn = ffn

    @property
    def branches(self) -> tuple[Branch, ...]:
        mixing = Branch(self.norm1, (self.mixer,), 0)
        return (mixing, Branch(self.norm2, (self.ffn,), 1)) if self.ffn else (mixing,)


class Parallel(Block):
    """x ← x + mixer(norm(x)) + ffn(norm(x)), with one norm for both: GPT-J's block (Wang and Komatsuzaki 2021)."""

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: Stateful | None = None, *, dtype=np.float32):
        self.norm1 = _norm(model, dtype)
        self.mixer, self.ffn = mixer, ffn

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (Branch(self.norm1, (self.mixer, self.ffn) if self.ffn else (self.mixer,), 0),)


class Macaron(Block):
    """x ← x + ½ ffn(norm(x)); x ← x + mixer(norm(x)); x ← x + ½ ffn₂(norm(x)) (Lu et al. 2019, arXiv 1906.02762)."""

    channels = 2

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: Stateful, ffn2: Stateful, *, dtype=np.float32):
        self.norm1, self.ffn = _norm(model, dtype), ffn
        self.norm2, self.mixer = _norm(model, dtype), mixer
        self.norm3, self.ffn2 = _norm(model, dtype), ffn2

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (Branch(self.norm1, (self.ffn,), 0, 0.5), Branch(self.norm2, (self.mixer,), 1),
                Branch(self.norm3, (self.ffn2,), 2, 0.5))


class PostNorm(Block):
    """x ← norm(x + mixer(x)); x ← norm(x + ffn(x)): the first Transformer's block (Vaswani et al. 2017, arXiv 1706.03762)."""

    normed = True

    def __init__(self, model: ModelOptions, mixer: Stateful, ffn: Stateful | None = None, *, dtype=np.float32):
        self.mixer = mixer
        self.norm1 = _norm(model, dtype)
        self.ffn = ffn
        self.norm2 = _norm(model, dtype) if ffn else None

    @property
    def _halves(self) -> tuple[tuple[Stateful, Module], ...]:
        return ((self.mixer, self.norm1), (self.ffn, self.norm2)) if self.ffn else ((self.mixer, self.norm1),)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        for i, (module, norm) in enumerate(self._halves):
            x = norm(x + module(x, rng and rng.split(i)))
        return x

    def init_state(self, batch: int) -> tuple[Any, ...]:
        return tuple(module.init_state(batch) for module, _ in self._halves)

    def prefill(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        after = []
        for (module, norm), past in zip(self._halves, state, strict=True):
            y, past = module.prefill(x, past)
            x = norm(x + y)
            after.append(past)
        return x, tuple(after)


def _norm(model: ModelOptions, dtype) -> Module:
    return norm_of(model, model.width, dtype)
