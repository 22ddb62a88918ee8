"""MEGABYTE in PyTorch, as published: levels of causal Transformers, the inner ones over all patches as one batch.

Writing keeps the keys and values of every level, those inside a patch until it ends.
"""

from __future__ import annotations

from dataclasses import replace

from . import make_block, transformer


def language_model(torch, model, options, vocab):
    nn, functional = torch.nn, torch.nn.functional
    sizes = options.levels(model)
    patch = sizes[0].unit

    class Level(nn.Module):
        def __init__(self, size, inner):
            super().__init__()
            self.size, self.inner = size, inner
            channels = size.width // size.unit
            self.embed = nn.Embedding(vocab, channels)
            self.pads = nn.Parameter(torch.zeros(size.unit if size.group else size.unit - 1, channels))
            places = (size.group, size.width) if size.group else (model.context, channels)
            self.positions = nn.Parameter(torch.zeros(places))
            shape = replace(model, width=size.width, layers=size.layers, context=size.group or model.context)
            self.blocks = nn.ModuleList(make_block(torch, transformer, shape, options, i) for i in range(size.layers))
            self.norm = nn.LayerNorm(size.width, bias=model.bias)
            self.project = nn.Linear(size.width // inner.group, inner.width, bias=False) if inner else None

        def down(self, x):
            """For each position of the level inside: [B T D] -> [B T n d]."""
            return self.project(self.norm(x).unflatten(2, (self.inner.group, -1)))

        def forward(self, ids, carry):
            batch, width, unit, group = len(ids), self.size.width, self.size.unit, self.size.group
            x = self.embed(ids[:, : ids.shape[1] - unit + 1])
            if not group:
                x = x + self.positions[: x.shape[1]]
            if unit > 1:
                x = torch.cat([self.pads[: unit - 1].expand(batch, -1, -1), x], 1)
            x = x.reshape(batch, -1, width)
            if group:
                x = x.view(-1, group, width)
                x = torch.cat([self.pads.view(1, 1, width).expand(len(x), -1, -1), x[:, 1:]], 1)
                x = x + carry.reshape(x.shape) + self.positions
            for each in self.blocks:
                x = each(x)
            return x.view(batch, -1, width)

        def step(self, history, place, carry, caches):
            """One position, [B 1 D]; ``history`` has the last tokens [B ..]."""
            width, unit = self.size.width, self.size.unit
            if self.size.group:
                x = (self.pads if place == 0 else self.embed(history[:, -unit:])).reshape(-1, 1, width)
                x = x + carry + self.positions[place]
            else:
                x = self.embed(history[:, -unit:])
                first = place * unit - x.shape[1] + 1
                x = x + self.positions[first : first + x.shape[1]]
                x = torch.cat([self.pads[x.shape[1] - 1 :].expand(len(x), -1, -1), x], 1) if x.shape[1] < unit else x
                x = x.reshape(-1, 1, width)
            for each, cache in zip(self.blocks, caches, strict=True):
                x = each(x, *cache, place)
            return x

    class Megabyte(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = nn.ModuleList(Level(*pair) for pair in zip(sizes, [*sizes[1:], None], strict=True))
            self.head = nn.Linear(sizes[-1].width, vocab, bias=False)
            if model.tied:
                self.head.weight = self.levels[-1].embed.weight
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=model.init_std)

        def forward(self, ids, labels=None, start=0, caches=None):
            if caches is not None:
                return self.step(ids, start, caches)
            length, carry = ids.shape[1], None
            ids = functional.pad(ids, (0, -length % patch))
            for level in self.levels:
                x = level(ids, carry)
                if level.inner:
                    carry = level.down(x)
            logits = self.head(level.norm(x))[:, :length]
            return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

        def step(self, ids, start, caches):
            caches["history"] = torch.cat([caches["history"][:, 1 - patch :], ids], 1) if start and patch > 1 else ids
            carries = caches["carries"]
            for i, level in enumerate(self.levels):
                unit, group = level.size.unit, level.size.group
                if start % unit:
                    continue
                place = start // unit % group if group else start // unit
                carry = carries[i - 1][:, :, place] if i else None
                x = level.step(caches["history"], place, carry, caches["blocks"][i])
                if level.inner:
                    carries[i] = level.down(x)
            return self.head(level.norm(x))

    return Megabyte()


def cache(torch, model, options, batch: int = 1):
    """The last tokens, what levels have given to those inside, and room for the keys and values of every level."""
    sizes = options.levels(model)
    shapes = [(batch, options.heads, size.group or -(-model.context // size.unit), size.width // options.heads)
              for size in sizes]
    blocks = [[(torch.zeros(shape), torch.zeros(shape)) for _ in range(size.layers)]
              for size, shape in zip(sizes, shapes, strict=True)]
    return {"history": None, "carries": [None] * len(sizes), "blocks": blocks}
