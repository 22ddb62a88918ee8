"""Multi-query attention in PyTorch."""

from .transformer import POSITIONS, cache, mixer

__all__ = ["POSITIONS", "cache", "mixer"]
