"""LLaMA (Touvron et al. 2023, arXiv 2302.13971) and Mistral (Jiang et al. 2023, arXiv 2310.06825): the variant ``roformer``.

Queries and keys are turned in pairs half a head apart, heads of keys and values may be shared by groups, norms divide by the
root mean square, and the feed-forward network is gated. Their ``gate_proj`` goes through the activation function, as our
``up`` does, and their ``up_proj`` multiplies what it gives. Angles for longer texts are read where our models have the same:
``linear`` and ``llama3``. A model that was trained here with neighbouring channels as pairs is written with its rows of queries
and keys in another order, which changes no product.
"""

from dataclasses import replace

import numpy as np

from ..architecture import (
    ACTIVATIONS,
    Architecture,
    Arrays,
    Key,
    Rule,
    Values,
    Way,
    count,
    entry,
    flag,
    number,
    ratio,
    rows,
    training,
    untied,
    width,
    word,
    worded,
)
from ..errors import UserError, quoted
from ..ops.rope import repaired

WIDTH = count("hidden_size", "width", 4096)
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4}  # the turns between which its angles change, which are fixed here


def _read_rope(config: Values) -> Values:
    """The angles, which newer files have in one entry, rope_parameters, and older ones in two."""
    said = {}
    for name in ("rope_scaling", "rope_parameters"):
        said |= entry(config, name, (dict, type(None)), None, "an object or null") or {}
    top, kind = config.get("rope_theta"), said.pop("rope_type", said.pop("type", "default"))
    base = said.pop("rope_theta", 10_000.0 if top is None else top)
    if type(base) not in (int, float) or top not in (None, base):
        also = "" if top in (None, base) else f" and {quoted(top)}"
        raise UserError(f"rope_theta is {quoted(base)}{also}, allowed: a number")
    allowed = {"default": (), "linear": ("factor",), "llama3": ("factor", "original_max_position_embeddings", *LLAMA3)}
    if kind not in allowed:
        raise UserError(f"rope_type is {quoted(kind)}, allowed: {', '.join(allowed)}, because our models have no other angles "
                        "that are the same whatever the length of the text is")
    if strange := [name for name in said if name not in allowed[kind] and said[name] is not None]:
        raise UserError(f"{strange[0]} stands beside rope_type {kind}, allowed there: {', '.join(allowed[kind]) or 'nothing'}")
    values = {"base": float(base), "pairing": "half"}
    if kind == "default":
        return values
    values |= {"scaling": kind, "scaling_factor": float(entry(said, "factor", (int, float), None, "a number"))}
    if kind == "llama3":
        values["trained_context"] = entry(said, "original_max_position_embeddings", int, None, "a positive integer")
        for name, value in LLAMA3.items():
            if said.get(name) != value:
                raise UserError(f"{name} is {quoted(said.get(name))}, allowed: {value}, because the angles of llama3 change "
                                "there in our models")
    return values


def _write_rope(values: Values) -> Values:
    kind, scaling = values["scaling"], {"rope_type": values["scaling"], "factor": values["scaling_factor"]}
    if kind == "none":
        return {"rope_theta": values["base"], "rope_scaling": None}
    if kind == "llama3":
        scaling |= {"original_max_position_embeddings": values["trained_context"] or values["context"], **LLAMA3}
    elif kind != "linear":
        raise UserError(f"--scaling is {kind}, and its angles are others there, allowed: none, linear, llama3")
    return {"rope_theta": values["base"], "rope_scaling": scaling}


ROPE = Key(("rope_theta", "rope_scaling", "rope_parameters"),
           ("base", "pairing", "scaling", "scaling_factor", "trained_context"), _read_rope, _write_rope)


def _groups(default: int | None) -> Key:
    """Heads of keys and values: theirs are as many as heads where the entry is null."""
    def read(config: Values) -> Values:
        groups = entry(config, "num_key_value_heads", (int, type(None)), default, "a positive integer or null")
        return {"kv_heads": None if groups == config.get("num_attention_heads") else groups}

    return Key(("num_key_value_heads",), ("kv_heads",), read,
               lambda values: {"num_key_value_heads": values["kv_heads"] or values["heads"]})


def _read_biases(config: Values) -> Values:
    both = [entry(config, name, bool, False, "true or false") for name in ("attention_bias", "mlp_bias")]
    if both[0] != both[1]:
        raise UserError(f"attention_bias is {worded(both[0])} and mlp_bias {worded(both[1])}, allowed: the same for both, "
                        "because here all linear layers have biases, or none")
    return {"bias": both[0]}


BIASES = Key(("attention_bias", "mlp_bias"), ("bias",), _read_biases,
             lambda values: {"attention_bias": values["bias"], "mlp_bias": values["bias"]})


def _read_head(config: Values) -> Values:
    size = entry(config, "head_dim", (int, type(None)), None, "a positive integer or null")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if size is not None and size * (heads or 32) != (width or 4096):
        raise UserError(f"head_dim is {size} with {heads} heads and hidden_size {width}, allowed: hidden_size / "
                        "num_attention_heads, because our heads divide the width")
    return {}


HEAD = Key(("head_dim",), (), _read_head, lambda values: {"head_dim": values["width"] // values["heads"]})


def _window(config: Values) -> Values:
    window = entry(config, "sliding_window", (int, type(None)), 4096, "an integer or null")
    context = config.get("max_position_embeddings", 4096 * 32)
    if window is not None and (type(context) is not int or window < context):
        raise UserError(f"sliding_window is {window} and max_position_embeddings {quoted(context)}, allowed: null, or no less "
                        "than that, because a position sees all positions before it here")
    return {}


def _keys_and_values(values: Values) -> int:
    return (values["kv_heads"] or values["heads"]) * values["width"] // values["heads"]


ROWS = rows(width, _keys_and_values, _keys_and_values)


def _write_qkv(arrays: Arrays, values: Values) -> Arrays:
    """Queries, keys and values; the pairs of a model of ours may be neighbours."""
    q, k, v = ROWS.write(arrays, values)
    if values["pairing"] == "interleaved":
        q = repaired(np.asarray(q), values["heads"], "half")
        k = repaired(np.asarray(k), values["kv_heads"] or values["heads"], "half")
    return [q, k, v]


QKV = Way(ROWS.read, _write_qkv)


def _linear(theirs: str | tuple[str, ...], ours: str, way: Way | None = None) -> tuple[Rule, Rule]:
    """The weight of a linear layer, and its bias where there is one."""
    names, way = ((theirs,) if isinstance(theirs, str) else theirs), way or Rule._field_defaults["way"]
    weight, bias = (tuple(f"model.layers.{{i}}.{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    return (Rule(weight, f"blocks.{{i}}.{ours}.weight", way),
            Rule(bias, f"blocks.{{i}}.{ours}.bias", way, lambda values, i: values["bias"]))


# Variants whose options cannot say how --positions rope turns, which is always like this.
TURNED = dict(positions="rope", base=10_000.0, pairing="interleaved", scaling="none", scaling_factor=1.0, trained_context=None)


def _keys(context: int, groups: int | None, inner: float) -> tuple[Key, ...]:
    """What both architectures have; their usual sizes differ, and stand for an entry that is not there."""
    return (
        WIDTH,
        count("max_position_embeddings", "context", context),
        count("num_hidden_layers", "layers", 32),
        count("num_attention_heads", "heads", 32),
        _groups(groups),
        ratio("intermediate_size", "ffn_multiple", WIDTH, inner),
        word("hidden_act", "activation", "silu", ACTIVATIONS),
        number("rms_norm_eps", "norm_eps", 1e-6),
        flag("tie_word_embeddings", "tied", False),
        ROPE,
        HEAD,
        training("dropout", "attention_dropout"),
    )


LLAMA = Architecture(
    name="llama",
    summary="LLaMA: turned queries and keys, and a gated network",
    task_class="LlamaForCausalLM",
    variant="roformer",
    fixed=dict(positions="none", norm="rms_norm", ffn_gate=True),
    likewise={"transformer": TURNED | dict(kv_heads=None), "grouped-query": TURNED, "multi-query": TURNED},
    keys=(*_keys(2048, None, 11008 / 4096), BIASES),
    prefix="model.",
    rules=(
        Rule("model.embed_tokens.weight", "embed.weight"),
        Rule("model.layers.{i}.input_layernorm.weight", "blocks.{i}.norm1.weight"),
        *_linear(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mixer.qkv", QKV),
        *_linear("self_attn.o_proj", "mixer.out"),
        Rule("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.norm2.weight"),
        *_linear("mlp.gate_proj", "ffn.up"),
        *_linear("mlp.up_proj", "ffn.gate"),
        *_linear("mlp.down_proj", "ffn.down"),
        Rule("model.norm.weight", "norm.weight"),
        Rule("lm_head.weight", "head.weight", when=untied),
    ),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    ignored_arrays=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # the angles, which older files keep
    # how products were divided among machines; the name once more; the context once more, which transformers does not read
    ignored=("pretraining_tp", "is_llama_config", "max_sequence_length"),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    summary="Mistral: LLaMA with other usual sizes; no window",
    task_class="MistralForCausalLM",
    fixed=LLAMA.fixed | dict(bias=False),
    keys=(*_keys(4096 * 32, 8, 3.5), Key(("sliding_window",), (), _window, lambda values: {"sliding_window": None})),
)
