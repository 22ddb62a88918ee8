"""adamw on a GPU: the protocol of cpu.py, on flat buffers of the card."""

import math

import numpy as np

from ...cuda.source import Source, ceil_div, contiguous, elements, float32_only
from ...device import namespace

SOURCE = Source(__file__)
supports = float32_only


def update(param, grad, m, v, lo, hi, *, lr, beta1, beta2, eps, weight_decay, decayed, step, scale):
    """One step in place on elements lo .. hi of flat buffers; elements below ``decayed`` get weight decay."""
    part = slice(lo, hi)
    SOURCE.launch("mtv_adamw_update", elements(hi - lo), param[part], grad[part], m[part], v[part], hi - lo,
                  max(decayed - lo, 0), 1 - lr * weight_decay, lr / (1 - beta1**step), beta1, beta2,
                  1 / math.sqrt(1 - beta2**step), eps, scale)


def add(left, right):
    """left += right, on flat buffers."""
    left += right


def sum_gradients(pairs, total, lo, hi):
    """Add elements lo .. hi of the second buffer of every pair to the first; the squares in ``total``, summed on the card."""
    for left, right in pairs:
        part = left[lo:hi]
        part += right[lo:hi]
    part = total[lo:hi]
    sums = namespace(total).empty(ceil_div(hi - lo, SOURCE["SQUARES"]), np.float64)
    SOURCE.launch("mtv_adamw_squares", sums.size, part, sums, part.size)
    return sums.sum()


def forward(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, decayed, step, scale):
    param, m, v = param.copy(), m.copy(), v.copy()
    update(param, contiguous(grad), m, v, 0, param.size, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
           weight_decay=weight_decay, decayed=decayed, step=step, scale=scale)
    return (param, m, v), ()
