"""Encoder-decoders: PyTorch's scaled_dot_product_attention, and one nn.Sequential for all layers that share it."""

from __future__ import annotations

import math

POSITIONS = False


def language_model(torch, model, options, vocab: int):
    """Pairs: ``net(source, target)`` are logits, ``net(source, target, labels)`` is the mean loss."""
    nn, functional, plan = torch.nn, torch.nn.functional, options.plan(model)
    width, heads, drop, bias = model.width, options.heads, model.dropout, model.bias
    own = max(1, round(model.ffn_multiple * width))
    activations = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}

    def norm():
        return nn.LayerNorm(width, bias=bias)

    class Attention(nn.Module):
        def __init__(self, parts, causal):
            super().__init__()
            self.inward = nn.Linear(width, parts * width, bias=bias)
            self.memory = nn.Linear(width, 2 * width, bias=bias) if parts == 1 else None
            self.out, self.causal = nn.Linear(width, width, bias=bias), causal

        def forward(self, x, memory=None):
            arrays = [self.inward(x)] if memory is None else [self.inward(x), self.memory(memory)]
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for y in arrays for part in y.split(width, dim=2))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=drop * self.training)
            return functional.dropout(self.out(y.transpose(1, 2).flatten(2)), drop, self.training)

    class Layer(nn.Module):
        def __init__(self, network, crossing):
            super().__init__()
            self.norm1, self.mixer = norm(), Attention(3, crossing)
            self.norm2, self.cross = (norm(), Attention(1, False)) if crossing else (None, None)
            self.norm3, self.ffn = (norm(), network) if network else (None, None)

        def forward(self, x, memory=None):
            x = x + self.mixer(self.norm1(x))
            if self.cross is not None:
                x = x + self.cross(self.norm2(x), memory)
            return x if self.ffn is None else x + self.ffn(self.norm3(x))

    class EncoderDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.drop = nn.Embedding(vocab, width), nn.Dropout(drop)
            networks = [nn.Sequential(nn.Linear(width, max(1, round(factor * own)), bias=bias), activations[model.activation],
                                      nn.Linear(max(1, round(factor * own)), width, bias=bias), nn.Dropout(drop))
                        for factor in plan.factors]
            self.encoder, self.decoder = (
                nn.ModuleList(Layer(None if n is None else networks[n], crossing) for n in numbers)
                for numbers, crossing in ((plan.encoder, False), (plan.decoder, True)))
            self.memory_norm, self.norm = norm(), norm()
            self.head = nn.Linear(width, vocab, bias=False)
            if model.tied:
                self.head.weight = self.embed.weight
            place, channel = torch.arange(model.context)[:, None], torch.arange(width)
            angles = place * 10_000.0 ** (-2 * (channel // 2) / width)
            self.register_buffer("sines", torch.where(channel % 2 == 0, angles.sin(), angles.cos()))
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=model.init_std)

        def entered(self, ids):
            return self.drop(math.sqrt(width) * self.embed(ids) + self.sines[: ids.shape[1]])

        def forward(self, source, target, labels=None):
            x, y = self.entered(source), self.entered(target)
            for layer in self.encoder:
                x = layer(x)
            x = self.memory_norm(x)
            for layer in self.decoder:
                y = layer(y, x)
            logits = self.head(self.norm(y))
            return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return EncoderDecoder()
