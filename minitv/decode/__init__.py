"""Decoder: a model that reads token after token, of one sequence or of several side by side, in two kernel calls a layer.

A token needs each weight once, in a few small products: a step through the operators spends several times as long in Python as
it does on arithmetic. The model's own ``prefill`` defines what the kernels compute, and takes their place where there are none.

A variant's record names its page here, a module with the kernels of its halves of a block, beside the weights and states that
they take: HALVES, subclasses of shared.Half, each of which says what it computes. Where a model is no stack of blocks the page
has a FusedDecoder of its own, READER, and ``refused(model)`` may say why it cannot read one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from autograd import no_grad, to_numpy
from autograd.cpu.compile import unavailable
from autograd.cpu.process import cores, keep_memory
from autograd.cpu.team import sharing
from autograd.device import is_cupy
from autograd.errors import DomainError, ShapeError

from ..blocks import PreNorm
from ..models.lm import LanguageModel
from ..stack import Stack
from . import shared
from .shared import UNIT

FEW = 16  # tokens that are read faster one by one: a call of the model costs as much as 20 steps of nanogpt-cpu
MANY = 512  # tokens that are read by all cores


class Decoder:
    """Reads tokens of sequences of equal length: ``prefill(ids[B T])`` starts over with the given ones, ``step(ids[B])`` adds
    one to each. Where all begin alike, ids[1 T] are those of each.

    Both return the logits [B V] of the tokens that come next, valid until the next call. It is made of the weights as they are:
    after a change, make a new one.
    """

    def __init__(self, model: LanguageModel, batch: int = 1):
        keep_memory()  # else a long prompt costs a page fault for every 4 kB that its layers compute
        self.model, self.batch = model, batch
        self._start, self._state = self._begin(1), self._begin(batch)

    def _begin(self, batch: int) -> Any:
        with no_grad():
            return self.model.init_state(batch)

    @property
    def position(self) -> int:
        """How many tokens of each sequence have been read."""
        return self._state.position

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        ids = self._known(ids)
        return self._read(self._of_all(ids))

    def _known(self, ids: np.ndarray) -> np.ndarray:
        """The first ids as an array; ShapeError unless there is a row of them for all sequences, or one for each."""
        ids = np.asarray(ids, np.intp)
        if ids.ndim != 2 or len(ids) not in (1, self.batch):
            rows = "1" if self.batch == 1 else f"1 or {self.batch}"
            raise ShapeError(f"prefill: ids have the shape {ids.shape}, allowed: [B T] with {rows} rows")
        return ids

    def _of_all(self, rows: np.ndarray) -> np.ndarray:
        """A row for each sequence [B ·], where one [1 ·] may stand for all."""
        return np.repeat(rows, self.batch // len(rows), axis=0)

    def _read(self, ids: np.ndarray) -> np.ndarray:
        alone = ids.shape[1] < MANY or is_cupy(self.model.embed.weight.data)
        with no_grad(), sharing(1 if alone else cores()):
            logits, self._state = self.model.prefill(ids, self._begin(len(ids)), last=True)
        return to_numpy(logits.data[:, -1])

    def step(self, ids: np.ndarray) -> np.ndarray:
        with no_grad():
            logits, self._state = self.model.prefill(np.asarray(ids, np.intp)[:, None], self._state)
        return to_numpy(logits.data[:, 0])


class FusedDecoder(Decoder):
    """A Decoder whose steps are kernel calls, of a model that ``unread`` has nothing against.

    What is computed for a sequence depends, to the last bit, on the shared.UNIT sequences with which it is read, and on no
    others: kernels and prompts take so many together, from the first on, and what is left over.
    """

    def __init__(self, model: LanguageModel, batch: int = 1):
        super().__init__(model, batch)
        self._blocks = self.halves()
        self._halves = [half for block in self._blocks for half in block]
        self._embedding, self._head, self._position = model.embed.weight.data, shared.Head(model, batch), 0
        dtype = self._embedding.dtype
        self._x, self._spare = np.empty((batch, self._embedding.shape[1]), dtype), np.empty(2 * batch, dtype)
        self._embed_norm = None
        if model.embed_norm is not None:
            norm = shared.norm_of(model.embed_norm)
            self._embed_norm = shared.norm.version(self._x, norm, self._x, self._spare), norm

    def halves(self) -> list[list[shared.Half]]:
        """The kernels of every block."""
        return [[_half(self.model, module)(norm, module, self.model, self.batch) for norm, module in halves]
                for halves in _halves(self.model)]

    @property
    def position(self) -> int:
        return self._position

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        ids, everyone = self._known(ids), slice(None)
        if ids.shape[1] <= FEW:
            self._state, self._position = self._start, 0
            self._load(everyone, 0)
            for tokens in self._of_all(ids).T:
                logits = self.step(tokens)
            return logits
        parts = []
        for first in range(0, len(ids), UNIT):
            parts.append(self._read(ids[first : first + UNIT]))
            self._load(slice(first, first + UNIT) if len(ids) > 1 else everyone, ids.shape[1])
        self._position = ids.shape[1]
        return self._of_all(np.concatenate(parts))

    def _load(self, rows: slice, position: int) -> None:
        """Let some sequences go on from the state of what has been read last."""
        for block, halves, states in zip(self.model.blocks, self._blocks, self._state.blocks, strict=True):
            for half, state in zip(halves, states if type(block) is PreNorm else (states,), strict=True):
                half.load(state, position, rows)

    def step(self, ids: np.ndarray) -> np.ndarray:
        model, position, x = self.model, self._position, self._x
        self._check(ids, len(self._embedding))
        self._embedding.take(ids, axis=0, out=x, mode="clip")  # without a copy, as they are in range
        if self._embed_norm is not None:
            compute, norm = self._embed_norm
            compute(x, norm, x, self._spare)
        if model.positions is not None:
            x += model.positions.data[position]
        for half in self._halves:
            half(x, position)
        self._position += 1
        return self._head(x)

    def _check(self, ids: Sequence[int], vocab: int) -> None:
        """Raise ShapeError if the context is full, and DomainError if an id is none of the vocabulary."""
        model = self.model
        if model.bounded and self._position >= model.context:
            raise ShapeError(f"the model has {model.context} positions; {self._position} + 1 tokens do not fit")
        low, high = (ids[0], ids[0]) if self.batch == 1 else (min(ids), max(ids))
        if low < 0 or high >= vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise DomainError(f"the model knows the tokens 0 .. {vocab - 1}, got {wrong}")


def _halves(model: LanguageModel) -> list[list[tuple]]:
    """The norm and the module of every half of every block; one of another kind than PreNorm is a module of its own."""
    return [[(norm, module) for norm, module in ((block.norm1, block.mixer), (block.norm2, block.ffn)) if module is not None]
            if type(block) is PreNorm else [(None, block)] for block in model.blocks]


def _half(model: LanguageModel, module):
    """The class on the variant's page that computes a module, or None."""
    return next((half for half in _page(model).HALVES if half.computes(module)), None)


def _page(model: LanguageModel):
    return importlib.import_module(f".{model.variant.fused}", __package__)


def unread(model: LanguageModel) -> str | None:
    """Why no kernels can read a model, or None."""
    if model.variant.fused is None:
        return f"there are none for {model.variant.name}"
    if reason := unavailable():
        return reason
    if is_cupy(model.embed.weight.data):
        return "they run on the CPU"
    if model.encoding not in ("learned", "rope", "none"):
        return f"they know learned positions, rope and none, not {model.encoding}"
    strange = (block for block in model.blocks if type(block) is not PreNorm and _half(model, block) is None)
    if next(strange, None) is not None or \
            any(type(stack) is not Stack for stack in getattr(model.blocks, "stacks", (model.blocks,))):
        return "they know stacks of blocks x + f(norm(x)) alone"
    if reason := getattr(_page(model), "refused", lambda model: None)(model):
        return reason
    unknown = (module for halves in _halves(model) for _, module in halves if _half(model, module) is None)
    return next((f"they do not know the module {type(module).__name__} with its options" for module in unknown), None)


def decoder(model: LanguageModel, batch: int = 1) -> Decoder:
    """The fastest Decoder of so many sequences of a model."""
    return (Decoder if unread(model) else getattr(_page(model), "READER", FusedDecoder))(model, batch)
