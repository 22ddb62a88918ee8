"""Streaming attention in PyTorch: training is causal attention with RoPE, writing keeps the first and the recent keys.

As the paper's code, it caches keys before they are turned, and turns all of them by their places in the cache for every token.
"""

from __future__ import annotations

POSITIONS = False


def mixer(torch, model, options, layer):
    nn, functional = torch.nn, torch.nn.functional
    heads, size = options.heads, model.width // options.heads
    window, sinks = options.cache(model.context)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, 3 * model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            pairs = torch.arange(0, size, 2).double() / size
            angles = torch.outer(torch.arange(model.context + 1).double(), 10_000**-pairs)
            self.register_buffer("cos", angles.cos().float(), persistent=False)
            self.register_buffer("sin", angles.sin().float(), persistent=False)

        def turn(self, x, start, stop):
            a, b = x[..., ::2], x[..., 1::2]
            cos, sin = self.cos[start:stop], self.sin[start:stop]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        def forward(self, x, keys=None, values=None, start=0):
            batch, length, width = x.shape
            q, k, v = (part.view(batch, length, heads, size).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
            if keys is not None:  # [B H S+W+1 head_dim]: keys before they are turned; a new one takes the place of the oldest
                if start + length > window + sinks + 1:
                    keys[:, :, sinks:-1] = keys[:, :, sinks + 1 :].clone()
                    values[:, :, sinks:-1] = values[:, :, sinks + 1 :].clone()
                    start = window + sinks
                stop = start + length
                keys[:, :, start:stop], values[:, :, start:stop] = k, v
                k, v = keys[:, :, :stop], values[:, :, :stop]
            q, k = self.turn(q, start, start + length), self.turn(k, 0, k.shape[2])
            drop = model.dropout if self.training else 0.0
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1, dropout_p=drop)
            return functional.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), drop)

    return Attention()


def cache(torch, model, options, batch: int = 1):
    """Room for the kept keys and values of every layer, and for those of the newest token."""
    window, sinks = options.cache(model.context)
    shape = batch, options.heads, window + sinks + 1, model.width // options.heads
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.layers)]
