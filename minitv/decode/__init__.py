"""Decoder: a model that reads token after token, in two kernel calls a layer.

A token needs each weight once, in a few small products: a step through the operators spends ten times as long in Python as
it does on arithmetic. The model's own ``prefill`` defines what the kernels compute, and takes their place where there are none.
"""

from __future__ import annotations

import numpy as np

from autograd import no_grad, to_numpy
from autograd.cpu.compile import unavailable
from autograd.device import is_cupy
from autograd.errors import DomainError, ShapeError

from ..blocks import PreNorm
from ..models.lm import LanguageModel
from ..stack import Stack
from . import cpu
from .halves import HALVES, Head, normed

FEW = 16  # tokens that are read faster one by one: a call of the model costs as much as 20 steps of nanogpt-cpu


class Decoder:
    """Reads tokens of one sequence: ``prefill(ids)`` starts over with the given ones, ``step(id)`` adds one.

    Both return the logits [V] of the token that comes next, valid until the next call. It is made of the weights as they are:
    after a change, make a new one.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        with no_grad():
            self._start = self._state = model.init_state(1)

    @property
    def position(self) -> int:
        """How many tokens have been read."""
        return self._state.position

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        with no_grad():
            logits, self._state = self.model.prefill(np.asarray(ids, np.intp)[None], self._start)
        return to_numpy(logits.data[0, -1])

    def step(self, token: int) -> np.ndarray:
        with no_grad():
            logits, self._state = self.model.prefill(np.array([[token]], np.intp), self._state)
        return to_numpy(logits.data[0, 0])


class FusedDecoder(Decoder):
    """A Decoder whose steps are kernel calls."""

    def __init__(self, model: LanguageModel):
        super().__init__(model)
        self._blocks = [[HALVES[type(module)](norm, module, model) for norm, module in ((b.norm1, b.mixer), (b.norm2, b.ffn))]
                        for b in model.blocks]
        self._halves = [half for block in self._blocks for half in block]
        self._embedding, self._head, self._position = model.embed.weight.data, Head(model), 0
        self._embed_norm = None if model.embed_norm is None else normed(model.embed_norm)
        self._x, self._spare = (np.empty(size, self._embedding.dtype) for size in (self._embedding.shape[1], 2))

    @staticmethod
    def reads(model: LanguageModel) -> bool:
        """Whether the model is made of what kernels know, and they can be compiled."""
        return (type(model.blocks) is Stack and model.encoding in ("learned", "none")
                and all(type(b) is PreNorm and type(b.mixer) in HALVES and type(b.ffn) in HALVES for b in model.blocks)
                and not is_cupy(model.embed.weight.data) and not unavailable())

    @property
    def position(self) -> int:
        return self._position

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        few = len(ids) <= FEW
        if few:
            self._state, self._position = self._start, 0
        else:
            logits, self._position = super().prefill(ids), len(ids)
        for halves, states in zip(self._blocks, self._state.blocks, strict=True):
            for half, state in zip(halves, states, strict=True):
                half.load(state)
        if few:
            for token in ids:
                logits = self.step(token)
        return logits

    def step(self, token: int) -> np.ndarray:
        model, position, x = self.model, self._position, self._x
        if model.bounded and position >= model.context:
            raise ShapeError(f"the model has {model.context} positions; {position} + 1 tokens do not fit")
        if not 0 <= token < len(self._embedding):
            raise DomainError(f"the model knows the tokens 0 .. {len(self._embedding) - 1}, got {token}")
        x[:] = self._embedding[token]
        if self._embed_norm is not None:
            cpu.norm(x, *self._embed_norm, x, self._spare)
        if model.positions is not None:
            x += model.positions.data[position]
        for half in self._halves:
            half(x, position)
        self._position += 1
        return self._head(x)


def decoder(model: LanguageModel) -> Decoder:
    """The fastest Decoder of a model."""
    return FusedDecoder(model) if FusedDecoder.reads(model) else Decoder(model)
