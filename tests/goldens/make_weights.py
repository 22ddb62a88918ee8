"""Makes the folders weights/NAME beside it: small models with random weights, as the package transformers saves them.

    pip install numpy==2.4.6 torch==2.13.0 transformers==5.24.0 safetensors
    python tests/goldens/make_weights.py [NAME ...]

Each folder has config.json and model.safetensors in float64, as ``save_pretrained`` writes them, and expected.npz with what the
model computes in float64 on the CPU:

    ids, labels [B T]     labels[b, t] is the target at position t: nothing is shifted
    logits [B T V]        of a call without a cache
    cached [B T V]        of calls that read the ids in parts, with the cache that the model itself keeps
    loss []               the mean cross-entropy
    grad/NAME             its gradient, by the names of model.safetensors

Every array is random, also biases and gains, so that none is 0 or 1. A model that does not go on from a past has no ``cached``.
"""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parent / "weights"
BATCH, LENGTH = 2, 9


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=19, n_positions=16, n_embd=8, n_layer=2, n_head=2, layer_norm_epsilon=1e-4, bos_token_id=3, eos_token_id=3))


def gpt2_other():
    """The other values of what may differ: an untied head, gelu, another hidden size."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=13, n_positions=12, n_embd=6, n_layer=1, n_head=3, n_inner=10, activation_function="gelu",
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=17, max_position_embeddings=16, hidden_size=8, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}))


def llama_other():
    """Biases, a tied head, a head of keys and values for each of queries, and the angles of LLaMA 3."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=13, max_position_embeddings=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "llama3", "rope_theta": 20.0, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8}))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=13, max_position_embeddings=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=1, sliding_window=None, bos_token_id=1, eos_token_id=2))


def rwkv():
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(
        vocab_size=15, context_length=16, hidden_size=8, intermediate_size=20, num_hidden_layers=2, rescale_every=0))


MODELS = {"gpt2": gpt2, "gpt2-other": gpt2_other, "llama": llama, "llama-other": llama_other, "mistral": mistral, "rwkv": rwkv}
STATES = {"rwkv"}  # those that keep a state, and no cache


@contextmanager
def doubles():
    """What asks for float32 gets float64: norms, angles, and the sums of RWKV."""
    before = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = before


def random_weights(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Numbers that are no first weights: gains about 1, all else about 0."""
    for name, array in model.named_parameters():
        drawn = 0.3 * rng.standard_normal(tuple(array.shape))
        gain = array.ndim == 1 and name.endswith("weight")
        array.data = torch.from_numpy(drawn + 1 if gain else drawn)


def cached(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """The logits of calls of four tokens, of one, and of the rest."""
    if model.config.model_type in STATES and len(ids) > 1:  # one token of several sequences gets states of a wrong shape there
        return np.concatenate([cached(model, row) for row in ids[:, None]])
    name = "state" if model.config.model_type in STATES else "past_key_values"
    past, parts = None, []
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        out = model(part, **{name: past}, use_cache=True)
        past = getattr(out, name)
        parts.append(out.logits.detach().numpy())
    return np.concatenate(parts, axis=1)


def expected(model: torch.nn.Module, rng: np.random.Generator, read_in_parts) -> dict[str, np.ndarray]:
    """What the model computes of ids that are drawn."""
    ids, labels = (torch.from_numpy(rng.integers(0, model.config.vocab_size, (BATCH, LENGTH))) for _ in range(2))
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    arrays = {"ids": ids.numpy(), "labels": labels.numpy(), "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    if read_in_parts is not None:
        with torch.no_grad():
            arrays["cached"] = read_in_parts(model, ids)
    return arrays | {f"grad/{name}": array.grad.numpy() for name, array in model.named_parameters()}


def make(name: str) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(sum(name.encode()))
    with doubles():
        model = MODELS[name]().double().eval()
        random_weights(model, rng)
        arrays = expected(model, rng, cached)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.zero_grad()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **arrays)
    with safe_open(folder / "model.safetensors", "np") as file:
        print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes:", *file.keys())


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name)
