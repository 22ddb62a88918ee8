"""Makes the .npz files beside it from independent implementations: PyTorch, transformers, torchscale, in float64 on the CPU.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 && pip install --no-deps torchscale==0.3.0 fairscale==0.4.13
    python tests/goldens/make_goldens.py

The committed files were made with these versions (CPU wheels). The script is deterministic: the same versions on the
same machine write the same bytes; elsewhere the last digits of sums may differ. Tests read the files and never import
torch.

ops.npz, sdpa.npz and retention.npz hold calls of operators, named by operator or ``operator.variant``:

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

retnet.npz holds a RetNetDecoder of torchscale in the same way, with its gated feed-forward network and RMSNorm of ``eps``:

    logits, loss, grad/NAME   of its parallel form, the divisor of the scores differentiated
    logits_recurrent          of its recurrent form, token by token; it has no second divisor
    logits_chunkwise          of its chunkwise form in chunks of 4, which divides by other sums than the parallel one
"""

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

for name in ("timm", "timm.models", "timm.models.layers"):  # of which torchscale imports a function that is not called
    sys.modules[name] = types.ModuleType(name)
sys.modules["timm.models.layers"].drop_path = None
from torchscale.architecture.config import RetNetConfig  # noqa: E402
from torchscale.architecture.retnet import RetNetDecoder  # noqa: E402
from torchscale.component.multiscale_retention import MultiScaleRetention, duplicate_interleave, theta_shift  # noqa: E402

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

    def add(self, call: str, function, inputs: dict[str, np.ndarray], **params) -> None:
        """Record ``function(**inputs)`` as a call; ``params`` are how the operator's own parameters spell it."""
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
    return calls.arrays


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
    """attention against torch.nn.functional.scaled_dot_product_attention; every query sees at least one key."""
    calls = Calls(2)
    rng = calls.rng

    def add(variant, shape, *, causal, mask=None, scale=None):
        batch, heads, queries, keys, key_dim, value_dim = shape
        inputs = {"q": calls.normal(batch, heads, queries, key_dim), "k": calls.normal(batch, heads, keys, key_dim),
                  "v": calls.normal(batch, heads, keys, value_dim)}
        # is_causal aligns T x S masks at the top left; ours continue a cache, so they end at the bottom right.
        triangle = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if mask is not None:
            inputs["mask"] = mask
            assert np.all((mask & triangle.numpy() if causal else mask).any(-1))

        def function(q, k, v, mask=None):
            seen = triangle if causal and mask is None else (mask & triangle if causal else mask)
            if causal and mask is None and queries == keys:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)

        params = {"causal": causal} if scale is None else {"causal": causal, "scale": scale}
        calls.add(f"attention.{variant}", function, inputs, **params)

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


@contextmanager
def faithful_torchscale():
    """Its norms and activations stay in float64, and the divisor of its scores is differentiated."""
    before = torch.Tensor.float, torch.Tensor.detach
    torch.Tensor.float, torch.Tensor.detach = torch.Tensor.double, lambda self: self
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.detach = before


def retention() -> dict[str, np.ndarray]:
    """retention against a loop over time, its "paper" form also against torchscale's layer; rope and swish_gate."""
    calls = Calls(4)
    normal, rng = calls.normal, calls.rng

    def loop(normalization):
        def function(q, k, v, decay, state=None, z=None, count=None):
            batch, heads, length, width = q.shape
            state = torch.zeros(batch, heads, width, v.shape[3]).double() if state is None else state
            z = torch.zeros(batch, heads, width).double() if z is None else z
            count = torch.zeros(batch, heads).double() if count is None else count
            ys = []
            for t in range(length):
                state = decay[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
                z, count = decay[:, None] * z + k[:, :, t], decay * count + 1
                divisor = {"none": torch.ones_like(count), "decay": count.sqrt(),
                           "paper": torch.maximum((q[:, :, t] * z).sum(-1).abs(), count.sqrt())}[normalization]
                ys.append((q[:, :, t, None] @ state)[:, :, 0] / divisor[..., None])
            return torch.stack(ys, 2), state, z, count

        return function

    def inputs(*, carried, scale=1.0):
        batch, heads, length, width, out = 2, 2, 5, 4, 3
        given = {"q": normal(batch, heads, length, width), "k": normal(batch, heads, length, width, scale=scale),
                 "v": normal(batch, heads, length, out), "decay": np.array([0.999, 0.3])}
        if carried:
            given |= {"state": normal(batch, heads, width, out), "z": normal(batch, heads, width),
                      "count": rng.uniform(0, 5, (batch, heads))}
        return given

    for normalization, carried in (("none", False), ("decay", True), ("paper", True)):
        calls.add(f"retention.{normalization}", loop(normalization), inputs(carried=carried), normalization=normalization,
                  chunk_size=3)

    def layer(q, k, v, decay):
        """The parallel form of torchscale's layer, with the states of the loop."""
        length, step = q.shape[2], torch.arange(q.shape[2])
        mask = torch.tril(decay[:, None, None] ** (step[:, None] - step).clamp(min=0))
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        shape = types.SimpleNamespace(num_heads=q.shape[1], head_dim=v.shape[3])
        with faithful_torchscale():
            merged = v.transpose(1, 2).reshape(len(q), length, -1)
            y = MultiScaleRetention.parallel_forward(shape, q, k, merged, mask).transpose(1, 2)
        return y, *loop("paper")(q, k, v, decay)[1:]

    for variant, scale in (("torchscale", 0.1), ("torchscale_large", 5.0)):  # all scores below the limit; most above
        calls.add(f"retention.{variant}", layer, inputs(carried=False, scale=scale), normalization="paper")

    def adjacent(x):
        turned = torch.arange(x.shape[2])[:, None] * 10_000.0 ** -torch.linspace(0, 1, x.shape[3] // 2, dtype=torch.float64)
        return theta_shift(x, *(duplicate_interleave(f(turned)) for f in (torch.sin, torch.cos)))

    def half(x, positions):
        turned = positions[:, :, None] * 10_000.0 ** -(torch.arange(0, x.shape[3], 2).double() / x.shape[3])
        turned = torch.cat([turned, turned], -1)
        return apply_rotary_pos_emb(x, x, turned.cos(), turned.sin())[0]

    # The angles are written out: what makes them is tested by itself.
    calls.add("rope.torchscale", adjacent, {"x": normal(2, 3, 5, 8)}, angles=10_000.0 ** -np.linspace(0, 1, 4))
    calls.add("rope.llama", half, {"x": normal(2, 3, 4, 6), "positions": rng.integers(0, 5000, (2, 4))},
              angles=10_000.0 ** (-np.arange(0, 6, 2) / 6), pairing="half")
    calls.add("swish_gate", lambda x, gate: x * F.silu(gate), {"x": normal(3, 4, 10), "gate": normal(3, 4, 10, scale=4.0)})
    return calls.arrays


DECODER = {  # torchscale's names within a layer; q and k are one matrix here
    "norm1": ["retention_layer_norm"], "mixer.qk": ["retention.q_proj", "retention.k_proj"], "mixer.v": ["retention.v_proj"],
    "mixer.gate": ["retention.g_proj"], "mixer.out": ["retention.out_proj"], "norm2": ["final_layer_norm"],
    "ffn.up": ["ffn.fc1"], "ffn.gate": ["ffn.gate"], "ffn.down": ["ffn.fc2"],
}  # fmt: skip


def retnet() -> dict[str, np.ndarray]:
    """Logits of the three forms of torchscale's RetNetDecoder, and the loss and gradients of the parallel one."""
    rng = np.random.default_rng(5)
    layers, heads, width, values, hidden, vocab, batch, length, eps = 2, 2, 12, 20, 18, 17, 2, 10, 1e-5
    names = {"embed": ["embed_tokens.weight"], "norm.weight": ["layer_norm.weight"], "head": ["output_projection.weight"]}
    names |= {f"blocks.{i}.{ours}.weight": [f"layers.{i}.{part}.weight" for part in theirs]
              for i in range(layers) for ours, theirs in DECODER.items()}

    def build(**form) -> RetNetDecoder:
        config = RetNetConfig(decoder_embed_dim=width, decoder_value_embed_dim=values, decoder_retention_heads=heads,
                              decoder_ffn_embed_dim=hidden, decoder_layers=layers, vocab_size=vocab, layernorm_eps=eps, **form)
        network = RetNetDecoder(config, embed_tokens=torch.nn.Embedding(vocab, width)).double().eval()
        # Its tables are float32; these are the same numbers in float64.
        angles = 10_000.0 ** -torch.linspace(0, 1, width // heads // 2, dtype=torch.float64)
        network.retnet_rel_pos.angle = angles.repeat_interleave(2)
        network.retnet_rel_pos.decay = torch.log(1 - 2.0 ** (-5 - torch.arange(heads).double()))
        return network

    network = build()
    parameters = dict(network.named_parameters())
    assert parameters.keys() == {part for theirs in names.values() for part in theirs}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(float("norm" in name) + 0.5 * rng.standard_normal(tuple(parameter.shape))))
    ids, labels = rng.integers(0, vocab, (2, batch, length))
    tokens = torch.from_numpy(ids)
    with faithful_torchscale():
        logits = network(tokens)[0]
        loss = F.cross_entropy(logits.reshape(-1, vocab), torch.from_numpy(labels).reshape(-1))
        assert logits.dtype == loss.dtype == torch.float64
        loss.backward()
        past: dict = {}
        with torch.no_grad():
            recurrent = torch.cat([network(tokens[:, : t + 1], incremental_state=past)[0] for t in range(length)], 1)
            chunks = build(chunkwise_recurrent=True, recurrent_chunk_size=4)
            chunks.load_state_dict(network.state_dict())
            chunkwise = chunks(tokens)[0]
    arrays = {"heads": np.asarray(heads), "eps": np.asarray(eps), "ids": ids, "labels": labels}
    for name, value in (("logits", logits), ("loss", loss), ("logits_recurrent", recurrent), ("logits_chunkwise", chunkwise)):
        arrays[name] = value.numpy(force=True)
    for name, theirs in names.items():
        arrays[f"param/{name}"] = torch.cat([parameters[part] for part in theirs]).numpy(force=True)
        arrays[f"grad/{name}"] = torch.cat([parameters[part].grad for part in theirs]).numpy(force=True)
    return arrays


def main() -> None:
    print(f"numpy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, make in (("gpt2", gpt2), ("sdpa", sdpa), ("ops", ops), ("retention", retention), ("retnet", retnet)):
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **make())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
