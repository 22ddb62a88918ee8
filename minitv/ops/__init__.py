"""The variants' operators: one folder each, with the formula and forms in __init__.py and kernels in cpu.py and gpu.py.

The operators of the AFT family share a folder, with a module each.
"""

from .aft import aft_conv, aft_conv2d, aft_full, aft_local, aft_simple, banded_product
from .attention import attention
from .heads import merge_heads, split_heads

__all__ = [
    "aft_conv",
    "aft_conv2d",
    "aft_full",
    "aft_local",
    "aft_simple",
    "attention",
    "banded_product",
    "merge_heads",
    "split_heads",
]
