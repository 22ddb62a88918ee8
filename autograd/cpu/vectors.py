"""Vectors inside kernels: code that says which numbers are one vector, where LLVM would not find out by itself.

A loop over lanes becomes vector instructions only if LLVM can prove that none of the rows it touches overlap. With two
rows it does, with the sixteen of a butterfly it gives up. A function under ``vectorized`` runs once, while a kernel that
calls it is compiled, with symbols in place of numbers, and its operations become instructions:

    @vectorized
    def butterfly(work, i, j):
        a, b = work.load(i), work.load(j)         # 64 bytes each: 16 float32 or 8 float64
        work.store(i, a + b)
        work.store(j, a - b)

A flat array arrives as Memory, an integer (also an address) as Index, a constant integer as itself, so that Python's ``for``
and ``if`` over constants write straight-line code. It returns nothing. Vectors need no alignment, and any processor runs
them, in as many registers as it takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import EXACT, inline, inner

BYTES = 64  # of a vector
LONG, FLOAT = ir.IntType(64), ir.FloatType()
FLAGS = tuple(sorted(EXACT["fastmath"]))  # a product and a sum may become one instruction


class _Symbol:
    """A value of the compiled code."""

    __slots__ = ("builder", "value")

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def _of(self, other):
        """The other operand: a symbol of the same kind, or a number."""
        if isinstance(other, _Symbol):
            return other.value
        kind = self.value.type
        return ir.Constant(kind, [float(other)] * kind.count if isinstance(kind, ir.VectorType) else other)


class Index(_Symbol):
    """An integer. As the address of float32 numbers, it loads and stores any number of them."""

    def __add__(self, other):
        return Index(self.builder, self.builder.add(self.value, self._of(other)))

    def __sub__(self, other):
        return Index(self.builder, self.builder.sub(self.value, self._of(other)))

    def __mul__(self, other):
        return Index(self.builder, self.builder.mul(self.value, self._of(other)))

    __radd__, __rmul__ = __add__, __mul__

    def _pointer(self, kind):
        return self.builder.inttoptr(self.value, kind.as_pointer())

    def load(self, lanes: int) -> Vector:
        """The numbers from this address on."""
        return _load(self.builder, self._pointer(ir.VectorType(FLOAT, lanes)), 4)

    def spread(self, lanes: int) -> Vector:
        """The number at this address in every lane."""
        return _spread(self.builder, self._pointer(FLOAT), lanes)

    def store(self, vector: Vector) -> None:
        """Write a vector from this address on."""
        self.builder.store(vector.value, self._pointer(vector.value.type)).align = 4


class Vector(_Symbol):
    """Floats, 64 bytes of them where nothing else is said; operators work lane by lane."""

    def __add__(self, other):
        return Vector(self.builder, self.builder.fadd(self.value, self._of(other), flags=FLAGS))

    def __sub__(self, other):
        return Vector(self.builder, self.builder.fsub(self.value, self._of(other), flags=FLAGS))

    def __mul__(self, other):
        return Vector(self.builder, self.builder.fmul(self.value, self._of(other), flags=FLAGS))

    def __neg__(self):
        return Vector(self.builder, self.builder.fneg(self.value))

    def shuffled(self, other: Vector, places: list[int]) -> Vector:
        """The numbers at these places of both vectors, end to end."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
        return Vector(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))

    def zeros(self) -> Vector:
        """As many zeros."""
        return Vector(self.builder, ir.Constant(self.value.type, None))


def _load(builder, pointer, align: int) -> Vector:
    value = builder.load(pointer)
    value.align = align
    return Vector(builder, value)


def _spread(builder, pointer, lanes: int) -> Vector:
    number = builder.load(pointer)
    empty = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = Vector(builder, builder.insert_element(empty, number, LONG(0)))
    return first.shuffled(first, [0] * lanes)


class Memory:
    """A flat array; indices count its numbers and are not checked."""

    def __init__(self, builder, pointer, bits: int):
        self._builder, self._pointer, self._align = builder, pointer, bits // 8
        self.lanes = BYTES // self._align
        self._kind = ir.VectorType(pointer.type.pointee, self.lanes)
        self.zeros = Vector(builder, ir.Constant(self._kind, None))

    def _at(self, index, kind=None):
        offset = index.value if isinstance(index, Index) else LONG(index)
        pointer = self._builder.gep(self._pointer, [offset])
        return self._builder.bitcast(pointer, kind.as_pointer()) if kind else pointer

    def load(self, index) -> Vector:
        """The numbers from ``index`` on."""
        return _load(self._builder, self._at(index, self._kind), self._align)

    def store(self, index, vector: Vector) -> None:
        """Write a vector from ``index`` on."""
        self._builder.store(vector.value, self._at(index, self._kind)).align = self._align

    def spread(self, index) -> Vector:
        """The number at ``index`` in every lane."""
        return _spread(self._builder, self._at(index), self.lanes)


def repeat(count: Index | int, carried: list, body: Callable, some: bool = False) -> list:
    """``for i in range(count): carried = body(i, carried)``, with the symbols in ``carried`` kept in registers.

    With ``some``, the count is at least 1; LLVM then leaves the loop as it is, instead of doing two or four steps in one.
    """
    if isinstance(count, int):
        return functools.reduce(lambda symbols, i: body(i, symbols), range(count), carried)
    builder = count.builder
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    if some:
        builder.branch(loop)
    else:
        builder.cbranch(builder.icmp_signed(">", count.value, LONG(0)), loop, after)

    def symbols(values):
        return [type(symbol)(builder, value) for symbol, value in zip(carried, values, strict=True)]

    builder.position_at_end(loop)
    i, left, *phis = [builder.phi(kind) for kind in (LONG, LONG, *(symbol.value.type for symbol in carried))]
    new = [symbol.value for symbol in body(Index(builder, i), symbols(phis))]
    following, fewer, end = builder.add(i, LONG(1)), builder.sub(left, LONG(1)), builder.block
    builder.cbranch(builder.icmp_signed(">", fewer, LONG(0)), loop, after)
    builder.position_at_end(after)
    firsts = [symbol.value for symbol in carried]
    for phi, first, then in zip([i, left, *phis], [LONG(0), count.value, *firsts], [following, fewer, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, end)
    if some:
        return symbols(new)
    results = [builder.phi(first.type) for first in firsts]
    for phi, first, then in zip(results, firsts, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, end)
    return symbols(results)


def vectorized(function: Callable) -> Callable:
    """A function for kernels whose body, run on symbols at compile time, writes the instructions."""

    def generate(context, builder, signature, values):
        symbols = []
        for kind, value in zip(signature.args, values, strict=True):
            if isinstance(kind, types.Array):
                pointer = context.make_array(kind)(context, builder, value).data
                symbols.append(Memory(builder, pointer, kind.dtype.bitwidth))
            elif isinstance(kind, types.IntegerLiteral):
                symbols.append(kind.literal_value)
            else:
                symbols.append(Index(builder, context.cast(builder, value, kind, types.int64)))
        function(*symbols)
        return context.get_dummy_value()

    def typed(context, *kinds):
        return types.void(*kinds), generate

    # intrinsic() wants a function with as many named parameters as the call has arguments.
    names = ", ".join(inspect.signature(function).parameters)
    space = {"typed": typed}
    exec(f"def {function.__name__}(context, {names}):\n    return typed(context, {names})", space)
    operation = intrinsic(prefer_literal=True)(space[function.__name__])
    operation.__doc__ = function.__doc__
    return operation


@vectorized
def copy_rows(to, o, to_row, source, i, source_row, rows):
    """to[o + to_row r] = source[i + source_row r], a vector each, for r < rows."""

    def body(r, _):
        to.store(o + r * to_row, source.load(i + r * source_row))
        return []

    repeat(rows, [], body)


@inline
def assign(to, x):
    """to[:] = x for arrays of one length. For that Numba compiles a check with a message, which takes two seconds."""
    for i in range(to.size):
        to[i] = x[i]


@inner
def scratch(size, like):
    """``size`` zeros on a 64-byte boundary, so that no vector straddles two cache lines."""
    raw = np.zeros(size + BYTES // like.itemsize, like.dtype)
    start = (-raw.ctypes.data % BYTES) // like.itemsize
    return raw[start : start + size]
