"""layer_norm: each row to mean 0 and variance 1, then a gain and an offset. Ba et al. 2016, arXiv 1607.06450."""

from __future__ import annotations

import math

import numpy as np

from ...laws import identity, shift_invariant
from ...op import op
from ..elementwise import fsum, rsqrt
from ..reduce import centered, mean

# (x - mean) rsqrt(var + eps) divides rounding by the deviation: rows that hardly vary keep fewer digits.


def _constant_rows(case, draw):
    y = case(x=draw.floats(1).item(), weight=None, bias=None, eps=1e-5).y
    assert not y.any(), f"layer_norm makes {np.abs(y).max()} of a constant row"


@op("x[... D], weight?[D], bias?[D] -> y[... D]", analytic=True, tolerance=4.0,
    laws=[shift_invariant("x"), identity("a constant row becomes 0", _constant_rows)])
def layer_norm(x, weight=None, bias=None, *, eps=1e-5):
    """y = (x - mean) / √(var + eps) · weight + bias over the last axis, with the biased variance.

    A constant row is exactly 0 before weight and bias, with a finite gradient. The sum of a row's squares must not
    overflow: |x| below 1e18 is safe in float32.
    """
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index].tolist()
        if not row:
            continue
        row = [v - row[0] for v in row]  # the mean of the differences is not rounded to the precision of the values
        center = fsum(row) / len(row)
        variance = fsum([(v - center) * (v - center) for v in row]) / len(row)
        for j, v in enumerate(row):
            y = (v - center) / math.sqrt(variance + eps)
            y = y * weight[j].item() if weight is not None else y
            out[(*index, j)] = y + bias[j].item() if bias is not None else y
    return out


@layer_norm.form
def composed(x, weight, bias, eps):
    deviation = centered(x, -1, "layer_norm")
    y = deviation * rsqrt(mean(deviation * deviation, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


layer_norm.kernel("cpu")
layer_norm.kernel("cuda")


@layer_norm.inputs
def _(draw):
    width = draw.size(0, 9, "D")
    weight = draw.floats(width) if draw.boolean() else None
    bias = draw.floats(width) if draw.boolean() else None
    # A few values may lie closer than √eps, where derivatives vary too fast for differences: a larger eps smooths them.
    return (draw.floats(*draw.shape(0, 2), width), weight, bias), {"eps": 1e-5 if width > 4 else 0.1}
