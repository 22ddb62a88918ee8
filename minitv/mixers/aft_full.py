"""AFT-full: AFT with a learned bias for every pair of positions, in quadratic time (Zhai et al. 2021, arXiv 2105.14103, eq. 2).

    y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s + w_ts) v_s / Σ_{s <= t} e^(k_s + w_ts)      w = u vᵀ      out = y Woᵀ

The bias w is the product of two matrices [context, rank] (section 3.2), shared by all channels. The paper starts them from
N(0, 10^-2) without saying whether that is the variance; ``position_std`` is the standard deviation. Other weights are those
of the Transformer. The state is the cache of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, concat, linear
from autograd.random import Random

from ..config import check, option
from ..nn import normal
from ..ops import aft_full
from ..options import ModelOptions
from ._aft import AFT, BEGINS, POSITION_STD, PROJECTION, RANK
from ._page import Page

PAGE = Page(
    formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts) in every channel; w = u vᵀ",
    cost="O(T² D) time and O(T D) memory; O(t D) for token t when writing",
    state="2 t D: keys and values of all t tokens read so far",
    operators=("aft_full",),
    golden="AFTLocal of labml-nn 0.5.1 with a window of the whole sequence, gradients included",
    discrepancies=(
        "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on here",
        "the columns of u and v are 128 in the text and for ImageNet, 64 for CIFAR10, 256 for enwik8: --rank, 64 here",
        "u and v start from N(0, 10⁻²), variance or deviation is not said: --position-std is the deviation, 0.01 here",
        "an older labml-nn subtracted the largest bias of a column, which does not cancel; what cancels is that of a row",
        "w belongs to absolute positions: the model cannot read further than its context",
        BEGINS,
    ),
    review="O(T² d) time and O(T d) space are the paper's Table 1; the space leaves out the T × T biases, which the factors u "
           "and v (2 T rank parameters) avoid only as long as nobody stores their product",
)
PRESETS = {"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4)}


@dataclass(frozen=True)
class AftFullOptions:
    """aft-full"""

    rank: int = option(64, RANK, low=1)
    position_std: float = option(0.01, POSITION_STD, above=0)
    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class State(NamedTuple):
    """The past: keys and values [B S D]."""

    keys: Tensor
    values: Tensor


class Mixer(AFT):
    """x[B T D] -> y[B T D]; state size 2 B T D, growing with the sequence."""

    def __init__(self, rng: Random, model: ModelOptions, options: AftFullOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)
        shape = model.context, options.rank
        self.pos_u = normal(rng.split(2), shape, options.position_std, dtype)
        self.pos_v = normal(rng.split(3), shape, options.position_std, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, State]:
        state = State(k, v) if state is None else State(concat([state.keys, k], axis=1), concat([state.values, v], axis=1))
        stop = state.keys.shape[1]
        bias = linear(self.pos_u[stop - q.shape[1]:stop], self.pos_v[:stop])
        return aft_full(q, *state, bias), state

    def init_state(self, batch: int) -> State:
        empty = self.constant(0.0, batch, 0, self.sizes[0])
        return State(empty, empty)
