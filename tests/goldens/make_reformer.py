"""Makes lsh.npz and reformer.npz: hashes, orders and attention of two packages, and a whole Reformer, in float64 on the CPU.

    pip install what make_goldens.py needs && pip install --no-deps reformer-pytorch==1.4.4 local-attention==1.11.2
    pip install --no-deps axial-positional-embedding==0.3.12 einops==0.8.2 hyper-connections==0.4.11
    pip install --no-deps rotary-embedding-torch==0.9.1
    python tests/goldens/make_reformer.py

The committed files were made with these and with transformers 5.24.0. The entries of lsh.npz are those of ops.npz; reformer.npz
holds a ReformerModelWithLMHead as gpt2.npz holds a GPT-2, with two layers of its LSH attention, axial positions, no biases and

    rotations [L H R K F]     of its layers
"""

import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from make_goldens import Calls, write
from transformers import ReformerConfig, ReformerModelWithLMHead
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

sys.modules["product_key_memory"] = types.ModuleType("product_key_memory")  # of a class that is not used
sys.modules["product_key_memory"].PKM = None
from reformer_pytorch import reformer_pytorch as lucidrains  # noqa: E402


def config(heads, size, rounds, buckets, chunk, causal=True, **other) -> ReformerConfig:
    return ReformerConfig(attention_head_size=size, num_attention_heads=heads, hidden_size=heads * size, num_hashes=rounds,
                          num_buckets=buckets, lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
                          is_decoder=causal, lsh_attention_probs_dropout_prob=0.0, hash_seed=1, **other)


def rotations(layer) -> torch.Tensor:
    """What transformers draws in every call, [H R K F]."""
    sizes = layer.num_buckets if isinstance(layer.num_buckets, list) else [layer.num_buckets]
    torch.manual_seed(layer.hash_seed)
    drawn = torch.randn(layer.num_attention_heads, layer.attention_head_size, layer.num_hashes, sum(sizes) // 2,
                        dtype=torch.float64)
    return drawn.permute(0, 2, 1, 3)


def offsets(buckets, count):
    """The buckets [B H R T] of round r, counted from r · count on, in one row [B H R·T]."""
    return (buckets + count * torch.arange(buckets.shape[2])[:, None]).flatten(2)


def transformers_attention(causal, count, chunk):
    """Its attention, where the keys are gathered like the queries and may be other vectors."""
    def function(q, k, v, buckets):
        batch, heads, length, size = q.shape
        layer = LSHSelfAttention(config(heads, size, buckets.shape[2], count, chunk, causal), 0).double()
        gather, keys = layer._gather_by_expansion, []

        def gathered(vectors, places, rounds):
            if not keys:
                keys.append(gather(k, places, rounds))
            return gather(vectors, places, rounds)

        del layer.query_key, layer.value
        layer.query_key, layer.value = (lambda _, x=x: x.transpose(1, 2).flatten(2) for x in (q, v))
        layer._gather_by_expansion = gathered
        norm = layer._len_and_dim_norm
        layer._len_and_dim_norm = lambda vectors, root: norm(keys[0].reshape(vectors.shape), root)
        y = layer(torch.zeros(batch, length, heads * size).double(), buckets=offsets(buckets, count)).hidden_states
        return y.unflatten(2, (heads, size)).transpose(1, 2)

    return function


def lucidrains_attention(causal, count, size, across):
    """reformer-pytorch's, in the same way."""
    def function(q, k, v, buckets):
        layer = lucidrains.LSHAttention(bucket_size=size, n_hashes=buckets.shape[2], causal=causal,
                                        attend_across_buckets=across)
        layer.hash_vectors = lambda *_, **__: offsets(buckets, count).flatten(0, 1)
        select, keys = lucidrains.batched_index_select, []

        def selected(values, places):
            if not keys:
                keys.append(select(k.flatten(0, 1), places))
            return select(values, places)

        lucidrains.batched_index_select = selected
        lucidrains.F = types.SimpleNamespace(normalize=lambda x, p, dim: F.normalize(keys[0].reshape(x.shape), p=p, dim=dim))
        try:
            return layer(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, q.shape[:2])
        finally:
            lucidrains.batched_index_select, lucidrains.F = select, F

    return function


def lucidrains_full(causal):
    def function(q, k, v, buckets):
        lucidrains.F = types.SimpleNamespace(normalize=lambda x, p, dim: F.normalize(k.flatten(0, 1), p=p, dim=dim))
        try:
            return lucidrains.FullQKAttention(causal=causal)(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, q.shape[:2])
        finally:
            lucidrains.F = F

    return function


def lsh() -> dict[str, np.ndarray]:
    """lsh_buckets and bucket_order against transformers, lsh_attention against both."""
    calls = Calls(6)
    normal, rng = calls.normal, calls.rng
    batch, heads, length, size = 1, 2, 16, 4
    for name, count in (("transformers", 8), ("factors", [4, 6])):
        layer = LSHSelfAttention(config(heads, size, 3, count, 4), 0)
        x = normal(batch, heads, length, size)
        total = int(np.prod(count))
        hashed = layer._hash_vectors(torch.from_numpy(x), 3, None).reshape(batch, heads, 3, length)
        buckets = hashed - total * torch.arange(3)[:, None]
        given = {"factors": count} if isinstance(count, list) else {}
        calls.record(f"lsh_buckets.{name}", {"x": x, "rotations": rotations(layer).contiguous().numpy()}, given, [buckets])
        order, place = (index.reshape(batch, heads, 3, length) - length * torch.arange(3)[:, None] for index in
                        layer._get_sorted_bucket_idx_and_undo_sorted_bucket_idx(length, hashed.flatten(2), 3))
        calls.record(f"bucket_order.{name}", {"buckets": buckets.numpy()}, {"count": total}, [order, place])

    def inputs(rounds, count):
        given = {name: normal(batch, heads, length, size) for name in "qkv"}
        return given | {"buckets": rng.integers(0, count, (batch, heads, rounds, length))}

    codes = dict(across=True, wrap="previous", correction=False)
    for causal in (True, False):
        for rounds in (1, 3):
            calls.add(f"lsh_attention.transformers{rounds}{'causal' * causal}", transformers_attention(causal, 8, 4),
                      inputs(rounds, 8), chunk=4, causal=causal, **codes)
            calls.add(f"lsh_attention.lucidrains{rounds}{'causal' * causal}", lucidrains_attention(causal, 4, 4, True),
                      inputs(rounds, 4), chunk=4, causal=causal, scale=size**-0.5, eps=1e-24, **codes)
        calls.add(f"lsh_attention.lucidrains_buckets{'causal' * causal}", lucidrains_attention(causal, 4, 4, False),
                  inputs(2, 4), chunk=4, causal=causal, scale=size**-0.5, eps=1e-24, wrap="previous", correction=False)
        full = inputs(1, 1)
        calls.add(f"lsh_attention.full{'causal' * causal}", lucidrains_full(causal), full, causal=causal, scale=size**-0.5,
                  eps=1e-24)
    return calls.arrays


LAYER = {  # transformers' names within a layer; q and v are one matrix here
    "norm1": ["attention.layer_norm"], "mixer.qkv": ["attention.self_attention.query_key", "attention.self_attention.value"],
    "mixer.out": ["attention.output.dense"], "norm2": ["feed_forward.layer_norm"], "ffn.up": ["feed_forward.dense.dense"],
    "ffn.down": ["feed_forward.output.dense"],
}


def reformer() -> dict[str, np.ndarray]:
    """Logits, loss and gradients of transformers' language model in training: its streams, its chain, its loss."""
    rng = np.random.default_rng(7)
    layers, heads, size, hidden, vocab, batch, length, rounds, chunk, buckets = 2, 2, 4, 20, 11, 2, 16, 2, 4, 4
    names = {"embed": ["reformer.embeddings.word_embeddings.weight"], "norm.weight": ["reformer.encoder.layer_norm.weight"],
             "head": ["lm_head.decoder.weight"]}
    names |= {f"axial.tables.{a}": [f"reformer.embeddings.position_embeddings.weights.{a}"] for a in range(2)}
    names |= {f"blocks.{i}.{ours}.weight": [f"reformer.encoder.layers.{i}.{part}.weight" for part in theirs]
              for i in range(layers) for ours, theirs in LAYER.items()}
    model = ReformerModelWithLMHead(config(
        heads, size, rounds, buckets, chunk, attn_layers=["lsh"] * layers, vocab_size=vocab, feed_forward_size=hidden,
        hidden_act="gelu", layer_norm_eps=1e-5, hidden_dropout_prob=0.0, axial_pos_embds=True, axial_pos_shape=[2, 8],
        axial_pos_embds_dim=[4, 4], max_position_embeddings=length, tie_word_embeddings=False)).double().train()
    parameters = dict(model.named_parameters())
    used = {part for theirs in names.values() for part in theirs}
    assert used <= parameters.keys() and all(name.endswith("bias") for name in parameters.keys() - used)
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.from_numpy(0.5 * rng.standard_normal(tuple(parameter.shape)))
            parameter.copy_(0 * noise if name not in used else noise + float("norm" in name))
    attention = [layer.attention.self_attention for layer in model.reformer.encoder.layers]
    ids, labels = rng.integers(0, vocab, (2, batch, length))
    logits = model(torch.from_numpy(ids)).logits
    loss = F.cross_entropy(logits.reshape(-1, vocab), torch.from_numpy(labels).reshape(-1))
    assert logits.dtype == loss.dtype == torch.float64
    loss.backward()
    arrays = {"heads": np.asarray(heads), "chunk": np.asarray(chunk), "buckets": np.asarray(buckets), "ids": ids,
              "labels": labels, "logits": logits.numpy(force=True), "loss": loss.numpy(force=True),
              "rotations": torch.stack([rotations(layer) for layer in attention]).numpy()}

    def ours(name, values):
        joined = torch.cat(values).numpy(force=True)
        return joined.reshape(-1, joined.shape[-1]) if name.startswith("axial") else joined

    for name, theirs in names.items():
        arrays[f"param/{name}"] = ours(name, [parameters[part] for part in theirs])
        arrays[f"grad/{name}"] = ours(name, [parameters[part].grad for part in theirs])
    return arrays


if __name__ == "__main__":
    write(lsh=lsh, reformer=reformer)
