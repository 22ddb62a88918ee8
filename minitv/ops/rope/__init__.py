"""rope: rotary position embedding. Su et al. 2021, arXiv 2104.09864, section 3.2.

A pair of channels (a, b) at position m is turned by the angle m θ:

    (a, b) -> (a cos mθ - b sin mθ, a sin mθ + b cos mθ)

Rotated alike, a query at m and a key at n have a product that depends on m - n only. Which channels are a pair, and which
angle turns it, differs between models, and weights of one do not fit another: adjacent pairs (2j, 2j + 1) in RoFormer, GPT-J
and RetNet, pairs (j, j + K/2) of two halves in GPT-NeoX and Hugging Face's LLaMA. ``rope_angles`` makes the usual angles.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from autograd import Tensor
from autograd.device import namespace, to_numpy
from autograd.errors import DomainError, ShapeError
from autograd.laws import identity, independent
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, reshape, stack

PAIRINGS = ("adjacent", "half")


def rope_angles(width: int, base: float = 10_000.0, *, closed: bool = False) -> tuple[float, ...]:
    """The angle in radians per position of each of width / 2 pairs j: base^(-2j / width), RoFormer's.

    ``closed`` reaches 1/base at the last pair, base^(-j / (width/2 - 1)): RetNet's, which are xPos' without its magnitudes
    (torchscale; arXiv 2212.10554). An odd width raises ShapeError.
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


def _keeps_lengths(case, draw):
    y, x = case().y, case.x
    assert_close(np.sum(y * y, axis=3), np.sum(x * x, axis=3) * x.dtype.type(case.scale**2),
                 "rope changes the length of vectors", terms=16)


def _relative(case, draw):
    other, shift = draw.floats(*case.x.shape), draw.integer(1, 50)  # products m θ are rounded, the more the farther

    def products(start):
        a, b = (case(x=x, positions=None, start=start).y for x in (case.x, other))
        return a @ np.swapaxes(b, 2, 3)

    assert_close(products(shift), products(0), "products of rotated vectors depend on where they start", terms=64)


def _pairings_are_orders(case, draw):
    pairs = case.x.shape[3] // 2
    x, angles = case.x[..., : 2 * pairs], tuple(1 / (1 + j) for j in range(pairs))
    order = np.arange(2 * pairs).reshape(pairs, 2).T.ravel()
    adjacent = case(x=x, angles=angles, pairing="adjacent").y
    half = case(x=x[..., order], angles=angles, pairing="half").y
    assert_close(half, adjacent[..., order], "the pairings are not one another's order of channels", terms=16)


@op("x[B H T K], positions?:int[B T] -> y[B H T K]", analytic=True,
    laws=[independent("B H"), identity("lengths are kept", _keeps_lengths),
          identity("products depend on differences of positions only", _relative),
          identity("one pairing is the other's order of channels", _pairings_are_orders)])
def rope(x, positions=None, *, angles=(), pairing="adjacent", scale=1.0, start=0):
    """y = scale · x with pair j of the channels of x[B H T K] turned by position · angles[j], in radians.

    ``angles`` are at most K/2; channels beyond 2 len(angles) are only scaled. Positions are start, start + 1, ... unless
    given as positions[B T]. ``pairing`` is "adjacent" (2j, 2j + 1) or "half" (j, len(angles) + j).
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
