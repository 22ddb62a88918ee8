"""AFT-simple in plain vectorised PyTorch: cumulative sums of e^k v and e^k."""

from ._aft import POSITIONS, exponentials, inputs, module  # noqa: F401


def cumulative(torch, q, k, v):
    e = exponentials(k)
    return torch.sigmoid(q) * (e * v).cumsum(dim=1) / e.cumsum(dim=1)


OPERATORS = {"aft_simple": {"cumulative sums": cumulative}}


def mixer(torch, model, options, layer):
    return module(torch, model, options, model.width, lambda block, q, k, v: cumulative(torch, q, k, v))
