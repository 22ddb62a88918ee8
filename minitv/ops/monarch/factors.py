"""Factors of Monarch matrices: those of the Fourier transform, of polynomials, of an inverse, and the nearest to any matrix.

They are NumPy arrays, complex where the matrix is. ``first`` [Q A P] and ``second`` [A C Q] are what the operator reads; a
matrix of higher order has a list of factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from autograd.errors import ShapeError


@lru_cache(maxsize=32)
def dft(*sizes: int) -> tuple[np.ndarray, ...]:
    """The factors of the Fourier transform of n₁ n₂ ... points, one for each size: X_k = Σ_j e^(-2πi j k / n) x_j.

    Factor i adds up over one digit of j. It multiplies by e^(-2πi j_i (k₁ + n₁ k₂ + ...) / (n₁ ... n_i)), with the digits of k
    that are known by then: this is the fast Fourier transform of Cooley and Tukey, with as many steps as sizes.
    """
    factors, points, known = [], 1, np.zeros(1)  # known: k₁ + n₁ k₂ + ... for all digits of k so far, [A]
    for i, size in enumerate(sizes):
        later = math.prod(sizes[i + 1 :])  # digits of j that are still to be added up stand before those of k
        new = known[:, None] + points * np.arange(size)  # [A size]
        points *= size
        turns = np.exp(-2j * np.pi * new[:, :, None] * np.arange(size) / points)  # [A size size]
        factors.append(np.tile(turns, (later, 1, 1)))
        known = new.reshape(-1)
    for factor in factors:
        factor.flags.writeable = False
    return tuple(factors)


def inverse(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the inverse: a Monarch matrix too, whose first factor has the inverse blocks of the second one.

    All blocks must be square. numpy.linalg.LinAlgError if one has no inverse.
    """
    return np.linalg.inv(second), np.linalg.inv(first)


def transposed(first, second):
    """The factors of the transposed matrix."""
    return np.swapaxes(second, 1, 2), np.swapaxes(first, 1, 2)


def nearest(matrix: np.ndarray, columns: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
    """The factors of a Monarch matrix near matrix[rows, columns], whose sizes are the products of the digits' sizes.

    For two digits it is the nearest. With ``columns`` P, Q and ``rows`` A, C, the part with fixed k₁ and j₀ is a C × P matrix,
    which in a Monarch matrix has rank 1. The best one has the largest singular value σ and its vectors u and v (Eckart and
    Young 1936). What remains, as a sum of squares, are all other singular values:

        M[k₁ + A k₂, Q j₁ + j₀] ≈ σ u_k₂ v_j₁        second = √σ u,    first = √σ v

    For more digits, ``second`` is a matrix for each k₁, and its factors are found in the same way. A Monarch matrix of that
    order comes back exactly; of another matrix this is an approximation. ShapeError if the digits do not make the sizes.
    """
    if len(rows) != len(columns) or matrix.shape != (math.prod(rows), math.prod(columns)):
        raise ShapeError(f"nearest: rows {tuple(rows)} and columns {tuple(columns)} are digits of a matrix of "
                         f"{math.prod(rows)} x {math.prod(columns)}, as many of both are allowed; got {matrix.shape}")
    if len(rows) == 1:
        return [matrix[None]]
    parts = matrix.reshape(math.prod(rows[1:]), rows[0], columns[0], math.prod(columns[1:])).transpose(1, 3, 0, 2)  # [A Q C P]
    u, s, vt = np.linalg.svd(parts, full_matrices=False)
    root = np.sqrt(s[..., :1])  # [A Q 1]
    first = (vt[..., 0, :] * root).transpose(1, 0, 2)  # [Q A P]
    second = (u[..., 0] * root).transpose(0, 2, 1)  # [A C Q]
    inner = [nearest(one, columns[1:], rows[1:]) for one in second]  # for each k₁, factors of L_k₁
    factors = [first]
    for i, together in enumerate(zip(*inner, strict=True)):  # k₁ stands after the digits of j, before those of k₂
        later = math.prod(columns[i + 2 :])
        blocks = [factor.reshape(later, -1, *factor.shape[1:]) for factor in together]
        factors.append(np.stack(blocks, axis=1).reshape(-1, *blocks[0].shape[2:]))
    return [np.ascontiguousarray(factor) for factor in factors]


def polynomials(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the matrix whose column j holds the values of a polynomial q_j at the n roots of unity; n = n₁ n₂.

    low[n₂ n₂] and high[n₂ n₁ n₁] hold coefficients, the lowest degree first: with j = n₂ j₁ + j₀,

        q_j(Z) = low_j₀(Z) high_j₀j₁(Z^n₂),    M[k, j] = q_j(w^k),    w = e^(-2πi / n)

    With low and high the identity, q_j = Z^j, and M is the Fourier transform.
    """
    (_, n1, _), n2 = high.shape, len(low)
    k1, k2 = np.arange(n1), np.arange(n2)
    powers = np.exp(-2j * np.pi * np.outer(k1, np.arange(n1)) / n1)  # (w^n₂)^(k₁ l) [k₁ l]
    first = np.einsum("kl,qjl->qkj", powers, high)  # [n₂ n₁ n₁]
    points = np.exp(-2j * np.pi * (k1[:, None] + n1 * k2)[:, :, None] * np.arange(n2) / (n1 * n2))  # w^(k l) [k₁ k₂ l]
    return first, np.einsum("akl,ql->akq", points, low)  # [n₁ n₂ n₂]


def triangular(low: np.ndarray, high: np.ndarray, bounded: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients for ``polynomials`` that keep the order of time, made of free ones: q_j begins with Z^j.

    low_j₀ begins with Z^j₀, high_j₀j₁ with Z^j₁, both with the coefficient 1. ``bounded`` also keeps the degree of q_j below
    n / 2 for j < n / 2, so that no product of two of them turns around the circle of n points; n₁ must be even.
    """
    n1 = high.shape[1]
    low = np.triu(low, 1) + np.eye(len(low))
    high = np.triu(high, 1) + np.eye(n1)
    if bounded:
        high[:, : n1 // 2, n1 // 2 :] = 0
    return low, high


def digits(number: int, count: int) -> list[int]:
    """``count`` factors of a number that are as nearly equal as its prime factors let them be, the largest first."""
    primes, rest, prime = [], number, 2
    while rest > 1:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    made = [1] * count
    for prime in reversed(primes):
        made[made.index(min(made))] *= prime
    return sorted(made, reverse=True)


def sizes(length: int) -> tuple[int, int]:
    """n₁ and n₂ with n₁ n₂ ≥ ``length``, nearly equal, n₁ even and the product as small as that allows."""
    root = max(1, math.isqrt(max(length - 1, 0)) + 1)
    n1 = root + root % 2
    return n1, -(-length // n1)
