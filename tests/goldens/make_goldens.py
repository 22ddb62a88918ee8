"""Makes the .npz files beside it from independent implementations: PyTorch, transformers, rwkv, in float64 on the CPU.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 rwkv==0.8.32
    python tests/goldens/make_goldens.py

The committed files were made with these versions (CPU wheels). The script is deterministic: the same versions on the
same machine write the same bytes; elsewhere the last digits of sums may differ. Tests read the files and never import
torch.

ops.npz, sdpa.npz and wkv.npz hold calls of operators, named by operator or ``operator.variant``:

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

rwkv.npz holds an RWKV-4 of transformers in the same way, every parameter random, and

    state/NAME [L B D]        what each layer keeps after the first 4 tokens
    logits_rwkv [T V]         of the first sequence by the package rwkv, which computes in float32
    state_rwkv/NAME [L D]     what each layer keeps after that sequence
"""

import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
from rwkv.model import RWKV

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
def doubles():
    """What asks for float32 gets float64."""
    before, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = before


def wkv() -> dict[str, np.ndarray]:
    """wkv of transformers, with and without a state that is carried in; what is around it, in PyTorch."""
    calls = Calls(6)
    normal = calls.normal

    def theirs(k, v, w, u, a=None, b=None, p=None):
        state = None if p is None else (a, b, p)
        y, state = rwkv_linear_attention_cpu(torch.log(-w), u, k, v, state, return_state=True)
        return y, *state

    inputs = {"k": normal(2, 7, 5, scale=3.0), "v": normal(2, 7, 5), "w": -np.exp(normal(5, scale=2.0)), "u": normal(5)}
    state = {"a": normal(2, 5), "b": 1 + np.abs(normal(2, 5)), "p": normal(2, 5)}
    with doubles():
        calls.add("wkv", theirs, inputs)
        calls.add("wkv.carried", theirs, inputs | state)

    def both_directions(k, v, w, u):
        step = torch.arange(k.shape[1])
        distance = (step[:, None] - step).abs()[..., None]
        scores = k[:, None] + torch.where(distance > 0, (distance - 1) * w, u)
        return torch.einsum("btsc,bsc->btc", torch.softmax(scores, 2), v)

    calls.add("bidirectional_wkv", both_directions, inputs)

    def shift(x, mix, last):
        return torch.lerp(torch.cat([last[:, None], x[:, :-1]], 1), x, mix), x[:, -1]

    calls.add("token_shift", shift, {"x": normal(2, 5, 4), "mix": normal(4), "last": normal(2, 4)})
    inputs = {"x": normal(3, 4, 5), "gate": normal(3, 4, 5, scale=4.0)}
    calls.add("sigmoid_gate", lambda x, gate: x * torch.sigmoid(gate), inputs)
    return calls.arrays


RECURRENT = {  # transformers' names within a layer; the official code, which the package rwkv reads, has shorter ones
    **{f"{norm}.{kind}": f"{theirs}.{kind}" for norm, theirs in (("norm1", "ln1"), ("norm2", "ln2"))
       for kind in ("weight", "bias")},
    **{f"mixer.{name}": f"attention.{name}" for name in ("time_decay", "time_first")},
    **{f"mixer.{name}": f"attention.{theirs}.weight" for name, theirs in (
        ("key", "key"), ("value", "value"), ("receptance", "receptance"), ("out", "output"))},
    **{f"ffn.{name}": f"feed_forward.{name}.weight" for name in ("key", "receptance", "value")},
    **{f"mixer.mix_{name[0]}": f"attention.time_mix_{name}" for name in ("key", "value", "receptance")},
    **{f"ffn.mix_{name[0]}": f"feed_forward.time_mix_{name}" for name in ("key", "receptance")},
}  # fmt: skip


def official(name: str) -> str:
    """The name in the official code of a parameter of transformers."""
    name = re.sub(r"(time_mix_.)\w+", r"\1", name.removeprefix("rwkv."))
    for theirs, short in (("embeddings", "emb"), ("pre_ln", "ln0"), ("attention", "att"), ("feed_forward", "ffn")):
        name = name.replace(theirs, short)
    return name


def rwkv() -> dict[str, np.ndarray]:
    """Logits, loss, gradients and states of transformers' RwkvForCausalLM, and logits of the package rwkv."""
    rng = np.random.default_rng(7)
    layers, width, hidden, vocab, batch, length, cut = 2, 8, 20, 17, 2, 9, 4
    names = {"embed.weight": "rwkv.embeddings.weight", "head.weight": "head.weight"}
    for kind in ("weight", "bias"):
        names |= {f"embed_norm.{kind}": f"rwkv.blocks.0.pre_ln.{kind}", f"norm.{kind}": f"rwkv.ln_out.{kind}"}
    names |= {f"blocks.{i}.{ours}": f"rwkv.blocks.{i}.{theirs}" for i in range(layers) for ours, theirs in RECURRENT.items()}
    # rescale_every = 0: else it halves weights in place, in evaluation only.
    config = RwkvConfig(vocab_size=vocab, context_length=length, hidden_size=width, num_hidden_layers=layers,
                        intermediate_size=hidden, rescale_every=0, tie_word_embeddings=False, use_cache=False)
    model = RwkvForCausalLM(config).double()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == set(names.values())
    with torch.no_grad():
        for ours, theirs in names.items():  # its own first weights are not RWKV's
            gain = "norm" in ours and ours.endswith("weight")
            spread = 0.4 if parameters[theirs].ndim == 2 else 1.0
            values = float(gain) + spread * rng.standard_normal(tuple(parameters[theirs].shape))
            parameters[theirs].copy_(torch.from_numpy(values))
    ids, labels = rng.integers(0, vocab, (2, batch, length))
    tokens = torch.from_numpy(ids)
    with doubles():
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.reshape(-1, vocab), torch.from_numpy(labels).reshape(-1))
        assert logits.dtype == loss.dtype == torch.float64
        loss.backward()
        state = [torch.full((batch, width, layers), value).double() for value in (0.0, 0.0, 0.0, 0.0, -1e38)]
        with torch.no_grad():
            state = model(tokens[:, :cut], state=state, use_cache=True).state
    arrays = {"ids": ids, "labels": labels, "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    arrays |= {f"state/{name}": array.numpy().transpose(2, 0, 1).copy()
               for name, array in zip(("channel_x", "time_x", "a", "b", "p"), state, strict=True)}
    for ours, theirs in names.items():
        parameter = parameters[theirs]
        arrays[f"param/{ours}"], arrays[f"grad/{ours}"] = (x.detach().numpy().squeeze() for x in (parameter, parameter.grad))
    with tempfile.TemporaryDirectory() as folder:
        weights = {official(name): parameter.detach().float() for name, parameter in parameters.items()}
        torch.save(weights, f"{folder}/model.pth")
        logits, state = RWKV(model=f"{folder}/model", strategy="cpu fp32", verbose=False).forward(
            ids[0].tolist(), None, full_output=True)
    arrays["logits_rwkv"] = logits.double().numpy()
    arrays |= {f"state_rwkv/{name}": torch.stack(state[i::5]).double().numpy()
               for i, name in enumerate(("time_x", "a", "b", "p", "channel_x"))}
    return arrays


def main() -> None:
    print(f"numpy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, make in (("gpt2", gpt2), ("sdpa", sdpa), ("ops", ops), ("wkv", wkv), ("rwkv", rwkv)):
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **make())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
