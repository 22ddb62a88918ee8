"""Architectures whose weights come in by `minitv import` and go out by `minitv export`, a module each.

A module declares records, as ``GPT2 = Architecture(name="gpt2", ...)``; minitv/architecture.py says what stands in one. The
name is that of "model_type" in config.json, and is read without an import. A new architecture is a file here, or in
FOLDER/weights where the environment variable MINITV_PATH names FOLDER.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..catalogue import Entry, entries
from ..config import choose

if TYPE_CHECKING:
    from ..architecture import Architecture


def architectures() -> dict[str, Entry]:
    """Every architecture by name; imports none of them."""
    return entries(__name__, __path__)


def load(name: str) -> Architecture:
    """The record of an architecture; UserError when there is none of this name."""
    return architectures()[choose("architecture", name, architectures())].load()
