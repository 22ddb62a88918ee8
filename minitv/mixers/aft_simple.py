"""AFT-simple: each channel takes a weighted mean of its past, in linear time (Zhai et al. 2021, arXiv 2105.14103, eq. 5).

    [q, k, v] = x Wqkvᵀ      y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s) v_s / Σ_{s <= t} e^(k_s)      out = y Woᵀ

Weights from N(0, init_std²), Wo from N(0, (init_std/√(2 layers))²), as in the Transformer, whose blocks the paper keeps. The
state is the mean so far and the logarithm of its total weight: 2 D numbers, whatever came before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor
from autograd.random import Random

from ..config import check, option
from ..ops import aft_simple
from ..options import ModelOptions
from ._aft import AFT, PROJECTION


@dataclass(frozen=True)
class AftSimpleOptions:
    """aft-simple"""

    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class State(NamedTuple):
    """The past: the mean of its values and ln Σ e^k of its keys, [B D] each."""

    average: Tensor
    logsum: Tensor


class Mixer(AFT):
    """x[B T D] -> y[B T D]; state size 2 B D."""

    def __init__(self, rng: Random, model: ModelOptions, options: AftSimpleOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, State]:
        y, *after = aft_simple(q, k, v, None, *(state or ()))
        return y, State(*after)

    def init_state(self, batch: int) -> State:
        shape = batch, self.sizes[0]
        return State(self._constant(0.0, *shape), self._constant(-math.inf, *shape))
