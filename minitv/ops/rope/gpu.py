"""rope on a GPU: one pass over the vectors; backward turns the other way."""

import numpy as np

from autograd.cuda.source import Source, contiguous, elements, float32_only, strided
from autograd.device import namespace

SOURCE = Source(__file__)
supports = float32_only


def _turned(x, positions, angles, pairing, scale, start, sign):
    """y is laid out [B T H K], as are gradients."""
    xp, (B, H, T, K), pairs = namespace(x), x.shape, len(angles)
    y = xp.empty((B, T, H, K), "float32")
    presence = positions is not None
    positions = contiguous(positions).astype("int64") if presence else None
    x, strides = strided(x)
    SOURCE.launch("mtv_rope", elements(B * T * (K - pairs)), x, xp.asarray(np.array(angles, "float64")), positions, y, B, H,
                  T, K, pairs, pairing == "adjacent", presence, start, scale, sign, *strides)
    return y.transpose(0, 2, 1, 3)


def forward(x, positions, angles, pairing, scale, start):
    saved = positions, angles, pairing, scale, start
    return _turned(x, *saved, 1), saved


def backward(saved, g):
    return (_turned(g, *saved, -1),)
