"""RoFormer in PyTorch: scaled_dot_product_attention of queries and keys that are turned in pairs; turned keys are cached."""

from __future__ import annotations

POSITIONS = False


def mixer(torch, model, options, layer):
    nn, functional = torch.nn, torch.nn.functional
    heads, size = options.heads, model.width // options.heads
    turned = round(options.rotated * size)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, 3 * model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            angles = torch.arange(model.context)[:, None] * options.base ** -(torch.arange(0, turned, 2) / turned)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def rotate(self, x, start):
            stop = start + x.shape[2]
            cos, sin = self.cos[start:stop], self.sin[start:stop]
            if options.pairing == "half":
                a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
                return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., turned:]), -1)
            a, b = x[..., :turned:2], x[..., 1:turned:2]
            return torch.cat((torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2), x[..., turned:]), -1)

        def forward(self, x, keys=None, values=None, start=0):
            batch, length, width = x.shape
            q, k, v = (y.view(batch, length, heads, -1).transpose(1, 2) for y in self.qkv(x).split(width, dim=2))
            q, k = self.rotate(q, start), self.rotate(k, start)
            if keys is not None:  # [B H context head_dim], filled up to ``start``
                stop = start + length
                keys[:, :, start:stop], values[:, :, start:stop] = k, v
                k, v = keys[:, :, :stop], values[:, :, :stop]
            drop = model.dropout if self.training else 0.0
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1, dropout_p=drop)
            return functional.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), drop)

    return Attention()


def cache(torch, model, options, batch: int = 1):
    """Room for the keys and values of every layer."""
    shape = batch, options.heads, model.context, model.width // options.heads
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.layers)]
