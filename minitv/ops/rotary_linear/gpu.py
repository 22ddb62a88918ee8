"""rotary_linear on a GPU: rope and retention without decay for the numerator, and the kernels of gpu.cu for the rest."""

import numpy as np

from autograd.cuda.source import Source, contiguous, elements, strided, warps
from autograd.device import namespace

from ..retention import gpu as retention
from ..rope import gpu as rope

SOURCE = Source(__file__)


def supports(q, k, v):
    return retention.supports(q, k, v, q)


def _turned(x, angles, pairing, start, sign):
    return rope.turned(x, None, angles, pairing, 1.0, start, (), 1.0, sign)


def _turned_state(state, angles, pairing, by):
    """R_by of the channels K of state[B H K V]."""
    xp, (B, _, _, V) = namespace(state), state.shape
    positions = xp.asarray(np.full((B, V), by, "int64"))
    return rope.turned(state.swapaxes(2, 3), positions, angles, pairing, 1.0, 0, (), 1.0, 1).swapaxes(2, 3)


def forward(q, k, v, state, z, angles, pairing, chunk_size):
    """y is laid out [B T H V], as are gradients."""
    xp, (B, H, T, K), V = namespace(q), q.shape, v.shape[3]
    turned = [_turned(x, angles, pairing, 1, 1) for x in (q, k)]
    (o, S, _, _), saved = retention.forward(*turned, v, xp.ones(H, "float32"), state, None, None, "none", chunk_size)
    start = xp.zeros((B, H, K), "float32") if z is None else contiguous(z)
    sums, z_after = xp.empty((B, H, T, K), "float32"), xp.empty((B, H, K), "float32")
    y, inverses = xp.empty((B, T, H, V), "float32"), xp.empty((B, H, T), "float32")
    (queries, q_strides), (keys, k_strides), (o, o_strides) = strided(q), strided(k), strided(o)
    channels, rows = B * H * K, B * H * T
    SOURCE.launch("mtv_rotary_linear_sums", elements(channels), keys, start, sums, z_after, channels, H, T, K, *k_strides)
    SOURCE.launch("mtv_rotary_linear_divide", warps(rows), queries, sums, o, y, inverses, rows, H, T, K, V, *q_strides,
                  *o_strides)
    return (y.transpose(0, 2, 1, 3), _turned_state(S, angles, pairing, -T), z_after), (
        saved, q, sums, y, inverses, angles, pairing, state is not None, z is not None)


def backward(saved, g_y, g_state, g_z):
    inner, q, sums, y, inverses, angles, pairing, has_state, has_z = saved
    xp, (B, H, T, K), V = namespace(q), q.shape, y.shape[3]
    go, slopes = xp.empty((B, T, H, V), "float32"), xp.empty((B, H, T), "float32")
    g, g_strides = strided(xp.zeros((B, H, T, V), "float32") if g_y is None else g_y)
    SOURCE.launch("mtv_rotary_linear_rows", warps(B * H * T), g, y, inverses, go, slopes, B * H * T, H, T, V, *g_strides)
    g_state = None if g_state is None else _turned_state(g_state, angles, pairing, T)
    gq, gk, gv, _, gS, _, _ = retention.backward(inner, go.transpose(0, 2, 1, 3), g_state, None, None)
    gq, gk = (_turned(g, angles, pairing, 1, -1) for g in (gq, gk))
    gz, gz_in = xp.zeros((B, H, K), "float32") if g_z is None else contiguous(g_z), xp.empty((B, H, K), "float32")
    queries, q_strides = strided(q)
    SOURCE.launch("mtv_rotary_linear_add", elements(B * H * K), queries, sums, slopes, gz, gq.transpose(0, 2, 1, 3),
                  gk.transpose(0, 2, 1, 3), gz_in, B * H * K, H, T, K, *q_strides)
    return gq, gk, gv, gS if has_state else None, gz_in if has_z else None
