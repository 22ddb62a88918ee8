"""cross_entropy on a GPU: a warp a row, then one block for the mean. Nothing is read by the host."""

import numpy as np

from ...cuda.source import Source, contiguous, float32_only, warps
from ...device import namespace
from .smoothing import smooth_difference, smooth_losses

SOURCE = Source(__file__)
supports = float32_only


def forward(logits, labels, ignore_index, reduction, label_smoothing):
    xp = namespace(logits, labels)
    logits, labels = contiguous(logits), contiguous(labels)
    ignoring, ignored = ignore_index is not None, ignore_index or 0
    rows, size = labels.size, logits.shape[-1]
    if not logits.size:
        return xp.zeros(labels.shape if reduction == "none" else (), logits.dtype), (logits, labels)
    losses, tops, others = xp.empty((3, rows), np.float32)
    loss, share = xp.empty((), np.float32), xp.ones((), np.float32)
    SOURCE.launch("mtv_cross_entropy_forward", warps(rows), logits, labels, losses, tops, others, rows, size, ignoring,
                  ignored)
    if label_smoothing:
        smooth_losses(losses, logits.reshape(rows, size), *_counted(labels, ignoring, ignored), label_smoothing)
    if reduction == "mean":
        SOURCE.launch("mtv_cross_entropy_mean", 1, losses, labels, loss, share, rows, ignoring, ignored)
    else:
        loss = losses.reshape(labels.shape) if reduction == "none" else losses.sum()
    return loss, (logits, labels, tops, others, share, ignoring, ignored, label_smoothing)


def _counted(labels, ignoring, ignored):
    """The labels in a row, and which of them count."""
    flat = labels.reshape(-1)
    return flat, flat != ignored if ignoring else flat == flat


def backward(saved, g):
    logits, labels, *rest = saved
    xp, glogits = namespace(logits), namespace(logits).empty_like(logits)
    if not rest:
        return (glogits,)
    tops, others, share, ignoring, ignored, label_smoothing = rest
    rows, size = labels.size, logits.shape[-1]
    later = g.shape != () or label_smoothing  # the kernel multiplies by one number, and knows one label a row
    factor, unit = (xp.ones((), np.float32),) * 2 if later else (g, share)
    SOURCE.launch("mtv_cross_entropy_backward", warps(rows), logits, labels, tops, others, unit, factor,
                  glogits, rows, size, ignoring, ignored)
    if later:
        difference = glogits.reshape(rows, size)
        if label_smoothing:
            smooth_difference(difference, *_counted(labels, ignoring, ignored), label_smoothing)
        difference *= g.reshape(-1, 1) * share
    return (glogits,)
