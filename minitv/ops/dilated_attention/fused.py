"""The kernel of both devices: attention's kernel for each pattern, and the mixture of what it gives.

What attention's forward pass saves ends with the output and, for each query, the largest score and the inverse of the sum of
exp(score - largest). Its backward pass needs nothing else of the softmax. So it is given the mixture's output, and for each
pattern the inverse of the mixture's sum over exp(score - the pattern's largest score): then its weights are those of the one
softmax, and gradients add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from autograd.device import namespace

from .patterns import pieces


def kernel(attend, backward_of: Callable) -> tuple[Callable, Callable]:
    """forward and backward, from the module with attention's kernel and its backward pass: ``backward_of(saved, y, stats, g,
    g_lse)`` with another output y[N H T V] and other stats [N·H 2 T] than those that it saved.
    """
    def forward(q, k, v, segments, dilations, offsets, causal, scale, start, recording):
        xp, (batch, heads, queries, _), keys = namespace(q), q.shape, k.shape[2]
        y = xp.zeros((batch, queries, heads, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)  # merging heads is a reshape
        top, total = xp.full(q.shape[:3], -math.inf, q.dtype), xp.zeros(q.shape[:3], q.dtype)
        calls = []
        for w, r in zip(segments, dilations, strict=True):
            for asks, answers in pieces(heads, queries, keys, start, w, r, offsets):
                inputs = asks.take(q), answers.take(k), answers.take(v)
                (new, _), saved = attend.forward(*inputs, mask=None, causal=causal, scale=scale, dropout=0.0, seed=0)
                peak, share = (saved[-1][:, i].reshape(new.shape[:3]) for i in (0, 1))
                before, sum_before, y_before = asks.take(top), asks.take(total), asks.take(y)
                highest = xp.maximum(before, xp.where(share == 0, -math.inf, peak))
                level = xp.where(highest == -math.inf, 0, highest)
                old = sum_before * xp.exp(before - level)
                added = xp.where(share == 0, 0, xp.exp(peak - level) / share)
                both = old + added
                ratio = xp.where(both == 0, 0, added / both)[..., None]
                asks.put(y, y_before + (new - y_before) * ratio)
                asks.put(top, highest)
                asks.put(total, both)
                if recording:
                    calls.append((asks, answers, peak, saved))
        with np.errstate(divide="ignore"):
            lse = top + xp.log(total)
        return (y, lse), (q, k, v, y, top, total, calls)

    def backward(saved, g_y, g_lse):
        q, k, v, y, top, total, calls = saved
        xp = namespace(q)
        gradients = [xp.zeros((B, T, H, K), y.dtype).transpose(0, 2, 1, 3) for B, H, T, K in (x.shape for x in (q, k, v))]
        for asks, answers, peak, call in calls:
            whole, above = asks.take(total), asks.take(top)
            share = xp.where(whole == 0, 0, xp.exp(peak - xp.where(whole == 0, 0, above)) / whole)
            stats = xp.stack([peak, share], axis=2).reshape(-1, 2, peak.shape[2])
            found = backward_of(call, asks.take(y), stats, *(None if g is None else asks.take(g) for g in (g_y, g_lse)))
            for total_gradient, rows, gradient in zip(gradients, (asks, answers, answers), found, strict=False):
                rows.put(total_gradient, gradient, add=True)
        return tuple(gradients)

    return forward, backward
