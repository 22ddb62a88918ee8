"""Conformer with CTC in PyTorch: its fused attention, with the scores of distances as a mask, and depthwise Conv1d."""

from __future__ import annotations

import math

import numpy as np


def shifted(torch, scores):
    """[.. T 2T-1], the largest distance first, to [.. T T]: a column of zeros, and the same numbers in other rows."""
    *lead, rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores, (1, 0))
    return padded.view(*lead, columns + 1, rows)[..., 1:, :].view(*lead, rows, columns)[..., :rows]


def fused(torch, q, k, v, p, u, w):
    """The scores of distances are a mask of numbers for the fused attention."""
    places = shifted(torch, (q + w[:, None]) @ p.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return torch.nn.functional.scaled_dot_product_attention(q + u[:, None], k, v, attn_mask=places)


OPERATORS = {"relative_attention": {"attention with a mask": fused}}


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays for the operator: B 4, H 4, T 500, head_dim 36, the sizes of the paper's small model and 20 seconds."""
    batch, heads, length, width = 4, 4, 500, 36
    shapes = [(batch, heads, length, width)] * 3 + [(heads, 2 * length - 1, width), (heads, width), (heads, width)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes), {}


def language_model(torch, model, options, vocab, features=40):
    """Frames: ``net(frames, None, lengths)`` are logits, ``net(frames, labels, lengths)`` is the mean CTC loss of a label.

    It has the default options but for sizes.
    """
    nn, functional, width = torch.nn, torch.nn.functional, model.width
    hidden, heads, drop = max(1, round(model.ffn_multiple * width)), options.heads, model.dropout

    def feed_forward():
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width),
                             nn.Dropout(drop))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.positions = nn.Linear(width, width, bias=False)
            self.bias_u, self.bias_v = (nn.Parameter(torch.zeros(heads, width // heads)) for _ in range(2))

        def forward(self, x, table, seen):
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            p = self.positions(table).unflatten(1, (heads, -1)).transpose(0, 1)
            mask = shifted(torch, (q + self.bias_v[:, None]) @ p.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            mask = mask.masked_fill(~seen[:, None, None], -1e9)
            y = functional.scaled_dot_product_attention(q + self.bias_u[:, None], k, v, attn_mask=mask)
            return functional.dropout(self.out(y.transpose(1, 2).flatten(2)), drop, self.training)

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out, self.norm = nn.Linear(width, 2 * width), nn.Linear(width, width), nn.LayerNorm(width)
            self.depthwise = nn.Conv1d(width, width, options.kernel, padding=options.kernel // 2, groups=width)

        def forward(self, x, seen):
            z = functional.glu(self.into(x), dim=-1) * seen[..., None]
            z = self.depthwise(z.transpose(1, 2)).transpose(1, 2)
            return functional.dropout(self.out(functional.silu(self.norm(z))), drop, self.training)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn, self.ffn2, self.norm = feed_forward(), feed_forward(), nn.LayerNorm(width)
            self.norm2, self.mixer = nn.LayerNorm(width), Attention()
            self.norm3, self.convolution = nn.LayerNorm(width), Convolution()

        def forward(self, x, table, seen):
            x = x + self.ffn(x) / 2
            x = x + self.mixer(self.norm2(x), table, seen)
            x = x + self.convolution(self.norm3(x), seen)
            return self.norm(x + self.ffn2(x) / 2)

    class Conformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(width if i else 1, width, 3, stride=2) for i in range(options.halvings))
            self.flat, self.drop = nn.Linear(width * self.reduced(features), width), nn.Dropout(drop)
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(model.layers)), nn.Linear(width, vocab)

        def reduced(self, length):
            for _ in self.convolutions:
                length = (length - 1) // 2
            return length

        def forward(self, frames, labels=None, lengths=None, numbers=None):
            x = frames[:, None]
            for convolution in self.convolutions:
                x = functional.relu(convolution(x))
            x = self.drop(self.flat(x.permute(0, 2, 3, 1).flatten(2)))
            lengths, length = self.reduced(lengths), x.shape[1]
            seen = torch.arange(length, device=x.device) < lengths[:, None]
            distance = torch.arange(length - 1, -length, -1.0, device=x.device)[:, None]
            angles = distance / 10_000 ** (torch.arange(0, width, 2.0, device=x.device) / width)
            table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
            for block in self.blocks:
                x = block(x, table, seen)
            logits = self.head(x)
            if labels is None:
                return logits
            counts = (labels >= 0).sum(dim=1)
            ln_p = functional.log_softmax(logits, -1).transpose(0, 1)
            loss = functional.ctc_loss(ln_p, labels.clamp(min=0), lengths, counts, reduction="sum", zero_infinity=True)
            return loss / counts.sum()

    return Conformer()
