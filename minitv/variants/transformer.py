"""Causal multi-head attention, as in GPT-2 (Vaswani et al. 2017, arXiv 1706.03762; Radford et al. 2019).

    q, k, v = split(x Wqkvᵀ + b)          one fused (3D, D) matrix, in this order
    y = merge(attention(q, k, v)) Woᵀ + b  heads of size D / heads, causal, scaled by 1/√head_dim

Weights from N(0, init_std²), the output projection from N(0, (init_std/√(2 layers))²), biases 0: GPT-2's. While training, the
attention weights and the output are dropped with the model's probability. The state is the cache of keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, concat
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..models.encoder import Encoder
from ..nn import Dropout, Linear, Stateful
from ..ops import attention, merge_heads, rope, split_heads
from ..ops.rope import rope_angles
from ..options import ModelOptions
from ..variant import Page, Variant


@dataclass(frozen=True)
class TransformerOptions:
    """transformer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)

    __post_init__ = check


class State(NamedTuple):
    """The past: keys and values [B H S head_dim]."""

    keys: Tensor
    values: Tensor


class Attention(Stateful):
    """x[B T D] -> y[B T D] by causal attention; state size 2 B T D, growing with the sequence.

    With ``--positions rope`` q and k are turned by their position (Su et al. 2021, arXiv 2104.09864), and the cache holds
    turned keys.
    """

    without_rope = None
    causal: ClassVar[bool] = True  # whether a position sees the past alone

    def __init__(self, rng: Random, model: ModelOptions, options: TransformerOptions, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        if width % self.heads:
            raise UserError(f"--heads: {self.heads} heads do not divide the width {width}")
        self.angles = None
        if model.positions == "rope":
            if width // self.heads % 2:
                raise UserError(f"--positions rope: it turns pairs of channels, and {self.heads} heads of the width {width} "
                                f"have {width // self.heads} channels each, allowed: an even number")
            self.angles = rope_angles(width // self.heads)
        std = model.init_std
        self.qkv = Linear(rng.split(0), width, 3 * width, std=std, bias=model.bias, dtype=dtype)
        self.out = Linear(rng.split(1), width, width, std=std / math.sqrt(2 * model.layers), bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        q, k, v = self._heads(x, 0)
        if rng is None or not self.dropout.p:
            return self.out(merge_heads([attention(q, k, v, causal=self.causal)]))
        y = attention(q, k, v, causal=self.causal, dropout=self.dropout.p, seed=rng.split(0).seed)
        return self.dropout(self.out(merge_heads([y])), rng.split(1))

    def init_state(self, batch: int) -> State:
        empty = self.constant(0.0, batch, self.heads, 0, self.out.weight.shape[0] // self.heads)
        return State(empty, empty)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self._heads(x, state.keys.shape[2])
        state = State(concat([state.keys, k], axis=2), concat([state.values, v], axis=2))
        return self.out(merge_heads([attention(q, *state)])), state

    def _heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B H T head_dim] of positions from ``start`` on."""
        q, k, v = split_heads(self.qkv(x), heads=self.heads, parts=3)
        if self.angles is None:
            return q, k, v
        return rope(q, angles=self.angles, start=start), rope(k, angles=self.angles, start=start), v


class Bidirectional(Attention):
    """x[B T D] -> y[B T D] by attention to all positions; there is no state, every output depends on the whole sequence."""

    causal = False


TRANSFORMER = Variant(
    name="transformer",
    summary="Causal multi-head attention, as in GPT-2",
    paper="Vaswani et al. 2017, arXiv 1706.03762; Radford et al. 2019",
    mixer=Attention,
    options=TransformerOptions,
    fused="transformer",
    page=Page(
        formula="y_i = Σ_{j ≤ i} softmax_j(q_i · k_j / √head_dim) v_j in every head; q, k, v = split(x Wᵀ), out = merge(y) Wᵀ",
        cost="O(T² D) time and, without ever storing the T × T scores, O(T D) memory; O(t D) for token t when writing",
        state="2 t D: keys and values of all t tokens read so far",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention, and a whole GPT-2 of the package transformers with all gradients",
        discrepancies=(
            "GPT-2's initial weights (0.02) are for width 768; here they scale with √(768/width), --init-std 0.02 gives its "
            "own",
            "GPT-2 uses the tanh approximation of gelu, nanoGPT the exact one: --activation, the default is exact",
        ),
        review="its time is given as O(T log T d), which is wrong: O(T² d); the space is right for the form that stores all "
               "scores",
    ),
)

ENCODER = Variant(
    name="encoder",
    summary="Multi-head attention in both directions, as in BERT",
    paper="Devlin et al. 2018, arXiv 1810.04805; Vaswani et al. 2017, arXiv 1706.03762",
    mixer=Bidirectional,
    options=TransformerOptions,
    model=Encoder,
    page=Page(
        formula="y_i = Σ_j softmax_j(q_i · k_j / √head_dim) v_j in every head, over all positions j; "
                "q, k, v = split(x Wᵀ), out = merge(y) Wᵀ",
        cost="O(T² D) time and, without ever storing the T × T scores, O(T D) memory",
        state="none: it sees a whole sequence at once, and does not write",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention without a mask",
        discrepancies=(
            "BERT normalises after each sum, and has a second objective with pairs of sentences; here the blocks are the "
            "Transformer's, and masked tokens are the only objective",
        ),
        review="it does not speak of encoders",
    ),
)
