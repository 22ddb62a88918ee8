"""aft_simple: no bias, a running mean."""

from __future__ import annotations

import numpy as np

from autograd.laws import causal, identity, independent, linear_in, shift_invariant, streams
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


def _simple_is_full(case, draw):
    full = case.defined_by(aft_full, bias=np.zeros((case.q.shape[1],) * 2, case.q.dtype)).y
    assert_close(case.anew().y, full, "aft_simple is not aft_full without bias", terms=16)


@op("q[B T C], k[B T C], v[B T C], mask?:bool[B T], average?[B C], logsum?[B C] -> y[B T C], average[B C], logsum[B C]",
    laws=[causal("q k v", causal=True), independent("B C"), linear_in("v"), streams(causal=True), masked,
          within_the_values("v average"),
          shift_invariant("k logsum", "all keys", moves="logsum", large=False),
          shift_invariant("k logsum", "all keys", moves="logsum", except_for=("scan", "recurrent")),  # which add up logsums
          identity("aft_full without bias", _simple_is_full)])
def aft_simple(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    """y_t = sigmoid(q_t) Σ_s e^(k_s) v_s / Σ_s e^(k_s) over s <= t, or over all s; and the state after the last step.

    q, k, v [B T C], mask[B T]; average and logsum [B C] are the state that an earlier call returned.
    """
    k, v = everything(k, v, mask, average, logsum)
    past, y = k.shape[1] - q.shape[1], np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        stop = past + t + 1 if causal else k.shape[1]
        y[b, t, c] = gate(q[b, t, c]) * mean_of(k[b, :stop, c].tolist(), v[b, :stop, c])[0]
    return y, *state_after(k, v, 0)[:2]


@aft_simple.form
def scan(q, k, v, mask, average, logsum, causal):
    """Means and logsums of all prefixes at once, in log₂ T doublings (Hillis and Steele 1986)."""
    k, v = joined(k, v, mask, average, logsum)
    average, logsum, *_ = past_after(k, v, 0)
    mean = merged(prefixes(k, v)[0])[:, k.shape[1] - q.shape[1]:] if causal else average[:, None]
    return sigmoid(q) * mean, average, logsum


@aft_simple.form
def recurrent(q, k, v, mask, average, logsum, causal):
    """One position after the other, as in generation: O(1) memory."""
    k, v = joined(k, v, mask, average, logsum)
    average, logsum = weighted(k[:, :0], v[:, :0], axis=1)
    means = [v[:, :0]]
    for t in range(k.shape[1]):
        average, logsum = weighted(stack([logsum, k[:, t]]), stack([average, v[:, t]]), axis=0)
        means.append(average[:, None])
    means = concat(means, axis=1)[:, k.shape[1] - q.shape[1]:] if causal else average[:, None]
    return sigmoid(q) * merged(means), merged(average), logsum


@aft_simple.form
def parallel(q, k, v, mask, average, logsum, causal):
    """All pairs of positions, a [B T S C] array."""
    k, v = joined(k, v, mask, average, logsum)
    return over_pairs(q, k, v, None, seen_keys(q, k, causal)), *past_after(k, v, 0)[:2]


aft_simple.kernel("cpu", prefix="simple_")
aft_simple.kernel("cuda", prefix="simple_")


@aft_simple.validate
def _(q, k, v, mask, average, logsum, causal):
    check_state("aft_simple", average, logsum)


@aft_simple.inputs
def _(draw):
    shape = batch, length, channels = draw.size(0, 2), draw.size(0, 7), draw.size(0, 3)
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = (draw.floats(batch, channels), draw.floats(batch, channels)) if draw.boolean() else (None, None)
    return (draw.floats(*shape), draw_keys(draw, *shape), draw.floats(*shape), mask, *state), {"causal": draw.boolean()}
