"""gelu and gelu_tanh: x times the normal distribution function, exactly and by GPT-2's approximation.

Hendrycks and Gimpel 2016, arXiv 1606.08415. The two differ by up to 5e-4, so they are two operators.
"""

from __future__ import annotations

import math

from ...laws import non_finite
from ...op import op
from ..elementwise import clip, erf, scalar_loop, tanh

_C = math.sqrt(2 / math.pi)
_FAR = 40.0  # beyond, erf and tanh are ±1 with slope 0 in float64 too, where infinities would meet zeros


def _inputs(draw):
    return (draw.floats(*draw.shape(), low=-3.0, high=3.0),), {}


@op("x[...] -> y[...]", laws=[non_finite()], analytic=True, tolerance=4.0)  # 1 + erf cancels where x is negative
def gelu(x):
    """x Φ(x) = x (1 + erf(x/√2)) / 2, and 0 at -∞."""
    return scalar_loop(lambda v: 0.0 if v == -math.inf else 0.5 * v * math.erfc(-v / math.sqrt(2)), x)


@gelu.form
def composed(x):
    x = clip(x, low=-_FAR)
    return x * 0.5 * (1.0 + erf(clip(x, high=_FAR) * math.sqrt(0.5)))


@op("x[...] -> y[...]", laws=[non_finite()], analytic=True, tolerance=4.0)
def gelu_tanh(x):
    """x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, and 0 at -∞."""
    return scalar_loop(lambda v: 0.0 if v == -math.inf else 0.5 * v * (1 + math.tanh(_C * (v + 0.044715 * v * v * v))), x)


@gelu_tanh.form
def composed(x):
    x = clip(x, low=-_FAR)
    z = clip(x, high=_FAR)
    return 0.5 * x * (1.0 + tanh(_C * (z + 0.044715 * z * z * z)))


gelu.kernel("cpu")
gelu.kernel("cuda")
gelu_tanh.kernel("cpu", prefix="tanh_")
gelu_tanh.kernel("cuda", prefix="tanh_")
gelu.inputs(_inputs)
gelu_tanh.inputs(_inputs)
