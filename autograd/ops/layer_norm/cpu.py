"""layer_norm on the CPU: a row at a time; backward recomputes the normalised row from its saved shift and scale.

x - mean is (x - x₀) - shift, where the shift is the mean of all x - x₀: a mean far from 0 would be rounded to the precision of
the values, and all that a row keeps are its differences. Gradients of the row lose their mean in the same way, so that those of
a row of equal ones, or of a single one, are exactly 0.
"""

import math

import numpy as np

from ...cpu.compile import cpu_kernel, inline


@inline(exact=True)
def _less(x, y):
    """x - y"""
    return x - y


@inline(exact=True)
def _deviation(x, first, shift):
    """x - mean"""
    return x - first - shift


@inline(exact=True)
def _normal(x, first, scale, offset):
    """(x - mean) scale, with the shift times the scale as offset."""
    return (x - first) * scale - offset


@cpu_kernel(parts="x y shifts scales")
def layer_norm_rows(x, weight, bias, eps, y, shifts, scales):
    rows, width = x.shape
    share = x.dtype.type(1 / width)
    zero, one, epsilon = x.dtype.type(0), x.dtype.type(1), x.dtype.type(eps)
    for i in range(rows):
        row, out, first = x[i], y[i], x[i, 0]
        total = zero
        for j in range(width):
            total += _less(row[j], first)
        shift = total * share
        square = zero
        for j in range(width):
            d = _deviation(row[j], first, shift)
            out[j] = d
            square += d * d
        scale = one / x.dtype.type(math.sqrt(square * share + epsilon))
        shifts[i], scales[i] = shift, scale
        for j in range(width):
            out[j] = out[j] * scale * weight[j] + bias[j]


@cpu_kernel(parts="x shifts scales g gx", sums="gweight gbias")
def _backward(x, weight, shifts, scales, g, gx, gweight, gbias):
    rows, width = x.shape
    share = x.dtype.type(1 / width)
    zero = x.dtype.type(0)
    for i in range(rows):
        row, grad, out = x[i], g[i], gx[i]
        first, shift, scale, g_first = row[0], shifts[i], scales[i], grad[0] * weight[0]
        a, b, offset = zero, zero, shift * scale
        for j in range(width):
            h = _normal(row[j], first, scale, offset)
            p = grad[j] * weight[j]
            out[j] = p  # with two uses, it does not become one instruction with the difference, which would not be 0
            d = _less(p, g_first)
            a += d
            b += d * h
        a *= share
        b *= share
        for j in range(width):
            h = _normal(row[j], first, scale, offset)
            gweight[j] += grad[j] * h
            gbias[j] += grad[j]
            out[j] = (_deviation(out[j], g_first, a) - h * b) * scale


def forward(x, weight, bias, eps):
    width = x.shape[-1]
    rows = np.ascontiguousarray(x).reshape(-1, width) if x.size else np.zeros((0, width), x.dtype)
    gain = np.ones(width, x.dtype) if weight is None else np.ascontiguousarray(weight)
    offset = np.zeros(width, x.dtype) if bias is None else np.ascontiguousarray(bias)
    y = np.empty_like(rows)
    shifts, scales = np.empty((2, len(rows)), x.dtype)
    if rows.size:
        layer_norm_rows(rows, gain, offset, eps, y, shifts, scales)
    return y.reshape(x.shape), (rows, x.shape, gain, shifts, scales, weight is not None, bias is not None)


def backward(saved, g):
    rows, shape, gain, shifts, scales, weighted, biased = saved
    gx = np.empty_like(rows)
    gweight, gbias = np.zeros((2, shape[-1]), rows.dtype)
    if rows.size:
        _backward(rows, gain, shifts, scales, np.ascontiguousarray(g).reshape(rows.shape), gx, gweight, gbias)
    return gx.reshape(shape), gweight if weighted else None, gbias if biased else None
