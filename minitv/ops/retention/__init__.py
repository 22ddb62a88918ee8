"""retention: linear attention that forgets. Sun et al. 2023, arXiv 2307.08621, section 2 (RetNet).

    S_t = decay S_{t-1} + k_tᵀ v_t                  what a head remembers, [K V]
    o_t = q_t S_t = Σ_{s<=t} decay^(t-s) (q_t · k_s) v_s

With ``normalization`` the outputs are divided by what would make them large:

    n_t = decay n_{t-1} + 1 = Σ_{s<=t} decay^(t-s)           a count of the positions that it remembers
    z_t = decay z_{t-1} + k_t                                the sum of their keys, [K]
    y_t = o_t                                                "none"
    y_t = o_t / √n_t                                         "decay"
    y_t = o_t / max(|q_t · z_t|, √n_t)                       "paper"

"paper" are the second and third scaling of section 2.4, where q_t · z_t is the sum of the row's scores; the first, 1/√K,
belongs to the keys. As S, n and z are carried along, every form gives the same values, whatever norm follows: torchscale's
chunkwise form normalises by other sums than its parallel one, and agrees only after a norm with eps = 0. The divisor is
differentiated like everything else, so gradients are slopes; torchscale takes it as a constant, which after a norm with
eps = 0 makes no difference either.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError
from autograd.laws import causal, identity, independent, linear_in, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import absolute, concat, matmul, maximum, power, reshape, rsqrt, sqrt, sum, swapaxes, where

from ..pairs import scores, weighted

NORMALIZATIONS = ("none", "decay", "paper")


def _without_decay(case, draw):
    scores = np.tril(case.q @ np.swapaxes(case.k, 2, 3))
    assert_close(case.anew(decay=1.0, normalization="none").y, scores @ case.v,
                 "with decay 1, retention is not causal linear attention", terms=256)


def _without_memory(case, draw):
    present = np.sum(case.q * case.k, axis=3, keepdims=True) * case.v
    assert_close(case(decay=0.0, normalization="none").y, present,
                 "with decay 0, retention sees more than the present", terms=64)


def _rows_are_scaled(case, draw):
    plain, scaled = case(normalization="none").y, case().y
    ratio = np.max(np.abs(scaled), axis=3, initial=0) / np.maximum(np.max(np.abs(plain), axis=3, initial=0), 1e-30)
    assert (ratio <= 1 + 1e-4).all(), "normalisation makes a row larger"
    assert_close(scaled, plain * ratio[..., None], "normalisation does more than scale rows", terms=256)


def _a_constant_value(case, draw):
    y = case.anew(v=1.0, normalization="paper").y
    assert (np.abs(y) <= 1 + 1e-4).all(), f"a value of 1 comes back as {np.abs(y).max()}"


@op("q[B H T K], k[B H T K], v[B H T V], decay[H], state?[B H K V], z?[B H K], count?[B H]"
    " -> y[B H T V], state[B H K V], z[B H K], count[B H]",
    laws=[causal("q k v"), independent("B H V"), linear_in("v"), streams(),
          identity("decay 1 is causal linear attention", _without_decay),
          identity("decay 0 sees the present only", _without_memory),
          identity("normalisation scales rows down", _rows_are_scaled),
          identity("with the paper's normalisation a constant value does not grow", _a_constant_value)])
def retention(q, k, v, decay, state=None, z=None, count=None, *, normalization="none"):
    """y_t = q_t S_t, normalised, with S_t = decay S_{t-1} + k_tᵀ v_t, for every head; also S, z and n after the last step.

    q[B H T K], k[B H T K], v[B H T V], decay[H], in [0, 1] for RetNet; state[B H K V], z[B H K] and count[B H] are what an
    earlier call returned, 0 if absent. ``normalization`` is "none", "decay" or "paper", see the page's first lines.
    """
    y = np.zeros(v.shape, v.dtype)
    state = np.zeros((*k.shape[:2], k.shape[3], v.shape[3]), v.dtype) if state is None else state.copy()
    z = np.zeros((*k.shape[:2], k.shape[3]), v.dtype) if z is None else z.copy()
    count = np.zeros(k.shape[:2], v.dtype) if count is None else count.copy()
    for b, h, t in np.ndindex(q.shape[:3]):
        state[b, h] = decay[h] * state[b, h] + np.outer(k[b, h, t], v[b, h, t])
        z[b, h] = decay[h] * z[b, h] + k[b, h, t]
        count[b, h] = decay[h] * count[b, h] + 1
        root = np.sqrt(count[b, h])
        divisor = {"none": 1, "decay": root, "paper": np.maximum(abs(q[b, h, t] @ z[b, h]), root)}[normalization]
        y[b, h, t] = q[b, h, t] @ state[b, h] / divisor
    return y, state, z, count


def _normalized(y, score, count, normalization):
    """The outputs y[.. V] divided as the page says; ``score()`` is q · z and ``count`` is n, both [.. 1]."""
    if normalization == "none":
        return y
    return y * rsqrt(count) if normalization == "decay" else y / maximum(absolute(score()), sqrt(count))


def _zeros(like, *shape):
    return Tensor.wrap(namespace(like.data).zeros(shape, like.dtype))


def _chunk(q, k, v, decay, state, z, count, normalization):
    """All positions of a chunk at once, from the state before it (None is 0)."""
    xp, length = namespace(q.data), q.shape[2]

    def fade(exponents):
        """decay[H] to the power of an array [.. ..] -> [H .. ..]"""
        return power(reshape(decay, (-1, 1, 1)), Tensor.wrap(exponents.astype(q.dtype)))

    step = xp.arange(length)
    lag = step[:, None] - step
    seen = lag >= 0
    weights = where(seen, fade(xp.maximum(lag, 0)), 0.0)  # [H T T]
    first, last = fade(step[:, None] + 1), fade(length - 1 - step[:, None])  # since the state before, until the state after
    pairs, faded = where(seen, scores(q, k, seen), 0.0) * weights, k * last
    y = weighted(pairs, v, seen)
    y = y if state is None else y + first * matmul(q, state)
    counts = sum(weights, axis=2, keepdims=True)
    counts = counts if count is None else counts + first * reshape(count, (*count.shape, 1, 1))

    def score():
        total = sum(pairs, axis=3, keepdims=True)
        return total if z is None else total + first * matmul(q, reshape(z, (*z.shape, 1)))

    y = _normalized(y, score, counts, normalization)
    whole = power(decay, float(length))
    state_after, z_after = matmul(swapaxes(faded), v), sum(faded, axis=2)
    count_after = sum(last, axis=(1, 2)) + (_zeros(q, *q.shape[:2]) if count is None else whole * count)
    if state is not None:
        state_after = state_after + reshape(whole, (-1, 1, 1)) * state
    if z is not None:
        z_after = z_after + reshape(whole, (-1, 1)) * z
    return y, state_after, z_after, count_after


@retention.form
def parallel(q, k, v, decay, state, z, count, normalization):
    """All positions at once, by a [H T T] array of decays: O(T²) as attention."""
    return _chunk(q, k, v, decay, state, z, count, normalization)


@retention.form
def recurrent(q, k, v, decay, state, z, count, normalization):
    """One position after the other, as the definition: O(T) and small in memory, as in generation."""
    batch, heads, length, width = q.shape
    state = _zeros(q, batch, heads, width, v.shape[3]) if state is None else state
    z = _zeros(q, batch, heads, width) if z is None else z
    count = _zeros(q, batch, heads) if count is None else count
    ys = [matmul(q[:, :, :0], state)]
    for t in range(length):
        query, key, value = (x[:, :, t:t + 1] for x in (q, k, v))
        state = reshape(decay, (-1, 1, 1)) * state + swapaxes(key) * value
        z = reshape(decay, (-1, 1)) * z + reshape(key, z.shape)
        count = decay * count + 1.0
        ys.append(_normalized(matmul(query, state), lambda query=query, z=z: matmul(query, reshape(z, (*z.shape, 1))),
                              reshape(count, (batch, heads, 1, 1)), normalization))
    return concat(ys, axis=2), state, z, count


@retention.form(tuning={"chunk_size": 64})
def chunkwise(q, k, v, decay, state, z, count, normalization, chunk_size):
    """Chunk after chunk, each in parallel: O(T), with matrix products; the last chunk may be shorter."""
    ys = []
    for start in range(0, max(q.shape[2], 1), chunk_size):
        part = slice(start, start + chunk_size)
        y, state, z, count = _chunk(q[:, :, part], k[:, :, part], v[:, :, part], decay, state, z, count, normalization)
        ys.append(y)
    return concat(ys, axis=2), state, z, count


retention.kernel("cpu", tuning={"chunk_size": 64})
retention.kernel("cuda", tuning={"chunk_size": 64})


@retention.validate
def _(normalization):
    if normalization not in NORMALIZATIONS:
        raise DomainError(f"retention: normalization is {normalization!r}, allowed: {', '.join(NORMALIZATIONS)}")


@retention.inputs
def _(draw):
    batch, heads, length, width, out = draw.size(0, 2), draw.size(0, 2), draw.size(0, 7), draw.size(1, 4), draw.size(0, 3)
    normalization = draw.choice(NORMALIZATIONS)
    if normalization == "paper":  # Far from the kink of max: |q · z| of a position is either far above √n or far below.
        sign = np.where(draw.generator().random((heads, 1, width)) < 0.5, -1, 1)
        q = np.where(draw.generator().random((batch, heads, length, 1)) < 0.5, 12, 0.01) * sign
        q, k, z = q * draw.floats(batch, heads, length, width, low=0.8, high=1.2), *(
            sign.reshape(heads, *([1] * (len(shape) - 3)), width) * draw.floats(*shape, low=0.3, high=0.6)
            for shape in ((batch, heads, length, width), (batch, heads, width)))
    else:
        q, k, z = draw.floats(batch, heads, length, width), draw.floats(batch, heads, length, width), None
        k, z = k * draw.choice((1, 100)), draw.floats(batch, heads, width)
    rates = draw.choice((10 ** draw.generator().uniform(-6, 1.3, heads), np.zeros(heads), np.full(heads, np.inf)))
    q, k, z, decay = (draw.layout(x.astype(draw.dtype)) for x in (q, k, z, np.exp(-rates)))
    carried = draw.floats(batch, heads, width, out), z, draw.floats(batch, heads, low=0.0, high=2.0)
    return (q, k, draw.floats(batch, heads, length, out), decay, *(x if draw.boolean() else None for x in carried)), {
        "normalization": normalization}
