"""dropout on a GPU: the mask is drawn in the kernel, with the bits of the CPU, and drawn again in backward."""

from ...cuda.source import SHORT, Source, ceil_div, contiguous, float32_only, storage
from ...device import namespace

SOURCE = Source(__file__, SHORT)
supports = float32_only


def _drop(x, p, seed):
    xp = namespace(x)
    x = contiguous(x)
    y = xp.empty_like(x)
    if x.size:
        SOURCE.launch("mtv_dropout", ceil_div(x.size, 4 * 256), x, y, x.size, round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0,
                      seed, options=storage(x))
    return y


def forward(x, p, seed):
    return _drop(x, p, seed), (p, seed)


def backward(saved, g):
    return (_drop(g, *saved),)
