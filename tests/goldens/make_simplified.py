"""Makes shaping.npz and simplified.npz: shaped attention and simplified blocks in PyTorch, in float64 on the CPU.

    pip install what make_goldens.py needs
    python tests/goldens/make_simplified.py

There is no package of the paper's code, so the blocks are written here once more, by its equations and in the way of its
code (github.com/bobby-he/simplified_transformers): the matrices I and C are stored as such, and α I + β A - γ C is one matrix
that multiplies the values. PyTorch differentiates.

The entries of shaping.npz are those of ops.npz. simplified.npz holds whole blocks, CASE/...:

    in, out, cotangent, grad    the input [B T D], the output, and their gradients
    param/NAME, grad/NAME       parameters, under the names of our block
    heads []                    the rest of how the block is built follows from the case's name
"""

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write

BATCH, LENGTH, HEADS, WIDTH, HIDDEN, EPS = 2, 7, 2, 8, 12, 1e-5


def uniform(length: int, causal: bool) -> torch.Tensor:
    """C: the weights of a softmax whose scores are all 0."""
    ones = torch.ones(length, length, dtype=torch.float64)
    seen = torch.tril(ones) if causal else ones
    return seen / seen.sum(dim=1, keepdim=True)


def heads_of(x, heads=HEADS):
    """[B T D] -> [B H T K]"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def combined(weights, v, alpha, beta, gamma, causal):
    """(α I + β A - γ C) v for A [B H T T] and v [B T D], as one matrix."""
    length = v.shape[1]
    gains = (gain[:, None, None] for gain in (alpha, beta, gamma))
    alpha, beta, gamma = gains
    matrix = alpha * torch.eye(length, dtype=torch.float64) + beta * weights - gamma * uniform(length, causal)
    return merged(matrix @ heads_of(v, len(alpha)))


def shaping() -> dict[str, np.ndarray]:
    """The operator gets A v; a mean of the past is the first row of a longer sequence, as often as it stands for values."""
    calls = Calls(31)
    normal = calls.normal

    def call(a, v, alpha, beta, gamma, mean=None, past=0, causal=True):
        spread = [gain.repeat_interleave(v.shape[2] // len(gain)) for gain in (alpha, beta, gamma)]
        whole = v if mean is None else torch.cat([mean[:, None].expand(-1, past, -1), v], dim=1)
        means = (uniform(whole.shape[1], causal) @ whole)[:, whole.shape[1] - v.shape[1] :]
        return spread[0] * v + spread[1] * a - spread[2] * means, whole.mean(dim=1)

    def inputs(heads, size, **more):
        shape = 2, 5, heads * size
        gains = {name: normal(heads) for name in ("alpha", "beta", "gamma")}
        return {"a": normal(*shape), "v": normal(*shape), **gains, **more}

    calls.add("shaping.causal", call, inputs(3, 2))
    calls.add("shaping.carried", lambda **x: call(**x, past=4), inputs(2, 3, mean=normal(2, 6)), past=4)
    calls.add("shaping.both", lambda **x: call(**x, causal=False), inputs(2, 2), causal=False)
    return calls.arrays


def norm(x, p, name):
    """An RMSNorm, or a LayerNorm where there is a bias; x itself where there are no weights."""
    if f"{name}.bias" in p:
        return F.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], eps=EPS)
    return F.rms_norm(x, (WIDTH,), p[f"{name}.weight"], eps=EPS) if f"{name}.weight" in p else x


def blend(x, p, name):
    """x (α I + β W)ᵀ, equation (6)."""
    if f"{name}.weight" not in p:
        return x
    return x @ (p[f"{name}.alpha"] * torch.eye(WIDTH, dtype=torch.float64) + p[f"{name}.beta"] * p[f"{name}.weight"]).T


def attention(z, p, causal):
    q, k = (heads_of(part) for part in F.linear(z, p["mixer.qk"], p.get("mixer.qk_bias")).split(WIDTH, dim=2))
    if "mixer.q_norm" in p:
        q, k = (F.rms_norm(x, (x.shape[3],), p[f"mixer.{name}_norm"], eps=EPS) for name, x in (("q", q), ("k", k)))
    scores = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    gains = (p[f"mixer.{name}"] for name in ("alpha", "beta", "gamma"))
    return p["mixer.gain"] * blend(combined(scores.softmax(3), blend(z, p, "mixer.values"), *gains, causal), p, "mixer.out")


def ffn(z, p):
    hidden = F.relu(F.linear(z, p["ffn.up.weight"], p.get("ffn.up.bias")))
    return p["ffn.gain"] * F.linear(hidden, p["ffn.down.weight"], p.get("ffn.down.bias"))


def block(x, p, *, causal=True, adds=False):
    """SAS where the block has a gain of its skip connection, else SAS-P."""
    z = norm(x, p, "norm1")
    h = attention(z, p, causal) + (x if adds else 0)
    return p["skip"] * h + ffn(norm(h, p, "norm2"), p) if "skip" in p else h + ffn(z, p)


CASES = {
    "sas-p": {},
    "sas": dict(serial=True),
    "first-without-norms": dict(first=True, norms=False, bias=True),
    "later-without-norms": dict(norms=False, serial=True),
    "everything": dict(bias=True, serial=True, matrices=True, qk_norm=True, adds=True),
    "both-directions": dict(first=True, causal=False),
}


def parameters(rng, *, first=False, serial=False, norms=True, bias=False, matrices=False, qk_norm=False):
    """Random ones, none of them 0 or 1."""
    def gain(*shape):
        return 1 + 0.3 * rng.standard_normal(shape)

    p = {"mixer.qk": rng.standard_normal((2 * WIDTH, WIDTH)), "ffn.up.weight": 0.5 * rng.standard_normal((HIDDEN, WIDTH)),
         "ffn.down.weight": 0.5 * rng.standard_normal((WIDTH, HIDDEN)), "mixer.gain": gain(1), "ffn.gain": gain(1),
         **{f"mixer.{name}": gain(HEADS) for name in ("alpha", "beta", "gamma")}}
    for name in ("norm1",) * (norms or first) + ("norm2",) * (norms and serial):
        p[f"{name}.weight"] = gain(WIDTH)
    if first and not norms:
        p["norm1.bias"] = rng.standard_normal(WIDTH)
    if bias:
        p |= {"mixer.qk_bias": rng.standard_normal(2 * WIDTH), "ffn.up.bias": rng.standard_normal(HIDDEN),
              "ffn.down.bias": rng.standard_normal(WIDTH)}
    for name in ("values",) * (first or matrices) + ("out",) * matrices:
        p |= {f"mixer.{name}.weight": 0.5 * rng.standard_normal((WIDTH, WIDTH)), f"mixer.{name}.alpha": gain(1),
              f"mixer.{name}.beta": gain(1)}
    if serial:
        p["skip"] = gain(1)
    if qk_norm:
        p |= {f"mixer.{name}_norm": gain(WIDTH // HEADS) for name in "qk"}
    return p


def blocks() -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(32), {}
    for case, choices in CASES.items():
        made = {name: value for name, value in choices.items() if name not in ("causal", "adds")}
        inputs = {"in": rng.standard_normal((BATCH, LENGTH, WIDTH)), **parameters(rng, **made)}
        leaves = {name: torch.tensor(array, requires_grad=True) for name, array in inputs.items()}
        x = leaves.pop("in")
        y = block(x, leaves, **{name: value for name, value in choices.items() if name in ("causal", "adds")})
        cotangent = rng.standard_normal(tuple(y.shape))
        y.backward(torch.from_numpy(cotangent))
        entries = {"in": inputs.pop("in"), "out": y.detach().numpy(), "cotangent": cotangent, "grad": x.grad.numpy(),
                   "heads": np.asarray(HEADS)}
        for name, leaf in leaves.items():
            entries |= {f"param/{name}": inputs[name], f"grad/{name}": leaf.grad.numpy()}
        arrays |= {f"{case}/{name}": array for name, array in entries.items()}
    return arrays


if __name__ == "__main__":
    write(shaping=shaping, simplified=blocks)
