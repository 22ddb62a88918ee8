"""RWKV-4 in plain PyTorch, for benchmarks only: time mixing is a loop over positions, the one form without a CUDA kernel."""

from __future__ import annotations

import numpy as np

POSITIONS = False


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays and parameters for the operator: B 8, T 1024, C 512."""
    batch, length, width = 8, 1024, 512
    k, v = (rng.standard_normal((batch, length, width)).astype(np.float32) for _ in range(2))
    w = -np.exp(-5 + 8 * np.linspace(0, 1, width) ** 0.7)
    return (k, v, w.astype(np.float32), rng.standard_normal(width).astype(np.float32)), {}


def loop(torch, k, v, w, u):
    """The sums with their largest exponent taken out, position after position."""
    torch.set_flush_denormal(True)  # gradients that fade away become subnormal numbers, 16 times slower on a CPU
    a, b, p = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], -1e38)
    ys = []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        now = u + key
        top = torch.maximum(p, now)
        past, present = torch.exp(p - top), torch.exp(now - top)
        ys.append((past * a + present * value) / (past * b + present))
        faded = p + w
        p = torch.maximum(faded, key)
        past, present = torch.exp(faded - p), torch.exp(key - p)
        a, b = past * a + present * value, past * b + present
    return torch.stack(ys, 1)


OPERATORS = {"wkv": {"loop": loop}}


def _shift(torch):
    """A module that mixes every position with the one before, once for each name."""
    class Shift(torch.nn.Module):
        def __init__(self, width, count):
            super().__init__()
            self.mixes = torch.nn.Parameter(torch.rand(count, width))

        def forward(self, x):
            before = torch.nn.functional.pad(x, (0, 0, 1, -1))
            return [torch.lerp(before, x, mix) for mix in self.mixes]

    return Shift


def mixer(torch, model, options, layer):
    nn, width = torch.nn, model.width

    class TimeMix(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(width, bias=model.bias) if layer == 0 else None  # has the cost of that after the embedding
            self.shift = _shift(torch)(width, 3)
            self.key, self.value, self.receptance, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.decay = nn.Parameter(torch.linspace(-5, 3, width))
            self.first = nn.Parameter(torch.zeros(width))

        def forward(self, x):
            k, v, r = self.shift(x if self.norm is None else self.norm(x))
            y = loop(torch, self.key(k), self.value(v), -torch.exp(self.decay), self.first)
            return nn.functional.dropout(self.out(torch.sigmoid(self.receptance(r)) * y), model.dropout, self.training)

    return TimeMix()


def feed_forward(torch, model, options, layer):
    nn, width = torch.nn, model.width
    hidden = round((options.ffn_width or model.ffn_multiple) * width)

    class ChannelMix(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = _shift(torch)(width, 2)
            self.key, self.value = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
            self.receptance = nn.Linear(width, width, bias=False)

        def forward(self, x):
            k, r = self.shift(x)
            k = nn.functional.relu(self.key(k)).square()
            return nn.functional.dropout(torch.sigmoid(self.receptance(r)) * self.value(k), model.dropout, self.training)

    return ChannelMix()
