"""attention: every query takes a weighted mean of the values that it may see (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    S_ij = scale · q_i · k_j                                 how well key j fits query i; scale is 1/√K
    P_ij = exp(S_ij) / Σ_j exp(S_ij)                         the softmax over the keys j that query i sees; other weights are 0
    y_i = Σ_j P_ij v_j                                       equation (1), for all queries at once: softmax(Q Kᵀ / √K) V

minitv/variants/transformer.py tells what queries, keys and values are for, and computes three tokens by hand.

What a query sees. A causal mask is aligned at the bottom right: of S keys, the last belongs to the last of T queries, so query
i sees key j if j ≤ i + S - T. With a cache of past keys, S > T, this is the mask that continues the sequence. ``mask`` hides
more keys. A query that sees nothing gives zeros, and its gradients are zero.

Numbers. The largest score of a row is subtracted before exp, which changes no weight and prevents overflow. The form stores all
T × S weights. The kernels see a tile of keys at a time and correct the sum when a larger score comes, so they store two numbers
for each query in place of a row: the maximum and the inverse of the sum. cpu.py tells how.

Gradients. Let g_i be the gradient of y_i, and G the matrix of these rows.

    dV = Pᵀ G      dP = G Vᵀ      dS_ij = P_ij (dP_ij - Σ_k P_ik dP_ik)      dQ = scale · dS K      dK = scale · dSᵀ Q

The sum over k is equal to g_i · y_i. So the backward pass of a kernel needs y and the two numbers of each row, and computes the
weights again. With dropout, the dropped weights take the place of P in dV, and dP is dropped in the same places.

Dropout. Weight P_ij is kept iff word j mod 4 of Philox4x32-10 at counter (i, j div 4, b H + h, 1) with key ``seed`` is at least
dropout · 2³². It is then divided by 1 - dropout. The mask is a function of the position, so the backward pass draws it again.
"""

from __future__ import annotations

import math

import numpy as np

from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import causal, independent, law, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import softmax, where
from autograd.random import Random, philox
from autograd.shapes import broadcasts_to

from ..pairs import scores, weighted


def visible(queries: int, keys: int, causal: bool, mask, xp=np):
    """The boolean [.., T, S] array of what each query sees, or None for everything."""
    if causal:
        triangle = xp.arange(keys) <= xp.arange(queries)[:, None] + (keys - queries)
        return triangle if mask is None else triangle & mask
    return mask


def _scale(scale: float | None, width: int) -> float:
    """1/√width unless a scale is given; without channels all scores are 0."""
    return scale if scale is not None else 1 / math.sqrt(width) if width else 0.0


def keep_weights(shape, dropout: float, seed: int) -> np.ndarray:
    """Which weights [B H T S] dropout keeps."""
    batch, heads, queries, keys = shape
    blocks = -(-keys // 4)
    head, query, block = np.meshgrid(np.arange(batch * heads), np.arange(queries), np.arange(blocks), indexing="ij")
    words = np.stack(philox(query, block, head, np.ones_like(head), seed), axis=-1)
    draws = words.reshape(batch, heads, queries, 4 * blocks)[..., :keys]
    return draws.astype(np.uint64) >= round(dropout * 2**32)


@op("q[B H T K], k[B H S K], v[B H S V], mask?:bool[...] -> y[B H T V]",
    laws=[causal("q k:S v:S", causal=True), independent("B H", mask=None, dropout=0.0), linear_in("v"),
          shift_invariant("k", "all keys", step=0.25, scale=0.25)])  # the same constant for all scores of a query
def attention(q, k, v, mask=None, *, causal=True, scale=None, dropout=0.0, seed=0):
    """y_i = Σ_j softmax_j(scale · q_i · k_j) v_j over the keys that query i sees, equation (1); scale defaults to 1/√K.

    q[B H T K], k[B H S K], v[B H S V] -> y[B H T V]; mask broadcastable to [B H T S], True where seen. The page above has the
    rules of masks and dropout. A mask of another shape raises ShapeError, a dropout outside [0, 1] DomainError.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    scale = _scale(scale, width)
    pattern = visible(queries, keys, causal, mask)
    pattern = np.broadcast_to(True if pattern is None else pattern, (batch, heads, queries, keys))
    survivors = keep_weights(pattern.shape, dropout, seed) if dropout else np.ones(pattern.shape, bool)
    y = np.zeros((batch, heads, queries, v.shape[3]), q.dtype)
    for b, h, i in np.ndindex(batch, heads, queries):
        scores = {j: scale * sum(q[b, h, i, c].item() * k[b, h, j, c].item() for c in range(width))
                  for j in range(keys) if pattern[b, h, i, j]}
        top = max(scores.values(), default=0.0)  # exp(s - top) cannot overflow
        total = sum(math.exp(s - top) for s in scores.values())
        for j, s in scores.items():
            if survivors[b, h, i, j]:
                y[b, h, i] += math.exp(s - top) / total / (1 - dropout) * v[b, h, j]
    return y


@attention.form
def parallel(q, k, v, mask, causal, scale, dropout, seed):
    """Y = softmax(scale · Q Kᵀ) V, equation (1), for all queries at once. Time O(T S (K + V)), memory O(T S) for each head."""
    xp = namespace(q.data)
    width = q.shape[-1]
    scale = _scale(scale, width)
    pattern = visible(q.shape[2], k.shape[2], causal, mask, xp)
    weights = softmax(scores(q * scale, k, pattern), pattern)  # P [B H T S]
    if dropout:
        survivors = xp.asarray(keep_weights(weights.shape, dropout, seed))
        weights = where(survivors, weights / (1 - dropout) if dropout < 1 else weights, 0.0)
    return weighted(weights, v, pattern)  # (1) [B H T V]


attention.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
attention.kernel("cpu")
attention.kernel("cuda")


@attention.validate
def _(q, k, v, mask, causal, scale, dropout, seed):
    if mask is not None:
        target = (*q.shape[:3], k.shape[2])
        if not broadcasts_to(mask.shape, target):
            raise ShapeError(f"attention: mask {mask.shape} does not broadcast to [B H T S] = {target}")
    Random(seed)  # raises unless it is a seed
    if not 0 <= dropout <= 1:
        raise DomainError(f"attention: dropout must be a probability in [0, 1], got {dropout}")


@attention.inputs
def _(draw):
    batch, heads, queries, keys = draw.size(0, 2), draw.size(0, 2), draw.size(0, 6), draw.size(0, 6)
    width, out = draw.size(1, 4), draw.size(0, 3)
    shape = (batch, heads, queries, keys)
    mask = None
    if draw.boolean():
        mask = draw.mask(*[1 if draw.integer(0, 3) == 0 else n for n in shape][draw.integer(0, 2):])
    q, k = draw.floats(batch, heads, queries, width), draw.floats(batch, heads, keys, width)
    params = {"causal": draw.boolean(), "scale": draw.choice((None, 0.7)), "dropout": draw.choice((0.0, 0.0, 0.4)),
              "seed": draw.integer(0, 2**63)}
    return (q, k, draw.floats(batch, heads, keys, out), mask), params


@law(attention, "weights sum to one")
def _(case, draw):
    y, shape = case(v=1.0, dropout=0.0).y, (*case.q.shape[:3], case.k.shape[2])
    pattern = visible(*shape[2:], case.causal, case.mask)
    pattern = np.broadcast_to(True if pattern is None else pattern, shape).any(-1, keepdims=True)
    assert_close(y, np.broadcast_to(pattern, y.shape).astype(y.dtype), "weights do not sum to 1", terms=16)


@law(attention, "without a causal mask, the order of keys does not matter")
def _(case, draw):
    order, mask = draw.generator().permutation(case.k.shape[2]), case.mask
    mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., order]
    other = case(k=case.k[:, :, order], v=case.v[:, :, order], mask=mask, causal=False, dropout=0.0).y
    assert_close(other, case(causal=False, dropout=0.0).y, "attention depends on the order of keys", terms=16)
