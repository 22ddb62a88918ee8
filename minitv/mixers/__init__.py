"""Mixers: how each paper wires its operator into a layer. One module per variant, named like it (aft_full: aft-full).

A mixer is a Module with

    Mixer(rng, model, options, layer, dtype)  parameters drawn as the paper draws them
    mixer(x[B T D], rng=None) -> y[B T D]  the whole sequence at once; rng drops values
    init_state(batch)         -> state     of an empty past
    prefill(x[B T D], state)  -> y, state  a segment, continuing the state
    step(x[B D], state)       -> y, state  one position; nn.Stateful has it

States are explicit values. Every way computes the same: prefill over any split = the call; step repeated = the call.
``positions`` says whether the model must add position vectors, and ``bounded = True`` that sequences end at the context even
if not. A class ``feed_forward`` with the same protocol, if the mixer has one, takes the place of blocks.FeedForward. With
``embed_norm = True`` the model normalises the embedding before the first block; ``init_tables(rng, model, vocab, dtype)``
draws the embedding and a head that is not tied to it. ``PRESETS`` in the module says what differs for this variant from the
presets that all share, such as the size at which it has as many parameters as the Transformer. ``PAGE`` says what a reader of
the paper wants to know.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..options import PRESETS
from ._page import Page


def variants() -> dict[str, str]:
    """The name of every variant and the first line of its module's docstring; imports none of them."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
        source = Path(__path__[0], f"{module}.py").read_text(encoding="utf-8")
        found[module.replace("_", "-")] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def _module(variant: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{variant.replace('-', '_')}")


def load(variant: str):
    """The mixer class of a variant: the one called Mixer in its module."""
    return _module(variant).Mixer


def options(variant: str) -> type:
    """The option dataclass of a variant: the one in its module whose name ends in Options."""
    module = _module(variant)
    found = [value for name, value in vars(module).items() if name.endswith("Options")
             and is_dataclass(value) and value.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must declare one dataclass named ...Options, found {found}")
    return found[0]


def elsewhere(name: str) -> str:
    """For an error: which variants have an option of this name."""
    found = [variant for variant in variants() if name in options(variant).__dataclass_fields__]
    return f"; it is an option of {', '.join(found)}" if found else ""


def page(variant: str) -> Page:
    """What the variant's module says of it."""
    return _module(variant).PAGE


def describe(variant: str) -> list[tuple[str, str]]:
    """The page of a variant as (label, text) rows."""
    import minitv.ops  # noqa: F401 - declares the operators
    from autograd import REGISTRY

    said = page(variant)
    rows = [("formula", said.formula), ("cost", said.cost), ("state", said.state)]
    for name in said.operators:
        op = REGISTRY[name]
        kernels = "; kernels: " + ", ".join(op.kernels) if op.kernels else ""
        laws = "; laws: " + ", ".join(map(str, op.laws)) if op.laws else ""
        rows.append((name, f"forms: {', '.join(op.forms)}{kernels}{laws}"))
    rows.append(("equals", said.golden))
    rows += [("note", text) for text in said.discrepancies]
    return [*rows, ("the review", said.review)]


def preset(variant: str, name: str) -> dict[str, Any]:
    """The values of a preset for a variant."""
    return {**PRESETS[name], **getattr(_module(variant), "PRESETS", {}).get(name, {})}
