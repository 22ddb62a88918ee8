"""layer_norm on the CPU: a row at a time; backward recomputes the normalised row from its saved mean and scale."""

import math

import numpy as np

from ...cpu.compile import cpu_kernel


@cpu_kernel
def _forward(x, weight, bias, eps, y, means, scales):
    rows, width = x.shape
    share = x.dtype.type(1 / width)
    zero, one, epsilon = x.dtype.type(0), x.dtype.type(1), x.dtype.type(eps)
    for i in range(rows):
        row, out = x[i], y[i]
        total = zero
        for j in range(width):
            total += row[j] - row[0]
        mean = row[0] + total * share  # sums of differences: a constant row has exactly mean row[0]
        square = zero
        for j in range(width):
            square += (row[j] - mean) * (row[j] - mean)
        scale = one / x.dtype.type(math.sqrt(square * share + epsilon))
        means[i], scales[i] = mean, scale
        for j in range(width):
            out[j] = (row[j] - mean) * scale * weight[j] + bias[j]


@cpu_kernel
def _backward(x, weight, means, scales, g, gx, gweight, gbias):
    rows, width = x.shape
    share = x.dtype.type(1 / width)
    zero = x.dtype.type(0)
    for i in range(rows):
        row, grad, out = x[i], g[i], gx[i]
        mean, scale = means[i], scales[i]
        a, b = zero, zero
        for j in range(width):
            h = (row[j] - mean) * scale
            d = grad[j] * weight[j]
            a += d
            b += d * h
        a *= share
        b *= share
        for j in range(width):
            h = (row[j] - mean) * scale
            gweight[j] += grad[j] * h
            gbias[j] += grad[j]
            out[j] = (grad[j] * weight[j] - a - h * b) * scale


def forward(x, weight, bias, eps):
    width = x.shape[-1]
    rows = np.ascontiguousarray(x).reshape(-1, width) if x.size else np.zeros((0, width), x.dtype)
    gain = np.ones(width, x.dtype) if weight is None else np.ascontiguousarray(weight)
    offset = np.zeros(width, x.dtype) if bias is None else np.ascontiguousarray(bias)
    y = np.empty_like(rows)
    means, scales = np.empty((2, len(rows)), x.dtype)
    if rows.size:
        _forward(rows, gain, offset, eps, y, means, scales)
    return y.reshape(x.shape), (rows, x.shape, gain, means, scales, weight is not None, bias is not None)


def backward(saved, g):
    rows, shape, gain, means, scales, weighted, biased = saved
    gx = np.empty_like(rows)
    gweight, gbias = np.zeros((2, shape[-1]), rows.dtype)
    if rows.size:
        _backward(rows, gain, means, scales, np.ascontiguousarray(g).reshape(rows.shape), gx, gweight, gbias)
    return gx.reshape(shape), gweight if weighted else None, gbias if biased else None
