"""Monarch Mixer in PyTorch, with filters in both directions on one circle, and without a norm of the embedding."""

from . import _monarch
from ._monarch import feed_forward  # noqa: F401

POSITIONS = True


def mixer(torch, model, options, layer):
    return _monarch.mixer(torch, model, options, both=True)


def block(torch, model, mixer, ffn):
    """x ← mixer(x); x ← norm(x + ffn(x))."""
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.ffn, self.norm = mixer, ffn, torch.nn.LayerNorm(model.width, bias=model.bias)

        def forward(self, x):
            x = self.mixer(x)
            return self.norm(x + self.ffn(x))

    return Block()
