"""Kernels for one token that every decoder has: linear layers, norms, the feed-forward network, and the head.

Mixers have a file of their own, cpu_<variant>.py. Weights are the model's; a layer without rows is none.
"""

from autograd.cpu.compile import cpu_kernel
from autograd.cpu.math import exp
from autograd.ops.gelu.cpu import gelu_row, gelu_tanh_row
from autograd.ops.layer_norm.cpu import layer_norm_rows
from autograd.ops.relu_squared.cpu import relu_squared_row
from autograd.ops.rms_norm.cpu import rms_norm_rows

from ..ops.gated.cpu import FAR

GELU, GELU_TANH, RELU_SQUARED, SILU = range(4)


@cpu_kernel
def take(memory, at, size):
    """The next ``size`` numbers of the scratch memory, and where they end."""
    return memory[at : at + size], at + size


@cpu_kernel
def linear(weight, bias, x, y, add):
    """y = W x + b, added to y if ``add``."""
    zero = x.dtype.type(0)
    for i in range(weight.shape[0]):
        total = zero
        for j in range(weight.shape[1]):
            total += weight[i, j] * x[j]
        y[i] = total + bias[i] + (y[i] if add else zero)


@cpu_kernel
def norm(x, affine, eps, centered, y, spare):
    """y = norm(x), by layer_norm or rms_norm; ``affine`` [2, width] are weight and bias."""
    width = x.size
    row, out, shifts, scales = x.reshape(1, width), y.reshape(1, width), spare[:1], spare[1:2]
    if centered:
        layer_norm_rows(row, affine[0], affine[1], eps, out, shifts, scales)
    else:
        rms_norm_rows(row, affine[0], eps, out, scales)


@cpu_kernel
def activate(x, activation, y, spare):
    """y = f(x), the feed-forward network's function."""
    one, far = x.dtype.type(1), x.dtype.type(FAR)
    if activation == GELU:
        gelu_row(x, y, spare)
    elif activation == GELU_TANH:
        gelu_tanh_row(x, y, spare)
    elif activation == RELU_SQUARED:
        relu_squared_row(x, y)
    else:
        for i in range(x.size):
            v = -far if x[i] < -far else x[i]
            y[i] = v / (one + exp(-v))


@cpu_kernel
def feed_forward(x, affine, eps, centered, up, up_bias, gate, gate_bias, down, down_bias, activation, memory):
    """x += W₂ f(W₁ h), or W₂ (f(W₁ h) · W₃ h), with h = norm(x); a gate W₃ without rows is no gate."""
    h, at = take(memory, 0, x.size)
    wide, at = take(memory, at, len(up))
    activated, at = take(memory, at, len(up))
    norm(x, affine, eps, centered, h, memory[at:])
    linear(up, up_bias, h, wide, False)
    activate(wide, activation, activated, memory[at:])
    if len(gate):
        linear(gate, gate_bias, h, wide, False)
        for i in range(wide.size):
            activated[i] *= wide[i]
    linear(down, down_bias, activated, x, True)


@cpu_kernel
def head(x, affine, eps, centered, weight, bias, logits, memory):
    h, at = take(memory, 0, x.size)
    norm(x, affine, eps, centered, h, memory[at:])
    linear(weight, bias, h, logits, False)
