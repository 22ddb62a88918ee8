"""dropout: values set to zero at random, the rest scaled to keep the mean. Srivastava et al. 2014 (JMLR 15)."""

from __future__ import annotations

import numpy as np

from ...device import namespace
from ...errors import DomainError
from ...laws import non_finite
from ...op import op
from ...random import Random
from ..elementwise import where


def keep_mask(x, p, seed):
    return namespace(x).asarray(Random(seed).keep(x.shape, p))


@op("x[...] -> y[...]", laws=[non_finite()], analytic=True)
def dropout(x, *, p=0.0, seed=0):
    """y = x / (1 - p) where kept, else 0. Element e (C order) is kept if word e mod 4 of Philox4x32-10 with counter
    e div 4 and key ``seed`` is at least p 2³². p = 0 is the identity, p = 1 gives zeros. Salmon et al. 2011 (SC'11).
    """
    out = np.zeros_like(x)
    kept = Random(seed).keep(x.shape, p)
    for index in np.ndindex(x.shape):
        if kept[index]:
            out[index] = x[index] / (1 - p)
    return out


@dropout.form
def composed(x, p, seed):
    return where(keep_mask(x.data, p, seed), x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


dropout.kernel("cpu")
dropout.kernel("cuda")


@dropout.validate
def _(x, p, seed):
    Random(seed)  # raises unless it is a seed
    if not 0 <= p <= 1:
        raise DomainError(f"dropout: p must be a probability in [0, 1], got {p}")


@dropout.inputs
def _(draw):
    return (draw.floats(*draw.shape()),), {"p": draw.choice((0.0, 0.3, 1.0)), "seed": draw.integer(0, 2**63)}
