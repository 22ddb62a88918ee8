"""retention on a GPU: chunks, whose products cuBLAS computes, and kernels for what lies between them; see gpu.cu."""

import numpy as np

from autograd.cuda.blas import matmul
from autograd.cuda.source import Source, ceil_div, contiguous, elements, float32_only, strided, warps
from autograd.device import namespace

SOURCE = Source(__file__)
TINY = float(np.finfo(np.float32).tiny) * 2.0**24  # smaller powers of a decay are 0, as on the CPU


def supports(q, k, v, decay):
    return float32_only(q, k, v, decay) if q.shape[3] else "needs at least one channel in q and k"


def _turned(stack):
    return stack.transpose(0, 2, 1)


class _Call:
    """The sizes of a call, the powers of its decays, and launches over elements or, a warp each, over rows."""

    def __init__(self, q, v, decay, normalization, chunk_size):
        self.xp = namespace(q, v, decay)
        (self.B, self.H, self.T, self.K), self.V = q.shape, v.shape[3]
        self.heads, self.W = self.B * self.H, ceil_div(self.V + 1, 4) * 4
        self.L = min(chunk_size, self.T)
        self.N = ceil_div(self.T, self.L) if self.L else 0
        self.stack, self.rows = self.heads * self.N, self.heads * self.T
        self.times, self.kind = (self.H, self.T, self.N, self.L), SOURCE[normalization.upper()]
        if self.rows:
            self.tables = self.empty(4, self.H, self.L + 1)
            SOURCE.launch("mtv_retention_tables", elements(self.H), contiguous(decay), self.tables, self.H, self.L, TINY)

    def empty(self, *shape):
        return self.xp.empty(shape, "float32")

    def pack(self, x, wide, ones=False, fading=False):
        out, (array, strides) = self.empty(self.stack, self.L, wide), strided(x)
        SOURCE.launch("mtv_retention_pack", elements(out.size), array, self.tables, out, out.size, *self.times, x.shape[3],
                      wide, ones, fading, *strides)
        return out

    def gradient(self, weights, others, carried, x, parts, offset, width, first, summing):
        inner, out = matmul(weights if first else _turned(weights), others), self.empty(self.B, self.T, self.H, width)
        SOURCE.launch("mtv_retention_gradient", warps(self.rows), inner, weights, others, carried, x, self.tables, out,
                      parts, self.rows, *self.times, width, inner.shape[2], first, summing, parts.shape[1], offset)
        return out.transpose(0, 2, 1, 3)

    def state(self, value, *shape):
        return self.xp.zeros(shape, "float32") if value is None else contiguous(value)


def forward(q, k, v, decay, state, z, count, normalization, chunk_size):
    call = _Call(q, v, decay, normalization, chunk_size)
    B, H, T, K, V, W = call.B, call.H, call.T, call.K, call.V, call.W
    start = call.state(state, B, H, K, V), call.state(z, B, H, K), call.state(count, B, H)
    inputs = tuple(x is not None for x in (state, z, count))
    y = call.empty(B, T, H, V)  # heads of a position side by side: merging them is a reshape
    if not call.rows:
        return (y.transpose(0, 2, 1, 3), *(x.copy() for x in start)), (call, inputs, None)
    keys, values = call.pack(k, K), call.pack(v, W, ones=True)
    queries, added = call.pack(q, K), matmul(_turned(call.pack(k, K, fading=True)), values)
    states, counts, ends = call.empty(call.stack, K, W), call.empty(call.stack), [call.empty(*x.shape) for x in start]
    SOURCE.launch("mtv_retention_scan", elements(call.heads * (K * W + 1)), added, call.tables, *start, states, counts, *ends,
                  call.heads, *call.times, K, V, W)
    scores = matmul(queries, _turned(keys))
    SOURCE.launch("mtv_retention_decay", elements(scores.size), scores, call.tables, scores.size, H, call.N, call.L)
    masses, inverses = call.empty(call.rows), call.empty(call.rows)
    SOURCE.launch("mtv_retention_finish", warps(call.rows), matmul(scores, values), matmul(queries, states), scores,
                  values, call.tables, counts, y, masses, inverses, call.rows, *call.times, V, W, call.kind)
    return (y.transpose(0, 2, 1, 3), *ends), (call, inputs, (queries, keys, values, states, counts, y, masses, inverses))


def backward(saved, g_y, g_state, g_z, g_count):
    """The gradients of q, k and v are laid out like y."""
    call, inputs, arrays = saved
    shapes = (call.B, call.H, call.K, call.V), (call.B, call.H, call.K), (call.B, call.H)
    g_ends = [call.state(x, *shape) for x, shape in zip((g_state, g_z, g_count), shapes, strict=True)]
    g_y = call.state(g_y, call.B, call.H, call.T, call.V)
    if arrays is None:
        nothing = [call.xp.zeros((call.B, call.H, call.T, width), "float32") for width in (call.K, call.K, call.V)]
        return *nothing, call.xp.zeros(call.H, "float32"), *(x if has else None for x, has in zip(g_ends, inputs, strict=True))
    queries, keys, values, states, counts, y, masses, inverses = arrays
    T, K, V, W, stack_rows = call.T, call.K, call.V, call.W, call.stack * call.L
    grads, faded, slopes = call.empty(call.stack, call.L, W), call.empty(call.stack, call.L, W), call.empty(call.rows)
    g_y, strides = strided(g_y)
    SOURCE.launch("mtv_retention_rows", warps(stack_rows), g_y, y, call.tables, masses, inverses, grads, faded, slopes,
                  stack_rows, *call.times, V, W, call.kind, *strides)
    scores, gscores = matmul(queries, _turned(keys)), matmul(grads, _turned(values))
    inside, outside = call.N * call.L, K * W
    parts = call.empty(call.heads, inside + 2 * T + outside + 1)
    pitch = parts.shape[1]
    SOURCE.launch("mtv_retention_decay_both", warps(stack_rows), scores, gscores, call.tables, parts, stack_rows, call.H,
                  call.N, call.L, pitch, 0)
    gstates, gstart = call.empty(call.stack, K, W), [call.empty(*x.shape) for x in g_ends]
    SOURCE.launch("mtv_retention_scan_backward", elements(call.heads * outside), matmul(_turned(queries), faded), states,
                  call.tables, *g_ends[:2], gstates, *gstart[:2], parts, call.heads, *call.times, K, V, W, pitch,
                  inside + 2 * T)
    SOURCE.launch("mtv_retention_counts_backward", call.heads, slopes, counts, call.tables, g_ends[2], gstart[2], parts,
                  *call.times, pitch, pitch - 1)
    from_start, to_end = matmul(grads, _turned(states)), matmul(values, _turned(gstates))
    gq = call.gradient(gscores, keys, from_start, queries, parts, inside, K, True, True)
    gk = call.gradient(gscores, queries, to_end, keys, parts, inside + T, K, False, True)
    gv = call.gradient(scores, grads, matmul(keys, gstates), values, parts, 0, V, False, False)
    gdecay = parts.reshape(call.B, call.H, pitch).sum(axis=(0, 2))
    return gq, gk, gv, gdecay, *(x if has else None for x, has in zip(gstart, inputs, strict=True))
