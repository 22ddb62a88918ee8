"""A step of a whole Transformer on the CPU: one token through all layers, with the cache of keys and values.

All weights are one matrix with a row a layer. The keys are kept transposed, [L H head_dim context], so that the scores of a
query are sums of whole vectors.
"""

import numpy as np

from autograd.kernel_math import exp
from autograd.kernels import cpu_kernel
from autograd.ops.gelu.cpu import _gelu, _gelu_tanh
from autograd.ops.layer_norm.cpu import _forward as _layer_norm
from autograd.ops.rms_norm.cpu import _forward as _rms_norm

GELU, GELU_TANH, RELU_SQUARED, SILU = range(4)


@cpu_kernel
def _take(weights, at, size):
    """The next ``size`` numbers of a layer's weights, and where they end."""
    return weights[at : at + size], at + size


@cpu_kernel
def _linear(weights, at, x, y, add):
    """y = W x + b, added to y if ``add``; returns where b ends. W[y, x] and b follow each other in the layer's weights."""
    (rows, columns), zero = (y.size, x.size), x.dtype.type(0)
    bias = weights[at + rows * columns : at + rows * columns + rows]
    for i in range(rows):
        row, total = weights[at + i * columns : at + (i + 1) * columns], zero
        for j in range(columns):
            total += row[j] * x[j]
        y[i] = total + bias[i] + (y[i] if add else zero)
    return at + rows * columns + rows


@cpu_kernel
def _norm(weights, at, x, eps, centered, y, spare):
    """y = norm(x), by layer_norm or rms_norm; returns where its weight and bias end."""
    width = x.size
    weight, bias = weights[at : at + width], weights[at + width : at + 2 * width]
    row, out, means, scales = x.reshape(1, width), y.reshape(1, width), spare[:1], spare[1:2]
    if centered:
        _layer_norm(row, weight, bias, eps, out, means, scales)
    else:
        _rms_norm(row, weight, eps, out, scales)
    return at + 2 * width


@cpu_kernel
def _activate(x, activation, y, spare):
    """y = f(x), the feed-forward network's function."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    if activation == GELU:
        _gelu(x, y, spare)
    elif activation == GELU_TANH:
        _gelu_tanh(x, y, spare)
    elif activation == RELU_SQUARED:
        for i in range(x.size):
            y[i] = x[i] * x[i] if x[i] > 0 or x[i] != x[i] else zero
    else:
        for i in range(x.size):
            y[i] = x[i] / (one + exp(-x[i]))


@cpu_kernel
def _attend(query, keys, values, seen, scale, y, scores):
    """One head: y = softmax(scale · query · keys[:, :seen]) values[:seen]."""
    zero, one = query.dtype.type(0), query.dtype.type(1)
    for j in range(seen):
        scores[j] = zero
    for c in range(query.size):
        row, factor = keys[c], query[c] * scale
        for j in range(seen):
            scores[j] += factor * row[j]
    top, total = scores[0], zero
    for j in range(seen):
        top = scores[j] if scores[j] > top else top
    for j in range(seen):
        weight = exp(scores[j] - top)
        scores[j] = weight
        total += weight
    for c in range(y.size):
        y[c] = zero
    for j in range(seen):
        row, weight = values[j], scores[j] * (one / total)
        for c in range(y.size):
            y[c] += weight * row[c]


@cpu_kernel
def step(token, past, embedding, positions, layers, last, head, eps, centered, activation, keys, values, hidden, logits):
    """The logits after ``token``, which follows ``past`` others; its keys and values join theirs."""
    width, context, (heads, size) = embedding.shape[1], positions.shape[0], keys.shape[1:3]
    scale = embedding.dtype.type(1 / np.sqrt(size))
    memory = np.empty(6 * width + 2 * hidden + max(2, hidden, context), embedding.dtype)
    x, at = _take(memory, 0, width)
    h, at = _take(memory, at, width)
    y, at = _take(memory, at, width)
    qkv, at = _take(memory, at, 3 * width)
    wide, at = _take(memory, at, hidden)
    activated, at = _take(memory, at, hidden)
    spare = memory[at:]
    for c in range(width):
        x[c] = embedding[token, c] + positions[past, c]
    for layer in range(layers.shape[0]):
        weights = layers[layer]
        at = _norm(weights, 0, x, eps, centered, h, spare)
        at = _linear(weights, at, h, qkv, False)
        for b in range(heads):
            k, v = qkv[width + b * size : width + (b + 1) * size], qkv[2 * width + b * size : 2 * width + (b + 1) * size]
            for c in range(size):
                keys[layer, b, c, past] = k[c]
                values[layer, b, past, c] = v[c]
            part = slice(b * size, (b + 1) * size)
            _attend(qkv[part], keys[layer, b], values[layer, b], past + 1, scale, y[part], spare)
        at = _linear(weights, at, y, x, True)
        at = _norm(weights, at, x, eps, centered, h, spare)
        at = _linear(weights, at, h, wide, False)
        _activate(wide, activation, activated, spare[:hidden])
        at = _linear(weights, at, activated, x, True)
    _norm(last, 0, x, eps, centered, h, spare)
    _linear(head, 0, h, logits, False)
