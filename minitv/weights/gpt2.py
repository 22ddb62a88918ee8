"""GPT-2 (Radford et al. 2019): the variant ``transformer`` with learned positions and all biases.

Their linear layers are called Conv1D and keep their matrices [inputs outputs], the transpose of ours. One of them gives
queries, keys and values, in this order, which is also ours.
"""

from ..architecture import (
    ACTIVATIONS,
    TRANSPOSED,
    Architecture,
    Rule,
    biased,
    count,
    flag,
    number,
    only,
    ratio,
    training,
    untied,
    word,
)

WIDTH = count("n_embd", "width", 768)

GPT2 = Architecture(
    name="gpt2",
    summary="GPT-2: attention with learned positions",
    task_class="GPT2LMHeadModel",
    variant="transformer",
    fixed=dict(positions="learned", norm="layer_norm", bias=True),
    filled=dict(bias=False),
    keys=(
        WIDTH,
        count("n_positions", "context", 1024),
        count("n_layer", "layers", 12),
        count("n_head", "heads", 12),
        ratio("n_inner", "ffn_multiple", WIDTH, 4),
        word("activation_function", "activation", "gelu_new", ACTIVATIONS),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        flag("tie_word_embeddings", "tied", True),
        training("dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        only("scale_attn_weights", True, "scores are always divided by the root of a head's width here"),
        only("scale_attn_by_inverse_layer_idx", False, "all layers scale their scores alike here"),
        only("add_cross_attention", False, "there is no second text to attend to"),
    ),
    prefix="transformer.",
    rules=(
        Rule("transformer.wte.weight", "embed.weight"),
        Rule("transformer.wpe.weight", "positions"),
        *biased("transformer.h.{i}.ln_1", "blocks.{i}.norm1"),
        *biased("transformer.h.{i}.attn.c_attn", "blocks.{i}.mixer.qkv", TRANSPOSED),
        *biased("transformer.h.{i}.attn.c_proj", "blocks.{i}.mixer.out", TRANSPOSED),
        *biased("transformer.h.{i}.ln_2", "blocks.{i}.norm2"),
        *biased("transformer.h.{i}.mlp.c_fc", "blocks.{i}.ffn.up", TRANSPOSED),
        *biased("transformer.h.{i}.mlp.c_proj", "blocks.{i}.ffn.down", TRANSPOSED),
        *biased("transformer.ln_f", "norm"),
        Rule("lm_head.weight", "head.weight", when=untied),
    ),
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored_arrays=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, and the number behind it
    ignored=("reorder_and_upcast_attn", "n_ctx", "n_special", "predict_special_tokens", "is_decoder", "summary_type",
             "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)
