"""rotary_linear: linear attention that knows distances (Su et al. 2021, arXiv 2104.09864, section 3.3, equation 19, RoFormer).

Attention without the softmax has a state: if the weight of key n for query m is a product φ(q_m) · φ(k_n), the query leaves the
sum over n (Katharopoulos et al. 2020, arXiv 2006.16236). The function φ makes positive features. Here q and k are features
already: whoever calls the operator has applied φ. A query and a key have K channels, a value has V.

    y_m = Σ_n (q_m · k_n) v_n / Σ_n (q_m · k_n)              (18), over n ≤ m

It does not know where tokens stand. Terms for pairs of positions cannot be added, because there are no scores to add them to.
But turns act on single vectors. R_m turns pair j of channels by the angle m θ_j (minitv/ops/rope/__init__.py):

    y_m = Σ_n (R_m q_m) · (R_n k_n) v_n / Σ_n (q_m · k_n)    (19)

The numerator is turned, the denominator is not. Turned products may be negative, so their sum may be 0; the plain sum is
positive, as q and k are. The price: weights may be negative, and they do not sum to 1. Where the denominator is 0, y is 0.

The state turns. (R_m q) · (R_n k) = q · (R_{n-m} k): seen from the query, a key has been turned back by as many steps as it is
old. So the state S [K V], the sum of keys times values, can be turned back by one position at each step, and queries and new
keys stay as they are. z [K] is the sum of the keys, for the denominator:

    S_m = R_{-1} S_{m-1} + k_m v_mᵀ,   z_m = z_{m-1} + k_m,   y_m = q_mᵀ S_m / (q_m · z_m)

This is a recurrence whose state neither grows nor fades, but turns. No position is counted, so a text may go on for ever. For M
positions at once, with rows Q, K, V, Q' and K' the rows turned by their positions 1 .. M after the state S:

    Y = ((Q' K'ᵀ ∘ L) V + Q' S) / ((Q Kᵀ ∘ L) 1 + Q z)       L is 1 for n ≤ m, else 0; ∘ multiplies elements, 1 sums rows
    S_next = R_{-M} (S + K'ᵀ V),   z_next = z + sum of the rows of K

``parallel`` does it for all positions, ``chunkwise`` chunk by chunk, ``recurrent`` position by position.

Gradients. With o_m the numerator, d_m the denominator and g_m the gradient of y_m: do_m = g_m / d_m, dd_m = -(g_m · y_m) / d_m.
The numerator is linear attention of turned vectors, and what it gives to q and k is turned back. z_m is the sum of the keys up
to m.

    dq_m = R_{-m} Σ_{n ≤ m} (do_m · v_n) R_n k_n + dd_m z_m
    dk_n = R_{-n} Σ_{m ≥ n} (do_m · v_n) R_m q_m + Σ_{m ≥ n} dd_m q_m
    dv_n = Σ_{m ≥ n} (R_m q_m) · (R_n k_n) do_m

Three tokens with one pair that turns by a quarter, q = k = (1, 0) and values 4, 8, 2. The denominators are 1, 2, 3; the
numerators 4, then 8 + 0 · 4, then 2 + 0 · 8 - 1 · 4 = -2.

    >>> import numpy as np
    >>> from minitv.ops import rotary_linear
    >>> x, v = np.tile([1., 0], (1, 1, 3, 1)), np.array([4., 8, 2]).reshape(1, 1, 3, 1)
    >>> y, S, z = rotary_linear(x, x, v, angles=(np.pi / 2,))
    >>> print(y.numpy().ravel().round(3), S.numpy().ravel().round(3), z.numpy().ravel())
    [ 4.     4.    -0.667] [-2. -8.] [3. 0.]

S holds the newest value and the oldest with the opposite sign in its first row, 2 - 4, and the second token's, a quarter turn
old, in its second row.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.device import beside, namespace
from autograd.errors import DomainError
from autograd.laws import causal, independent, law, linear_in, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, matmul, reshape, sum, swapaxes, where

from ..pairs import scores, weighted
from ..rope import PAIRINGS, rope


@op("q[B H T K], k[B H T K], v[B H T V], state?[B H K V], z?[B H K] -> y[B H T V], state[B H K V], z[B H K]",
    laws=[causal("q k v"), independent("B H V"), linear_in("v"), streams()])
def rotary_linear(q, k, v, state=None, z=None, *, angles=(), pairing="interleaved"):
    """y_m = q_m S_m / (q_m · z_m), S_m = R_{-1} S_{m-1} + k_m v_mᵀ, z_m = z_{m-1} + k_m: equation (19), causal.

    q[B H T K] and k[B H T K], not negative, v[B H T V]; state[B H K V] and z[B H K] are what an earlier call returned, and 0 if
    absent. ``angles`` and ``pairing`` are those of rope; without angles it is linear attention, equation (18). Where q · z is
    0, y is 0. An unknown pairing or too many angles raise DomainError.
    """
    y = np.zeros(v.shape, v.dtype)
    state = np.zeros((*k.shape[:2], k.shape[3], v.shape[3]), v.dtype) if state is None else state.copy()
    z = np.zeros((*k.shape[:2], k.shape[3]), v.dtype) if z is None else z.copy()
    for b, h, t in np.ndindex(q.shape[:3]):
        for j, angle in enumerate(angles):
            one, two = (2 * j, 2 * j + 1) if pairing == "interleaved" else (j, len(angles) + j)
            u, w, cos, sin = state[b, h, one].copy(), state[b, h, two].copy(), np.cos(angle), np.sin(angle)
            state[b, h, one], state[b, h, two] = u * cos + w * sin, w * cos - u * sin  # R_{-1} S
        state[b, h] += np.outer(k[b, h, t], v[b, h, t])
        z[b, h] += k[b, h, t]
        divisor = q[b, h, t] @ z[b, h]
        if divisor != 0:
            y[b, h, t] = q[b, h, t] @ state[b, h] / divisor  # (19)
    return y, state, z


def _divided(y, divisor):
    """Rows y[.. V] by divisor[.. 1]; zeros where that is 0."""
    there = divisor.data != 0
    return where(there, y / where(there, divisor, 1.0), 0.0)


def turned_back(state, angles, pairing, by):
    """R_{-by} S for the channels K of state[B H K V]."""
    positions = beside(np.full((state.shape[0], state.shape[3]), -by, np.int64), state.data)
    return swapaxes(rope(swapaxes(state), positions, angles=angles, pairing=pairing))


def _chunk(q, k, v, state, z, angles, pairing):
    """All positions at once, from a state or None; see the page above."""
    xp, length = namespace(q.data), q.shape[2]
    mask = xp.arange(length) <= xp.arange(length)[:, None]  # L [M M]
    turns = dict(angles=angles, pairing=pairing, start=1)
    turned_q, turned_k = rope(q, **turns), rope(k, **turns)  # Q', K' [B H M K]
    y = weighted(where(mask, scores(turned_q, turned_k, mask), 0.0), v, mask)  # [B H M V]
    divisor = sum(where(mask, scores(q, k, mask), 0.0), axis=3, keepdims=True)  # [B H M 1]
    after, z_after = matmul(swapaxes(turned_k), v), sum(k, axis=2)  # [B H K V], [B H K]
    if state is not None:
        y, after = y + matmul(turned_q, state), after + state
    if z is not None:
        divisor, z_after = divisor + matmul(q, reshape(z, (*z.shape, 1))), z_after + z
    return _divided(y, divisor), turned_back(after, angles, pairing, length), z_after


@rotary_linear.form
def parallel(q, k, v, state, z, angles, pairing):
    """All positions as one chunk. Time O(T² (K + V)), memory O(T²) for each head."""
    return _chunk(q, k, v, state, z, angles, pairing)


@rotary_linear.form
def recurrent(q, k, v, state, z, angles, pairing):
    """Position by position, as a model generates text. Time O(T K V), and a state of K (V + 1) numbers, for each head."""
    xp, shape = namespace(q.data), (*q.shape[:2], q.shape[3])
    state = Tensor.wrap(xp.zeros((*shape, v.shape[3]), q.dtype)) if state is None else state
    z = Tensor.wrap(xp.zeros(shape, q.dtype)) if z is None else z
    ys = [matmul(q[:, :, :0], state)]
    for t in range(q.shape[2]):
        query, key, value = (x[:, :, t:t + 1] for x in (q, k, v))
        state = turned_back(state, angles, pairing, 1) + swapaxes(key) * value  # [B H K V]
        z = z + reshape(key, z.shape)
        ys.append(_divided(matmul(query, state), matmul(query, reshape(z, (*z.shape, 1)))))
    return concat(ys, axis=2), state, z


@rotary_linear.form(tuning={"chunk_size": 64})
def chunkwise(q, k, v, state, z, angles, pairing, chunk_size):
    """One chunk of M positions after the other. Time O(T M (K + V) + T K V), memory O(T (K + V) + K V T / M) for each head."""
    ys = []
    for start in range(0, max(q.shape[2], 1), chunk_size):
        part = slice(start, start + chunk_size)
        y, state, z = _chunk(q[:, :, part], k[:, :, part], v[:, :, part], state, z, angles, pairing)
        ys.append(y)
    return concat(ys, axis=2), state, z


rotary_linear.kernel("cpu", tuning={"chunk_size": 64})
rotary_linear.kernel("cuda", tuning={"chunk_size": 64})


@rotary_linear.validate
def _(q, angles, pairing):
    if pairing not in PAIRINGS:
        raise DomainError(f"rotary_linear: pairing is {pairing!r}, allowed: {', '.join(PAIRINGS)}")
    if not isinstance(angles, tuple) or 2 * len(angles) > q.shape[3]:
        raise DomainError(f"rotary_linear: angles must be a tuple of at most {q.shape[3] // 2} numbers, one for each pair of "
                          f"{q.shape[3]} channels, got {angles if not isinstance(angles, tuple) else len(angles)}")


@rotary_linear.inputs
def _(draw):
    batch, heads, length = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 7, "T")
    width, out = draw.size(1, 5, "K"), draw.size(0, 3, "V")
    angles = tuple(draw.generator().uniform(0, 3, draw.integer(0, width // 2)).tolist())
    q, k = (draw.floats(batch, heads, length, width, low=0.2, high=1.5) for _ in range(2))
    state, z = draw.floats(batch, heads, width, out), draw.floats(batch, heads, width, low=0.1, high=3.0)
    carried = (state, z) if draw.boolean() else (None, None)
    return (q, k, draw.floats(batch, heads, length, out), *carried), {"angles": angles, "pairing": draw.choice(PAIRINGS)}


@law(rotary_linear, "it is the sum over pairs of positions")
def _(case, draw):
    turns = {"angles": case.angles, "pairing": case.pairing}
    q, k = (rope(x, **turns).numpy() for x in (case.q, case.k))
    weights = np.tril(q @ np.swapaxes(k, 2, 3))
    divisor = np.tril(case.q @ np.swapaxes(case.k, 2, 3)).sum(3, keepdims=True)
    assert_close(case.anew().y, weights @ case.v / divisor, "rotary_linear is not equation (19)", terms=256)


@law(rotary_linear, "without angles it is a weighted mean")
def _(case, draw):
    y = case.anew(angles=(), v=1.0).y
    assert_close(y, np.ones_like(y), "without turns, weights do not sum to one", terms=64)


@law(rotary_linear, "a factor of a query changes nothing")
def _(case, draw):
    factors = draw.floats(*case.q.shape[:3], 1, low=0.5, high=2.0)
    assert_close(case(q=case.q * factors).y, case().y, "a row depends on the length of its query", terms=64)


@law(rotary_linear, "where no key fits, the row is zero")
def _(case, draw):
    y = case(q=np.zeros_like(case.q)).y
    assert not y.any(), "a query of zeros sees something"
