"""embedding on a GPU: rows copied forward; backward sorts the ids and adds up the rows of each, always in one order."""

import numpy as np

from ...cuda.source import Source, ceil_div, contiguous, float32_only
from ...device import namespace

DOUBLE = ("-DDOUBLE",)
SOURCE = Source(__file__, ((), DOUBLE))
supports = float32_only


def add_rows(target, ids, rows) -> None:
    """target[ids[i]] += rows[i] for contiguous arrays [V D], [N], [N D] of float32 or float64; ids out of range do nothing."""
    if not rows.size or not target.size:
        return
    xp, (size, width) = namespace(target), target.shape
    order = xp.argsort(ids, kind="stable")
    starts = xp.searchsorted(ids[order], xp.arange(size + 1))
    SOURCE.launch("mtv_embedding_add", (size, ceil_div(width, 32)), contiguous(rows), order, starts, target, width,
                  options=DOUBLE if target.dtype == np.float64 else ())


def forward(weight, ids):
    return namespace(weight, ids).take(weight, ids, axis=0), (ids, weight.shape, weight.dtype)


def backward(saved, g):
    ids, shape, dtype = saved
    gweight = namespace(g).zeros(shape, dtype)
    add_rows(gweight, ids.reshape(-1), g.reshape(ids.size, shape[1]))
    return (gweight,)
