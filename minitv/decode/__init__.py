"""Decoder: a model that reads token after token. A step of a whole Transformer is one kernel call.

A token needs each weight once, in 17 small products for 4 layers: a step through the operators spends ten times as long in
Python as it does on arithmetic. The model's own ``step`` defines what the kernel computes; every other variant takes that.
"""

from __future__ import annotations

import numpy as np

from autograd import no_grad, to_numpy
from autograd.device import is_cupy
from autograd.errors import DomainError, ShapeError

from ..blocks import FeedForward, PreNorm
from ..mixers import transformer
from ..models.lm import LanguageModel
from ..nn import LayerNorm, Module
from . import cpu

FEW = 16  # tokens that are read faster one by one: a call of the model costs as much as 20 steps of nanogpt-cpu


class Decoder:
    """Reads tokens of one sequence: ``prefill(ids)`` starts over with the given ones, ``step(id)`` adds one.

    Both return the logits [V] of the token that comes next, valid until the next call.
    """

    def __init__(self, model: LanguageModel):
        self.model, self._state = model, model.init_state(1)

    @property
    def position(self) -> int:
        """How many tokens have been read."""
        return self._state.position

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        with no_grad():
            logits, self._state = self.model.prefill(np.asarray(ids, np.intp)[None], self.model.init_state(1))
        return to_numpy(logits.data[0, -1])

    def step(self, token: int) -> np.ndarray:
        with no_grad():
            logits, self._state = self.model.step(np.array([token], np.intp), self._state)
        return to_numpy(logits.data[0])


class TransformerDecoder(Decoder):
    """A Decoder whose step is one kernel call. It is made of the weights as they are: after a change, make a new one."""

    def __init__(self, model: LanguageModel):
        super().__init__(model)
        block = model.blocks[0]
        parts = [[array for module in (b.norm1, b.mixer.qkv, b.mixer.out, b.norm2, b.ffn.up, b.ffn.down)
                  for array in _affine(module)] for b in model.blocks]
        layers = np.empty((len(parts), sum(map(np.size, parts[0]))), model.embed.weight.dtype)
        for row, arrays in zip(layers, parts, strict=True):
            np.concatenate(arrays, out=row)
        size = model.embed.weight.shape[1] // block.mixer.heads
        shape, dtype = (len(model.blocks), block.mixer.heads), model.embed.weight.dtype
        self._keys = np.zeros((*shape, size, model.context), dtype)
        self._values = np.zeros((*shape, model.context, size), dtype)
        self._logits = np.empty(model.head.weight.shape[0], dtype)
        self._given = (
            model.embed.weight.data, model.positions.data, layers, np.concatenate(_affine(model.norm)),
            np.concatenate(_affine(model.head)), model.norm.eps,
            isinstance(model.norm, LayerNorm), getattr(cpu, block.ffn.activation.name.upper()), self._keys, self._values,
            block.ffn.up.weight.shape[0], self._logits)
        self._position = 0

    @staticmethod
    def reads(model: LanguageModel) -> bool:
        """Whether the model is made of what the kernel knows."""
        known = {(PreNorm, transformer.Mixer, FeedForward)}
        return {(type(b), type(b.mixer), type(b.ffn)) for b in model.blocks} == known and not is_cupy(model.embed.weight.data)

    @property
    def position(self) -> int:
        return self._position

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) <= FEW:
            self._position = 0
            for token in ids:
                logits = self.step(token)
            return logits
        logits = super().prefill(ids)
        for layer, (cache, _) in enumerate(self._state.blocks):
            self._keys[layer, :, :, : len(ids)] = cache.keys.data[0].swapaxes(1, 2)
            self._values[layer, :, : len(ids)] = cache.values.data[0]
        self._position = len(ids)
        return logits

    def step(self, token: int) -> np.ndarray:
        if self._position >= self.model.context:
            raise ShapeError(f"the model has {self.model.context} positions; {self._position} + 1 tokens do not fit")
        if not 0 <= token < len(self._logits):
            raise DomainError(f"the model knows the tokens 0 .. {len(self._logits) - 1}, got {token}")
        cpu.step(token, self._position, *self._given)
        self._position += 1
        return self._logits


def _affine(module: Module) -> list[np.ndarray]:
    """The weight and the bias of a linear layer or norm, flat; zeros for a bias that is not there."""
    weight, bias = module.weight.data, getattr(module, "bias", None)
    return [weight.ravel(), np.zeros(len(weight), weight.dtype) if bias is None else bias.data]


def decoder(model: LanguageModel) -> Decoder:
    """The fastest Decoder of a model."""
    return TransformerDecoder(model) if TransformerDecoder.reads(model) else Decoder(model)
