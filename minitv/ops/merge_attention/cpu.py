"""merge_attention on the CPU: the weights of all rows first, then a pass over the rows; backward needs the weights and both y.

    g · (y - other_y) = delta      gy = w g      glse = w u delta + w c      and the same for the others, with -w u delta + u c

w and u are the two weights of a row, c is the gradient of lse. A weight of 0 hides its row, which may hold anything.
"""

import math

import numpy as np

from autograd.arrays import or_zeros
from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp
from autograd.cpu.panels import by_position, flat

INF = math.inf


@cpu_kernel
def weigh(a, b, w, u, shift, total):
    """The weights of two sums whose logs are a and b, the larger log (0 instead of -inf) and the sum relative to it."""
    zero, one = a.dtype.type(0), a.dtype.type(1)
    for i in range(a.size):
        top = a[i] if a[i] > b[i] else b[i]
        top = zero if top == -INF else top
        x, y = exp(a[i] - top), exp(b[i] - top)
        inverse = one / (x + y) if x + y > zero else zero
        w[i], u[i], shift[i], total[i] = x * inverse, y * inverse, top, x + y


@cpu_kernel
def _mix(x_in, y_in, shape, w, u, out_in):
    (x, xs), (y, ys), (out, outs) = x_in, y_in, out_in
    B, H, T, V = shape
    for i in range(B * H * T):
        b, h, t = i // (H * T), i // T % H, i % T
        left, right = x[b * xs[0] + h * xs[1] + t * xs[2] :], y[b * ys[0] + h * ys[1] + t * ys[2] :]
        row = out[b * outs[0] + h * outs[1] + t * outs[2] :]
        if w[i] != 0 and u[i] != 0:
            for c in range(V):
                row[c] = w[i] * left[c] + u[i] * right[c]
        elif w[i] != 0:
            for c in range(V):
                row[c] = w[i] * left[c]
        else:
            for c in range(V):
                row[c] = u[i] * right[c] if u[i] != 0 else u[i]


@cpu_kernel
def _unmix(x_in, y_in, g_in, shape, w, u, c_in, gx_in, gy_in, ga, gb):
    (x, xs), (y, ys), (g, gs), (gx, gxs), (gy, gys) = x_in, y_in, g_in, gx_in, gy_in
    B, H, T, V = shape
    for i in range(B * H * T):
        b, h, t = i // (H * T), i // T % H, i % T
        left, right = x[b * xs[0] + h * xs[1] + t * xs[2] :], y[b * ys[0] + h * ys[1] + t * ys[2] :]
        slope = g[b * gs[0] + h * gs[1] + t * gs[2] :]
        row, other = gx[b * gxs[0] + h * gxs[1] + t * gxs[2] :], gy[b * gys[0] + h * gys[1] + t * gys[2] :]
        delta = x.dtype.type(0)
        for c in range(V):
            row[c], other[c] = w[i] * slope[c], u[i] * slope[c]
        if w[i] != 0 and u[i] != 0:
            for c in range(V):
                delta += slope[c] * (left[c] - right[c])
        delta *= w[i] * u[i]
        ga[i], gb[i] = delta + w[i] * c_in[i], u[i] * c_in[i] - delta


def forward(y, lse, other_y, other_lse):
    """The merged y, laid out as attention's, and lse."""
    a, b = (np.array(x, order="C").reshape(-1) for x in (lse, other_lse))
    w, u, shift, total = (np.empty_like(a) for _ in range(4))
    out = by_position(*y.shape, y.dtype)
    weigh(a, b, w, u, shift, total)
    if out.size:
        _mix(flat(y), flat(other_y), y.shape, w, u, flat(out))
    with np.errstate(divide="ignore"):
        np.log(total, out=total)
    total += shift
    return (out, total.reshape(lse.shape)), (y, other_y, w, u)


def backward(saved, g_y, g_lse):
    """The gradients of all four inputs."""
    y, other_y, w, u = saved
    shape = y.shape[:3]
    gx, gy, ga, gb = (*(by_position(*y.shape, y.dtype) for _ in "xy"), *(np.empty(shape, y.dtype) for _ in "ab"))
    c = np.zeros(w.shape, y.dtype) if g_lse is None else np.array(g_lse, order="C").reshape(-1)
    if w.size:
        _unmix(flat(y), flat(other_y), flat(or_zeros(g_y, y)), y.shape, w, u, c, flat(gx), flat(gy), ga.reshape(-1),
               gb.reshape(-1))
    return gx, ga, gy, gb
