"""relu: max(x, 0), the activation of the first Transformer (Vaswani et al. 2017, arXiv 1706.03762, equation (2))."""

from __future__ import annotations

from ...device import namespace
from ...laws import non_finite
from ...op import op
from ..elementwise import scalar_loop, where


@op("x[...] -> y[...]", laws=[non_finite()], method=True)
def relu(x):
    """max(x, 0), elementwise; NaN stays, and the gradient at 0 is 0."""
    return scalar_loop(lambda v: v if v > 0 or v != v else 0.0, x)


relu.primitive(lambda x: namespace(x).maximum(x, x.dtype.type(0)))
relu.vjp(lambda g, x: where(x.data > 0, g, 0.0))
relu.kernel("cpu")
relu.kernel("cuda")


@relu.inputs
def _(draw):
    return (draw.floats(*draw.shape(), kinks=(0.0,)),), {}
