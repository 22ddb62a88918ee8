"""Linformer in PyTorch: keys and values projected by one matrix product each, then scaled_dot_product_attention."""

from __future__ import annotations

POSITIONS = True


def mixer(torch, model, options, layer):
    """The mixer of minitv/variants/linformer.py with its default options."""
    nn, functional = torch.nn, torch.nn.functional
    heads, rows = options.heads, options.projected_length or max(1, model.context // 4)

    class Linformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, 3 * model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            self.E, self.F = (nn.Parameter(torch.empty(rows, model.context)) for _ in range(2))

        def forward(self, x):
            batch, length, width = x.shape
            q, k, v = self.qkv(x).split(width, dim=2)
            k, v = self.E[:, :length] @ k, self.F[:, :length] @ v
            q, k, v = (part.view(batch, -1, heads, width // heads).transpose(1, 2) for part in (q, k, v))
            drop = model.dropout if self.training else 0.0
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=drop)
            return functional.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)), drop)

    return Linformer()
