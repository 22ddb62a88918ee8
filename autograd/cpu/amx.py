"""Products of bfloat16 in tiles: the instructions of AMX, on Intel's servers from Sapphire Rapids on, and their permission.

A core has eight *tiles*, registers of 16 rows of 64 bytes. TDPBF16PS multiplies two of them, 16 rows with 16 pairs of bfloat16
each and 16 pairs with 16 columns each, and adds the product to the 16 x 16 float32 sums of a third. Four tiles hold sums here,
and four loads serve four products:

                         b[pairs, 0:16]   b[pairs, 16:32]
    a[0:16, pairs]    *  (    tile 0           tile 1     )  +=
    a[16:32, pairs]   *  (    tile 2           tile 3     )  +=

One instruction adds 16 pairs, that is 32 numbers along k, in this order (Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 2, TDPBF16PS): even = a[0] b[0] + a[2] b[2] + ... and odd = a[1] b[1] + a[3] b[3] + ..., each from the first term
on, by multiply-adds that round once; then sum = sum + (even + odd). All is rounded to the nearest, then to even. Numbers below
2^-126 count as 0, as factors, products and sums, and nothing depends on or changes what MXCSR says of rounding.

Linux permits tiles to a process only if it asks, once: this holds for all of its threads, also for those that run already, and
for what it forks. Between instructions tiles lose nothing, since the compiler has no use for them, and a thread that is
interrupted gets them back. They are in use between ``begin`` and ``end`` only.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import llvmlite.binding as llvm
import numba
from llvmlite import ir

from .vectors import repeat, vectorized

FEATURES = {"amx-tile", "amx-bf16"}  # as LLVM calls them
ROWS, PAIRS = 16, 16  # of a tile; as many columns of sums
BLOCK = 2 * ROWS  # rows and columns of the sums that are computed at a time
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18  # the system call, what is asked, and for which part of the state
DESCRIPTION = [1, *15 * [0], *8 * [64, 0], *16 * [0], *8 * [16], *8 * [0]]  # palette 1; bytes a row and rows of eight tiles


@cache
def missing() -> str | None:
    """Why this process cannot use tiles, or None: then it has asked for them."""
    host, compiled = llvm.get_host_cpu_features(), numba.config.CPU_FEATURES
    if not all(map(host.get, FEATURES)):
        return "this processor has no AMX, or its system does not know it"
    if compiled and not {f"+{name}" for name in FEATURES} <= set(compiled.split(",")):
        return "NUMBA_CPU_FEATURES leaves out AMX, which this processor has"
    return None if _permitted() else "the system does not permit AMX to this process"


def _permitted() -> bool:
    """Ask Linux for tiles; no other system is asked."""
    asked = map(ctypes.c_long, (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA))
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(*asked) == 0


def _write(builder, text: str, *values) -> None:
    """Instructions in AT&T's order, the target last; $0, $1, ... are the values. They stay where they are written."""
    llvm.initialize_native_asmparser()
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(ir.InlineAsm(kind, text, ",".join(["r"] * len(values) + ["~{memory}"]), side_effect=True), values)


@vectorized
def begin(place):
    """Make all tiles whole ones; 64 bytes at an address are for their description."""
    kind = ir.VectorType(ir.IntType(8), len(DESCRIPTION))
    place.builder.store(ir.Constant(kind, DESCRIPTION), place._pointer(kind)).align = 4
    _write(place.builder, "ldtilecfg ($0)", place.value)


@vectorized
def end(place):
    """Empty the tiles, so that whoever interrupts the thread need not keep them; the argument says nothing."""
    _write(place.builder, "tilerelease")


@vectorized
def block(steps, a, a_row, b, b_pair, out, out_row):
    """out[r, c] = sum over pairs p of a[r, p] * b[p, c], for BLOCK x BLOCK sums and PAIRS * steps pairs; steps >= 1."""
    builder = a.builder
    load = "\n".join(("tileloadd ($0,$2), %tmm4", "tileloadd ($3,$4), %tmm6", "tdpbf16ps %tmm6, %tmm4, %tmm0",
                      "tileloadd 64($3,$4), %tmm7", "tdpbf16ps %tmm7, %tmm4, %tmm1",
                      "tileloadd ($1,$2), %tmm5", "tdpbf16ps %tmm6, %tmm5, %tmm2", "tdpbf16ps %tmm7, %tmm5, %tmm3"))

    def body(_, carried):
        upper, lower, b = carried
        _write(builder, load, upper.value, lower.value, a_row.value, b.value, b_pair.value)
        return [upper + 4 * PAIRS, lower + 4 * PAIRS, b + b_pair * PAIRS]

    _write(builder, "\n".join(f"tilezero %tmm{tile}" for tile in range(4)))
    repeat(steps, [a, a + a_row * ROWS, b], body, some=True)
    for at, left, right in ((out, 0, 1), (out + out_row * ROWS, 2, 3)):
        _write(builder, f"tilestored %tmm{left}, ($0,$1)\ntilestored %tmm{right}, 64($0,$1)", at.value, out_row.value)
