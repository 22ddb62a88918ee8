"""aft_local: biases within a window, and a running mean of what has left it (Zhai et al. 2021, arXiv 2105.14103, equation 4).

    N_t = Σ_{s ≤ t-W} e^(k_s) v_s + Σ_{j < W} e^(k_{t-j} + bias_tj) v_{t-j}        Z_t is the same sum with v = 1
    y_t = sigmoid(q_t) N_t / Z_t                                                   causal, in each channel

W is the size of the window, which includes the present position. The first sum is that of aft_simple, W positions late.
minitv/ops/aft/__init__.py has the gradients and what all AFT operators share.
"""

from __future__ import annotations

import numpy as np

from autograd.device import namespace
from autograd.laws import becomes, causal, independent, linear_in, shift_invariant, special_case, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import where

from .common import (
    check_state,
    check_window,
    draw_bias,
    draw_keys,
    draw_state,
    everything,
    gate,
    joined,
    lags_of_pairs,
    masked,
    mean_of,
    negative_lags,
    over_pairs,
    over_window,
    past_after,
    seen_keys,
    state_after,
    within_the_values,
)
from .full import aft_full
from .simple import aft_simple


@op("q[B T C], k[B T C], v[B T C], bias[T W], mask?:bool[B T], average?[B C], logsum?[B C], keys?[B P C], values?[B P C]"
    " -> y[B T C], average[B C], logsum[B C], keys[B P C], values[B P C]",
    laws=[causal("q k v bias", causal=True), independent("B C"), linear_in("v"), streams(causal=True), masked,
          within_the_values("v average values"),
          shift_invariant("k logsum keys", "all keys", moves="logsum keys", large=False),
          shift_invariant("k logsum keys", "all keys", moves="logsum keys", except_for=("lagged",))])  # which adds up logsums
def aft_local(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """aft_full with biases near the diagonal: w_ts = bias[t, t-s] for the keys in the window, and 0 for all others.

    q, k, v [B T C], mask[B T]. With ``causal`` bias[T W] has the lags j = 0 .. W-1. Without, W is odd, bias[t, j] belongs to
    the key at t + (W-1)/2 - j, and all keys of the call are seen. average and logsum [B C], keys and values [B P C] are the
    state that an earlier call returned, where P is the number of positive lags: all or none, else ShapeError.
    """
    k, v = everything(k, v, mask, average, logsum, keys, values)
    past, window, ahead, y = k.shape[1] - q.shape[1], bias.shape[1], negative_lags(bias.shape[1], causal), np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        exponents = k[b, :past + t + 1 if causal else None, c].tolist()
        for j in range(window):
            if 0 <= past + t + ahead - j < len(exponents):
                exponents[past + t + ahead - j] += bias[t, j].item()
        y[b, t, c] = gate(q[b, t, c]) * mean_of(exponents, v[b, :len(exponents), c])[0]  # (4)
    return y, *state_after(k, v, window - 1 - ahead)


@aft_local.form
def lagged(q, k, v, bias, mask, average, logsum, keys, values, causal):
    """The two sums above: a scan over what has left the window, and the window lag by lag. O(T (W + log T)) time."""
    k, v = joined(k, v, mask, average, logsum, keys, values)
    return over_window(q, k, v, bias[..., None], causal)


@aft_local.form
def parallel(q, k, v, bias, mask, average, logsum, keys, values, causal):
    """aft_full's, with biases of 0 outside the window: O(T²) time and memory."""
    k, v = joined(k, v, mask, average, logsum, keys, values)
    lag, inside, ahead = lags_of_pairs(q, k, bias.shape[1], causal)
    rows = namespace(q.data).arange(q.shape[1])[:, None]
    whole = where(inside, bias[rows, lag], 0.0)[..., None]  # (4) w [T S 1]
    return over_pairs(q, k, v, whole, seen_keys(q, k, causal)), *past_after(k, v, bias.shape[1] - 1 - ahead)


aft_local.kernel("cpu", name="step", module="minitv.ops.aft.cpu_step", prefix="local_", sizes={"T": 1})
aft_local.kernel("cpu", prefix="local_")
aft_local.kernel("cuda", prefix="local_")


@special_case(aft_local, "aft_full", "biases outside a band are 0")
def _(case, draw):
    step, window = np.arange(case.q.shape[1]), case.bias.shape[1]
    lag = step[:, None] - step + negative_lags(window, case.causal)
    inside = (lag >= 0) & (lag < window)
    bias = np.where(inside, np.take_along_axis(case.bias, np.where(inside, lag, 0), axis=1), 0)
    assert_close(case.anew().y, case.defined_by(aft_full, bias=bias).y,
                 "aft_local is not aft_full with the bias of its window", terms=16)


@becomes(aft_local, "aft_simple", "the biases are 0")
def no_bias_is_simple(case, draw):
    if case.k.shape == case.v.shape:
        assert_close(case.anew(bias=0.0).y, case.defined_by(aft_simple).y, "without bias this is not aft_simple", terms=16)


@aft_local.validate
def _(q, k, v, bias, mask, average, logsum, keys, values, causal):
    check_state("aft_local", average, logsum, keys, values)
    check_window("aft_local", bias, causal, keys)


@aft_local.inputs
def _(draw):
    shape = batch, length, channels = draw.size(0, 2, "B"), draw.size(0, 7, "T"), draw.size(0, 3, "C")
    causal = draw.boolean()
    window = draw.size(1, 4, "W") if causal else 2 * draw.size(1, 3) - 1
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = draw_state(draw, batch, channels, channels, window - 1 - negative_lags(window, causal))
    return (draw.floats(*shape), draw_keys(draw, *shape), draw.floats(*shape), draw_bias(draw, length, window), mask,
            *state), {"causal": causal}
