"""How fast the pairs of a rotation turn: RoFormer's angles, and how they change for texts longer than those of training.

A model that was trained at a length L has never seen the slow pairs turn far. At s L positions they stand at angles that it
does not know, and its loss rises. The ``SCALINGS`` change the angles θ_j = base^(-2j/K), so that s times as many positions fit:

    "none"         θ_j
    "linear"       θ_j / s: position m counts as m / s (Chen et al. 2023, arXiv 2306.15595). Neighbours come closer together too
    "ntk"          base' = base · s^(K/(K-2)): the fastest pair turns as before, the slowest s times as slowly, as with "linear"
    "dynamic-ntk"  the same with s (n / L) - (s - 1) in place of s, for n positions so far, n ≥ L: nothing changes up to L
    "yarn"         g_j θ_j + (1 - g_j) θ_j / s, and turned channels times 0.1 ln s + 1 (Peng et al. 2023, arXiv 2309.00071).
                   g_j is 1 for pairs that turn at least 32 times in L positions, 0 for those that turn once at most
    "llama3"       θ_j where a turn takes less than L / 4 positions, θ_j / s where it takes more than L; in between, the weight
                   of θ_j is (turns - 1) / 3, as in Meta's LLaMA 3.1

For yarn, g_j rises linearly between the two, and ``ramp`` says over what: "turns", the number of turns L θ_j / 2π, as the paper
defines it, or "pairs", the number j of the pair, as its code and the package transformers have it.

xPos (Sun et al. 2022, arXiv 2212.10554) keeps the angles and lets vectors grow and shrink: pair j of a query at position m is
multiplied by ζ_j^(m/512), that of a key at position n by ζ_j^(-n/512), so that their product is multiplied by ζ_j^((m-n)/512).
ζ_j = (2j + 0.4 K) / (1.4 K) is below 1, and smaller for fast pairs: the farther a key, the less its fast pairs count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autograd.errors import DomainError, ShapeError

PAIRINGS = ("interleaved", "half")
SCALINGS = ("none", "linear", "ntk", "dynamic-ntk", "yarn", "llama3")
RAMPS = ("turns", "pairs")
FAST, SLOW = 32, 1  # turns in the trained length from which on yarn keeps a pair's angle, and up to which it divides it by s
LLAMA_FAST = 4  # the same of llama3, whose slow limit is SLOW too


def rope_angles(width: int, base: float = 10_000.0, *, closed: bool = False) -> tuple[float, ...]:
    """The angles in radians per position of the pairs j = 0, 1, .. of ``width`` channels: base^(-2j / width), as in RoFormer.

    With ``closed`` they are base^(-j / (width/2 - 1)), which go from 1 to 1/base and include both, as in RetNet's code
    (torchscale). A single pair has the angle 1 in both cases. An odd width raises ShapeError.
    """
    if width % 2 or width < 0:
        raise ShapeError(f"rope_angles: the width must be even, got {width}")
    pairs = width // 2
    last = max(pairs - 1, 1) if closed else pairs
    return tuple(base ** (-j / last) for j in range(pairs))


@dataclass(frozen=True)
class Scaling:
    """The angles of ``width`` turned channels for ``factor`` times the ``length`` of training, by one of the SCALINGS above.

    An unknown ``kind`` or ``ramp``, a factor below 1 or a length below 1 raise DomainError.
    """

    width: int
    base: float = 10_000.0
    kind: str = "none"
    factor: float = 1.0
    length: int = 1
    ramp: str = "turns"

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, SCALINGS), ("ramp", self.ramp, RAMPS)):
            if value not in allowed:
                raise DomainError(f"Scaling: {name} is {value!r}, allowed: {', '.join(allowed)}")
        if not self.factor >= 1:
            raise DomainError(f"Scaling: factor is {self.factor}, allowed: a number from 1")
        if self.length < 1:
            raise DomainError(f"Scaling: length is {self.length}, allowed: an integer from 1")

    def angles(self, positions: int | None = None) -> tuple[float, ...]:
        """The angle of every pair in radians per position; of "dynamic-ntk" for so many positions."""
        plain, s = rope_angles(self.width, self.base), self.factor
        if self.kind == "linear":
            return tuple(angle / s for angle in plain)
        if self.kind == "dynamic-ntk":
            s = max(s * (positions or 0) / self.length - (s - 1), 1.0)
        if self.kind in ("ntk", "dynamic-ntk"):  # a single pair turns by 1 with any base
            return plain if len(plain) < 2 else rope_angles(self.width, self.base * s ** (self.width / (self.width - 2)))
        if self.kind in ("yarn", "llama3"):
            kept = self._kept(plain)
            return tuple(weight * angle + (1 - weight) * angle / s for weight, angle in zip(kept, plain, strict=True))
        return plain

    @property
    def gain(self) -> float:
        """What turned channels of queries and of keys are multiplied by: yarn's 0.1 ln s + 1, which sharpens the softmax."""
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0

    def _kept(self, plain: tuple[float, ...]) -> list[float]:
        """For each pair the weight of its angle as it was."""
        turns = [self.length * angle / (2 * math.pi) for angle in plain]
        if self.kind == "llama3":
            return [min(max((t - SLOW) / (LLAMA_FAST - SLOW), 0.0), 1.0) for t in turns]
        if self.ramp == "turns":
            return [min(max((t - SLOW) / (FAST - SLOW), 0.0), 1.0) for t in turns]

        def pair(t: float) -> float:
            """The pair, as a fraction, that turns t times."""
            return self.width * math.log(self.length / (2 * math.pi * t)) / (2 * math.log(self.base))

        first, last = max(math.floor(pair(FAST)), 0), min(math.ceil(pair(SLOW)), self.width - 1)
        last = last + 0.001 if first == last else last
        return [1 - min(max((j - first) / (last - first), 0.0), 1.0) for j in range(len(plain))]


def xpos_growth(width: int, base: float = 512.0) -> tuple[float, ...]:
    """xPos's growth of the pairs of a query for each position, ln(ζ_j) / base with ζ_j = (2j + 0.4 width) / (1.4 width).

    Keys have the opposite one. An odd width raises ShapeError.
    """
    return tuple(math.log((2 * j + 0.4 * width) / (1.4 * width)) / base for j in range(len(rope_angles(width))))


def half_order(width: int, turned: int | None = None) -> np.ndarray:
    """The order of channels in which "half" turns what "interleaved" turned: half(x[order]) = interleaved(x)[order].

    It is 0, 2, 4, .., 1, 3, 5, .. for the ``turned`` channels, by default all, and leaves the rest of ``width`` in place. Its
    inverse, ``np.argsort(order)``, goes the other way. A head's rows of Wq and Wk, and of their biases, take this order; those
    of Wv and Wo stay. ShapeError unless ``turned`` is even and at most ``width``.
    """
    turned = width if turned is None else turned
    if turned % 2 or not 0 <= turned <= width:
        raise ShapeError(f"half_order: {turned} channels of {width} cannot be turned in pairs, allowed: an even number up to "
                         f"{width}")
    return np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2), np.arange(turned, width)])


def repaired(weight: np.ndarray, heads: int, pairing: str, turned: int | None = None) -> np.ndarray:
    """Rows of Wq or Wk[heads · K ..], or a bias, of a model of the other pairing, in the order that ``pairing`` needs.

    Products of queries and keys stay as they were. DomainError for an unknown pairing, ShapeError if the heads do not divide
    the rows.
    """
    if pairing not in PAIRINGS:
        raise DomainError(f"repaired: pairing is {pairing!r}, allowed: {', '.join(PAIRINGS)}")
    if heads < 1 or len(weight) % heads:
        raise ShapeError(f"repaired: {heads} heads do not divide {len(weight)} rows")
    width = len(weight) // heads
    order = half_order(width, turned)
    order = order if pairing == "half" else np.argsort(order)
    return weight.reshape(heads, width, *weight.shape[1:])[:, order].reshape(weight.shape)

