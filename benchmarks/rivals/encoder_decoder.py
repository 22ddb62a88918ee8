"""The Transformer of 2017, as the paper on One Wide FFN has it."""

from __future__ import annotations

from .one_wide_ffn import POSITIONS, language_model

__all__ = ["POSITIONS", "language_model"]
