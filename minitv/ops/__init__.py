"""The variants' operators: one folder each, with the formula and forms in __init__.py and kernels in cpu.py and gpu.py.

The operators of the AFT family share a folder, with a module each.
"""

from .aft import aft_conv, aft_conv2d, aft_full, aft_local, aft_simple, banded_product
from .attention import attention
from .gated import gated
from .heads import merge_heads, split_heads
from .long_conv import long_conv
from .retention import retention
from .rope import rope
from .token_shift import token_shift
from .wkv import bidirectional_wkv, wkv

__all__ = [
    "aft_conv",
    "aft_conv2d",
    "aft_full",
    "aft_local",
    "aft_simple",
    "attention",
    "banded_product",
    "bidirectional_wkv",
    "gated",
    "long_conv",
    "merge_heads",
    "retention",
    "rope",
    "split_heads",
    "token_shift",
    "wkv",
]
