"""Makes project.npz and linformer.npz: the projection of rows, and Linformer layers of two packages, in float64 on the CPU.

    pip install what make_goldens.py needs && pip install --no-deps linformer==0.2.3 linformer-pytorch==0.19.3
    python tests/goldens/make_linformer.py

The entries of project.npz are those of ops.npz. linformer.npz holds layers, CASE/...:

    in, out, cotangent, grad  the input [B T D], the output, and their gradients
    param/NAME, grad/NAME     parameters, under the names of our mixer
    heads, context []         and what else the layer is built of; the option --sharing and --projection are the case's name

``headwise`` and ``short``, a text that is shorter than the context, are the LinformerSelfAttention of lucidrains' package. The
others are the MHAttention of linformer-pytorch, with convolutions in ``convolution``. Biases, where ours has none, are 0.
"""

import numpy as np
import torch
from linformer.linformer import LinformerSelfAttention
from linformer_pytorch.linformer_pytorch import MHAttention
from make_goldens import Calls, write

BATCH, HEADS, WIDTH, CONTEXT, LENGTH = 2, 2, 6, 8, 4


def project() -> dict[str, np.ndarray]:
    """Every head its own matrix, two heads with one, and padding that is set to 0."""
    calls = Calls(11)

    def mixed(x, weight, seen=None):
        x = x if seen is None else x * seen[:, None, :, None]
        weight = weight[:, :, : x.shape[2]].repeat_interleave(x.shape[1] // len(weight), 0)
        return torch.einsum("hmt,bhtk->bhmk", weight, x)

    for name, groups, columns in (("own", 4, 5), ("shared", 2, 7), ("padded", 1, 5)):
        inputs = {"x": calls.normal(2, 4, 5, 3), "weight": calls.normal(groups, 2, columns)}
        if name == "padded":
            inputs["seen"] = np.arange(5) < np.array([[5], [3]])
        calls.add(f"project.{name}", mixed, inputs)
    return calls.arrays


def lucidrains(network, arrays):
    """Our names and shapes of the parameters, or of their gradients."""
    return {**{f"{ours}.weight": arrays[f"to_{ours}.weight"] for ours in "qkv"}, "out.weight": arrays["to_out.weight"],
            "E.weight": arrays["proj_k"].T[None], "F.weight": arrays["proj_v"].T[None]}


def tatp22(network, arrays):
    """The same; the heads of a layer are modules of their own, which may hold the same projection."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def projections(which):
        weights = [arrays[names[id(getattr(head, which).weight)]] for head in network.heads]
        distinct = len({id(getattr(head, which)) for head in network.heads})
        weights = np.stack(weights[:distinct])
        return weights.transpose(0, 3, 2, 1) if weights.ndim == 4 else weights  # a convolution's are [K, K, size]

    result = {f"{ours}.weight": np.concatenate([arrays[f"to_{ours}.{h}.weight"] for h in range(HEADS)]) for ours in "qkv"}
    result |= {"out.weight": arrays["w_o.weight"], "E.weight": projections("E")}
    return result if network.heads[0].E is network.heads[0].F else {**result, "F.weight": projections("F")}


def linformer() -> dict[str, np.ndarray]:
    """Outputs and all gradients of the layers."""
    arrays, rng = {}, np.random.default_rng(12)
    torch.set_default_dtype(torch.float64)

    def theirs(sharing, method="learnable"):
        return MHAttention(CONTEXT, WIDTH // HEADS, WIDTH, LENGTH, HEADS, 0.0, "C0", sharing, None, None, False, None,
                           method=method)

    cases = {"headwise": LinformerSelfAttention(WIDTH, CONTEXT, k=LENGTH, heads=HEADS), "none": theirs("none"),
             "key-value": theirs("kv"), "convolution": theirs("headwise", "convolution")}
    cases["short"] = cases["headwise"]
    for case, network in cases.items():
        network.zero_grad()
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.from_numpy(0.5 * rng.standard_normal(tuple(parameter.shape)))
                parameter.copy_(noise if parameter.ndim > 1 else 0 * noise)
        x = torch.from_numpy(rng.standard_normal((BATCH, CONTEXT - 3 * (case == "short"), WIDTH))).requires_grad_()
        y = network(x)
        cotangent = torch.from_numpy(rng.standard_normal(tuple(y.shape)))
        y.backward(cotangent)
        for name, value in (("in", x), ("out", y), ("cotangent", cotangent), ("grad", x.grad)):
            arrays[f"{case}/{name}"] = value.numpy(force=True)
        ours = lucidrains if isinstance(network, LinformerSelfAttention) else tatp22
        for kind in ("param", "grad"):
            found = {name: (p if kind == "param" else p.grad) for name, p in network.named_parameters()}
            found = {name: value.numpy(force=True).copy() for name, value in found.items() if value is not None}
            for name, value in ours(network, found).items():
                arrays[f"{case}/{kind}/{name}"] = value
        arrays |= {f"{case}/heads": np.asarray(HEADS), f"{case}/context": np.asarray(CONTEXT)}
    torch.set_default_dtype(torch.float32)
    return arrays


if __name__ == "__main__":
    write(project=project, linformer=linformer)
