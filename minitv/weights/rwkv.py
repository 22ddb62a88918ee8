"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): the variant ``rwkv``.

Shares of the present token, ``time_mix``, have two axes more there. An evaluation there may halve what goes through every few
layers, and with it the weights of their outputs (``rescale_every``), so that float16 is large enough; a norm undoes it, but for
its epsilon. Files always have the weights before that, and here nothing is halved.
"""

from ..architecture import FLAT, Architecture, Key, Rule, Values, biased, count, entry, flag, only, ratio, untied
from ..errors import UserError

WIDTH = count("hidden_size", "width", 4096)


def _attention(config: Values) -> Values:
    size, width = (entry(config, name, (int, type(None)), default, "a positive integer or null")
                   for name, default in (("attention_hidden_size", None), ("hidden_size", 4096)))
    if size not in (None, width):
        raise UserError(f"attention_hidden_size is {size}, allowed: hidden_size, {width}, because our mean has the width of "
                        "the model")
    return {}


RWKV = Architecture(
    name="rwkv",
    summary="RWKV-4: a weighted mean of the past whose weights fade",
    task_class="RwkvForCausalLM",
    variant="rwkv",
    fixed=dict(positions="none", embed_norm=True, bias=True, norm="layer_norm", activation="relu_squared"),
    keys=(
        WIDTH,
        count("context_length", "context", 1024),
        count("num_hidden_layers", "layers", 32),
        ratio("intermediate_size", "ffn_width", WIDTH, 4),
        flag("tie_word_embeddings", "tied", False),
        only("layer_norm_epsilon", 1e-5, "the last norm of this architecture always has 1e-05, and our norms are all alike"),
        Key(("attention_hidden_size",), (), _attention, lambda values: {}),
        Key(("rescale_every",), (), lambda config: {}, lambda values: {"rescale_every": 0}),
    ),
    prefix="rwkv.",
    rules=(
        Rule("rwkv.embeddings.weight", "embed.weight"),
        *biased("rwkv.blocks.0.pre_ln", "embed_norm"),
        *biased("rwkv.blocks.{i}.ln1", "blocks.{i}.norm1"),
        *(Rule(f"rwkv.blocks.{{i}}.attention.time_mix_{name}", f"blocks.{{i}}.mixer.mix_{name[0]}", FLAT)
          for name in ("key", "value", "receptance")),
        *(Rule(f"rwkv.blocks.{{i}}.attention.{theirs}.weight", f"blocks.{{i}}.mixer.{ours}")
          for theirs, ours in (("key", "key"), ("value", "value"), ("receptance", "receptance"), ("output", "out"))),
        *(Rule(f"rwkv.blocks.{{i}}.attention.{name}", f"blocks.{{i}}.mixer.{name}") for name in ("time_decay", "time_first")),
        *biased("rwkv.blocks.{i}.ln2", "blocks.{i}.norm2"),
        *(Rule(f"rwkv.blocks.{{i}}.feed_forward.time_mix_{name}", f"blocks.{{i}}.ffn.mix_{name[0]}", FLAT)
          for name in ("key", "receptance")),
        *(Rule(f"rwkv.blocks.{{i}}.feed_forward.{name}.weight", f"blocks.{{i}}.ffn.{name}")
          for name in ("key", "receptance", "value")),
        *biased("rwkv.ln_out", "norm"),
        Rule("head.weight", "head.weight", when=untied),
    ),
    copies={"head.weight": "rwkv.embeddings.weight"},
)
