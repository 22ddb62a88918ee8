"""AFT-local: AFT with a learned bias for the nearest positions, in linear time (Zhai et al. 2021, arXiv 2105.14103, eq. 4).

    y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s + w_ts) v_s / Σ_{s <= t} e^(k_s + w_ts)      out = y Woᵀ
    w_ts = u_t · v_s  if t - s < window,  else 0

The window is no mask: what is outside counts with weight e^k. u and v are matrices [context, rank] (section 3.2); the paper
starts them from N(0, 10^-2) without saying whether that is the variance; ``position_std`` is the standard deviation. Other
weights are those of the Transformer. The state is the keys and values of the window and the mean of what has left it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor
from autograd.random import Random

from ..config import check, option
from ..nn import normal
from ..ops import aft_local, banded_product
from ..options import ModelOptions
from ._aft import AFT, BEGINS, POSITION_STD, PROJECTION, RANK
from ._page import Page

PAGE = Page(
    formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_ts) v_s / Σ_{s ≤ t} e^(k_s + w_ts) in every channel; "
            "w_ts = u_t · v_s if t - s < window, else 0",
    cost="O(T window D) time and O(T D) memory; O(window D) for every token when writing",
    state="2 window D: keys and values in the window, the mean of what has left it, and the logarithm of its total weight",
    operators=("aft_local", "banded_product"),
    golden="AFTLocal of labml-nn 0.5.1, causal and in both directions, gradients included",
    discrepancies=(
        "the window is no mask: outside of it the bias is 0 and keys count with weight e^k",
        "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on here",
        "the columns of u and v are 128 in the text and for ImageNet, 64 for CIFAR10, 256 for enwik8: --rank, 64 here",
        "u and v start from N(0, 10⁻²), variance or deviation is not said: --position-std is the deviation, 0.01 here",
        "aft-pytorch 0.2.2 makes a new bias in every call, which no optimiser ever trains; it is no reference here",
        "w belongs to absolute positions: the model cannot read further than its context",
        BEGINS,
    ),
    review="it names AFT-full and AFT-simple only; O(T window d) time and O(T d) space are the paper's Table 1",
)
PRESETS = {"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4)}


@dataclass(frozen=True)
class AftLocalOptions:
    """aft-local"""

    window: int = option(32, "the nearest positions, the present included, that have a bias of their own", low=1)
    rank: int = option(64, RANK, low=1)
    position_std: float = option(0.01, POSITION_STD, above=0)
    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class State(NamedTuple):
    """The past: how long it is; the mean of the values that have left the window and ln Σ e^k of their keys, [B D]; and the
    newest keys and values, [B window-1 D].
    """

    position: int
    average: Tensor
    logsum: Tensor
    keys: Tensor
    values: Tensor


class Mixer(AFT):
    """x[B T D] -> y[B T D]; state size 2 B window D."""

    def __init__(self, rng: Random, model: ModelOptions, options: AftLocalOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, model.width, options.output_projection, dtype)
        self.window, shape = options.window, (model.context, options.rank)
        self.pos_u = normal(rng.split(2), shape, options.position_std, dtype)
        self.pos_v = normal(rng.split(3), shape, options.position_std, dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, State]:
        start, *past = state or (0,)
        stop = start + q.shape[1]
        bias = banded_product(self.pos_u[start:stop], self.pos_v[max(start - self.window + 1, 0):stop], window=self.window)
        y, *after = aft_local(q, k, v, bias, None, *past)
        return y, State(stop, *after)

    def init_state(self, batch: int) -> State:
        width, near = self.sizes[0], self.window - 1
        return State(0, self.constant(0.0, batch, width), self.constant(-math.inf, batch, width),
                     self.constant(-math.inf, batch, near, width), self.constant(0.0, batch, near, width))
