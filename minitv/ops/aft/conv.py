"""aft_conv: biases of the distance within a window, one key for all channels of a head (Zhai et al. 2021, 2105.14103, eq. 6).

    N_t = (conv(e^k v, e^w - 1))_t + Σ_{s ≤ t} e^(k_s) v_s,    Z_t = (conv(e^k, e^w - 1))_t + Σ_{s ≤ t} e^(k_s)          (6)
    y_t = sigmoid(q_t) N_t / Z_t,    conv(x, f)_t = Σ_{j < W} f_j x_{t-j}                                    causal, each head

The sums over the past give every key the weight e^k, and the convolution with e^w - 1 corrects the keys in the window to
e^(k + w). The forms add the same terms as aft_local does, because (6) subtracts large numbers where w is very negative.
minitv/ops/aft/__init__.py has the gradients and what all AFT operators share.
"""

from __future__ import annotations

import numpy as np

from autograd.laws import becomes, causal, independent, linear_in, shift_invariant, special_case, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import swapaxes, where

from .common import (
    check_heads,
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
from .local import aft_local, no_bias_is_simple


@op("q[B T C], k[B T H], v[B T C], bias[H W], mask?:bool[B T], average?[B C], logsum?[B H], keys?[B P H], values?[B P C]"
    " -> y[B T C], average[B C], logsum[B H], keys[B P H], values[B P C]",
    laws=[causal("q k v", causal=True), independent("B"), linear_in("v"), streams(causal=True), masked,
          within_the_values("v average values"),
          shift_invariant("k logsum keys", "all keys", moves="logsum keys", large=False),
          shift_invariant("k logsum keys", "all keys", moves="logsum keys", except_for=("lagged",))])  # which adds up logsums
def aft_conv(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """aft_local with biases that depend on the distance alone, and one key for all C / H channels of a head.

    q, v [B T C], k[B T H], mask[B T]. With ``causal`` bias[H W] has the lags 0 .. W-1. Without, W is odd, bias[h, j] belongs
    to the key at t + (W-1)/2 - j, and all keys of the call are seen. average[B C], logsum[B H], keys[B P H] and values[B P C]
    are the state that an earlier call returned, where P is the number of positive lags: all or none, else ShapeError, which
    also says that H does not divide C.
    """
    k, v = everything(k, v, mask, average, logsum, keys, values)
    past, (heads, window), y = k.shape[1] - q.shape[1], bias.shape, np.zeros_like(q)
    ahead = negative_lags(window, causal)
    for b, t, h in np.ndindex(*q.shape[:2], heads):
        exponents = k[b, :past + t + 1 if causal else None, h].tolist()
        for j in range(window):
            if 0 <= past + t + ahead - j < len(exponents):
                exponents[past + t + ahead - j] += bias[h, j].item()
        part = slice(h * q.shape[2] // heads, (h + 1) * q.shape[2] // heads)
        y[b, t, part] = gate(q[b, t, part]) * mean_of(exponents, v[b, :len(exponents), part])[0]  # (6)
    return y, *state_after(k, v, window - 1 - ahead)


@aft_conv.form
def lagged(q, k, v, bias, mask, average, logsum, keys, values, causal):
    """A scan over what has left the window, and the window lag by lag: O(T (W + log T)) time."""
    k, v = joined(k, v, mask, average, logsum, keys, values)
    return over_window(q, k, v, swapaxes(bias)[None], causal)


@aft_conv.form
def parallel(q, k, v, bias, mask, average, logsum, keys, values, causal):
    """A softmax over all pairs of positions, [B T S H]: O(T²) time and memory."""
    k, v = joined(k, v, mask, average, logsum, keys, values)
    lag, inside, ahead = lags_of_pairs(q, k, bias.shape[1], causal)
    whole = where(inside[..., None], swapaxes(bias)[lag], 0.0)  # w [T S H]
    return over_pairs(q, k, v, whole, seen_keys(q, k, causal)), *past_after(k, v, bias.shape[1] - 1 - ahead)


aft_conv.kernel("cpu", name="step", module="minitv.ops.aft.cpu_step", prefix="conv_", sizes={"T": 1})
aft_conv.kernel("cpu", prefix="conv_")
aft_conv.kernel("cuda", prefix="conv_")


@special_case(aft_conv, "aft_local", "all positions have the same biases")
def _(case, draw):
    (heads, window), (*lead, channels), y = case.bias.shape, case.q.shape, case.anew().y
    size = channels // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        local = case.defined_by(aft_local, q=case.q[..., part], k=np.broadcast_to(case.k[..., h:h + 1], (*lead, size)),
                                v=case.v[..., part], bias=np.broadcast_to(case.bias[h], (lead[1], window))).y
        assert_close(y[..., part], local, f"head {h} is not aft_local with the same biases everywhere", terms=16)


becomes(aft_conv, "aft_simple", "the biases are 0")(no_bias_is_simple)


@aft_conv.validate
def _(q, k, v, bias, mask, average, logsum, keys, values, causal):
    check_heads("aft_conv", q, k)
    check_state("aft_conv", average, logsum, keys, values)
    check_window("aft_conv", bias, causal, keys)


@aft_conv.inputs
def _(draw):
    batch, length, (heads, channels) = draw.size(0, 2, "B"), draw.size(0, 7, "T"), draw.multiple("H", "C", 1, 3, 1, 2)
    shape, causal = (batch, length, channels), draw.boolean()
    window = draw.size(1, 4, "W") if causal else 2 * draw.size(1, 3) - 1
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = draw_state(draw, batch, heads, channels, window - 1 - negative_lags(window, causal))
    return (draw.floats(*shape), draw_keys(draw, batch, length, heads), draw.floats(*shape), draw_bias(draw, heads, window),
            mask, *state), {"causal": causal}
