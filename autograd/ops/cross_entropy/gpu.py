"""cross_entropy on a GPU: a warp a row, then one block for the mean. Nothing is read by the host."""

import numpy as np

from ...cuda.source import Source, contiguous, float32_only, warps
from ...device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(logits, labels, *, ignore_index):
    xp = namespace(logits, labels)
    logits, labels = contiguous(logits), contiguous(labels)
    ignoring, ignored = ignore_index is not None, ignore_index or 0
    rows, size = labels.size, logits.shape[-1]
    if not logits.size:
        return xp.zeros((), logits.dtype), (logits, labels)
    losses, tops, others = xp.empty((3, rows), np.float32)
    loss, share = xp.empty((), np.float32), xp.empty((), np.float32)
    SOURCE.launch("mtv_cross_entropy_forward", warps(rows), logits, labels, losses, tops, others, rows, size, ignoring,
                  ignored)
    SOURCE.launch("mtv_cross_entropy_mean", 1, losses, labels, loss, share, rows, ignoring, ignored)
    return loss, (logits, labels, tops, others, share, ignoring, ignored)


def backward(saved, g):
    logits, labels, *rest = saved
    glogits = namespace(logits).empty_like(logits)
    if rest:
        tops, others, share, ignoring, ignored = rest
        SOURCE.launch("mtv_cross_entropy_backward", warps(labels.size), logits, labels, tops, others, share, g, glogits,
                      labels.size, logits.shape[-1], ignoring, ignored)
    return glogits, None
