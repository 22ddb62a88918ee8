"""AFT-full in plain vectorised PyTorch: two matrix products."""

from . import _aft
from ._aft import POSITIONS, module, position_factors, products  # noqa: F401

OPERATORS = {"aft_full": {"two products": products}}


def inputs(rng):
    return _aft.inputs(rng, _aft.LENGTH, _aft.LENGTH)


def mixer(torch, model, options, layer):
    def mix(block, q, k, v):
        length = q.shape[1]
        return products(torch, q, k, v, block.pos_u[:length] @ block.pos_v[:length].T)

    return module(torch, model, options, model.width, mix, **position_factors(torch, model, options))
