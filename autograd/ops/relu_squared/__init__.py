"""relu_squared: max(x, 0)², the activation of Primer (So et al. 2021, arXiv 2109.08668) and of RWKV."""

from __future__ import annotations

from ...laws import non_finite
from ...op import op
from ..elementwise import scalar_loop
from ..relu import relu


@op("x[...] -> y[...]", laws=[non_finite()])
def relu_squared(x):
    """max(x, 0)², elementwise."""
    return scalar_loop(lambda v: max(v, 0.0) ** 2, x)


@relu_squared.form
def composed(x):
    y = relu(x)
    return y * y


relu_squared.kernel("cpu")
relu_squared.kernel("cuda")


@relu_squared.inputs
def _(draw):
    return (draw.floats(*draw.shape(), kinks=(0.0,)),), {}
