"""RWKV-4: a weighted mean of the past whose weights fade, channel by channel (Peng et al. 2023, arXiv 2305.13048).

The problem. Attention compares every token with all tokens before it: O(T²) time to train on T tokens, and a cache of all keys
and values that grows with every token of a generated text. A recurrent network has a state of fixed size. But an LSTM (1)-(6)
multiplies its state by matrices at every position, so that it must be trained one position after the other, which is slow.
Numbers in brackets name the paper's equations.

The idea. Attention (7) is a mean of the values, (8): the weight of token i for token t is e^(q_t · k_i), divided by the sum of
all weights. The exponential ties q_t and k_i together, so the weights must be computed anew for every pair. AFT (9) drops the
query: the weight is e^(w_ti + k_i), with a learned number w_ti for each pair of positions. RWKV makes w_ti a slope: it is
(t-i) w with one learned w < 0 in each channel (10). From one position to the next, the weights of all old tokens then fall by
the same factor. So two sums per channel are enough: a new token multiplies both by this factor and adds its own term. All
matrix products stand outside this recurrence and run on all positions at once. Only a few numbers per channel remain serial.

- Why a mean: the weights are divided by their sum, so the result stays between the smallest and the largest value whatever the
  keys are, and the gradients of Wk and Wv have bounds that do not grow with T (appendix H, (32) and (33)).
- Why the exponential of the key: it makes every weight positive, and one token can outweigh thousands.
- Why the weights fade: the sums have a fixed size. Without fading, a new token would drown in the sum of all old ones.
- Why each channel fades at its own rate: some channels remember the last letters, others the last sentences. At the start, the
  rates -w range from e^-5, which fades to 1/e in 148 tokens, to e^3, with which only the token before and the present one
  count. They are learned: w = -e^time_decay is negative for every time_decay, so no weight can grow with the distance.
- Why u exists: fading starts at the token before, whose weight is e^k. The present token is no part of the past, and w should
  not have to serve it too. A channel that carries old text should give it less weight, a channel about the last letter more.
  So the present token has a factor e^u of its own.
- Why a gate: without a query, every later token reads the same mean, whether it needs it or not. The receptance r_t depends on
  the present token: sigmoid(r_t) says, channel by channel, how much of the mean passes. It is what is left of the query.
- Why the token shift: k, v and r of a token would depend on this token alone. Mixed with the token before it, they can describe
  a pair, such as a letter and its successor, for the cost of two multiplications per number.
- Why the channel mixing: time mixing takes means over tokens, in each channel on its own. Channel mixing then computes with all
  channels of a token together. It is the feed-forward network of a Transformer, with a token shift and a gate. Its activation
  max(x, 0)² is the squared ReLU of Primer (So et al. 2021, arXiv 2109.08668).
- Why most matrices start at 0: Wo and W'v are 0, so each block starts as the identity, and learning begins without noise from
  random weights. Wr, Wk and W'r are 0 too: all keys are equal and all gates half open. Wv and W'k are orthogonal, so that Wo
  and W'v have a gradient at once. The other weights of a block have one as soon as Wo and W'v are no longer 0.
- Why the embedding starts near 0 and has a norm: a step of the optimiser can turn a tiny vector into any direction, and the
  norm enlarges it. The embedding leaves its random start at once (section 3.4).

What is lost. All text so far is in 5 D numbers per layer, and no token can search it for a content: the weight of an old token
does not depend on who reads it. The paper says itself that details far back may be lost (section 9). The Hyena paper asks for
the value that stood beside a key in a text of 30,000 tokens: RWKV is right in 12.4 % of the cases, and Hyena in all of them
(table 4.2 of arXiv 2302.10866).

    ours                                                                     the paper's
    B T D                 batch, tokens, channels; positions from 0          B, T, d; positions from 1
    L                     layers                                             L
    F                     hidden size of the channel mixing                  4 d
    x_t [D]               input of a mixing, after the block's norm          x_t
    mix_k, mix_v, mix_r [D]      shares of the present token                 μ_k, μ_v, μ_r, and with a prime μ'_k, μ'_r
    key Wk, value Wv, receptance Wr, out Wo [D D]     of the time mixing     W_k, W_v, W_r, W_o
    key W'k [F D], value W'v [D F], receptance W'r [D D]    channel mixing   W'_k, W'_v, W'_r
    k_t, v_t, r_t [D]     key, value, receptance of token t                  k_t, v_t, r_t
    w = -e^time_decay [D]        logarithm of the decay for one step         -w
    u = time_first [D]           logarithm of the present token's factor     u
    y_t [D]               the mean                                           wkv_t
    a_t, b_t, p_t [D]     numerator, denominator, their common exponent      a'_t, b'_t, p_t
    time_x, channel_x [D]        last inputs of the two mixings              x_t, y_t (appendix D)

A block is x ← x + timemix(norm(x)), then x ← x + channelmix(norm(x)). f is --activation, max(x, 0)² in the paper.

    shift(x, μ)_t = μ ∘ x_t + (1 - μ) ∘ x_{t-1}                              ∘ is elementwise, x_{-1} = 0
    timemix:     r = shift(x, mix_r) Wrᵀ                                     (11)
                 k = shift(x, mix_k) Wkᵀ                                     (12)
                 v = shift(x, mix_v) Wvᵀ                                     (13)
                 y = wkv(k, v, w, u)                                         (16), as a recurrence (19) to (28)
                 o = (sigmoid(r) ∘ y) Woᵀ                                    (17)
    channelmix:  r = shift(x, mix_r) W'rᵀ                                    (14)
                 k = shift(x, mix_k) W'kᵀ                                    (15)
                 o = sigmoid(r) ∘ (f(k) W'vᵀ)                                (18)

minitv/ops/wkv/__init__.py has (16) and (19) to (28) as formulas beside their code, the form in chunks and the gradients.

Three tokens, one channel. The decay is e^w = 1/2 and the present token counts e^u = 1/2. The weights e^k are 1, 2, 1. First the
recurrence with plain sums: y is (A + e^(u + k) v) / (B + e^(u + k)), and then the token joins the sums.

    >>> import numpy as np
    >>> e_k, v, A, B = [1, 2, 1], [8, 2, 8], 0, 0  # (19)
    >>> for t in range(3):
    ...     y = (A + 0.5 * e_k[t] * v[t]) / (B + 0.5 * e_k[t])  # (20)
    ...     A, B = 0.5 * A + e_k[t] * v[t], 0.5 * B + e_k[t]  # (21), (22)
    ...     print(y, A, B)
    8.0 8.0 1.0
    5.0 8.0 2.5
    4.0 12.0 2.25

Then the last output by itself, as a mean (16): token 0 has faded for one step, token 1 for none, and token 2 is the present.

    >>> weights = np.array([0.5 * 1, 2, 0.5 * 1])
    >>> print(weights / weights.sum(), weights @ v / weights.sum())
    [0.16666667 0.66666667 0.16666667] 4.0

The operator in both forms, with keys that are 1000 larger: no float holds e^1000, but y, a and b stay as they are.

    >>> from autograd import use
    >>> from minitv.ops import wkv
    >>> k, half = np.log(e_k).reshape(1, 3, 1) + 1000, np.log([0.5])
    >>> for form, tuning in dict(recurrent={}, chunkwise={"chunk_size": 2}).items():
    ...     with use("wkv", form=form, **tuning):
    ...         y, a, b, p = wkv(k, np.array(v, float).reshape(1, 3, 1), half, half)
    ...     print(form, y.numpy().ravel().round(6), *(x.item().__round__(6) for x in (a, b, p)))
    recurrent [8. 5. 4.] 12.0 2.25 1000.0
    chunkwise [8. 5. 4.] 12.0 2.25 1000.0

Not offered of the official code: a copying head (head_qk), a small attention (tiny_att), a channel mixing in place of the first
time mixing (pre_ffn), and learning rates of their own for decays and bonuses. Linear layers have no biases: --bias is about
norms alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, exp, linear
from autograd.random import Random

from ..config import check, option
from ..nn import ACTIVATIONS, Dropout, Parameter, Stateful, full, made, uniform
from ..ops import gated, token_shift, wkv
from ..ops.wkv import EMPTY
from ..options import ModelOptions
from ..sequence import last_before, relay
from ..variant import Page, Variant


@dataclass(frozen=True)
class RWKVOptions:
    """rwkv"""

    ffn_width: float | None = option(
        None, "hidden size of the channel mixing, in model widths; none = 4, as in the paper", above=0
    )

    __post_init__ = check


class State(NamedTuple):
    """What time mixing keeps of the past, each [B D]: its last input, and a, b and p of the operator wkv."""

    time_x: Tensor
    a: Tensor
    b: Tensor
    p: Tensor


class ChannelState(NamedTuple):
    """The last input of channel mixing [B D]."""

    channel_x: Tensor


class TimeMix(Stateful):
    """o = (sigmoid(r) ∘ wkv(k, v, w, u)) Woᵀ for x[B T D], equations (11) to (13), (16) and (17); state size 4 B D.

    The first weights are those of the code RWKV-v4neo: Wv is orthogonal and the other matrices are 0.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: RWKVOptions, layer: int = 0, dtype=np.float32):
        width, depth = model.width, _depth(model, layer)
        self.mix_k = _mix(model, layer, dtype)
        self.mix_v = _mix(model, layer, dtype, plus=0.3 * depth)
        self.mix_r = _mix(model, layer, dtype, power=0.5)
        self.key = full((width, width), 0, dtype)
        self.value = orthogonal(rng.split(0), width, width, 1.0, dtype)
        self.receptance = full((width, width), 0, dtype)
        self.out = full((width, width), 0, dtype)
        # From e^-5 to e^3 over the channels; in later layers, more channels fade slowly. (appendix E) [D]
        self.time_decay = made(Parameter, (width,), dtype, lambda: (
            -5 + 8 * (np.arange(width) / max(1, width - 1)) ** (0.7 + 1.3 * depth)))
        # ln 0.3 - 0.5, ln 0.3, ln 0.3 + 0.5 by turns, so that neighbouring channels start unlike. (appendix E) [D]
        self.time_first = made(Parameter, (width,), dtype, lambda: math.log(0.3) + 0.5 * ((np.arange(width) + 1) % 3 - 1))
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None, None, None, None)[0], rng)

    def init_state(self, batch: int) -> State:
        return State(*(self.constant(value, batch, self.out.shape[0]) for value in (0.0, 0.0, 0.0, EMPTY)))

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._run(x, *state)

    def _run(self, x: Tensor, time_x: Tensor | None, *state: Tensor | None) -> tuple[Tensor, State]:
        x, time_x = last_before(x, time_x)
        k, last = token_shift(x, self.mix_k, time_x)  # [B T D], [B D]
        v, _ = token_shift(x, self.mix_v, time_x)
        r, _ = token_shift(x, self.mix_r, time_x)
        k, v, r = linear(k, self.key), linear(v, self.value), linear(r, self.receptance)  # (12), (13), (11) [B T D]
        decay = -exp(self.time_decay)
        y, *state = relay(lambda k, *past: wkv(k, v, decay, self.time_first, *past), k, *state,
                          begin=lambda: self.init_state(len(x.data))[1:])  # (16) [B T D]
        return linear(gated(y, r), self.out), State(last, *state)  # (17) [B T D]


class ChannelMix(Stateful):
    """o = sigmoid(r) ∘ (f(k) W'vᵀ) for x[B T D], equations (14), (15) and (18); its state is the last input, B D numbers.

    The first W'k is orthogonal, and the other matrices are 0.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: RWKVOptions, layer: int = 0, dtype=np.float32):
        width, hidden = model.width, max(1, round((options.ffn_width or model.ffn_multiple) * model.width))
        self.mix_k, self.mix_r = _mix(model, layer, dtype), _mix(model, layer, dtype)
        self.key = orthogonal(rng.split(0), hidden, width, 1.0, dtype)
        self.receptance = full((width, width), 0, dtype)
        self.value = full((width, hidden), 0, dtype)
        self.activation = ACTIVATIONS[model.activation]
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return self.dropout(self._run(x, None)[0], rng)

    def init_state(self, batch: int) -> ChannelState:
        return ChannelState(self.constant(0.0, batch, self.receptance.shape[0]))

    def prefill(self, x: Tensor, state: ChannelState) -> tuple[Tensor, ChannelState]:
        return self._run(x, *state)

    def _run(self, x: Tensor, channel_x: Tensor | None) -> tuple[Tensor, ChannelState]:
        x, channel_x = last_before(x, channel_x)
        k, last = token_shift(x, self.mix_k, channel_x)  # [B T D], [B D]
        r, _ = token_shift(x, self.mix_r, channel_x)
        k, r = linear(k, self.key), linear(r, self.receptance)  # (15) [B T F], (14) [B T D]
        return gated(linear(self.activation(k), self.value), r), ChannelState(last)  # (18) [B T D]


def orthogonal(rng: Random, outputs: int, inputs: int, gain: float, dtype) -> Parameter:
    """A matrix [outputs inputs] whose rows or columns are orthogonal and gain max(1, √(outputs / inputs)) long.

    It turns every input and stretches all of them alike, so that no direction is favoured.
    """
    def draw() -> np.ndarray:
        q, r = np.linalg.qr(rng.normal((max(outputs, inputs), min(outputs, inputs)), np.float64))
        q = q * np.where(np.diag(r) < 0, -1, 1)  # without this, the signs are not uniform
        return (q if outputs >= inputs else q.T) * gain * math.sqrt(max(1.0, outputs / inputs))

    return made(Parameter, (outputs, inputs), dtype, draw)


def _depth(model: ModelOptions, layer: int) -> float:
    """0 for the first layer, 1 for the last."""
    return layer / max(1, model.layers - 1)


def _mix(model: ModelOptions, layer: int, dtype, power: float = 1.0, plus: float = 0.0) -> Parameter:
    """The share of the present token in channel j, (j / D)^(power (1 - layer / L)) + plus, appendix E.

    Low channels start with the token before; higher channels and later layers look back less.
    """
    def share() -> np.ndarray:
        return (np.arange(model.width) / model.width) ** (power * (1 - layer / model.layers)) + plus  # [D]

    return made(Parameter, (model.width,), dtype, share)


def init_tables(rng: Random, model: ModelOptions, vocab: int, dtype) -> tuple[Parameter, Parameter]:
    """The embedding, uniform up to 1e-4 because its norm enlarges it, and a head of its own, which is orthogonal."""
    embed = uniform(rng.split(0), (vocab, model.width), 1e-4, dtype)
    return embed, orthogonal(rng.split(1), vocab, model.width, 0.5, dtype)


RWKV = Variant(
    name="rwkv",
    summary="RWKV-4: a weighted mean of the past whose weights fade, channel by channel",
    paper="Peng et al. 2023, arXiv 2305.13048",
    mixer=TimeMix,
    options=RWKVOptions,
    channel=ChannelMix,
    tables=init_tables,
    # As in the paper, except that the channel mixing is 3.5 widths wide and not 4: with the head's matrix and the receptances,
    # the model then has about as many parameters as the other variants.
    overrides=dict(positions="none", embed_norm=True, ffn_width=3.5, activation="relu_squared", bias=True, tied=False),
    without=("ffn_multiple", "ffn_gate", "init_std"),  # it has --ffn-width, a gate and a rule for every weight
    fused="rwkv",
    on_ranks="each rank passes the last inputs of both mixings, and a, b and p, on to the next one",
    page=Page(
        formula="y_t = (Σ_{i<t} e^((t-1-i) w + k_i) v_i + e^(u + k_t) v_t) / (Σ_{i<t} e^((t-1-i) w + k_i) + e^(u + k_t)) in "
                "every channel; out = (sigmoid(r) ∘ y) Woᵀ; k, v and r are linear in a mix of x_t and x_{t-1}",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 4 D² weights in the time mixing "
             "and (2 F + D) D in the channel mixing with F hidden units, 13 D² together in the paper, where F = 4 D; O(T D) "
             "for the mean. Memory: O(T (D + F)) for what the backward pass needs. Generating: O(D²) time for each token, in "
             "the projections, and O(D) for the mean, however long the text is",
        state="5 D numbers, of fixed size: the last inputs of both mixings, and the mean's numerator a, denominator b and "
              "largest exponent p",
        operators=("wkv", "bidirectional_wkv", "token_shift", "gated"),
        golden="RWKV of the package transformers with all gradients and its state, and its author's package rwkv with its "
               "state",
        discrepancies=(
            "the paper subtracts w ≥ 0 in (16); its code learns time_decay and adds w = -e^time_decay, as here; appendix E "
            "calls time_decay w",
            "equation (10) lets the token before fade by one step; (16), the code and this library do not",
            "appendix E multiplies mix_r by 1/2 at the start; the code halves the exponent of (channel / D), as here",
            "appendix E starts the output matrices Wo and W'v at random and all others at 0; the code starts these two at 0, "
            "and Wv and W'k orthogonal, as here",
            "the package transformers starts the bonus u at 1 everywhere, by a misplaced parenthesis; here it is ln 0.3 ± 0.5 "
            "or ln 0.3, as in the paper",
            "the official kernels drop the gradient of a state that is carried in; here it is exact",
            "with a tied head, which the official code does not have, the embedding starts as in the other variants",
        ),
        review="it gives the time O(T d), which is right for "
               "the mean alone: section 3.2 of the paper adds O(T d²) for the projections. Its space O(T d) is not the paper's "
               "O(d), the size of the state. Its max pooling in the channel mixing does not exist: max(k, 0)² is the squared "
               "ReLU of every number",
    ),
)
