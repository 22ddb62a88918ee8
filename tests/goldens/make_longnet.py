"""Makes dilated_attention.npz and longnet.npz: dilated attention, and layers of torchscale, in float64 on the CPU.

    pip install what make_goldens.py needs && pip install --no-deps torchscale==0.3.0 einops==0.8.2
    python tests/goldens/make_longnet.py

The wheel of torchscale has no dilated attention. Its file torchscale/component/dilated_attention.py is from the repository at
commit 11e745ec5f7a36c5f6deb3467d29e99befa50e0c, put among the installed files beside a utils.py with the functions that it
imports. Flash attention, which needs a GPU, is replaced by a plain function that gives the same output and log-sum-exp.

The entries of dilated_attention.npz are those of ops.npz. The function is written as a user would: for each pattern, head and
segment, gather the positions, attend, put the result back; then weight the patterns. longnet.npz holds layers of torchscale:

    CASE/in, out, cotangent, grad      x[B T D], the layer's output, dL/d(output), dL/dx
    CASE/param/NAME, CASE/grad/NAME    parameters of the layer, and their gradients
    CASE/segments, dilations, heads    of its patterns; a number

In the cases causal, xpos and encoder the weights of the patterns are differentiated. In detached they are constants, as in the
release.
"""

import contextlib
import types
from unittest import mock

import numpy as np
import torch
from make_goldens import Calls, write
from torchscale.component.dilated_attention import DilatedAttention

OFFSETS = {"modulo": lambda head, heads, r: head % r, "block": lambda head, heads, r: head // -(-heads // r)}


def mixture(segments, dilations, offsets, causal, scale=None, start=0):
    """dilated_attention with these parameters."""
    def function(q, k, v):
        batch, heads, queries, width = q.shape
        past, stop = start + k.shape[2] - queries, start + k.shape[2]
        ys, lses = [], []
        for w, r in zip(segments, dilations, strict=True):
            y, lse = torch.zeros(batch, heads, queries, v.shape[3]), torch.full((batch, heads, queries), -torch.inf)
            for head in range(heads):
                for begin in range(past // w * w, stop, w):
                    kept = torch.tensor(range(begin + OFFSETS[offsets](head, heads, r), min(begin + w, stop), r), dtype=int)
                    asks = kept[kept >= past]
                    scores = q[:, head, asks - past] @ k[:, head, kept - start].mT * (scale or width**-0.5)
                    if causal:
                        scores = scores.masked_fill(kept > asks[:, None], -torch.inf)
                    y[:, head, asks - past] = scores.softmax(-1) @ v[:, head, kept - start]
                    lse[:, head, asks - past] = scores.logsumexp(-1)
            ys.append(y)
            lses.append(lse)
        shares = torch.stack(lses).softmax(0)
        return (shares[..., None] * torch.stack(ys)).sum(0), torch.stack(lses).logsumexp(0)

    return function


CALLS = {  # shapes (B, H, T, S, K, V) and parameters
    "paper": ((2, 3, 13, 13, 4, 5), dict(segments=(3, 6, 12), dilations=(1, 2, 4), offsets="modulo", causal=True)),
    "torchscale": ((1, 5, 20, 20, 4, 3), dict(segments=(4, 8, 16), dilations=(1, 2, 4), offsets="block", causal=True)),
    "both_sides": ((2, 4, 11, 11, 3, 3), dict(segments=(4, 8), dilations=(1, 3), offsets="modulo", causal=False, scale=0.5)),
    "cache": ((1, 4, 3, 14, 4, 4), dict(segments=(5, 8, 16), dilations=(1, 2, 4), offsets="modulo", causal=True, start=0)),
    "short_cache": ((1, 2, 4, 9, 4, 2), dict(segments=(2, 4, 8), dilations=(1, 1, 2), offsets="block", causal=True, start=8)),
}


def dilated_attention() -> dict[str, np.ndarray]:
    torch.set_default_dtype(torch.float64)
    calls = Calls(15)
    for name, ((batch, heads, queries, keys, width, out), params) in CALLS.items():
        inputs = dict(q=calls.normal(batch, heads, queries, width), k=calls.normal(batch, heads, keys, width),
                      v=calls.normal(batch, heads, keys, out))
        calls.add(f"dilated_attention.{name}", mixture(**params), inputs, **params)
    return calls.arrays


class Plain(DilatedAttention):
    """With attention in place of flash attention: q, k and v are [(B H) L d], the results [B L (H d)] and [B H L]."""

    def attention_ops(self, q, k, v, key_padding_mask, attn_mask, rel_pos, is_causal):
        scores = q @ k.mT * self.scaling
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=bool).triu(1), -torch.inf)
        attn, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        return (attn.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2), lse.unflatten(0, (-1, self.num_heads)))


CASES = {  # length, patterns, and what the layer is told
    "causal": (13, (4, 8, 16), (1, 2, 4), dict(is_causal=True)),
    "detached": (13, (4, 8, 16), (1, 2, 4), dict(is_causal=True)),
    "xpos": (12, (6, 12), (1, 2), dict(is_causal=True)),
    "encoder": (16, (4, 8, 16), (1, 2, 4), dict(is_causal=False)),
}


def longnet() -> dict[str, np.ndarray]:
    """Layers with 3 or 4 heads, with xPos and the second norm in the case xpos."""
    torch.set_default_dtype(torch.float64)
    arrays, rng = {}, np.random.default_rng(16)
    for case, (length, segments, dilations, told) in CASES.items():
        full, width, heads = case == "xpos", 12, 3 if case == "xpos" else 4
        args = types.SimpleNamespace(multiway=False, layernorm_eps=1e-5, xpos_rel_pos=full, xpos_scale_base=512,
                                     flash_attention=True, seq_parallel=False, segment_length=segments, dilated_ratio=dilations)
        layer = Plain(args, width, heads, self_attention=True, subln=full)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.from_numpy(0.5 * rng.standard_normal(tuple(parameter.shape))))
        x = torch.from_numpy(rng.standard_normal((2, length, width))).requires_grad_()
        differentiated = contextlib.nullcontext() if case == "detached" else mock.patch("torch.no_grad", contextlib.nullcontext)
        with differentiated, mock.patch("torch.float", torch.float64):  # its angles
            y, _ = layer(x, x, x, **told)
        cotangent = torch.from_numpy(rng.standard_normal(tuple(y.shape)))
        y.backward(cotangent)
        for name, value in (("in", x), ("out", y), ("cotangent", cotangent), ("grad", x.grad)):
            arrays[f"{case}/{name}"] = value.numpy(force=True)
        for kind in ("param", "grad"):
            their = {name: (p if kind == "param" else p.grad).numpy(force=True) for name, p in layer.named_parameters()}
            for part in ("weight", "bias"):
                arrays[f"{case}/{kind}/qkv.{part}"] = np.concatenate([their[f"{name}_proj.{part}"] for name in "qkv"])
                arrays[f"{case}/{kind}/out.{part}"] = their[f"out_proj.{part}"]
                if full:
                    arrays[f"{case}/{kind}/norm.{part}"] = their[f"inner_attn_ln.{part}"]
        arrays[f"{case}/segments"], arrays[f"{case}/dilations"] = np.array(segments), np.array(dilations)
        arrays[f"{case}/heads"] = np.array(heads)
    return arrays


if __name__ == "__main__":
    write(dilated_attention=dilated_attention, longnet=longnet)
