"""Multi-head attention on a GPU: tiles in shared memory, no T x S matrix; see gpu.cu."""

import math

from autograd.arrays import or_zeros
from autograd.cuda.source import Source, Strided, ceil_div, contiguous, float32_only, strided
from autograd.device import namespace


def _variant(width, queries, keys):
    return f"-DWIDTH={width}", f"-DQUERIES={queries}", f"-DKEYS={keys}", f"-DTHREADS={16 * keys // 4}"


# Channels that fit, and sizes of tiles for which they fit into 48 kB of shared memory.
TILES = {32: (64, 32), 64: (64, 32), 128: (32, 16)}
FAR = 2**31 - 1  # a window that hides nothing
SOURCE = Source(__file__, [_variant(width, *tiles) for width, tiles in TILES.items()])


def supports(q, k, v):
    if not 1 <= q.shape[3] <= 128 or v.shape[3] > 128:
        return f"needs 1 to 128 channels in q and k, at most 128 in v, got {q.shape[3]} and {v.shape[3]}"
    return float32_only(q, k, v)


class _Call:
    """What the three kernels are given: inputs with their strides, sizes and options."""

    def __init__(self, q, k, v, mask, sink, slopes, causal, scale, dropout, seed, window, sinks, segment, dilation, offsets):
        self.xp = namespace(q, k, v, mask)
        (self.B, self.H, self.T, self.K), (self.G, self.S, self.V) = q.shape, v.shape[1:]
        (self.q, qs), (self.k, ks), (self.v, vs) = strided(q), strided(k), strided(v)
        self.mask, ms = None, (0, 0, 0, 0)
        if mask is not None:
            mask = self.xp.broadcast_to(contiguous(mask), (self.B, self.H, self.T, self.S))
            self.mask, ms = Strided(mask), mask.strides
        self.strides = (*qs, *ks, *vs, *ms)
        self.sink, self.slopes = (self.xp.full(self.H, default, "float32") if x is None else contiguous(x.astype("float32"))
                                  for x, default in ((sink, -math.inf), (slopes, 0)))
        rule = *(min(x, FAR) for x in (window or FAR, sinks, segment or 0, dilation)), offsets == "block"
        scale = 1 / math.sqrt(self.K) if scale is None else scale
        factor = 0.0 if dropout == 1 else 1 / (1 - dropout)
        self.options = (self.H, self.T, self.S, self.K, self.V, causal, mask is not None, scale, self.G, *rule,
                        dropout > 0, round(dropout * 2**32), factor, seed)
        fitting = min(w for w in TILES if w >= max(self.K, self.V))
        self.variant, self.tiles = _variant(fitting, *TILES[fitting]), TILES[fitting]

    def launch(self, name, heads, rows, tile, *arrays, strides=()):
        SOURCE.launch(name, (self.B * heads, ceil_div(rows, tile)), self.q, self.k, self.v, self.mask, *arrays, *self.options,
                      *self.strides, *strides, options=self.variant)

    def empty(self, *shape):
        return self.xp.empty(shape, "float32")


def forward(q, k, v, mask, sink, slopes, causal, scale, dropout, seed, window, sinks, segment, dilation, offsets):
    call = _Call(q, k, v, mask, sink, slopes, causal, scale, dropout, seed, window, sinks, segment, dilation, offsets)
    y = call.empty(call.B, call.T, call.H, call.V)  # heads of a position side by side: merging them is a reshape
    stats = call.empty(call.B * call.H, 2, call.T)
    call.launch("mtv_attention_forward", call.H, call.T, call.tiles[0], call.sink, call.slopes, y, stats)
    lse = call.xp.where(stats[:, 1] > 0, stats[:, 0] - call.xp.log(stats[:, 1]), -math.inf)
    return (y.transpose(0, 2, 1, 3), lse.reshape(call.B, call.H, call.T)), (call, y, stats, sink is not None)


def backward(saved, g_y, g_lse):
    """The gradients of q, k and v; they are laid out like y."""
    call, y, stats, sinking = saved
    gq, gk, gv = (call.empty(call.B, rows, heads, width) for rows, heads, width in (
        (call.T, call.H, call.K), (call.S, call.G, call.K), (call.S, call.G, call.V)))
    (g, strides), dots = strided(or_zeros(g_y, y.transpose(0, 2, 1, 3))), call.empty(call.B * call.H, call.T)
    g_lse = contiguous(g_lse) if g_lse is not None else call.xp.zeros((call.B, call.H, call.T), "float32")
    call.launch("mtv_attention_backward_queries", call.H, call.T, call.tiles[0] // 2, call.slopes, y, stats, g, g_lse, gq, dots,
                strides=strides)
    call.launch("mtv_attention_backward_keys", call.G, call.S, call.tiles[1], call.slopes, stats, g, dots, gk, gv,
                strides=strides)
    gsink = None
    if sinking:
        stats = stats.reshape(call.B, call.H, 2, call.T)
        weights = call.xp.exp(call.sink[:, None] - stats[:, :, 0]) * stats[:, :, 1]  # of the sink [B H T]
        gsink = -(weights * dots.reshape(call.B, call.H, call.T)).sum(axis=(0, 2))
    return *(x.transpose(0, 2, 1, 3) for x in (gq, gk, gv)), gsink
