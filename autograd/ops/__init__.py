"""The generic operators, by kind: elementwise, reduce, scan, shape, index, linalg, conv, fft; a folder where kernels exist."""

from ..tensor import Tensor
from .adamw import adamw
from .causal_conv1d import causal_conv1d
from .conv import conv1d, conv2d
from .cross_entropy import cross_entropy
from .dropout import dropout
from .elementwise import (
    absolute,
    add,
    astype,
    clip,
    cos,
    divide,
    erf,
    exp,
    identity,
    log,
    maximum,
    minimum,
    multiply,
    negative,
    power,
    relu,
    rsqrt,
    sigmoid,
    silu,
    sin,
    softplus,
    sqrt,
    subtract,
    tanh,
    to_device,
    where,
)
from .embedding import embedding
from .fft import complex_multiply, irfft, rfft
from .gelu import gelu, gelu_tanh
from .group_norm import group_norm
from .index import add_along_axis, argsort, gather, getitem, put_add, scatter_add, sort, take_along_axis
from .layer_norm import layer_norm
from .linalg import einsum, matmul
from .linear import linear
from .reduce import log_softmax, logsumexp, max, mean, min, norm, prod, softmax, std, sum, var
from .relu_squared import relu_squared
from .rms_norm import rms_norm
from .scan import cumprod, cumsum, logcumsumexp
from .shape import (
    broadcast_to,
    concat,
    flip,
    pad,
    repeat,
    reshape,
    roll,
    split,
    stack,
    swapaxes,
    tile,
    transpose,
    tril,
    triu,
)

__all__ = [
    "absolute", "adamw", "add", "add_along_axis", "argsort", "astype", "broadcast_to", "causal_conv1d", "clip",
    "complex_multiply", "concat", "conv1d", "conv2d", "cos", "cross_entropy", "cumprod", "cumsum", "divide",
    "dropout", "einsum", "embedding", "erf", "exp", "flip", "gather", "gelu", "gelu_tanh", "getitem", "group_norm",
    "identity", "irfft", "layer_norm", "linear", "log", "log_softmax", "logcumsumexp", "logsumexp", "matmul", "max",
    "maximum", "mean", "min", "minimum", "multiply", "negative", "norm", "pad", "power", "prod", "put_add", "relu",
    "relu_squared", "repeat", "reshape", "rfft", "rms_norm", "roll", "rsqrt", "scatter_add", "sigmoid", "silu",
    "sin", "softmax", "softplus", "sort", "split", "sqrt", "stack", "std", "subtract", "sum", "swapaxes",
    "take_along_axis", "tanh", "tile", "to_device", "transpose", "tril", "triu", "var", "where",
]


def _method(operator):
    def method(self, *args, **kwargs):
        return operator(self, *args, **kwargs)

    method.__name__ = operator.name
    method.__doc__ = operator.__doc__
    return method


# The operators that PyTorch also offers as methods of a tensor.
for _operator in (sum, mean, var, std, max, min, prod, norm, cumsum, cumprod, logcumsumexp, logsumexp, softmax, log_softmax,
                  exp, log, sqrt, rsqrt, tanh, sigmoid, relu, sin, cos, erf, clip, flip, roll, repeat, tile, split,
                  broadcast_to, swapaxes, tril, triu, sort, argsort, gather, matmul):
    setattr(Tensor, _operator.name, _method(_operator))
