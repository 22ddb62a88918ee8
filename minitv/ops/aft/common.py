"""What the operators of the AFT family share: sums of definitions, parts of forms, checks, draws and laws."""

from __future__ import annotations

import math

import numpy as np

from autograd.device import namespace
from autograd.errors import ShapeError
from autograd.laws import identity
from autograd.metric import assert_close
from autograd.ops import concat, flip, logsumexp, pad, reshape, sigmoid, softmax, stack, sum, where

from ..attention import visible
from ..pairs import finite

INF = math.inf


# -- arrays: what the definitions share --------------------------------------------------------------------------------
def gate(x):
    return 1 / (1 + np.exp(-x))


def mean_of(exponents, values):
    """Σ e^x v / Σ e^x and ln Σ e^x of lists; of nothing 0 and -∞."""
    top = float(np.max(exponents, initial=-INF))  # NaN if one is
    if top == -INF:
        return 0.0, -INF
    weights = [math.exp(x - top) for x in exponents]
    total = math.fsum(weights)
    return np.dot(weights, values) / total, top + math.log(total) if top < INF else top


def everything(k, v, mask, average=None, logsum=None, keys=None, values=None):
    """The keys and values of a call in one array each, from the oldest: the average, the newest of the past, the present."""
    xp = namespace(k, v)
    if mask is not None:
        k, v = xp.where(mask[..., None], k, k.dtype.type(-INF)), xp.where(mask[..., None], v, v.dtype.type(0))
    if average is not None:
        k = xp.concatenate([logsum[:, None], k] if keys is None else [logsum[:, None], keys, k], axis=1)
        v = xp.concatenate([average[:, None], v] if keys is None else [average[:, None], values, v], axis=1)
    return k, v


def newest(x, count, missing):
    """The newest ``count`` of x[B S C], after as many missing ones as there are too few."""
    return namespace(x).pad(x, ((0, 0), (count, 0), (0, 0)), constant_values=missing)[:, x.shape[1]:]


def state_after(k, v, reach):
    """average, logsum, keys and values after everything, of which the ``reach`` newest have not left the window."""
    left, size = max(k.shape[1] - reach, 0), v.shape[2] // max(k.shape[2], 1)
    average, logsum = np.zeros((v.shape[0], v.shape[2]), v.dtype), np.zeros((k.shape[0], k.shape[2]), k.dtype)
    for b, h in np.ndindex(logsum.shape):
        part = slice(h * size, (h + 1) * size)
        average[b, part], logsum[b, h] = mean_of(k[b, :left, h].tolist(), v[b, :left, part])
    return average, logsum, newest(k, reach, -INF), newest(v, reach, 0)


# -- Tensors: what the forms share, for keys [.. H] and values [.. H D] of heads with one key --------------------------
def by_head(v, heads):
    return reshape(v, (*v.shape[:-1], heads, v.shape[-1] // max(heads, 1)))


def merged(v):
    return reshape(v, (*v.shape[:-2], v.shape[-2] * v.shape[-1]))


def joined(k, v, mask, average=None, logsum=None, keys=None, values=None):
    """``everything``, in heads."""
    if mask is not None:
        k, v = where(mask[..., None], k, -INF), where(mask[..., None], v, 0.0)
    if average is not None:
        k = concat([logsum[:, None], k] if keys is None else [logsum[:, None], keys, k], axis=1)
        v = concat([average[:, None], v] if keys is None else [average[:, None], values, v], axis=1)
    return k, by_head(v, k.shape[-1])


def weighted(exponents, v, axis):
    """Σ softmax(exponents) v and ln Σ e^exponents over an axis."""
    return sum(softmax(exponents, axis=axis)[..., None] * v, axis=axis), logsumexp(exponents, axis=axis)


def padded(x, before, after=0, missing=0.0):
    return pad(x, widths=((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)), value=missing)


def prefixes(k, v):
    """The mean and the logsum of every prefix in log₂ S doublings."""
    step, length = 1, k.shape[1]
    while step < length:
        earlier = padded(v[:, :-step], step), padded(k[:, :-step], step, missing=-INF)
        v, k = weighted(stack([earlier[1], k]), stack([earlier[0], v]), axis=0)
        step *= 2
    return v, k


def past_after(k, v, reach):
    """``state_after`` of heads."""
    length = k.shape[1]
    left = max(length - reach, 0)
    average, logsum = weighted(k[:, :left], v[:, :left], axis=1)
    return merged(average), logsum, padded(k, reach, missing=-INF)[:, length:], merged(padded(v, reach)[:, length:])


def over_seen(k, v, bias, mask):
    """The mean [B T H D] and the logsum [B T H] of what each position sees; what it does not may be NaN or infinite."""
    exponents = where(mask[..., None], k[:, None] if bias is None else k[:, None] + bias, -INF)
    values = v[:, None] if finite(v) else where(mask[..., None, None], v[:, None], 0.0)
    return weighted(exponents, values, axis=2)


def over_pairs(q, k, v, bias, mask):
    """y by a softmax over all pairs of positions, [B T S H]; the bias is [T S H], or 1 for H, or None."""
    return sigmoid(q) * merged(over_seen(k, v, bias, mask)[0])


def over_window(q, k, v, bias, causal):
    """y for a bias[T W H], where 1 may stand for T and for H, and the state after it.

    What has left the window comes from a scan that lags behind, what is in it is added lag by lag.
    """
    length, window, past, ahead = q.shape[1], bias.shape[1], k.shape[1] - q.shape[1], negative_lags(bias.shape[1], causal)
    reach = window - 1 - ahead
    first = max(past - reach, 0)  # the oldest key in the window of position 0
    near_k, near_v = (padded(x, max(reach - past, 0), ahead, missing) for x, missing in ((k, -INF), (v, 0.0)))
    terms = [(near_k[:, first + window - 1 - j:][:, :length] + bias[:, j], near_v[:, first + window - 1 - j:][:, :length])
             for j in range(window)]
    far_v, far_k = (padded(x, reach + 1 - past, missing=missing) if past <= reach else x
                    for x, missing in zip(prefixes(k, v), (0.0, -INF), strict=True))
    terms.append((far_k[:, :length], far_v[:, :length]))
    if not causal:
        far_v, far_k = (padded(flip(x, axis=1), 0, ahead + 1, missing)[:, past + ahead + 1:]
                        for x, missing in zip(prefixes(flip(k, axis=1), flip(v, axis=1)), (0.0, -INF), strict=True))
        terms.append((far_k, far_v))
    exponents, values = (stack(list(x), axis=1) for x in zip(*terms, strict=True))
    return sigmoid(q) * merged(weighted(exponents, values, axis=1)[0]), *past_after(k, v, reach)


# -- what the declarations share ---------------------------------------------------------------------------------------
def negative_lags(window, causal):
    """How many lags of a window are negative, positions after t."""
    return 0 if causal else window // 2


def seen_keys(q, k, causal):
    """Which keys each position sees; past keys come first."""
    xp, (queries, keys) = namespace(q.data), (q.shape[1], k.shape[1])
    return visible(queries, keys, causal, None, xp) if causal else xp.ones((queries, keys), bool)


def lags_of_pairs(q, k, window, causal):
    """For all pairs of positions the index of their lag in the window, 0 outside; whether they are inside."""
    xp, ahead = namespace(q.data), negative_lags(window, causal)
    lag = xp.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] + ahead - xp.arange(k.shape[1])
    inside = (lag >= 0) & (lag < window)
    return xp.where(inside, lag, 0), inside, ahead


def check_heads(name, q, k):
    if not k.shape[-1] or q.shape[-1] % k.shape[-1]:
        raise ShapeError(f"{name}: k {k.shape} has H = {k.shape[-1]} heads, which do not divide C = {q.shape[-1]} channels")


def check_state(name, *state):
    if len({x is None for x in state}) > 1:
        raise ShapeError(f"{name}: the parts of a state are given together or not at all")


def check_window(name, bias, causal, keys):
    window = bias.shape[1]
    if not window or not (causal or window % 2):
        raise ShapeError(f"{name}: bias {bias.shape} has W = {window} lags, allowed: from 1, and odd numbers if not causal")
    reach = window - 1 - negative_lags(window, causal)
    if keys is not None and keys.shape[1] != reach:
        raise ShapeError(f"{name}: keys {keys.shape} has P = {keys.shape[1]}, but the window has {reach} positive lags")


def draw_keys(draw, batch, length, heads):
    """Keys near 0, up to ±100, or rising by 120 over the sequence."""
    kind = draw.integer(0, 2)
    if kind == 0:
        return draw.floats(batch, length, heads, low=-100.0, high=100.0)
    rise = np.linspace(-60, 60, length)[:, None] if kind == 1 else 0
    return draw.layout((draw.floats(batch, length, heads) + rise).astype(draw.dtype))


def draw_bias(draw, *shape):
    """Biases near 0, or down to where e^w - 1 is -1 in float32."""
    return draw.floats(*shape) if draw.boolean() else draw.floats(*shape, low=-30.0, high=5.0)


def draw_state(draw, batch, heads, channels, reach):
    """Nothing, or average, logsum, keys and values, of which the oldest may never have been."""
    if draw.boolean():
        return None, None, None, None
    there = (np.arange(reach) >= draw.size(0, 2))[:, None]
    keys = np.where(there, draw.floats(batch, reach, heads), -INF).astype(draw.dtype)
    values = np.where(there, draw.floats(batch, reach, channels), 0).astype(draw.dtype)
    return draw.floats(batch, channels), draw.floats(batch, heads), keys, values


# -- laws --------------------------------------------------------------------------------------------------------------
def within_the_values(names):
    """The named inputs, the values of present and past, bound y."""

    def check(case, draw):
        largest = max(float(np.max(np.abs(x), initial=0)) for x in case.present(names).values())
        assert (np.abs(case().y) <= largest * (1 + 1e-5)).all(), "y is larger than any value"

    return identity("y is within the values", check)


def _masked_is_absent(case, draw):
    if case.mask is not None:
        others = {name: np.where(case.mask[..., None], x, x.dtype.type(draw.choice((2, np.nan, np.inf))))
                  for name, x in case.present("k v").items()}
        assert_close(case(**others).y, case().y, "a masked position is seen")


masked = identity("what is masked is not seen", _masked_is_absent)
