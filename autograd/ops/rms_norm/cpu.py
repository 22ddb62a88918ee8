"""rms_norm on the CPU: a row at a time; backward from the input and each row's saved scale."""

import math

import numpy as np

from ...cpu.compile import cpu_kernel


@cpu_kernel(parts="x y scales")
def rms_norm_rows(x, weight, eps, y, scales):
    rows, width = x.shape
    share = x.dtype.type(1 / width)
    zero, one, epsilon = x.dtype.type(0), x.dtype.type(1), x.dtype.type(eps)
    for i in range(rows):
        row, out = x[i], y[i]
        square = zero
        for j in range(width):
            square += row[j] * row[j]
        scale = one / x.dtype.type(math.sqrt(square * share + epsilon))
        scales[i] = scale
        for j in range(width):
            out[j] = row[j] * scale * weight[j]


@cpu_kernel(parts="x scales g gx", sums="gweight")
def _backward(x, weight, scales, g, gx, gweight):
    rows, width = x.shape
    share = x.dtype.type(1 / width)
    zero = x.dtype.type(0)
    for i in range(rows):
        row, grad, out = x[i], g[i], gx[i]
        scale = scales[i]
        b = zero
        for j in range(width):
            b += grad[j] * weight[j] * row[j]
        b *= share * scale * scale
        for j in range(width):
            gweight[j] += grad[j] * row[j] * scale
            out[j] = (grad[j] * weight[j] - row[j] * b) * scale


def forward(x, weight, eps):
    width = x.shape[-1]
    rows = np.ascontiguousarray(x).reshape(-1, width) if x.size else np.zeros((0, width), x.dtype)
    gain = np.ones(width, x.dtype) if weight is None else np.ascontiguousarray(weight)
    y, scales = np.empty_like(rows), np.empty(len(rows), x.dtype)
    if rows.size:
        rms_norm_rows(rows, gain, eps, y, scales)
    return y.reshape(x.shape), (rows, x.shape, gain, scales, weight is not None)


def backward(saved, g):
    rows, shape, gain, scales, weighted = saved
    gx, gweight = np.empty_like(rows), np.zeros(shape[-1], rows.dtype)
    if rows.size:
        _backward(rows, gain, scales, np.ascontiguousarray(g).reshape(rows.shape), gx, gweight)
    return gx.reshape(shape), gweight if weighted else None
