"""RoFormer's linear attention in PyTorch: all pairs of a window at once, the quickest way at the lengths of training."""

from __future__ import annotations

from . import roformer

POSITIONS = False


def mixer(torch, model, options, layer):
    functional = torch.nn.functional

    class Linear(type(roformer.mixer(torch, model, options, layer))):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(model.context, model.context).tril())

        def forward(self, x):
            batch, length, width = x.shape
            q, k, v = (y.view(batch, length, options.heads, -1).transpose(1, 2) for y in self.qkv(x).split(width, dim=2))
            q, k = (functional.relu(y) if options.feature == "relu" else functional.elu(y) + 1 for y in (q, k))
            mask = self.mask[:length, :length]
            scores = self.rotate(q, 0) @ self.rotate(k, 0).transpose(-1, -2) * mask
            y = (scores @ v) / (q @ k.transpose(-1, -2) * mask).sum(-1, keepdim=True)
            y = self.out(y.transpose(1, 2).reshape(batch, length, width))
            return functional.dropout(y, model.dropout, self.training)

    return Linear()
