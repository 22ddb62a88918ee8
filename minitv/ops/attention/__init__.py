"""attention: every query takes a weighted mean of the values it may see. Vaswani et al. 2017, arXiv 1706.03762, eq. 1.

    y_i = Σ_j P_ij v_j,    P = softmax over the visible j of (scale · q_i · k_j)

Causal masks are aligned at the bottom right: of S keys, the last belongs to the last of T queries, so key j is visible
to query i iff j <= i + S - T. With a cache of past keys (S > T) this is the mask that continues the sequence. A query
that sees nothing gives zeros with gradient zero. With dropout, the weight P_ij is kept iff word j mod 4 of Philox4x32-10
at counter (i, j div 4, b H + h, 1) with key ``seed`` is at least dropout · 2³², and then divided by 1 - dropout.
"""

from __future__ import annotations

import math

import numpy as np

from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import causal, identity, independent, linear_in, shift_invariant
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
    kept = words.reshape(batch, heads, queries, 4 * blocks)[..., :keys]
    return kept.astype(np.uint64) >= round(dropout * 2**32)


def _rows_sum_to_one(case, draw):
    y, shape = case(v=1.0, dropout=0.0).y, (*case.q.shape[:3], case.k.shape[2])
    seen = visible(*shape[2:], case.causal, case.mask)
    seen = np.broadcast_to(True if seen is None else seen, shape).any(-1, keepdims=True)
    assert_close(y, np.broadcast_to(seen, y.shape).astype(y.dtype), "weights do not sum to 1", terms=16)


def _key_order(case, draw):
    order, mask = draw.generator().permutation(case.k.shape[2]), case.mask
    mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., order]
    other = case(k=case.k[:, :, order], v=case.v[:, :, order], mask=mask, causal=False, dropout=0.0).y
    assert_close(other, case(causal=False, dropout=0.0).y, "attention depends on the order of keys", terms=16)


@op("q[B H T K], k[B H S K], v[B H S V], mask?:bool[...] -> y[B H T V]",
    laws=[causal("q k:S v:S", causal=True), independent("B H", mask=None, dropout=0.0), linear_in("v"),
          shift_invariant("k", "all keys", step=0.25, scale=0.25),  # the same constant for all scores of a query
          identity("weights sum to one", _rows_sum_to_one),
          identity("without a causal mask, the order of keys does not matter", _key_order)])
def attention(q, k, v, mask=None, *, causal=True, scale=None, dropout=0.0, seed=0):
    """y_i = Σ_j softmax_j(scale q_i · k_j) v_j over the keys that query i sees; scale defaults to 1/√K.

    q[B H T K], k[B H S K], v[B H S V], mask broadcastable to [B H T S], True where seen.
    The page's first lines have the rules of masks and dropout.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    scale = _scale(scale, width)
    seen = visible(queries, keys, causal, mask)
    seen = np.broadcast_to(True if seen is None else seen, (batch, heads, queries, keys))
    kept = keep_weights(seen.shape, dropout, seed) if dropout else np.ones(seen.shape, bool)
    y = np.zeros((batch, heads, queries, v.shape[3]), q.dtype)
    for b, h, i in np.ndindex(batch, heads, queries):
        scores = {j: scale * sum(q[b, h, i, c].item() * k[b, h, j, c].item() for c in range(width))
                  for j in range(keys) if seen[b, h, i, j]}
        top = max(scores.values(), default=0.0)
        total = sum(math.exp(s - top) for s in scores.values())
        for j, s in scores.items():
            if kept[b, h, i, j]:
                y[b, h, i] += math.exp(s - top) / total / (1 - dropout) * v[b, h, j]
    return y


@attention.form
def parallel(q, k, v, mask, causal, scale, dropout, seed):
    """All scores at once, a [B H T S] array."""
    xp = namespace(q.data)
    width = q.shape[-1]
    scale = _scale(scale, width)
    seen = visible(q.shape[2], k.shape[2], causal, mask, xp)
    weights = softmax(scores(q * scale, k, seen), seen)
    if dropout:
        kept = xp.asarray(keep_weights(weights.shape, dropout, seed))
        weights = where(kept, weights / (1 - dropout) if dropout < 1 else weights, 0.0)
    return weighted(weights, v, seen)


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
