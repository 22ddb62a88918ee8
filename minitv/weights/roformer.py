"""RoFormer (Su et al. 2021): BERT whose queries and keys are turned, as the variants ``roformer`` and ``roformer-encoder``.

Norms stand after the sums, the embedding is normalised, and logits are made by a linear layer, the activation, a norm and the
embedding with biases. One model_type has both directions: a config with is_decoder is ``roformer``, any other is the encoder.

Their files have token types. Every token here is of the first type, which is what transformers takes where it is not told. A
file also has the table of sines that they turn by: it follows from the sizes, and is compared. With pad_token_id, transformers
leaves the gradient of that token's embedding out; here no token is special.
"""

from typing import Any

import numpy as np

from ..architecture import (
    ACTIVATIONS,
    Architecture,
    Arrays,
    Key,
    Rule,
    Values,
    Way,
    biased,
    count,
    flag,
    number,
    only,
    rows,
    training,
    untied,
    width,
    widths,
    word,
)
from ..errors import CheckpointError, UserError
from ..ops.rope import rope_angles

WIDTH = count("hidden_size", "width", 768)
LAYER, HEAD = "roformer.encoder.layer.{i}", "cls.predictions"


def tied(values: Values, i: int) -> bool:
    return values["tied"]


def sines(values: Values) -> np.ndarray:
    """Their table [positions K]: the sines of all pairs, and then the cosines."""
    angles = np.arange(values["context"])[:, None] * np.array(rope_angles(values["width"] // values["heads"]))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def check_sines(arrays: Arrays, values: Values) -> Arrays:
    shape = values["context"], values["width"] // values["heads"]
    if arrays[0].shape != shape or not np.allclose(arrays[0], sines(values), rtol=0, atol=4e-3):  # bfloat16 has 8 bits
        raise CheckpointError("roformer.encoder.embed_positions.weight is not the table of sines that RoFormer turns by, "
                              f"of the shape {list(shape)}, and there is no other one here")
    return []


def check(config: Values, values: Values) -> None:
    if config.get("embedding_size") not in (None, values["width"]):
        raise UserError(f"embedding_size is {config['embedding_size']}, allowed: hidden_size, {values['width']}, because no "
                        "matrix leads from the embedding to the layers here")
    if values["segments"] < 1:
        raise UserError("--segments is 0, and there is always one vector at least")


def common(causal: bool) -> dict[str, Any]:
    """What the two directions declare alike: they differ by one entry."""
    return dict(
        model_type="roformer",
        describes=lambda config: bool(config.get("is_decoder", False)) == causal,
        fixed=dict(positions="none", norm="layer_norm", bias=True, embed_norm=True, norms="after", output="bert"),
        filled=dict(bias=False),
        keys=(
            WIDTH,
            count("max_position_embeddings", "context", 1536),
            count("num_hidden_layers", "layers", 12),
            count("num_attention_heads", "heads", 12),
            widths("intermediate_size", "ffn_multiple", WIDTH, 3072),
            word("hidden_act", "activation", "gelu", ACTIVATIONS),
            number("layer_norm_eps", "norm_eps", 1e-12),
            count("type_vocab_size", "segments", 2),
            flag("tie_word_embeddings", "tied", True),
            training("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
            only("is_decoder", causal, "the other value is another architecture"),
            only("rotary_value", False, "values are not turned here"),
            only("add_cross_attention", False, "there is no second text to attend to"),
            Key(("embedding_size",), (), lambda config: {}, lambda values: {"embedding_size": values["width"]}),
        ),
        prefix="roformer.",
        rules=(
            Rule("roformer.embeddings.word_embeddings.weight", "embed.weight"),
            Rule("roformer.embeddings.token_type_embeddings.weight", "segments"),
            *biased("roformer.embeddings.LayerNorm", "embed_norm"),
            Rule("roformer.encoder.embed_positions.weight", (), Way(check_sines, lambda arrays, values: [sines(values)])),
            *(Rule(tuple(f"{LAYER}.attention.self.{part}.{kind}" for part in ("query", "key", "value")),
                   f"blocks.{{i}}.mixer.qkv.{kind}", rows(width, width, width)) for kind in ("weight", "bias")),
            *biased(f"{LAYER}.attention.output.dense", "blocks.{i}.mixer.out"),
            *biased(f"{LAYER}.attention.output.LayerNorm", "blocks.{i}.norm1"),
            *biased(f"{LAYER}.intermediate.dense", "blocks.{i}.ffn.up"),
            *biased(f"{LAYER}.output.dense", "blocks.{i}.ffn.down"),
            *biased(f"{LAYER}.output.LayerNorm", "blocks.{i}.norm2"),
            *biased(f"{HEAD}.transform.dense", "transform"),
            *biased(f"{HEAD}.transform.LayerNorm", "transform_norm"),
            Rule(f"{HEAD}.bias", "head_bias", when=tied),
            Rule(f"{HEAD}.decoder.bias", "head_bias", when=untied),
            Rule(f"{HEAD}.decoder.weight", "head.weight", when=untied),
        ),
        copies={f"{HEAD}.decoder.weight": "roformer.embeddings.word_embeddings.weight",
                f"{HEAD}.decoder.bias": f"{HEAD}.bias"},
        ignored_arrays=(r"cls\.predictions\.bias",),  # which nothing reads where the head is not tied
        check=check,
    )


ROFORMER = Architecture(
    name="roformer",
    summary="RoFormer that sees the past alone",
    task_class="RoFormerForCausalLM",
    variant="roformer",
    **common(causal=True),
)

ENCODER = Architecture(
    name="roformer-encoder",
    summary="RoFormer's encoder, with the head for hidden tokens",
    task_class="RoFormerForMaskedLM",
    variant="roformer-encoder",
    **common(causal=False),
)
