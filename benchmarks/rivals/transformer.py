"""Causal attention in PyTorch, also with shared keys: scaled_dot_product_attention, with a cache of keys and values."""

from __future__ import annotations

POSITIONS = True


def mixer(torch, model, options, layer):
    nn, functional = torch.nn, torch.nn.functional
    heads, groups, size = options.heads, options.groups(model, layer), model.width // options.heads

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, (heads + 2 * groups) * size, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)

        def forward(self, x, keys=None, values=None, start=0):
            batch, length, width = x.shape
            q, k, v = self.qkv(x).view(batch, length, -1, size).transpose(1, 2).split((heads, groups, groups), dim=1)
            if keys is not None:  # [B G context head_dim], filled up to ``start``
                stop = start + length
                keys[:, :, start:stop], values[:, :, start:stop] = k, v
                k, v = keys[:, :, :stop], values[:, :, :stop]
            drop = model.dropout if self.training else 0.0
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1, dropout_p=drop,
                                                        enable_gqa=groups < heads)
            return functional.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), drop)

    return Attention()


def cache(torch, model, options, batch: int = 1):
    """Room for the keys and values of every layer."""
    groups = [options.groups(model, layer) for layer in range(model.layers)]
    shapes = [(batch, heads, model.context, model.width // options.heads) for heads in groups]
    return [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
