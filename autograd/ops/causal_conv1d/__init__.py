"""causal_conv1d: a short filter per channel over the past."""

from __future__ import annotations

import numpy as np

from ...errors import ShapeError
from ...laws import causal, independent, linear_in
from ...op import op
from ..index import getitem
from ..shape import pad, swapaxes


@op("x[B T C], weight[C W], bias?[C] -> y[B T C]", analytic=True,
    laws=[causal("x"), independent("B"), linear_in("weight")])
def causal_conv1d(x, weight, bias=None):
    """Depthwise causal convolution: y_t = b + Σ_{j < W} weight_j x_{t - (W - 1 - j)}; the last tap is the present."""
    out = np.zeros_like(x)
    batch, length, channels = x.shape
    width = weight.shape[1]
    for b, t, c in np.ndindex(batch, length, channels):
        for j in range(width):
            source = t - (width - 1 - j)
            if source >= 0:
                out[b, t, c] += weight[c, j] * x[b, source, c]
        if bias is not None:
            out[b, t, c] += bias[c]
    return out


@causal_conv1d.form
def composed(x, weight, bias):
    length, width = x.shape[1], weight.shape[1]
    padded = pad(x, widths=((0, 0), (max(width - 1, 0), 0), (0, 0)))
    taps = swapaxes(weight)
    y = bias
    for j in range(width):
        term = getitem(padded, key=(slice(None), slice(j, j + length))) * taps[j]
        y = term if y is None else y + term
    return y


causal_conv1d.kernel("cpu")
causal_conv1d.kernel("cuda")


@causal_conv1d.validate
def _(x, weight, bias):
    if weight.shape[1] < 1:
        raise ShapeError(f"causal_conv1d: weight {weight.shape} needs at least one tap")


@causal_conv1d.inputs
def _(draw):
    channels = draw.size(0, 3, "C")
    bias = draw.floats(channels) if draw.boolean() else None
    x = draw.floats(draw.size(0, 2, "B"), draw.size(0, 5, "T"), channels)
    return (x, draw.floats(channels, draw.size(1, 4, "W")), bias), {}
