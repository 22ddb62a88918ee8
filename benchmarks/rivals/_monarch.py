"""Monarch Mixer in PyTorch: what both variants share. Long convolutions by torch.fft, blocks by one batched product each."""

from __future__ import annotations

import itertools

from .hyena import convolve, features_and_window


def mixer(torch, model, options, both: bool):
    """The mixer with our default --monarch-order and --lag-zero, as many parameters as ours."""
    nn, functional = torch.nn, torch.nn.functional
    width, context = model.width, model.context

    class Filter(nn.Module):
        """The taps of a convolution: [D T], or [D 2T] in both directions."""

        def __init__(self):
            super().__init__()
            hidden, bands = options.filter_width, options.filter_bands
            table, window = features_and_window(torch, options, context, width)
            self.register_buffer("table", table)
            self.register_buffer("window", window)
            self.features = nn.Parameter(torch.zeros_like(self.table)) if options.features_lr else None
            sizes = [2 * bands + 1, *[hidden] * (options.filter_depth - 1)]
            self.networks = nn.ModuleList(
                nn.ModuleList([*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)), nn.Linear(hidden, width, bias=False)])
                for _ in range(1 + both))
            self.frequency = nn.Parameter(torch.full((hidden,), options.sine_frequency))
            self.skip = nn.Parameter(torch.randn(width))

        def taps(self, network, length):
            x = self.table[:length]
            if self.features is not None:
                x = x + options.features_lr * self.features[:length]
            for linear in network[:-1]:
                x = torch.sin(self.frequency * linear(x))
            return (network[-1](x) * self.window[:length]).T

        def forward(self, x):
            parts = [self.taps(network, x.shape[-1]) for network in self.networks]
            taps = torch.cat([parts[0], parts[1].flip(-1)], dim=1) if both else parts[0]
            return convolve(torch, x, taps, self.skip, x.shape[-1])

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(width, bias=model.bias) if options.input_norm else nn.Identity()
            self.project, self.out = (nn.Linear(width, n * width, bias=model.bias) for n in (3, 1))
            self.short = nn.Conv1d(3 * width, 3 * width, options.short_filter, groups=3 * width, bias=model.bias,
                                   padding=options.short_filter - 1)
            self.gated, self.residual = Filter(), Filter() if options.residual_conv else None

        def forward(self, x):
            u = self.norm(x)
            x1, x2, v = self.short(self.project(u).transpose(1, 2))[..., : x.shape[1]].chunk(3, dim=1)
            y = self.gated(functional.dropout(v * x1, model.dropout, self.training)) * x2
            if self.residual is not None:
                y = y + self.residual(u.transpose(1, 2))
            return functional.dropout(self.out(y.transpose(1, 2)), model.dropout, self.training)

    return Mixer()


def feed_forward(torch, model, options, layer):
    """The gated unit of block-diagonal matrices."""
    nn, functional = torch.nn, torch.nn.functional
    width, blocks = model.width, options.blocks
    hidden = max(1, round(model.ffn_multiple * width / blocks)) * blocks
    activation = {"gelu": functional.gelu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
                  "silu": functional.silu}[model.activation]

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.empty(blocks, a // blocks, b // blocks))
                                  for a, b in ((width, 2 * hidden), (hidden, width)))
            self.bias = nn.Parameter(torch.zeros(width)) if model.bias else None

        def blockwise(self, x, weight):
            if options.permute:
                parts = x.unflatten(-1, (-1, blocks)).permute(3, 0, 1, 2).flatten(1, 2)  # [G B·T J]
            else:
                parts = x.unflatten(-1, (blocks, -1)).permute(2, 0, 1, 3).flatten(1, 2)
            return (parts @ weight).permute(1, 0, 2).reshape(*x.shape[:-1], -1)

        def forward(self, x):
            gate, value = self.blockwise(x, self.up).chunk(2, dim=-1)
            y = self.blockwise(functional.dropout(activation(gate) * value, model.dropout, self.training), self.down)
            return y if self.bias is None else y + self.bias

    return FeedForward()
