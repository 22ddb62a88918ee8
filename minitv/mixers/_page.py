"""What every variant's module says of its paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """What a variant's page in the README says; forms, kernels and laws come from the operators themselves."""

    formula: str
    cost: str  # as the paper states it
    state: str  # numbers a layer and sequence that writing one more token needs
    operators: tuple[str, ...]
    golden: str  # what the tests compare it with
    discrepancies: tuple[str, ...]  # between the paper, its code and other code, and what is done here
    review: str  # what the review article says of it, and whether that is right
