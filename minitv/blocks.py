"""Blocks: how a mixer and a feed-forward network are stacked."""

from __future__ import annotations

import math

import numpy as np

from autograd import Tensor
from autograd.random import Random

from .nn import ACTIVATIONS, NORMS, Dropout, Linear, Module
from .options import ModelOptions


class FeedForward(Module):
    """y = f(x W₁ᵀ + b) W₂ᵀ + b at every position, hidden size ``ffn_multiple`` widths; it has no state."""

    def __init__(self, rng: Random, model: ModelOptions, options=None, layer: int = 0, dtype=np.float32):
        hidden = model.ffn_multiple * model.width
        std = model.init_std
        self.up = Linear(rng.split(0), model.width, hidden, std=std, bias=model.bias, dtype=dtype)
        self.down = Linear(rng.split(1), hidden, model.width, std=std / math.sqrt(2 * model.layers), bias=model.bias,
                           dtype=dtype)
        self.activation = ACTIVATIONS[model.activation]
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))), rng)

    def init_state(self, batch: int) -> None:
        return None

    def prefill(self, x: Tensor, state: None) -> tuple[Tensor, None]:
        return self(x), None

    step = prefill


class PreNorm(Module):
    """x ← x + mixer(norm(x)); x ← x + ffn(norm(x)): GPT-2's block (Xiong et al. 2020, arXiv 2002.04745).

    Its state is that of the mixer and that of the feed-forward network.
    """

    def __init__(self, model: ModelOptions, mixer: Module, ffn: Module, dtype=np.float32):
        norm = NORMS[model.norm]
        self.norm1 = norm(model.width, bias=model.bias, dtype=dtype)
        self.mixer = mixer
        self.norm2 = norm(model.width, bias=model.bias, dtype=dtype)
        self.ffn = ffn

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        x = x + self.mixer(self.norm1(x), rng and rng.split(0))
        return x + self.ffn(self.norm2(x), rng and rng.split(1))

    def init_state(self, batch: int):
        return self.mixer.init_state(batch), self.ffn.init_state(batch)

    def prefill(self, x: Tensor, state):
        y, mixed = self.mixer.prefill(self.norm1(x), state[0])
        x = x + y
        y, fed = self.ffn.prefill(self.norm2(x), state[1])
        return x + y, (mixed, fed)

    def step(self, x: Tensor, state):
        y, mixed = self.mixer.step(self.norm1(x), state[0])
        x = x + y
        y, fed = self.ffn.step(self.norm2(x), state[1])
        return x + y, (mixed, fed)
