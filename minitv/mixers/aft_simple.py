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
from ._page import Page

PAGE = Page(
    formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s) v_s / Σ_{s ≤ t} e^(k_s) in every channel; [q, k, v] = x Wᵀ, out = y Wᵀ",
    cost="O(T D) time and O(T D) memory; O(D) for every token when writing",
    state="2 D: the mean of the values so far, and the logarithm of its total weight",
    operators=("aft_simple",),
    golden="AFTLocal of labml-nn 0.5.1 with a bias of zeros, gradients included",
    discrepancies=(
        "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on here",
        "aft-pytorch 0.2.2 has no causal mask and subtracts no maximum, so its exponentials overflow; labml-nn, in causal use "
        "too, subtracts the largest key of the whole sequence, which leaves 0/0 where keys rise by 100: here a running maximum",
        "the learning rate of nanogpt-cpu is the paper's 3e-3: at the Transformer's 1e-3 all four AFTs end 0.14 to 0.16 bits "
        "worse (a Transformer gains 0.05 bits by 3e-3)",
    ),
    review="time and space O(T d) are the paper's Table 1, and right",
)
PRESETS = {"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4)}


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
        return State(self.constant(0.0, *shape), self.constant(-math.inf, *shape))
