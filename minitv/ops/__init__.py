"""The variants' operators: one folder each, with the formula and forms in __init__.py and the CPU kernel in cpu.py."""

from .attention import attention

__all__ = [
    "attention",
]
