"""token_shift: each position mixed with the one before it (RWKV: Peng et al. 2023, arXiv 2305.13048, section 3.1.1).

    y_t = mix ∘ x_t + (1 - mix) ∘ x_{t-1}        the argument of every matrix in equations (11) to (15); ∘ is elementwise

Every channel has its own mix: 1 keeps the present token, 0 takes the one before, and a value between them takes some of both.
x_{-1} is the last position of the segment before, or 0. So a layer sees pairs of neighbouring tokens for two multiplications
per number, and its state is one position. Gradients, where g_t is the gradient of y_t and the last position has no g_{t+1}:

    dx_t = mix ∘ g_t + (1 - mix) ∘ g_{t+1},    dmix = Σ_t g_t ∘ (x_t - x_{t-1}),    dx_{-1} = (1 - mix) ∘ g_0
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.laws import causal, independent, law, linear_in, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, reshape, where


@op("x[B T C], mix[C], last?[B C], reset?:bool[B T] -> y[B T C], last[B C]",
    laws=[causal("x"), independent("B C"), linear_in("x"), streams()])
def token_shift(x, mix, last=None, reset=None):
    """y_t = mix ∘ x_t + (1 - mix) ∘ x_{t-1}, and the last x.

    x[B T C], mix[C]; last[B C] is x_{-1}, which an earlier call returned, and 0 if absent. reset[B T] is True where a new
    sequence begins, for which x_{t-1} counts as 0.
    """
    last = np.zeros((x.shape[0], x.shape[2]), x.dtype) if last is None else last.copy()
    y = np.empty(x.shape, x.dtype)
    for b, t, c in np.ndindex(x.shape):
        before = last[b, c] if reset is None or not reset[b, t] else 0
        y[b, t, c] = mix[c] * x[b, t, c] + (1 - mix[c]) * before
        last[b, c] = x[b, t, c]
    return y, last


@token_shift.form
def composed(x, mix, last, reset):
    """All positions at once: the sequence, and the same sequence moved by one position."""
    batch, _, width = x.shape
    if last is None:
        last = Tensor.wrap(namespace(x.data).zeros((batch, width), x.dtype))
    sequence = concat([reshape(last, (batch, 1, width)), x], axis=1)  # [B T+1 C]
    before = sequence[:, :-1] if reset is None else where(reset[..., None], 0.0, sequence[:, :-1])
    return mix * x + (1.0 - mix) * before, sequence[:, -1]


token_shift.kernel("cpu")
token_shift.kernel("cuda")


@token_shift.inputs
def _(draw):
    batch, length, width = draw.size(0, 2, "B"), draw.size(0, 5, "T"), draw.size(0, 5, "C")
    last = draw.floats(batch, width) if draw.boolean() else None
    reset = draw.layout(draw.generator().random((batch, length)) < 0.3) if draw.boolean() else None
    return (draw.floats(batch, length, width), draw.floats(width, low=-0.2, high=1.3), last, reset), {}


@law(token_shift, "mix = 1 is the identity")
def _(case, draw):
    assert_close(case(mix=1.0).y, case.x, "token_shift with mix = 1 is not the identity")


@law(token_shift, "a reset forgets the position before")
def _(case, draw):
    reset, spoilt = np.ones(case.x.shape[:2], bool), case.x.copy()
    y, last = case(reset=reset)
    assert_close(y, case.x * case.mix, "token_shift sees across a reset")
    spoilt[:, ::2] = draw.choice((2, np.nan, np.inf))
    assert_close(case(x=spoilt, reset=reset).y[:, 1::2], y[:, 1::2], "token_shift sees across a reset")
    assert case.x.shape[1] == 0 or np.array_equal(last, case.x[:, -1]), "token_shift does not hand on the last position"
