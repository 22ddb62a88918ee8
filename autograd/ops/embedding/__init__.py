"""embedding: rows of a table by token id."""

from __future__ import annotations

import numpy as np

from ...device import check_range
from ...errors import DomainError
from ...op import op
from ..index import gather


@op("weight[V D], ids:int[...] -> y[... D]", analytic=True)
def embedding(weight, ids):
    """y = weight[ids]; ids in 0 .. V-1, a negative or larger id raises DomainError. Repeated ids add their gradients."""
    out = np.empty((*ids.shape, weight.shape[1]), weight.dtype)
    for index in np.ndindex(ids.shape):
        out[index] = weight[ids[index]]
    return out


@embedding.form
def composed(weight, ids):
    return gather(weight, ids, axis=0)


embedding.kernel("cpu")
embedding.kernel("cuda")


@embedding.validate
def _(weight, ids):
    size = weight.shape[0]

    def fail(value):
        raise DomainError(f"embedding: id {value} is outside 0 .. {size - 1}")

    check_range(ids, 0, size - 1, fail)


@embedding.inputs
def _(draw):
    size = draw.size(1, 5, "V")
    return (draw.floats(size, draw.size(0, 4, "D")), draw.integers(0, size, *draw.shape(0, 2))), {}
