"""aft_simple: no bias, so the mean of the past is a running mean (Zhai et al. 2021, arXiv 2105.14103, equation 5).

    N_t = N_{t-1} + e^(k_t) v_t,    Z_t = Z_{t-1} + e^(k_t),    y_t = sigmoid(q_t) N_t / Z_t          in each channel

N and Z are prefix sums, so a sequence needs O(T) time. Both overflow where keys are large. What is kept instead is the average
N_t / Z_t and the logsum ln Z_t. To add a position is to take the mean of two values, with the logsum and the key as exponents:

    logsum_t = ln(e^(logsum_{t-1}) + e^(k_t)),    average_t = e^(logsum_{t-1} - logsum_t) average_{t-1} + e^(k_t - logsum_t) v_t

minitv/ops/aft/__init__.py has the gradients and what all AFT operators share.
"""

from __future__ import annotations

import numpy as np

from autograd.laws import causal, independent, linear_in, shift_invariant, special_case, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, sigmoid, stack

from .common import (
    check_state,
    draw_keys,
    everything,
    gate,
    joined,
    masked,
    mean_of,
    merged,
    over_pairs,
    past_after,
    prefixes,
    seen_keys,
    state_after,
    weighted,
    within_the_values,
)
from .full import aft_full


@op("q[B T C], k[B T C], v[B T C], mask?:bool[B T], average?[B C], logsum?[B C] -> y[B T C], average[B C], logsum[B C]",
    laws=[causal("q k v", causal=True), independent("B C"), linear_in("v"), streams(causal=True), masked,
          within_the_values("v average"),
          shift_invariant("k logsum", "all keys", moves="logsum", large=False),
          shift_invariant("k logsum", "all keys", moves="logsum", except_for=("scan", "recurrent"))])  # which add up logsums
def aft_simple(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    """y_t = sigmoid(q_t) Σ_s e^(k_s) v_s / Σ_s e^(k_s) over s ≤ t, or without ``causal`` over all s; also the state at the end.

    q, k, v [B T C], mask[B T]. average and logsum [B C] are the state that an earlier call returned: both or neither, else
    ShapeError.
    """
    k, v = everything(k, v, mask, average, logsum)
    past, y = k.shape[1] - q.shape[1], np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        stop = past + t + 1 if causal else k.shape[1]
        y[b, t, c] = gate(q[b, t, c]) * mean_of(k[b, :stop, c].tolist(), v[b, :stop, c])[0]  # (5)
    return y, *state_after(k, v, 0)[:2]


@aft_simple.form
def scan(q, k, v, mask, average, logsum, causal):
    """The averages and logsums of all prefixes at once, in log₂ T doublings (Hillis and Steele 1986): O(T log T) time."""
    k, v = joined(k, v, mask, average, logsum)
    average, logsum, *_ = past_after(k, v, 0)
    mean = merged(prefixes(k, v)[0])[:, k.shape[1] - q.shape[1]:] if causal else average[:, None]
    return sigmoid(q) * mean, average, logsum  # (5) [B T C], [B C], [B C]


@aft_simple.form
def recurrent(q, k, v, mask, average, logsum, causal):
    """The recurrence above, one position after the other, as a model generates text: O(T) time and a state of 2 C numbers."""
    k, v = joined(k, v, mask, average, logsum)
    average, logsum = weighted(k[:, :0], v[:, :0], axis=1)
    means = [v[:, :0]]
    for t in range(k.shape[1]):
        average, logsum = weighted(stack([logsum, k[:, t]]), stack([average, v[:, t]]), axis=0)  # [B C 1], [B C]
        means.append(average[:, None])
    means = concat(means, axis=1)[:, k.shape[1] - q.shape[1]:] if causal else average[:, None]
    return sigmoid(q) * merged(means), merged(average), logsum  # (5)


@aft_simple.form
def parallel(q, k, v, mask, average, logsum, causal):
    """A softmax of k_s over s for every position t, as the paper writes (5): O(B T² C) time and memory."""
    k, v = joined(k, v, mask, average, logsum)
    return over_pairs(q, k, v, None, seen_keys(q, k, causal)), *past_after(k, v, 0)[:2]


aft_simple.kernel("cpu", name="step", module="minitv.ops.aft.cpu_step", prefix="simple_", sizes={"T": 1})
aft_simple.kernel("cpu", prefix="simple_")
aft_simple.kernel("cuda", prefix="simple_")


@special_case(aft_simple, "aft_full", "the biases are 0")
def _(case, draw):
    full = case.defined_by(aft_full, bias=np.zeros((case.q.shape[1],) * 2, case.q.dtype)).y
    assert_close(case.anew().y, full, "aft_simple is not aft_full without bias", terms=16)


@aft_simple.validate
def _(q, k, v, mask, average, logsum, causal):
    check_state("aft_simple", average, logsum)


@aft_simple.inputs
def _(draw):
    shape = batch, length, channels = draw.size(0, 2, "B"), draw.size(0, 7, "T"), draw.size(0, 3, "C")
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = (draw.floats(batch, channels), draw.floats(batch, channels)) if draw.boolean() else (None, None)
    return (draw.floats(*shape), draw_keys(draw, *shape), draw.floats(*shape), mask, *state), {"causal": draw.boolean()}
