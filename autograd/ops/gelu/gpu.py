"""gelu and gelu_tanh on a GPU: an element a thread; backward needs only x."""

from ...cuda.source import Source, contiguous, elements, float32_only
from ...device import namespace

SOURCE = Source(__file__)
supports = tanh_supports = float32_only


def _apply(kernel, *arrays):
    arrays = [contiguous(x) for x in arrays]
    out = namespace(*arrays).empty_like(arrays[0])
    SOURCE.launch(kernel, elements(out.size), *arrays, out, out.size)
    return out


def forward(x):
    return _apply("mtv_gelu_forward", x), x


def backward(saved, g):
    return (_apply("mtv_gelu_backward", saved, g),)


def tanh_forward(x):
    return _apply("mtv_gelu_tanh_forward", x), x


def tanh_backward(saved, g):
    return (_apply("mtv_gelu_tanh_backward", saved, g),)
