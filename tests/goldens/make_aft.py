"""Makes aft.npz: the operators of the AFT family by labml-nn's AFTLocal and by torch.nn.functional's convolutions, in float64.

    pip install what make_goldens.py needs && pip install --no-deps labml-nn==0.5.1
    python tests/goldens/make_aft.py

The entries are those of make_goldens.py. AFTLocal takes a bias for every pair of positions and a window outside of which it
counts as 0; its projections are set to the identity. Convolutions compute the paper's eq. 6 as it stands, with e^w - 1. The
state after a call, which neither has, is written out as a softmax and a logsumexp.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write


def labml_aft():
    """labml-nn's module of AFT: only its file, as the package around it wants much more."""
    (root,) = importlib.util.find_spec("labml_nn").submodule_search_locations
    spec = importlib.util.spec_from_file_location("labml_aft", Path(root, "transformers", "aft", "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AFTLocal = labml_aft().AFTLocal


def labml(q, k, v, bias, window, causal):
    """AFTLocal with identities for projections, on q, k, v [B T C] and bias [T T]."""
    length, width = q.shape[1:]
    layer = AFTLocal(width, length, window, bias=False).double()
    with torch.no_grad():
        for linear in (layer.query, layer.key, layer.value, layer.output):
            linear.weight.copy_(torch.eye(width))
        layer.output.bias.zero_()
    del layer.pos_bias  # a parameter, and leaves cannot depend on our bias
    layer.pos_bias = bias
    seen = torch.ones(length, length, dtype=torch.bool)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return layer(query=q, key=k, value=v, mask=(seen.tril() if causal else seen)[..., None]).transpose(0, 1)


def state(k, v, reach):
    """average, logsum, keys and values when the ``reach`` newest positions are still in the window."""
    left = k.shape[1] - reach
    heads = v.unflatten(2, (k.shape[2], -1))[:, :left]
    average = (torch.softmax(k[:, :left], 1)[..., None] * heads).sum(1).flatten(1)
    return average, torch.logsumexp(k[:, :left], 1), k[:, left:], v[:, left:]


def matrix(bias, ahead):
    """bias[T W] over the lags -ahead .. W-1-ahead as a [T T] matrix."""
    length, window = bias.shape
    lag = torch.arange(length)[:, None] - torch.arange(length) + ahead
    return bias.gather(1, lag.clamp(0, window - 1)) * ((lag >= 0) & (lag < window))


def convolution(q, k, v, bias, causal):
    """Eq. 6 of the paper along a sequence; F.conv1d correlates, so the filters are turned around."""
    (heads, window), length = bias.shape, q.shape[1]
    ahead = 0 if causal else window // 2
    size = v.shape[2] // heads

    def summed(x, taps):  # x[B T C], taps[C W]
        padded = F.pad(x.transpose(1, 2), (window - 1 - ahead, ahead))
        near = F.conv1d(padded, taps.flip(1)[:, None], groups=len(taps)).transpose(1, 2)
        return near + (x.cumsum(1) if causal else x.sum(1, keepdim=True).expand(-1, length, -1))

    e, taps = k.exp().repeat_interleave(size, 2), bias.expm1().repeat_interleave(size, 0)
    return torch.sigmoid(q) * summed(e * v, taps) / summed(e, taps)


def convolution2d(q, k, v, bias):
    """The same for the pixels of an image."""
    size = v.shape[3] // bias.shape[0]

    def summed(x, taps):  # x[B Y X C], taps[C M N]
        planes = x.permute(0, 3, 1, 2)
        near = F.conv2d(planes, taps.flip(1, 2)[:, None], padding=tuple(n // 2 for n in taps.shape[1:]), groups=len(taps))
        return near.permute(0, 2, 3, 1) + x.sum((1, 2), keepdim=True)

    e, taps = k.exp().repeat_interleave(size, 3), bias.expm1().repeat_interleave(size, 0)
    return torch.sigmoid(q) * summed(e * v, taps) / summed(e, taps)


def aft() -> dict[str, np.ndarray]:
    calls = Calls(5)
    normal = calls.normal

    def inputs(*shape, heads=None, bias=None):
        keys = (*shape[:-1], heads or shape[-1])
        given = {"q": normal(*shape), "k": normal(*keys, scale=2.0), "v": normal(*shape)}
        return given if bias is None else given | {"bias": normal(*bias, scale=1.5)}

    for causal in (True, False):
        variant = "causal" if causal else "bidirectional"

        def full(q, k, v, bias, causal=causal):
            return labml(q, k, v, bias, len(bias), causal)

        def simple(q, k, v, causal=causal):
            return labml(q, k, v, torch.zeros(q.shape[1], q.shape[1]).double(), 1, causal), *state(k, v, 0)[:2]

        def local(q, k, v, bias, causal=causal):
            window = bias.shape[1]
            ahead = 0 if causal else window // 2
            y = labml(q, k, v, matrix(bias, ahead), window - ahead, causal)
            return y, *state(k, v, window - 1 - ahead)

        def conv(q, k, v, bias, causal=causal):
            window = bias.shape[1]
            return convolution(q, k, v, bias, causal), *state(k, v, window - 1 - (0 if causal else window // 2))

        calls.add(f"aft_full.{variant}", full, inputs(2, 7, 3, bias=(7, 7)), causal=causal, chunk_size=3)
        calls.add(f"aft_simple.{variant}", simple, inputs(2, 7, 3), causal=causal)
        calls.add(f"aft_local.{variant}", local, inputs(2, 7, 3, bias=(7, 3)), causal=causal)
        calls.add(f"aft_conv.{variant}", conv, inputs(2, 7, 4, heads=2, bias=(2, 3)), causal=causal)
    calls.add("aft_conv2d", convolution2d, inputs(2, 4, 5, 4, heads=2, bias=(2, 3, 3)))
    return calls.arrays


if __name__ == "__main__":
    write(aft=aft)
