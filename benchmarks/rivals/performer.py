"""Performer's causal FAVOR+ in plain vectorised PyTorch, as performer-pytorch has it, for benchmarks only."""

from __future__ import annotations

import numpy as np

POSITIONS = True
EPS = 1e-4  # added to features; without it a query may see nothing but zeros


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays and parameters for the operator: B 4, H 4, T 2048, head_dim 64, 256 features."""
    batch, heads, length, width, features = 4, 4, 2048, 64, 256
    q, k, v = (rng.standard_normal((batch, heads, length, width)).astype(np.float32) for _ in range(3))
    return (q, k, v, rng.standard_normal((features, width)).astype(np.float32)), {}


def features(x, projection, *, of_keys: bool):
    """Positive features [B H T F], relative to the largest exponent: of each query, or of all keys of a head."""
    x = x * x.shape[-1] ** -0.25
    exponents = x @ projection.T
    top = exponents.amax(dim=(-1, -2) if of_keys else -1, keepdim=True).detach()
    return (exponents - x.square().sum(-1, keepdim=True) / 2 - top).exp() + EPS


def chunkwise(torch, q, k, v, projection, chunk=64):
    """Chunks in parallel, and sums of the states before them; 64 is the fastest of 32, 64, 128, 256 on two cores."""
    q, k = features(q, projection, of_keys=False), features(k, projection, of_keys=True)
    batch, heads, length, _ = q.shape
    rest = -length % chunk
    if rest:
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, rest)) for x in (q, k, v))
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the weights
    q, k, v = (x.reshape(batch, heads, -1, chunk, x.shape[-1]) for x in (q, k, v))
    added = k.transpose(-1, -2) @ v
    y = (q @ k.transpose(-1, -2)).tril() @ v + q @ (added.cumsum(2) - added)
    y = y.reshape(batch, heads, length + rest, -1)[:, :, :length]
    return y[..., :-1] / y[..., -1:]


OPERATORS = {"favor": {"chunkwise": chunkwise}}


def mixer(torch, model, options, layer):
    """The mixer of minitv/variants/performer.py with its default options, drawn once."""
    nn = torch.nn
    heads, size = options.heads, model.width // options.heads

    class Performer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, 3 * model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            rows = [torch.linalg.qr(torch.randn(size, size))[0].T for _ in range(-(-options.random_features // size))]
            lengths = torch.randn(options.random_features, size).norm(dim=1, keepdim=True)
            self.register_buffer("projection", torch.cat(rows)[: options.random_features] * lengths)

        def forward(self, x):
            batch, length, width = x.shape
            q, k, v = (part.view(batch, length, heads, size).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
            y = chunkwise(torch, q, k, v, self.projection)
            y = self.out(y.transpose(1, 2).reshape(batch, length, width))
            return nn.functional.dropout(y, model.dropout, self.training)

    return Performer()
