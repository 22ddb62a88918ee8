"""What the mixers of the AFT family share: projections, the output, dropout, and one way through for call, prefill and step."""

from __future__ import annotations

import math

from autograd import Tensor, split
from autograd.random import Random

from ..nn import Dropout, Linear, Stateful
from ..options import ModelOptions

RANK = "columns of u and v, whose product is the bias of every pair of positions"
POSITION_STD = "standard deviation of u and v at the start"
BEGINS = "in its first hundreds of steps it learns like aft-simple, whatever the bias: that starts near 0"
PROJECTION = "a matrix after the mixing; the paper's equations have none, public implementations do"


class AFT(Stateful):
    """x[B T D] -> y[B T D]: y = mix(q, k, v) Woᵀ + b with [q, k, v] = x Wqkvᵀ + b.

    A variant's ``mix(q, k, v, state)`` gives y and the state after it; without a state nothing came before.
    """

    positions = True

    def __init__(self, rng: Random, model: ModelOptions, keys: int, output_projection: bool, dtype):
        width, std = model.width, model.init_std
        self.sizes = width, keys, width
        self.qkv = Linear(rng.split(0), width, sum(self.sizes), std=std, bias=model.bias, dtype=dtype)
        self.out = Linear(rng.split(1), width, width, std=std / math.sqrt(2 * model.layers), bias=model.bias,
                          dtype=dtype) if output_projection else None
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        y, _ = self.mix(*self._split(x), None)
        return self.dropout(self._project(y), rng)

    def prefill(self, x: Tensor, state):
        y, state = self.mix(*self._split(x), state)
        return self._project(y), state

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.qkv(x), sizes=self.sizes)

    def _project(self, y: Tensor) -> Tensor:
        return y if self.out is None else self.out(y)
