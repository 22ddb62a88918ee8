"""RoFormer: what a rotation by the position does to products of queries and keys."""

from __future__ import annotations

import numpy as np

from autograd.metric import distance

from ..ops import rope
from ..ops.rope import rope_angles
from . import RIGHT, WRONG, Finding, claim
from .measure import Measure


@claim(46, "RoFormer", "Rotations by absolute positions make attention depend on relative ones.", place="section RoFormer",
       paper="The product q_m · k_n = xᵀ W_qᵀ R_{n-m} W_k x depends on n - m alone (2104.09864, equation 16).")
def relative(measure: Measure) -> Finding:
    """How much products of turned queries and keys change when both move, and when the keys alone move."""
    length, width = 64, measure.sizes(32, 128)
    angles = rope_angles(width)
    q, k = (measure.rng.standard_normal((1, 1, length, width)) for _ in range(2))

    def turned(x: np.ndarray, start: int) -> np.ndarray:
        return rope(x, angles=angles, start=start).numpy()[0, 0]

    products = turned(q, 0) @ turned(k, 0).T
    moved = {by: distance(turned(q, by) @ turned(k, by).T, products) for by in (1, 10, 100, 1000, 10_000, 100_000)}
    alone, vectors = distance(turned(q, 0) @ turned(k, 1).T, products), distance(turned(q, 1), turned(q, 0))
    text = (f"products changed by {max(moved.values()):.0e} of the largest one when queries and keys both moved, by up to "
            f"{max(moved)} positions, and by {alone:.2f} when the keys alone moved by one; the vectors themselves changed by "
            f"{vectors:.2f}")
    numbers = dict(both_moved=moved, keys_moved=alone, vectors=vectors)
    if max(moved.values()) < 1e-8 and min(alone, vectors) > 0.01:
        return RIGHT(f"Only differences of positions count: {text}.", **numbers)
    return WRONG(f"Absolute positions count: {text}.", **numbers)
