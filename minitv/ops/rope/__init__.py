"""rope: rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2, RoFormer).

Attention and retention compare a query with a key by their product, and this product does not know where the two stand. RoPE
tells it without an extra input: the channels form pairs. At position m, a pair (a, b) is turned by the angle m θ, as a point of
the plane.

    (a, b) -> (a cos mθ - b sin mθ, a sin mθ + b cos mθ)

A query at position m is turned by m θ, a key at position n by n θ. Their lengths stay as they are, and only the difference
(m - n) θ remains in their product. So a head can look for a content at a distance, wherever in the text it is.

The pairs turn at different speeds. Fast pairs tell neighbours apart, slow pairs tell distant regions apart. With one speed
alone, two distances that differ by a full turn would look the same.

Models differ in which two channels are a pair and how fast each pair turns, and the weights of one do not fit another.
``pairing`` "interleaved" pairs channels 2j and 2j + 1, as RoFormer, GPT-J, RetNet and Meta's LLaMA do. "half" pairs channels j
and j + K/2, as GPT-NeoX and Hugging Face's LLaMA do. ``half_order`` is the order of channels that leads from one to the other.
angles.py makes the usual angles, and those for texts longer than the ones of training.

The operator has four freedoms more than the formula. Channels beyond the pairs stay as they are (partial rotation). ``gain``
multiplies what is turned, for YaRN. ``growth`` lets pair j grow by exp(growth[j]) with each position, for xPos. And positions
may be anything: where a sequence starts (``start``), or a number of its own for every token.

Gradients. Turning is a linear map whose transpose turns the other way: the gradient of x is R(-m) g, times the same factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autograd import Tensor
from autograd.device import beside, namespace, to_numpy
from autograd.errors import DomainError
from autograd.laws import becomes, independent, law
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import concat, reshape, stack

from .angles import PAIRINGS, RAMPS, SCALINGS, Scaling, half_order, repaired, rope_angles, xpos_growth

__all__ = ["PAIRINGS", "RAMPS", "SCALINGS", "Rotation", "Scaling", "half_order", "repaired", "rope", "rope_angles", "turns",
           "xpos_growth"]


@lru_cache(maxsize=8)
def _counted(angles, growth, gain, start, length, dtype):
    return _turned(angles, growth, gain, np.arange(start, start + length), dtype)


def _turned(angles, growth, gain, positions, dtype):
    turned = np.multiply.outer(positions, np.array(angles, np.float64))  # in float32, off by 0.05 at position 10⁶
    cos, sin = np.cos(turned), np.sin(turned)
    if growth or gain != 1:
        size = gain * np.exp(np.multiply.outer(positions, np.array(growth or (0.0,) * len(angles), np.float64)))
        cos, sin = cos * size, sin * size
    return cos.astype(dtype), sin.astype(dtype)


def turns(angles, start, length, positions, dtype, growth=(), gain=1.0):
    """Cosine and sine of every angle, times what the pair is multiplied by, as NumPy arrays: [1 T len(angles)], or
    [B T len(angles)] of positions[B T].
    """
    if positions is None:
        return tuple(x[None] for x in _counted(angles, growth, gain, start, length, dtype))
    return _turned(angles, growth, gain, to_numpy(positions), dtype)


@op("x[B H T K], positions?:int[B T] -> y[B H T K]", analytic=True, laws=[independent("B H")])
def rope(x, positions=None, *, angles=(), pairing="interleaved", scale=1.0, start=0, growth=(), gain=1.0):
    """y = scale · x, with pair j of the channels of x[B H T K] turned by position · angles[j], in radians.

    ``angles`` are at most K/2; channels beyond 2 len(angles) are only scaled. Positions are start, start + 1, .. without
    positions[B T]. ``pairing`` is "interleaved" (2j, 2j + 1) or "half" (j, len(angles) + j). Pairs are also multiplied by
    gain · exp(growth[j] · position), where ``growth`` has a number for each angle, or none. Another pairing, too many angles,
    a start that is no integer or a pair that grows beyond the dtype raise DomainError.
    """
    y = x * x.dtype.type(scale)
    for b, h, t, j in np.ndindex(*x.shape[:3], len(angles)):
        position = start + t if positions is None else positions[b, t].item()
        size = scale * gain * math.exp(growth[j] * position if growth else 0.0)
        cos, sin = size * math.cos(position * angles[j]), size * math.sin(position * angles[j])
        one, two = (2 * j, 2 * j + 1) if pairing == "interleaved" else (j, len(angles) + j)
        a, b_ = x[b, h, t, one].item(), x[b, h, t, two].item()
        y[b, h, t, one], y[b, h, t, two] = a * cos - b_ * sin, a * sin + b_ * cos
    return y


@rope.form
def composed(x, positions, angles, pairing, scale, start, growth, gain):
    xp, pairs = namespace(x.data), len(angles)
    tables = turns(angles, start, x.shape[2], positions, x.dtype, growth, gain)
    cos, sin = (Tensor.wrap(xp.asarray(table[:, None])) for table in tables)
    rest = x[..., 2 * pairs:]
    if pairing == "interleaved":
        a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        y = reshape(stack([a * cos - b * sin, a * sin + b * cos], axis=-1), (*x.shape[:3], 2 * pairs))
        return concat([y, rest], axis=-1) * scale
    a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
    return concat([a * cos - b * sin, a * sin + b * cos, rest], axis=-1) * scale


rope.kernel("cpu")
rope.kernel("cuda")


@rope.validate
def _(x, positions, angles, pairing, scale, start, growth, gain):
    if pairing not in PAIRINGS:
        raise DomainError(f"rope: pairing is {pairing!r}, allowed: {', '.join(PAIRINGS)}")
    if not isinstance(angles, tuple) or 2 * len(angles) > x.shape[3]:
        raise DomainError(f"rope: angles must be a tuple of at most {x.shape[3] // 2} numbers, one for each pair of "
                          f"{x.shape[3]} channels, got {angles if not isinstance(angles, tuple) else len(angles)}")
    if isinstance(start, bool) or not isinstance(start, int):
        raise DomainError(f"rope: start must be an integer, got {start!r}")
    if not growth:
        return
    if not isinstance(growth, tuple) or len(growth) != len(angles):
        raise DomainError(f"rope: growth must be a tuple of a number for each of the {len(angles)} angles, or (), got "
                          f"{growth!r}")
    ends = np.array((start, start + x.shape[2])) if positions is None else to_numpy(positions)
    farthest = int(np.abs(ends).max(initial=0))
    if farthest * max(map(abs, growth)) > math.log(np.finfo(x.dtype).max):
        raise DomainError(f"rope: at position {farthest}, a growth of {max(growth, key=abs):g} for each position is beyond "
                          f"{x.dtype}, allowed: positions up to {int(math.log(np.finfo(x.dtype).max) / max(map(abs, growth)))}")


@rope.inputs
def _(draw):
    shape = draw.size(0, 2, "B"), draw.size(0, 2, "H"), draw.size(0, 4, "T"), draw.size(0, 7, "K")
    pairs, generator = draw.integer(0, shape[3] // 2), draw.generator()
    positions = draw.integers(0, 10**6, shape[0], shape[2]) if draw.boolean() else None
    start = draw.choice((0, 5, 10**6, -3))
    farthest = 10**6 if positions is not None else abs(start) + shape[2]
    growth = tuple((generator.uniform(-1, 1, pairs) / max(farthest, 1)).tolist()) if draw.boolean() else ()
    return (draw.floats(*shape), positions), {
        "angles": tuple(generator.uniform(0, 3, pairs).tolist()), "pairing": draw.choice(PAIRINGS), "growth": growth,
        "scale": draw.choice((1.0, 0.3)), "start": start, "gain": draw.choice((1.0, 1.2))}


@law(rope, "lengths are kept")
def _(case, draw):
    y, x = case(growth=(), gain=1.0).y, case.x
    assert_close(np.sum(y * y, axis=3), np.sum(x * x, axis=3) * x.dtype.type(case.scale**2),
                 "rope changes the length of vectors", terms=16)


@law(rope, "position 0 is the identity")
def _(case, draw):
    none = np.zeros((case.x.shape[0], case.x.shape[2]), np.int64)
    assert_close(case(positions=none, scale=1.0, gain=1.0).y, case.x, "rope turns at position 0", terms=4)


@becomes(rope, "relative positions", "queries and keys are multiplied")
def _(case, draw):
    other, shift = draw.floats(*case.x.shape), draw.integer(1, 50)  # products m θ are rounded, the more the farther
    opposite = tuple(-rate for rate in case.growth)  # of xPos: queries shrink as keys grow

    def products(start):
        a = case(positions=None, start=start).y
        b = case(x=other, positions=None, start=start, growth=opposite).y
        return a @ np.swapaxes(b, 2, 3)

    assert_close(products(shift), products(0), "products of rotated vectors depend on where they start", terms=64)


@law(rope, "turning by m and then by n is turning by m + n")
def _(case, draw):
    shape, plain = (case.x.shape[0], case.x.shape[2]), {"scale": 1.0, "gain": 1.0}
    m, n = draw.integers(-50, 50, *shape), draw.integers(-50, 50, *shape)
    twice = case(x=case(positions=m, **plain).y, positions=n, **plain).y
    assert_close(twice, case(positions=m + n, **plain).y, "two turns are not one by the sum of positions", terms=16)


@law(rope, "one pairing is the other's order of channels")
def _(case, draw):
    order = half_order(case.x.shape[3], 2 * len(case.angles))
    interleaved = case(pairing="interleaved").y
    half = case(x=np.ascontiguousarray(case.x[..., order]), pairing="half").y
    assert_close(half, interleaved[..., order], "the pairings are not one another's order of channels", terms=16)


@dataclass(frozen=True)
class Rotation:
    """How a mixer turns its queries and keys [B H T K]: what ``rope`` takes beside them and their positions.

    With a ``growth``, queries have it and keys the opposite one, and positions are counted from ``centre`` on: that changes no
    product, and keeps both small.
    """

    angles: tuple[float, ...]
    pairing: str = "interleaved"
    gain: float = 1.0
    growth: tuple[float, ...] = ()
    centre: int = 0

    def queries(self, q: Tensor, start: int = 0) -> Tensor:
        """Queries of the positions from ``start`` on."""
        return rope(q, angles=self.angles, pairing=self.pairing, gain=self.gain, growth=self.growth, start=start - self.centre)

    def keys(self, k: Tensor, start: int = 0, scale: float = 1.0) -> Tensor:
        """Keys of the positions from ``start`` on, times ``scale``."""
        return rope(k, angles=self.angles, pairing=self.pairing, gain=self.gain, growth=self._fading, start=start - self.centre,
                    scale=scale)

    def moved(self, k: Tensor, by: int) -> Tensor:
        """Keys that are turned already, as if their positions were ``by`` more: R(by) k. A cache whose first keys are forgotten
        moves the others, by a negative number.
        """
        positions = beside(np.full((k.shape[0], k.shape[2]), by, np.int64), k.data)
        return rope(k, positions, angles=self.angles, pairing=self.pairing, growth=self._fading)

    @property
    def _fading(self) -> tuple[float, ...]:
        return tuple(-rate for rate in self.growth)
