"""Makes retention.npz and retnet.npz: retention, rope, gated and a whole RetNet of torchscale, in float64 on the CPU.

    pip install what make_goldens.py needs && pip install --no-deps torchscale==0.3.0 fairscale==0.4.13
    python tests/goldens/make_retnet.py

The entries of retention.npz are those of ops.npz; retnet.npz holds a RetNetDecoder as gpt2.npz holds a GPT-2, with its gated
feed-forward network and RMSNorm of ``eps``:

    logits, loss, grad/NAME   of its parallel form, the divisor of the scores differentiated
    logits_recurrent          of its recurrent form, token by token; it has no second divisor
    logits_chunkwise          of its chunkwise form in chunks of 4, which divides by other sums than the parallel one
"""

import sys
import types
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

for name in ("timm", "timm.models", "timm.models.layers"):  # of which torchscale imports a function that is not called
    sys.modules[name] = types.ModuleType(name)
sys.modules["timm.models.layers"].drop_path = None
from torchscale.architecture.config import RetNetConfig  # noqa: E402
from torchscale.architecture.retnet import RetNetDecoder  # noqa: E402
from torchscale.component.multiscale_retention import MultiScaleRetention, duplicate_interleave, theta_shift  # noqa: E402


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
    """retention against a loop over time, its "paper" form also against torchscale's layer; rope and gated."""
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
    inputs = {"x": normal(3, 4, 10), "gate": normal(3, 4, 10, scale=4.0)}
    calls.add("gated.swish", lambda x, gate: x * F.silu(gate), inputs, function="swish")
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


if __name__ == "__main__":
    write(retention=retention, retnet=retnet)
