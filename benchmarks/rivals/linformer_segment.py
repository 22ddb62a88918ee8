"""The causal relative of Linformer in PyTorch: mixtures and exact keys side by side, a mask, scaled_dot_product_attention."""

from __future__ import annotations

import numpy as np

POSITIONS = True


def mixer(torch, model, options, layer):
    """The mixer of minitv/variants/linformer.py with its default options, for texts of the length of training."""
    from minitv.variants.linformer import SegmentAttention

    nn, functional = torch.nn, torch.nn.functional
    heads, context = options.heads, model.context
    segment, rows = SegmentAttention.sizes(model, options)
    complete = (context - 1) // segment
    position = np.arange(context)
    own = position[:, None] // segment
    exact = (position // segment == own) & (position <= position[:, None])

    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, 3 * model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            self.E, self.F = (nn.Parameter(torch.empty(rows, segment)) for _ in range(2))
            seen = np.concatenate([np.arange(complete * rows) < rows * own, exact], axis=1)
            self.register_buffer("seen", torch.from_numpy(seen))

        def forward(self, x):
            batch, length, width = x.shape
            q, k, v = self.qkv(x).split(width, dim=2)

            def joined(x, projection):
                parts = projection @ x[:, : complete * segment].view(batch, complete, segment, width)
                return torch.cat([parts.flatten(1, 2), x], dim=1)

            q, k, v = (part.view(batch, -1, heads, width // heads).transpose(1, 2)
                       for part in (q, joined(k, self.E), joined(v, self.F)))
            drop = model.dropout if self.training else 0.0
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.seen, dropout_p=drop)
            return functional.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), drop)

    return Segments()
