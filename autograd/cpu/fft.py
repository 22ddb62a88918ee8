"""Fourier transforms inside kernels, in place, of as many sequences side by side as a vector has lanes.

A point of the sequences is two vectors, real and imaginary parts: ``work`` is [n, 2, lanes] in one flat array. A size n is
a product of factors 2, 3, 4, 5 and 8, taken one after the other (Cooley and Tukey 1965):

    forward   for each factor r: a block of m points becomes r blocks of m / r, by small transforms of r points that
              are m / r apart, each result times a twiddle factor e^(-2πi j k / m)
    inverse   the same backwards: its small transforms are forward ones with real and imaginary parts exchanged

Forward leaves frequency k at ``Plan.places[k]``, and inverse starts from there, so that nothing is ever reordered. A block
is finished before its neighbour is touched: once it fits, it stays in the first-level cache.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from .compile import cpu_kernel, inline
from .vectors import BYTES, Memory, Vector, vectorized


class Complex(NamedTuple):
    """A complex vector, inside vectorized functions."""

    re: Vector
    im: Vector

    @classmethod
    def load(cls, work: Memory, index):
        return cls(work.load(index), work.load(index + work.lanes))

    def store(self, work: Memory, index) -> None:
        work.store(index, self.re)
        work.store(index + work.lanes, self.im)

    def __add__(self, other):
        return Complex(self.re + other.re, self.im + other.im)

    def __sub__(self, other):
        return Complex(self.re - other.re, self.im - other.im)

    def __mul__(self, other):
        return Complex(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def scale(self, factor: float):
        return Complex(self.re * factor, self.im * factor)

    def conjugate(self):
        return Complex(self.re, -self.im)

    def exchanged(self):
        return Complex(self.im, self.re)

    def turned(self, eighths: int):
        """Times e^(-2πi eighths / 8)."""
        if eighths % 2:
            diagonal = Complex(self.re + self.im, self.im - self.re).scale(math.sqrt(0.5))
            return diagonal.turned(eighths - 1)
        return (self, Complex(self.im, -self.re), Complex(-self.re, -self.im), Complex(-self.im, self.re))[eighths // 2 % 4]


def _transform(x: list[Complex]) -> list[Complex]:
    """The Fourier transform of 1, 2, 3, 4, 5 or 8 numbers."""
    n = len(x)
    if n == 1:
        return x
    if n % 2 == 0:
        even, odd = _transform(x[0::2]), [z.turned(8 // n * k) for k, z in enumerate(_transform(x[1::2]))]
        return [a + b for a, b in zip(even, odd, strict=True)] + [a - b for a, b in zip(even, odd, strict=True)]
    half = range(1, (n + 1) // 2)
    sums, differences = [x[m] + x[n - m] for m in half], [(x[m] - x[n - m]).turned(2) for m in half]
    y = [functools.reduce(Complex.__add__, sums, x[0]), *x[1:]]
    for k in half:
        angles = [2 * math.pi * k * m / n for m in half]
        a = functools.reduce(Complex.__add__, (z.scale(math.cos(v)) for z, v in zip(sums, angles, strict=True)), x[0])
        b = functools.reduce(Complex.__add__, (z.scale(math.sin(v)) for z, v in zip(differences, angles, strict=True)))
        y[k], y[n - k] = a + b, a - b
    return y


@vectorized
def _forward_points(radix, work, start, step, twiddles, at):
    """Replace ``radix`` points by their transform, the later ones times the twiddles from ``at`` on (none if it is -1)."""
    points = [start + step * k for k in range(radix)]
    for k, z in enumerate(_transform([Complex.load(work, i) for i in points])):
        (z * _twiddle(twiddles, at, k) if k and at != -1 else z).store(work, points[k])


@vectorized
def _inverse_points(radix, work, start, step, twiddles, at):
    """Undo _forward_points, up to a factor of ``radix``."""
    points = [start + step * k for k in range(radix)]
    x = [Complex.load(work, i).exchanged() for i in points]
    x = [z * _twiddle(twiddles, at, k) if k and at != -1 else z for k, z in enumerate(x)]
    for i, z in zip(points, _transform(x), strict=True):
        z.exchanged().store(work, i)


def _twiddle(twiddles: Memory, at, k: int) -> Complex:
    return Complex(twiddles.spread(at + (2 * k - 2)), twiddles.spread(at + (2 * k - 1)))


def _block(points):
    """A function that transforms a block of ``size`` points into ``radix`` blocks, or back."""
    def of_radix(radix):
        @inline
        def run(work, start, size, row, twiddles, at):
            count = size // radix
            if count == 1:  # all twiddle factors are 1
                points(radix, work, start, row, twiddles, -1)
            else:
                for j in range(count):
                    points(radix, work, start + j * row, count * row, twiddles, at + 2 * (radix - 1) * j)

        return run

    two, three, four, five, eight = map(of_radix, (2, 3, 4, 5, 8))

    @inline
    def run(radix, work, start, size, row, twiddles, at):
        if radix == 8:
            eight(work, start, size, row, twiddles, at)
        elif radix == 4:
            four(work, start, size, row, twiddles, at)
        elif radix == 2:
            two(work, start, size, row, twiddles, at)
        elif radix == 3:
            three(work, start, size, row, twiddles, at)
        else:
            five(work, start, size, row, twiddles, at)

    return run


_forward_block, _inverse_block = _block(_forward_points), _block(_inverse_points)


@cpu_kernel
def forward(work, plan):
    """The transform Σ_t x_t e^(-2πi k t / n) of every lane; frequency k ends at point ``places[k]``."""
    radices, sizes, starts, levels, twiddles = plan
    row, smallest = 2 * BYTES // work.itemsize, sizes[-1]
    for i in range(levels.size):
        for level in range(levels[i], radices.size):
            _forward_block(radices[level], work, i * smallest * row, sizes[level], row, twiddles, starts[level])


@cpu_kernel
def inverse(work, plan):
    """n times the x of which ``forward`` made this."""
    radices, sizes, starts, levels, twiddles = plan
    row, smallest = 2 * BYTES // work.itemsize, sizes[-1]
    for i in range(1, levels.size + 1):
        outermost = levels[i] if i < levels.size else 0
        for level in range(radices.size - 1, outermost - 1, -1):
            start = (i * smallest - sizes[level]) * row
            _inverse_block(radices[level], work, start, sizes[level], row, twiddles, starts[level])


class Plan:
    """What transforms of size n need: ``arguments`` for the kernels, and ``places[k]``, the point of frequency k."""

    def __init__(self, n: int, dtype):
        factors, rest = [], n
        for prime in (5, 3):
            while rest > 1 and rest % prime == 0:
                factors.append(prime)
                rest //= prime
        twos = rest.bit_length() - 1
        if n < 2 or rest != 1 << twos:
            raise ValueError(f"Plan: {n} is not a product of 2, 3 and 5")
        factors += [8] * (twos // 3) + [[], [2], [4]][twos % 3]
        if factors[-2:] == [8, 2]:
            factors[-2:] = [4, 4]
        sizes = [n // math.prod(factors[:level]) for level in range(len(factors))]
        tables = []
        for radix, size in zip(factors, sizes, strict=True):
            angle = -2 * np.pi / size * np.arange(size // radix)[:, None] * np.arange(1, radix)
            tables.append(np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(-1))
        starts = np.cumsum([0, *map(len, tables[:-1])])
        # The outermost block that begins at each of the smallest blocks.
        levels = [next(level for level, size in enumerate(sizes) if point % size == 0) for point in range(0, n, sizes[-1])]
        self.arguments = (np.array(factors), np.array(sizes), starts, np.array(levels), np.concatenate(tables).astype(dtype))
        self.places = np.zeros(n, np.int64)
        left = np.arange(n)
        for radix, size in zip(factors, sizes, strict=True):
            self.places += left % radix * (size // radix)
            left //= radix


plan = functools.cache(Plan)
