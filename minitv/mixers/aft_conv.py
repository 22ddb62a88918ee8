"""AFT-conv: AFT with a learned bias for each distance, a causal convolution (Zhai et al. 2021, arXiv 2105.14103, eq. 6).

    y_t = sigmoid(q_t) · Σ_{s <= t} e^(k_s + w_{t-s}) v_s / Σ_{s <= t} e^(k_s + w_{t-s})      w_j = 0 from j = window on

Each head has one key per position and its own filter, standardised over its lags (section 3.2, the biased deviation):

    w = gain · (raw - mean(raw)) / std(raw) + bias          gain and bias start at 0: at first this is AFT-simple

The paper evaluates it on images, in two dimensions and in both directions (the operator aft_conv2d); this is its causal
form along a sequence. Its best results have as many heads as channels, which is the default. The state is the keys and values
of the window and the mean of what has left it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, mean, std
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..nn import Parameter, normal
from ..ops import aft_conv
from ..options import ModelOptions
from ._aft import AFT, BEGINS, PROJECTION
from ._page import Page

PAGE = Page(
    formula="y_t = sigmoid(q_t) · Σ_{s ≤ t} e^(k_s + w_{t-s}) v_s / Σ_{s ≤ t} e^(k_s + w_{t-s}); "
            "one k and one w for all channels of a head",
    cost="O(T window D) time and O(T D) memory; O(window D) for every token when writing",
    state="window (D + heads): keys and values in the window, the mean of what has left it, the logarithm of its total weight",
    operators=("aft_conv", "aft_conv2d"),
    golden="eq. 6 by PyTorch's conv1d and conv2d with e^w - 1, along a sequence and for images, gradients included",
    discrepancies=(
        "the paper evaluates it on images alone, in both directions; here that is the operator aft_conv2d, and the variant is "
        "its causal form along a sequence",
        "eq. 6 adds a convolution with e^w - 1 to the sum of everything; for very negative w that is a small difference of "
        "large numbers (values near 1 are wrong by 0.4 at w = -15 in float32): here all terms are positive",
        "a filter is standardised over its lags, by which deviation is not said: here by the biased one",
        "the paper's equations end with y; public implementations multiply by an output matrix: --output-projection, on here",
        BEGINS,
    ),
    review="it names AFT-full and AFT-simple only; O(T window d) time and O(T d) space are the paper's Table 1",
)
PRESETS = {"nanogpt-cpu": dict(lr=3e-3, min_lr=3e-4, heads=None), "small": dict(heads=None)}


@dataclass(frozen=True)
class AftConvOptions:
    """aft-conv"""

    heads: int | None = option(None, "groups of channels with one key and one filter each; none = every channel", low=1)
    window: int = option(32, "lags of the filters, the present included", low=2)
    output_projection: bool = option(True, PROJECTION)

    __post_init__ = check


class State(NamedTuple):
    """The past: the mean of the values that have left the window, [B D], and ln Σ e^k of their keys, [B heads]; and the
    newest keys, [B window-1 heads], and values, [B window-1 D].
    """

    average: Tensor
    logsum: Tensor
    keys: Tensor
    values: Tensor


class Mixer(AFT):
    """x[B T D] -> y[B T D]; state size B window (D + heads)."""

    def __init__(self, rng: Random, model: ModelOptions, options: AftConvOptions, layer: int = 0, dtype=np.float32):
        self.heads, self.window = options.heads or model.width, options.window
        if model.width % self.heads:
            raise UserError(f"--heads: {self.heads} heads do not divide the width {model.width}")
        super().__init__(rng, model, self.heads, options.output_projection, dtype)
        self.conv_weight = normal(rng.split(2), (self.heads, self.window), 1.0, dtype)
        self.conv_gain, self.conv_bias = (Parameter(np.zeros(self.heads, dtype)) for _ in range(2))

    def filters(self) -> Tensor:
        """The biases w[heads window]."""
        raw = self.conv_weight
        unit = (raw - mean(raw, axis=1, keepdims=True)) / std(raw, axis=1, keepdims=True)
        return self.conv_gain[:, None] * unit + self.conv_bias[:, None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, State]:
        y, *after = aft_conv(q, k, v, self.filters(), None, *(state or ()))
        return y, State(*after)

    def init_state(self, batch: int) -> State:
        width, near = self.sizes[0], self.window - 1
        return State(self.constant(0.0, batch, width), self.constant(-math.inf, batch, self.heads),
                     self.constant(-math.inf, batch, near, self.heads), self.constant(0.0, batch, near, width))
