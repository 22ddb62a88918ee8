"""linear on the CPU: one matrix product for all rows, forward and for each gradient."""

import math

from ...cpu.gemm import product
from ...cpu.team import column_sums


def forward(x, weight, bias):
    lead = x.shape[:-1]
    rows = x.reshape(math.prod(lead), x.shape[-1])
    y = product(rows, weight.T, bias=bias)
    return y.reshape(*lead, weight.shape[0]), (x.shape, rows, weight)


def backward(saved, g, needs):
    shape, rows, weight = saved
    g = g.reshape(len(rows), weight.shape[0])
    return (product(g, weight).reshape(shape) if "x" in needs else None, product(g.T, rows) if "weight" in needs else None,
            column_sums(g) if "bias" in needs else None)
