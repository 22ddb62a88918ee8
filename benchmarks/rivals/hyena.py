"""Hyena in PyTorch: long convolutions by torch.fft, over all channels and the whole batch at once."""

from __future__ import annotations

import itertools
import math

import numpy as np

POSITIONS = False


def inputs(rng: np.random.Generator):
    """The arrays and parameters of a call of long_conv."""
    batch, length, width = 4, 4096, 256
    x, taps = (rng.standard_normal(shape).astype(np.float32) for shape in ((batch, length, width), (length, width)))
    return (x, taps / math.sqrt(length), rng.standard_normal(width).astype(np.float32)), {}


def fft(torch, x, filter, skip):
    """Channels first inside: the transforms then run over contiguous memory, which is faster by more than the copies take."""
    length = x.shape[1]
    return convolve(torch, x.transpose(1, 2).contiguous(), filter.T.contiguous(), skip, length).transpose(1, 2)


def fft_channels_last(torch, x, filter, skip):
    """Without copies."""
    length, points = x.shape[1], 2 * x.shape[1]
    spectrum = torch.fft.rfft(x, n=points, dim=1) * torch.fft.rfft(filter, n=points, dim=0)
    return torch.fft.irfft(spectrum, n=points, dim=1)[:, :length] + x * skip


OPERATORS = {"long_conv": {"torch.fft": fft, "torch.fft, channels last": fft_channels_last}}


def convolve(torch, x, filter, skip, length: int):
    """x[B D T] with filter[D at most 2 T], on a circle of 2 T points."""
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(filter, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length] + x * skip[:, None]


def features_and_window(torch, options, context: int, channels: int):
    """What the network of a filter reads at each of ``context`` lags [T 2K+1], and its windows [T channels]."""
    bands, position = options.filter_bands, torch.arange(context)[:, None]
    angles = torch.linspace(1e-4, bands - 1, bands) * 2 * math.pi * position / context
    time = position / (context - 1)
    slow, fast = (-math.log(0.01) / part for part in (options.slow_decay, options.fast_decay))
    return (torch.cat([time, torch.cos(angles), -torch.sin(angles)], dim=1),
            torch.exp(-time * torch.linspace(slow, fast, channels)))


def mixer(torch, model, options, layer: int):
    """The mixer as a module B T D -> B T D, with as many parameters as ours."""
    from torch import nn
    from torch.nn import functional as F

    width, order, context = model.width, options.order, model.context

    class Filters(nn.Module):
        def __init__(self):
            super().__init__()
            hidden, bands = options.filter_width, options.filter_bands
            table, window = features_and_window(torch, options, context, (order - 1) * width)
            self.register_buffer("table", table)
            self.register_buffer("window", window)
            self.features = nn.Parameter(torch.zeros_like(self.table)) if options.features_lr else None
            sizes = [2 * bands + 1, *[hidden] * (options.filter_depth - 1)]
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
            self.out = nn.Linear(hidden, (order - 1) * width, bias=False)
            self.frequency = nn.Parameter(torch.full((hidden,), options.sine_frequency))

        def forward(self, length):
            x = self.table[:length]
            if self.features is not None:
                x = x + options.features_lr * self.features[:length]
            for linear in self.layers:
                x = torch.sin(self.frequency * linear(x))
            return (self.out(x) * self.window[:length]).T.chunk(order - 1)

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            channels = (order + 1) * width
            self.project = nn.Linear(width, channels, bias=model.bias)
            self.short = nn.Conv1d(channels, channels, options.short_filter, groups=channels, bias=model.bias,
                                   padding=options.short_filter - 1)
            self.filters = Filters()
            self.skip = nn.Parameter(torch.randn((order - 1) * width))
            self.out = nn.Linear(width, width, bias=model.bias)

        def forward(self, x):
            length = x.shape[1]
            *gates, v = self.short(self.project(x).transpose(1, 2))[..., :length].chunk(order + 1, dim=1)
            filters, skips = self.filters(length), self.skip.chunk(order - 1)
            for o in range(order - 1):
                a = F.dropout(v * gates[-1 - o], model.dropout, self.training)
                v = convolve(torch, a, filters[o], skips[o], length)
            return F.dropout(self.out((v * gates[0]).transpose(1, 2)), model.dropout, self.training)

    return Mixer()
