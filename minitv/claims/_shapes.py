"""What several statements need: models of any size as shapes alone, products that are counted, and losses that are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from autograd.random import Random

from .. import room, variants


def outline(variant: str, *, vocab: int = 1, **options: Any) -> Any:
    """A model of any size whose weights have shapes and take no memory."""
    experiment, models = variants.load(variant).configure(**options), []
    room.measured(lambda: models.append(experiment.variant.build(experiment.model, experiment.mixer, vocab, Random(0))))
    return models[0]


def weights(*modules: Any) -> int:
    """The numbers in the matrices of modules: as many products as each position needs with them."""
    return sum(p.size for module in modules for p in module.parameters() if p.ndim >= 2)


class Products(NamedTuple):
    """Multiplications of a forward pass for one token, in all blocks of a causal Transformer."""

    ffn: int
    projections: int  # to queries, keys and values, and to the output
    pairs: int  # scores and values, with the (T + 1) / 2 keys that a token sees on average

    def share(self, *names: str) -> float:
        """What some of the three are of the whole."""
        return sum(getattr(self, name) for name in names) / sum(self)


def products(context: int, layers: int, width: int, heads: int) -> Products:
    """The products of the variant ``transformer`` of this shape, from the shapes of its weights."""
    blocks = outline("transformer", context=context, layers=layers, width=width, heads=heads).blocks
    return Products(weights(*(block.ffn for block in blocks)), weights(*(block.mixer for block in blocks)),
                    layers * width * (context + 1))


def above(values: Any, others: Any) -> bool:
    """Whether losses are above others with every seed, and by 1 % in the mean."""
    rise = np.subtract(values, others)
    return bool((rise > 0).all() and rise.mean() > 0.01 * np.mean(others))
