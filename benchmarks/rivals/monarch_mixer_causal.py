"""The causal relative of Monarch Mixer in PyTorch."""

from . import _monarch
from ._monarch import feed_forward  # noqa: F401

POSITIONS = False


def mixer(torch, model, options, layer):
    return _monarch.mixer(torch, model, options, both=False)
