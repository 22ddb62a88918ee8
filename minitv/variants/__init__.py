"""The variants, a module a paper. Each declares one or several records, as ``RETNET = Variant(name="retnet", ...)``.

The name is written out there, as a text: it is read without an import. A mixer is a nn.Stateful with

    Mixer(rng, model, options, layer, dtype)  parameters drawn as the paper draws them
    mixer(x[B T D], rng=None) -> y[B T D]  the whole sequence at once; rng drops values
    init_state(batch)         -> state     of an empty past
    prefill(x[B T D], state)  -> y, state  a segment, continuing the state; one position is a segment of length 1

States are explicit values. Every way computes the same: a sequence that is read in parts by prefill gives what the call gives.
``bounded = True`` says that sequences end at the model's context. The channel mixer, by default blocks.FeedForward, has the
same protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..catalogue import Entry, entries
from ..config import choose

if TYPE_CHECKING:
    from ..variant import Variant


def variants() -> dict[str, Entry]:
    """Every variant by name; imports none of them."""
    return entries(__name__, __path__)


def load(name: str) -> Variant:
    """The record of a variant; UserError when there is none of this name."""
    return variants()[choose("variant", name, variants())].load()


def describe(variant: Variant) -> list[tuple[str, str]]:
    """What is declared of a variant for its readers, as (label, text) rows."""
    import minitv.ops  # noqa: F401 - declares the operators
    from autograd import REGISTRY

    page = variant.page
    rows = [("paper", variant.paper), ("formula", page.formula), ("cost", page.cost), ("state", page.state)]
    for name in page.operators:
        op = REGISTRY[name]
        kernels = "; kernels: " + ", ".join(op.kernels) if op.kernels else ""
        laws = "; laws: " + ", ".join(map(str, op.laws)) if op.laws else ""
        rows.append((name, f"forms: {', '.join(op.forms)}{kernels}{laws}"))
    if variant.on_ranks:
        rows.append(("on ranks", f"several ranks can share a sequence: {variant.on_ranks}"))
    rows.append(("equals", page.golden))
    rows += [("note", text) for text in page.discrepancies]
    return [*rows, ("the review", page.review)]
