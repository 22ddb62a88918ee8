"""AFT, the attention free transformer: every channel takes a weighted mean. Zhai et al. 2021, arXiv 2105.14103.

    y_t = sigmoid(q_t) · Σ_s e^(k_s + w_ts) v_s / Σ_s e^(k_s + w_ts)         each channel for itself; eq. 2

over all positions s, or with ``causal`` over s <= t. The operators differ in the bias w of position s as seen from t:

    aft_full     any number                                                            eq. 2
    aft_local    any number within a window around t, 0 outside                        eq. 4
    aft_simple   0                                                                     eq. 5
    aft_conv     a function of t - s within a window, 0 outside; one key for all channels of a head     eq. 6
    aft_conv2d   the same for the pixels of an image

Outside the window the bias is 0, not -∞: what is far away still counts, with weight e^k. The paper writes eq. 6 as a sum over
everything plus window terms with e^w - 1. Where w is very negative that difference of large numbers leaves no digits in
float32, so here all terms are positive: the sum of what has left the window, and the terms of what is in it.

A position that sees no key gives 0 with gradient 0. A ``mask``, True where a key is seen, means keys of -∞ and values of 0
elsewhere. The past enters a call as its *state*: the ``average`` of what has left the window and its ``logsum``, ln Σ e^k,
which together count as one more value and its key; and the newest ``keys`` and ``values``, which the next position still sees
in its window (a key that never was is -∞).
"""

from __future__ import annotations

import math

import numpy as np

from autograd.check import assert_close
from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import causal, identity, independent, linear_in, streams
from autograd.op import op
from autograd.ops import (
    concat,
    exp,
    flip,
    log,
    logsumexp,
    matmul,
    pad,
    reshape,
    sigmoid,
    softmax,
    stack,
    sum,
    swapaxes,
    transpose,
    where,
)

from ..attention import visible

INF = math.inf
SPAN = 60.0  # a product of two numbers of at least e^-60 and at most 1 is exact to rounding in float32, their sums too


# -- arrays: what the definitions share --------------------------------------------------------------------------------
def _gate(x):
    return 1 / (1 + np.exp(-x))


def _mean_of(exponents, values):
    """Σ e^x v / Σ e^x and ln Σ e^x of lists; of nothing 0 and -∞."""
    top = max(exponents, default=-INF)
    if top == -INF:
        return 0.0, -INF
    weights = [math.exp(x - top) for x in exponents]
    total = math.fsum(weights)
    return np.dot(weights, values) / total, top + math.log(total)


def everything(k, v, mask, average=None, logsum=None, keys=None, values=None):
    """The keys and values of a call in one array each, from the oldest: the average, the newest of the past, the present."""
    if mask is not None:
        k, v = np.where(mask[..., None], k, k.dtype.type(-INF)), np.where(mask[..., None], v, v.dtype.type(0))
    if average is not None:
        k = np.concatenate([logsum[:, None], k] if keys is None else [logsum[:, None], keys, k], axis=1)
        v = np.concatenate([average[:, None], v] if keys is None else [average[:, None], values, v], axis=1)
    return k, v


def newest(x, count, missing):
    """The newest ``count`` of x[B S C], after as many missing ones as there are too few."""
    return np.pad(x, ((0, 0), (count, 0), (0, 0)), constant_values=missing)[:, x.shape[1]:]


def _state_after(k, v, reach):
    """average, logsum, keys and values after everything, of which the ``reach`` newest have not left the window."""
    left, size = max(k.shape[1] - reach, 0), v.shape[2] // max(k.shape[2], 1)
    average, logsum = np.zeros((v.shape[0], v.shape[2]), v.dtype), np.zeros((k.shape[0], k.shape[2]), k.dtype)
    for b, h in np.ndindex(logsum.shape):
        part = slice(h * size, (h + 1) * size)
        average[b, part], logsum[b, h] = _mean_of(k[b, :left, h].tolist(), v[b, :left, part])
    return average, logsum, newest(k, reach, -INF), newest(v, reach, 0)


# -- Tensors: what the forms share, for keys [.. H] and values [.. H D] of heads with one key --------------------------
def _heads(v, heads):
    return reshape(v, (*v.shape[:-1], heads, v.shape[-1] // max(heads, 1)))


def _merge(v):
    return reshape(v, (*v.shape[:-2], v.shape[-2] * v.shape[-1]))


def _joined(k, v, mask, average=None, logsum=None, keys=None, values=None):
    """``everything``, in heads."""
    if mask is not None:
        k, v = where(mask[..., None], k, -INF), where(mask[..., None], v, 0.0)
    if average is not None:
        k = concat([logsum[:, None], k] if keys is None else [logsum[:, None], keys, k], axis=1)
        v = concat([average[:, None], v] if keys is None else [average[:, None], values, v], axis=1)
    return k, _heads(v, k.shape[-1])


def _mean(exponents, v, axis):
    """Σ softmax(exponents) v and ln Σ e^exponents over an axis."""
    return sum(softmax(exponents, axis=axis)[..., None] * v, axis=axis), logsumexp(exponents, axis=axis)


def _padded(x, before, after=0, missing=0.0):
    return pad(x, widths=((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)), value=missing)


def _running(k, v):
    """The mean and the logsum of every prefix in log₂ S doublings."""
    step, length = 1, k.shape[1]
    while step < length:
        earlier = _padded(v[:, :-step], step), _padded(k[:, :-step], step, missing=-INF)
        v, k = _mean(stack([earlier[1], k]), stack([earlier[0], v]), axis=0)
        step *= 2
    return v, k


def _after(k, v, reach):
    """``_state_after`` of heads."""
    length = k.shape[1]
    left = max(length - reach, 0)
    average, logsum = _mean(k[:, :left], v[:, :left], axis=1)
    return _merge(average), logsum, _padded(k, reach, missing=-INF)[:, length:], _merge(_padded(v, reach)[:, length:])


def _pairs(q, k, v, bias, seen):
    """y by a softmax over all pairs of positions, [B T S H]; the bias is [T S H], or 1 for H, or None."""
    exponents = where(seen[..., None], k[:, None] if bias is None else k[:, None] + bias, -INF)
    return sigmoid(q) * _merge(_mean(exponents, v[:, None], axis=2)[0])


def _lagged(q, k, v, bias, causal):
    """y for a bias[T W H], where 1 may stand for T and for H, and the state after it.

    What has left the window comes from a scan that lags behind, what is in it is added lag by lag.
    """
    length, window, past, ahead = q.shape[1], bias.shape[1], k.shape[1] - q.shape[1], _ahead(bias.shape[1], causal)
    reach = window - 1 - ahead
    first = max(past - reach, 0)  # the oldest key in the window of position 0
    near_k, near_v = (_padded(x, max(reach - past, 0), ahead, missing) for x, missing in ((k, -INF), (v, 0.0)))
    terms = [(near_k[:, first + window - 1 - j:][:, :length] + bias[:, j], near_v[:, first + window - 1 - j:][:, :length])
             for j in range(window)]
    far_v, far_k = (_padded(x, reach + 1 - past, missing=missing) if past <= reach else x
                    for x, missing in zip(_running(k, v), (0.0, -INF), strict=True))
    terms.append((far_k[:, :length], far_v[:, :length]))
    if not causal:
        far_v, far_k = (_padded(flip(x, axis=1), 0, ahead + 1, missing)[:, past + ahead + 1:]
                        for x, missing in zip(_running(flip(k, axis=1), flip(v, axis=1)), (0.0, -INF), strict=True))
        terms.append((far_k, far_v))
    exponents, values = (stack(list(x), axis=1) for x in zip(*terms, strict=True))
    return sigmoid(q) * _merge(_mean(exponents, values, axis=1)[0]), *_after(k, v, reach)


# -- what the declarations share ---------------------------------------------------------------------------------------
def _ahead(window, causal):
    """How many lags of a window are negative, positions after t."""
    return 0 if causal else window // 2


def _seen(q, k, causal):
    """Which keys each position sees; past keys come first."""
    xp, (queries, keys) = namespace(q.data), (q.shape[1], k.shape[1])
    return visible(queries, keys, causal, None, xp) if causal else xp.ones((queries, keys), bool)


def _lags(q, k, window, causal):
    """For all pairs of positions the index of their lag in the window, 0 outside; whether they are inside."""
    xp, ahead = namespace(q.data), _ahead(window, causal)
    lag = xp.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] + ahead - xp.arange(k.shape[1])
    inside = (lag >= 0) & (lag < window)
    return xp.where(inside, lag, 0), inside, ahead


def _check_heads(name, q, k):
    if not k.shape[-1] or q.shape[-1] % k.shape[-1]:
        raise ShapeError(f"{name}: k {k.shape} has H = {k.shape[-1]} heads, which do not divide C = {q.shape[-1]} channels")


def _check_state(name, *state):
    if len({x is None for x in state}) > 1:
        raise ShapeError(f"{name}: the parts of a state are given together or not at all")


def _check_window(name, bias, causal, keys):
    window = bias.shape[1]
    if not window or not (causal or window % 2):
        raise ShapeError(f"{name}: bias {bias.shape} has W = {window} lags, allowed: from 1, and odd numbers if not causal")
    reach = window - 1 - _ahead(window, causal)
    if keys is not None and keys.shape[1] != reach:
        raise ShapeError(f"{name}: keys {keys.shape} has P = {keys.shape[1]}, but the window has {reach} positive lags")


def _draw_keys(draw, batch, length, heads):
    """Keys near 0, up to ±100, or rising by 120 over the sequence."""
    kind = draw.integer(0, 2)
    if kind == 0:
        return draw.floats(batch, length, heads, low=-100.0, high=100.0)
    rise = np.linspace(-60, 60, length)[:, None] if kind == 1 else 0
    return draw.layout((draw.floats(batch, length, heads) + rise).astype(draw.dtype))


def _draw_bias(draw, *shape):
    """Biases near 0, or down to where e^w - 1 is -1 in float32."""
    return draw.floats(*shape) if draw.boolean() else draw.floats(*shape, low=-30.0, high=5.0)


def _draw_state(draw, batch, heads, channels, reach):
    """Nothing, or average, logsum, keys and values, of which the oldest may never have been."""
    if draw.boolean():
        return None, None, None, None
    there = (np.arange(reach) >= draw.size(0, 2))[:, None]
    keys = np.where(there, draw.floats(batch, reach, heads), -INF).astype(draw.dtype)
    values = np.where(there, draw.floats(batch, reach, channels), 0).astype(draw.dtype)
    return draw.floats(batch, channels), draw.floats(batch, heads), keys, values


# -- laws --------------------------------------------------------------------------------------------------------------
def _only_differences(what, *positions):
    """A constant added to the inputs at these positions changes nothing."""

    def check(args, params, run, draw):
        moved = tuple(x if x is None or i not in positions else x + x.dtype.type(3) for i, x in enumerate(args))
        message = f"y depends on more than the differences of {what}"
        assert_close(run(moved, params)[0], run(args, params)[0], message, terms=64)

    return identity(f"a constant added to all {what} changes nothing", check)


def _within_the_values(*positions):
    """The inputs at these positions, the values of present and past, bound y."""

    def check(args, params, run, draw):
        largest = [float(np.max(np.abs(args[i]), initial=0)) for i in positions if args[i] is not None]
        assert (np.abs(run(args, params)[0]) <= max(largest) * (1 + 1e-5)).all(), "y is larger than any value"

    return identity("y is within the values", check)


def _masked_is_absent(args, params, run, draw):
    q, k, v, *rest = args
    hidden = next((~x[..., None] for x in rest if x is not None and x.dtype == bool), np.zeros((*k.shape[:-1], 1), bool))
    others = [np.where(hidden, draw.floats(*x.shape), x) for x in (k, v)]
    assert_close(run((q, *others, *rest), params)[0], run(args, params)[0], "a masked position is seen")


masked = identity("what is masked is not seen", _masked_is_absent)


# -- simple ------------------------------------------------------------------------------------------------------------
def _simple_is_full(args, params, run, draw):
    q, k, v, mask, *_ = args
    y = run((q, k, v, mask, None, None), params)[0]
    full = aft_full.definition(q, k, v, np.zeros((q.shape[1],) * 2, q.dtype), mask, causal=params["causal"])
    assert_close(y, full, "aft_simple is not aft_full without bias", terms=16)


@op("q[B T C], k[B T C], v[B T C], mask?:bool[B T], average?[B C], logsum?[B C] -> y[B T C], average[B C], logsum[B C]",
    laws=[causal("q k v", when="causal"), independent("B C"), linear_in("v"), streams(when="causal"), masked,
          _within_the_values(2, 4),
          _only_differences("keys", 1, 5), identity("aft_full without bias", _simple_is_full)])
def aft_simple(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    """y_t = sigmoid(q_t) Σ_s e^(k_s) v_s / Σ_s e^(k_s) over s <= t, or over all s; and the state after the last step.

    q, k, v [B T C], mask[B T]; average and logsum [B C] are the state that an earlier call returned.
    """
    k, v = everything(k, v, mask, average, logsum)
    past, y = k.shape[1] - q.shape[1], np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        stop = past + t + 1 if causal else k.shape[1]
        y[b, t, c] = _gate(q[b, t, c]) * _mean_of(k[b, :stop, c].tolist(), v[b, :stop, c])[0]
    return y, *_state_after(k, v, 0)[:2]


@aft_simple.form
def scan(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    """Means and logsums of all prefixes at once, in log₂ T doublings (Hillis and Steele 1986)."""
    k, v = _joined(k, v, mask, average, logsum)
    average, logsum, *_ = _after(k, v, 0)
    mean = _merge(_running(k, v)[0])[:, k.shape[1] - q.shape[1]:] if causal else average[:, None]
    return sigmoid(q) * mean, average, logsum


@aft_simple.form
def recurrent(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    """One position after the other, as in generation: O(1) memory."""
    k, v = _joined(k, v, mask, average, logsum)
    average, logsum = _mean(k[:, :0], v[:, :0], axis=1)
    means = [v[:, :0]]
    for t in range(k.shape[1]):
        average, logsum = _mean(stack([logsum, k[:, t]]), stack([average, v[:, t]]), axis=0)
        means.append(average[:, None])
    means = concat(means, axis=1)[:, k.shape[1] - q.shape[1]:] if causal else average[:, None]
    return sigmoid(q) * _merge(means), _merge(average), logsum


@aft_simple.form
def parallel(q, k, v, mask=None, average=None, logsum=None, *, causal=True):
    """All pairs of positions, a [B T S C] array."""
    k, v = _joined(k, v, mask, average, logsum)
    return _pairs(q, k, v, None, _seen(q, k, causal)), *_after(k, v, 0)[:2]


aft_simple.kernel("cpu", "minitv.ops.aft.cpu", prefix="simple_")


@aft_simple.validate
def _(q, k, v, mask, average, logsum, *, causal):
    _check_state("aft_simple", average, logsum)


@aft_simple.inputs
def _(draw):
    shape = batch, length, channels = draw.size(0, 2), draw.size(0, 7), draw.size(0, 3)
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = (draw.floats(batch, channels), draw.floats(batch, channels)) if draw.boolean() else (None, None)
    return (draw.floats(*shape), _draw_keys(draw, *shape), draw.floats(*shape), mask, *state), {"causal": draw.boolean()}


# -- full --------------------------------------------------------------------------------------------------------------
def _later_keys(args, params, run, draw):
    q, k, v, bias, mask = args
    if not min(k.shape[1], q.shape[1]):
        return
    others = [np.concatenate([x[:, :-1], draw.floats(x.shape[0], 1, x.shape[2])], axis=1) for x in (k, v)]
    y, other = (run((q, *pair, bias, mask), {**params, "causal": True})[0] for pair in ((k, v), others))
    assert_close(other[:, :-1], y[:, :-1], "with causal, more than the last position sees the last key")


def _order_of_keys(args, params, run, draw):
    q, k, v, bias, mask = args
    order = draw.generator().permutation(k.shape[1])
    y = run(args, {**params, "causal": False})[0]
    other = run((q, k[:, order], v[:, order], bias[:, order], None if mask is None else mask[:, order]),
                {**params, "causal": False})[0]
    assert_close(other, y, "aft_full depends on the order of keys", terms=16)


@op("q[B T C], k[B S C], v[B S C], bias[T S], mask?:bool[B S] -> y[B T C]",
    laws=[independent("B C"), linear_in("v"), masked,
          _within_the_values(2), _only_differences("keys", 1), _only_differences("biases", 3),
          identity("with causal, only the last position sees the last key", _later_keys),
          identity("without, the order of keys does not matter", _order_of_keys)])
def aft_full(q, k, v, bias, mask=None, *, causal=True, chunk_size=64):
    """y_t = sigmoid(q_t) Σ_s e^(k_s + bias_ts) v_s / Σ_s e^(k_s + bias_ts) over all s, or over s <= t + S - T.

    q[B T C], k and v [B S C], bias[T S], mask[B S]. Of S keys the last belongs to the last of T queries, so with a cache of
    past keys the call continues the sequence. ``chunk_size`` positions are taken together in the tiled form and in the
    kernel; it changes rounding only.
    """
    k, v = everything(k, v, mask)
    y = np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        stop = max(t + 1 + k.shape[1] - q.shape[1], 0) if causal else k.shape[1]
        exponents = (k[b, :stop, c] + bias[t, :stop]).tolist()
        y[b, t, c] = _gate(q[b, t, c]) * _mean_of(exponents, v[b, :stop, c])[0]
    return y


@aft_full.form
def parallel(q, k, v, bias, mask=None, *, causal=True, chunk_size=64):
    """All exponents, a [B T S C] array."""
    k, v = _joined(k, v, mask)
    return _pairs(q, k, v, bias[..., None], _seen(q, k, causal))


@aft_full.form
def tiled(q, k, v, bias, mask=None, *, causal=True, chunk_size=64):
    """Tiles of positions and keys, each by two matrix products; O(T chunk_size) memory.

    A tile on the diagonal adds up its exponents one by one: there the largest key may belong to a position that few see, and
    all weights relative to it may be 0. What the tiles give is merged by its logsums.
    """
    k, v = _joined(k, v, mask)
    seen, (queries, keys) = _seen(q, k, causal), bias.shape
    means = [v[:, :0]]
    for start in range(0, queries, chunk_size):
        rows = slice(start, start + chunk_size)
        last = min(max(start + chunk_size + keys - queries, 0), keys) if causal else keys
        tiles = [_tile(k[:, at:end], v[:, at:end], bias[rows, at:end], seen[rows, at:end])
                 for at in range(0, max(last, 1), chunk_size) for end in [min(at + chunk_size, last)]]
        averages, logsums = (stack(list(x)) for x in zip(*tiles, strict=True))
        means.append(_mean(logsums, averages, axis=0)[0])
    return sigmoid(q) * _merge(concat(means, axis=1))


def _tile(k, v, bias, seen):
    """The mean and the logsum of a tile: by products, unless what is relative to the largest may all be 0."""
    xp = namespace(k.data)
    if bias.data.size and bool(seen.all()) and bool((xp.ptp(bias.data, axis=1) < SPAN).all()):
        row, channel = bias.data.max(axis=1)[:, None], k.data.max(axis=1, keepdims=True)
        if bool(xp.isfinite(channel).all()):
            weights, e = exp(bias - row), exp(k - channel)
            total = matmul(weights, e)
            return _heads(matmul(weights, e * _merge(v)) / total, k.shape[2]), log(total) + (row + channel)
    exponents = where(seen[..., None], k[:, None] + bias[..., None], -INF)
    return _mean(exponents, v[:, None], axis=2)


aft_full.kernel("cpu", "minitv.ops.aft.cpu", prefix="full_")


@aft_full.validate
def _(q, k, v, bias, mask, *, causal, chunk_size):
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise DomainError(f"aft_full: chunk_size must be an integer of at least 1, got {chunk_size!r}")


@aft_full.inputs
def _(draw):
    batch, queries, keys, channels = draw.size(0, 2), draw.size(0, 6), draw.size(0, 7), draw.size(0, 3)
    mask = draw.mask(batch, keys) if draw.boolean() else None
    return (draw.floats(batch, queries, channels), _draw_keys(draw, batch, keys, channels), draw.floats(batch, keys, channels),
            _draw_bias(draw, queries, keys), mask), {"causal": draw.boolean(), "chunk_size": draw.choice((1, 2, 3, 64))}


# -- local -------------------------------------------------------------------------------------------------------------
def _local_is_full(args, params, run, draw):
    q, k, v, bias, mask, *_ = args
    bias, length = bias.copy(), q.shape[1]
    y = run((q, k, v, bias, mask, *(None,) * 4), params)[0]
    lag = np.arange(length)[:, None] - np.arange(length) + _ahead(bias.shape[1], params["causal"])
    inside = (lag >= 0) & (lag < bias.shape[1])
    full = np.where(inside, np.take_along_axis(bias, np.where(inside, lag, 0), axis=1), 0).astype(q.dtype)
    assert_close(y, aft_full.definition(q, k, v, full, mask, causal=params["causal"]),
                 "aft_local is not aft_full with the bias of its window", terms=16)


def _no_bias_is_simple(args, params, run, draw):
    q, k, v, bias, mask, *_ = args
    if k.shape != v.shape:
        return
    y = run((q, k, v, np.zeros_like(bias), mask, *(None,) * 4), params)[0]
    assert_close(y, aft_simple.definition(q, k, v, mask, causal=params["causal"])[0],
                 "without bias this is not aft_simple", terms=16)


@op("q[B T C], k[B T C], v[B T C], bias[T W], mask?:bool[B T], average?[B C], logsum?[B C], keys?[B P C], values?[B P C]"
    " -> y[B T C], average[B C], logsum[B C], keys[B P C], values[B P C]",
    laws=[causal("q k v", when="causal"), independent("B C"), linear_in("v"), streams(when="causal"), masked,
          _within_the_values(2, 5, 8),
          _only_differences("keys", 1, 6, 7), identity("aft_full with a band of biases", _local_is_full),
          identity("without bias, aft_simple", _no_bias_is_simple)])
def aft_local(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """aft_full with biases near the diagonal only: bias[t, j] for the key at t - j, 0 for all that are not in the window.

    q, k, v [B T C], mask[B T]. Causal: bias[T W] over the lags j = 0 .. W-1; else W is odd, bias[t, j] is for the key at
    t + (W-1)/2 - j, and all keys of the call are seen. average and logsum [B C], keys and values [B P C] are the state that
    an earlier call returned; P is the number of positive lags.
    """
    k, v = everything(k, v, mask, average, logsum, keys, values)
    past, window, ahead, y = k.shape[1] - q.shape[1], bias.shape[1], _ahead(bias.shape[1], causal), np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        exponents = k[b, :past + t + 1 if causal else None, c].tolist()
        for j in range(window):
            if 0 <= past + t + ahead - j < len(exponents):
                exponents[past + t + ahead - j] += bias[t, j].item()
        y[b, t, c] = _gate(q[b, t, c]) * _mean_of(exponents, v[b, :len(exponents), c])[0]
    return y, *_state_after(k, v, window - 1 - ahead)


@aft_local.form
def lagged(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """A scan over what has left the window, and the terms of the window: O(T W)."""
    k, v = _joined(k, v, mask, average, logsum, keys, values)
    return _lagged(q, k, v, bias[..., None], causal)


@aft_local.form
def parallel(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """aft_full's, with zeros outside of the window: O(T²)."""
    k, v = _joined(k, v, mask, average, logsum, keys, values)
    lag, inside, ahead = _lags(q, k, bias.shape[1], causal)
    rows = namespace(q.data).arange(q.shape[1])[:, None]
    whole = where(inside, bias[rows, lag], 0.0)[..., None]
    return _pairs(q, k, v, whole, _seen(q, k, causal)), *_after(k, v, bias.shape[1] - 1 - ahead)


aft_local.kernel("cpu", "minitv.ops.aft.cpu", prefix="local_")


@aft_local.validate
def _(q, k, v, bias, mask, average, logsum, keys, values, *, causal):
    _check_state("aft_local", average, logsum, keys, values)
    _check_window("aft_local", bias, causal, keys)


@aft_local.inputs
def _(draw):
    shape = batch, length, channels = draw.size(0, 2), draw.size(0, 7), draw.size(0, 3)
    causal = draw.boolean()
    window = draw.size(1, 4) if causal else 2 * draw.size(1, 3) - 1
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = _draw_state(draw, batch, channels, channels, window - 1 - _ahead(window, causal))
    return (draw.floats(*shape), _draw_keys(draw, *shape), draw.floats(*shape), _draw_bias(draw, length, window), mask,
            *state), {"causal": causal}


# -- conv --------------------------------------------------------------------------------------------------------------
def _conv_is_local(args, params, run, draw):
    q, k, v, bias, mask, *_ = args
    y, size = run((q, k, v, bias, mask, *(None,) * 4), params)[0], q.shape[2] // bias.shape[0]
    for h in range(bias.shape[0]):
        part = slice(h * size, (h + 1) * size)
        own = np.broadcast_to(bias[h], (q.shape[1], bias.shape[1]))
        key = np.broadcast_to(k[..., h:h + 1], (*k.shape[:2], size))
        local = aft_local.definition(q[..., part], key, v[..., part], own, mask, causal=params["causal"])[0]
        assert_close(y[..., part], local, f"head {h} is not aft_local with the same biases everywhere", terms=16)


@op("q[B T C], k[B T H], v[B T C], bias[H W], mask?:bool[B T], average?[B C], logsum?[B H], keys?[B P H], values?[B P C]"
    " -> y[B T C], average[B C], logsum[B H], keys[B P H], values[B P C]",
    laws=[causal("q k v", when="causal"), independent("B"), linear_in("v"), streams(when="causal"), masked,
          _within_the_values(2, 5, 8),
          _only_differences("keys", 1, 6, 7), identity("a head is aft_local", _conv_is_local),
          identity("without bias, aft_simple", _no_bias_is_simple)])
def aft_conv(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """aft_local with biases that depend on the distance only, and one key for all C / H channels of a head.

    q, v [B T C], k[B T H], mask[B T]. Causal: bias[H W] over the lags 0 .. W-1; else W is odd, bias[h, j] is for the key at
    t + (W-1)/2 - j, and all keys of the call are seen. average[B C], logsum[B H], keys[B P H] and values[B P C] are the state
    that an earlier call returned; P is the number of positive lags.
    """
    k, v = everything(k, v, mask, average, logsum, keys, values)
    past, (heads, window), ahead, y = k.shape[1] - q.shape[1], bias.shape, _ahead(bias.shape[1], causal), np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:2], heads):
        exponents = k[b, :past + t + 1 if causal else None, h].tolist()
        for j in range(window):
            if 0 <= past + t + ahead - j < len(exponents):
                exponents[past + t + ahead - j] += bias[h, j].item()
        part = slice(h * q.shape[2] // heads, (h + 1) * q.shape[2] // heads)
        y[b, t, part] = _gate(q[b, t, part]) * _mean_of(exponents, v[b, :len(exponents), part])[0]
    return y, *_state_after(k, v, window - 1 - ahead)


@aft_conv.form
def lagged(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """A scan over what has left the window, and the terms of the window: O(T W)."""
    k, v = _joined(k, v, mask, average, logsum, keys, values)
    return _lagged(q, k, v, swapaxes(bias)[None], causal)


@aft_conv.form
def parallel(q, k, v, bias, mask=None, average=None, logsum=None, keys=None, values=None, *, causal=True):
    """All pairs of positions, a [B T S H] array: O(T²)."""
    k, v = _joined(k, v, mask, average, logsum, keys, values)
    lag, inside, ahead = _lags(q, k, bias.shape[1], causal)
    whole = where(inside[..., None], swapaxes(bias)[lag], 0.0)
    return _pairs(q, k, v, whole, _seen(q, k, causal)), *_after(k, v, bias.shape[1] - 1 - ahead)


aft_conv.kernel("cpu", "minitv.ops.aft.cpu", prefix="conv_")


@aft_conv.validate
def _(q, k, v, bias, mask, average, logsum, keys, values, *, causal):
    _check_heads("aft_conv", q, k)
    _check_state("aft_conv", average, logsum, keys, values)
    _check_window("aft_conv", bias, causal, keys)


@aft_conv.inputs
def _(draw):
    batch, length, heads, size = draw.size(0, 2), draw.size(0, 7), draw.size(1, 3), draw.size(1, 2)
    shape, causal = (batch, length, heads * size), draw.boolean()
    window = draw.size(1, 4) if causal else 2 * draw.size(1, 3) - 1
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = _draw_state(draw, batch, heads, heads * size, window - 1 - _ahead(window, causal))
    return (draw.floats(*shape), _draw_keys(draw, batch, length, heads), draw.floats(*shape), _draw_bias(draw, heads, window),
            mask, *state), {"causal": causal}


# -- conv2d ------------------------------------------------------------------------------------------------------------
def _one_row_is_conv(args, params, run, draw):
    q, k, v, bias, mask = args
    if not q.shape[1]:
        return
    row = [None if x is None else x[:, :1] for x in (q, k, v, mask)]
    y = run((*row[:3], bias, row[3]), params)[0]
    flat = [None if x is None else x[:, 0] for x in row]
    conv = aft_conv.definition(*flat[:3], bias[:, bias.shape[1] // 2], flat[3], causal=False)[0]
    assert_close(y[:, 0], conv, "an image of one row is not aft_conv", terms=16)


@op("q[B Y X C], k[B Y X H], v[B Y X C], bias[H M N], mask?:bool[B Y X] -> y[B Y X C]",
    laws=[independent("B"), linear_in("v"), masked,
          _within_the_values(2), _only_differences("keys", 1),
          identity("an image of one row, aft_conv", _one_row_is_conv)])
def aft_conv2d(q, k, v, bias, mask=None):
    """aft_conv for the pixels of an image, all of which are seen: bias[h, i, j] for the key at (y + M//2 - i, x + N//2 - j).

    q, v [B Y X C], k[B Y X H], bias[H M N] with odd M and N, mask[B Y X].
    """
    k, v = everything(k, v, mask)
    (_, rows, columns, channels), (heads, height, width), out = q.shape, bias.shape, np.zeros_like(q)
    for b, y, x, h in np.ndindex(*q.shape[:3], heads):
        exponents = k[b, :, :, h].copy()
        for i, j in np.ndindex(height, width):
            at = y + height // 2 - i, x + width // 2 - j
            if 0 <= at[0] < rows and 0 <= at[1] < columns:
                exponents[at] += bias[h, i, j]
        part = slice(h * channels // heads, (h + 1) * channels // heads)
        mean, _ = _mean_of(exponents.ravel().tolist(), v[b, :, :, part].reshape(rows * columns, -1))
        out[b, y, x, part] = _gate(q[b, y, x, part]) * mean
    return out


@aft_conv2d.form
def parallel(q, k, v, bias, mask=None):
    """All pairs of pixels, a [B Y·X Y·X H] array."""
    xp, (batch, rows, columns) = namespace(q.data), q.shape[:3]
    k, v = _joined(k, v, mask)
    pixels = xp.arange(rows * columns)
    lags = [at[:, None] - at + size // 2 for at, size in zip(divmod(pixels, max(columns, 1)), bias.shape[1:], strict=True)]
    inside = [(lag >= 0) & (lag < size) for lag, size in zip(lags, bias.shape[1:], strict=True)]
    i, j = (xp.where(inside[0] & inside[1], lag, 0) for lag in lags)
    whole = where((inside[0] & inside[1])[..., None], transpose(bias, (1, 2, 0))[i, j], 0.0)
    flat = [reshape(x, (batch, rows * columns, *x.shape[3:])) for x in (q, k, v)]
    return reshape(_pairs(*flat, whole, xp.ones(whole.shape[:2], bool)), q.shape)


aft_conv2d.kernel("cpu", "minitv.ops.aft.cpu", prefix="conv2d_")


@aft_conv2d.validate
def _(q, k, v, bias, mask):
    _check_heads("aft_conv2d", q, k)
    if not all(size % 2 for size in bias.shape[1:]):
        raise ShapeError(f"aft_conv2d: bias {bias.shape} needs an odd number of rows M and of columns N")


@aft_conv2d.inputs
def _(draw):
    lead, heads, size = (draw.size(0, 2), draw.size(0, 3), draw.size(0, 3)), draw.size(1, 2), draw.size(1, 2)
    mask = draw.mask(*lead) if draw.boolean() else None
    keys = _draw_keys(draw, lead[0], lead[1] * lead[2], heads).reshape(*lead, heads)
    bias = _draw_bias(draw, heads, 2 * draw.size(1, 2) - 1, 2 * draw.size(1, 2) - 1)
    return (draw.floats(*lead, heads * size), keys, draw.floats(*lead, heads * size), bias, mask), {}


# -- the bias of aft_local from its factors ----------------------------------------------------------------------------
@op("u[T R], v[S R] -> bias[T W]", laws=[linear_in("u"), linear_in("v")], analytic=True)
def banded_product(u, v, *, window=32, causal=True):
    """The part of u vᵀ that aft_local takes for its bias: bias[t, j] = u_t · v_s for the lags j of the window.

    Causal: s = t + S - T - j for j = 0 .. window-1; else s = t + S - T + window - 1 - j for j = 0 .. 2 window - 2.
    The last of u belongs to the last of v. Where there is no row s, the bias is 0.
    """
    ahead = 0 if causal else window - 1
    bias = np.zeros((len(u), window + ahead), u.dtype)
    for t, j in np.ndindex(bias.shape):
        s = t + len(v) - len(u) + ahead - j
        if 0 <= s < len(v):
            bias[t, j] = np.dot(u[t], v[s])
    return bias


@banded_product.form
def composed(u, v, *, window=32, causal=True):
    xp, ahead = namespace(u.data), 0 if causal else window - 1
    rows = xp.arange(u.shape[0])[:, None]
    s = rows + v.shape[0] - u.shape[0] + ahead - xp.arange(window + ahead)
    inside = (s >= 0) & (s < v.shape[0])
    if not v.shape[0]:
        v = pad(v, widths=((0, 1), (0, 0)))
    return where(inside, matmul(u, swapaxes(v))[rows, xp.where(inside, s, 0)], 0.0)


banded_product.kernel("cpu", "minitv.ops.aft.cpu", prefix="band_")


@banded_product.validate
def _(u, v, *, window, causal):
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise DomainError(f"banded_product: window must be an integer of at least 1, got {window!r}")


@banded_product.inputs
def _(draw):
    rank, queries = draw.size(0, 4), draw.size(0, 6)
    params = {"window": draw.integer(1, 4), "causal": draw.boolean()}
    return (draw.floats(queries, rank), draw.floats(draw.size(0, 7), rank)), params
