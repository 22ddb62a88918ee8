"""rope on the CPU: one pass over the vectors, all heads of a position with the same turns; backward turns the other way."""

import math

import numpy as np

from autograd.cpu.compile import cpu_kernel, inner
from autograd.cpu.panels import U1, U, flat

from . import turns


@inner
def _interleaved(out, row, cos, sin, scale, sign):
    for j in range(U(cos.size)):
        i = U(2) * j
        a, b, s = row[i] * scale, row[i + U1] * scale, sin[j] * sign
        out[i], out[i + U1] = a * cos[j] - b * s, a * s + b * cos[j]


@inner
def _half(out, row, cos, sin, scale, sign):
    pairs = U(cos.size)
    for j in range(pairs):
        a, b, s = row[j] * scale, row[j + pairs] * scale, sin[j] * sign
        out[j], out[j + pairs] = a * cos[j] - b * s, a * s + b * cos[j]


@inner
def turn(position, angles, cos, sin):
    """Cosine and sine of every angle at one position, as ``turns`` makes them."""
    for j in range(angles.size):
        angle = position * angles[j]  # in float64: positions have no bound
        cos[j], sin[j] = math.cos(angle), math.sin(angle)


@cpu_kernel(parts="positions")
def rotate(x_in, shape, cos, sin, interleaved, scale, sign, y, positions):
    x, strides = x_in
    _, H, T, K = shape
    for position in range(positions[0], positions[1]):  # of all sequences
        b, t = position // T, position % T
        c, s = cos[min(b, cos.shape[0] - 1), t], sin[min(b, cos.shape[0] - 1), t]
        for h in range(H):
            at, to = b * strides[0] + h * strides[1] + t * strides[2], (position * H + h) * K
            row, out = x[at : at + K], y[to : to + K]
            if interleaved:
                _interleaved(out, row, c, s, scale, sign)
            else:
                _half(out, row, c, s, scale, sign)
            for j in range(2 * c.size, K):
                out[j] = row[j] * scale


def apply(x, turned, pairing, scale, sign):
    """scale · x turned by the tables that ``turns`` makes, the other way where the sign is -1; laid out [B T H K]."""
    B, H, T, K = x.shape
    y, number = np.empty((B, T, H, K), x.dtype), x.dtype.type
    if x.size:
        rotate(flat(x), x.shape, *turned, pairing == "interleaved", number(scale), number(sign), y.reshape(-1),
               (0, B * T))
    return y.transpose(0, 2, 1, 3)


def forward(x, positions, angles, pairing, scale, start, growth, gain):
    """y is laid out [B T H K], as are gradients."""
    turned = turns(angles, start, x.shape[2], positions, x.dtype, growth, gain)
    return apply(x, turned, pairing, scale, 1), (turned, pairing, scale)


def backward(saved, g):
    return (apply(g, *saved, -1),)
