"""cross_entropy on the CPU: one pass gives the losses and leaves softmax(logits) - onehot(label) for backward."""

import math

import numpy as np

from ...cpu.compile import cpu_kernel, inline
from ...cpu.math import exp
from .smoothing import smooth_difference, smooth_losses


@inline(exact=True)
def _loss(chosen, top, e, others):
    """ln(e + others) - (chosen - top), for e = e^(chosen - top): loses no digits where the label is nearly certain."""
    return math.log1p(others) if e == 1 else math.log(e + others) + (top - chosen)


@cpu_kernel(parts="logits labels counted losses difference")
def _forward(logits, labels, counted, losses, difference):
    rows, size = logits.shape
    zero, one = logits.dtype.type(0), logits.dtype.type(1)
    for i in range(rows):
        row, out = logits[i], difference[i]
        if not counted[i]:
            for j in range(size):
                out[j] = zero
            losses[i] = 0.0
            continue
        top = row[0]
        for j in range(size):
            top = row[j] if row[j] > top or row[j] != row[j] else top
        weight = zero
        for j in range(size):
            e = exp(row[j] - top)
            out[j] = e
            weight += e
        label = labels[i]
        scale, others, e = one / weight, zero, out[label]
        out[label] = zero
        for j in range(size):
            others += out[j]
            out[j] *= scale
        out[label] = -(others * scale)
        losses[i] = _loss(row[label], top, e, others)


def forward(logits, labels, ignore_index, reduction, label_smoothing):
    size = logits.shape[-1]
    rows = np.ascontiguousarray(logits).reshape(labels.size, size)
    flat = np.ascontiguousarray(labels).reshape(-1)
    counted = np.ones(labels.size, np.bool_) if ignore_index is None else flat != ignore_index
    losses, difference = np.zeros(labels.size), np.empty_like(rows)
    if rows.size:
        _forward(rows, flat, counted, losses, difference)
        if label_smoothing:
            smooth_losses(losses, rows, flat, counted, label_smoothing)
            smooth_difference(difference, flat, counted, label_smoothing)
    count = max(int(counted.sum()), 1) if reduction == "mean" else 1
    loss = losses.reshape(labels.shape) if reduction == "none" else losses.sum() / count
    return np.asarray(loss, logits.dtype), (difference, logits.shape, count)


def backward(saved, g):
    difference, shape, count = saved
    share = g / difference.dtype.type(count)  # [] or, of losses that were not reduced, [...]
    return ((difference * (share.reshape(-1, 1) if share.ndim else share)).reshape(shape),)
