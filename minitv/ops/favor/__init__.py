"""favor: attention whose weights are products of positive random features (Choromanski et al. 2020, arXiv 2009.14794).

A feature map turns a query or key x of K channels into F positive numbers φ(x). The weight of key j for query i is
φ(q_i) · φ(k_j), divided by the sum over all j that query i sees:

    y_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j)      (11), j ≤ i, if ``causal``, else (4), all j

With x̃ = scale · x and the rows w_f of the projection W[F K], ``features`` names the map:

    "positive"   φ_f(x) = e^(w_f · x̃ - ‖x̃‖²/2)           (7): for w_f from N(0, I) the mean of φ_f(x) φ_f(y) is e^(x̃ · ỹ)
    "relu"       φ_f(x) = max(0, w_f · x̃) + offset       "generalized attention", appendix A.4

The default scale K^(-1/4), for queries and for keys, makes e^(x̃ · ỹ) the softmax kernel e^(x · y / √K). Hyperbolic features
are "positive" ones for the rows w_f and -w_f, regularised ones those for rows of length √K: projection.py draws the rows. The
factor 1/√F of the paper cancels in y and is left out. Numbers in brackets are equations of the paper, whose reasons are in
minitv/variants/performer.py.

State. φ(q_i) is a factor of every term of the sums over j, so a head needs two sums for each feature: Σ_j φ_f(k_j) v_j and
Σ_j φ_f(k_j). A term may be as large as e^(‖w_f‖²/2), and as near to 0 as one likes. What is kept are the mean of the values
and the logarithm of the weight:

    logsum_f = ln Σ_j φ_f(k_j)        mean_f = Σ_j φ_f(k_j) v_j / Σ_j φ_f(k_j)          [F] and [F V]; of nothing -∞ and 0
    y_i = Σ_f softmax_f(ln φ_f(q_i) + logsum_f) mean_f

So every feature acts like one more key, with the value mean_f. Nothing here needs a small number that keeps a divisor from 0,
as the published codes have it. There such an ε does harm: they also subtract the largest exponent of all keys, ε is added after
that, and so a large last key changes earlier outputs. In this operator no later key can.

In chunks. Let a_f be the larger of logsum_f before the chunk and the largest ln φ_f(k_j) in it, and r_i the largest
ln φ_f(q_i) + a_f of a query. All exponents below are at most 0:

    A_ij = Σ_f e^(ln φ_f(q_i) + a_f - r_i) e^(ln φ_f(k_j) - a_f) for j ≤ i, else 0           a product of two matrices
    B_if = e^(ln φ_f(q_i) + a_f - r_i) e^(logsum_f - a_f)
    y = (A V + B mean) / (row sums of A and of B)

If a later key of the chunk is larger in every feature than all that a query sees, the row sum may be 0 in floating point. Such
a row is noticed, and the chunk is computed in halves (forms), or pair by pair, each row with the maximum of what it sees.

Gradients. Let g_i be the gradient of y_i, G_i = g_i / n_i with the row sum n_i, and c_i = -G_i · y_i:

    M_ij = G_i · v_j + c_i for the pairs (i, j) that are seen, else 0      the gradient of the products φ(q_i) · φ(k_j)
    dφ(q_i) = Σ_j M_ij φ(k_j)      dφ(k_j) = Σ_i M_ij φ(q_i)      dv_j = Σ_i φ(q_i) · φ(k_j) G_i
    dx = scale (Wᵀ u - (Σ_f u_f) x̃) with u_f = φ_f dφ_f for "positive"
    dx = scale Wᵀ u with u_f = dφ_f where w_f · x̃ > 0, else 0, for "relu"

For positive features of a query Σ_f u_f = 0, because y stays the same if φ(q_i) is multiplied by a number. W is a constant.

No sum needs all pairs: dφ(k_j) = (Σ_i φ(q_i) G_iᵀ) v_j + Σ_i c_i φ(q_i), which is a state of the later queries, and dφ(q_i) is
read from the state of the earlier keys in the same way. So backward goes from the last chunk to the first, in O(T F (K + V))
time. cpu.py has its formulas.
"""

from __future__ import annotations

import math

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import becomes, causal, independent, law, linear_in, streams
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, exp, log, logsumexp, matmul, maximum, reshape, softmax, sum, swapaxes, where
from autograd.random import Random

from ..aft.common import mean_of
from ..attention import attention, visible
from ..pairs import finite, weighted
from .projection import random_projection

FEATURES = ("positive", "relu")
INF = math.inf


def scale_of(scale: float | None, width: int) -> float:
    """K^(-1/4) unless a scale is given."""
    return scale if scale is not None else width**-0.25 if width else 1.0


def log_features(x, projection, features, scale, offset):
    """ln φ(x) of arrays x[.. K] and W[F K], [.. F]."""
    x = x * scale_of(scale, x.shape[-1])
    if features == "relu":
        return np.log(np.maximum(x @ projection.T, 0) + offset)
    return x @ projection.T - np.sum(x * x, axis=-1, keepdims=True) / 2


@op("q[B H T K], k[B H T K], v[B H T V], projection:const[F K], mask?:bool[B T], mean?[B H F V], logsum?[B H F]"
    " -> y[B H T V], mean[B H F V], logsum[B H F]",
    laws=[causal("q k v", causal=True), independent("B H V"), linear_in("v"), streams(causal=True)])
def favor(q, k, v, projection, mask=None, mean=None, logsum=None, *, features="positive", scale=None, offset=1e-3, causal=True):
    """y_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j) in every head over the keys j ≤ i, or all; and the state after them.

    q, k[B H T K], v[B H T V] and projection[F K], a constant; mask[B T] is True where a key is seen, and a query that sees
    none gives 0. mean[B H F V] and logsum[B H F] are what an earlier call returned. ``features``, ``scale`` and ``offset``:
    the page above has the formulas. DomainError for other features or an offset that is not above 0; ShapeError if one of
    mean and logsum is missing.
    """
    y, (batch, heads, length, _) = np.zeros(v.shape, v.dtype), q.shape
    means = np.zeros((batch, heads, len(projection), v.shape[3]), v.dtype)
    logsums = np.zeros(means.shape[:3], v.dtype)
    lq, lk = (log_features(x, projection, features, scale, offset) for x in (q, k))  # [B H T F]
    for b, h in np.ndindex(batch, heads):
        past = [] if logsum is None else [(f, logsum[b, h, f].item(), mean[b, h, f]) for f in range(len(projection))]
        keys = [j for j in range(length) if mask is None or mask[b, j]]
        for i in range(length):
            seen = [j for j in keys if j <= i or not causal]
            terms = [*past, *((f, lk[b, h, j, f].item(), v[b, h, j]) for j in seen for f in range(len(projection)))]
            y[b, h, i] = mean_of([lq[b, h, i, f].item() + e for f, e, _ in terms], [value for _, _, value in terms])[0]
        for f in range(len(projection)):
            own = [*past[f:f + 1], *((f, lk[b, h, j, f].item(), v[b, h, j]) for j in keys)]
            means[b, h, f], logsums[b, h, f] = mean_of([e for _, e, _ in own], [value for _, _, value in own])
    return y, means, logsums


# -- forms -------------------------------------------------------------------------------------------------------------
def _prepared(q, k, v, projection, mask, mean, logsum, features, scale, offset):
    """ln φ of queries and keys [B H T F], the values, and the state; a key that is masked has ln φ = -∞ and the value 0."""
    xp, scale = namespace(q.data), scale_of(scale, q.shape[3])
    rows = Tensor.wrap(xp.ascontiguousarray(projection.T).astype(q.dtype))  # [K F]

    def logs(x):
        x = x * scale
        if features == "relu":
            return log(maximum(matmul(x, rows), 0.0) + offset)
        return matmul(x, rows) - sum(x * x, axis=3, keepdims=True) / 2.0  # lemma 1

    lq, lk = logs(q), logs(k)
    if mask is not None:
        lk, v = where(mask[:, None, :, None], lk, -INF), where(mask[:, None, :, None], v, 0.0)
    if mean is None:
        shape = (*q.shape[:2], len(projection))
        mean, logsum = (Tensor.wrap(xp.full(s, value, q.dtype)) for s, value in (((*shape, v.shape[3]), 0.0), (shape, -INF)))
    return lq, lk, v, mean, logsum


def _after(lk, v, mean, logsum):
    """The state after keys and values: another key of every feature is what came before."""
    every = concat([logsum[:, :, None], lk], axis=2)  # [B H 1+T F]
    weights = softmax(every, axis=2)
    return swapaxes(weights[:, :, :1]) * mean + matmul(swapaxes(weights[:, :, 1:]), v), logsumexp(every, axis=2)


def _read(lq, mean, logsum):
    """What queries take from a state: Σ_f softmax_f(ln φ_f(q_i) + logsum_f) mean_f."""
    return matmul(softmax(lq + logsum[:, :, None], axis=3), mean)


def _chunk(lq, lk, v, mean, logsum):
    """One chunk as matrix products, by the formulas of the page; in halves where a row sum is too small to be divided by."""
    xp, length, dtype = namespace(lq.data), lq.shape[2], lq.dtype
    tops = xp.maximum(xp.max(lk.data, axis=2, keepdims=True), logsum.data[:, :, None])
    tops = Tensor.wrap(xp.where(xp.isfinite(tops), tops, 0).astype(dtype))  # a [B H 1 F]: a unit, which cancels
    keys, past = exp(lk - tops), swapaxes(exp(logsum[:, :, None] - tops))  # [B H L F], [B H F 1]
    exponents = lq + tops
    queries = exp(exponents - Tensor.wrap(xp.max(exponents.data, axis=3, keepdims=True)))
    pairs = where(visible(length, length, True, None, xp), matmul(queries, swapaxes(keys)), 0.0)  # A [B H L L]
    total = sum(pairs, axis=3, keepdims=True) + matmul(queries, past)  # [B H L 1]
    if length > 1 and not (finite(lk) and finite(v) and bool((total.data > np.finfo(dtype).tiny**0.5).all())):
        half, ys = length // 2, []
        for part in (slice(0, half), slice(half, None)):
            y, mean, logsum = _chunk(lq[:, :, part], lk[:, :, part], v[:, :, part], mean, logsum)
            ys.append(y)
        return concat(ys, axis=2), mean, logsum
    none = total.data == 0
    y = (matmul(pairs, v) + matmul(queries, past * mean)) / where(none, 1.0, total)
    mass = past + swapaxes(sum(keys, axis=2, keepdims=True))  # [B H F 1]
    nothing = mass.data == 0
    mass = where(nothing, 1.0, mass)
    logsum = where(nothing[..., 0], -INF, reshape(log(mass), logsum.shape) + reshape(tops, logsum.shape))
    return y, (past * mean + matmul(swapaxes(keys), v)) / mass, logsum


@favor.form(tuning={"chunk_size": 64})
def chunkwise(q, k, v, projection, mask, mean, logsum, features, scale, offset, causal, chunk_size):
    """Chunks of M positions: time O(T F (K + V + M)) and memory O(T F) for each head. Without ``causal`` there is one state."""
    lq, lk, v, mean, logsum = _prepared(q, k, v, projection, mask, mean, logsum, features, scale, offset)
    ys = [v[:, :, :0]]
    for start in range(0, q.shape[2], chunk_size):
        part = slice(start, start + chunk_size)
        if causal:
            y, mean, logsum = _chunk(lq[:, :, part], lk[:, :, part], v[:, :, part], mean, logsum)
            ys.append(y)
        else:
            mean, logsum = _after(lk[:, :, part], v[:, :, part], mean, logsum)
    return concat(ys, axis=2) if causal else _read(lq, mean, logsum), mean, logsum


@favor.form
def parallel(q, k, v, projection, mask, mean, logsum, features, scale, offset, causal):
    """Y = softmax(E) V with E_ij = ln Σ_f φ_f(q_i) φ_f(k_j): time and memory O(T² F), the definition for all pairs at once."""
    xp = namespace(q.data)
    lq, lk, v, mean, logsum = _prepared(q, k, v, projection, mask, mean, logsum, features, scale, offset)
    seen = visible(q.shape[2], q.shape[2], causal, None, xp)
    pairs = lq[:, :, :, None] + lk[:, :, None]  # [B H T T F]
    if seen is not None:
        pairs = where(seen[:, :, None], pairs, -INF)
    weights = softmax(concat([lq + logsum[:, :, None], logsumexp(pairs, axis=4)], axis=3), axis=3)  # [B H T F+T]
    size = len(projection)
    y = matmul(weights[..., :size], mean) + weighted(weights[..., size:], v, seen)
    return y, *_after(lk, v, mean, logsum)


@favor.form
def recurrent(q, k, v, projection, mask, mean, logsum, features, scale, offset, causal):
    """One position after the other, as a model generates text: O(F (K + V)) time each, in a state of F (V + 1) numbers."""
    lq, lk, v, mean, logsum = _prepared(q, k, v, projection, mask, mean, logsum, features, scale, offset)
    ys = [v[:, :, :0]]
    for t in range(q.shape[2]):
        mean, logsum = _after(lk[:, :, t:t + 1], v[:, :, t:t + 1], mean, logsum)
        if causal:
            ys.append(_read(lq[:, :, t:t + 1], mean, logsum))
    return concat(ys, axis=2) if causal else _read(lq, mean, logsum), mean, logsum


favor.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
favor.kernel("cpu", tuning={"chunk_size": 64})
favor.kernel("cuda", tuning={"chunk_size": 32})


@favor.validate
def _(projection, mean, logsum, features, offset):
    if not len(projection):
        raise ShapeError(f"favor: projection {projection.shape} has F = 0 rows, allowed: from 1")
    if features not in FEATURES:
        raise DomainError(f"favor: features is {features!r}, allowed: {', '.join(FEATURES)}")
    if not 0 < offset < INF:
        raise DomainError(f"favor: offset is {offset}, allowed: numbers above 0")
    if (mean is None) != (logsum is None):
        raise ShapeError(f"favor: mean and logsum are one state, give both or none; "
                         f"missing: {'mean' if mean is None else 'logsum'}")


@favor.inputs
def _(draw):
    batch, heads, length = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 7, "T")
    width, features, out = draw.size(1, 4, "K"), draw.size(1, 5, "F"), draw.size(0, 3, "V")
    params = {"features": draw.choice(FEATURES), "scale": None, "offset": draw.choice((1e-3, 0.1)), "causal": draw.boolean()}
    q, k, projection = (draw.floats(*shape) for shape in ((batch, heads, length, width),) * 2 + ((features, width),))
    large = params["features"] == "positive" and draw.choice((0, 0, 3, 10, 100))
    if params["features"] == "relu":  # w · x is far from 0, where its positive part has no derivative
        q, k, projection = ((0.2 + np.abs(x)) * np.where(draw.generator().random((*x.shape[:-1], 1)) < 0.4, -1, 1)
                            for x in (q, k, projection))
    elif large:  # binary fractions, whose products are exact: exponents of 10,000 have no digits left in float32 otherwise
        size = np.where(draw.generator().random((*k.shape[:-1], 1)) < 0.5, large, 1)
        k, q, projection = np.rint(2 * k * size) / 2, np.rint(4 * q) / 4, np.rint(4 * projection) / 4
        params["scale"] = 0.5
    q, k, projection = (draw.layout(np.asarray(x, draw.dtype)) for x in (q, k, projection))
    mask = draw.mask(batch, length) if draw.boolean() else None
    state = draw.floats(batch, heads, features, out), draw.floats(batch, heads, features)
    v, state = draw.floats(batch, heads, length, out), state if draw.boolean() else (None, None)
    return (q, k, v, projection, mask, *state), params


# -- laws --------------------------------------------------------------------------------------------------------------
@law(favor, "weights sum to one")
def _(case, draw):
    y, mask = case(v=1.0, **dict.fromkeys(case.present("mean"), 1.0)).y, case.mask
    seen = np.ones(case.q.shape[0::2][:2], bool) if mask is None else mask
    seen = np.logical_or.accumulate(seen, axis=1) if case.causal else np.broadcast_to(seen.any(1, keepdims=True), seen.shape)
    seen = seen | (case.logsum is not None)
    assert_close(y, np.broadcast_to(seen[:, None, :, None], y.shape).astype(y.dtype), "weights do not sum to 1", terms=64)


@law(favor, "what is masked is not seen")
def _(case, draw):
    if case.mask is not None:
        others = {name: np.where(case.mask[:, None, :, None], case[name], case[name].dtype.type(draw.choice((2, 99, np.nan))))
                  for name in ("k", "v")}
        for name, new, old in zip(("y", "mean", "logsum"), case(**others), case(), strict=True):
            assert_close(new, old, f"favor: {name} depends on what is masked")


@law(favor, "a later key of any size changes nothing before it")
def _(case, draw):
    length = case.q.shape[2]
    if length < 2 or not case.causal:
        return
    cut, before = draw.integer(1, length - 1), case().y
    for size in (1, 3, 10, 100):
        k = case.k.copy()
        k[:, :, cut:] = size * draw.floats(*k[:, :, cut:].shape)
        assert_close(case(k=k).y[:, :, :cut], before[:, :, :cut], f"favor: keys {size} times as large change earlier outputs")


@law(favor, "one feature weighs by the keys alone")
def _(case, draw):
    if case.mask is None and case.causal and case.features == "positive":
        k = draw.floats(*case.k.shape)  # the exponents below are not exact in float32 if keys are large
        y = case.anew(k=k, projection=case.projection[:1]).y
        logs = log_features(k, case.projection[:1], "positive", case.scale, 1.0)  # [B H T 1]
        weights = np.exp(logs - np.max(logs, axis=2, keepdims=True, initial=-1e3))
        expected = np.cumsum(weights * case.v, axis=2) / np.cumsum(weights, axis=2)
        assert_close(y, expected, "favor with one feature is not the mean of the past, weighted by the keys", terms=1e4)


def exactly(q, k, v, mask, features, scale, causal, **_):
    """Attention, whose kernel is the mean of the positive features over all draws of the projection."""
    if features != "positive":
        return None
    mask = None if mask is None else mask[:, None, None, :]
    return attention(q, k, v, mask, causal=causal, scale=scale_of(scale, q.shape[3]) ** 2)


@becomes(favor, "attention", "weights are averaged over draws of the features", exact=exactly)
def _(case, draw):
    """Within 5 standard errors of 64 independent blocks: a right operator fails once in about a million draws."""
    width, blocks = 4, 64
    x = draw.floats(1, 1, 2, width, low=-0.5, high=0.5)  # one query, one key
    projection = random_projection(Random(draw.integer(0, 2**32)), blocks * width, width).astype(x.dtype)
    fixed = dict(projection=projection, mask=None, features="positive", scale=1.0)
    logs = [case.anew(q=one, k=one, v=np.zeros_like(one), **fixed).logsum  # of one key: ln φ_f(x), [1 1 F]
            for one in (x[:, :, :1], x[:, :, 1:])]
    found = np.exp(logs[0].astype(np.float64) + logs[1]).reshape(blocks, width).mean(axis=1)
    error, expected = found.std(ddof=1) / math.sqrt(blocks), math.exp(float(x[0, 0, 0] @ x[0, 0, 1]))
    assert abs(found.mean() - expected) < 5 * error, f"favor: {found.mean():.4f} ± {error:.4f} for e^(x · y) = {expected:.4f}"
