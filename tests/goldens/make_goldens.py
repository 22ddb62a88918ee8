"""Makes the .npz files beside it from independent implementations: PyTorch and transformers, in float64 on the CPU.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_goldens.py

The committed files were made with these versions (CPU wheels). The script is deterministic: the same versions on the
same machine write the same bytes; elsewhere the last digits of sums may differ. Tests read the files and never import
torch.

ops.npz and sdpa.npz hold calls of operators, named by operator or ``operator.variant``:

    CALL/in/ARGUMENT          an input, under the operator's own argument name; absent optional inputs have no entry
    CALL/param/NAME           a static parameter, 0-d
    CALL/out/I                output I = 0, 1, ...
    CALL/cotangent/I          random dL/d(output I); adamw has none
    CALL/grad/ARGUMENT        dL/d(argument)

gpt2.npz holds a GPT-2 with random biases and gains (none is 0 or 1), weights [out, in], no dropout:

    param/NAME, grad/NAME     parameters, and the gradients of ``loss`` (the tied head's is part of ``embed``)
    ids, labels [B T]         labels[b, t] is the target at position t: nothing is shifted
    logits [B T V], loss []   with gelu_tanh; logits_erf, loss_erf: the same weights with gelu
    heads []
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

HERE = Path(__file__).resolve().parent


def tensor(array: np.ndarray) -> torch.Tensor:
    """A leaf that wants a gradient, unless it holds integers or booleans."""
    return torch.tensor(array, requires_grad=array.dtype.kind == "f")


class Calls:
    """Collects calls of operators with random cotangents and their gradients."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.arrays: dict[str, np.ndarray] = {}

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * self.rng.standard_normal(shape)

    def add(self, call: str, function, inputs: dict[str, np.ndarray], /, **params) -> None:
        """Record ``function(**inputs)`` as a call; ``params`` are how the operator's own parameters spell it.

        Ours are positional only, as an operator's own may have the same name: gated has a ``function``.
        """
        leaves = {name: tensor(array) for name, array in inputs.items()}
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [np.asarray(self.normal(*output.shape)) for output in outputs]
        torch.autograd.backward(outputs, [torch.from_numpy(cotangent) for cotangent in cotangents])
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
        self.record(call, inputs, params, outputs)
        for i, cotangent in enumerate(cotangents):
            self.arrays[f"{call}/cotangent/{i}"] = cotangent
        for name, gradient in gradients.items():
            self.arrays[f"{call}/grad/{name}"] = gradient.numpy()

    def record(self, call: str, inputs, params, outputs) -> None:
        for name, array in inputs.items():
            self.arrays[f"{call}/in/{name}"] = array
        for name, value in params.items():
            self.arrays[f"{call}/param/{name}"] = np.asarray(value)
        for i, output in enumerate(outputs):
            self.arrays[f"{call}/out/{i}"] = output.detach().numpy().copy()


def ops() -> dict[str, np.ndarray]:
    """Operators of the engine against torch.nn.functional and torch.optim.AdamW."""
    calls = Calls(1)
    normal, rng = calls.normal, calls.rng

    def gain(size):
        return 1 + normal(size, scale=0.3)

    rows = {"x": normal(3, 4, 10, scale=2.0) + 0.7, "weight": gain(10), "bias": normal(10)}
    calls.add("layer_norm", lambda x, weight, bias: F.layer_norm(x, (10,), weight, bias, eps=1e-5), rows, eps=1e-5)
    calls.add("layer_norm.plain", lambda x: F.layer_norm(x, (10,), eps=1e-3), {"x": normal(5, 10)}, eps=1e-3)
    rows = {"x": normal(3, 4, 10, scale=2.0), "weight": gain(10)}
    calls.add("rms_norm", lambda x, weight: F.rms_norm(x, (10,), weight, eps=1e-5), rows, eps=1e-5)
    calls.add("rms_norm.plain", lambda x: F.rms_norm(x, (10,), eps=1e-3), {"x": normal(5, 10)}, eps=1e-3)
    rows = {"x": normal(2, 5, 12, scale=2.0) - 0.3, "weight": gain(12), "bias": normal(12)}
    calls.add("group_norm",
              lambda x, weight, bias: F.group_norm(x.reshape(10, 12), 3, weight, bias, eps=1e-5).reshape(x.shape),
              rows, groups=3, eps=1e-5)

    # Both tails and the neighbourhood of 0, beside ordinary values.
    x = np.concatenate([normal(40), normal(20, scale=5.0), normal(4, scale=1e-3), [0.0, -9.0, 9.0, -30.0, 30.0]])
    calls.add("gelu", lambda x: F.gelu(x, approximate="none"), {"x": x})
    calls.add("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), {"x": x})
    calls.add("silu", lambda x: F.silu(x), {"x": x})
    calls.add("softplus", lambda x: F.softplus(x, threshold=50.0), {"x": x})  # the default cuts off at 20

    labels = rng.integers(0, 7, (3, 5))
    calls.add("cross_entropy", lambda logits, labels: F.cross_entropy(logits.reshape(15, 7), labels.reshape(15)),
              {"logits": normal(3, 5, 7, scale=3.0), "labels": labels})
    labels = np.where(rng.random((3, 5)) < 0.4, -100, labels)
    calls.add("cross_entropy.ignored",
              lambda logits, labels: F.cross_entropy(logits.reshape(15, 7), labels.reshape(15), ignore_index=-100),
              {"logits": normal(3, 5, 7, scale=3.0), "labels": labels}, ignore_index=-100)
    calls.add("embedding", lambda weight, ids: F.embedding(ids, weight),
              {"weight": normal(6, 5), "ids": np.array([[0, 2, 2, 5], [2, 5, 0, 3]])})

    wide = {"x": normal(3, 4, 6, scale=10.0)}
    calls.add("log_softmax", lambda x: F.log_softmax(x, dim=-1), wide, axis=-1)
    calls.add("log_softmax.middle", lambda x: F.log_softmax(x, dim=1), wide, axis=1)
    calls.add("logsumexp", lambda x: torch.logsumexp(x, dim=-1), wide, axis=-1)
    calls.add("logsumexp.middle", lambda x: torch.logsumexp(x, dim=1, keepdim=True), wide, axis=1, keepdims=True)

    def causal_conv1d(x, weight, bias):
        channels, width = weight.shape
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        return F.conv1d(padded, weight[:, None], bias, groups=channels).transpose(1, 2)

    calls.add("causal_conv1d", causal_conv1d, {"x": normal(2, 9, 3), "weight": normal(3, 4), "bias": normal(3)})
    adamw(calls)
    reductions(calls)
    convolutions(calls)
    return calls.arrays


def reductions(calls: Calls) -> None:
    """Scans, norms, and every reduction of cross_entropy."""
    normal, rng = calls.normal, calls.rng
    x = normal(3, 4, 6)
    calls.add("cumprod", lambda x: torch.cumprod(x, dim=-1), {"x": x}, axis=-1)
    x = np.where(rng.random(x.shape) < 0.2, 0.0, x)
    calls.add("cumprod.zeros", lambda x: torch.cumprod(x, dim=1), {"x": x}, axis=1)
    x = normal(3, 4, 6, scale=10.0)
    calls.add("logcumsumexp", lambda x: torch.logcumsumexp(x, dim=-1), {"x": x}, axis=-1)
    calls.add("logcumsumexp.middle", lambda x: torch.logcumsumexp(x, dim=1), {"x": x}, axis=1)
    calls.add("norm", lambda x: torch.linalg.vector_norm(x), {"x": x})
    for name, order in (("sum", 1), ("root", 2)):
        calls.add(f"norm.{name}", lambda x, order=order: torch.linalg.vector_norm(x, order, (0, 2), True), {"x": x},
                  axis=(0, 2), keepdims=True, ord=order)
    for name, smoothing in (("", 0.0), ("_smoothed", 0.2)):
        for reduction in ("sum", "none") + ("mean",) * (smoothing > 0):
            labels = np.where(rng.random((3, 5)) < 0.3, -100, rng.integers(0, 7, (3, 5)))
            calls.add(f"cross_entropy.{reduction}{name}",
                      lambda logits, labels, reduction=reduction, smoothing=smoothing: F.cross_entropy(
                          logits.movedim(-1, 1), labels, reduction=reduction, label_smoothing=smoothing),
                      {"logits": normal(3, 5, 7, scale=3.0), "labels": labels}, ignore_index=-100, reduction=reduction,
                      label_smoothing=smoothing)


def convolutions(calls: Calls) -> None:
    """PyTorch has the channels before the positions."""
    def last(convolve, **options):
        return lambda x, weight, bias=None: convolve(x.movedim(-1, 1), weight, bias, **options).movedim(1, -1)

    def add(call, convolve, x, weight, biased, **options):
        inputs = {"x": calls.normal(*x), "weight": calls.normal(*weight)}
        calls.add(call, last(convolve, **options), inputs | ({"bias": calls.normal(weight[0])} if biased else {}), **options)

    add("conv1d", F.conv1d, (2, 9, 4), (3, 4, 3), True)
    add("conv1d.strided", F.conv1d, (2, 9, 4), (3, 4, 3), False, stride=2, padding=1)
    add("conv1d.dilated", F.conv1d, (2, 11, 2), (5, 2, 3), True, stride=3, padding=4, dilation=2)
    add("conv1d.groups", F.conv1d, (2, 9, 6), (4, 3, 2), True, groups=2)
    add("conv1d.depthwise", F.conv1d, (2, 9, 4), (4, 1, 5), True, padding=2, groups=4)
    add("conv2d", F.conv2d, (2, 5, 6, 3), (4, 3, 3, 2), True)
    add("conv2d.subsampling", F.conv2d, (2, 11, 9, 1), (3, 1, 3, 3), True, stride=2)
    add("conv2d.axes", F.conv2d, (1, 7, 6, 4), (6, 2, 3, 2), True, stride=(2, 1), padding=(0, 2), dilation=(1, 3), groups=2)


def adamw(calls: Calls, steps: int = 5) -> None:
    """Five steps of AdamW over ten values of which the first six decay; each is a call that starts from the last."""
    decayed, rest = (torch.tensor(calls.normal(n), requires_grad=True) for n in (6, 4))
    both = (decayed, rest)
    settings = dict(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-8, weight_decay=0.3)
    optimizer = torch.optim.AdamW(
        [{"params": [decayed], "weight_decay": settings["weight_decay"]}, {"params": [rest], "weight_decay": 0.0}],
        lr=settings["lr"], betas=(settings["beta1"], settings["beta2"]), eps=settings["eps"],
    )

    def state() -> list[torch.Tensor]:
        def moment(key):
            return torch.cat([optimizer.state[p].get(key, torch.zeros_like(p)) for p in both])

        return [torch.cat([p.detach() for p in both]), moment("exp_avg"), moment("exp_avg_sq")]

    for step in range(1, steps + 1):
        before = state()
        grad = torch.tensor(calls.normal(10, scale=10.0 ** (step - 3)))
        decayed.grad, rest.grad = grad[:6].clone(), grad[6:].clone()
        optimizer.step()
        arrays = (t.numpy() for t in (before[0], grad, *before[1:]))
        inputs = dict(zip(("param", "grad", "m", "v"), arrays, strict=True))
        calls.record(f"adamw.step{step}", inputs, {**settings, "decayed": 6, "step": step, "scale": 1.0}, state())


def sdpa() -> dict[str, np.ndarray]:
    """attention against torch.nn.functional.scaled_dot_product_attention, and with a sink against gpt-oss in transformers.

    The second output is torch.logsumexp of the scores. Every query sees at least one key.
    """
    calls = Calls(2)
    rng = calls.rng

    def add(variant, shape, *, causal, mask=None, scale=None, groups=None, window=None, sink=False):
        batch, heads, queries, keys, key_dim, value_dim = shape
        groups = groups or heads
        inputs = {"q": calls.normal(batch, heads, queries, key_dim), "k": calls.normal(batch, groups, keys, key_dim),
                  "v": calls.normal(batch, groups, keys, value_dim)}
        # is_causal aligns T x S masks at the top left; ours continue a cache, so they end at the bottom right.
        triangle = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        seen = triangle if causal else torch.ones(queries, keys, dtype=torch.bool)
        if window is not None:
            seen = seen & ~triangle.tril(keys - queries - window)
        if mask is not None:
            inputs["mask"] = mask
            seen = seen & torch.from_numpy(mask)
        if sink:
            inputs["sink"] = calls.normal(heads)
        assert seen.any(-1).all()
        factor = key_dim**-0.5 if scale is None else scale

        def function(q, k, v, mask=None, sink=None):
            scores = factor * q @ k.repeat_interleave(heads // groups, dim=1).mT
            scores = scores.masked_fill(~seen, -torch.inf)
            if sink is not None:
                scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
                module = SimpleNamespace(sinks=sink, num_key_value_groups=heads // groups, training=False)
                added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
                y = eager_attention_forward(module, q, k, v, added, factor)[0].transpose(1, 2)
            elif causal and mask is None and window is None and queries == keys:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups != heads)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=groups != heads)
            return y, torch.logsumexp(scores, dim=-1)

        params = {"causal": causal, "scale": scale, "window": window}
        calls.add(f"attention.{variant}", function, inputs, **{name: x for name, x in params.items() if x is not None})

    def random_mask(*shape):
        """About half of the keys, and always key 0."""
        mask = rng.random(shape) < 0.5
        mask[..., 0] = True
        return mask

    add("causal", (2, 2, 7, 7, 4, 4), causal=True)
    add("causal_wide_values", (1, 2, 7, 7, 4, 6), causal=True)
    add("causal_scale", (1, 2, 6, 6, 4, 4), causal=True, scale=0.9)
    add("causal_cache", (1, 2, 3, 8, 4, 4), causal=True)
    add("full", (2, 2, 4, 6, 4, 4), causal=False)
    add("full_more_queries", (1, 2, 8, 3, 4, 4), causal=False, scale=0.2)
    add("mask", (2, 2, 5, 7, 4, 4), causal=False, mask=random_mask(2, 2, 5, 7))
    add("mask_of_keys", (2, 2, 5, 7, 4, 4), causal=False, mask=random_mask(2, 1, 1, 7))
    add("mask_and_causal", (2, 1, 7, 7, 16, 16), causal=True, mask=random_mask(2, 1, 7, 7))
    add("groups", (2, 6, 5, 5, 4, 4), causal=True, groups=2)
    add("one_group", (2, 4, 3, 7, 4, 5), causal=True, groups=1)
    add("window", (2, 2, 9, 9, 4, 4), causal=True, window=4)
    add("sink", (2, 2, 5, 7, 4, 4), causal=True, sink=True)
    add("sink_groups_window", (1, 4, 9, 9, 4, 4), causal=True, groups=2, window=4, sink=True)
    return calls.arrays


LAYER = {  # transformers' names within a block
    "norm1": "ln_1", "mixer.qkv": "attn.c_attn", "mixer.out": "attn.c_proj", "norm2": "ln_2",
    "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj",
}  # fmt: skip


def gpt2() -> dict[str, np.ndarray]:
    """Logits, loss and all gradients of transformers' GPT2LMHeadModel."""
    rng = np.random.default_rng(3)
    layers, heads, width, context, vocab, batch, length = 2, 2, 12, 12, 17, 2, 9
    names = {"embed": "wte.weight", "positions": "wpe.weight", "norm.weight": "ln_f.weight", "norm.bias": "ln_f.bias"}
    names |= {f"blocks.{i}.{ours}.{kind}": f"h.{i}.{theirs}.{kind}"
              for i in range(layers) for ours, theirs in LAYER.items() for kind in ("weight", "bias")}

    def build(activation: str) -> GPT2LMHeadModel:
        config = GPT2Config(vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
                            activation_function=activation, layer_norm_epsilon=1e-5, resid_pdrop=0.0, embd_pdrop=0.0,
                            attn_pdrop=0.0, tie_word_embeddings=True, attn_implementation="eager",
                            bos_token_id=None, eos_token_id=None)
        return GPT2LMHeadModel(config).double()

    def ours(name: str, value: torch.Tensor) -> np.ndarray:
        """transformers' Conv1D keeps weights [in, out]."""
        transposed = value.ndim == 2 and ("mixer" in name or "ffn" in name)
        return np.ascontiguousarray((value.T if transposed else value).detach().numpy())

    model = build("gelu_new")
    parameters = dict(model.transformer.named_parameters())
    assert parameters.keys() == set(names.values()) and model.lm_head.weight is parameters["wte.weight"]
    with torch.no_grad():
        for theirs in names.values():  # larger than GPT-2's own, so that no part of the network is nearly linear
            parameter = parameters[theirs]
            gain = "ln_" in theirs and theirs.endswith("weight")
            parameter.copy_(torch.from_numpy(float(gain) + 0.25 * rng.standard_normal(tuple(parameter.shape))))
    ids, labels = rng.integers(0, vocab, (2, batch, length))

    def run(network: GPT2LMHeadModel):
        logits = network(input_ids=torch.from_numpy(ids)).logits
        # Not the loss of transformers: it rounds the logits to float32 first, and shifts the labels.
        return logits, F.cross_entropy(logits.reshape(-1, vocab), torch.from_numpy(labels).reshape(-1))

    logits, loss = run(model)
    assert logits.dtype == loss.dtype == torch.float64
    loss.backward()
    exact = build("gelu")
    exact.load_state_dict(model.state_dict())
    logits_erf, loss_erf = run(exact)

    arrays = {"heads": np.asarray(heads), "ids": ids, "labels": labels, "logits": logits.detach().numpy(),
              "loss": loss.detach().numpy(), "logits_erf": logits_erf.detach().numpy(),
              "loss_erf": loss_erf.detach().numpy()}
    for name, theirs in names.items():
        arrays[f"param/{name}"] = ours(name, parameters[theirs])
        arrays[f"grad/{name}"] = ours(name, parameters[theirs].grad)
    return arrays


def write(**files) -> None:
    """Write NAME.npz with the arrays that each function makes."""
    print(f"numpy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    torch.set_num_threads(1)
    for name, make in files.items():
        torch.manual_seed(0)
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **make())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    write(gpt2=gpt2, sdpa=sdpa, ops=ops)
