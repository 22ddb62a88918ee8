"""rope on a GPU: one pass over the vectors; backward turns the other way."""

import numpy as np

from autograd.cuda.source import Source, contiguous, elements, float32_only, strided
from autograd.device import namespace

SOURCE = Source(__file__)
supports = float32_only


def turned(x, positions, angles, pairing, scale, start, growth, gain, sign):
    """y is laid out [B T H K], as are gradients; turned the other way where the sign is -1."""
    xp, (B, H, T, K), pairs = namespace(x), x.shape, len(angles)
    y = xp.empty((B, T, H, K), "float32")
    presence = positions is not None
    positions = contiguous(positions).astype("int64") if presence else None
    x, strides = strided(x)
    SOURCE.launch("mtv_rope", elements(B * T * (K - pairs)), x, xp.asarray(np.array(angles, "float64")),
                  xp.asarray(np.array(growth, "float64")) if growth else None, positions, y, B, H, T, K, pairs,
                  pairing == "interleaved", bool(growth), presence, start, scale, gain, sign, *strides)
    return y.transpose(0, 2, 1, 3)


def forward(x, positions, angles, pairing, scale, start, growth, gain):
    saved = positions, angles, pairing, scale, start, growth, gain
    return turned(x, *saved, 1), saved


def backward(saved, g):
    return (turned(g, *saved, -1),)
