"""Makes wkv.npz and rwkv.npz: wkv and a whole RWKV-4 of transformers, and logits of the package rwkv, in float64 on the CPU.

    pip install what make_goldens.py needs && pip install rwkv==0.8.32
    python tests/goldens/make_rwkv.py

The entries of wkv.npz are those of ops.npz; rwkv.npz holds an RWKV as gpt2.npz holds a GPT-2, every parameter random, and

    state/NAME [L B D]        what each layer keeps after the first 4 tokens
    logits_rwkv [T V]         of the first sequence by the package rwkv, which computes in float32
    state_rwkv/NAME [L D]     what each layer keeps after that sequence
"""

import os
import re
import tempfile
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write
from transformers import RwkvConfig, RwkvForCausalLM
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
from rwkv.model import RWKV


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
    calls.add("gated", lambda x, gate: x * torch.sigmoid(gate), inputs)
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


if __name__ == "__main__":
    write(wkv=wkv, rwkv=rwkv)
