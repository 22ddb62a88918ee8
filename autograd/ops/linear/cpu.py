"""linear on the CPU: one matrix product for all rows, forward and for each gradient."""

import math

from ...cpu import bf16, gemm
from ...cpu.team import column_sums
from ...errors import KernelError
from ...state import switches

PRODUCTS = {"float32": gemm.product, "bf16": bf16.product}


def _product():
    """What multiplies, by the switch."""
    if (kind := switches().products) not in PRODUCTS:
        raise KernelError(f"products({kind!r}): the arrays are on the CPU, allowed there: {', '.join(map(repr, PRODUCTS))}")
    return PRODUCTS[kind]


def forward(x, weight, bias):
    lead, product = x.shape[:-1], _product()
    rows = x.reshape(math.prod(lead), x.shape[-1])
    y = product(rows, weight.T, bias=bias)
    return y.reshape(*lead, weight.shape[0]), (x.shape, rows, weight, product)


def backward(saved, g, needs):
    shape, rows, weight, product = saved
    g = g.reshape(len(rows), weight.shape[0])
    return (product(g, weight).reshape(shape) if "x" in needs else None, product(g.T, rows) if "weight" in needs else None,
            column_sums(g) if "bias" in needs else None)
