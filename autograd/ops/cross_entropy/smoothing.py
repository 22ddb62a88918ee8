"""Label smoothing, as what it adds to the losses and the gradients of kernels that know one label a row."""

from ...device import namespace


def _onehot(logits, labels):
    return namespace(logits).arange(logits.shape[-1]) == labels[:, None]


def smooth_losses(losses, logits, labels, counted, smoothing) -> None:
    """Add smoothing · the mean over v of x_label - x_v: where the loss is infinite, it stays so."""
    xp = namespace(logits)
    wide = logits.astype(losses.dtype)
    chosen = xp.where(_onehot(logits, labels), wide, losses.dtype.type(0)).sum(axis=-1, keepdims=True)
    spread = (chosen - wide).sum(axis=-1) / logits.shape[-1]
    losses += xp.where(counted & xp.isfinite(losses), losses.dtype.type(smoothing) * spread, losses.dtype.type(0))


def smooth_difference(difference, labels, counted, smoothing) -> None:
    """Softmax - target: take from each class its share of what the label loses."""
    xp, dtype = namespace(difference), difference.dtype.type
    target = xp.where(_onehot(difference, labels), dtype(smoothing), dtype(0)) - dtype(smoothing / difference.shape[-1])
    difference += xp.where(counted[:, None], target, dtype(0))
