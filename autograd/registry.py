"""REGISTRY: every declared operator by its name, which tests, benchmarks and help enumerate."""

from __future__ import annotations

import difflib

from .errors import AutogradError, KernelError

REGISTRY: dict = {}


def register(op) -> None:
    """Enter an operator; a name that is taken raises AutogradError."""
    if op.name in REGISTRY:
        raise AutogradError(f"operator {op.name!r} is declared twice")
    REGISTRY[op.name] = op


def lookup(name):
    """The operator of that name (or the operator itself); an unknown one raises KernelError with the closest names."""
    known = REGISTRY.get(getattr(name, "name", name))
    if known is None:
        close = difflib.get_close_matches(str(name), REGISTRY, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else f", known: {', '.join(sorted(REGISTRY))}"
        raise KernelError(f"no operator {name!r}{hint}")
    return known


def operators_of(package: str) -> dict:
    """The operators that the modules of a package declare, by name."""
    return {name: op for name, op in REGISTRY.items() if op.definition.__module__.startswith(package + ".")}
