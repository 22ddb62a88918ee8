"""dilated_attention on the CPU: attention's kernels for each pattern, whose keys join those of the patterns before.

The forward pass of attention goes over the keys of a query in tiles, with the largest score so far, the sum of exp(score -
largest) and the output so far. Here it begins each pattern with what the patterns before have left, as if these were more
tiles: so the softmax is one, the work of a pattern is that of its active positions, and nothing of a single pattern is kept.
The backward pass gets the largest score and the sum of all patterns, and adds to the gradients of the patterns before.
"""

import math

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.panels import by_position, flat

from ..attention import cpu as attention


def supports(q):
    return None if q.shape[3] else "needs at least one channel in q and k"


def forward(q, k, v, segments, dilations, offsets, causal, scale, start):
    (B, H, T, K), S, V, past = q.shape, k.shape[2], v.shape[3], start + k.shape[2] - q.shape[2]
    y = by_position(B, H, T, V, q.dtype, np.zeros)
    stats, lse = np.zeros((B * H, 2, T), q.dtype), np.zeros((B * H, T), q.dtype)  # as of attention
    calls, heads = [], (np.full(H, -math.inf, q.dtype), np.zeros(H, q.dtype))  # no sinks, no slopes
    for w, r in zip(segments, dilations, strict=True):
        skip = past // w * w - start  # keys before the segment of the first query
        rule = int(causal), attention.NEVER, 0, w, r, int(offsets == "block"), 1
        arguments = (flat(q), flat(k[:, :, skip:]), flat(v[:, :, skip:]), *attention._flat_mask(None),
                     (B, H, H, T, S - skip, K, V), rule, *attention._options(q.dtype, K, scale, 0, 0), *heads)
        calls.append((skip, arguments))
        if min(B, H, T):
            attention._forward(*arguments, flat(y), stats, lse, attention.groups_of(arguments))
    with np.errstate(divide="ignore"):
        np.log(lse, out=lse)
    lse += stats[:, 0]
    return (y, lse.reshape(B, H, T)), (calls, y, stats, S)


def backward(saved, g_y, g_lse):
    """The gradients of q, k and v; they are laid out like y."""
    calls, y, stats, S = saved
    B, H, _, T, _, K, V = calls[0][1][5]
    gq, gk, gv = (by_position(B, H, rows, d, y.dtype, np.zeros) for rows, d in ((T, K), (S, K), (S, V)))
    g = or_zeros(g_y, y)
    for skip, arguments in calls:
        rest = np.zeros((B * H, T), y.dtype) if g_lse is None else np.negative(g_lse, order="C").reshape(B * H, T)
        if min(B, H, T):
            gradients = map(flat, (gq, gk[:, :, skip:], gv[:, :, skip:]))
            attention._backward(*arguments, flat(y), stats, rest, flat(g), *gradients, attention.groups_of(arguments))
    return gq, gk, gv
