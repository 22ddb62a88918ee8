"""Makes monarch.npz and monarch_mixer.npz: Monarch products, and layers of Monarch Mixer, in float64 on the CPU.

    pip install what make_goldens.py needs
    python tests/goldens/make_monarch_mixer.py

monarch.npz has calls of the operators, as those of ops.npz: monarch as einsum, block_diagonal as a grouped convolution and as a
product with torch.block_diag. monarch_mixer.npz has layers that are written in torch from the formulas of the authors' code
(HazyResearch/m2, bert/src/mm and bert/src/bert_layers.py), which no package holds: a mixer with filters in both directions on
one circle, or with a conjugated spectrum, or looking back alone; then a gated unit, a sum and a norm. Made with torch 2.13.0.
Names begin with those of CASES here:

    CASE/in, CASE/out [B T D], CASE/cotangent, CASE/grad of the input
    CASE/param/NAME, CASE/grad/NAME     names of ours; of the features, only the gradient
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write
from torch import nn


def monarch() -> dict[str, np.ndarray]:
    """The operators, as torch has their parts."""
    calls = Calls(8)
    normal = calls.normal

    def product(x, first, second):
        columns = first.shape[2]
        t = torch.einsum("qap,...pq->...aq", first, x.unflatten(-1, (columns, first.shape[0])))
        return torch.einsum("acq,...aq->...ca", second, t).flatten(-2)

    def grouped(x, weight):
        groups = weight.shape[0]
        return F.conv1d(x.transpose(1, 2), weight.flatten(0, 1)[..., None], groups=groups).transpose(1, 2)

    def strided(x, weight):
        shuffled = x.unflatten(-1, (weight.shape[2], weight.shape[0])).transpose(-1, -2).flatten(-2)
        return shuffled @ torch.block_diag(*weight).T

    calls.add("monarch", product, {"x": normal(2, 3, 20), "first": normal(4, 3, 5), "second": normal(3, 6, 4)})
    calls.add("monarch.vector", product, {"x": normal(6), "first": normal(3, 2, 2), "second": normal(2, 3, 3)})
    calls.add("block_diagonal", grouped, {"x": normal(2, 5, 12), "weight": normal(4, 2, 3)}, strided=False)
    calls.add("block_diagonal.strided", strided, {"x": normal(2, 5, 12), "weight": normal(4, 2, 3)}, strided=True)
    return calls.arrays


class LongConvolution(nn.Module):
    """An implicit filter in one direction or two, and its product of spectra on a circle of 2 T points."""

    def __init__(self, width, context, hidden, bands, way):
        super().__init__()
        self.way = way
        time = torch.linspace(0, 1, context)[:, None]
        angles = torch.linspace(1e-4, bands - 1, bands) * 2 * math.pi * torch.arange(context)[:, None] / context
        turned = torch.exp(-1j * angles)
        self.z = nn.Parameter(torch.cat([time, turned.real, turned.imag], dim=-1))
        self.freq, self.bias = nn.Parameter(torch.full((hidden,), 3.0)), nn.Parameter(torch.zeros(width))

        def network():
            return nn.ModuleList([nn.Linear(2 * bands + 1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden),
                                  nn.Linear(hidden, width, bias=False)])

        self.back, self.ahead = network(), None if way == "causal" else network()
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, width)
        self.window = torch.exp(-time * deltas.abs())

    def taps(self, network, length):
        h = self.z[:length]
        for layer in network[:-1]:
            h = torch.sin(self.freq * layer(h))
        return (network[-1](h) * self.window[:length]).T  # [D T]

    def forward(self, x):
        length = x.shape[-1]
        back = self.taps(self.back, length)
        if self.way == "once":
            ahead = self.taps(self.ahead, length)
            circle = F.pad(back, (0, length)) + F.pad(ahead.flip(-1), (length, 0))
            spectrum = torch.fft.rfft(circle)
        else:
            spectrum = torch.fft.rfft(back, n=2 * length)
            if self.way == "twice":
                spectrum = spectrum + torch.fft.rfft(self.taps(self.ahead, length), n=2 * length).conj()
        y = torch.fft.irfft(torch.fft.rfft(x, n=2 * length) * spectrum, n=2 * length)[..., :length]
        return y + x * self.bias[:, None]


class BlockDiagonal(nn.Module):
    def __init__(self, inputs, outputs, blocks, bias, permute):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, outputs // blocks, inputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.permute = permute

    def forward(self, x):
        if self.permute:
            x = x.unflatten(-1, (self.weight.shape[2], -1)).transpose(-1, -2).flatten(-2)
        y = F.linear(x, torch.block_diag(*self.weight))
        return y if self.bias is None else y + self.bias


class Layer(nn.Module):
    """The mixer, and what follows it in a layer; D 8 channels, 4 blocks, H 16."""

    def __init__(self, way, residual=True, normed=False, permute=False, width=8, context=14, hidden=6, bands=2):
        super().__init__()
        self.in_linear, self.out_linear = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layernorm = nn.LayerNorm(width) if normed else None
        self.short_filter = nn.Conv1d(3 * width, 3 * width, 3, groups=3 * width, padding=2)
        self.filter_fn = LongConvolution(width, context, hidden, bands, way)
        self.filter_fn2 = LongConvolution(width, context, hidden, bands, way) if residual else None
        self.gated_layers = BlockDiagonal(width, 4 * width, 4, False, permute)
        self.wo = BlockDiagonal(2 * width, width, 4, True, permute)
        self.norm = nn.LayerNorm(width)

    def forward(self, u):
        if self.layernorm is not None:
            u = self.layernorm(u)
        z = self.short_filter(self.in_linear(u).transpose(1, 2))[..., : u.shape[1]]
        x1, x2, v = z.chunk(3, dim=1)
        y = x2 * self.filter_fn(v * x1)
        if self.filter_fn2 is not None:
            y = y + self.filter_fn2(u.transpose(1, 2))
        y = self.out_linear(y.transpose(1, 2))
        gate, value = self.gated_layers(y).chunk(2, dim=-1)
        return self.norm(y + self.wo(F.gelu(gate) * value))


CASES = {"once": dict(way="once"), "twice": dict(way="twice", permute=True), "alone": dict(way="once", residual=False),
         "causal": dict(way="causal", normed=True)}
NAMES = {"in_linear": "mixer.project", "out_linear": "mixer.out", "layernorm": "mixer.norm", "filter_fn": "mixer.filters.0",
         "filter_fn2": "mixer.filters.1", "gated_layers": "ffn.up", "wo": "ffn.down", "norm": "norm"}


def ours(name: str) -> str:
    """Our name of a parameter."""
    head, dot, rest = name.partition(".")
    if head == "short_filter":
        return "mixer.short" if rest == "weight" else "mixer.short_bias"
    if head.startswith("filter_fn"):
        if rest == "bias":
            return NAMES[head].replace("filters", "skips")
        rest = rest.replace("freq", "frequency").replace("back.", "layers.").replace("ahead.", "ahead.layers.")
        rest = rest.replace("layers.3", "out")
        rest = "features" if rest == "z" else rest
    return NAMES[head] + dot + rest


def monarch_mixer() -> dict[str, np.ndarray]:
    """Outputs and all gradients of layers; sequences are shorter than the context."""
    arrays, rng = {}, np.random.default_rng(9)
    torch.set_default_dtype(torch.float64)
    for case, options in CASES.items():
        layer = Layer(**options)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if not name.endswith(".z"):  # a table
                    noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
                    near = name.endswith("freq") or "norm" in name
                    parameter.copy_(parameter + 0.1 * noise if near else 0.3 * noise)
        x = torch.from_numpy(rng.standard_normal((2, 11, 8))).requires_grad_()
        y = layer(x)
        cotangent = torch.from_numpy(rng.standard_normal(tuple(y.shape)))
        y.backward(cotangent)
        for name, value in (("in", x), ("out", y), ("cotangent", cotangent), ("grad", x.grad)):
            arrays[f"{case}/{name}"] = value.numpy(force=True)
        for theirs, parameter in layer.named_parameters():
            for kind, value in (("param", parameter), ("grad", parameter.grad)):
                if theirs == "short_filter.weight":
                    value = value[:, 0]
                if not (theirs.endswith(".z") and kind == "param"):
                    arrays[f"{case}/{kind}/{ours(theirs)}"] = value.numpy(force=True)
    torch.set_default_dtype(torch.float32)
    return arrays


if __name__ == "__main__":
    write(monarch=monarch, monarch_mixer=monarch_mixer)
