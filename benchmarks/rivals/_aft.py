"""AFT in plain vectorised PyTorch: what its variants share. Only benchmarks import this, and pass ``torch``."""

from __future__ import annotations

import math

import numpy as np

POSITIONS = True
BATCH, LENGTH, CHANNELS = 8, 512, 256  # of the operator's benchmark


def inputs(rng: np.random.Generator, *bias: int, heads: int = CHANNELS):
    """q, k, v and a bias of the given shape, float32."""
    shapes = (BATCH, LENGTH, CHANNELS), (BATCH, LENGTH, heads), (BATCH, LENGTH, CHANNELS), *([bias] if bias else [])
    scales = 1.0, 1.0, 1.0, 0.3
    return [rng.normal(0, scale, shape).astype(np.float32) for scale, shape in zip(scales, shapes, strict=False)], {}


def exponentials(k):
    """e^k relative to the largest of a channel: as safe as two products allow."""
    return (k - k.amax(dim=1, keepdim=True)).exp()


def products(torch, q, k, v, bias):
    """AFT-full by two matrix products; causal."""
    length = bias.shape[0]
    bias = bias.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    weights, e = (bias - bias.amax(dim=1, keepdim=True)).exp(), exponentials(k)
    return torch.sigmoid(q) * (weights @ (e * v)) / (weights @ e)


def module(torch, model, options, keys, mix, **parameters):
    """A mixer with our projections; ``mix(own, q, k, v)`` is given the module, with its own parameters by name."""
    sizes = (model.width, keys, model.width)

    class AFT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(model.width, sum(sizes), bias=model.bias)
            self.out = (torch.nn.Linear(model.width, model.width, bias=model.bias) if options.output_projection
                        else torch.nn.Identity())
            for name, value in parameters.items():
                self.register_parameter(name, torch.nn.Parameter(value))

        def forward(self, x):
            y = self.out(mix(self, *self.qkv(x).split(sizes, dim=2)))
            return torch.nn.functional.dropout(y, model.dropout, self.training)

    return AFT()


def position_factors(torch, model, options):
    """u and v, whose product is the bias of all pairs of positions."""
    shape = model.context, options.rank
    return {name: options.position_std * torch.randn(shape) for name in ("pos_u", "pos_v")}
