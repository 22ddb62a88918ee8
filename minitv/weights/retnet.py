"""RetNet (Sun et al. 2023) as torchscale 0.3.0 has it: RMSNorm, narrow values, a gated feed-forward network.

torchscale has no format of its own. A folder is made of its objects by

    json.dump(vars(config), open("config.json", "w"))                                    # of a RetNetConfig
    safetensors.torch.save_file(decoder.state_dict(), "model.safetensors")               # of a RetNetDecoder

and such a config.json is known by its entry decoder_retention_heads. A folder that is written is read back by
RetNetConfig(**json.load(file)) and load_state_dict. Logits are those of torchscale's parallel form, of texts that are
read whole or in parts. Its gradients leave the divisor out, and its chunkwise form divides by other sums.

torchscale's own steps divide a row by √n alone, where its parallel form divides by max(|q·z|, √n): here that is
normalization="decay", which gives its steps to 1e-10. The norm of a head takes the rest away but for its eps, so in the model
of tests/goldens/weights the two are apart by 3.4 eps of the largest logit, 3.4e-6 for 1e-6, and equal for 1e-30.
"""

import numpy as np

from ..architecture import (
    Architecture,
    Arrays,
    Key,
    Rule,
    Values,
    Way,
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
from ..errors import CheckpointError
from ..ops.rope import rope_angles

WIDTH = count("decoder_embed_dim", "width", 768)


def tables(values: Values) -> Arrays:
    """What torchscale turns by, each angle twice, and the logarithm of its decays."""
    angles = np.array(rope_angles(values["width"] // values["heads"], closed=True))
    return [np.repeat(angles, 2), np.log1p(-(2.0 ** (-5 - np.arange(values["heads"]))))]


def check_tables(arrays: Arrays, values: Values) -> Arrays:
    for name, array, known in zip(("angle", "decay"), arrays, tables(values), strict=True):
        if array.shape != known.shape or not np.allclose(array, known, rtol=1e-2, atol=1e-6):  # bfloat16 has 8 bits
            raise CheckpointError(f"retnet_rel_pos.{name} is not what torchscale 0.3.0 computes, of the shape "
                                  f"{list(known.shape)}, and there is no other one here")
    return []


RETNET = Architecture(
    name="retnet",
    summary="RetNet, as torchscale has it",
    task_class="RetNetDecoder",
    variant="retnet",
    loading="RetNetConfig and RetNetDecoder of torchscale, whose state is {folder}/model.safetensors",
    signs=("decoder_retention_heads",),
    fixed=dict(positions="none", norm="rms_norm", head_norm="rms_norm", ffn="glu"),
    keys=(
        WIDTH,
        count("max_target_positions", "context", 1024),
        count("decoder_layers", "layers", 12),
        count("decoder_retention_heads", "heads", 3),
        widths("decoder_value_embed_dim", "value_width", WIDTH, 1280),
        widths("decoder_ffn_embed_dim", "ffn_width", WIDTH, 1280, lambda values: values["ffn_multiple"] * 2 / 3),
        word("activation_fn", "activation", "gelu", {"gelu": "gelu", "swish": "silu", "relu": "relu"}),
        number("layernorm_eps", "norm_eps", 1e-6),
        flag("layernorm_embedding", "embed_norm", False),
        flag("share_decoder_input_output_embed", "tied", False),
        training("dropout", "dropout"),
        Key((), ("ffn_multiple", "out_gain", "deepnet"), lambda config: {}, lambda values: {}),  # of first weights, and unused
        only("decoder_normalize_before", True, "norms stand before the layers here"),
        only("deepnorm", False, "x is not multiplied where it is added to here"),
        only("no_scale_embedding", True, "the embedding is not multiplied here"),
        only("no_output_layer", False, "a model without its head gives no logits"),
        only("moe_freq", 0, "there are no experts here"),
        only("multiway", False, "there is one set of weights for all tokens here"),
    ),
    rules=(
        Rule("embed_tokens.weight", "embed.weight"),
        Rule("layernorm_embedding.weight", "embed_norm.weight", when=lambda values, i: values["embed_norm"]),
        Rule(("retnet_rel_pos.angle", "retnet_rel_pos.decay"), (), Way(check_tables, lambda arrays, values: tables(values))),
        Rule("layers.{i}.retention_layer_norm.weight", "blocks.{i}.norm1.weight"),
        Rule(("layers.{i}.retention.q_proj.weight", "layers.{i}.retention.k_proj.weight"), "blocks.{i}.mixer.qk.weight",
             rows(width, width)),
        *(Rule(f"layers.{{i}}.{theirs}.weight", f"blocks.{{i}}.{ours}.weight") for theirs, ours in (
            ("retention.v_proj", "mixer.v"), ("retention.g_proj", "mixer.gate"), ("retention.out_proj", "mixer.out"),
            ("final_layer_norm", "norm2"), ("ffn.fc1", "ffn.up"), ("ffn.gate", "ffn.gate"), ("ffn.fc2", "ffn.down"))),
        Rule("layer_norm.weight", "norm.weight"),
        Rule("output_projection.weight", "head.weight", when=untied),
    ),
    copies={"output_projection.weight": "embed_tokens.weight"},
    ignored=("subln", "drop_path_rate", "activation_dropout", "recurrent_chunk_size", "chunkwise_recurrent", "ddp_rank",
             "moe_gating_use_fp32", "moe_eval_capacity_token_fraction", "moe_second_expert_policy", "moe_expert_count",
             "moe_top1_expert", "moe_normalize_gate_prob_before_dropping", "use_xmoe", "xpos_scale_base", "xpos_rel_pos",
             "rel_pos_buckets", "max_rel_pos", "checkpoint_activations", "fsdp"),
)
