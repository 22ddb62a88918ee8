"""Which operator and which variant becomes which other one, under what restriction: the declared identities as one graph.

Every edge is a law, of an operator (``becomes`` in autograd/laws.py) or of a variant (``Variant.becomes``), which the tests run
and ``minitv check``. Nothing is listed here.

    for edge in identities(): print(f"{edge.general} becomes {edge.special} if {edge.when}")
"""

from __future__ import annotations

from dataclasses import replace

import minitv.ops  # noqa: F401 - declares the operators
from autograd import REGISTRY
from autograd.laws import Edge

from .variant import Variant
from .variants import load, variants


def identities() -> list[Edge]:
    """All edges: those of operators, then those of variants, in the order of their declaration."""
    laws = [law for op in REGISTRY.values() for law in op.laws]
    laws += [law for name in variants() for law in load(name).identities]
    return [law.edge for law in laws if law.edge is not None]


def edges_of(variant: Variant) -> list[Edge]:
    """The identities in which a variant stands, itself or by the operators that it is made of."""
    names = {variant.name, *variant.page.operators}
    return [edge for edge in identities() if names & {edge.general, edge.special}]


def homes() -> dict[str, str]:
    """The variant that each operator is known by: one that is made of it first of all, where there is one.

    Of several it is a causal one, made of the fewest operators, and that to which most others are reduced.
    """
    records = [load(name) for name in variants()]
    ends = [law.edge.special for record in records for law in record.identities]
    ordered = sorted(records, key=lambda record: (not record.causal, len(record.page.operators), -ends.count(record.name)))
    return {record.page.operators[0]: record.name for record in reversed(ordered)}


def between_variants() -> list[Edge]:
    """The same edges, each once, with the name of a variant in place of each operator that has one."""
    known = homes()
    edges = [replace(edge, general=known.get(edge.general, edge.general), special=known.get(edge.special, edge.special))
             for edge in identities()]
    return [edge for edge in dict.fromkeys(edges) if edge.general != edge.special]
