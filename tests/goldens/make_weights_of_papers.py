"""Makes more of the folders weights/NAME: models that are no matter of ``save_pretrained`` and a call alone.

    pip install what make_weights.py needs, and what make_reformer.py and make_retnet.py need
    python tests/goldens/make_weights_of_papers.py [NAME ...]

The files are those of make_weights.py, and expected.npz may also have

    samples [B T 1]     in place of ids: the sound that the model reads
    hidden [B T D]      what the last layer gives
    buffer/OURS         numbers that the library draws anew in every call, by our names
    steps [B T V]       logits of the library's own steps, a token at a time, where they may be another map than its call
    together [B T V]    the same steps of all texts at once, where they may be others
    so_far [B T V]      logits that a call without a cache gives the last token of every beginning of the ids
    KEY/ENTRY=VALUE     KEY of the same weights with another entry of config.json

Tables of angles are float32 in these libraries; here they are the same numbers in float64, because float32 ends at 1e-7. That
of RoFormer is written into its file.
"""

import json
import shutil
import sys

import numpy as np
import torch
import transformers
from make_reformer import rotations
from make_retnet import faithful_torchscale
from make_weights import BATCH, FOLDER, LENGTH, random_weights
from safetensors.torch import save_file
from torchscale.architecture.config import RetNetConfig
from torchscale.architecture.retnet import RetNetDecoder

VOCAB, CONTEXT, CLASSES = 11, 12, 5


def answers(model: torch.nn.Module, rng: np.random.Generator, read, vocab: int = VOCAB, length: int = LENGTH, **inputs) -> dict:
    """The logits that ``read(inputs)`` gives, and the loss and all gradients of drawn labels."""
    inputs = inputs or {"ids": torch.from_numpy(rng.integers(0, vocab, (BATCH, length)))}
    labels = torch.from_numpy(rng.integers(0, vocab, (BATCH, length)))
    logits = read(*inputs.values())
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert logits.dtype == loss.dtype == torch.float64
    loss.backward()
    found = {**inputs, "labels": labels, "logits": logits, "loss": loss}
    found |= {f"grad/{name}": array.grad for name, array in model.named_parameters() if array.grad is not None}
    return {name: array.numpy(force=True) for name, array in found.items()}


def roformer(rng: np.random.Generator, causal: bool):
    """The decoder has an untied head, and the other spelling of an activation."""
    kind = transformers.RoFormerForCausalLM if causal else transformers.RoFormerForMaskedLM
    model = kind(transformers.RoFormerConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1 if causal else 2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=CONTEXT, is_decoder=causal, hidden_act="gelu_new" if causal else "gelu", pad_token_id=None,
        tie_word_embeddings=not causal)).double().eval()
    random_weights(model, rng)
    angles = np.arange(CONTEXT)[:, None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4)
    table = model.roformer.encoder.embed_positions
    table.weight = torch.nn.Parameter(torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)), False)
    found = answers(model, rng, lambda ids: model(ids, use_cache=False).logits)
    ids = torch.from_numpy(found["ids"])
    with torch.no_grad():
        found["hidden"] = model.roformer(ids).last_hidden_state.numpy()
        if causal:
            past, parts = None, []
            for part in ids.split([4, 1, LENGTH - 5], dim=1):
                out = model(part, cache=past, use_cache=True)
                past, parts = out.cache, [*parts, out.logits]
            found["cached"] = torch.cat(parts, 1).numpy()
    return model.save_pretrained, found


def reformer(rng: np.random.Generator, axial: bool):
    """In training, because only then the chain of its streams can be traced back; without dropout nothing else changes."""
    def build(**entries):
        return transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**dict(
            attention_head_size=3, num_attention_heads=2, hidden_size=8, num_hashes=2, num_buckets=[4, 2] if axial else 6,
            attn_layers=["local", "lsh"] if axial else ["lsh"], lsh_attn_chunk_length=4, local_attn_chunk_length=2,
            is_decoder=True, vocab_size=VOCAB, feed_forward_size=10, hidden_act="relu" if axial else "gelu",
            hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
            axial_pos_embds=axial, axial_pos_shape=[3, 4], axial_pos_embds_dim=[3, 5], max_position_embeddings=CONTEXT,
            pad_token_id=None) | entries)).double()

    def draws(model, ending=""):
        """Its numbers, with a seed so that they are known."""
        layers = [layer.attention.self_attention for layer in model.reformer.encoder.layers]
        hashed = {i: layer for i, layer in enumerate(layers) if hasattr(layer, "hash_seed")}
        for layer in hashed.values():
            layer.hash_seed = 1
        return {f"buffer/blocks.{i}.mixer.rotations{ending}": rotations(layer).numpy() for i, layer in hashed.items()}

    model = build().train()
    random_weights(model, rng)
    found = draws(model) | answers(model, rng, lambda ids: model(ids).logits, length=CONTEXT)
    ids = torch.from_numpy(found["ids"])
    for read, entries in ((steps, {}), (together, {}), (so_far, {}), (steps, {"lsh_attn_chunk_length": CONTEXT}),
                          (steps, {"num_hashes": 1}), *[(so_far, {"local_attn_chunk_length": 6})] * axial):
        other = build(pad_token_id=0, **entries).eval()
        other.load_state_dict(model.state_dict())
        found |= draws(other, named(entries))
        with torch.no_grad():
            found[f"{read.__name__}{named(entries)}"] = read(other, ids)
    return model.save_pretrained, found


def named(entries: dict) -> str:
    """What the key of an array says of other entries."""
    return "".join(f"/{name}={value!r}" for name, value in entries.items())


def steps(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """The logits of a Reformer that reads a token at a time, one text after the other."""
    return np.concatenate([together(model, text) for text in ids.split(1)])


def together(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """The same of all texts at once: there, all read the keys and values of the first."""
    past, parts = None, []
    for token in ids.split(1, dim=1):
        out = model(token, past_buckets_states=past, use_cache=True)
        past, parts = out.past_buckets_states, [*parts, out.logits]
    return torch.cat(parts, 1).numpy()


def so_far(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """The logits of the last token of each beginning."""
    return torch.cat([model(ids[:, : t + 1], use_cache=False).logits[:, -1:] for t in range(ids.shape[1])], 1).numpy()


def retnet(rng: np.random.Generator):
    """torchscale's parallel form, with its divisor differentiated, and its recurrent one; it has no format of its own."""
    width, heads = 8, 2

    def build(**entries):
        config = RetNetConfig(decoder_embed_dim=width, decoder_value_embed_dim=12, decoder_retention_heads=heads,
                              decoder_ffn_embed_dim=10, decoder_layers=2, vocab_size=VOCAB, activation_fn="swish", **entries)
        model = RetNetDecoder(config, embed_tokens=torch.nn.Embedding(VOCAB, width)).double().eval()
        model.retnet_rel_pos.angle = (10_000.0 ** -torch.linspace(0, 1, 2, dtype=torch.float64)).repeat_interleave(2)
        model.retnet_rel_pos.decay = torch.log1p(-(2.0 ** (-5 - torch.arange(heads).double())))
        return config, model

    config, model = build()
    random_weights(model, rng)

    def save(folder):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(vars(config)))
        save_file(model.state_dict(), folder / "model.safetensors")

    with faithful_torchscale():
        found = answers(model, rng, lambda ids: model(ids)[0])
        ids = torch.from_numpy(found["ids"])
        for entries in ({}, {"layernorm_eps": 1e-30}):
            _, other = build(**entries)
            other.load_state_dict(model.state_dict())
            past: dict = {}
            with torch.no_grad():
                parts = [other(ids[:, : t + 1], incremental_state=past)[0] for t in range(LENGTH)]
            found[f"steps{named(entries)}"] = torch.cat(parts, 1).numpy()
    return save, found


def wav2vec2_conformer(rng: np.random.Generator, norm: str):
    """All of it, from samples to logits."""
    width, kinds = (8, "swish") if norm == "group" else (4, "gelu")
    model = transformers.Wav2Vec2ConformerForCTC(transformers.Wav2Vec2ConformerConfig(
        vocab_size=CLASSES, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=width + 4,
        conv_dim=[4, 6], conv_stride=[2, 2], conv_kernel=[3, 3], conv_bias=norm == "layer", feat_extract_norm=norm,
        num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=5,
        max_source_positions=CONTEXT, hidden_act=kinds)).double().eval()
    random_weights(model, rng)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.from_numpy(("var" in name) + 0.4 * np.abs(rng.standard_normal(tuple(buffer.shape)))))
    angles = np.arange(CONTEXT - 1, -CONTEXT, -1)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    table = np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(1, 2 * CONTEXT - 1, width)
    model.wav2vec2_conformer.encoder.embed_positions.pe = torch.from_numpy(table)
    samples = torch.from_numpy(rng.standard_normal((BATCH, 4 * LENGTH + 4, 1)))
    return model.save_pretrained, answers(model, rng, lambda samples: model(samples[..., 0]).logits, CLASSES, samples=samples)


MODELS = {"roformer": lambda rng: roformer(rng, True), "roformer-encoder": lambda rng: roformer(rng, False),
          "reformer": lambda rng: reformer(rng, True), "reformer-lsh": lambda rng: reformer(rng, False), "retnet": retnet,
          "wav2vec2-conformer": lambda rng: wav2vec2_conformer(rng, "group"),
          "wav2vec2-conformer-layer": lambda rng: wav2vec2_conformer(rng, "layer")}


def make(name: str) -> None:
    torch.manual_seed(0)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    save, found = MODELS[name](np.random.default_rng(sum(name.encode())))
    save(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **found)
    print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name)
