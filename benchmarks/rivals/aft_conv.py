"""AFT-conv in plain vectorised PyTorch, as the paper writes it: a convolution with e^w - 1, and cumulative sums."""

from . import _aft
from ._aft import POSITIONS, exponentials, module  # noqa: F401

HEADS, WINDOW = 16, 32


def convolution(torch, q, k, v, bias):
    (heads, window), size = bias.shape, v.shape[2] // k.shape[2]
    e = exponentials(k)
    columns = torch.cat([e.repeat_interleave(size, dim=2) * v, e], dim=2).transpose(1, 2)
    taps = torch.cat([bias.repeat_interleave(size, dim=0), bias]).flip(1).expm1()
    padded = torch.nn.functional.pad(columns, (window - 1, 0))
    near = torch.nn.functional.conv1d(padded, taps[:, None], groups=len(taps))
    numerator, total = (near + columns.cumsum(dim=2)).transpose(1, 2).split([v.shape[2], heads], dim=2)
    return torch.sigmoid(q) * numerator / total.repeat_interleave(size, dim=2)


OPERATORS = {"aft_conv": {"convolution": convolution}}


def inputs(rng):
    return _aft.inputs(rng, HEADS, WINDOW, heads=HEADS)


def mixer(torch, model, options, layer):
    heads = options.heads or model.width

    def mix(block, q, k, v):
        raw = block.conv_weight
        unit = (raw - raw.mean(dim=1, keepdim=True)) / raw.std(dim=1, keepdim=True, correction=0)
        return convolution(torch, q, k, v, block.conv_gain[:, None] * unit + block.conv_bias[:, None])

    return module(torch, model, options, heads, mix, conv_weight=torch.randn(heads, options.window),
                  conv_gain=torch.zeros(heads), conv_bias=torch.zeros(heads))
