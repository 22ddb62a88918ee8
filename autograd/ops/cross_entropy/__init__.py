"""cross_entropy: the mean negative log-likelihood of integer labels."""

from __future__ import annotations

import math

import numpy as np

from ...device import check_range, namespace
from ...errors import DomainError, ShapeError
from ...laws import shift_invariant
from ...op import op
from ...tensor import Tensor
from ..index import take_along_axis
from ..reduce import logsumexp, sum
from ..shape import reshape


@op("logits[*], labels:int[*] -> loss[]", tolerance=4.0, laws=[shift_invariant("logits")])
def cross_entropy(logits, labels, *, ignore_index=None):
    """-mean over the rows whose label is not ``ignore_index`` of ln softmax(logits)[label].

    logits[... V], labels[...] in 0 .. V-1; another label raises DomainError. In nats. Nothing to average: 0, gradient 0.
    """
    losses = []
    for index in np.ndindex(labels.shape):
        if ignore_index is None or labels[index] != ignore_index:
            row = logits[index].tolist()
            top = max(row)
            losses.append(math.log(math.fsum(math.exp(v - top) for v in row)) - (row[labels[index]] - top))
    return np.asarray(math.fsum(losses) / len(losses) if losses else 0.0, logits.dtype)


@cross_entropy.form
def composed(logits, labels, *, ignore_index=None):
    xp = namespace(logits.data)
    if ignore_index is not None:
        counted = labels != ignore_index
        logits, labels = logits[counted], labels[counted]
    if not labels.size:
        return sum(logits[..., :0])
    chosen = reshape(take_along_axis(logits, labels[..., None], axis=-1), shape=labels.shape)
    top = logits.data.max(axis=-1, keepdims=True)
    shift = Tensor.wrap(xp.where(top == -math.inf, logits.dtype.type(0), top))
    return sum(logsumexp(logits - shift, axis=-1) - (chosen - reshape(shift, shape=labels.shape))) * (1.0 / labels.size)


cross_entropy.kernel("cpu", "autograd.ops.cross_entropy.cpu")
cross_entropy.kernel("cuda", "autograd.ops.cross_entropy.gpu")


@cross_entropy.validate
def _(logits, labels, *, ignore_index):
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
    return (draw.floats(*lead, size), labels), {"ignore_index": ignore}
