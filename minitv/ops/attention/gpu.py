"""Multi-head attention on a GPU: tiles in shared memory, no T x S matrix; see gpu.cu."""

import math

from autograd.cuda.source import Source, Strided, ceil_div, contiguous, float32_only, strided
from autograd.device import namespace


def _variant(width, queries, keys):
    return f"-DWIDTH={width}", f"-DQUERIES={queries}", f"-DKEYS={keys}", f"-DTHREADS={16 * keys // 4}"


# Channels that fit, and sizes of tiles for which they fit into 48 kB of shared memory.
TILES = {32: (64, 32), 64: (64, 32), 128: (32, 16)}
SOURCE = Source(__file__, [_variant(width, *tiles) for width, tiles in TILES.items()])


def supports(q, k, v):
    if not 1 <= q.shape[3] <= 128 or v.shape[3] > 128:
        return f"needs 1 to 128 channels in q and k, at most 128 in v, got {q.shape[3]} and {v.shape[3]}"
    return float32_only(q, k, v)


class _Call:
    """What the three kernels are given: inputs with their strides, sizes and options."""

    def __init__(self, q, k, v, mask, causal, scale, dropout, seed):
        self.xp = namespace(q, k, v, mask)
        self.batch, self.heads, self.queries, self.width = q.shape
        self.keys, self.out = k.shape[2], v.shape[3]
        (self.q, qs), (self.k, ks), (self.v, vs) = strided(q), strided(k), strided(v)
        shape = (self.batch, self.heads, self.queries, self.keys)
        if mask is None:
            self.mask, ms = self.xp.empty(0, bool), (0, 0, 0, 0)
        else:
            mask = self.xp.broadcast_to(contiguous(mask), shape)
            self.mask, ms = Strided(mask), mask.strides
        self.strides = (*qs, *ks, *vs, *ms)
        scale = 1 / math.sqrt(self.width) if scale is None else scale
        factor = 0.0 if dropout == 1 else 1 / (1 - dropout)
        self.options = (self.heads, self.queries, self.keys, self.width, self.out, causal, mask is not None, scale,
                        dropout > 0, round(dropout * 2**32), factor, seed)
        fitting = min(w for w in TILES if w >= max(self.width, self.out))
        self.variant, self.tiles = _variant(fitting, *TILES[fitting]), TILES[fitting]

    def launch(self, name, rows, tile, *arrays, strides=()):
        grid = self.batch * self.heads, ceil_div(rows, tile)
        SOURCE.launch(name, grid, self.q, self.k, self.v, self.mask, *arrays, *self.options, *self.strides, *strides,
                      options=self.variant)

    def empty(self, rows, width):
        """Heads of a position side by side: merging them is a reshape. Zeros where nothing will be computed."""
        nothing = 0 in (self.batch, self.heads, self.queries, self.keys)
        return (self.xp.zeros if nothing else self.xp.empty)((self.batch, rows, self.heads, width), "float32"), nothing


def forward(q, k, v, mask, causal, scale, dropout, seed):
    call = _Call(q, k, v, mask, causal, scale, dropout, seed)
    y, nothing = call.empty(call.queries, call.out)
    stats = call.xp.empty((call.batch * call.heads, 2, call.queries), "float32")
    if not nothing:
        call.launch("mtv_attention_forward", call.queries, call.tiles[0], y, stats)
    return y.transpose(0, 2, 1, 3), (call, y, stats)


def backward(saved, g):
    """The gradients of q, k and v; they are laid out like y."""
    call, y, stats = saved
    (dq, nothing), (dk, _), (dv, _) = (call.empty(call.queries, call.width), call.empty(call.keys, call.width),
                                       call.empty(call.keys, call.out))
    if not nothing:
        (g, strides), dots = strided(g), call.xp.empty((call.batch * call.heads, call.queries), "float32")
        call.launch("mtv_attention_backward_queries", call.queries, call.tiles[0] // 2, y, stats, g, dq, dots, strides=strides)
        call.launch("mtv_attention_backward_keys", call.keys, call.tiles[1], stats, g, dots, dk, dv, strides=strides)
    return *(d.transpose(0, 2, 1, 3) for d in (dq, dk, dv)),
