"""Makes one_wide_ffn.npz: whole encoder-decoders of PyTorch's own layers, with all gradients, in float64 on the CPU.

    pip install what make_goldens.py needs
    python tests/goldens/make_one_wide_ffn.py

The layers are torch.nn.TransformerEncoderLayer and TransformerDecoderLayer with norm_first, the model that the paper changes.
Layers that share a feed-forward network hold the same two torch.nn.Linear. A layer without one has a second matrix and bias of
zeros, which are not trained. The embedding, its positions and the head stand around them as in the paper. The first source and
target are padded. CASE/...:

    source [B S], target [B T]  ids, -1 where a row has ended
    logits [B T V], cotangent   the logits and their gradient, which is 0 where the target is padded
    param/NAME, grad/NAME       parameters under the names of our model
    heads, positions            options of our model; the rest of it follows from the case's name and from shapes
"""

import numpy as np
import torch
from make_goldens import write

VOCAB, WIDTH, HEADS, HIDDEN = 9, 8, 2, 6  # HIDDEN: of a layer's own network
CASES = {  # the number of each layer's network, and the hidden sizes of the networks
    "encoder-decoder": dict(encoder=(0, 1), decoder=(2, 3), hidden=(6, 6, 6, 6), learned=True),
    "one-wide": dict(encoder=(0, 0), decoder=(None, None), hidden=(24,), learned=False),
    "all": dict(encoder=(0, 0), decoder=(0,), hidden=(18,), learned=True),
    "no-encoder": dict(encoder=(None,), decoder=(0,), hidden=(6,), learned=False),
}
SOURCE = np.array([[3, 1, 4, 8, -1, -1], [2, 7, 1, 6, 5, 8]])
TARGET = np.array([[8, 4, 1, -1, -1], [8, 5, 2, 0, 7]])


def sines(length):
    """Section 3.5 of Vaswani et al. 2017."""
    rows = torch.arange(length, dtype=torch.float64)[:, None]
    angles = rows / 10_000 ** (2 * (torch.arange(WIDTH, dtype=torch.float64) // 2) / WIDTH)
    return torch.where(torch.arange(WIDTH) % 2 == 0, angles.sin(), angles.cos())


def randomised(module, rng):
    for name, p in module.named_parameters():
        noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
        p.data = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
    return module


def sides(case, rng):
    """The layers of both sides, with their networks."""
    nn, kwargs = torch.nn, dict(dropout=0.0, batch_first=True, norm_first=True, dtype=torch.float64)
    networks = [(nn.Linear(WIDTH, size, dtype=torch.float64), nn.Linear(size, WIDTH, dtype=torch.float64))
                for size in case["hidden"]]
    for pair in networks:
        for linear in pair:
            randomised(linear, rng)
    found = []
    for kind, numbers in ((nn.TransformerEncoderLayer, case["encoder"]), (nn.TransformerDecoderLayer, case["decoder"])):
        layers = []
        for number in numbers:
            layer = randomised(kind(WIDTH, HEADS, HIDDEN, **kwargs), rng)
            if number is None:
                for p in (*layer.linear1.parameters(), *layer.linear2.parameters()):
                    p.data, p.requires_grad = torch.zeros_like(p), False
            else:
                layer.linear1, layer.linear2 = networks[number]
            layers.append(layer)
        found.append(layers)
    return found


def forward(encoder, decoder, embed, places, norms, case):
    """Logits of both pairs."""
    source, target = torch.from_numpy(SOURCE), torch.from_numpy(TARGET)
    gone = source < 0
    scale = 1 if case["learned"] else WIDTH**0.5
    x = scale * embed[source.clamp(min=0)] + places[0]
    for layer in encoder:
        x = layer(x, src_key_padding_mask=gone)
    memory = norms[0](x)
    y = scale * embed[target.clamp(min=0)] + places[1]
    later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    for layer in decoder:
        y = layer(y, memory, tgt_mask=later, memory_key_padding_mask=gone)
    return norms[1](y) @ embed.T


def named(encoder, decoder, case):
    """Our names of parameters with arrays' getters: name -> function of (parameter or its gradient)."""
    first, result = {}, {}
    for side, layers in (("encoder", encoder), ("decoder", decoder)):
        for i, (layer, number) in enumerate(zip(layers, case[side], strict=True)):
            place = f"{side}.{i}"
            attention = {"mixer.qkv.weight": (layer.self_attn.in_proj_weight, slice(None)),
                         "mixer.qkv.bias": (layer.self_attn.in_proj_bias, slice(None)),
                         "mixer.out.weight": (layer.self_attn.out_proj.weight, slice(None)),
                         "mixer.out.bias": (layer.self_attn.out_proj.bias, slice(None))}
            norms = ["norm1"]
            if side == "decoder":
                cross = layer.multihead_attn
                for name, p in (("weight", cross.in_proj_weight), ("bias", cross.in_proj_bias)):
                    attention |= {f"cross.q.{name}": (p, slice(WIDTH)), f"cross.kv.{name}": (p, slice(WIDTH, None))}
                attention |= {"cross.out.weight": (cross.out_proj.weight, slice(None)),
                              "cross.out.bias": (cross.out_proj.bias, slice(None))}
                norms.append("norm2")
            if number is not None:
                norms.append(f"norm{len(norms) + 1}")
                if number not in first:
                    first[number] = place
                    for name, linear in (("ffn.up", layer.linear1), ("ffn.down", layer.linear2)):
                        attention |= {f"{name}.weight": (linear.weight, slice(None)),
                                      f"{name}.bias": (linear.bias, slice(None))}
            for norm in norms:
                module = getattr(layer, norm)
                attention |= {f"{norm}.weight": (module.weight, slice(None)), f"{norm}.bias": (module.bias, slice(None))}
            result |= {f"{place}.{name}": entry for name, entry in attention.items()}
    return result


def make() -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(41), {}
    for name, case in CASES.items():
        encoder, decoder = sides(case, rng)
        embed = torch.from_numpy(0.7 * rng.standard_normal((VOCAB, WIDTH))).requires_grad_()
        lengths = SOURCE.shape[1], TARGET.shape[1]
        places = [sines(length) for length in lengths]
        if case["learned"]:
            places = [torch.from_numpy(0.7 * rng.standard_normal((length, WIDTH))).requires_grad_() for length in lengths]
        norms = [torch.nn.LayerNorm(WIDTH, dtype=torch.float64) for _ in range(2)]
        for norm in norms:
            norm.weight.data = torch.from_numpy(1 + 0.3 * rng.standard_normal(WIDTH))
            norm.bias.data = torch.from_numpy(rng.standard_normal(WIDTH))
        logits = forward(encoder, decoder, embed, places, norms, case)
        cotangent = rng.standard_normal(tuple(logits.shape)) * (TARGET >= 0)[..., None]
        logits.backward(torch.from_numpy(cotangent))
        parameters = {"embed.weight": (embed, slice(None)), **named(encoder, decoder, case)}
        for norm, ours in zip(norms, ("memory_norm", "norm"), strict=True):
            parameters |= {f"{ours}.weight": (norm.weight, slice(None)), f"{ours}.bias": (norm.bias, slice(None))}
        if case["learned"]:
            parameters |= {"source_positions": (places[0], slice(None)), "target_positions": (places[1], slice(None))}
        arrays |= {f"{name}/source": SOURCE, f"{name}/target": TARGET, f"{name}/logits": logits.detach().numpy(),
                   f"{name}/cotangent": cotangent, f"{name}/heads": np.asarray(HEADS),
                   f"{name}/positions": np.asarray("learned" if case["learned"] else "sinusoidal")}
        for ours, (p, rows) in parameters.items():
            arrays |= {f"{name}/param/{ours}": p.detach().numpy()[rows], f"{name}/grad/{ours}": p.grad.numpy()[rows]}
    return arrays


if __name__ == "__main__":
    write(one_wide_ffn=make)
