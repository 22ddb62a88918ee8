"""LSH attention in plain vectorised PyTorch, as transformers and reformer-pytorch have it: sorted chunks and the one before."""

from __future__ import annotations

import math

from minitv.ops.lsh import factors_of

POSITIONS = True


def attention(torch, q, v, buckets, chunk):
    """y[B H T K] of q = k and v [B H T K] and buckets[B H R T]; a query sees both chunks, T is a multiple of ``chunk``."""
    functional = torch.nn.functional
    batch, heads, rounds, length = buckets.shape
    order = torch.argsort(buckets * length + torch.arange(length), dim=-1)
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(length).expand_as(order))

    def chunked(x):
        rows = x[:, :, None].expand(-1, -1, rounds, -1, -1).gather(3, order[..., None].expand(*order.shape, x.shape[-1]))
        return rows.reshape(batch, heads, rounds, length // chunk, chunk, -1)

    def with_last(x, dim):
        return torch.cat([x, x.roll(1, 3)], dim)

    queries, keys, values = chunked(q), chunked(functional.normalize(q, dim=-1)), chunked(v)
    position = order.reshape(batch, heads, rounds, length // chunk, chunk)
    mine, other = position[..., :, None], with_last(position, 4)[..., None, :]
    scores = queries @ with_last(keys, 4).transpose(-1, -2)
    scores = scores.masked_fill(mine < other, -1e9).masked_fill(mine == other, -1e5)
    total = scores.logsumexp(-1, keepdim=True)
    outputs = ((scores - total).exp() @ with_last(values, 4)).reshape(batch, heads, rounds, length, -1)
    outputs = outputs.gather(3, place[..., None].expand(*place.shape, outputs.shape[-1]))
    shares = total.reshape(batch, heads, rounds, length).gather(3, place).softmax(2)
    return (outputs * shares[..., None]).sum(2)


def hashed(torch, q, rotations, factors):
    """Buckets[B H R T] of q[B H T K] by rotations[H R K F]."""
    turned, buckets, first, below = q[:, :, None] @ rotations, 0, 0, 1
    for n in factors:
        part = turned[..., first : first + n // 2]
        buckets = buckets + below * torch.cat([part, -part], -1).argmax(-1)
        first, below = first + n // 2, below * n
    return buckets


def mixer(torch, model, options, layer):
    nn, heads, size = torch.nn, options.heads, model.width // options.heads
    factors = factors_of(options.buckets or 2 * max(1, model.context // options.chunk))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qk = nn.Linear(model.width, model.width, bias=model.bias)
            self.v = nn.Linear(model.width, model.width, bias=model.bias)
            self.out = nn.Linear(model.width, model.width, bias=model.bias)
            self.drop = nn.Dropout(model.dropout)

        def forward(self, x):
            batch, length, width = x.shape
            q, v = (part(x).view(batch, length, heads, size).transpose(1, 2) for part in (self.qk, self.v))
            with torch.no_grad():
                rotations = torch.randn(heads, options.rounds, size, sum(factors) // 2)
                buckets = hashed(torch, q, rotations, factors)
            y = attention(torch, q, v, buckets, math.gcd(options.chunk, length))
            return self.drop(self.out(y.transpose(1, 2).reshape(batch, length, width)))

    return Attention()


def feed_forward(torch, model, options, layer):
    nn, hidden = torch.nn, round((options.ffn_width or model.ffn_multiple + 0.5) * model.width)
    return nn.Sequential(nn.Linear(model.width, hidden, bias=model.bias), nn.GELU(),
                         nn.Linear(hidden, model.width, bias=model.bias), nn.Dropout(model.dropout))
