"""relative_attention: attention whose scores know distances (Transformer-XL: Dai et al. 2019, arXiv 1901.02860).

A query asks for two things: what a key is, and how far away it stands. For the second there is a vector p_c for each distance.

    s_ij = ((q_i + u) · k_j + (q_i + w) · p_c) / √K           c is the number of the distance of i and j, see below
    a_ij = softmax_j(s_ij)                                    over the keys j that query i sees
    y_i = Σ_j a_ij v_j

u and w are learned for each head. They are added to every query: u says which keys all queries look at, w which distances. This
is section 3.3 of Transformer-XL, where w is called v.

Distances. The last of the T queries stands where the last of the S keys does, so query i stands at i + S - T. Its distance to
key j is n = i + S - T - j. It is S - 1 for the last query and the first key, 0 for a key at the query's place, and -(T - 1) for
the first query and the last key, which lies in the future. So there are C = T + S - 1 distances, and p_c belongs to n = S - 1 -
c:

    c = 0, .. C - 1      n = S - 1, S - 2, .. 1, 0, -1, .. -(T - 1)              c = T - 1 - i + j

The shift. All products M_ic = (q_i + w) · p_c are one matrix product, T × C numbers for each head. That of query i and key j
stands in row i, column T - 1 - i + j. So row i of the scores is a slice of row i of M, which begins one column earlier than
that of the row before. In memory the rows follow each other, C numbers apart. Read with C - 1 numbers a row, from number T - 1
on, all slices stand below each other: three views, and nothing is computed.

    M, T = S = 3, C = 5                     numbers T - 1 .. with rows of C - 1      the first S columns
    00 01 02 03 04                          02 03 04 10                              02 03 04
    10 11 12 13 14                          11 12 13 14                              11 12 13
    20 21 22 23 24                          20 21 22 23                              20 21 22

    >>> m = Tensor(np.add.outer([0, 10, 20], range(5)).astype(float))
    >>> print(shifted(m, 3).numpy().astype(int))
    [[ 2  3  4]
     [11 12 13]
     [20 21 22]]

Gradients. g_i is the gradient of y_i. That of √K s_ij is called d_ij, and it goes to both terms of the sum. Backward, the shift
puts d_ij into column c of row i of M, and the rest of M has gradient 0:

    d_ij = a_ij g_i · (v_j - y_i) / √K          dv_j = Σ_i a_ij g_i
    dq_i = Σ_j d_ij (k_j + p_c)                 dk_j = Σ_i d_ij (q_i + u)         dp_c = Σ d_ij (q_i + w)  over i, j with that c
    du = Σ_ij d_ij k_j                          dw = Σ_ij d_ij p_c                dp, du and dw sum over the batch too

An example: one channel, two keys and the second query, with q = 0, u = 0 and w = 1, so distances alone count. The distances 1
and 0 have p = ln 3 and 0. So the key before has 3/4 of the attention, whatever it is; the values 4 and 8 make 5:

>>> import numpy as np
>>> from minitv.ops import relative_attention
>>> one = np.ones((1, 1))
>>> k, v = np.array([[[[7.0], [-7.0]]]]), np.array([[[[4.0], [8.0]]]])
>>> relative_attention(np.zeros((1, 1, 1, 1)), k, v, np.log([[[3.0], [1.0]]]), 0 * one, one).numpy().ravel().round(6)
array([5.])

A trap. Transformer-XL is causal, so it has vectors for distances to the past alone. Above the diagonal its shift then gives
numbers of the next row, which its mask hides. In a Conformer both sides are seen, and nothing hides them: several libraries had
this error (ESPnet's pull request 2816 mends it). Here future distances have columns of their own, and the definition takes the
distance of each pair instead of a shift.
"""

from __future__ import annotations

import math

import numpy as np

from autograd import Tensor
from autograd.errors import ShapeError
from autograd.laws import becomes, independent, law, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import getitem, matmul, reshape, softmax, swapaxes
from autograd.shapes import broadcasts_to

from ..attention import attention
from ..pairs import scores, weighted


@op("q[B H T K], k[B H S K], v[B H S V], p[H C K], u[H K], w[H K], mask?:bool[...] -> y[B H T V]",
    laws=[independent("B", mask=None), linear_in("v")])
def relative_attention(q, k, v, p, u, w, mask=None):
    """y_i = Σ_j softmax_j(((q_i + u) · k_j + (q_i + w) · p_c) / √K) v_j with c = T - 1 - i + j, for every head.

    q[B H T K], k[B H S K], v[B H S V] -> y[B H T V]; p[H C K] has a vector for each of the C = T + S - 1 distances, the largest
    first, and u[H K], w[H K] are learned. mask is broadcastable to [B H T S], True where a key is seen; a query that sees
    nothing gives zeros. Another C, and a mask of another shape, raise ShapeError.
    """
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    y, scale = np.zeros((*q.shape[:3], v.shape[3]), q.dtype), 1 / math.sqrt(max(width, 1))
    seen = np.broadcast_to(True if mask is None else mask, (batch, heads, queries, keys))
    for b, h, i in np.ndindex(batch, heads, queries):
        logits = {}
        for j in (j for j in range(keys) if seen[b, h, i, j]):
            distance = (i + keys - queries) - j
            place = p[h, keys - 1 - distance]
            logits[j] = scale * sum((q[b, h, i, c].item() + u[h, c].item()) * k[b, h, j, c].item()
                                    + (q[b, h, i, c].item() + w[h, c].item()) * place[c].item() for c in range(width))
        top = max(logits.values(), default=-math.inf)
        total = sum(math.exp(s - top) for s in logits.values())
        for j, s in logits.items():
            y[b, h, i] += math.exp(s - top) / total * v[b, h, j]
    return y


def shifted(m: Tensor, keys: int) -> Tensor:
    """The numbers [.. T S] for every query and key, of m[.. T C], which has them for every query and distance."""
    *lead, queries, columns = m.shape
    if not queries or not keys:
        return reshape(m[..., :0], (*lead, queries, keys))
    if queries == 1:
        return m
    flat = reshape(m, (*lead, queries * columns))
    rows = getitem(flat, key=(..., slice(queries - 1, queries - 1 + queries * (columns - 1))))
    return getitem(reshape(rows, (*lead, queries, columns - 1)), key=(..., slice(0, keys)))


@relative_attention.form
def parallel(q, k, v, p, u, w, mask):
    """All scores as two products of matrices, the second one shifted. Time O(T (S + C) K), memory O(T C) for each head."""
    (_, heads, _, width), keys = q.shape, k.shape[2]
    content = scores(q + reshape(u, (heads, 1, width)), k, mask)  # [B H T S]
    places = matmul(q + reshape(w, (heads, 1, width)), swapaxes(p))  # M [B H T C]
    content = content + shifted(places, keys)  # √K s [B H T S]
    return weighted(softmax(content * (1 / math.sqrt(max(width, 1))), mask), v, mask)


@relative_attention.validate
def _(q, k, p, mask):
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    columns = max(queries + keys - 1, 0)
    if p.shape[1] != columns:
        raise ShapeError(f"relative_attention: p has {p.shape[1]} distances; T = {queries} queries and S = {keys} keys have "
                         f"{columns}")
    if mask is not None and not broadcasts_to(mask.shape, (batch, heads, queries, keys)):
        raise ShapeError(f"relative_attention: mask {mask.shape} does not broadcast to [B H T S] = "
                         f"{(batch, heads, queries, keys)}")


@relative_attention.inputs
def _(draw):
    batch, heads, queries, keys = draw.size(0, 2, "B"), draw.size(1, 2, "H"), draw.size(0, 5, "T"), draw.size(0, 5, "S")
    width, out = draw.size(1, 4, "K"), draw.size(0, 3, "V")
    mask = None
    if draw.boolean():
        mask = draw.mask(*[1 if draw.integer(0, 3) == 0 else n for n in (batch, heads, queries, keys)][draw.integer(0, 2):])
    columns = max(queries + keys - 1, 0)
    q, k, v = (draw.floats(batch, heads, *shape) for shape in ((queries, width), (keys, width), (keys, out)))
    return (q, k, v, draw.floats(heads, columns, width), draw.floats(heads, width), draw.floats(heads, width), mask), {}


# -- laws --------------------------------------------------------------------------------------------------------------
@becomes(relative_attention, "attention", "all distances look alike")
def _(case, draw):
    p = np.broadcast_to(case.p[:, :1] if case.p.shape[1] else case.p, case.p.shape)
    expected = attention.definition(case.q.astype(np.float64) + case.u[:, None], case.k.astype(np.float64), case.v, case.mask,
                                    causal=False)[0]
    assert_close(case(p=p).y, expected, "it is not attention of q + u", terms=64)


@law(relative_attention, "a vector of a distance far above the others picks that distance")
def _(case, draw):
    queries, keys = case.q.shape[2], case.k.shape[2]
    if not queries or not keys or case.mask is not None:
        return
    column = draw.integer(0, queries + keys - 2)
    p, zero = np.zeros_like(case.p), np.zeros_like(case.q)
    p[:, column] = 1
    y = case(q=zero, u=0.0, w=400.0 / math.sqrt(case.q.shape[3]), p=p).y
    for i in range(queries):
        j = column - (queries - 1 - i)
        if 0 <= j < keys:
            assert_close(y[:, :, i], case.v[:, :, j], f"query {i} takes another value than that at its distance", terms=64)


@law(relative_attention, "a large constant added to all keys changes nothing")
def _(case, draw):
    if case.q.shape[3] in (1, 4):  # where the scores are divided by 1 or 2, so that nothing is rounded
        shift_invariant("k", "all keys", step=0.25).check(case, draw)


@law(relative_attention, "the same distances from a later beginning give the same")
def _(case, draw):
    """Queries and keys after as many that nobody sees."""
    more = draw.integer(1, 2)
    batch, heads, queries, keys = *case.q.shape[:3], case.k.shape[2]
    seen = np.broadcast_to(True if case.mask is None else case.mask, (batch, heads, queries, keys))
    longer = {name: np.concatenate([draw.floats(*x.shape[:2], more, x.shape[3]), x], axis=2)
              for name, x in (("k", case.k), ("v", case.v))}
    p = np.concatenate([draw.floats(heads, queries + keys + more - 1 - case.p.shape[1], case.p.shape[2]), case.p], axis=1)
    mask = np.concatenate([np.zeros((*seen.shape[:3], more), bool), seen], axis=3)
    assert_close(case(**longer, p=p, mask=mask).y, case(mask=seen).y, "a distance depends on the place", terms=64)
