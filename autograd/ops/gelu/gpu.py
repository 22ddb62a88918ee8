"""gelu and gelu_tanh on a GPU: an element a thread; backward needs only x."""

from ...cuda.source import Source, apply, float32_only

SOURCE = Source(__file__)
supports = tanh_supports = float32_only


def forward(x):
    return apply(SOURCE, "mtv_gelu_forward", x), x


def backward(saved, g):
    return (apply(SOURCE, "mtv_gelu_backward", saved, g),)


def tanh_forward(x):
    return apply(SOURCE, "mtv_gelu_tanh_forward", x), x


def tanh_backward(saved, g):
    return (apply(SOURCE, "mtv_gelu_tanh_backward", saved, g),)
