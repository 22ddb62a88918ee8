"""Stacks: the layers of a model, what they have in common, and how x passes through them.

    Stack         x ← block(x) for every layer
    Reversible    x₁, x₂ ← x;  x₁, x₂ ← x₂, x₁ + branch(x₂) for every branch of every block;  (x₁ + x₂) / 2

The second one trains in the memory of one layer, see autograd/reversible.py; it computes every branch twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from autograd import Tensor
from autograd.random import Random
from autograd.reversible import reversible

from .blocks import Block
from .errors import UserError
from .nn import Module, Stateful
from .options import ModelOptions
from .shift import Shifted

CHANNELS, MIXERS = 2, 3  # the streams of a model's randomness that weights of layers are drawn from


class Stack(Module):
    """x[B T D] -> y[B T D]: the blocks of all layers, one after the other.

    Layer i has the mixer ``variant.mixer.of_layer(options, i)`` and so a mixer of channels, or none. One whose class says
    ``shared`` is a single object for all layers: counted, saved and optimised once, with the sum of its gradients. Others may
    share a part of themselves, see nn.Stateful.join.
    """

    def __init__(self, rng: Random, variant: Any, model: ModelOptions, options: Any, dtype: Any = np.float32):
        firsts: dict[Any, Stateful] = {}

        def make(kind: type[Stateful] | None, stream: int, layer: int, copy: int = 0) -> Stateful | None:
            kind = kind and kind.of_layer(options, layer)
            if kind is None:
                return None
            if kind.shared and (kind, copy) in firsts:
                return firsts[kind, copy]
            module = kind(rng.split(stream, copy * model.layers + layer), model, options, layer, dtype)
            module.join(firsts.setdefault((kind, copy), module))
            return module

        self.blocks: list[Block] = []
        for layer in range(model.layers):
            mixer = make(variant.mixer, MIXERS, layer)
            check_positions(variant.name, model, mixer)
            if model.token_shift:
                if not variant.causal:
                    raise UserError(f"--token-shift: {variant.name} sees both sides of a position, the shift is for those that "
                                    "see the past alone")
                mixer = Shifted(mixer, model.width, dtype)
            channels = [make(variant.channel, CHANNELS, layer, copy) for copy in range(variant.block.channels)]
            self.blocks.append(variant.block(model, mixer, *channels, dtype=dtype))

    def members(self) -> Iterator[tuple[str, Any]]:
        """The blocks by their numbers."""
        return ((str(i), block) for i, block in enumerate(self.blocks))

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __getitem__(self, layer: int) -> Block:
        return self.blocks[layer]

    @property
    def bounded(self) -> bool:
        """Whether a mixer in it reads no further than the context."""
        return any(module.bounded for module in self.modules() if isinstance(module, Stateful))

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, rng and rng.split(layer))
        return x

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state of every block before the first position."""
        return tuple(block.init_state(batch) for block in self.blocks)

    def prefill(self, x: Tensor, state: tuple, last: bool = False) -> tuple[Tensor, tuple]:
        """The call on a segment that continues ``state``, or of it the last position alone; and the state after it."""
        after = []
        for left, block, past in zip(range(len(self.blocks))[::-1], self.blocks, state, strict=True):
            x, past = block.prefill(x, past, last=True) if last and not left and block.branches else block.prefill(x, past)
            after.append(past)
        return x[:, -1:] if last else x, tuple(after)


class Reversible(Stack):
    """The same blocks as a reversible chain of two streams, which begin as x and end as their mean.

    A block must be a sum, x + branch(x): UserError. Dropout is drawn again, by the same Random. In float32 a layer's input is
    computed again with an error of about 1e-6.
    """

    def __init__(self, rng: Random, variant: Any, model: ModelOptions, options: Any, dtype: Any = np.float32):
        super().__init__(rng, variant, model, options, dtype)
        if not all(block.branches for block in self.blocks):
            raise UserError(f"--stack reversible: the blocks of {variant.name} {variant.block.lossy}, so that x cannot be "
                            "computed from what they give; allowed: residual")

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        steps = [(partial(branch, rng=rng and rng.split(layer)), branch.parameters())
                 for layer, block in enumerate(self.blocks) for branch in block.branches]
        return self.joined(*reversible(steps, x, x))

    def prefill(self, x: Tensor, state: tuple, last: bool = False) -> tuple[Tensor, tuple]:
        one, two, after = x, x, []
        for block, past in zip(self.blocks, state, strict=True):
            states: tuple = ()
            for branch in block.branches:
                y, now = branch.prefill(two, past)
                one, two, states = two, one + y, states + now
            after.append(states)
        x = self.joined(one, two)
        return x[:, -1:] if last else x, tuple(after)

    def joined(self, one: Tensor, two: Tensor) -> Tensor:
        """What becomes of the two streams after the last block: their mean."""
        return (one + two) * 0.5


STACKS: dict[str, type[Stack]] = {"residual": Stack, "reversible": Reversible}


def check_positions(name: str, model: ModelOptions, mixer: Stateful) -> None:
    """UserError if the mixer of a variant of this name does not know the model's kind of positions."""
    for positions, does, reason in (("rope", "turn queries and keys", mixer.without_rope),
                                    ("alibi", "add distances to scores", mixer.without_alibi)):
        if model.positions == positions and reason:
            rope = "" if mixer.without_rope else ", rope"
            raise UserError(f"--positions {positions}: {name} cannot {does}, because {reason}; allowed: learned, "
                            f"sinusoidal{rope}, none")


def cycle(flag: str, pattern: str, kinds: Mapping[str, type[Stateful]], layer: int) -> type[Stateful]:
    """The class of a layer in a pattern such as "local,local,lsh", which is repeated over all layers.

    ``flag`` is the option that the pattern was given by, for the error about a name that is none of ``kinds``.
    """
    names = [name.strip() for name in pattern.split(",")]
    if unknown := [name for name in names if name not in kinds]:
        raise UserError(f"{flag}: {unknown[0]!r} is unknown, allowed: names separated by commas, each of {', '.join(kinds)}")
    return kinds[names[layer % len(names)]]
