"""favor on a GPU: chunks, whose products cuBLAS computes, and kernels for what lies between them; see gpu.cu."""

import math

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.blas import matmul
from autograd.cuda.source import Source, ceil_div, contiguous, elements, float32_only, strided, warps
from autograd.device import namespace

from . import scale_of

SOURCE = Source(__file__)
FLOOR, HIDDEN = -5e37, -1e38  # a of an empty state, and ln φ of a masked key


def supports(q, k, v, projection):
    return float32_only(q, k, v, projection) if q.shape[3] else "needs at least one channel in q and k"


def _turned(stack):
    return stack.swapaxes(-1, -2)


class _Call:
    """The sizes of a call, and its stacks."""

    def __init__(self, q, v, projection, mask, features, scale, offset, causal, chunk_size):
        self.xp = namespace(q, v)
        (self.B, self.H, self.T, self.K), self.V, self.F = q.shape, v.shape[3], len(projection)
        self.heads, self.W = self.B * self.H, ceil_div(self.V + 1, 4) * 4
        self.L = min(chunk_size, self.T) if causal else self.T
        self.N = ceil_div(self.T, self.L) if self.L else 0
        self.rows = self.N * self.heads * self.L
        self.kind, self.causal = SOURCE[features.upper()], causal
        self.offset, self.scale = float(offset), scale_of(scale, self.K)
        self.mask, self.projection = contiguous(mask), contiguous(projection * np.float32(self.scale))

    def empty(self, *shape):
        return self.xp.empty(shape, "float32")

    def pack(self, x, wide, ones=False, mask=None):
        out, (array, strides) = self.empty(self.N, self.heads, self.L, wide), strided(x)
        SOURCE.launch("mtv_favor_pack", elements(out.size), array, mask, out, out.size, self.heads, self.H, self.T, self.L,
                      x.shape[3], wide, ones, mask is not None, *strides)
        return out

    def unpacked(self, stack):
        """[N, B H, L, d] as [B H T d], laid out like y."""
        width = stack.shape[3]
        rows = stack.reshape(self.N, self.B, self.H, self.L, width).transpose(1, 0, 3, 2, 4)
        return rows.reshape(self.B, self.N * self.L, self.H, width)[:, :self.T].transpose(0, 2, 1, 3)

    def state(self, mean, weight):
        """[B H F W]: mean · weight, and weight in column V."""
        out = self.xp.zeros((self.B, self.H, self.F, self.W), "float32")
        out[..., :self.V], out[..., self.V] = mean * weight[..., None], weight
        return out.reshape(self.heads, self.F, self.W)


def forward(q, k, v, projection, mask, mean, logsum, features, scale, offset, causal, chunk_size):
    call = _Call(q, v, projection, mask, features, scale, offset, causal, chunk_size)
    xp, B, H, T, K, V, F, W, N = call.xp, call.B, call.H, call.T, call.K, call.V, call.F, call.W, call.N
    y = xp.zeros((B, T, H, V), "float32")  # heads of a position side by side: merging them is a reshape
    start = ((xp.zeros((B, H, F, V), "float32"), xp.full((B, H, F), -math.inf, "float32")) if mean is None
             else (mean.copy(), logsum.copy()))
    if not call.rows or not F:
        return (y.transpose(0, 2, 1, 3), *start), (call, mean is not None, None)
    states, tops = call.empty(N + 1, call.heads, F, W), call.empty(N + 1, call.heads, F)
    weight = xp.isfinite(start[1]).astype("float32") if call.kind == SOURCE["POSITIVE"] else xp.exp(start[1])
    states[0] = call.state(start[0], weight)
    keys_x, values, queries_x = call.pack(k, K, mask=call.mask), call.pack(v, W, True, call.mask), call.pack(q, K)
    logs, dots = (matmul(x, call.projection.T) for x in (keys_x, queries_x))
    SOURCE.launch("mtv_favor_keys", warps(call.rows), logs, keys_x, call.mask, call.rows, call.heads, H, T, call.L, K, F,
                  call.kind, call.mask is not None, call.scale**2 / 2, call.offset, HIDDEN)
    keys = logs
    if call.kind == SOURCE["POSITIVE"]:
        tops[0] = xp.maximum(start[1], np.float32(FLOOR)).reshape(call.heads, F)
        SOURCE.launch("mtv_favor_tops", elements(call.heads * F), logs, tops, call.heads, N, call.L, F)
        keys = xp.exp(logs - tops[1:, :, None])
    else:
        tops = xp.zeros(tops.shape, "float32")
    SOURCE.launch("mtv_favor_scan", elements(call.heads * F * W), matmul(_turned(keys), values), tops, states, call.heads, N,
                  F, W)
    read = slice(0, N) if causal else slice(1, None)
    queries, best = call.empty(*dots.shape), call.empty(call.rows)
    pairs = call.empty(N, call.heads, call.L, call.L) if causal else None
    SOURCE.launch("mtv_favor_rows", warps(call.rows), dots, logs, tops[read], queries, pairs if causal else call.empty(0), best,
                  call.rows, call.L, F, call.kind, causal, call.offset)
    inverses, carried = call.empty(call.rows), matmul(queries, states[read])
    SOURCE.launch("mtv_favor_finish", warps(call.rows), matmul(pairs, values) if causal else None, carried, pairs, values, y,
                  inverses, call.rows, call.heads, H, T, call.L, V, W, causal)
    last = states[N].reshape(B, H, F, W)
    mass = last[..., V]
    nothing, one = mass == 0, np.float32(1)
    mean_after = last[..., :V] / xp.where(nothing, one, mass)[..., None]
    logsum_after = xp.where(nothing, np.float32(-math.inf), tops[N].reshape(B, H, F) + xp.log(xp.where(nothing, one, mass)))
    kept = keys_x, values, dots, logs, keys, tops, states, queries, pairs, best, inverses, y, mean_after, mass
    return (y.transpose(0, 2, 1, 3), mean_after, logsum_after), (call, mean is not None, kept)


def backward(saved, g_y, g_mean, g_logsum):
    """The gradients of q, k and v are laid out like y."""
    call, carried_in, kept = saved
    xp, B, H, T, K, V, F, W, N = call.xp, call.B, call.H, call.T, call.K, call.V, call.F, call.W, call.N
    if kept is None:
        nothing = [xp.zeros((B, H, T, width), "float32") for width in (K, K, V)]
        ends = [xp.zeros(shape, "float32") if g is None else contiguous(g)
                for g, shape in ((g_mean, (B, H, F, V)), (g_logsum, (B, H, F)))]
        return *nothing, *(ends if carried_in else (None, None))
    keys_x, values, dots, logs, keys, tops, states, queries, pairs, best, inverses, y, mean_after, mass = kept
    inverse = 1 / xp.where(mass == 0, np.float32(math.inf), mass)
    g_mean, g_logsum = or_zeros(g_mean, mean_after), or_zeros(g_logsum, mass)
    gstates, gends = call.empty(*states.shape), xp.zeros((B, H, F, W), "float32")
    gends[..., :V] = g_mean * inverse[..., None]
    gends[..., V] = (g_logsum - (g_mean * mean_after).sum(axis=3)) * inverse
    gstates[N] = gends.reshape(call.heads, F, W)
    grads = call.empty(N, call.heads, call.L, W)
    g_y, strides = strided(or_zeros(g_y, y.transpose(0, 2, 1, 3)))
    SOURCE.launch("mtv_favor_gradients", warps(call.rows), g_y, y, inverses, grads, call.rows, call.heads, H, T, call.L, V, W,
                  *strides)
    SOURCE.launch("mtv_favor_scan_backward", elements(call.heads * F * W), matmul(_turned(queries), grads), tops, gstates,
                  call.heads, N, F, W, call.causal)
    read = slice(0, N) if call.causal else slice(1, None)
    gpairs = matmul(grads, _turned(values)) if call.causal else None
    gqueries, gkeys = call.empty(*dots.shape), call.empty(*dots.shape)
    SOURCE.launch("mtv_favor_queries_backward", warps(call.rows), dots, logs, queries, best, gpairs,
                  matmul(grads, _turned(states[read])), gqueries, call.rows, call.L, F, call.kind, call.causal, call.offset)
    SOURCE.launch("mtv_favor_keys_backward", warps(call.rows), dots, logs, queries, keys, best, gpairs,
                  matmul(values, _turned(gstates[1:])), gkeys, call.rows, call.heads, T, call.L, F, call.kind, call.causal,
                  call.offset)
    gq, gk, gv = matmul(gqueries, call.projection), matmul(gkeys, call.projection), matmul(keys, gstates[1:])
    if call.kind == SOURCE["POSITIVE"]:
        gk = gk - gkeys.sum(axis=3, keepdims=True) * np.float32(call.scale**2) * keys_x
    if call.causal:
        gv = gv + matmul(_turned(pairs), grads)
    gq, gk, gv = (call.unpacked(x) for x in (gq, gk, gv[..., :V]))
    if not carried_in:
        return gq, gk, gv, None, None
    first, gfirst = (x[0].reshape(B, H, F, W) for x in (states, gstates))
    return gq, gk, gv, gfirst[..., :V] * first[..., V:V + 1], (gfirst * first).sum(axis=3)
