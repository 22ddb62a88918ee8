"""AFT-local in plain vectorised PyTorch: AFT-full's two products, with zeros outside of the window."""

from . import _aft
from ._aft import POSITIONS, module, position_factors, products  # noqa: F401

WINDOW = 32


def _lags(torch, length):
    return torch.arange(length)[:, None] - torch.arange(length)


def banded(torch, q, k, v, bias):
    """From bias[T W] over the lags of the window."""
    lag, window = _lags(torch, q.shape[1]), bias.shape[1]
    whole = bias.gather(1, lag.clamp(0, window - 1))
    return products(torch, q, k, v, whole * ((lag >= 0) & (lag < window)))


OPERATORS = {"aft_local": {"two products": banded}}


def inputs(rng):
    return _aft.inputs(rng, _aft.LENGTH, WINDOW)


def mixer(torch, model, options, layer):
    def mix(block, q, k, v):
        length = q.shape[1]
        near = _lags(torch, length) < options.window
        return products(torch, q, k, v, block.pos_u[:length] @ block.pos_v[:length].T * near)

    return module(torch, model, options, model.width, mix, **position_factors(torch, model, options))
