"""Grouped-query attention in PyTorch: the layer, and the operator with eight heads that share two of keys and values."""

from __future__ import annotations

import numpy as np

from .transformer import POSITIONS, cache, mixer

__all__ = ["OPERATORS", "POSITIONS", "cache", "inputs", "mixer"]


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays and parameters for the operator: B 8, H 8, G 2, T 1024, head_dim 64, causal."""
    batch, heads, groups, length, width = 8, 8, 2, 1024, 64
    shapes = (batch, heads, length, width), *[(batch, groups, length, width)] * 2
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes), {}


def sdpa(torch, q, k, v):
    """PyTorch's own function."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


OPERATORS = {"attention": {"scaled_dot_product_attention": sdpa}}
