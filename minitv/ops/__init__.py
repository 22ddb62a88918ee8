"""The variants' operators: one folder each, with the formula and forms in __init__.py and the CPU kernel in cpu.py."""

from .aft import aft_conv, aft_conv2d, aft_full, aft_local, aft_simple, banded_product
from .attention import attention
from .heads import merge_heads, split_heads
from .retention import retention
from .rope import rope
from .swish_gate import swish_gate
from .long_conv import long_conv

__all__ = [
    "aft_conv",
    "aft_conv2d",
    "aft_full",
    "aft_local",
    "aft_simple",
    "attention",
    "long_conv",
    "banded_product",
    "merge_heads",
    "retention",
    "rope",
    "split_heads",
    "swish_gate",
]
