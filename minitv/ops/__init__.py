"""The variants' operators: one folder each, with the formula and forms in __init__.py and kernels in cpu.py and gpu.py.

The operators of the AFT family share a folder, with a module each.
"""

from .aft import aft_conv, aft_conv2d, aft_full, aft_local, aft_simple, banded_product
from .attention import attention
from .heads import merge_heads, split_heads
from .long_conv import long_conv
from .retention import retention
from .rope import rope
from .sigmoid_gate import sigmoid_gate
from .swish_gate import swish_gate
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
    "long_conv",
    "merge_heads",
    "retention",
    "rope",
    "sigmoid_gate",
    "split_heads",
    "swish_gate",
    "token_shift",
    "wkv",
]
