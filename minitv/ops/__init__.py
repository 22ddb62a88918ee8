"""The variants' operators: one folder each, with the formula and forms in __init__.py and the CPU kernel in cpu.py."""

from .attention import attention
from .heads import merge_heads, split_heads
from .sigmoid_gate import sigmoid_gate
from .token_shift import token_shift
from .wkv import bidirectional_wkv, wkv

__all__ = [
    "attention",
    "bidirectional_wkv",
    "merge_heads",
    "sigmoid_gate",
    "split_heads",
    "token_shift",
    "wkv",
]
