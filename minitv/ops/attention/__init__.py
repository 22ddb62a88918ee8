"""attention: every query takes a weighted mean of the values that it may see (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    S_ij = scale · q_i · k_j                                 how well key j fits query i; scale is 1/√K
    P_ij = exp(S_ij) / Σ_j exp(S_ij)                         the softmax over the keys j that query i sees; other weights are 0
    y_i = Σ_j P_ij v_j                                       equation (1), for all queries at once: softmax(Q Kᵀ / √K) V

minitv/variants/transformer.py tells what queries, keys and values are for, and computes three tokens by hand.

What a query sees. Key j stands at position j. The last of the T queries stands where the last of the S keys does, so query i
stands at p = i + S - T. With a cache of past keys, S > T, this continues the sequence. Query i sees key j if all of these hold:

    causal             j ≤ p
    mask               its element is True
    window             |p - j| < window, or j < sinks: the nearest keys, and besides them the first ones of the sequence
    segment            ⌊p / segment⌋ = ⌊j / segment⌋: the key is in the query's segment
    dilation           (p mod segment) mod dilation = s_h = (j mod segment) mod dilation; without a segment, p mod dilation.
                       Head h takes every dilation-th position of a segment, from s_h on; its other queries see nothing.
                       ``offsets`` gives s_h: "modulo" is h mod dilation, "block" is ⌊h / ⌈H / dilation⌉⌋

A query that sees nothing gives zeros, and its gradients are zero.

More scores. ``sink`` is one more score for each head, that of a key which all queries see and whose value is 0. A query that
finds nothing leaves its weight there. ``slopes`` adds slope_h · (j - p) to the scores, which makes far keys weigh less (ALiBi,
Press et al. 2021). Slopes are constants.

Groups. If k and v have G heads and q has H, each head of k and v serves H/G neighbouring heads of q: head h reads head ⌊h G /
H⌋. The gradients of k and v are sums over the heads that they serve. Nothing is copied.

The second output. lse_i = ln Σ_j exp(S_ij), with the sink among the j, is the log of what the softmax divides by. It is -∞
where nothing is seen. With it, merge_attention makes of the results for two sets of keys the result for all of them.

Numbers. The largest score of a row is subtracted before exp, which changes no weight and prevents overflow. The form stores all
T × S weights. The kernels see a tile of keys at a time and correct the sum when a larger score comes, so they store two numbers
for each query in place of a row: the maximum and the inverse of the sum. cpu.py tells how.

Gradients. Let g_i be the gradient of y_i, and G the matrix of these rows.

    dV = Pᵀ G      dP = G Vᵀ      dS_ij = P_ij (dP_ij - Δ_i + c_i)      dQ = scale · dS K      dK = scale · dSᵀ Q
    Δ_i = Σ_k P_ik dP_ik = g_i · y_i      dsink = Σ_i P_i,sink (c_i - Δ_i)

c_i is the gradient of lse_i. The sum over k is equal to g_i · y_i. So the backward pass of a kernel needs y and the two numbers
of each row, and computes the weights again. With dropout, the dropped weights take the place of P in dV, and dP is dropped in
the same places.

Dropout. Weight P_ij is kept iff word j mod 4 of Philox4x32-10 at counter (i, j div 4, b H + h, 1) with key ``seed`` is at least
dropout · 2³². It is then divided by 1 - dropout. The mask is a function of the position, so the backward pass draws it again.
"""

from __future__ import annotations

import functools
import math
import operator

import numpy as np

from autograd import Tensor
from autograd.device import namespace
from autograd.errors import DomainError, ShapeError
from autograd.laws import causal, independent, law, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import broadcast_to, concat, logsumexp, reshape, softmax, where
from autograd.random import Random, philox
from autograd.shapes import broadcasts_to

from ..pairs import scores, weighted

OFFSETS = ("modulo", "block")


def visible(queries: int, keys: int, causal: bool, mask=None, xp=np, *, heads=1, window=None, sinks=0, segment=None, dilation=1,
            offsets="modulo"):
    """The boolean [.. T S] array of what each query sees, or None for everything; with a dilation, [H T S]."""
    j, p = xp.arange(keys), xp.arange(queries)[:, None] + (keys - queries)  # positions of keys [S] and of queries [T 1]
    parts = [] if mask is None else [mask]
    if causal:
        parts.append(j <= p)
    if window is not None:
        parts.append((xp.abs(p - j) < window) | (j < sinks))
    if segment is not None:
        parts.append(p // segment == j // segment)
    if dilation > 1:
        start = xp.asarray(offset_of(np.arange(heads), heads, dilation, offsets))[:, None, None]  # s [H 1 1]
        parts += [(x if segment is None else x % segment) % dilation == start for x in (p, j)]
    return functools.reduce(operator.and_, parts) if parts else None


def offset_of(head, heads: int, dilation: int, offsets: str):
    """s_h of a head or of an array of them: h mod dilation, or ⌊h / ⌈H / dilation⌉⌋, as in torchscale."""
    return head % dilation if offsets == "modulo" else head // max(-(-heads // dilation), 1)


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


LAWS = [causal("q k:S v:S", causal=True), independent("B", mask=None, dropout=0.0), linear_in("v"),
        # The scores of a query all get the same constant.
        shift_invariant("k", "all keys", step=0.25, but_for="lse", scale=0.25, sink=None, slopes=None)]


@op("q[B H T K], k[B G S K], v[B G S V], mask?:bool[...], sink?[H], slopes?:const[H] -> y[B H T V], lse[B H T]", logs="lse",
    laws=LAWS)
def attention(q, k, v, mask=None, sink=None, slopes=None, *, causal=True, scale=None, dropout=0.0, seed=0, window=None, sinks=0,
              segment=None, dilation=1, offsets="modulo"):
    """y_i = Σ_j softmax_j(scale · q_i · k_j) v_j over the keys that query i sees, equation (1), and lse_i, the log of its sum.

    q[B H T K], k[B G S K], v[B G S V] -> y[B H T V], lse[B H T]; G divides H, and head h reads keys and values ⌊h G / H⌋.
    ``scale`` defaults to 1/√K. mask is broadcastable to [B H T S], True where seen. The page above has the rules of masks,
    ``window`` and ``sinks``, ``segment``, ``dilation`` and ``offsets``, sink[H], slopes[H] and dropout. Heads that G does not
    divide and a mask of another shape raise ShapeError; a dropout outside [0, 1], a window, segment or dilation below 1,
    negative sinks and an unknown rule of offsets raise DomainError.
    """
    (batch, heads, queries, width), (groups, keys), scale = q.shape, k.shape[1:3], _scale(scale, q.shape[3])
    pattern = visible(queries, keys, causal, mask, heads=heads, window=window, sinks=sinks, segment=segment, dilation=dilation,
                      offsets=offsets)
    pattern = np.broadcast_to(True if pattern is None else pattern, (batch, heads, queries, keys))
    survivors = keep_weights(pattern.shape, dropout, seed)
    y, lse = np.zeros((*q.shape[:3], v.shape[3]), q.dtype), np.full(q.shape[:3], -math.inf, q.dtype)
    for b, h, i in np.ndindex(batch, heads, queries):
        g, slope = h * groups // heads, 0.0 if slopes is None else slopes[h].item()
        scores = {j: scale * sum(q[b, h, i, c].item() * k[b, g, j, c].item() for c in range(width))
                  + slope * (j - (i + keys - queries)) for j in range(keys) if pattern[b, h, i, j]}
        logits = [*scores.values()] if sink is None else [*scores.values(), sink[h].item()]
        top = max(logits, default=-math.inf)  # exp(s - top) cannot overflow
        if top == -math.inf:
            continue
        total = sum(math.exp(s - top) for s in logits)
        lse[b, h, i] = top + math.log(total)
        for j, s in scores.items():
            if survivors[b, h, i, j]:
                y[b, h, i] += math.exp(s - top) / total / (1 - dropout) * v[b, g, j]
    return y, lse


@attention.form
def parallel(q, k, v, mask, sink, slopes, causal, scale, dropout, seed, window, sinks, segment, dilation, offsets):
    """Y = softmax(scale · Q Kᵀ) V, equation (1), for all queries at once. Time O(T S (K + V)), memory O(T S) for each head."""
    xp = namespace(q.data)
    (batch, heads, queries, width), (groups, keys) = q.shape, k.shape[1:3]
    shape = batch, heads, queries, keys
    pattern = visible(queries, keys, causal, mask, xp, heads=heads, window=window, sinks=sinks, segment=segment,
                      dilation=dilation, offsets=offsets)

    def by_group(x):
        """[B H T n] -> [B G (H/G)T n]: the queries of all heads that share keys meet them in one product."""
        return x if heads == groups else x.reshape(batch, groups, heads // max(groups, 1) * queries, x.shape[-1])

    shared = None if pattern is None or heads == groups else by_group(xp.broadcast_to(pattern, shape))
    shared = pattern if heads == groups else shared
    logits = reshape(scores(by_group(q * _scale(scale, width)), k, shared), shape)  # S [B H T S]
    if slopes is not None:
        distance = xp.arange(keys) - (xp.arange(queries)[:, None] + (keys - queries))
        logits = logits + Tensor.wrap((slopes[:, None, None] * distance).astype(q.dtype))
    if sink is not None:  # one more logit, which every query sees and which has no value
        logits = concat([logits, broadcast_to(reshape(sink, (heads, 1, 1)), shape=(*shape[:3], 1))], axis=3)
        always = xp.ones((*shape[:3], 1), bool)
        pattern = None if pattern is None else xp.concatenate([xp.broadcast_to(pattern, shape), always], axis=3)
    lse = logsumexp(logits if pattern is None else where(pattern, logits, -math.inf), axis=3)
    weights = softmax(logits, pattern)[..., :keys]  # P [B H T S]
    if dropout:
        survivors = xp.asarray(keep_weights(weights.shape, dropout, seed))
        weights = where(survivors, weights / (1 - dropout) if dropout < 1 else weights, 0.0)
    return reshape(weighted(by_group(weights), v, shared), (*shape[:3], v.shape[3])), lse  # (1) [B H T V]


attention.kernel("cpu", name="step", prefix="step_", sizes={"T": 1})
attention.kernel("cpu")
attention.kernel("cuda")


@attention.validate
def _(q, k, mask, dropout, seed, window, sinks, segment, dilation, offsets):
    heads, groups = q.shape[1], k.shape[1]
    if heads != groups and (not groups or heads % groups):
        raise ShapeError(f"attention: k and v have G = {groups} heads, which do not divide the H = {heads} heads of q")
    if mask is not None:
        target = (*q.shape[:3], k.shape[2])
        if not broadcasts_to(mask.shape, target):
            raise ShapeError(f"attention: mask {mask.shape} does not broadcast to [B H T S] = {target}")
    Random(seed)  # raises unless it is a seed
    if not 0 <= dropout <= 1:
        raise DomainError(f"attention: dropout must be a probability in [0, 1], got {dropout}")
    for name, value, low in (("window", window, 1), ("sinks", sinks, 0), ("segment", segment, 1), ("dilation", dilation, 1)):
        if not ((type(value) is int and value >= low) or (value is None and name in ("window", "segment"))):
            raise DomainError(f"attention: {name} is {value!r}, allowed: an integer of at least {low}"
                              f"{' or None' if name in ('window', 'segment') else ''}")
    if offsets not in OFFSETS:
        raise DomainError(f"attention: offsets is {offsets!r}, allowed: {', '.join(OFFSETS)}")


@attention.inputs
def _(draw):
    plain = draw.boolean()  # as in the paper
    batch, queries, keys = draw.size(0, 2, "B"), draw.size(0, 6, "T"), draw.size(0, 6, "S")
    width, out = draw.size(1, 4, "K"), draw.size(0, 3, "V")
    groups, heads = draw.multiple("G", "H", 0, 2, 1, 1 if plain else 2)
    shape = (batch, heads, queries, keys)
    mask = None
    if draw.integer(0, 2) == 0:
        mask = draw.mask(*[1 if draw.integer(0, 3) == 0 else n for n in shape][draw.integer(0, 2):])
    q, k = draw.floats(batch, heads, queries, width), draw.floats(batch, groups, keys, width)
    v = draw.floats(batch, groups, keys, out)
    sink = draw.floats(heads) if not plain and draw.boolean() else None
    slopes = draw.floats(heads, low=0.0, high=1.0) if not plain and draw.boolean() else None
    params = {"causal": draw.boolean(), "scale": draw.choice((None, 0.7)), "dropout": draw.choice((0.0, 0.0, 0.4)),
              "seed": draw.integer(0, 2**63)}
    if not plain:
        params |= {"window": draw.choice((None, None, 1, 2, 3)), "sinks": draw.choice((0, 1, 2, 9)),
                   "segment": draw.choice((None, None, 2, 3, 5)), "dilation": draw.choice((1, 1, 2, 3)),
                   "offsets": draw.choice(OFFSETS)}
    return (q, k, v, mask, sink, slopes), params


# -- laws --------------------------------------------------------------------------------------------------------------
STRUCTURE = ("window", "sinks", "segment", "dilation", "offsets")
WHOLE = {"window": None, "segment": None, "dilation": 1}  # no structure


def pattern_of(case, **changes):
    """What the queries of a case see, [B H T S]."""
    rules = {name: changes.get(name, case[name]) for name in STRUCTURE}
    shape = (*case.q.shape[:3], case.k.shape[2])
    pattern = visible(*shape[2:], changes.get("causal", case.causal), changes.get("mask", case.mask), heads=shape[1], **rules)
    return np.broadcast_to(True if pattern is None else pattern, shape)


def _same(found, expected, message):
    for name, one, two in zip(("y", "lse"), found, expected, strict=True):
        assert_close(one, two, f"{name} of attention: {message}", terms=64)


def _alike(case):
    """Other queries and keys with the same scores, so that a law compares two different calls."""
    return {"q": 2 * case.q, "k": case.k / 2}


@law(attention, "weights sum to one")
def _(case, draw):
    y, pattern = case(v=1.0, dropout=0.0, sink=None).y, pattern_of(case).any(-1, keepdims=True)
    assert_close(y, np.broadcast_to(pattern, y.shape).astype(y.dtype), "weights do not sum to 1", terms=16)


@law(attention, "lse is the log of the sum")
def _(case, draw):
    pattern = pattern_of(case)
    repeated = np.repeat(case.k, case.q.shape[1] // max(case.k.shape[1], 1), axis=1)
    logits = _scale(case.scale, case.q.shape[3]) * case.q @ np.swapaxes(repeated, 2, 3).astype(np.float64)
    sums = np.sum(np.where(pattern, np.exp(np.where(pattern, logits, 0)), 0), axis=3)
    with np.errstate(divide="ignore"):
        assert_close(case(sink=None, slopes=None).lse, np.log(sums), "lse is not the log of the sum", terms=64)


@law(attention, "without a causal mask, the order of keys does not matter")
def _(case, draw):
    order, mask = draw.generator().permutation(case.k.shape[2]), case.mask
    mask = mask if mask is None or not mask.ndim or mask.shape[-1] == 1 else mask[..., order]
    plain = {"causal": False, "dropout": 0.0, "slopes": None, **WHOLE}
    _same(case(k=case.k[:, :, order], v=case.v[:, :, order], mask=mask, **plain), case(**plain), "the order of keys matters")


@law(attention, "heads that share keys are heads with the same keys")
def _(case, draw):
    k, v = (np.repeat(x, case.q.shape[1] // max(x.shape[1], 1), axis=1) for x in (case.k, case.v))
    _same(case(k=k, v=v), case(), "a head does not read the keys of its group")


@law(attention, "a head depends on its keys alone")
def _(case, draw):
    heads, groups = case.q.shape[1], case.k.shape[1]
    if not heads:
        return
    h = draw.integer(0, heads - 1)
    g, plain = h * groups // heads, {"mask": None, "dropout": 0.0, "dilation": 1}
    own = {name: None if case[name] is None else case[name][[h]] for name in ("sink", "slopes")}
    alone = case(q=case.q[:, [h]], k=case.k[:, [g]], v=case.v[:, [g]], **own, **plain)
    _same(alone, [x[:, [h]] for x in case(**plain)], "a head depends on another")


@law(attention, "a structure is the mask that it stands for")
def _(case, draw):
    _same(case(**_alike(case), mask=pattern_of(case), causal=False, **WHOLE), case(), "it hides something else")


@law(attention, "a window or a segment as long as the sequence hides nothing")
def _(case, draw):
    length = max(case.q.shape[2], case.k.shape[2])
    changes = {"window": length + draw.integer(1, 2)} if draw.boolean() else {"segment": length + 1, "window": None}
    if case.q.shape[2] <= case.k.shape[2]:  # a query before all keys is in a segment before theirs
        _same(case(**_alike(case), dilation=1, **{"segment": None, **changes}), case(**WHOLE), "it hides something")


@law(attention, "a sink is a key of zeros with a value of zeros")
def _(case, draw):
    """With logit 0, as in softmax₁ = exp(x) / (1 + Σ exp(x))."""
    before = [np.concatenate([np.zeros((*x.shape[:2], 1, x.shape[3]), x.dtype), x], axis=2) for x in (case.k, case.v)]
    seen = np.concatenate([np.ones((*case.q.shape[:3], 1), bool), pattern_of(case)], axis=3)
    plain = {"slopes": None, "dropout": 0.0, "causal": False, **WHOLE}
    _same(case(sink=np.zeros(case.q.shape[1], case.q.dtype), mask=pattern_of(case), **plain),
          case(k=before[0], v=before[1], sink=None, mask=seen, **plain), "a sink is not a key of zeros")


@law(attention, "a sequence in two parts, with a cache of keys, is the sequence")
def _(case, draw):
    queries, keys = case.q.shape[2], case.k.shape[2]
    cut = draw.integer(0, queries)
    if keys < queries - cut or not case.causal or case.mask is not None or case.dropout:
        return
    past = keys - (queries - cut)
    one = case(q=case.q[:, :, :cut], k=case.k[:, :, :past], v=case.v[:, :, :past])
    two = case(q=case.q[:, :, cut:])
    _same([np.concatenate(parts, axis=2) for parts in zip(one, two, strict=True)], case(), f"it depends on the cut at {cut}")


@law(attention, "a large key shows nowhere before its position")
def _(case, draw):
    queries, keys = case.q.shape[2], case.k.shape[2]
    if not case.causal or min(queries, keys) < 2:
        return
    j, scale = draw.integer(1, keys - 1), draw.choice((1, 3, 10, 100))
    k, v = case.k.copy(), case.v.copy()
    k[:, :, j], v[:, :, j] = scale * draw.floats(*k[:, :, j].shape), draw.floats(*v[:, :, j].shape)
    before = max(0, j - (keys - queries))  # the queries that stand before key j
    _same([x[:, :, :before] for x in case(k=k, v=v)], [x[:, :, :before] for x in case()], f"key {j} shows before its position")
