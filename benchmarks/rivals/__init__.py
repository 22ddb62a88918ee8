"""The same models in PyTorch, as a good PyTorch user would write them: what the benchmarks compare with.

A variant's module here has ``mixer(torch, model, options, layer)``, an ``nn.Module`` from [B T D] to [B T D] with as many
parameters as ours, perhaps ``feed_forward`` with the same arguments in place of the one below, perhaps
``block(torch, model, mixer, ffn)`` in place of the Transformer's block, and perhaps ``norm(torch, model)``, which stands before
the logits. Where a model is no stack of blocks the module has ``language_model(torch, model, options, vocab)`` instead, whose
net gets the arrays of a batch.
``OPERATORS`` and ``inputs`` are the variant's operator alone, for benchmarks/ops.py.
"""

from __future__ import annotations

import importlib


def load(variant: str):
    """The rival of a variant."""
    return importlib.import_module(f"rivals.{variant.replace('-', '_')}")


def feed_forward(torch, model, options, layer):
    """The feed-forward half of a block."""
    nn, hidden = torch.nn, max(1, round(model.ffn_multiple * model.width))
    functions = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}
    return nn.Sequential(nn.Linear(model.width, hidden, bias=model.bias), functions[model.activation],
                         nn.Linear(hidden, model.width, bias=model.bias), nn.Dropout(model.dropout))


def make_block(torch, parts, model, options, layer):
    """A layer of the variant with the module ``parts``: x + mixer(norm(x)), then x + feed_forward(norm(x)), if not its own."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, mixer, ffn):
            super().__init__()
            self.norm1 = nn.LayerNorm(model.width, bias=model.bias)
            self.norm2 = nn.LayerNorm(model.width, bias=model.bias)
            self.mixer, self.ffn = mixer, ffn

        def forward(self, x, *cache):
            x = x + self.mixer(self.norm1(x), *cache)
            return x + self.ffn(self.norm2(x))

    mixer = parts.mixer(torch, model, options, layer)
    ffn = getattr(parts, "feed_forward", feed_forward)(torch, model, options, layer)
    return parts.block(torch, model, mixer, ffn) if hasattr(parts, "block") else Block(mixer, ffn)


def language_model(torch, variant: str, model, options, vocab: int):
    """Embedding, blocks and head: ``net(ids)`` are logits, ``net(ids, labels)`` is the mean loss."""
    nn, functional = torch.nn, torch.nn.functional
    parts = load(variant)
    if hasattr(parts, "language_model"):
        return parts.language_model(torch, model, options, vocab)

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocab, model.width)
            self.positions = nn.Parameter(torch.zeros(model.context, model.width)) if parts.POSITIONS else None
            self.drop = nn.Dropout(model.dropout)
            self.blocks = nn.ModuleList(make_block(torch, parts, model, options, i) for i in range(model.layers))
            norm = getattr(parts, "norm", lambda torch, model: nn.LayerNorm(model.width, bias=model.bias))
            self.norm = norm(torch, model)
            self.head = nn.Linear(model.width, vocab, bias=False)
            if model.tied:
                self.head.weight = self.embed.weight
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=model.init_std)

        def forward(self, ids, labels=None, start=0, caches=None):
            x = self.embed(ids)
            if self.positions is not None:
                x = x + self.positions[start : start + ids.shape[1]]
            x = self.drop(x)
            for layer, block in enumerate(self.blocks):
                x = block(x) if caches is None else block(x, *caches[layer], start)
            logits = self.head(self.norm(x))
            return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return LanguageModel()
