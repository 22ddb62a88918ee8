"""Simplified blocks in PyTorch: scaled_dot_product_attention, and cumulative sums for the part of C."""

from __future__ import annotations

import numpy as np

POSITIONS = True


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays and parameters for the operator: B 8, T 1024, D 512, 8 heads."""
    a, v = (rng.standard_normal((8, 1024, 512)).astype(np.float32) for _ in range(2))
    return (a, v, *(1 + 0.1 * rng.standard_normal((3, 8))).astype(np.float32)), {}


def cumulative(torch, a, v, alpha, beta, gamma):
    """α v + β a - γ m, with the running mean m."""
    alpha, beta, gamma = (gain.repeat_interleave(v.shape[2] // len(gain)) for gain in (alpha, beta, gamma))
    counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)[:, None]
    return alpha * v + beta * a - gamma * (v.cumsum(1) / counts)


OPERATORS = {"shaping": {"cumulative sums": cumulative}}


def norm(torch, model):
    """Also that of the model before its logits."""
    kind = torch.nn.RMSNorm if model.norm == "rms_norm" else torch.nn.LayerNorm
    return kind(model.width, **(dict(bias=model.bias) if kind is torch.nn.LayerNorm else {}), eps=1e-5)


def mixer(torch, model, options, layer):
    """Without the matrices of values and outputs that --value-matrices all and --output-matrices add, and without --qk-norm."""
    nn, functional = torch.nn, torch.nn.functional

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.options, self.layer = options, layer
            self.qk = nn.Linear(model.width, 2 * model.width, bias=model.bias)
            self.alpha, self.beta, self.gamma = (nn.Parameter(torch.ones(options.heads)) for _ in range(3))
            self.gain = nn.Parameter(torch.ones(1))
            self.values = None
            if layer == 0 and options.value_matrices == "first":
                self.values = nn.Linear(model.width, model.width, bias=False)
                self.skip, self.share = (nn.Parameter(torch.ones(1)) for _ in range(2))

        def forward(self, x):
            batch, length, width = x.shape
            v = x if self.values is None else self.skip * x + self.share * self.values(x)
            q, k, heads = (y.view(batch, length, options.heads, -1).transpose(1, 2) for y in (*self.qk(x).split(width, 2), v))
            a = functional.scaled_dot_product_attention(q, k, heads, is_causal=True,
                                                        dropout_p=model.dropout if self.training else 0.0)
            gains = (gain * self.gain for gain in (self.alpha, self.beta, self.gamma))
            return cumulative(torch, a.transpose(1, 2).reshape(batch, length, width), v, *gains)

    return Attention()


def block(torch, model, mixer, ffn):
    """SAS-P or SAS, as the options of the mixer say."""
    nn, options = torch.nn, mixer.options
    every, serial = options.normed_layers == "every", options.block == "serial"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.Identity(), nn.Identity()
            if every or mixer.layer == 0:
                self.norm1 = norm(torch, model) if every else nn.LayerNorm(model.width, bias=model.bias)
            if every and serial:
                self.norm2 = norm(torch, model)
            self.mixer, self.ffn = mixer, ffn
            self.gain = nn.Parameter(torch.ones(1))
            self.skip = nn.Parameter(torch.ones(1)) if serial else None

        def forward(self, x):
            z = self.norm1(x)
            h = x + self.mixer(z) if options.skip else self.mixer(z)
            return self.skip * h + self.gain * self.ffn(self.norm2(h)) if serial else h + self.gain * self.ffn(z)

    return Block()
