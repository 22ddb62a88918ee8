"""Shifted: a mixer that reads half of its channels one position late.

To recall what followed a token, a model has to bring each token beside the one before it, and then to look the pair up.
Attention needs a layer for each. With the shift every layer reads pairs, so that one layer of attention can do both: it is the
short convolution of Fu et al. 2022, arXiv 2212.14052 (H3), and of Arora et al. 2023, arXiv 2312.04927 (zoology), in its
simplest form, with fixed weights 0 and 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor
from autograd.random import Random

from .nn import Buffer, Stateful
from .ops import token_shift
from .sequence import last_before


class State(NamedTuple):
    """The last input [B D], and what the mixer has seen."""

    last: Tensor
    mixer: Any


class Shifted(Stateful):
    """y = mixer(x'), where x'_t = x_{t-1} in the first D // 2 channels and x_t in the others.

    x[B T D] -> y[B T D], x_{-1} = 0; for a causal mixer of width D. Its state is that of the mixer and one vector [B D].
    """

    def __init__(self, mixer: Stateful, width: int, dtype=np.float32):
        self.mixer = mixer
        self.present = Buffer((np.arange(width) >= width // 2).astype(dtype), saved=False)  # the share of x_t [D]

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        x, last = last_before(x, None)
        return self.mixer(token_shift(x, self.present, last)[0], rng)

    def init_state(self, batch: int) -> State:
        return State(self.constant(0.0, batch, *self.present.shape), self.mixer.init_state(batch))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        x, last = token_shift(x, self.present, state.last)
        y, mixed = self.mixer.prefill(x, state.mixer)
        return y, State(last, mixed)
