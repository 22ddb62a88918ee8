"""The order of positions by bucket in PyTorch: a stable sort, and its inverse as the published codes make it."""

from __future__ import annotations


def argsort(torch, buckets, count):
    """The order alone."""
    return torch.argsort(buckets, dim=-1, stable=True)


def scattered(torch, buckets, count):
    """transformers: the keys are unique, and the inverse is scattered."""
    length = buckets.shape[-1]
    positions = torch.arange(length)
    order = torch.argsort(buckets * length + positions, dim=-1)
    return order, torch.empty_like(order).scatter_(-1, order, positions.expand_as(order))


OPERATORS = {"bucket_order": {"argsort": argsort, "argsort, scatter": scattered}}


def inputs(rng):
    return [rng.integers(0, 256, (4, 8, 2, 8192))], {"count": 256}
