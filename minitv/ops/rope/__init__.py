"""rope: rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2, RoFormer).

Attention and retention compare a query with a key by their product, and this product does not know where the two stand. RoPE
tells it without an extra input: the channels form pairs, and position m turns pair (a, b) by the angle m θ, as a clock turns
its hand.

    (a, b) -> (a cos mθ - b sin mθ, a sin mθ + b cos mθ)

A query at position m and a key at position n are turned alike. The turns of both leave their lengths as they are, and only the
difference (m - n) θ remains in their product. So a head can look for a content at a distance, wherever in the text it is.

The pairs turn at different speeds. Fast pairs tell neighbours apart, slow pairs tell distant regions apart. With one speed
alone, two distances that differ by a full turn would look the same.

Models differ in which two channels are a pair and how fast each pair turns, and the weights of one do not fit another.
``pairing`` "adjacent" pairs channels 2j and 2j + 1, as RoFormer, GPT-J and RetNet do. "half" pairs channels j and j + K/2, as
GPT-NeoX and Hugging Face's LLaMA do. ``rope_angles`` makes the usual angles.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from autograd import Tensor
from autograd.device import namespace, to_numpy
from autograd.errors import DomainError, ShapeError
from autograd.laws import independent, law
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, reshape, stack

PAIRINGS = ("adjacent", "half")


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


@lru_cache(maxsize=8)
def _counted(angles, start, length, dtype):
    return _turned(angles, np.arange(start, start + length), dtype)


def _turned(angles, positions, dtype):
    turned = np.multiply.outer(positions, np.array(angles, np.float64))  # in float32, off by 0.05 at position 10⁶
    return np.cos(turned).astype(dtype), np.sin(turned).astype(dtype)


def turns(angles, start, length, positions, dtype):
    """Cosine and sine of every angle as NumPy arrays: [1 T len(angles)], or [B T len(angles)] of positions[B T]."""
    if positions is None:
        return tuple(x[None] for x in _counted(angles, start, length, dtype))
    return _turned(angles, to_numpy(positions), dtype)


@op("x[B H T K], positions?:int[B T] -> y[B H T K]", analytic=True, laws=[independent("B H")])
def rope(x, positions=None, *, angles=(), pairing="adjacent", scale=1.0, start=0):
    """y = scale · x with pair j of the channels of x[B H T K] turned by position · angles[j], in radians.

    ``angles`` are at most K/2; channels beyond 2 len(angles) are only scaled. Positions are start, start + 1, .. without
    positions[B T]. ``pairing`` is "adjacent" (2j, 2j + 1) or "half" (j, len(angles) + j). Another name, too many angles or a
    start that is no integer raise DomainError.
    """
    y = x * x.dtype.type(scale)
    for b, h, t, j in np.ndindex(*x.shape[:3], len(angles)):
        angle = (start + t if positions is None else positions[b, t].item()) * angles[j]
        one, two = (2 * j, 2 * j + 1) if pairing == "adjacent" else (j, len(angles) + j)
        a, b_ = x[b, h, t, one].item(), x[b, h, t, two].item()
        y[b, h, t, one] = scale * (a * math.cos(angle) - b_ * math.sin(angle))
        y[b, h, t, two] = scale * (a * math.sin(angle) + b_ * math.cos(angle))
    return y


@rope.form
def composed(x, positions, angles, pairing, scale, start):
    xp, pairs = namespace(x.data), len(angles)
    cos, sin = (Tensor.wrap(xp.asarray(t[:, None])) for t in turns(angles, start, x.shape[2], positions, x.dtype))
    rest = x[..., 2 * pairs:]
    if pairing == "adjacent":
        a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        y = reshape(stack([a * cos - b * sin, a * sin + b * cos], axis=-1), (*x.shape[:3], 2 * pairs))
        return concat([y, rest], axis=-1) * scale
    a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
    return concat([a * cos - b * sin, a * sin + b * cos, rest], axis=-1) * scale


rope.kernel("cpu")
rope.kernel("cuda")


@rope.validate
def _(x, positions, angles, pairing, scale, start):
    if pairing not in PAIRINGS:
        raise DomainError(f"rope: pairing is {pairing!r}, allowed: {', '.join(PAIRINGS)}")
    if not isinstance(angles, tuple) or 2 * len(angles) > x.shape[3]:
        raise DomainError(f"rope: angles must be a tuple of at most {x.shape[3] // 2} numbers, one for each pair of "
                          f"{x.shape[3]} channels, got {angles if not isinstance(angles, tuple) else len(angles)}")
    if isinstance(start, bool) or not isinstance(start, int):
        raise DomainError(f"rope: start must be an integer, got {start!r}")


@rope.inputs
def _(draw):
    shape = draw.size(0, 2), draw.size(0, 2), draw.size(0, 4), draw.size(0, 7)
    pairs = draw.integer(0, shape[3] // 2)
    angles = tuple(draw.generator().uniform(0, 3, pairs).tolist())
    positions = draw.integers(0, 10**6, shape[0], shape[2]) if draw.boolean() else None
    return (draw.floats(*shape), positions), {
        "angles": angles, "pairing": draw.choice(PAIRINGS), "scale": draw.choice((1.0, 0.3)),
        "start": draw.choice((0, 5, 10**6))}


@law(rope, "lengths are kept")
def _(case, draw):
    y, x = case().y, case.x
    assert_close(np.sum(y * y, axis=3), np.sum(x * x, axis=3) * x.dtype.type(case.scale**2),
                 "rope changes the length of vectors", terms=16)


@law(rope, "products depend on differences of positions only")
def _(case, draw):
    other, shift = draw.floats(*case.x.shape), draw.integer(1, 50)  # products m θ are rounded, the more the farther

    def products(start):
        a, b = (case(x=x, positions=None, start=start).y for x in (case.x, other))
        return a @ np.swapaxes(b, 2, 3)

    assert_close(products(shift), products(0), "products of rotated vectors depend on where they start", terms=64)


@law(rope, "one pairing is the other's order of channels")
def _(case, draw):
    pairs = case.x.shape[3] // 2
    x, angles = case.x[..., : 2 * pairs], tuple(1 / (1 + j) for j in range(pairs))
    order = np.arange(2 * pairs).reshape(pairs, 2).T.ravel()
    adjacent = case(x=x, angles=angles, pairing="adjacent").y
    half = case(x=x[..., order], angles=angles, pairing="half").y
    assert_close(half, adjacent[..., order], "the pairings are not one another's order of channels", terms=16)
