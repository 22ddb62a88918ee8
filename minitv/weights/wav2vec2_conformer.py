"""wav2vec 2.0 with Conformer blocks and CTC (Baevski et al. 2020; Gulati et al. 2020): the variant ``conformer`` on samples.

Seven convolutions over samples make a position of every 20 ms, and a norm and a linear layer lead to the blocks. Distances have
vectors ("relative"). Class 0, the padding of their vocabulary, is CTC's blank; vocab.json says what the others are.

transformers normalises each recording to mean 0 and variance 1 before the model, and so does --normalise utterance here, which
these models have; sounds have 16,000 samples a second. Shorter utterances of a batch do not see the padding of longer ones here
at all; there the first norm and the convolutions of the blocks read it. The convolution pos_conv_embed is in their files, and
nothing computes with it. Dropout, masks of spans and the quantizer belong to their training and are not taken over.
"""

import math

from ..architecture import (
    ACTIVATIONS,
    Architecture,
    Key,
    Rule,
    Values,
    biased,
    count,
    entry,
    flag,
    only,
    rows,
    shaped,
    training,
    width,
    widths,
    word,
)
from ..errors import UserError, quoted

WIDTH = count("hidden_size", "width", 768)
MODEL = "wav2vec2_conformer"
LAYER = f"{MODEL}.encoder.layers.{{i}}"
LISTS = {"wave_channels": ("conv_dim", [512] * 7), "wave_kernels": ("conv_kernel", [10, 3, 3, 3, 3, 2, 2]),
         "wave_strides": ("conv_stride", [5, 2, 2, 2, 2, 2, 2])}
MOST = 32  # convolutions over samples
SOUND = dict(frames="samples", rate=16_000, normalise="utterance")  # how it is read
LAST = shaped(lambda shape: (*shape, 1), lambda shape: shape[:-1])  # a matrix, which they keep as a filter with one tap
MIDDLE = shaped(lambda shape: (shape[0], 1, shape[1]), lambda shape: (shape[0], shape[2]))


def read_lists(config: Values) -> Values:
    found = {ours: entry(config, theirs, list, default, "a list of positive integers")
             for ours, (theirs, default) in LISTS.items()}
    for ours, numbers in found.items():
        if not 1 <= len(numbers) <= MOST or not all(type(number) is int and 1 <= number <= 2**20 for number in numbers):
            raise UserError(f"{LISTS[ours][0]} is {quoted(numbers)}, allowed: 1 to {MOST} integers from 1 to 2**20")
    return {ours: ",".join(map(str, numbers)) for ours, numbers in found.items()}


def numbers(values: Values, name: str) -> list[int]:
    return [int(word) for word in values[name].split(",")]


def write_lists(values: Values) -> Values:
    return {theirs: numbers(values, ours) for ours, (theirs, _) in LISTS.items()} | {
        "num_feat_extract_layers": len(numbers(values, "wave_channels"))}


def number_of(values: Values) -> int:
    return len(numbers(values, "wave_channels"))


def front(k: int) -> tuple[Rule, ...]:
    """Convolution k over samples."""
    theirs = f"{MODEL}.feature_extractor.conv_layers.{k}"

    def normed(values: Values, i: int) -> bool:
        return k < number_of(values) and (k == 0 or values["wave_norm"] == "layer")

    return (Rule(f"{theirs}.conv.weight", f"subsample.kernels.{k}", when=lambda values, i: k < number_of(values)),
            Rule(f"{theirs}.conv.bias", f"subsample.biases.{k}",
                 when=lambda values, i: k < number_of(values) and values["wave_bias"]),
            Rule(f"{theirs}.layer_norm.weight", f"subsample.norms.{k}.weight", when=normed),
            Rule(f"{theirs}.layer_norm.bias", f"subsample.norms.{k}.bias", when=normed))


def network(theirs: str, norm: str, ours: str, ours_norm: str) -> tuple[Rule, ...]:
    """One of the two feed-forward networks of a block."""
    return (*biased(f"{LAYER}.{norm}", f"blocks.{{i}}.{ours_norm}"),
            *biased(f"{LAYER}.{theirs}.intermediate_dense", f"blocks.{{i}}.{ours}.up"),
            *biased(f"{LAYER}.{theirs}.output_dense", f"blocks.{{i}}.{ours}.down"))


def check(config: Values, values: Values) -> None:
    """Sound is read there as it is here: this is no entry of config.json."""
    for name, known in SOUND.items():
        if values[name] != known:
            raise UserError(f"--{name} is {values[name]}, and there it is always {known}")


WAV2VEC2_CONFORMER = Architecture(
    name="wav2vec2-conformer",
    summary="wav2vec 2.0 with Conformer blocks, for CTC",
    task_class="Wav2Vec2ConformerForCTC",
    variant="conformer",
    fixed=dict(norm="layer_norm", norm_eps=1e-5, bias=True, conv_norm="batch", convolution_bias=False, final_norm=True,
               subsampling="wave", context=2**20, **SOUND),
    keys=(
        WIDTH,
        count("num_hidden_layers", "layers", 12),
        count("num_attention_heads", "heads", 12),
        widths("intermediate_size", "ffn_multiple", WIDTH, 3072),
        count("conv_depthwise_kernel_size", "kernel", 31),
        word("hidden_act", "activation", "gelu", ACTIVATIONS),
        word("feat_extract_norm", "wave_norm", "group", {"group": "group", "layer": "layer"}),
        flag("conv_bias", "wave_bias", False),
        Key(("conv_dim", "conv_kernel", "conv_stride", "num_feat_extract_layers"), tuple(LISTS), read_lists, write_lists),
        training("dropout", "hidden_dropout", "attention_dropout"),
        only("layer_norm_eps", 1e-5, "it is that of a part of their norms, and all norms have one here"),
        only("feat_extract_activation", "gelu", "it is always so here"),
        only("position_embeddings_type", "relative", "queries and keys are made of distances here"),
        only("pad_token_id", 0, "class 0 is CTC's blank here"),
        only("add_adapter", False, "there are no convolutions behind the blocks here"),
        Key(("max_source_positions", "num_conv_pos_embedding_groups"), (), lambda config: {},  # of what nothing computes with
            lambda values: {"max_source_positions": 5000, "num_conv_pos_embedding_groups": math.gcd(values["width"], 16)}),
    ),
    prefix=f"{MODEL}.",
    rules=(
        *(rule for k in range(MOST) for rule in front(k)),
        *biased(f"{MODEL}.feature_projection.layer_norm", "subsample.norm"),
        *biased(f"{MODEL}.feature_projection.projection", "subsample.out"),
        *network("ffn1", "ffn1_layer_norm", "ffn", "norm1"),
        *biased(f"{LAYER}.self_attn_layer_norm", "blocks.{i}.norm2"),
        *(Rule(tuple(f"{LAYER}.self_attn.linear_{part}.{kind}" for part in "qkv"), f"blocks.{{i}}.mixer.qkv.{kind}",
               rows(width, width, width)) for kind in ("weight", "bias")),
        Rule(f"{LAYER}.self_attn.linear_pos.weight", "blocks.{i}.mixer.positions.weight"),
        Rule(f"{LAYER}.self_attn.pos_bias_u", "blocks.{i}.mixer.bias_u"),
        Rule(f"{LAYER}.self_attn.pos_bias_v", "blocks.{i}.mixer.bias_v"),
        *biased(f"{LAYER}.self_attn.linear_out", "blocks.{i}.mixer.out"),
        *biased(f"{LAYER}.conv_module.layer_norm", "blocks.{i}.norm3"),
        Rule(f"{LAYER}.conv_module.pointwise_conv1.weight", "blocks.{i}.convolution.into.weight", LAST),
        Rule(f"{LAYER}.conv_module.depthwise_conv.weight", "blocks.{i}.convolution.depthwise", MIDDLE),
        *biased(f"{LAYER}.conv_module.batch_norm", "blocks.{i}.convolution.norm"),
        Rule(f"{LAYER}.conv_module.batch_norm.running_mean", "blocks.{i}.convolution.norm.mean"),
        Rule(f"{LAYER}.conv_module.batch_norm.running_var", "blocks.{i}.convolution.norm.variance"),
        Rule(f"{LAYER}.conv_module.pointwise_conv2.weight", "blocks.{i}.convolution.out.weight", LAST),
        *network("ffn2", "ffn2_layer_norm", "ffn2", "norm4"),
        *biased(f"{LAYER}.final_layer_norm", "blocks.{i}.norm"),
        *biased(f"{MODEL}.encoder.layer_norm", "norm"),
        *biased("lm_head", "head"),
    ),
    check=check,
    ignored_arrays=(r"wav2vec2_conformer\.encoder\.pos_conv_embed\..*", r"wav2vec2_conformer\.masked_spec_embed",
                    r".*\.batch_norm\.num_batches_tracked"),
    ignored=tuple("""
        activation_dropout feat_proj_dropout feat_quantizer_dropout final_dropout layerdrop apply_spec_augment mask_time_prob
        mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks
        num_codevectors_per_group num_codevector_groups contrastive_logits_temperature num_negatives codevector_dim
        proj_codevector_dim diversity_loss_weight ctc_loss_reduction ctc_zero_infinity classifier_proj_size tdnn_dim
        tdnn_kernel tdnn_dilation xvector_output_dim adapter_kernel_size adapter_stride num_adapter_layers output_hidden_size
        num_conv_pos_embeddings rotary_embedding_base conformer_conv_dropout do_stable_layer_norm hidden_dropout_prob
        feat_extract_dropout
    """.split()),
)
