"""Makes relative_attention.npz and conformer.npz: two operators, and whole Conformers with CTC, in float64 on the CPU.

    pip install what make_goldens.py needs
    python tests/goldens/make_conformer.py

relative_attention.npz has calls of the operators, as those of ops.npz: depthwise_conv1d as a grouped convolution of padded
sequences, relative_attention with the shift as Transformer-XL's paper has it in appendix B, by a column of zeros and a reshape.
conformer.npz has models that are written in torch from the formulas of the paper, with its submodules (nn.BatchNorm1d sees the
frames that count alone), and torch's own CTC loss. Made with torch 2.13.0. Names begin with those of CASES here:

    CASE/frames [B T F], CASE/lengths [B], CASE/targets [B U], CASE/counts [B]
    CASE/logits [B T' V], of which the positions behind an utterance are 0; CASE/loss, the sum over the batch
    CASE/param/NAME, CASE/grad/NAME, CASE/after/NAME of the buffers after the call       names of ours
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write
from torch import nn


def shift(scores):
    """[.. T 2T-1] with the largest distance first -> [.. T T]: a column of zeros, and all rows one number further."""
    *lead, rows, columns = scores.shape
    padded = torch.cat([scores.new_zeros(*lead, rows, 1), scores], dim=-1)
    return padded.view(*lead, columns + 1, rows)[..., 1:, :].view(*lead, rows, columns)[..., :rows]


def attend(q, k, v, p, u, w, mask=None):
    scores = (q + u[:, None]) @ k.transpose(-1, -2) + shift((q + w[:, None]) @ p.transpose(-1, -2))
    scores = scores / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)  # -inf would make NaN of rows of padding alone, which nothing reads
    return torch.softmax(scores, dim=-1) @ v


def operators() -> dict[str, np.ndarray]:
    calls = Calls(11)
    normal = calls.normal
    heads = {"q": normal(2, 3, 5, 4), "k": normal(2, 3, 5, 4), "v": normal(2, 3, 5, 2), "p": normal(3, 9, 4),
             "u": normal(3, 4), "w": normal(3, 4)}
    calls.add("relative_attention", attend, heads)
    mask = np.arange(5) < np.array([5, 3])[:, None, None, None]
    calls.add("relative_attention.padded", attend, {**heads, "mask": mask})

    def depthwise(x, weight, bias, left, right):
        return F.conv1d(F.pad(x.transpose(1, 2), (left, right)), weight[:, None], bias, groups=len(weight)).transpose(1, 2)

    inputs = {"x": normal(2, 9, 3), "weight": normal(3, 5), "bias": normal(3)}
    calls.add("depthwise_conv1d", lambda **x: depthwise(**x, left=2, right=2), inputs, ahead=2)
    calls.add("depthwise_conv1d.past", lambda **x: depthwise(**x, left=4, right=0), inputs, ahead=0)
    return calls.arrays


class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.positions = nn.Linear(d, d, bias=False)
        self.bias_u, self.bias_v = (nn.Parameter(torch.zeros(heads, d // heads)) for _ in range(2))

    def forward(self, x, mask):
        batch, length, d = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        distance = torch.arange(length - 1, -length, -1.0)[:, None]
        angles = distance / 10_000 ** (torch.arange(0, d, 2.0) / d)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # [2T-1 D]
        p = self.positions(table).view(2 * length - 1, self.heads, -1).transpose(0, 1)
        y = attend(q, k, v, p, self.bias_u, self.bias_v, mask)
        return self.out(y.transpose(1, 2).reshape(batch, length, d))


class Convolution(nn.Module):
    def __init__(self, d, taps, norm, past):
        super().__init__()
        self.into, self.out = nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.depthwise = nn.Conv1d(d, d, taps, groups=d)
        self.pads = (taps - 1, 0) if past else (taps // 2, taps // 2)
        self.norm = {"layer": lambda: nn.LayerNorm(d), "batch": lambda: nn.BatchNorm1d(d),
                     "group": lambda: nn.GroupNorm(2, d)}[norm]()

    def forward(self, x, seen):
        z = F.glu(self.into(x), dim=-1) * seen[..., None]
        z = self.depthwise(F.pad(z.transpose(1, 2), self.pads)).transpose(1, 2)
        y = torch.zeros_like(z)
        y[seen] = self.norm(z[seen])  # frames that count, as rows [N D]
        return self.out(F.silu(y))


class Block(nn.Module):
    def __init__(self, d, heads, hidden, taps, norm, past):
        super().__init__()
        for i in range(1, 5):
            setattr(self, f"norm{i}", nn.LayerNorm(d))
        self.norm = nn.LayerNorm(d)
        self.ffn, self.ffn2 = FeedForward(d, hidden), FeedForward(d, hidden)
        self.mixer, self.convolution = Attention(d, heads), Convolution(d, taps, norm, past)

    def forward(self, x, mask, seen):
        x = x + self.ffn(self.norm1(x)) / 2
        x = x + self.mixer(self.norm2(x), mask)
        x = x + self.convolution(self.norm3(x), seen)
        return self.norm(x + self.ffn2(self.norm4(x)) / 2)


class Conformer(nn.Module):
    def __init__(self, features, d, heads, hidden, taps, norm, halvings, vocab, layers=1, chunk=None, left=None):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(d if i else 1, d, 3, stride=2) for i in range(halvings))
        bands = features
        for _ in range(halvings):
            bands = (bands - 3) // 2 + 1
        self.flat = nn.Linear(d * bands, d)
        self.blocks = nn.ModuleList(Block(d, heads, hidden, taps, norm, chunk is not None) for _ in range(layers))
        self.head, self.chunk, self.left = nn.Linear(d, vocab), chunk, left

    def forward(self, frames, lengths):
        x = frames[:, None]  # [B 1 T F]
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
            lengths = (lengths - 3) // 2 + 1
        x = self.flat(x.permute(0, 2, 3, 1).flatten(2))
        seen = torch.arange(x.shape[1]) < lengths[:, None]
        mask = seen[:, None, None]
        if self.chunk is not None:
            chunk = torch.arange(x.shape[1]) // self.chunk
            back = chunk[:, None] - chunk
            mask = mask & (back >= 0) & (back <= self.left)
        for block in self.blocks:
            x = block(x, mask, seen)
        return self.head(x), lengths, seen


CASES = {"layer": dict(norm="layer", halvings=2, taps=3, layers=2), "batch": dict(norm="batch", halvings=1, taps=5),
         "group": dict(norm="group", halvings=1, taps=3),
         "chunk": dict(norm="layer", halvings=1, taps=4, chunk=2, left=1)}


def ours(name: str) -> str:
    """Our name of a parameter or a buffer."""
    name = name.replace("flat.", "subsample.out.").replace("depthwise.weight", "depthwise")
    name = name.replace("depthwise.bias", "depthwise_bias").replace("running_mean", "mean").replace("running_var", "variance")
    if name.startswith("convolutions."):
        _, number, kind = name.split(".")
        return f"subsample.{'kernels' if kind == 'weight' else 'biases'}.{number}"
    return name


def conformer() -> dict[str, np.ndarray]:
    """Logits, losses and all gradients of models in training."""
    arrays, rng = {}, np.random.default_rng(12)
    torch.set_default_dtype(torch.float64)
    for case, options in CASES.items():
        model = Conformer(features=9, d=8, heads=2, hidden=12, vocab=5, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
                parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.4 * noise)
        frames, lengths = torch.from_numpy(rng.standard_normal((2, 27, 9))), torch.tensor([27, 20])
        targets, counts = torch.tensor([[1, 3, 3], [4, 2, 0]]), torch.tensor([3, 2])
        weights = {name: value.clone() for name, value in model.named_parameters()}
        logits, positions, seen = model(frames, lengths)
        loss = F.ctc_loss(F.log_softmax(logits, -1).transpose(0, 1), targets, positions, counts, reduction="sum")
        loss.backward()
        for name, value in (("frames", frames), ("lengths", lengths), ("targets", targets), ("counts", counts), ("loss", loss),
                            ("logits", logits * seen[..., None])):
            arrays[f"{case}/{name}"] = value.numpy(force=True)
        for name, parameter in model.named_parameters():
            for kind, value in (("param", weights[name]), ("grad", parameter.grad)):
                value = value[:, 0] if name.endswith("depthwise.weight") else value
                arrays[f"{case}/{kind}/{ours(name)}"] = value.numpy(force=True)
        for name, buffer in model.named_buffers():
            if "running" in name:
                arrays[f"{case}/after/{ours(name)}"] = buffer.numpy(force=True)
    torch.set_default_dtype(torch.float32)
    return arrays


if __name__ == "__main__":
    write(relative_attention=operators, conformer=conformer)
