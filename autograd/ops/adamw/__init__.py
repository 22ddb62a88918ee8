"""adamw: one optimiser step over flat buffers. Loshchilov and Hutter 2019, arXiv 1711.05101."""

from __future__ import annotations

import math

from ...errors import DomainError
from ...op import op
from ..elementwise import ieee


@op("param[N], grad[N], m[N], v[N] -> param[N], m[N], v[N]", differentiable=False)
def adamw(param, grad, m, v, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decayed=0, step=1, scale=1.0):
    """g = scale·grad; m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; param ← param (1 - lr·wd) - lr m̂ / (√v̂ + eps).

    m̂ = m / (1-β₁^step), v̂ = v / (1-β₂^step); only the first ``decayed`` elements get weight decay. Returns new arrays.
    ``scale`` is the factor of global-norm clipping.
    """
    param, m, v = param.copy(), m.copy(), v.copy()
    for i in range(len(param)):
        g = grad[i].item() * scale
        m[i] = beta1 * m[i].item() + (1 - beta1) * g
        v[i] = beta2 * v[i].item() + (1 - beta2) * g * g
        kept = param[i].item() * (1 - lr * weight_decay if i < decayed else 1)
        corrected = ieee(math.sqrt, v[i].item() / (1 - beta2**step))
        param[i] = kept - lr * (m[i].item() / (1 - beta1**step)) / (corrected + eps)
    return param, m, v


@adamw.primitive
def _(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, decayed, step, scale):
    g = grad * scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    param = param.copy()
    param[:decayed] *= 1 - lr * weight_decay
    return param - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)) ** 0.5 + eps), m, v


adamw.kernel("cpu")
adamw.kernel("cuda")


@adamw.validate
def _(param, grad, m, v, lr, beta1, beta2, eps, weight_decay, decayed, step, scale):
    if step < 1 or not 0 <= decayed <= len(param):
        raise DomainError(f"adamw: needs step >= 1 and 0 <= decayed <= {len(param)}, got {step} and {decayed}")


@adamw.inputs
def _(draw):
    n = draw.size(0, 9, "N")
    arrays = draw.floats(n), draw.floats(n), draw.floats(n), draw.floats(n, low=0.1, high=1.0)
    return arrays, {"lr": 0.01, "weight_decay": 0.1, "decayed": draw.integer(0, n), "step": draw.integer(1, 5),
                    "scale": draw.choice((1.0, 0.5))}
