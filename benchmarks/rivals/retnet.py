"""RetNet in plain vectorised PyTorch: what a good PyTorch user would write, for benchmarks only."""

from __future__ import annotations

import numpy as np

POSITIONS = False


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays and parameters for the operator: B 8, H 4, T 2048, head_dim 64."""
    batch, heads, length, width = 8, 4, 2048, 64
    q, k, v = (rng.standard_normal((batch, heads, length, width)).astype(np.float32) for _ in range(3))
    return (q, k, v, (1 - 2.0 ** (-5 - np.arange(heads))).astype(np.float32)), {}


def decays(torch, decay, length):
    """decay^(i-j) for i >= j, else 0: [H T T]."""
    step = torch.arange(length, device=decay.device)
    lag = step[:, None] - step
    return torch.where(lag >= 0, decay[:, None, None] ** lag.clamp(min=0), 0.0)


def parallel(torch, q, k, v, decay):
    """All scores at once."""
    return (q @ k.transpose(-1, -2) * decays(torch, decay, q.shape[2])) @ v


def chunkwise(torch, q, k, v, decay, chunk=64):
    """Chunks in parallel, and a short loop over their states; 64 is the fastest of 32, 64, 128, 256 on two cores."""
    batch, heads, length, _ = q.shape
    count, step = length // chunk, torch.arange(chunk)
    q, k, v = (x.reshape(batch, heads, count, chunk, x.shape[-1]) for x in (q, k, v))
    first, last = (decay[:, None] ** e for e in (step + 1.0, chunk - 1.0 - step))
    y = (q @ k.transpose(-1, -2) * decays(torch, decay, chunk)[:, None]) @ v
    added = (k * last[:, None, :, None]).transpose(-1, -2) @ v
    state, states, whole = torch.zeros_like(added[:, :, 0]), [], (decay**chunk)[:, None, None]
    for i in range(count):
        states.append(state)
        state = whole * state + added[:, :, i]
    y = y + first[:, None, :, None] * (q @ torch.stack(states, 2))
    return y.reshape(batch, heads, length, v.shape[-1])


OPERATORS = {"retention": {"chunkwise": chunkwise, "parallel": parallel}}


def mixer(torch, model, options, layer):
    """The mixer of minitv/variants/retnet.py with its default options, by the parallel form, as torchscale trains."""
    nn, F = torch.nn, torch.nn.functional
    width, heads, values = model.width, options.heads, round(options.value_width * model.width)
    head_dim = width // heads

    class Retention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = (nn.Linear(width, width, bias=model.bias) for _ in range(2))
            self.v, self.gate = (nn.Linear(width, values, bias=model.bias) for _ in range(2))
            self.out = nn.Linear(values, width, bias=model.bias)
            for linear in (self.q, self.k, self.v, self.gate):
                nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
            nn.init.xavier_uniform_(self.out.weight)
            turned = torch.arange(model.context)[:, None] * 10_000.0 ** -torch.linspace(0, 1, head_dim // 2)
            self.register_buffer("cos", turned.cos())
            self.register_buffer("sin", turned.sin())
            mask = decays(torch, 1 - 2.0 ** (-5 - torch.arange(heads)), model.context)
            self.register_buffer("mask", mask / mask.sum(-1, keepdim=True).sqrt())  # of one length, that of training

        def rotate(self, x):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).flatten(-2)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = (part(x).view(batch, length, heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
            scores = self.rotate(q) @ (self.rotate(k) * head_dim**-0.5).transpose(-1, -2) * self.mask
            scores = scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1)
            y = F.layer_norm((scores @ v).transpose(1, 2), (values // heads,)).reshape(batch, length, values)
            return F.dropout(self.out(F.silu(self.gate(x)) * y), model.dropout, self.training)

    return Retention()
