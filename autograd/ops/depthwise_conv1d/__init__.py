"""depthwise_conv1d: a short filter per channel over the past and the future.

    y_t = b + Σ_{j < W} weight_j x_{t + ahead - (W - 1 - j)}                        outside of 0 .. T-1, x is 0

Every channel has its own W taps, and channels do not mix. Tap j reads the position t + ahead - (W - 1 - j). With ahead = 0 the
last tap reads position t itself, which is causal_conv1d. With ahead = (W - 1) / 2 the filter is centred and looks as far ahead
as back. Time O(B T C W), memory O(B T C). Gradients, where g_t is the gradient of y_t:

    dx_s = Σ_j weight_j g_{s - ahead + (W - 1 - j)},    dweight_j = Σ_t g_t x_{t + ahead - (W - 1 - j)},    db = Σ_t g_t

dweight and db sum over the batch too. So dx is such a filter of g with its taps in the reverse order, and the kernels are those
of causal_conv1d. Padding is read as what stands in it: a caller who pads sequences sets it to 0 before.
"""

from __future__ import annotations

import numpy as np

from ...errors import DomainError, ShapeError
from ...laws import becomes, causal, independent, law, linear_in
from ...metric import assert_close
from ...op import op
from ..causal_conv1d import causal_conv1d
from ..index import getitem
from ..shape import pad


@op("x[B T C], weight[C W], bias?[C] -> y[B T C]", analytic=True,
    laws=[causal("x", ahead=0), independent("B"), linear_in("x"), linear_in("weight")])
def depthwise_conv1d(x, weight, bias=None, *, ahead=0):
    """y_t = b + Σ_{j < W} weight_j x_{t + ahead - (W - 1 - j)} in each channel, with 0 outside of x; x[B T C], weight[C W].

    ``ahead`` is how many positions after its own an output sees, from 0 (causal) to W - 1: DomainError. A weight without taps
    raises ShapeError.
    """
    out = np.zeros_like(x)
    batch, length, channels = x.shape
    width = weight.shape[1]
    for b, t, c in np.ndindex(batch, length, channels):
        for j in range(width):
            source = t + ahead - (width - 1 - j)
            if 0 <= source < length:
                out[b, t, c] += weight[c, j] * x[b, source, c]
        if bias is not None:
            out[b, t, c] += bias[c]
    return out


@depthwise_conv1d.form
def composed(x, weight, bias, ahead):
    """causal_conv1d of a sequence that has as many zeros behind it as an output looks ahead."""
    longer = pad(x, widths=((0, 0), (0, ahead), (0, 0)))  # [B T+ahead C]
    return getitem(causal_conv1d(longer, weight, bias), key=(slice(None), slice(ahead, None)))


depthwise_conv1d.kernel("cpu")
depthwise_conv1d.kernel("cuda")


@depthwise_conv1d.validate
def _(x, weight, bias, ahead):
    if weight.shape[1] < 1:
        raise ShapeError(f"depthwise_conv1d: weight {weight.shape} needs at least one tap")
    if type(ahead) is not int or not 0 <= ahead < weight.shape[1]:
        raise DomainError(f"depthwise_conv1d: ahead is {ahead!r}, allowed: an integer from 0 to W - 1 = {weight.shape[1] - 1}")


@depthwise_conv1d.inputs
def _(draw):
    channels, width = draw.size(0, 3, "C"), draw.size(1, 4, "W")
    bias = draw.floats(channels) if draw.boolean() else None
    return ((draw.floats(draw.size(0, 2, "B"), draw.size(0, 5, "T"), channels), draw.floats(channels, width), bias),
            {"ahead": draw.integer(0, width - 1)})


# -- laws --------------------------------------------------------------------------------------------------------------
@becomes(depthwise_conv1d, "causal_conv1d", "as many zeros follow the sequence as it looks ahead")
def _(case, draw):
    longer = np.pad(case.x, ((0, 0), (0, case.ahead), (0, 0)))
    expected = causal_conv1d.definition(longer.astype(np.float64), case.weight.astype(np.float64), case.bias)
    assert_close(case().y, expected[:, case.ahead :], "it is another filter", terms=16)


@law(depthwise_conv1d, "a centred filter that is the same backwards reads a sequence backwards alike")
def _(case, draw):
    if case.weight.shape[1] == 2 * case.ahead + 1:
        weight = case.weight + case.weight[:, ::-1]
        assert_close(case(x=case.x[:, ::-1], weight=weight).y, case(weight=weight).y[:, ::-1], "it has a direction", terms=16)
