"""monarch: a matrix that is a product of two block-diagonal ones and permutations (Dao et al. 2022, arXiv 2204.00595).

The idea. A dense matrix of N × N numbers costs N² products. A block-diagonal one is cheap, but keeps its blocks apart. A
Monarch matrix has two block-diagonal factors, and a permutation between them that hands a part of each block to each block.
Then every output sees every input, for about 2 N √N products. Both steps are plain products of small dense matrices, which
processors do best.

The number of an input is written with two digits, j = Q j₁ + j₀ with j₁ < P and j₀ < Q. That of an output has two digits too,
k = k₁ + A k₂ with k₁ < A and k₂ < C. The first factor replaces the digit j₁ by k₁, the second one j₀ by k₂. R_j₀ [A P] and
L_k₁ [C Q] are the blocks:

    t[k₁, j₀] = Σ_j₁ R_j₀[k₁, j₁] x[Q j₁ + j₀]              one block for each j₀, ``first`` [Q A P]
    y[k₁ + A k₂] = Σ_j₀ L_k₁[k₂, j₀] t[k₁, j₀]              one block for each k₁, ``second`` [A C Q]
    M[k, j] = L_k₁[k₂, j₀] R_j₀[k₁, j₁]
    M = Π L Π R Π                                           L and R block-diagonal, each Π a stride permutation

The outer two Π bring inputs and outputs into the order of their digits. The one in the middle mixes the blocks.

    ours          the papers of Dao and of Fu (arXiv 2310.12109)
    first, R      R, the factor that is applied first
    second, L     L
    P, Q, A, C    √N in all: here blocks may be rectangular, and M has C·A rows and P·Q columns
    Π             P; the argument ``strided`` in minitv/ops/block_diagonal/__init__.py

Cost for each row of x: Q A (P + C) products, and as many weights. For P = Q = A = C = √N these are 2 N √N. With p factors, each
for one of p digits, they are p N^(1 + 1/p): ``product`` computes that. For p = log₂ N these are 2 N log₂ N products, as many as
in a fast Fourier transform but for a constant.

What it can be. The Fourier transform is a Monarch matrix, with complex blocks (``dft`` in factors.py). Here R_j₀ is a small
Fourier transform of P points. L_k₁ is one of Q points, whose column j₀ is multiplied by e^(-2πi j₀ k₁ / N). So a convolution
takes three Monarch products. Two make the spectra of the input and of the filter, and the third, an inverse one, turns their
product back. This is the form ``monarch`` of long_conv. The transpose of a Monarch matrix is one too, with the factors in the
other order, and so is the inverse, if all blocks have one.

    >>> import numpy as np
    >>> from minitv.ops.monarch.factors import dft, nearest
    >>> first, second = dft(2, 2)
    >>> print(monarch.definition(np.array([1, 2, 3, 5 + 0j]), first, second).round(6) + 0)
    [11.+0.j -2.+3.j -3.+0.j -2.-3.j]
    >>> print(np.fft.fft([1, 2, 3, 5]))
    [11.+0.j -2.+3.j -3.+0.j -2.-3.j]

Projection. In a Monarch matrix, the part with fixed k₁ and j₀ is a column of L times a row of R, a matrix of rank 1. The best
approximation of any matrix takes the largest singular value of each of these parts (``nearest`` in factors.py):

    >>> for name, M in (("stride", stride(2, 2)), ("identity", np.eye(4))):
    ...     print(name, np.linalg.norm(M - matrix(*nearest(M, columns=(2, 2), rows=(2, 2))).numpy()).round(6))
    stride 0.0
    identity 1.414214

The permutation by stride is a Monarch matrix. The identity is none, because its parts have rank 2.

Causality (arXiv 2310.12109). Let column j of M hold the values of a polynomial q_j at the N points w^k, w = e^(-2πi / N). Then
M u are the values of u(Z) = Σ_j u_j q_j(Z), and a product of values belongs to the product of polynomials. M⁻¹ finds the
coefficients y_t of a polynomial Σ_t y_t q_t(Z) by its values. So y = M⁻¹ (M h ∘ M u) multiplies the polynomials of h and u. Let
the lowest power of q_j be Z^j. Then the lowest power of q_i q_j is Z^(i+j), so it is a sum of polynomials q_t with t ≥ i + j
alone. So u_j reaches the outputs t ≥ j alone: y is causal, without a mask. One condition more is needed. At the N points, Z^N
has the same values as 1. So h and u may use the first N / 2 columns only, and these q_j need degrees below N / 2. Else the
future comes back around the circle. For the Fourier transform q_j is Z^j. The law "a bounded product of polynomials is causal"
below checks this for learnable q_j, see ``triangular`` in factors.py.

Gradients. Let g be the gradient of y. Then dx = Mᵀ g is a Monarch product of g, by second and first transposed. The others are
sums over the rows of x, with t from above and h[k₁, k₂] = g[k₁ + A k₂]:

    dL_k₁ = Σ h[k₁, :] t[k₁, :]ᵀ,    dt[k₁, j₀] = Σ_k₂ L_k₁[k₂, j₀] h[k₁, k₂],    dR_j₀ = Σ dt[:, j₀] x[:, j₀]ᵀ
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import block_diag

from autograd import Tensor
from autograd.device import beside
from autograd.errors import ShapeError
from autograd.laws import becomes, law, linear_in
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import linear, reshape, stack, transpose

from ..block_diagonal import block_diagonal
from . import factors


@op("x[... N], first[Q A P], second[A C Q] -> y[... M]", analytic=True,
    laws=[linear_in("x"), linear_in("first"), linear_in("second")])
def monarch(x, first, second):
    """y[k₁ + A k₂] = Σ_j₀ second[k₁][k₂, j₀] Σ_j₁ first[j₀][k₁, j₁] x[Q j₁ + j₀], for x[... P·Q] -> y[... C·A].

    first[Q A P], second[A C Q]. ShapeError if x has not P · Q channels.
    """
    (blocks, rows, columns), outputs = first.shape, second.shape[1]
    y = np.zeros((*x.shape[:-1], outputs * rows), x.dtype)
    for *lead, k1, j0 in np.ndindex(*x.shape[:-1], rows, blocks):
        t = np.zeros((), x.dtype)
        for j1 in range(columns):
            t = t + first[j0, k1, j1] * x[(*lead, blocks * j1 + j0)]
        for k2 in range(outputs):
            y[(*lead, k1 + rows * k2)] += second[k1, k2, j0] * t
    return y


@monarch.form
def blocks(x, first, second):
    """Two block-diagonal products: time O(Q A (P + C)) for each row of x, 2 N √N for N = P Q and square blocks."""
    return product(x, [first, second])


@monarch.form
def dense(x, first, second):
    """x Mᵀ with the matrix written out: time O(A C P Q) for each row of x."""
    return linear(x, matrix(first, second))


def product(x, factors: Sequence):
    """The product of x[... N] with a Monarch matrix of any order, for example of three factors.

    Factor i [G O J] adds up over one digit of the input, and every factor strides. The digits of the output then stand in the
    order in which they were made, which is reversed at last. ShapeError, of block_diagonal, if the sizes do not fit.
    """
    for factor in factors:
        x = block_diagonal(x, factor, strided=True)
    digits, count = [factor.shape[1] for factor in factors], x.ndim - 1
    y = reshape(x, (*x.shape[:-1], *digits))  # [... O₁ ... O_p]
    y = transpose(y, axes=(*range(count), *reversed(range(count, count + len(digits)))))
    return reshape(y, x.shape)


def matrix(first, second):
    """M [C·A, P·Q] of first[Q A P] and second[A C Q]: M[k, j] = L_k₁[k₂, j₀] R_j₀[k₁, j₁]; a Tensor."""
    (blocks, rows, columns), outputs = first.shape, second.shape[1]
    right = reshape(transpose(first, axes=(1, 2, 0)), (1, rows, columns, blocks))
    left = reshape(transpose(second, axes=(1, 0, 2)), (outputs, rows, 1, blocks))
    return reshape(left * right, (outputs * rows, columns * blocks))  # [C A P Q]


def transform(x, first: np.ndarray, second: np.ndarray):
    """The real and the imaginary part of M x, both [... M], for real x[... N] and complex factors.

    All four products of real and imaginary parts of the two factors are one real Monarch product, with twice the rows in every
    block of both.
    """
    rows, outputs = second.shape[0], second.shape[1]
    wide = np.concatenate([first.real, first.imag], axis=1)  # [Q 2A P]
    high = np.tile(np.concatenate([second.real, second.imag], axis=1), (2, 1, 1))  # [2A 2C Q]
    y = monarch(x, *(Tensor.wrap(beside(factor.astype(x.dtype), x.data)) for factor in (wide, high)))
    y = reshape(y, (*x.shape[:-1], 2, outputs, 2, rows))  # part of L, k₂, part of R, k₁
    both = y[..., 0, :, 0, :] - y[..., 1, :, 1, :], y[..., 1, :, 0, :] + y[..., 0, :, 1, :]
    return tuple([reshape(part, (*x.shape[:-1], outputs * rows)) for part in both])


def circular_convolution(x, filter, sizes: tuple[int, int]):
    """The convolution of x[... N] and filter[... N] on a circle of N = n₁ n₂ points: M⁻¹ (M x ∘ M filter), M a Monarch matrix.

    M is the Fourier transform, so M⁻¹ z is the complex conjugate of M times that of z, divided by N.
    """
    pair = factors.dft(*sizes)
    (a, b), (c, d) = transform(x, *pair), transform(filter, *pair)
    real, imaginary = transform(stack([a * c - b * d, a * d + b * c], axis=0), *pair)
    return (real[0] + imaginary[1]) * (1 / x.shape[-1])


@monarch.validate
def _(x, first):
    blocks, _, columns = first.shape
    if x.shape[-1] != blocks * columns:
        raise ShapeError(f"monarch: x {x.shape} has {x.shape[-1]} channels, first {first.shape} has {blocks} blocks that read "
                         f"{columns} each; allowed: {blocks * columns} channels")


@monarch.inputs
def _(draw):
    blocks, rows, columns, outputs = (draw.size(1, 3, letter) for letter in "QAPC")
    return (draw.floats(*draw.shape(0, 2, 3), columns * blocks), draw.floats(blocks, rows, columns),
            draw.floats(rows, outputs, blocks)), {}


# -- laws --------------------------------------------------------------------------------------------------------------
def stride(rows: int, columns: int) -> np.ndarray:
    """The permutation matrix P that takes index c + columns · r to r + rows · c: it transposes a table of rows × columns."""
    return np.eye(rows * columns)[np.arange(rows * columns).reshape(rows, columns).T.ravel()]


def complex_product(case, x, first, second) -> np.ndarray:
    """M x of complex x and complex factors, by calls with real numbers: M x is linear in each of the three."""
    total = 0
    for power, u in enumerate((x.real, x.imag)):
        for more, v in enumerate((first.real, first.imag)):
            for most, w in enumerate((second.real, second.imag)):
                arrays = (np.ascontiguousarray(part, case.x.dtype) for part in (u, v, w))
                total = total + 1j ** (power + more + most) * case(**dict(zip(("x", "first", "second"), arrays, strict=True))).y
    return total


def assert_near(actual, expected, dtype, message: str, terms: float = 64) -> None:
    """``assert_close`` of complex numbers, with the tolerance of a real ``dtype``."""
    both = (np.stack([x.real, x.imag]) for x in (np.asarray(actual, complex), np.asarray(expected, complex)))
    one, other = both
    assert_close(one.astype(dtype), other, message, terms)


@law(monarch, "M = Π L Π R Π, with L and R block-diagonal")
def _(case, draw):
    (blocks, rows, columns), outputs = case.first.shape, case.second.shape[1]
    dense = (stride(rows, outputs) @ block_diag(*case.second) @ stride(blocks, rows) @ block_diag(*case.first)
             @ stride(columns, blocks))
    assert_close(case().y, case.x @ dense.T, "M is not Π L Π R Π", terms=64)


@law(monarch, "the transpose is a Monarch matrix with the factors in the other order")
def _(case, draw):
    (blocks, rows, columns), outputs = case.first.shape, case.second.shape[1]
    first, second = map(np.ascontiguousarray, factors.transposed(case.first, case.second))
    eyes = [np.eye(n, dtype=case.x.dtype) for n in (columns * blocks, outputs * rows)]
    assert_close(case(x=eyes[1], first=first, second=second).y, case(x=eyes[0]).y.T, "Mᵀ is another matrix")


@law(monarch, "the projection finds the factors of a Monarch matrix")
def _(case, draw):
    (blocks, rows, columns), outputs = case.first.shape, case.second.shape[1]
    whole = case(x=np.eye(case.x.shape[-1], dtype=case.x.dtype)).y  # Mᵀ
    first, second = factors.nearest(whole.T, (columns, blocks), (rows, outputs))
    assert_close(case(first=first, second=second).y, case().y, "the projection changes a Monarch matrix", terms=256)


@becomes(monarch, "Fourier transform", "the blocks are its factors")
def _(case, draw):
    n1, n2 = draw.integer(1, 4), draw.integer(1, 4)
    x = draw.floats(2, n1 * n2) + 1j * draw.floats(2, n1 * n2)
    assert_near(complex_product(case, x, *factors.dft(n1, n2)), np.fft.fft(x), case.x.dtype, "M is not the Fourier transform")


def convolution(case, x, filter, first, second) -> np.ndarray:
    """M⁻¹ (M filter ∘ M x): the product of two polynomials by their values."""
    values = [complex_product(case, u, first, second) for u in (x, filter)]
    return complex_product(case, values[0] * values[1], *factors.inverse(first, second))


def check_causality(case, draw, bounded: bool) -> None:
    """Output t of a product of polynomials does not depend on inputs after t, with learnable coefficients."""
    n1, n2 = 2 * draw.integer(1, 2), draw.integer(1, 3)
    half = n1 * n2 // 2
    low, high = factors.triangular(draw.floats(n2, n2, low=-0.3, high=0.3), draw.floats(n2, n1, n1, low=-0.3, high=0.3),
                                   bounded)
    first, second = factors.polynomials(low, high)
    x, filter = np.zeros((2, 2, n1 * n2))
    x[:, :half], filter[:, :half] = draw.floats(2, half, low=-1, high=1), draw.floats(half, low=-1, high=1)
    cut = draw.integer(0, half - 1)
    x[1, :cut] = x[0, :cut]
    y = convolution(case, x, filter, first, second)
    assert_near(y.imag, np.zeros_like(y.imag), case.x.dtype, "a product of real polynomials is complex", terms=1e8)
    assert_near(y[1, :cut], y[0, :cut], case.x.dtype, "an output depends on later inputs", terms=4096)


@law(monarch, "a bounded product of polynomials is causal")
def _(case, draw):
    check_causality(case, draw, bounded=True)


@becomes(monarch, "convolution", "spectra are multiplied")
def _(case, draw):
    n1, n2 = draw.integer(1, 3), draw.integer(1, 3)
    x, filter = draw.floats(2, n1 * n2), draw.floats(1, n1 * n2)
    expected = np.fft.ifft(np.fft.fft(x) * np.fft.fft(filter))
    assert_near(convolution(case, x, filter, *factors.dft(n1, n2)), expected, case.x.dtype, "not a convolution")
