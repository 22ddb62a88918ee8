"""lsh_attention on a GPU: a warp for each query or key, no matrix of all pairs; see gpu.cu."""

import numpy as np

from autograd.cuda.source import Source, ceil_div, contiguous, elements, float32_only, strided
from autograd.device import namespace

from .cpu import WRAPS

SOURCE = Source(__file__)
POSITIONS = 2**18 - SOURCE["WARPS"]  # the size of a grid


def supports(q, k, v):
    wide = SOURCE["WIDE"]
    if k.shape[3] > wide or v.shape[3] > wide:
        return f"needs at most {wide} channels, got {k.shape[3]} and {v.shape[3]}"
    if k.shape[2] > POSITIONS:
        return f"needs at most {POSITIONS} positions, got {k.shape[2]}"
    return float32_only(q, k, v)


class _Call:
    """What the kernels are given: inputs with their strides, the orders of all rounds, sizes and options."""

    def __init__(self, q, k, v, buckets, chunk, window, across, wrap, correction, causal, scale, eps):
        self.xp = xp = namespace(q)
        (self.B, self.H, self.T, self.K), self.S, self.V, R = q.shape, k.shape[2], v.shape[3], buckets.shape[2]
        (self.q, qs), (self.k, ks), (self.v, vs) = strided(q), strided(k), strided(v)
        self.buckets = contiguous(buckets)
        self.order = contiguous(xp.argsort(buckets, axis=-1, kind="stable"))
        self.place, self.first, self.last, self.seen_from, self.seen_to = (xp.empty(buckets.shape, np.int32) for _ in range(5))
        SOURCE.launch("mtv_lsh_attention_lay_out", elements(buckets.size), self.order, self.buckets, self.place, self.first,
                      self.last, self.seen_from, self.seen_to, buckets.size, self.S, chunk or 0, min(window or 0, self.S),
                      causal)
        counting = correction and (R > 1 or wrap != "none")
        self.options = (self.H, self.T, self.S, self.K, self.V, R, chunk or 0, chunk is not None and not across, WRAPS[wrap],
                        counting, causal, scale, eps, *qs, *ks, *vs)

    def launch(self, name, rows, *arrays, strides=()):
        grid = self.B * self.H, ceil_div(rows, SOURCE["WARPS"])
        SOURCE.launch(name, grid, self.q, self.k, self.v, self.order, self.buckets,
                      self.place, self.first, self.last, *arrays, *self.options, *strides)

    def empty(self, *shape):
        return self.xp.empty(shape, "float32")


def forward(q, k, v, buckets, chunk, window, across, wrap, correction, causal, scale, eps):
    chunk = chunk and min(chunk, max(k.shape[2], 1))  # a longer piece is the whole order
    call = _Call(q, k, v, buckets, chunk, window, across, wrap, correction, causal, scale, eps)
    y = call.empty(call.B, call.T, call.H, call.V)  # heads of a position side by side: merging them is a reshape
    stats = call.empty(call.B * call.H, 2, call.T)
    call.launch("mtv_lsh_attention_forward", call.T, y, stats)
    return y.transpose(0, 2, 1, 3), (call, y, stats)


def backward(saved, g):
    """The gradients of q, k and v; they are laid out like y."""
    call, y, stats = saved
    gq, gk, gv = (call.empty(call.B, rows, call.H, width) for rows, width in (
        (call.T, call.K), (call.S, call.K), (call.S, call.V)))
    if not call.T:
        return gq.transpose(0, 2, 1, 3), *(call.xp.zeros_like(x).transpose(0, 2, 1, 3) for x in (gk, gv))
    (g, strides), dots = strided(g), call.empty(call.B * call.H, call.T)
    call.launch("mtv_lsh_attention_backward_queries", call.T, y, stats, g, gq, dots, strides=strides)
    call.launch("mtv_lsh_attention_backward_keys", call.S, call.seen_from, call.seen_to, stats, g, dots, gk, gv,
                strides=strides)
    return *(x.transpose(0, 2, 1, 3) for x in (gq, gk, gv)),
