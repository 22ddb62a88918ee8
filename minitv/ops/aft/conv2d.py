"""aft_conv2d: aft_conv for the pixels of an image, the form that the paper evaluates (Zhai et al. 2021, 2105.14103, eq. 6).

    y_p = sigmoid(q_p) Σ_r e^(k_r + w_{p-r}) v_r / Σ_r e^(k_r + w_{p-r})       over all pixels r, in each channel of a head

w_{p-r} is 0 where r is not in the M × N pixels around p. minitv/ops/aft/__init__.py has the gradients and what all AFT
operators share.
"""

from __future__ import annotations

import numpy as np

from autograd.device import namespace
from autograd.errors import ShapeError
from autograd.laws import becomes, independent, linear_in, shift_invariant
from autograd.metric import assert_close
from autograd.op import op
from autograd.ops import reshape, transpose, where

from .common import (
    check_heads,
    draw_bias,
    draw_keys,
    everything,
    gate,
    joined,
    masked,
    mean_of,
    over_pairs,
    within_the_values,
)
from .conv import aft_conv


@op("q[B Y X C], k[B Y X H], v[B Y X C], bias[H M N], mask?:bool[B Y X] -> y[B Y X C]",
    laws=[independent("B"), linear_in("v"), masked,
          within_the_values("v"), shift_invariant("k", "all keys")])
def aft_conv2d(q, k, v, bias, mask=None):
    """aft_conv for the pixels of an image: bias[h, i, j] belongs to the key at (y + M//2 - i, x + N//2 - j); all keys are seen.

    q, v [B Y X C], k[B Y X H], bias[H M N], mask[B Y X]. An even M or N, and an H that does not divide C, raise ShapeError.
    """
    k, v = everything(k, v, mask)
    (_, rows, columns, channels), (heads, height, width), out = q.shape, bias.shape, np.zeros_like(q)
    for b, y, x, h in np.ndindex(*q.shape[:3], heads):
        exponents = k[b, :, :, h].copy()
        for i, j in np.ndindex(height, width):
            at = y + height // 2 - i, x + width // 2 - j
            if 0 <= at[0] < rows and 0 <= at[1] < columns:
                exponents[at] += bias[h, i, j]
        part = slice(h * channels // heads, (h + 1) * channels // heads)
        mean, _ = mean_of(exponents.ravel().tolist(), v[b, :, :, part].reshape(rows * columns, -1))
        out[b, y, x, part] = gate(q[b, y, x, part]) * mean  # (6)
    return out


@aft_conv2d.form
def parallel(q, k, v, bias, mask):
    """A softmax over all pairs of pixels, [B Y·X Y·X H]: O((Y X)²) time and memory."""
    xp, (batch, rows, columns) = namespace(q.data), q.shape[:3]
    k, v = joined(k, v, mask)
    pixels, wide = xp.arange(rows * columns), max(columns, 1)
    lags = [at[:, None] - at + size // 2 for at, size in zip((pixels // wide, pixels % wide), bias.shape[1:], strict=True)]
    inside = [(lag >= 0) & (lag < size) for lag, size in zip(lags, bias.shape[1:], strict=True)]
    i, j = (xp.where(inside[0] & inside[1], lag, 0) for lag in lags)
    whole = where((inside[0] & inside[1])[..., None], transpose(bias, (1, 2, 0))[i, j], 0.0)
    flat = [reshape(x, (batch, rows * columns, *x.shape[3:])) for x in (q, k, v)]
    return reshape(over_pairs(*flat, whole, xp.ones(whole.shape[:2], bool)), q.shape)


aft_conv2d.kernel("cpu", prefix="conv2d_")
aft_conv2d.kernel("cuda", prefix="conv2d_")


@becomes(aft_conv2d, "aft_conv", "the image is one row")
def _(case, draw):
    if not case.q.shape[1]:
        return
    row = {name: x[:, :1] for name, x in case.present("q k v mask").items()}
    flat = {name: x[:, 0] for name, x in row.items()}
    conv = case.defined_by(aft_conv, **flat, bias=case.bias[:, case.bias.shape[1] // 2], causal=False).y
    assert_close(case(**row).y[:, 0], conv, "an image of one row is not aft_conv", terms=16)


@aft_conv2d.validate
def _(q, k, v, bias, mask):
    check_heads("aft_conv2d", q, k)
    if not all(size % 2 for size in bias.shape[1:]):
        raise ShapeError(f"aft_conv2d: bias {bias.shape} needs an odd number of rows M and of columns N")


@aft_conv2d.inputs
def _(draw):
    lead, heads, size = (draw.size(0, 2), draw.integer(0, 4), draw.size(0, 3)), draw.size(1, 2), draw.size(1, 2)
    mask = draw.mask(*lead) if draw.boolean() else None
    keys = draw_keys(draw, lead[0], lead[1] * lead[2], heads).reshape(*lead, heads)
    bias = draw_bias(draw, heads, 2 * draw.size(1, 2) - 1, 2 * draw.size(1, 2) - 1)
    return (draw.floats(*lead, heads * size), keys, draw.floats(*lead, heads * size), bias, mask), {}
