"""The variants' operators: one folder each, with the formula and forms in __init__.py and the CPU kernel in cpu.py."""

from .attention import attention
from .heads import merge_heads, split_heads
from .retention import retention
from .rope import rope
from .swish_gate import swish_gate
from .long_conv import long_conv

__all__ = [
    "attention",
    "long_conv",
    "merge_heads",
    "retention",
    "rope",
    "split_heads",
    "swish_gate",
]
