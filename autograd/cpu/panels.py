"""Matrices in panels, for kernels that multiply small ones: tiles of attention, chunks of recurrences.

A *panel* is a block of rows with exactly 32 numbers each; a matrix is [columns / 32, rows, 32] in one flat array, so that
every inner loop runs over 32 lanes and becomes vector instructions. `pitch` is the number of rows of a panel.
"""

import numpy as np
from numba import types
from numba.extending import overload

from . import gemm
from .compile import FLAGS, INLINED, inline, inner
from .gemm import ROWS, tile
from .vectors import BYTES, copy_rows

LANES = 32  # numbers in a panel's row: two 512-bit vectors of float32
TILES = gemm.AVAILABLE

# Unsigned indices: Numba lets a signed one count from the end when negative, a test that keeps loops from vectorising.
U = np.uintp
U1, U2, U3, U4, L1, L2, L3 = U(1), U(2), U(3), U(4), U(LANES), U(2 * LANES), U(3 * LANES)


@inline
def padded(n, step):
    """The next multiple of a step."""
    return (n + step - 1) // step * step


def accumulate(out, o, a, x, row, term, b, c, rows, terms):
    """out[o + 32 r + e] += sum over t < terms of a[x + row r + term t] * b[c + 32 t + e], for r < rows and e < 32.

    `rows` is a multiple of 8 and `terms` of 4.
    """
    raise TypeError("for use inside kernels")


@overload(accumulate, jit_options={**FLAGS, **INLINED})
def _(out, o, a, x, row, term, b, c, rows, terms):
    return _accumulate_tiles if TILES and out.dtype == types.float32 else _accumulate_loops


def _accumulate_tiles(out, o, a, x, row, term, b, c, rows, terms):
    """In tiles of two vectors that stay in registers: 8 rows of 32 numbers, or 4 rows of half as many."""
    to, left, right = out.ctypes.data + 4 * o, a.ctypes.data + 4 * x, b.ctypes.data + 4 * c
    for r in range(0, rows, ROWS):
        for e in range(0, LANES, 2 * gemm.LANES):
            at = to + 4 * (LANES * r + e)
            tile(2, terms, left + 4 * row * r, 4 * row, 4 * term, right + 4 * e, 4 * LANES, at, 4 * LANES, at, 4 * LANES)


def _accumulate_loops(out, o, a, x, row, term, b, c, rows, terms):
    """Four rows and four terms at a time: a vector of `b` then serves four rows, and a vector of `out` takes four products
    between load and store.
    """
    row, term = U(row), U(term)
    for r in range(U(0), U(rows), U4):
        for t in range(U(0), U(terms), U4):
            i, j, k = U(o) + r * L1, U(x) + r * row + t * term, U(c) + t * L1
            w00, w01, w02, w03 = a[j], a[j + term], a[j + U2 * term], a[j + U3 * term]
            j += row
            w10, w11, w12, w13 = a[j], a[j + term], a[j + U2 * term], a[j + U3 * term]
            j += row
            w20, w21, w22, w23 = a[j], a[j + term], a[j + U2 * term], a[j + U3 * term]
            j += row
            w30, w31, w32, w33 = a[j], a[j + term], a[j + U2 * term], a[j + U3 * term]
            for e in range(L1):
                b0, b1, b2, b3 = b[k + e], b[k + e + L1], b[k + e + L2], b[k + e + L3]
                s0 = out[i + e] + w00 * b0 + w01 * b1 + w02 * b2 + w03 * b3
                s1 = out[i + e + L1] + w10 * b0 + w11 * b1 + w12 * b2 + w13 * b3
                s2 = out[i + e + L2] + w20 * b0 + w21 * b1 + w22 * b2 + w23 * b3
                s3 = out[i + e + L3] + w30 * b0 + w31 * b1 + w32 * b2 + w33 * b3
                out[i + e] = s0
                out[i + e + L1] = s1
                out[i + e + L2] = s2
                out[i + e + L3] = s3


@inner
def copy(out, o, row, a, i, step, rows, columns, scale):
    """out[o + row r + c] = scale * a[i + step r + c], for r < rows and c < columns <= 32."""
    lanes = BYTES // out.itemsize
    whole = columns // lanes * lanes
    for c in range(0, whole, lanes):
        copy_rows(out, o + c, row, a, i + c, step, rows)
    for r in range(rows):
        for c in range(whole, columns):
            out[o + r * row + c] = a[i + r * step + c]
    if scale != 1:
        for r in range(rows):
            for c in range(columns):
                out[o + r * row + c] *= scale


@inner
def load(panels, pitch, x, b, h, t, rows, width, scale):
    """Copy `rows` rows of a matrix [B H T d], from position t of head h of sequence b on, times `scale`, into panels of
    `pitch` rows, with zeros in the rows and columns beyond: what was there before may be NaN. x is what `flat` gives.
    """
    a, (by_sequence, by_head, by_row) = x
    start = b * by_sequence + h * by_head + t * by_row
    for left in range(0, width, LANES):
        if width - left < LANES:
            panels[left * pitch : left * pitch + rows * LANES] = 0
        copy(panels, left * pitch, LANES, a, start + left, by_row, rows, min(LANES, width - left), scale)
        panels[left * pitch + rows * LANES : (left + LANES) * pitch] = 0


@inner
def store(x, b, h, t, panels, pitch, rows, width, scale):
    """Copy panels of `pitch` rows, times `scale`, into `rows` rows of a matrix [B H T d] as `load` reads it."""
    out, (by_sequence, by_head, by_row) = x
    start = b * by_sequence + h * by_head + t * by_row
    for left in range(0, width, LANES):
        copy(out, start + left, by_row, panels, left * pitch, LANES, rows, min(LANES, width - left), scale)


@inner
def finite(panels):
    """Whether all numbers are finite."""
    zero = panels.dtype.type(0)
    check = zero
    for i in range(panels.size):
        check += panels[i] * zero
    return check == 0


@inner
def transpose(out, panels, spare):
    """Panels of 32 rows, [width / 32, 32, 32], to their transpose [width, 32].

    The index of an element in its panel is 5 bits of row and 5 of column. Interleaving the four quarters of a panel
    rotates the bits of the index by two, interleaving its halves by one; 2 + 2 + 1 swap row and column. Unlike 1024
    single moves, that becomes vector shuffles.
    """
    quarter, half = U(LANES * LANES // 4), U(LANES * LANES // 2)
    for o in range(U(0), U(panels.size), U(LANES * LANES)):
        for i in range(quarter):
            j = o + i
            x0, x1, x2, x3 = panels[j], panels[j + quarter], panels[j + half], panels[j + half + quarter]
            j = o + U4 * i
            out[j], out[j + U1], out[j + U2], out[j + U3] = x0, x1, x2, x3
        for i in range(quarter):
            j = o + i
            x0, x1, x2, x3 = out[j], out[j + quarter], out[j + half], out[j + half + quarter]
            j = U4 * i
            spare[j], spare[j + U1], spare[j + U2], spare[j + U3] = x0, x1, x2, x3
        for i in range(half):
            x0, x1 = spare[i], spare[i + half]
            j = o + U2 * i
            out[j], out[j + U1] = x0, x1


@inline
def _weigh(out, o, a, x, row, term, b, c, rows, terms, sound):
    """`accumulate` for weights `a`. Unless `b` is `sound`, all finite, a zero hides its row: 0 * NaN and 0 * inf count as 0."""
    if sound:
        accumulate(out, o, a, x, row, term, b, c, rows, terms)
        return
    for r in range(rows):
        for t in range(terms):
            weight = a[x + row * r + term * t]
            if weight != 0:
                for e in range(LANES):
                    out[o + LANES * r + e] += weight * b[c + LANES * t + e]


@inner
def add_product(out, out_pitch, a, a_pitch, b, b_pitch, rows, depth, columns, sound):
    """out[r, c] += sum over t < depth of a[r, t] * b[t, c], for r < rows and c < columns; all three are panels.

    `rows` is a multiple of 8. Unless all of `b` is `sound`, finite, a zero of `a` hides what it is multiplied with, so that
    0 * NaN counts as 0. Panels from their row n on are panels[32 n :], of the same pitch.
    """
    for right in range(0, columns, LANES):
        for left in range(0, depth, LANES):
            terms = padded(min(LANES, depth - left), 4)
            _weigh(out, right * out_pitch, a, left * a_pitch, LANES, 1, b, right * b_pitch + left * LANES, rows, terms, sound)


@inner
def add_adjoint_product(out, out_pitch, a, a_pitch, b, b_pitch, rows, depth, columns, sound):
    """out[r, c] += sum over t < depth of a[t, r] * b[t, c], as `add_product` with `a` transposed and any number of rows."""
    for right in range(0, columns, LANES):
        for down in range(0, rows, LANES):
            at, some = right * out_pitch + down * LANES, padded(min(LANES, rows - down), 8)
            _weigh(out, at, a, down * a_pitch, 1, LANES, b, right * b_pitch, some, padded(depth, 4), sound)


@inner
def product(out, a, pitch, b, rows, width):
    """out[r, e] = sum over c < width of a[r, c] * b[c, e], for r < rows and e < 32; `a` is in panels."""
    out[: rows * LANES] = 0
    add_product(out, rows, a, pitch, b, width, rows, width, LANES, True)


@inner
def scale_rows(panels, pitch, rows, width, factors):
    """panels[r, c] *= factors[r]; up to 3 rows more than `rows` change too."""
    for left in range(U(0), U(width), L1):
        for r in range(U(0), U(rows), U4):
            i, f0, f1, f2, f3 = left * U(pitch) + r * L1, factors[r], factors[r + U1], factors[r + U2], factors[r + U3]
            for e in range(L1):
                x0, x1, x2, x3 = panels[i + e], panels[i + e + L1], panels[i + e + L2], panels[i + e + L3]
                panels[i + e], panels[i + e + L1], panels[i + e + L2], panels[i + e + L3] = x0 * f0, x1 * f1, x2 * f2, x3 * f3


@inner
def add_rows(out, panel, rows, factors):
    """out[e] += sum of factors[r] * panel[r, e], for r < rows and e < 32; rows up to a multiple of 4 are zero."""
    for r in range(U(0), U(rows), U4):
        i, f0, f1, f2, f3 = r * L1, factors[r], factors[r + U1], factors[r + U2], factors[r + U3]
        for e in range(L1):
            x0, x1, x2, x3 = panel[i + e], panel[i + e + L1], panel[i + e + L2], panel[i + e + L3]
            out[e] += f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3


@inner
def dot(a, b):
    """The sum of all a[i] * b[i]."""
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@inner
def dot_rows(out, a, b, pitch, rows, width):
    """out[r] = sum over c < width of a[r, c] * b[r, c], for r < rows; both are panels of `pitch` rows."""
    for r in range(rows):
        out[r] = 0
        for left in range(0, width, LANES):
            at = left * pitch + r * LANES
            out[r] += dot(a[at : at + LANES], b[at : at + LANES])


@inner
def dot_columns(out, a, b, width):
    """out[e] = sum over c < width of a[c, e] * b[c, e], for e < 32, in the order of `product`: where the numbers are the same,
    both sums have the same bits.
    """
    out[:] = 0
    for c in range(width):
        left, right = a[c * LANES : (c + 1) * LANES], b[c * LANES : (c + 1) * LANES]
        for e in range(LANES):
            out[e] += left[e] * right[e]


def by_position(B, H, T, d, dtype, make=np.empty):
    """A new [B H T d] array with the heads of a position side by side, so that merging them is a reshape."""
    return make((B, T, H, d), dtype).transpose(0, 2, 1, 3)


def flat(x):
    """The memory of a [B H T d] array from its first element on, as one flat array that may be longer, and its strides over
    B, H and T: what `load` and `store` take.

    Numba compiles a version for each memory layout it meets; this way there is only one, and it reads the views of a
    [B T 3 H d] array in place.
    """
    if not x.size:
        return np.zeros(0, x.dtype), (0, 0, 0)
    step = x.itemsize
    if not x.flags.aligned or x.strides[3] != step or min(x.strides) < 0 or any([s % step for s in x.strides]):
        x = np.array(x, order="C")  # reversed, broadcast and other rare layouts
    b, h, t, _ = x.strides
    strides = b // step, h // step, t // step
    owner = x if x.base is None else x.base
    if type(owner) is np.ndarray and owner.flags.c_contiguous and owner.dtype == x.dtype:
        if x.size == owner.size and x.swapaxes(1, 2).flags.c_contiguous:  # all of it: where it begins takes longest to find out
            return owner.reshape(-1), strides
        start = (x.__array_interface__["data"][0] - owner.__array_interface__["data"][0]) // step
        return owner.reshape(-1)[start:], strides  # five times faster than as_strided
    size = 1 + sum([(n - 1) * s for n, s in zip(x.shape, (*strides, 1), strict=True)])
    return np.lib.stride_tricks.as_strided(x, (size,), (step,)), strides
