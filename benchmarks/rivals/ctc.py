"""The CTC loss in PyTorch: log_softmax, and its own recursions over logarithms."""

from __future__ import annotations

import numpy as np


def native(torch, logits, targets, input_lengths, target_lengths, reduction):
    """ctc_loss takes log-probabilities, the frames first."""
    functional = torch.nn.functional
    return functional.ctc_loss(functional.log_softmax(logits, -1).transpose(0, 1), targets, input_lengths, target_lengths,
                               reduction=reduction)


OPERATORS = {"ctc_loss": {"log_softmax, ctc_loss": native}}


def inputs(rng):
    """Twenty seconds of speech and its letters."""
    batch, length, classes, labels = 16, 500, 32, 50
    logits = rng.standard_normal((batch, length, classes)).astype(np.float32)
    return [logits, rng.integers(1, classes, (batch, labels)), np.full(batch, length), np.full(batch, labels)], {
        "reduction": "sum"}
