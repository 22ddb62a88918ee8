"""dropout on a GPU: the mask is drawn in the kernel, with the bits of the CPU, and drawn again in backward."""

from ...cuda.source import Source, ceil_div, contiguous, elements, float32_only
from ...device import namespace

SOURCE = Source(__file__)
supports = float32_only


def _drop(x, p, seed):
    x = contiguous(x)
    y = namespace(x).empty_like(x)
    SOURCE.launch("mtv_dropout", elements(ceil_div(x.size, 4)), x, y, x.size, round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0,
                  seed)
    return y


def forward(x, p, seed):
    return _drop(x, p, seed), (p, seed)


def backward(saved, g):
    return (_drop(g, *saved),)
