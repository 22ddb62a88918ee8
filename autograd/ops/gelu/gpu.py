"""gelu and gelu_tanh on a GPU: an element a thread; backward needs only x."""

from ...cuda.source import SHORT, Source, ceil_div, contiguous, float32_only, storage
from ...device import namespace

SOURCE = Source(__file__, SHORT)
supports = tanh_supports = float32_only


def _apply(kernel, *arrays):
    xp = namespace(*arrays)
    arrays = [contiguous(x) for x in arrays]
    out = xp.empty_like(arrays[0])
    if out.size:
        SOURCE.launch(kernel, ceil_div(out.size, 256), *arrays, out, out.size, options=storage(out))
    return out


def forward(x):
    return _apply("mtv_gelu_forward", x), x


def backward(saved, g):
    return (_apply("mtv_gelu_backward", saved, g),)


def tanh_forward(x):
    return _apply("mtv_gelu_tanh_forward", x), x


def tanh_backward(saved, g):
    return (_apply("mtv_gelu_tanh_backward", saved, g),)
