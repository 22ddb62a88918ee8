"""Makes long_conv.npz and hyena.npz: long convolutions, and Hyena's mixers made of torch's modules, in float64 on the CPU.

    pip install what make_goldens.py needs
    python tests/goldens/make_hyena.py

The entries of long_conv.npz are those of ops.npz; hyena.npz has mixers of order 2, and of order 3 with the channels of all
filters in the order of the authors' standalone code and of their training code. Names begin with those of CASES here:

    CASE/in, CASE/out [B T D], CASE/cotangent, CASE/grad of the input
    CASE/param/NAME, CASE/grad/NAME     channels one filter after the other; of the features, only the gradient
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write


def long_conv() -> dict[str, np.ndarray]:
    """long_conv against torch.nn.functional.conv1d, and against products of spectra."""
    calls = Calls(6)
    normal = calls.normal

    def conv1d(x, filter, skip=None, history=None):
        whole = x if history is None else torch.cat([history, x], dim=1)
        taps, channels = filter.shape
        padded = F.pad(whole.transpose(1, 2), (taps - 1, 0))
        y = F.conv1d(padded, filter.flip(0).T[:, None], groups=channels).transpose(1, 2)[:, whole.shape[1] - x.shape[1] :]
        return y if skip is None else y + skip * x, whole[:, max(whole.shape[1] - taps + 1, 0) :]

    def spectra(x, filter, skip=None, reverse=None):
        length, points = x.shape[1], 2 * x.shape[1]
        spectrum = torch.fft.rfft(filter, n=points, dim=0)
        if reverse is not None:
            spectrum = spectrum + torch.fft.rfft(reverse, n=points, dim=0).conj()
        y = torch.fft.irfft(torch.fft.rfft(x, n=points, dim=1) * spectrum, n=points, dim=1)[:, :length]
        return y if skip is None else y + skip * x, x[:, max(length - len(filter) + 1, 0) :]

    calls.add("long_conv", conv1d, {"x": normal(2, 9, 3), "filter": normal(9, 3), "skip": normal(3)})
    calls.add("long_conv.history", conv1d, {"x": normal(2, 7, 3), "filter": normal(6, 3), "history": normal(2, 10, 3)})
    calls.add("long_conv.long", spectra, {"x": normal(1, 150, 2), "filter": normal(150, 2), "skip": normal(2)})
    both = {"x": normal(2, 9, 3), "filter": normal(9, 3), "skip": normal(3), "reverse": normal(7, 3)}
    calls.add("long_conv.reverse", spectra, both)
    return calls.arrays


class Hyena(torch.nn.Module):
    """The operator of arXiv 2302.10866 from torch's modules; ``major`` is what the channels of all filters are ordered by."""

    def __init__(self, width, context, order, hidden, depth, bands, major):
        super().__init__()
        self.width, self.order, self.major = width, order, major
        total = width * (order - 1)
        self.in_proj, self.out_proj = torch.nn.Linear(width, (order + 1) * width), torch.nn.Linear(width, width)
        self.short_filter = torch.nn.Conv1d((order + 1) * width, (order + 1) * width, 3, groups=(order + 1) * width, padding=2)
        self.bias = torch.nn.Parameter(torch.zeros(total))
        time = torch.linspace(0, 1, context)[:, None]
        angles = torch.linspace(1e-4, bands - 1, bands) * 2 * math.pi * torch.arange(context)[:, None] / context
        turned = torch.exp(-1j * angles)
        self.z = torch.nn.Parameter(torch.cat([time, turned.real, turned.imag], dim=-1))
        self.mlp = torch.nn.ModuleList([torch.nn.Linear(2 * bands + 1, hidden),
                                        *[torch.nn.Linear(hidden, hidden) for _ in range(depth - 2)]])
        self.last, self.freq = torch.nn.Linear(hidden, total, bias=False), torch.nn.Parameter(torch.full((hidden,), 3.0))
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, total)
        self.window = torch.exp(-time * deltas.abs())

    def by_filter(self, x):
        """[..., total] -> [order - 1, ..., D]."""
        shape = (self.order - 1, self.width) if self.major == "filters" else (self.width, self.order - 1)
        return x.unflatten(-1, shape).movedim(-2 if self.major == "filters" else -1, 0)

    def forward(self, u):
        length = u.shape[1]
        uc = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
        *x, v = uc.split(self.width, dim=1)
        h = self.z[:length]
        for layer in self.mlp:
            h = torch.sin(self.freq * layer(h))
        filters, biases = self.by_filter(self.last(h) * self.window[:length]), self.by_filter(self.bias)
        for k, d, gate in zip(filters, biases, reversed(x[1:]), strict=True):
            v = v * gate
            spectrum = torch.fft.rfft(k.T, n=2 * length) * torch.fft.rfft(v, n=2 * length)
            v = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + v * d[:, None]
        return self.out_proj((v * x[0]).transpose(1, 2))


CASES = {"order2": (2, "filters"), "order3": (3, "filters"), "order3_training": (3, "channels")}


def hyena() -> dict[str, np.ndarray]:
    """Outputs and all gradients of Hyena mixers; sequences are shorter than the context."""
    arrays, rng = {}, np.random.default_rng(7)
    torch.set_default_dtype(torch.float64)
    for case, (order, major) in CASES.items():
        network = Hyena(width=4, context=16, order=order, hidden=6, depth=4, bands=3, major=major)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name != "z":  # a table
                    noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
                    parameter.copy_(parameter + 0.1 * noise if name == "freq" else 0.5 * noise)
        x = torch.from_numpy(rng.standard_normal((2, 11, 4))).requires_grad_()
        y = network(x)
        cotangent = torch.from_numpy(rng.standard_normal(tuple(y.shape)))
        y.backward(cotangent)
        for name, value in (("in", x), ("out", y), ("cotangent", cotangent), ("grad", x.grad)):
            arrays[f"{case}/{name}"] = value.numpy(force=True)
        names = {"in_proj": "project", "out_proj": "out", "short_filter": "short", "last": "filters.out", "bias": "skip",
                 "z": "filters.features", "freq": "filters.frequency", "mlp": "filters.layers"}  # ours
        for theirs, parameter in network.named_parameters():
            head, dot, rest = theirs.partition(".")
            name = names[head] + dot + rest
            if head == "short_filter":
                name = "short" if rest == "weight" else "short_bias"
            for kind, value in (("param", parameter), ("grad", parameter.grad)):
                if theirs == "short_filter.weight":
                    value = value[:, 0]
                elif head == "bias":
                    value = network.by_filter(value).flatten()
                elif head == "last":
                    value = network.by_filter(value.T).movedim(1, 2).flatten(0, 1)
                if (head, kind) != ("z", "param"):
                    arrays[f"{case}/{kind}/{name}"] = value.numpy(force=True)
    torch.set_default_dtype(torch.float32)
    return arrays


if __name__ == "__main__":
    write(long_conv=long_conv, hyena=hyena)
