"""aft_full: a bias for every pair of positions (Zhai et al. 2021, arXiv 2105.14103, equation 2).

    Y = sigmoid(Q) ∘ (E (e^K ∘ V)) / (E e^K)       E[T S] has e^(w_ts) where t sees s, else 0; ∘ and / act on each element

The rows of Q[T C], K[S C] and V[S C] are positions. Both sums are products with one matrix E, which all channels and all
sequences share. In attention every head and every sequence has a matrix of its own. minitv/ops/aft/__init__.py has the
gradients and what all AFT operators share.
"""

from __future__ import annotations

import numpy as np

from autograd.device import namespace
from autograd.laws import causal, independent, law, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, exp, log, matmul, sigmoid, stack
from autograd.tensor import Tensor

from .common import (
    INF,
    by_head,
    draw_bias,
    draw_keys,
    everything,
    gate,
    joined,
    masked,
    mean_of,
    merged,
    over_pairs,
    over_seen,
    seen_keys,
    weighted,
    within_the_values,
)

SPAN = 60.0  # a product of two numbers of at least e^-60 and at most 1 is exact to rounding in float32, their sums too


@op("q[B T C], k[B S C], v[B S C], bias[T S], mask?:bool[B S] -> y[B T C]",
    laws=[causal("q k:S v:S bias bias:S", causal=True), independent("B C"), linear_in("v"), masked,
          within_the_values("v"), shift_invariant("k", "all keys", large=False), shift_invariant("bias", "all biases"),
          shift_invariant("k", "all keys", except_for=("tiled",))])  # which merges logsums
def aft_full(q, k, v, bias, mask=None, *, causal=True):
    """y_t = sigmoid(q_t) Σ_s e^(k_s + bias_ts) v_s / Σ_s e^(k_s + bias_ts) over all s, or with ``causal`` over s ≤ t + S - T.

    q[B T C], k and v [B S C], bias[T S], mask[B S]. The last of S keys belongs to the last of T queries, so with a cache of
    past keys and values a call continues the sequence.
    """
    k, v = everything(k, v, mask)
    y = np.zeros_like(q)
    for b, t, c in np.ndindex(q.shape):
        stop = max(t + 1 + k.shape[1] - q.shape[1], 0) if causal else k.shape[1]
        exponents = (k[b, :stop, c] + bias[t, :stop]).tolist()
        y[b, t, c] = gate(q[b, t, c]) * mean_of(exponents, v[b, :stop, c])[0]  # (2)
    return y


@aft_full.form
def parallel(q, k, v, bias, mask, causal):
    """A softmax of k_s + w_ts over s for all pairs of positions, as in equation (3): O(B T S C) time and memory."""
    k, v = joined(k, v, mask)
    return over_pairs(q, k, v, bias[..., None], seen_keys(q, k, causal))


@aft_full.form(tuning={"chunk_size": 64})
def tiled(q, k, v, bias, mask, causal, chunk_size):
    """E (e^K ∘ V) and E e^K in tiles of positions and keys: O(B T S C) time, and no array of all pairs.

    A tile gives a mean and a logsum, and the logsums are the keys with which the means of a row of tiles are joined. A tile on
    the diagonal takes its exponents pair by pair: there the largest key may belong to a position that few see, and all
    weights relative to it may be 0.
    """
    k, v = joined(k, v, mask)
    pattern, (queries, keys) = seen_keys(q, k, causal), bias.shape
    if bias.data.size:  # a constant of a row changes nothing, and without it logsums of tiles keep their digits
        top = namespace(bias.data).where(pattern, bias.data, -INF).max(axis=1, keepdims=True)  # [T 1]
        bias = bias - Tensor.wrap(namespace(top).where(top == -INF, bias.dtype.type(0), top))
    means = [v[:, :0]]
    for start in range(0, queries, chunk_size):
        rows = slice(start, start + chunk_size)
        last = min(max(start + chunk_size + keys - queries, 0), keys) if causal else keys
        tiles = [_tile(k[:, at:end], v[:, at:end], bias[rows, at:end], pattern[rows, at:end])
                 for at in range(0, max(last, 1), chunk_size) for end in [min(at + chunk_size, last)]]
        averages, logsums = (stack(list(x)) for x in zip(*tiles, strict=True))
        means.append(weighted(logsums, averages, axis=0)[0])
    return sigmoid(q) * merged(concat(means, axis=1))  # (2) [B T C]


def _tile(k, v, bias, mask):
    """The mean and the logsum of a tile: by two products, unless all weights relative to the largest may be 0."""
    if bias.data.size and bool(mask.all()) and bool((bias.data.max(axis=1) - bias.data.min(axis=1) < SPAN).all()):
        row, channel = bias.data.max(axis=1)[:, None], k.data.max(axis=1, keepdims=True)  # [T 1], [B 1 C]
        if bool((channel > -INF).all()):
            weights, e = exp(bias - row), exp(k - channel)  # E [T S], e^K [B S C]
            total = matmul(weights, e)  # E e^K [B T C]
            return by_head(matmul(weights, e * merged(v)) / total, k.shape[2]), log(total) + (row + channel)
    return over_seen(k, v, bias[..., None], mask)


aft_full.kernel("cpu", name="step", module="minitv.ops.aft.cpu_step", prefix="full_", sizes={"T": 1})
aft_full.kernel("cpu", prefix="full_", tuning={"chunk_size": 64})
aft_full.kernel("cuda", prefix="full_")


@law(aft_full, "without a causal mask, the order of keys does not matter")
def _(case, draw):
    order = draw.generator().permutation(case.k.shape[1])
    other = case(**{name: np.take(x, order, axis=at) for name, (x, at) in case.inputs("S").items()}, causal=False).y
    assert_close(other, case(causal=False).y, "aft_full depends on the order of keys", terms=16)


@aft_full.inputs
def _(draw):
    batch, queries, keys, channels = draw.size(0, 2, "B"), draw.size(0, 6, "T"), draw.size(0, 7, "S"), draw.size(0, 3, "C")
    mask = draw.mask(batch, keys) if draw.boolean() else None
    return (draw.floats(batch, queries, channels), draw_keys(draw, batch, keys, channels), draw.floats(batch, keys, channels),
            draw_bias(draw, queries, keys), mask), {"causal": draw.boolean()}
