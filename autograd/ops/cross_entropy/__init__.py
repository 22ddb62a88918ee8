"""cross_entropy: the negative log-likelihood of integer labels."""

from __future__ import annotations

import math

import numpy as np

from ...device import check_range, namespace
from ...errors import DomainError, ShapeError
from ...laws import shift_invariant
from ...op import op
from ...tensor import Tensor
from ..index import put_add, take_along_axis
from ..reduce import logsumexp, mean, sum
from ..shape import reshape

REDUCTIONS = ("mean", "sum", "none")


@op("logits[*], labels:int[*] -> loss[*]", tolerance=4.0, laws=[shift_invariant("logits", "all logits")])
def cross_entropy(logits, labels, *, ignore_index=None, reduction="mean", label_smoothing=0.0):
    """-Σ_v t_v ln softmax(logits)_v of each row, t_v = (1 - label_smoothing) [v = label] + label_smoothing / V, in nats.

    logits[... V], labels[...] in 0 .. V-1; another label raises DomainError. Rows whose label is ``ignore_index`` count as 0
    and have gradient 0. ``reduction`` "mean" is over the other rows (0 if there is none), "sum" over all, "none" gives
    the losses [...] themselves.
    """
    losses = []
    for index in np.ndindex(labels.shape):
        row, label = logits[index].tolist(), labels[index]
        if label == ignore_index:
            losses.append(0.0)
            continue
        top = max(row)
        total = math.log(math.fsum(math.exp(v - top) for v in row))
        target = [(1 - label_smoothing) * (v == label) + label_smoothing / len(row) for v in range(len(row))]
        losses.append(math.fsum(t * (total - (v - top)) for t, v in zip(target, row, strict=True) if t))
    if reduction == "none":
        return np.asarray(losses, logits.dtype).reshape(labels.shape)
    count = max(int(np.sum(labels != ignore_index)), 1) if reduction == "mean" else 1
    return np.asarray(math.fsum(losses) / count, logits.dtype)


@cross_entropy.form
def composed(logits, labels, ignore_index, reduction, label_smoothing):
    xp = namespace(logits.data)
    if ignore_index is not None:
        counted = labels != ignore_index
        logits, labels = logits[counted], labels[counted]
    if labels.size:
        top = logits.data.max(axis=-1, keepdims=True)
        shifted = logits - Tensor.wrap(xp.where(top == -math.inf, logits.dtype.type(0), top))
        total = logsumexp(shifted, axis=-1)
        losses = total - reshape(take_along_axis(shifted, labels[..., None], axis=-1), shape=labels.shape)
        if label_smoothing:
            uniform = label_smoothing * (total - mean(shifted, axis=-1))
            losses = uniform if label_smoothing == 1 else (1 - label_smoothing) * losses + uniform
    else:
        losses = sum(logits[..., :0], axis=-1)
    if reduction == "none":
        return losses if ignore_index is None else put_add(losses, key=counted, shape=counted.shape)
    return sum(losses) * (1.0 / max(labels.size, 1) if reduction == "mean" else 1.0)


cross_entropy.kernel("cpu")
cross_entropy.kernel("cuda")


@cross_entropy.validate
def _(logits, labels, ignore_index, reduction, label_smoothing):
    if reduction not in REDUCTIONS:
        raise DomainError(f"cross_entropy: reduction {reduction!r}, allowed: {', '.join(REDUCTIONS)}")
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise DomainError(f"cross_entropy: label_smoothing {label_smoothing!r}, allowed: a number from 0 to 1")
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape:
        raise ShapeError(f"cross_entropy: logits {logits.shape} need labels of shape {logits.shape[:-1]}, got {labels.shape}")
    size = logits.shape[-1]
    if ignore_index is not None:
        ignored = labels == ignore_index
        labels = namespace(labels).where(ignored, 0, labels) if size else labels[~ignored]

    def fail(label):
        raise DomainError(f"cross_entropy: label {label} is outside 0 .. {size - 1}"
                          + ("" if ignore_index is None else f" and is not ignore_index = {ignore_index}"))

    check_range(labels, 0, size - 1, fail)


@cross_entropy.inputs
def _(draw):
    lead, size = draw.shape(0, 2), draw.size(1, 7)
    ignore = draw.choice((None, -100, 0))
    labels = draw.integers(0, size, *lead)
    if ignore == -100:
        labels = np.where(draw.mask(*lead), labels, -100)
    return (draw.floats(*lead, size), labels), {"ignore_index": ignore, "reduction": draw.choice(REDUCTIONS),
                                                "label_smoothing": draw.choice((0.0, 0.1, 1.0))}
