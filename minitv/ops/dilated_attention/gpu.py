"""dilated_attention on a GPU: attention's kernels for each pattern, and the mixture of what they give.

Attention's forward pass gives the output of a pattern and saves, for each query, the largest score and the inverse of the sum
of exp(score - largest). The backward pass needs nothing else of the softmax. So it gets the mixture's output, and for each
pattern the inverse of the mixture's sum in place of its own: then its weights are those of the one softmax. Tiles outside a
segment are skipped; within one, the kernels visit positions that are not active too.
"""

from __future__ import annotations

import math

from autograd.device import namespace

from ..attention import gpu as attention


def supports(q, k, v):
    return attention.supports(q, k, v)


def forward(q, k, v, segments, dilations, offsets, causal, scale, start):
    xp, (B, H, T, _), past = namespace(q), q.shape, start + k.shape[2] - q.shape[2]
    y = xp.zeros((B, T, H, v.shape[3]), "float32")  # heads of a position side by side, as of attention
    top, total, calls = xp.full((B, H, T), -math.inf, "float32"), xp.zeros((B, H, T), "float32"), []
    for w, r in zip(segments, dilations, strict=True):
        skip = past // w * w - start  # keys before the segment of the first query
        (new, _), saved = attention.forward(
            q, k[:, :, skip:], v[:, :, skip:], mask=None, sink=None, slopes=None, causal=causal, scale=scale, dropout=0.0,
            seed=0, window=None, sinks=0, segment=w, dilation=r, offsets=offsets)
        peak, inverse = _stats(saved, B, H, T)
        highest = xp.maximum(top, xp.where(inverse == 0, -math.inf, peak))
        level = xp.where(highest == -math.inf, 0, highest)
        old = total * xp.exp(top - level)
        added = xp.where(inverse == 0, 0, xp.exp(xp.where(inverse == 0, 0, peak - level)) / xp.where(inverse == 0, 1, inverse))
        top, total = highest, old + added
        share = xp.where(total == 0, 0, added / xp.where(total == 0, 1, total))  # of this pattern so far
        y = y + (new.transpose(0, 2, 1, 3) - y) * share.transpose(0, 2, 1)[..., None]
        calls.append((skip, (saved[0], None, *saved[2:])))  # backward takes the mixture for the output of a pattern
    lse = xp.where(total == 0, -math.inf, top + xp.log(xp.where(total == 0, 1, total)))
    return (y.transpose(0, 2, 1, 3), lse), (calls, y, top, total, k.shape, v.shape)


def backward(saved, g_y, g_lse):
    """The gradients of q, k and v; they are laid out like y."""
    calls, y, top, total, *shapes = saved
    xp, (B, T, H, _), gq = namespace(y), y.shape, 0
    gk, gv = (xp.zeros((n[0], n[2], n[1], n[3]), "float32").transpose(0, 2, 1, 3) for n in shapes)
    for skip, call in calls:
        peak, inverse = _stats(call, B, H, T)
        nothing = (inverse == 0) | (total == 0)
        share = xp.where(nothing, 0, xp.exp(xp.where(nothing, 0, peak - top)) / xp.where(nothing, 1, total))
        stats = xp.ascontiguousarray(xp.stack([peak, share], 2)).reshape(B * H, 2, T)
        found = attention.backward((call[0], y, stats, *call[3:]), g_y, g_lse)
        gq = gq + found[0]
        gk[:, :, skip:] += found[1]
        gv[:, :, skip:] += found[2]
    return gq, gk, gv


def _stats(saved, B, H, T):
    """The largest score and the inverse of the sum [B H T] that attention saved."""
    stats = saved[2].reshape(B, H, 2, T)
    return stats[:, :, 0], stats[:, :, 1]
