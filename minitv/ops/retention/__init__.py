"""retention: linear attention whose memory of the past fades (Sun et al. 2023, arXiv 2307.08621, section 2.1).

Every head has a decay γ of its own. Queries q_t and keys k_t are rows of K channels, values v_t rows of V channels.

    S_t = γ S_{t-1} + k_tᵀ v_t,    o_t = q_t S_t             equation (6): S is the state of a head, a matrix [K V]
    o_t = Σ_{s ≤ t} γ^(t-s) (q_t · k_s) v_s                  the same as a sum, equation (4) for queries and keys as they are

The three forms below compute this function: ``parallel`` by (5), ``recurrent`` by (6), ``chunkwise`` by (7). They give equal
numbers, so a model trains with one form and generates with another. minitv/variants/retnet.py tells why the paper wants it.

Normalisation. A slow decay adds up many terms, so o_t may be large. ``normalization`` names a divisor for each row o_t. It
needs two more sums, which the state carries along:

    n_t = γ n_{t-1} + 1 = Σ_{s ≤ t} γ^(t-s)                  the decayed number of positions so far, one number
    z_t = γ z_{t-1} + k_t = Σ_{s ≤ t} γ^(t-s) k_s            the decayed sum of the keys, a row of K numbers

    "none"     y_t = o_t
    "decay"    y_t = o_t / √n_t                              the second scaling of the paper
    "paper"    y_t = o_t / max(|q_t · z_t|, √n_t)            the second and the third scaling

The paper describes three scalings in section 2.2, under "Retention Score Normalization". The first, 1/√K, belongs to the keys
and happens before this operator. The second divides row t of the decays by √(Σ_s γ^(t-s)) = √n_t. The third divides row t of
the scores R, which the second has already scaled, by max(|Σ_s R_ts|, 1). Since Σ_s R_ts = q_t · z_t / √n_t, the second and the
third together divide by √n_t · max(|q_t · z_t| / √n_t, 1) = max(|q_t · z_t|, √n_t).

Gradients. Let g_t be the gradient of o_t, and G_t that of S_t through o_t and all later outputs. From the last t to the first:

    G_t = q_tᵀ g_t + γ G_{t+1}
    dq_t = g_t S_tᵀ      dk_t = v_t G_tᵀ      dv_t = k_t G_t      dγ = the sum of G_t ∘ S_{t-1} over all its elements and all t

γ G of the first position is the gradient of the state that came in. cpu.py states the same for a whole chunk at once. The
divisor is differentiated like the rest. torchscale, the code of the paper's authors, treats it as a constant. The two gradients
are equal if a norm with eps = 0 follows, because such a norm gives the same output for every positive divisor.
"""

from __future__ import annotations

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError
from autograd.laws import becomes, causal, independent, law, linear_in, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import absolute, concat, matmul, maximum, power, reshape, rsqrt, sqrt, sum, swapaxes, where

from ..pairs import scores, weighted

NORMALIZATIONS = ("none", "decay", "paper")


@op("q[B H T K], k[B H T K], v[B H T V], decay[H], state?[B H K V], z?[B H K], count?[B H]"
    " -> y[B H T V], state[B H K V], z[B H K], count[B H]",
    laws=[causal("q k v"), independent("B H V"), linear_in("v"), streams()])
def retention(q, k, v, decay, state=None, z=None, count=None, *, normalization="none"):
    """y_t = q_t S_t / divisor with S_t = decay S_{t-1} + k_tᵀ v_t in every head; also S, z and n after the last position.

    q[B H T K], k[B H T K], v[B H T V], decay[H], in [0, 1] for RetNet. state[B H K V], z[B H K] and count[B H] are what an
    earlier call returned, and 0 if absent. ``normalization`` is "none", "decay" or "paper": the page above has the formulas.
    Another name raises DomainError.
    """
    y = np.zeros(v.shape, v.dtype)
    state = np.zeros((*k.shape[:2], k.shape[3], v.shape[3]), v.dtype) if state is None else state.copy()
    z = np.zeros((*k.shape[:2], k.shape[3]), v.dtype) if z is None else z.copy()
    count = np.zeros(k.shape[:2], v.dtype) if count is None else count.copy()
    for b, h, t in np.ndindex(q.shape[:3]):
        state[b, h] = decay[h] * state[b, h] + np.outer(k[b, h, t], v[b, h, t])  # (6)
        z[b, h] = decay[h] * z[b, h] + k[b, h, t]
        count[b, h] = decay[h] * count[b, h] + 1
        root = np.sqrt(count[b, h])
        divisor = {"none": 1, "decay": root, "paper": np.maximum(abs(q[b, h, t] @ z[b, h]), root)}[normalization]
        y[b, h, t] = q[b, h, t] @ state[b, h] / divisor  # (6)
    return y, state, z, count


def _normalized(y, score, count, normalization):
    """The outputs y[.. V] divided as the page says; ``score()`` is q · z and ``count`` is n, both [.. 1]."""
    if normalization == "none":
        return y
    return y * rsqrt(count) if normalization == "decay" else y / maximum(absolute(score()), sqrt(count))


def _zeros(like, *shape):
    return Tensor.wrap(namespace(like.data).zeros(shape, like.dtype))


def _chunk(q, k, v, decay, state, z, count, normalization):
    """Equation (7) for one chunk of M positions with rows Q[M K], K[M K], V[M V], from the state R before it (None is 0).

        O = ((Q Kᵀ) ∘ Γ) V + ξ ∘ (Q R)        Γ_ij = γ^(i-j) for j ≤ i, else 0        ξ_i = γ^(i+1)
        R_next = γ^M R + Kᵀ (ζ ∘ V)           ζ_j = γ^(M-1-j)

    i and j count from 0 inside the chunk; ∘ multiplies element by element, and a vector is a factor for each row. Γ is the
    decay between two positions of the chunk, ξ that since the state before it, and ζ that until the state after it.
    """
    xp, length = namespace(q.data), q.shape[2]

    def fade(exponents):
        """decay[H] to the power of an array [.. ..] -> [H .. ..]"""
        return power(reshape(decay, (-1, 1, 1)), Tensor.wrap(exponents.astype(q.dtype)))

    step = xp.arange(length)
    lag = step[:, None] - step
    mask = lag >= 0
    gamma = where(mask, fade(xp.maximum(lag, 0)), 0.0)  # Γ [H M M]
    xi, zeta = fade(step[:, None] + 1), fade(length - 1 - step[:, None])  # [H M 1]
    pairs, faded = where(mask, scores(q, k, mask), 0.0) * gamma, k * zeta  # (Q Kᵀ) ∘ Γ [B H M M], ζ ∘ K [B H M K]
    y = weighted(pairs, v, mask)  # (7), inner part [B H M V]
    y = y if state is None else y + xi * matmul(q, state)  # (7), cross part
    counts = sum(gamma, axis=2, keepdims=True)  # n [H M 1]
    counts = counts if count is None else counts + xi * reshape(count, (*count.shape, 1, 1))

    def score():
        total = sum(pairs, axis=3, keepdims=True)  # q · z [B H M 1]
        return total if z is None else total + xi * matmul(q, reshape(z, (*z.shape, 1)))

    y = _normalized(y, score, counts, normalization)
    whole = power(decay, float(length))  # γ^M [H]
    state_after, z_after = matmul(swapaxes(faded), v), sum(faded, axis=2)  # (7): (ζ ∘ K)ᵀ V = Kᵀ (ζ ∘ V)
    count_after = sum(zeta, axis=(1, 2)) + (_zeros(q, *q.shape[:2]) if count is None else whole * count)
    if state is not None:
        state_after = state_after + reshape(whole, (-1, 1, 1)) * state
    if z is not None:
        z_after = z_after + reshape(whole, (-1, 1)) * z
    return y, state_after, z_after, count_after


@retention.form
def parallel(q, k, v, decay, state, z, count, normalization):
    """O = ((Q Kᵀ) ∘ Γ) V, equation (5): the whole sequence is one chunk. Time O(T² (K + V)) and memory O(T²) for each head."""
    return _chunk(q, k, v, decay, state, z, count, normalization)


@retention.form
def recurrent(q, k, v, decay, state, z, count, normalization):
    """S_t = γ S_{t-1} + k_tᵀ v_t, o_t = q_t S_t, equation (6): one position after the other, as a model generates text.

    Time O(T K V) for each head; the memory of the state, K V numbers, does not grow with T.
    """
    batch, heads, length, width = q.shape
    state = _zeros(q, batch, heads, width, v.shape[3]) if state is None else state
    z = _zeros(q, batch, heads, width) if z is None else z
    count = _zeros(q, batch, heads) if count is None else count
    ys = [matmul(q[:, :, :0], state)]
    for t in range(length):
        query, key, value = (x[:, :, t:t + 1] for x in (q, k, v))
        state = reshape(decay, (-1, 1, 1)) * state + swapaxes(key) * value  # (6) [B H K V]
        z = reshape(decay, (-1, 1)) * z + reshape(key, z.shape)
        count = decay * count + 1.0
        ys.append(_normalized(matmul(query, state), lambda query=query, z=z: matmul(query, reshape(z, (*z.shape, 1))),
                              reshape(count, (batch, heads, 1, 1)), normalization))
    return concat(ys, axis=2), state, z, count


@retention.form(tuning={"chunk_size": 64})
def chunkwise(q, k, v, decay, state, z, count, normalization, chunk_size):
    """Equation (7): each chunk of M positions in parallel, one chunk after the other; the last chunk may be shorter.

    Time O(T M (K + V) + T K V) for each head. Memory O(T (K + V)), and K V for the state before each of the T / M chunks.
    """
    ys = []
    for start in range(0, max(q.shape[2], 1), chunk_size):
        part = slice(start, start + chunk_size)
        y, state, z, count = _chunk(q[:, :, part], k[:, :, part], v[:, :, part], decay, state, z, count, normalization)
        ys.append(y)
    return concat(ys, axis=2), state, z, count


retention.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
retention.kernel("cpu", tuning={"chunk_size": 64})
retention.kernel("cuda", tuning={"chunk_size": 64})


@retention.validate
def _(normalization):
    if normalization not in NORMALIZATIONS:
        raise DomainError(f"retention: normalization is {normalization!r}, allowed: {', '.join(NORMALIZATIONS)}")


@retention.inputs
def _(draw):
    batch, heads, length = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 7, "T")
    width, out = draw.size(1, 4, "K"), draw.size(0, 3, "V")
    normalization = draw.choice(NORMALIZATIONS)
    if normalization == "paper":  # |q · z| is far from √n: where the two are equal, their maximum has no derivative
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


@becomes(retention, "linear attention", "nothing fades (γ = 1)")
def _(case, draw):
    scores = np.tril(case.q @ np.swapaxes(case.k, 2, 3))
    assert_close(case.anew(decay=1.0, normalization="none").y, scores @ case.v,
                 "with decay 1, retention is not causal linear attention", terms=256)


@law(retention, "decay 0 sees the present only")
def _(case, draw):
    present = np.sum(case.q * case.k, axis=3, keepdims=True) * case.v
    assert_close(case(decay=0.0, normalization="none").y, present,
                 "with decay 0, retention sees more than the present", terms=64)


@law(retention, "normalisation scales rows down")
def _(case, draw):
    plain, scaled = case(normalization="none").y, case().y
    ratio = np.max(np.abs(scaled), axis=3, initial=0) / np.maximum(np.max(np.abs(plain), axis=3, initial=0), 1e-30)
    assert (ratio <= 1 + 1e-4).all(), "normalisation makes a row larger"
    assert_close(scaled, plain * ratio[..., None], "normalisation does more than scale rows", terms=256)


@law(retention, "with the paper's normalisation a constant value does not grow")
def _(case, draw):
    y = case.anew(v=1.0, normalization="paper").y
    assert (np.abs(y) <= 1 + 1e-4).all(), f"a value of 1 comes back as {np.abs(y).max()}"
