"""A filter per channel in PyTorch: Conv1d with as many groups as channels, which come last as in the layers around it."""

from __future__ import annotations

import numpy as np


def native(torch, x, weight, bias, ahead):
    """Conv1d wants the channels before the positions, and pads both ends alike."""
    assert weight.shape[1] == 2 * ahead + 1
    y = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=ahead, groups=len(weight))
    return y.transpose(1, 2)


OPERATORS = {"depthwise_conv1d": {"conv1d by groups": native}}


def inputs(rng):
    """Twenty seconds of speech in Conformer's middle model: B 16, T 500, C 256, 31 taps."""
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 500, 256), (256, 31), (256,)))
    return [x, weight, bias], {"ahead": 15}
