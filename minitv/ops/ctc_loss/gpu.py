"""ctc_loss on a GPU: a block an utterance, see gpu.cu. Nothing is read by the host."""

import numpy as np

from autograd.cuda.source import Source, contiguous, float32_only, warps
from autograd.device import namespace

from . import lengths_of, weights

SOURCE = Source(__file__)


def supports(logits):
    return float32_only(logits)


def forward(logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity):
    xp, (B, T, V), U = namespace(logits), logits.shape, targets.shape[1]
    frames, labels = lengths_of(logits, targets, input_lengths, target_lengths)
    logits, ends = contiguous(logits), tuple(contiguous(x) for x in (targets, frames, labels))
    sums, alpha, losses = (xp.empty(shape, np.float64) for shape in ((B, T), (B, T + 1, 2 * U + 1), (B,)))
    SOURCE.launch("mtv_ctc_loss_sums", warps(B * T), logits, sums, B * T, V)
    SOURCE.launch("mtv_ctc_loss_forward", B, logits, *ends, sums, alpha, losses, T, V, U, blank)
    share = weights(reduction, frames, labels)
    shown = xp.where(losses == np.inf, 0.0, losses) if zero_infinity else losses
    loss = shown if reduction == "none" else (shown * share).sum()
    return xp.asarray(loss, logits.dtype), (logits, ends, sums, alpha, losses, share, blank)


def backward(saved, g):
    logits, ends, sums, alpha, losses, share, blank = saved
    xp, (B, T, V), U = namespace(logits), logits.shape, ends[0].shape[1]
    gammas, beta, gx = alpha.copy(), xp.empty((B, 2, 2 * U + 1), np.float64), xp.empty_like(logits)
    SOURCE.launch("mtv_ctc_loss_backward", B, logits, *ends, sums, losses, gammas, beta, T, V, U, blank)
    factors = (g * share).astype(np.float32)  # [B]
    SOURCE.launch("mtv_ctc_loss_gradient", warps(B * T), logits, *ends, sums, gammas, losses, factors, gx,
                  B * T, T, V, U, blank)
    return (gx,)
