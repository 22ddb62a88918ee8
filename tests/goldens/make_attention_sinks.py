"""Makes attention_sinks.npz: layers with a cache of the package attention_sinks, in float64 on the CPU.

    pip install what make_goldens.py needs && pip install --no-deps attention_sinks==0.4.0
    python tests/goldens/make_attention_sinks.py

Every token is a step, as in the paper's evaluation: the cache has keys that are not turned yet, all of them are turned by their
places in the cache, the token attends to them and to itself, and the package's cache drops what it has no room for. PyTorch
differentiates the whole text. CASE/...:

    in, out, cotangent, grad  the input [B T D], the output, and their gradients
    param/NAME, grad/NAME     parameters, under the names of our mixer
    heads, window, sinks []   how the layer is built; the case's name is the positions, or the kind of sink with rope

Of the package only the file of its cache is read: the rest needs an older version of transformers.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from make_goldens import write

BATCH, HEADS, WIDTH, LENGTH, WINDOW, SINKS = 2, 2, 8, 11, 3, 2


def cache_of_the_package():
    file = Path(importlib.util.find_spec("attention_sinks").origin).with_name("attention_sink_kv_cache.py")
    spec = importlib.util.spec_from_file_location("attention_sink_kv_cache", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AttentionSinkKVCache(SINKS, WINDOW)


def turned(x, positions):
    """Pairs of neighbours [B H n K] as complex numbers."""
    angles = torch.outer(positions.double(), 10_000 ** (-2 * torch.arange(x.shape[3] // 2).double() / x.shape[3]))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:3], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(x.shape)


def layer(case, x, qkv, out, logit=None):
    """The output [B T D], token by token."""
    cache, past, rows, slopes = cache_of_the_package(), None, [], 2.0 ** (-8 * torch.arange(1, HEADS + 1).double() / HEADS)
    for t in range(LENGTH):
        q, k, v = (part.reshape(BATCH, 1, HEADS, -1).transpose(1, 2) for part in (x[:, t] @ qkv.T).split(WIDTH, dim=1))
        keys, values = (k, v) if past is None else (torch.cat(pair, 2) for pair in zip(past[0], (k, v), strict=True))
        places = torch.arange(keys.shape[2])
        rotating = case not in ("none", "alibi")
        near, turning = (turned(q, places[-1:]), turned(keys, places)) if rotating else (q, keys)
        scores = near @ turning.transpose(2, 3) / q.shape[3] ** 0.5  # [B H 1 n]
        if case == "alibi":
            scores = scores + slopes[:, None, None] * (places - places[-1])
        if logit is not None:
            scores = torch.cat([scores, logit[None, :, None, None].expand(BATCH, HEADS, 1, 1)], 3)
        weights = scores.softmax(3)[..., :keys.shape[2]]
        rows.append((weights @ values).transpose(1, 2).reshape(BATCH, WIDTH) @ out.T)
        past = cache([[keys, values]])
    return torch.stack(rows, 1)


def layers() -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(17), {}
    for case in ("rope", "none", "alibi", "zero", "logit"):
        inputs = {"in": rng.normal(size=(BATCH, LENGTH, WIDTH)), "qkv.weight": rng.normal(size=(3 * WIDTH, WIDTH)) * 0.6,
                  "out.weight": rng.normal(size=(WIDTH, WIDTH))}
        if case in ("zero", "logit"):
            inputs["logit"] = np.zeros(HEADS) if case == "zero" else rng.normal(size=HEADS)
        leaves = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
        y = layer(case, *leaves.values())
        cotangent = rng.normal(size=y.shape)
        y.backward(torch.from_numpy(cotangent))
        entries = {"in": inputs.pop("in"), "out": y.detach().numpy(), "cotangent": cotangent,
                   "grad": leaves.pop("in").grad.numpy(), "heads": np.asarray(HEADS),
                   "window": np.asarray(WINDOW), "sinks": np.asarray(SINKS)}
        for name, leaf in leaves.items():
            if case == "zero" and name == "logit":
                continue
            entries |= {f"param/{name}": inputs[name], f"grad/{name}": leaf.grad.numpy()}
        arrays |= {f"{case}/{name}": array for name, array in entries.items()}
    return arrays


if __name__ == "__main__":
    write(attention_sinks=layers)
