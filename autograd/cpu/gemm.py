"""Matrix products of float32 on one core, for the shapes of a training step: out[m, n] = sum over k of a[m, k] * b[k, n].

After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (doi 10.1145/1356052.1356053).

The result is computed in *tiles* that stay in registers while k runs. With 16 lanes a vector, a tile is 8 rows by 48 columns
and takes 24 of 32 registers; three more hold a row of `b`, which one number of `a` after the other meets:

                       b[k, 0:16]   b[k, 16:32]   b[k, 32:48]
        a[0, k]  *  (     tile          tile          tile     )  +=
        ...                                                            24 multiply-adds for 11 loads
        a[7, k]  *  (     tile          tile          tile     )  +=

A tile reads `b` from a *panel*, its 48 columns with nothing in between, so a block of `b` is first copied into panels; where
`b` is a transposed view, the copy transposes 16 x 16 numbers at a time inside registers. `a` is read in place if its rows
are contiguous; if its columns are, it is first copied into *strips* of 8 rows. Every copy serves many tiles.

Nothing outside the matrices is read or written. A panel or strip that crosses an edge is filled up with zeros, and a tile
that does is computed in scratch memory, of which the part inside is copied. k is never filled up: 0 * inf stays NaN. The
order of every sum depends on the shapes alone, so results are the same each time and in each thread.

Three routines say which numbers are one vector, because Numba makes nothing as good of loops: a tile, the transposition of a
block, and a copy of a few numbers. Everything else is arithmetic on addresses: sizes count numbers, strides count bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from numba import types

from . import team
from .choice import Choice, choose, kept
from .compile import BITS, WIDE_VECTORS, cpu_kernel, inline, inner, unavailable
from .vectors import repeat, vectorized

AVAILABLE = not unavailable() and BITS >= 256
LANES = 16 if WIDE_VECTORS else 8  # float32 numbers a vector
ROWS, WIDE = LANES // 2, 3 * LANES  # a tile: 8 x 48 in 24 of 32 registers, or 4 x 24 in 12 of 16
CUT = 64  # multiply-adds that take as long as one number of an elementwise kernel
DEPTH, COLUMNS, BAND = 512, 384, 128  # of k, columns of `b` and rows of `a`, so many are copied at a time

# The scratch memory of a thread, in bytes: zeros, a tile, panels of `b`, strips of `a`; 64 are for alignment.
TILE, PANELS = 4 * WIDE, 4 * WIDE * (1 + ROWS)
STRIPS = PANELS + 4 * DEPTH * COLUMNS
SCRATCH = STRIPS + 4 * DEPTH * BAND + 64

F4 = np.dtype(np.float32)
NONE = np.empty(0, F4)
_threads = threading.local()


@vectorized
def _move(count, to, source):
    """Copy `count` numbers, a constant, as one vector."""
    to.store(source.load(count))


def transposed(rows: list) -> list:
    """The columns of LANES x LANES numbers: exchange halves of rows half a block apart, then quarters, ..."""
    rows = list(rows)
    for half in [LANES >> step for step in range(1, LANES.bit_length())]:
        low = [LANES + c - half if c & half else c for c in range(LANES)]  # of a pair of rows end to end
        high = [LANES + c if c & half else c + half for c in range(LANES)]
        for r in (r for r in range(LANES) if not r & half):
            one, other = rows[r], rows[r + half]
            rows[r], rows[r + half] = one.shuffled(other, low), one.shuffled(other, high)
    return rows


@vectorized
def _transpose(to, to_row, source, source_row):
    """to[c, r] = source[r, c] for LANES x LANES numbers."""
    for c, row in enumerate(transposed([(source + source_row * r).load(LANES) for r in range(LANES)])):
        (to + to_row * c).store(row)


@vectorized
def tile(vectors, depth, a, a_row, a_column, b, b_row, out, out_row, start, start_row):
    """out[r, c] = start[r, c] + sum over k < depth of a[r, k] * b[k, c], for ROWS x (vectors * LANES) numbers."""

    def body(_, carried):
        a, b, *sums = carried
        row = [(b + 4 * LANES * v).load(LANES) for v in range(vectors)]
        numbers = [(a + a_row * r).spread(LANES) for r in range(ROWS)]
        products = [number * x for number in numbers for x in row]
        return [a + a_column, b + b_row, *(x + y for x, y in zip(sums, products, strict=True))]

    places = [(r, 4 * LANES * v) for r in range(ROWS) for v in range(vectors)]
    zero = b.load(LANES).zeros()
    _, _, *sums = repeat(depth, [a, b, *[zero] * len(places)], body, some=True)
    for (r, at), total in zip(places, sums, strict=True):
        (out + out_row * r + at).store((start + start_row * r + at).load(LANES) + total)


@inline
def _copy(rows, columns, to, to_row, source, source_row, source_column):
    """to[r, c] = source[r, c], number by number: for what is left over at the edges."""
    for r in range(rows):
        for c in range(columns):
            _move(1, to + r * to_row + 4 * c, source + r * source_row + c * source_column)


@inline
def tile_vectors(columns):
    """How many vectors the next panel has if so many columns are left: whole ones first, then what is left in one.

    Four are two and two, since a panel of one has almost as many loads as multiply-adds.
    """
    whole = columns // LANES
    return 2 if whole == 4 else min(3, max(1, whole))


@inner
def _panel(to, width, depth, columns, b, b_row, b_column, zeros):
    """Copy b[:depth, :columns] to a panel [depth, width], with zeros beyond; then the panel is one vector wide."""
    whole, deep = columns // LANES * LANES, depth // LANES * LANES
    if columns < width:
        for k in range(depth):
            _move(LANES, to + 4 * k * width, zeros)
    for c in range(0, whole if b_column == 4 else 0, LANES):
        for k in range(depth):
            _move(LANES, to + 4 * (k * width + c), b + k * b_row + 4 * c)
    for c in range(0, whole if b_column != 4 else 0, LANES):
        for k in range(0, deep, LANES):
            _transpose(to + 4 * (k * width + c), 4 * width, b + 4 * k + c * b_column, b_column)
        _copy(depth - deep, LANES, to + 4 * (deep * width + c), 4 * width, b + 4 * deep + c * b_column, b_row, b_column)
    _copy(depth, columns - whole, to + 4 * whole, 4 * width, b + whole * b_column, b_row, b_column)


@inner
def _strips(to, depth, rows, a, a_row, a_column, zeros):
    """Copy a[:rows, :depth] to strips [rows / ROWS, depth, ROWS], with zeros in the rows beyond."""
    r = 0
    while r < rows:
        strips = min(4, (rows - r) // ROWS) if a_row == 4 else 0  # side by side, to read whole cache lines
        for k in range(depth):
            at, source = to + 4 * (r * depth + k * ROWS), a + r * a_row + k * a_column
            for strip in range(strips):
                _move(ROWS, at + 4 * strip * depth * ROWS, source + 4 * strip * ROWS)
            if strips == 0:
                _move(ROWS, at, zeros)
                _copy(1, min(ROWS, rows - r), at, 0, source, 0, a_row)
        r += max(1, strips) * ROWS


def _multiply(a, b, out, bias, accumulate, scratch):
    """out = a @ b, plus bias (if not empty) or plus out. If the layouts do not allow it, nothing happens: returns False."""
    M, K, N = a.shape[0], a.shape[1], b.shape[1]  # at least 1
    (a_row, a_column), (b_row, b_column), (out_row, out_column) = a.strides, b.strides, out.strides
    a_start, b_start, out_start = np.int64(a.ctypes.data), np.int64(b.ctypes.data), np.int64(out.ctypes.data)
    a_end = a_start + (M - 1) * a_row + (K - 1) * a_column + 4
    b_end = b_start + (K - 1) * b_row + (N - 1) * b_column + 4
    out_end = out_start + (M - 1) * out_row + 4 * N
    apart = (out_end <= a_start or a_end <= out_start) and (out_end <= b_start or b_end <= out_start)
    straight = 4 in (a_row, a_column) and 4 in (b_row, b_column) and out_column == 4
    forward = min(a_row, a_column, b_row, b_column, out_row) >= 0  # else they do not end there
    if not (apart and straight and forward and (bias.size == 0 or bias.strides[0] == 4)):
        return False
    zeros = (np.int64(scratch.ctypes.data) + 63) // 64 * 64  # so that no vector of a panel straddles two cache lines
    corner, panels, strips = zeros + TILE, zeros + PANELS, zeros + STRIPS
    start, start_row, start_column = zeros, 0, 0
    if accumulate:
        start, start_row, start_column = out_start, out_row, 4
    elif bias.size:
        start, start_column = np.int64(bias.ctypes.data), 4
    for k in range(0, K, DEPTH):
        depth = min(DEPTH, K - k)
        if k > 0:
            start, start_row, start_column = out_start, out_row, 4
        for n0 in range(0, N, COLUMNS):
            n1, n = min(N, n0 + COLUMNS), n0
            while n < n1:
                width = tile_vectors(n1 - n) * LANES
                to, source = panels + 4 * (n - n0) * depth, b_start + k * b_row + n * b_column
                _panel(to, width, depth, min(width, n1 - n), source, b_row, b_column, zeros)
                n += width
            for m0 in range(0, M, BAND):
                m1 = min(M, m0 + BAND)
                first = m0 if a_column != 4 else m1 - (m1 - m0) % ROWS  # of the rows that cannot be read in place
                to, source = strips + 4 * (first - m0) * depth, a_start + first * a_row + k * a_column
                _strips(to, depth, m1 - first, source, a_row, a_column, zeros)
                n = n0
                while n < n1:
                    vectors = tile_vectors(n1 - n)
                    columns, y = min(vectors * LANES, n1 - n), panels + 4 * (n - n0) * depth
                    for m in range(m0, m1, ROWS):
                        rows = min(ROWS, m1 - m)
                        x, x_row, x_column = a_start + m * a_row + k * a_column, a_row, a_column
                        if m >= first:
                            x, x_row, x_column = strips + 4 * (m - m0) * depth, 4, 4 * ROWS
                        to, to_row = out_start + m * out_row + 4 * n, out_row
                        add, add_row = start + m * start_row + n * start_column, start_row
                        edge = rows < ROWS or columns < vectors * LANES
                        if edge:
                            _copy(rows, columns, corner, 4 * WIDE, add, add_row, start_column)
                            to, to_row, add, add_row = corner, 4 * WIDE, corner, 4 * WIDE
                        if vectors == 3:
                            tile(3, depth, x, x_row, x_column, y, 12 * LANES, to, to_row, add, add_row)
                        elif vectors == 2:
                            tile(2, depth, x, x_row, x_column, y, 8 * LANES, to, to_row, add, add_row)
                        else:
                            tile(1, depth, x, x_row, x_column, y, 4 * LANES, to, to_row, add, add_row)
                        if edge:
                            _copy(rows, columns, out_start + m * out_row + 4 * n, out_row, corner, 4 * WIDE, 4)
                    n += vectors * LANES
    return True


def compiled(multiply: Callable, result: types.Type, *more: types.Type) -> Callable:
    """A kernel in one version: any array passes for one of no particular layout or alignment that is only read."""
    matrix, row = (types.Array(types.float32, ndim, "A", readonly=True, aligned=False) for ndim in (2, 1))
    kernel = cpu_kernel(multiply)
    kernel.compile(result(matrix, matrix, matrix, row, types.boolean, row, *more))
    kernel.disable_compile()
    return kernel


@cache
def _compiled() -> Callable:
    return compiled(_multiply, types.boolean)


def prepare() -> None:
    """Load the kernel and choose between it and BLAS now, rather than at the first product."""
    if AVAILABLE:
        _compiled()
        chosen()


KERNEL, BLAS = "the kernel", "BLAS"


@cache
def chosen() -> Choice:
    """Who computes the products of a training step on this processor, and why; measured at the first use, see choice.py."""
    return choose("products", _ways, KERNEL) if AVAILABLE else Choice(BLAS, "the kernel needs AVX2 and FMA, and a compiler")


def explained() -> str:
    """Who computes products and why, as a sentence; without a measurement, if none was written down yet."""
    choice = kept("products") if AVAILABLE else chosen()
    if choice is None:
        return f"the first training chooses between our kernel, in tiles of {ROWS} x {WIDE}, and BLAS"
    computes = f"our kernel, in tiles of {ROWS} x {WIDE}; BLAS for small ones and in float64" if choice.way == KERNEL else BLAS
    return f"{computes} ({choice.why})"


def linear_layer() -> list[tuple]:
    """The three products of a linear layer, for the tokens of a micro-batch, to measure: factors and where each goes."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(shape, F4) for shape in ((512, 256), (384, 256), (512, 384)))  # [M K], [N K], [M N]
    return [(x, w.T, np.empty_like(g)), (g, w, np.empty_like(x)), (g.T, x, np.empty_like(w))]


def _ways() -> dict[str, list[Callable]]:
    calls, scratch = linear_layer(), np.zeros(SCRATCH // 4, F4)
    return {KERNEL: [partial(_compiled(), *call, NONE, False, scratch) for call in calls],
            BLAS: [partial(np.matmul, *call) for call in calls]}


def suits(M: int, K: int, N: int) -> bool:
    """Whether the kernel here, rather than NumPy's BLAS, computes products of these sizes on this processor.

    Small and thin products are not worth the copies, and up to 10^6 multiplications OpenBLAS does without any.
    """
    return M >= 16 and N >= 32 and M * K * N > 10**6 and chosen().way == KERNEL


def target(a, b, out, accumulate, bias):
    """Where a product goes: `out`, or a new array; ValueError for shapes that do not fit."""
    (M, K), N = a.shape, b.shape[1]
    if out is None:
        if accumulate:
            raise ValueError("product: accumulate=True needs an out to add to")
        out = np.empty((M, N), a.dtype if a.dtype == b.dtype else np.result_type(a, b))
    if b.shape != (K, N) or out.shape != (M, N) or (bias is not None and bias.shape != (N,)):
        shapes = [x.shape for x in (a, b, out, bias) if x is not None]
        raise ValueError(f"product: needs a [M, K], b [K, N], out [M, N] and bias [N], got {shapes}")
    return out


def product(a, b, out=None, accumulate=False, *, bias=None):
    """a[M, K] @ b[K, N] + bias[N] into `out`, or added to `out`; returns `out`, a new array if there is none.

    Any dtype and any layout will do, and calls in several threads at once. Fast are float32 with contiguous rows or columns,
    views into wider arrays included, into an `out` with contiguous rows, apart from `a` and `b`; NumPy does the rest.
    """
    return in_parts(_product, a, b, target(a, b, out, accumulate, bias), accumulate, bias)


def in_parts(compute: Callable, a, b, out, accumulate, bias):
    """A product by `compute`, which takes the same arguments, in parts where a team takes some of them."""
    (M, K), N = a.shape, b.shape[1]
    deep = DEPTH if K < 8 * DEPTH else 2 * DEPTH  # few parts of a sum would leave threads without one
    sizes, cut = ((M, DEPTH), (K, deep), (N, 2 * WIDE)), 1 if K >= 4 * max(M, N) else 0 if M >= N else 2
    parts = team.spans(*sizes[cut], M * K * N / CUT, sums=cut == 1)
    if len(parts) == 1 or np.may_share_memory(out, a) or np.may_share_memory(out, b):
        return compute(a, b, out, accumulate, bias)
    if cut == 1:  # with rows or columns, each part would pack the whole of the other matrix
        sums = np.empty((len(parts), *out.shape), out.dtype)
        team.each(lambda i, start, stop: compute(a[:, start:stop], b[start:stop], sums[i], False, None if i else bias), parts)
        total = team.column_sums(sums.reshape(len(parts), M * N)).reshape(M, N)
        np.add(out, total, out=out) if accumulate else np.copyto(out, total)
    elif cut == 0:
        team.each(lambda i, start, stop: compute(a[start:stop], b, out[start:stop], accumulate, bias), parts)
    else:
        team.each(lambda i, start, stop: compute(a, b[:, start:stop], out[:, start:stop], accumulate,
                                                 None if bias is None else bias[start:stop]), parts)
    return out


def _product(a, b, out, accumulate, bias):
    """The same for sizes that agree, in this thread."""
    M, K, N = *a.shape, b.shape[1]
    early = NONE if bias is None or accumulate else bias
    if suits(M, K, N) and a.dtype == b.dtype == out.dtype == early.dtype == F4 and out.flags.writeable:
        if not hasattr(_threads, "scratch"):
            _threads.scratch = np.zeros(SCRATCH // 4, F4)
        if _compiled()(a, b, out, early, bool(accumulate), _threads.scratch):
            return out if bias is early or bias is None else np.add(out, bias, out=out)
    return _numpy(a, b, out, accumulate, bias)


def _numpy(a, b, out, accumulate, bias):
    if accumulate:
        out += a @ b
    else:
        np.matmul(a, b, out=out)
    return out if bias is None else np.add(out, bias, out=out)
