"""shaping on a GPU: a thread a channel of a sequence, each way."""

import numpy as np

from autograd.arrays import or_zeros
from autograd.cuda.source import Source, contiguous, elements, float32_only
from autograd.device import namespace

SOURCE = Source(__file__)
supports = float32_only


def forward(a, v, alpha, beta, gamma, mean, past, causal):
    xp, (batch, length, width), heads = namespace(v), v.shape, len(alpha)
    a, v, *gains = (contiguous(x) for x in (a, v, alpha, beta, gamma))
    first = xp.zeros((batch, width), np.float32) if mean is None or not past else contiguous(mean)
    y, last = xp.empty_like(v), xp.empty_like(first)
    sizes = first.size, length, width, max(width // heads, 1), past, causal
    SOURCE.launch("mtv_shaping_forward", elements(first.size), a, v, *gains, first, y, last, *sizes)
    return (y, last), (a, v, gains, first, sizes, mean is not None)


def backward(saved, g_y, g_mean):
    a, v, gains, first, sizes, carried = saved
    xp = namespace(v)
    ga, gv, gmean, sums = xp.empty_like(v), xp.empty_like(v), xp.empty_like(first), xp.zeros((3, *first.shape), np.float32)
    SOURCE.launch("mtv_shaping_backward", elements(first.size), a, v, *gains, first, contiguous(or_zeros(g_y, v)),
                  contiguous(or_zeros(g_mean, first)), ga, gv, gmean, sums, *sizes)
    return ga, gv, *sums.sum(axis=1).reshape(3, len(gains[0]), -1).sum(axis=2), gmean if carried else None
