"""linear: the affine map of every projection in a network."""

from __future__ import annotations

import numpy as np

from ...errors import KernelError
from ...op import op
from ...state import switches
from ..linalg import matmul
from ..shape import swapaxes


@op("x[... I], weight[O I], bias?[O] -> y[... O]", analytic=True)
def linear(x, weight, bias=None):
    """y = x Wᵀ + b with W of shape (out, in), as PyTorch stores it.

    Under ``autograd.state.products`` its kernels round x, W and the gradient that comes in; sums are exact to float32.
    """
    out = np.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)
    for index in np.ndindex(out.shape):
        *lead, o = index
        for i in range(weight.shape[1]):
            out[index] += x[(*lead, i)] * weight[o, i]
        if bias is not None:
            out[index] += bias[o]
    return out


@linear.form
def composed(x, weight, bias):
    if (kind := switches().products) != "float32":
        raise KernelError(f"linear: products({kind!r}) are computed by its kernels, not by the form composed")
    y = matmul(x, swapaxes(weight))
    return y if bias is None else y + bias


linear.kernel("cpu")
linear.kernel("cuda")
