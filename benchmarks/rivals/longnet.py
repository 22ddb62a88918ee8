"""LongNet's dilated attention in PyTorch, as torchscale has it: gather, attend, scatter, weight; for benchmarks only."""

from __future__ import annotations

import numpy as np

POSITIONS = False


def ladder(context: int, first: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segments first, 2 first, .. up to the context, and dilations 1, 2, .."""
    rungs = max((context - 1) // first, 0).bit_length() + 1
    return tuple(first << i for i in range(rungs)), tuple(1 << i for i in range(rungs))


def inputs(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], dict]:
    """Arrays and parameters for the operator: B 1, H 8, T 4096, head_dim 64, patterns 64:1, 128:2, .. 4096:64."""
    segments, dilations = ladder(4096, 64)
    arrays = tuple(rng.standard_normal((1, 8, 4096, 64)).astype(np.float32) for _ in range(3))
    return arrays, dict(segments=segments, dilations=dilations)


def softmax(torch, q, k, v):
    """Causal attention and its log-sum-exp by plain products."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp() @ v, lse.squeeze(-1)


def flash(torch, q, k, v):
    """The same by PyTorch's tiled kernel, whose log-sum-exp has no gradient."""
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
    return y, lse.to(q.dtype)


def dilated(torch, attend, q, k, v, segments, dilations):
    """Every pattern for all heads at once; the sums weight the patterns and count as constants, as in torchscale."""
    batch, heads, length, width = q.shape
    ys, lses = [], []
    for w, r in zip(segments, dilations, strict=True):
        rest, c = -length % w, min(r, heads)  # c heads keep different positions
        padded = [torch.nn.functional.pad(x, (0, 0, 0, rest)) if rest else x for x in (q, k, v)]
        split = [x.reshape(batch, heads // c, c, -1, w // r, r, width)[:, :, :, :, :, :c] for x in padded]
        kept = [x.diagonal(dim1=2, dim2=5).movedim(-1, 2) for x in split]  # [B H/c c segments w/r width]
        y, lse = attend(torch, *(x.flatten(0, 3)[:, None] for x in kept))
        y, lse = y.view_as(kept[0]), lse.detach().view(kept[0].shape[:-1])
        y = torch.diag_embed(y.movedim(2, -1), dim1=2, dim2=5)  # [B H/c c segments w/r c width]
        whole = torch.full((*y.shape[:5], r), float("-inf"))
        whole[..., :c].diagonal(dim1=2, dim2=5).copy_(lse.movedim(2, -1))
        y = torch.nn.functional.pad(y, (0, 0, 0, r - c)) if r > c else y
        ys.append(y.reshape(batch, heads, -1, width)[:, :, :length])
        lses.append(whole.view(batch, heads, -1)[:, :, :length])
    shares = torch.stack(lses).softmax(0)
    return sum(share[..., None] * y for share, y in zip(shares, ys, strict=True))


def with_flash(torch, q, k, v, segments, dilations):
    return dilated(torch, flash, q, k, v, segments, dilations)


def with_softmax(torch, q, k, v, segments, dilations):
    return dilated(torch, softmax, q, k, v, segments, dilations)


OPERATORS = {"dilated_attention": {"flash": with_flash, "softmax": with_softmax}}


def mixer(torch, model, options, layer):
    """The mixer of minitv/variants/longnet.py with its default options."""
    nn = torch.nn
    heads, size = options.heads, model.width // options.heads

    class LongNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(model.width, 3 * model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            turned = torch.arange(model.context)[:, None] * 10_000.0 ** -(torch.arange(0, size, 2) / size)
            self.register_buffer("cos", turned.cos())
            self.register_buffer("sin", turned.sin())
            self.patterns = ladder(model.context, 32)

        def rotate(self, x):
            a, b = x[..., ::2], x[..., 1::2]
            cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        def forward(self, x):
            batch, length, width = x.shape
            q, k, v = (part.view(batch, length, heads, size).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
            y = dilated(torch, flash, self.rotate(q), self.rotate(k), v, *self.patterns)
            y = self.out(y.transpose(1, 2).reshape(batch, length, width))
            return nn.functional.dropout(y, model.dropout, self.training)

    return LongNet()
