"""Makes megabyte.npz: whole MEGABYTEs of two and three levels, with all gradients, in float64 on the CPU.

    pip install what make_goldens.py needs
    python tests/goldens/make_megabyte.py

No public package computes the paper's graph: MEGABYTE-pytorch reads summaries of patches elsewhere. So this is the paper's
equations (1) to (6), position by position, with PyTorch's attention, norms, gelu and loss. The text y has T bytes, and all of
them are predicted, as in the paper: the first one from pads alone. Our models read a token before the text; here it is a token
that occurs nowhere else, whose embedding is the last of the paper's pads. CASE/...:

    ids, labels [B T]       the token before the text and the bytes up to T - 1; the text
    logits [B T V], loss [] with gelu, the loss is the mean cross-entropy
    param/NAME, grad/NAME   parameters under the names of our model, which has biases nowhere
    heads, patch, ...       options of our model
"""

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import write

BATCH, LENGTH, BYTES, HEADS = 2, 12, 7, 2
CASES = {  # groups of positions inside a patch, widths and layers of the levels
    "learned": dict(groups=(3,), widths=(12, 8), layers=(2, 1), pads="learned", start="pad", projection=True),
    "appendix": dict(groups=(3,), widths=(12, 4), layers=(1, 2), pads="first-id", start="pad", projection=False),
    "previous": dict(groups=(4,), widths=(8, 12), layers=(1, 1), pads="learned", start="previous", projection=True),
    "three": dict(groups=(2, 3), widths=(12, 6, 8), layers=(1, 1, 1), pads="learned", start="pad", projection=True),
}


def shapes(case) -> dict[str, tuple[int, ...]]:
    groups, widths = case["groups"], case["widths"]
    vocab = BYTES + 1
    found = {"embed.weight": (vocab, widths[-1])}
    for i, (width, layers) in enumerate(zip(widths, case["layers"], strict=True)):
        unit, level = int(np.prod(groups[i:])), f"blocks.{i}"
        if i < len(groups):
            found[f"{level}.embed.weight"] = vocab, width // unit
        pads = unit if i and case["start"] == "pad" else unit - 1
        if case["pads"] == "learned":
            if pads:
                found[f"{level}.pads"] = pads, width // unit
            found[f"{level}.positions"] = (groups[i - 1], width) if i else (LENGTH, width // unit)
        for layer in range(layers):
            block = f"{level}.stack.{layer}"
            found |= {f"{block}.norm1.weight": (width,), f"{block}.mixer.qkv.weight": (3 * width, width),
                      f"{block}.mixer.out.weight": (width, width), f"{block}.norm2.weight": (width,),
                      f"{block}.ffn.up.weight": (4 * width, width), f"{block}.ffn.down.weight": (width, 4 * width)}
        if i < len(groups):
            found[f"{level}.norm.weight"] = (width,)
            if case["projection"]:
                found[f"{level}.project.weight"] = widths[i + 1], width // groups[i]
    return found | {"norm.weight": (widths[-1],)}


def transformer(p, level, layers, x):
    """x [B T D] through causal blocks."""
    for layer in range(layers):
        block, width = f"{level}.stack.{layer}", x.shape[2]
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2)
                   for part in (F.layer_norm(x, (width,), p[f"{block}.norm1.weight"]) @ p[f"{block}.mixer.qkv.weight"].T).split(
                       width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + y @ p[f"{block}.mixer.out.weight"].T
        hidden = F.gelu(F.layer_norm(x, (width,), p[f"{block}.norm2.weight"]) @ p[f"{block}.ffn.up.weight"].T)
        x = x + hidden @ p[f"{block}.ffn.down.weight"].T
    return x


def logits(p, case, text, before):
    """Logits [T V] of one text y_0 .. y_{T-1}."""
    groups, widths, carry = case["groups"], case["widths"], None
    for i, width in enumerate(widths):
        unit, level = int(np.prod(groups[i:])), f"blocks.{i}"
        table, positions = p.get(f"{level}.embed.weight", p["embed.weight"]), p.get(f"{level}.positions")
        group = groups[i - 1] if i else LENGTH // unit
        rows = table.shape[1]
        pads = p.get(f"{level}.pads", table[:1].expand(unit, rows))
        inputs = []
        for a in range(LENGTH // unit):
            vectors = []
            for t in range((a - 1) * unit, a * unit):  # (1), (2): the unit before
                if i and a % group == 0 and case["start"] == "pad":
                    vectors.append(pads[t - (a - 1) * unit])
                elif t < -1:
                    vectors.append(pads[t + unit])
                else:
                    h = table[before if t < 0 else text[t]]
                    vectors.append(h if i or positions is None else h + positions[t + 1])
            x = torch.cat(vectors)
            if i:
                x = x + carry[a] if positions is None else x + carry[a] + positions[a % group]  # (4)
            inputs.append(x)
        x = torch.stack(inputs).reshape(-1, group, width)
        y = transformer(p, level, case["layers"][i], x).reshape(-1, width)  # (3), (5)
        if i == len(groups):
            return F.layer_norm(y, (width,), p["norm.weight"]) @ p["embed.weight"].T  # (6)
        y = F.layer_norm(y, (width,), p[f"{level}.norm.weight"])
        carry = [part @ p[f"{level}.project.weight"].T if case["projection"] else part
                 for row in y for part in row.split(width // groups[i])]


def megabyte() -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(23), {}
    for name, case in CASES.items():
        p = {}
        for key, shape in shapes(case).items():
            array = rng.normal(size=shape) * (0.5 if len(shape) > 1 else 0.3) + (len(shape) == 1)
            p[key] = torch.tensor(array, requires_grad=True)
        text = rng.integers(0, BYTES, (BATCH, LENGTH))
        before = 0 if case["pads"] == "first-id" else BYTES
        found = torch.stack([logits(p, case, row, before) for row in text])
        loss = F.cross_entropy(found.flatten(0, 1), torch.from_numpy(text).flatten())
        loss.backward()
        groups, widths, layers = case["groups"], case["widths"], case["layers"]
        entries = {"ids": np.concatenate([np.full((BATCH, 1), before), text[:, :-1]], axis=1), "labels": text,
                   "logits": found.detach().numpy(), "loss": loss.detach().numpy(), "heads": np.asarray(HEADS),
                   "width": np.asarray(widths[0]), "layers": np.asarray(sum(layers)), "pads": np.asarray(case["pads"]),
                   "start": np.asarray(case["start"]), "carry_projection": np.asarray(case["projection"]),
                   "patch": np.asarray(",".join(map(str, groups))),
                   "local_widths": np.asarray(",".join(map(str, widths[1:]))),
                   "local_layers": np.asarray(",".join(map(str, layers[1:])))}
        for key, leaf in p.items():
            entries |= {f"param/{key}": leaf.detach().numpy(), f"grad/{key}": leaf.grad.numpy()}
        arrays |= {f"{name}/{key}": value for key, value in entries.items()}
    return arrays


if __name__ == "__main__":
    write(megabyte=megabyte)
