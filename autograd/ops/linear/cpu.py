"""linear on the CPU: one BLAS call for all rows, forward and for each gradient."""

import numpy as np


def forward(x, weight, bias):
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    y = rows @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), (x, rows, weight, bias is not None)


def backward(saved, g):
    x, rows, weight, biased = saved
    g = g.reshape(-1, weight.shape[0])
    return (g @ weight).reshape(x.shape), g.T @ rows, np.add.reduce(g, axis=0) if biased else None
