"""Matrix products in bfloat16 on one core: factors are rounded to bfloat16, to the nearest and then to even, sums are float32.

A bfloat16 is the upper half of a float32: the same range, 8 bits of significand. AVX512-BF16 has an instruction that takes
pairs of them: lane by lane, s = (s + a[1] b[1]) + a[0] b[0]. Products of two are exact in float32, and each of both sums is
rounded to the nearest. Where it takes as long as one multiply-add of float32, as on AMD's processors, a product is done in half
the time. Numbers below 2^-126, where float32 becomes coarse, count as 0, as factors, products and sums
(Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, VDPBF16PS and VCVTNE2PS2BF16).

Intel's servers have AMX as well, which multiplies whole blocks of such pairs and adds in another order: amx.py. Which of both
computes is measured once (choice.py) and holds for all sizes, so that bits do not depend on how a product is cut.

With u = 2^-24, the sum of K products is as exact as any in float32: its error is at most K u / (1 - K u) times the sum of
their absolute values, plus 2^-126 for each sum that was too small. Beside it stands what rounding the factors changes, at most
2^-8 + 2^-18 of every product.

Blocks are copied and tiles kept in registers as in gemm.py. What a copy holds is *pairs*, 32 bits that take the place of one
number there: number 2 p + 1 along k in the upper half and number 2 p in the lower one. If k is odd, the last pair
is filled up with a zero on both sides.

    a, rows contiguous      lines [rows, pairs]           two vectors of a row are rounded to one of pairs
    a, columns contiguous   strips [rows / 16, pairs, 16]  row k and row k + 1 are rounded and interleaved
     ... for AMX            lines [rows, pairs]           and then transposed, 16 x 16 pairs in registers
    b, rows contiguous      panels [pairs, width]          as strips
    b, columns contiguous   panels [pairs, width]          as lines, 16 x 16 pairs transposed in registers

Loads and stores have a mask, so that nothing outside the matrices is read or written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types

from ..errors import DtypeError, KernelError
from . import amx, gemm
from .choice import Choice, choose, kept
from .compile import BITS, inline, inner, unavailable
from .gemm import F4, NONE, ROWS, WIDE, compiled, tile_vectors, transposed
from .vectors import FLOAT, LONG, Vector, repeat, vectorized

FEATURE = "+avx512bf16"  # as LLVM lists what it may compile for
LANES = 16  # pairs or sums a vector
DEPTH, COLUMNS, BAND = 512, 8 * WIDE, 64  # of k, columns of `b` and rows of `a`, so many are copied at a time
MANY = 1024  # columns of `b` in place of COLUMNS for AMX, whose processors have larger caches
PITCH = DEPTH // 2 + LANES  # pairs from one line of `a` to the next, so that eight lines do not share a set of the cache

# The scratch memory of a thread, in bytes: zeros, a block, panels of `b`, lines or strips of `a`, and room to write beyond.
CORNER = 4 * WIDE
PANELS = CORNER + 4 * amx.BLOCK**2
LEFT = PANELS + 4 * (DEPTH // 2 * max(COLUMNS, MANY) + LANES * WIDE)
SCRATCH = LEFT + 4 * (PITCH * (BAND + LANES)) + 64

INT, BIT = ir.IntType(32), ir.IntType(1)
FLOATS, INTS, SHORTS = ir.VectorType(FLOAT, 16), ir.VectorType(INT, 16), ir.VectorType(ir.IntType(16), 32)
MASK = ir.VectorType(BIT, 16)
INTERLEAVED = [16 * (i % 2) + i // 2 for i in range(32)]
_threads = threading.local()


@cache
def missing() -> str | None:
    """Why bfloat16 products cannot be computed here, or None."""
    if reason := unavailable():
        return reason
    if not llvm.get_host_cpu_features().get("avx512bf16"):
        return "this processor has no AVX512-BF16, as AMD's have from Zen 4 and Intel's servers from Cooper Lake on"
    if BITS < 512 or FEATURE not in (numba.config.CPU_FEATURES or FEATURE).split(","):
        return "NUMBA_CPU_FEATURES leaves out AVX512-BF16, which this processor has"
    return None


# -- instructions ------------------------------------------------------------------------------------------------------
def _call(builder, name: str, kind, *values):
    """Call an instruction that LLVM knows by a name. Factors are vectors of integers, which every version takes."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(kind, [value.type for value in values]), name)
    return builder.call(function, values)


def _mask(count, row=None):
    """The lanes below a count that may be negative or large; none of them if `row`, such a count as well, is not positive."""
    builder = count.builder
    if row is not None:
        some = builder.icmp_signed(">", row.value, LONG(0))
        count = type(count)(builder, builder.select(some, count.value, LONG(0)))
    above, below = builder.icmp_signed(">", count.value, LONG(LANES)), builder.icmp_signed("<", count.value, LONG(0))
    number = builder.select(above, LONG(LANES), builder.select(below, LONG(0), count.value))
    first = builder.insert_element(ir.Constant(INTS, ir.Undefined), builder.trunc(number, INT), LONG(0))
    every = builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(INTS, list(range(LANES))), every)


def _load(place, mask) -> Vector:
    """The numbers from an address on in the lanes of a mask, zeros in the others, whose memory is not touched."""
    builder, zeros = place.builder, ir.Constant(FLOATS, None)
    value = _call(builder, "llvm.masked.load.v16f32.p0", FLOATS, place._pointer(FLOATS), INT(4), mask, zeros)
    return Vector(builder, value)


def _store(place, vector, mask) -> None:
    builder = place.builder
    _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), vector.value, place._pointer(FLOATS), INT(4), mask)


def _rounded(low, high):
    """Both vectors in bfloat16, end to end."""
    return _call(low.builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", SHORTS, high.value, low.value)


def _pairs(builder, shorts) -> Vector:
    return Vector(builder, builder.bitcast(shorts, FLOATS))


def _dot(total, x, y) -> Vector:
    """(total + x[1] y[1]) + x[0] y[0] for the pairs of every lane."""
    builder = total.builder
    x, y = (builder.bitcast(pairs.value, INTS) for pairs in (x, y))
    return Vector(builder, _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total.value, x, y))


@vectorized
def _line(to, source, count):
    """A vector of pairs of up to 32 numbers that lie side by side."""
    to.store(_pairs(to.builder, _rounded(_load(source, _mask(count)), _load(source + 4 * LANES, _mask(count - LANES)))))


def _interleaved(source, step, count, depth) -> Vector:
    """Pairs of up to 16 numbers here and a step further on, of as many of both as there is depth; zeros beyond."""
    builder, places = source.builder, ir.Constant(ir.VectorType(INT, 32), INTERLEAVED)
    shorts = _rounded(_load(source, _mask(count, depth)), _load(source + step, _mask(count, depth - 1)))
    return _pairs(builder, builder.shuffle_vector(shorts, shorts, places))


@vectorized
def _interleave(to, source, step, count, depth):
    """A vector of pairs of up to 16 numbers here and a step further on."""
    to.store(_interleaved(source, step, count, depth))


@vectorized
def _turn(to, to_row, source, step, count, depth):
    """to[c, p] = the pair p of column c, for 16 x 16 pairs; `count` numbers of each of `depth` rows are read."""
    pairs = [_interleaved(source + step * k, step, count, depth - k) for k in range(0, 2 * LANES, 2)]
    for c, row in enumerate(transposed(pairs)):
        (to + to_row * c).store(row)


@vectorized
def _transpose(to, to_row, source, step, count, columns):
    """to[p, c] = the pair p of column c, for 16 x 16 pairs; `count` numbers of each of `columns` columns are read."""
    rows = []
    for c in range(LANES):
        low, high = _mask(count, columns - c), _mask(count - LANES, columns - c)
        start = source + step * c
        rows.append(_pairs(to.builder, _rounded(_load(start, low), _load(start + 4 * LANES, high))))
    for p, row in enumerate(transposed(rows)):
        (to + to_row * p).store(row)


def _expect(place) -> None:
    """Fetch the cache line of a place that will be written to."""
    _call(place.builder, "llvm.prefetch.p0", ir.VoidType(), place._pointer(FLOATS), INT(1), INT(3), INT(1))


@vectorized
def tile(vectors, pairs, a, a_row, a_pair, b, out, out_row, start, start_row, rows, columns):
    """out[r, c] = start[r, c] + sum over p < pairs of a[r, p] * b[p, c], for r < rows and c < columns of a whole tile."""

    def body(_, carried):
        a, b, *sums = carried
        row = [(b + 4 * LANES * v).load(LANES) for v in range(vectors)]
        left = [(a + a_row * r).spread(LANES) for r in range(ROWS)]
        factors = [(x, y) for x in left for y in row]
        return [a + a_pair, b + 4 * LANES * vectors, *(_dot(s, x, y) for s, (x, y) in zip(sums, factors, strict=True))]

    places = [(r, v) for r in range(ROWS) for v in range(vectors)]
    for r, v in places:
        _expect(out + out_row * r + 4 * LANES * v)
    zero = b.load(LANES).zeros()
    _, _, *sums = repeat(pairs, [a, b, *[zero] * len(places)], body, some=True)
    for (r, v), total in zip(places, sums, strict=True):
        mask, at = _mask(columns - LANES * v, rows - r), 4 * LANES * v
        _store(out + out_row * r + at, _load(start + start_row * r + at, mask) + total, mask)


# -- copies ------------------------------------------------------------------------------------------------------------
@inline
def _width(columns, tiles):
    """How many columns the next panel has if so many are left."""
    return amx.BLOCK if tiles else tile_vectors(columns) * LANES


@inner
def _panels(to, pairs, depth, columns, b, b_row, b_column, tiles):
    """Copy b[:depth, :columns] to panels [pairs, width], one after the other, with zeros beyond."""
    n = 0
    while n < columns:
        width, left = _width(columns - n, tiles), columns - n
        for c in range(0, width, LANES):
            source = b + (n + c) * b_column
            if b_column == 4:
                for k in range(0, 2 * pairs, 2):
                    _interleave(to + 4 * (k // 2 * width + c), source + k * b_row, b_row, left - c, depth - k)
            else:
                for k in range(0, depth, 2 * LANES):
                    _transpose(to + 4 * (k // 2 * width + c), 4 * width, source + 4 * k, b_column, depth - k, left - c)
        to += 4 * width * pairs
        n += width


@inner
def _left(to, pairs, depth, rows, a, a_row, a_column, tiles):
    """Copy a[:rows, :depth] to lines if its rows are contiguous or for AMX, otherwise to strips."""
    if a_column == 4:
        for r in range(rows):
            for k in range(0, depth, 2 * LANES):
                _line(to + 4 * (r * PITCH + k // 2), a + r * a_row + 4 * k, depth - k)
        return
    if tiles:
        for k in range(0, depth, 2 * LANES):
            for r in range(0, rows, LANES):
                _turn(to + 4 * (r * PITCH + k // 2), 4 * PITCH, a + 4 * r + k * a_column, a_column, rows - r, depth - k)
        return
    for r in range(0, rows, LANES):
        for k in range(0, depth, 2):
            _interleave(to + 4 * (r * pairs + k // 2 * LANES), a + 4 * r + k * a_column, a_column, rows - r, depth - k)


@vectorized
def _add(out, start, total, columns):
    """out = start + total, a vector of up to 16 numbers."""
    mask = _mask(columns)
    _store(out, _load(start, mask) + total.load(LANES), mask)


@inner
def _block(pairs, a, b, out, out_row, start, start_row, rows, columns, corner, plain):
    """As a tile, for amx.BLOCK rows and columns; `plain` says that `start` is zeros."""
    if plain and rows >= amx.BLOCK and columns >= amx.BLOCK:
        amx.block(pairs // amx.PAIRS, a, 4 * PITCH, b, 4 * amx.BLOCK, out, out_row)
        return
    amx.block(pairs // amx.PAIRS, a, 4 * PITCH, b, 4 * amx.BLOCK, corner, 4 * amx.BLOCK)
    for r in range(min(rows, amx.BLOCK)):
        for c in range(0, amx.BLOCK, LANES):
            at, total = r * out_row + 4 * c, corner + 4 * (r * amx.BLOCK + c)
            _add(out + at, start + r * start_row + 4 * c, total, columns - c)


def _multiply(a, b, out, bias, accumulate, scratch, tiles):
    """out = a @ b, plus bias (if not empty) or plus out; rows or columns of `a` and `b`, and rows of `out`, are contiguous.

    `tiles` says that AMX computes it. Then depth and columns are filled up with zeros, on both sides, to whole tiles.
    """
    M, K, N = a.shape[0], a.shape[1], b.shape[1]
    (a_row, a_column), (b_row, b_column), out_row = a.strides, b.strides, out.strides[0]
    a_start, b_start, out_start = np.int64(a.ctypes.data), np.int64(b.ctypes.data), np.int64(out.ctypes.data)
    zeros = (np.int64(scratch.ctypes.data) + 63) // 64 * 64  # so that no vector of a panel straddles two cache lines
    corner, panels, left = zeros + CORNER, zeros + PANELS, zeros + LEFT
    start, start_row, start_column = zeros, 0, 0
    if accumulate:
        start, start_row, start_column = out_start, out_row, 4
    elif bias.size:
        start, start_column = np.int64(bias.ctypes.data), 4
    at_once, rows = (MANY, amx.BLOCK) if tiles else (COLUMNS, ROWS)
    if tiles:
        amx.begin(corner)
    for k in range(0, K, DEPTH):
        depth = min(DEPTH, K - k)
        pairs = (depth + 1) // 2
        if tiles:
            pairs = (pairs + amx.PAIRS - 1) // amx.PAIRS * amx.PAIRS
        if k > 0:
            start, start_row, start_column = out_start, out_row, 4
        for n0 in range(0, N, at_once):
            columns = min(at_once, N - n0)
            _panels(panels, pairs, depth, columns, b_start + k * b_row + n0 * b_column, b_row, b_column, tiles)
            for m0 in range(0, M, BAND):
                band = min(BAND, M - m0)
                _left(left, pairs, depth, band, a_start + m0 * a_row + k * a_column, a_row, a_column, tiles)
                n = 0
                while n < columns:
                    width = _width(columns - n, tiles)
                    vectors, y = width // LANES, panels + 4 * n * pairs
                    for m in range(0, band, rows):
                        x, x_row, x_pair = left + 4 * m * PITCH, 4 * PITCH, 4
                        if a_column != 4 and not tiles:
                            x, x_row, x_pair = left + 4 * (m // LANES * LANES * pairs + m % LANES), 4, 4 * LANES
                        to = out_start + (m0 + m) * out_row + 4 * (n0 + n)
                        add = start + (m0 + m) * start_row + (n0 + n) * start_column
                        if tiles:
                            _block(pairs, x, y, to, out_row, add, start_row, band - m, columns - n, corner, start == zeros)
                        elif vectors == 3:
                            tile(3, pairs, x, x_row, x_pair, y, to, out_row, add, start_row, band - m, columns - n)
                        elif vectors == 2:
                            tile(2, pairs, x, x_row, x_pair, y, to, out_row, add, start_row, band - m, columns - n)
                        else:
                            tile(1, pairs, x, x_row, x_pair, y, to, out_row, add, start_row, band - m, columns - n)
                    n += width
    if tiles:
        amx.end(corner)


@cache
def _compiled() -> Callable:
    return compiled(_multiply, types.void, types.boolean)


# -- which instructions ------------------------------------------------------------------------------------------------
AVX, AMX = "AVX512-BF16", "AMX"


@cache
def chosen() -> Choice:
    """Whose instructions compute all products here, and why; measured at the first use, see choice.py."""
    reason = amx.missing()
    return Choice(AVX, reason) if reason else choose("products-bfloat16", _ways, AMX)


def explained() -> str:
    """What computes products and why, as a sentence; without a measurement, if none was written down yet."""
    if reason := missing():
        return reason
    choice = chosen() if amx.missing() else kept("products-bfloat16")
    computes = f"{choice.way} ({choice.why})" if choice else f"{AVX} or {AMX}, between which the first such step chooses"
    return f"products in training steps with --matmul bf16, by {computes}"


def _ways() -> dict[str, list[Callable]]:
    calls, scratch = gemm.linear_layer(), np.zeros(SCRATCH // 4, F4)
    return {way: [partial(_compiled(), *call, NONE, False, scratch, way == AMX) for call in calls] for way in (AMX, AVX)}


def _straight(x, rows: bool):
    """The matrix, or a copy whose rows are contiguous if neither they are nor, unless `rows` are asked for, its columns."""
    down, along = x.strides
    good = min(x.strides) >= 0 and (along == 4 or (down == 4 and not rows))
    return x if good else np.ascontiguousarray(x)


def product(a, b, out=None, accumulate=False, *, bias=None):
    """bfloat16(a[M, K]) @ bfloat16(b[K, N]) + bias[N] into `out`, or added to `out`, as gemm.product does it in float32.

    Arrays are float32 of any layout, else DtypeError; KernelError says why this processor cannot do it.
    """
    if reason := missing():
        raise KernelError(f"products('bf16'): {reason}, allowed: products('float32')")
    out = gemm.target(a, b, out, accumulate, bias)
    if any(x is not None and x.dtype != F4 for x in (a, b, out, bias)):
        dtypes = [str(x.dtype) for x in (a, b, out, bias) if x is not None]
        raise DtypeError(f"products('bf16'): the arrays are {', '.join(dtypes)}, allowed: float32")
    if 0 in (*a.shape, *b.shape):
        return gemm.product(a, b, out, accumulate, bias=bias)
    return gemm.in_parts(_product, a, b, out, accumulate, bias)


def _product(a, b, out, accumulate, bias):
    """The same for arrays that will do, in this thread."""
    if not hasattr(_threads, "scratch"):
        _threads.scratch = np.zeros(SCRATCH // 4, F4)
    a, b, early = _straight(a, False), _straight(b, False), NONE if bias is None or accumulate else np.ascontiguousarray(bias)
    apart = not any(np.may_share_memory(out, x) for x in (a, b, early))
    to = out if apart and _straight(out, True) is out and out.flags.writeable else np.array(out, F4, order="C")
    _compiled()(a, b, to, early, bool(accumulate), _threads.scratch, chosen().way == AMX)
    if to is not out:
        out[...] = to
    return out if bias is None or not accumulate else np.add(out, bias, out=out)
