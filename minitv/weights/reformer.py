"""Reformer (Kitaev et al. 2020) as in the package transformers: the variant ``reformer`` in the pattern of the published codes.

The two streams stand side by side before the head, attention has no biases, and local layers see a chunk of the text and the
one before. Files do not have the random numbers that hashes are made of: transformers draws them anew in every call, so two
calls differ. Here they are drawn once when the weights come in, are kept with the model, and are drawn anew before every
training step; another draw gives a model that is as good. Where a text is no longer than a chunk, all of it is seen, and
nothing depends on them.

Steps. A call cuts the order of all its tokens into chunks, so a longer text shows its earlier tokens other keys, and steps are
no part of it: in the models of tests/goldens/weights, up to 0.23 of the largest logit. A step here sees what transformers' call
on the text so far shows the last token, to 1e-10; layers above an LSH layer keep what it gave to earlier tokens, where a new
call would give them other values. transformers' own steps do the same in local layers, and in LSH layers up to a chunk. Beyond
it an LSH step of theirs takes 2 m places of the order in a circle, also after its end: a first chunk sees the end of the same
round and no other, and a last chunk that is not full the beginning. That is up to 0.12 of the largest logit from their call on
the text so far, and nothing for one round wherever the text fills its chunks. Their steps hash with new random numbers too,
and of several texts all read the keys of the first.

transformers fills a text up to a multiple of the chunks of both kinds of layers. Where that adds a whole LSH chunk, as chunks
of 4 and 6 may, the first one has an empty one before it there, and here the last one that has tokens.

A config without num_buckets lets the first text decide; here that is a text of max_position_embeddings tokens.
"""

import math

from autograd.random import Random

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
    entry,
    number,
    only,
    rows,
    training,
    widths,
    word,
)
from ..errors import UserError, quoted
from ..ops.lsh import factors_of

WIDTH = count("hidden_size", "width", 256)
CHUNK = count("lsh_attn_chunk_length", "chunk", 64)
CONTEXT = count("max_position_embeddings", "context", 4096)
KINDS = {"lsh": "lsh", "local": "chunked"}
LAYER = "reformer.encoder.layers.{i}"
AXES = 8  # of positions, at most


def integers(config: Values, name: str, default: list[int] | None) -> list[int]:
    """An entry that is a list of positive integers, no longer than the axes of positions may be."""
    allowed = f"a list of 1 to {AXES} positive integers below 2**31"
    value = entry(config, name, list, default, allowed)
    if not 1 <= len(value) <= AXES or not all(type(number) is int and 1 <= number < 2**31 for number in value):
        raise UserError(f"{name} is {quoted(value)}, allowed: {allowed}")
    return value


def kinds(values: Values) -> list[str]:
    """The kind of attention of every layer."""
    names = [name.strip() for name in values["mixers"].split(",")]
    return [names[i % len(names)] for i in range(values["layers"])]


def read_layers(config: Values) -> Values:
    layers = entry(config, "attn_layers", list, ["local", "lsh"] * 3, "a list of lsh and local")
    if not layers or not all(isinstance(kind, str) and kind in KINDS for kind in layers):
        raise UserError(f"attn_layers is {quoted(layers)}, allowed: a list of lsh and local")
    if config.get("num_hidden_layers", len(layers)) != len(layers):
        raise UserError(f"num_hidden_layers is {quoted(config['num_hidden_layers'])}, and attn_layers has {len(layers)}")
    return {"layers": len(layers), "mixers": ",".join(KINDS[kind] for kind in layers)}


def write_layers(values: Values) -> Values:
    theirs = {ours: name for name, ours in KINDS.items()}
    if unknown := [kind for kind in kinds(values) if kind not in theirs]:
        raise UserError(f"--mixers has {unknown[0]}, allowed there: lsh, chunked")
    return {"attn_layers": [theirs[kind] for kind in kinds(values)], "num_hidden_layers": values["layers"]}


def read_buckets(config: Values) -> Values:
    given = config.get("num_buckets")
    if given is None:
        chunks, m = CONTEXT.read(config)["context"] // CHUNK.read(config)["chunk"], CHUNK.read(config)["chunk"]
        power = (2 * max(chunks, 1)).bit_length() - 1
        whole = 2**power <= 2 * max(math.isqrt(chunks), m)
        given = 2**power if whole else [2 ** (power // 2), 2 ** (power - power // 2)]
    factors = integers({"num_buckets": given if isinstance(given, list) else [given]}, "num_buckets", None)
    if any(factor % 2 for factor in factors):
        raise UserError(f"num_buckets is {quoted(given)}, allowed: even numbers")
    return {"buckets": math.prod(factors), "factors": ",".join(map(str, factors))}


def factors(values: Values) -> tuple[int, ...]:
    """Those of the number of buckets, as the model takes them."""
    if values["factors"] is not None:
        return tuple(map(int, values["factors"].split(",")))
    return factors_of(values["buckets"] or 2 * max(1, values["context"] // values["chunk"]))


def write_buckets(values: Values) -> Values:
    found = factors(values)
    return {"num_buckets": found[0] if len(found) == 1 else list(found)}


def read_positions(config: Values) -> Values:
    if not entry(config, "axial_pos_embds", bool, True, "true or false"):
        return {"axial": None, "axial_widths": None}
    axes, sizes = integers(config, "axial_pos_shape", [64, 64]), integers(config, "axial_pos_embds_dim", [64, 192])
    return {"axial": "x".join(map(str, axes)), "axial_widths": ",".join(map(str, sizes))}


def axes(values: Values) -> tuple[list[int], list[int]]:
    """How many places each axis of the positions has, and how many channels."""
    shape = [int(word) for word in values["axial"].lower().split("x")]
    if values["axial_widths"] is not None:
        return shape, [int(word) for word in values["axial_widths"].split(",")]
    width, n = values["width"], len(shape)
    return shape, [width * (a + 1) // n - width * a // n for a in range(n)]


def write_positions(values: Values) -> Values:
    if values["axial"] is None:
        return {"axial_pos_embds": False}
    shape, sizes = axes(values)
    return {"axial_pos_embds": True, "axial_pos_shape": shape, "axial_pos_embds_dim": sizes}


def table(a: int) -> Way:
    """The vectors of axis a: [1 .. n .. 1 d] there, [n d] here."""
    def write(arrays: Arrays, values: Values) -> Arrays:
        (array,), count = arrays, len(axes(values)[0])
        return [array.reshape(*[1] * a, array.shape[0], *[1] * (count - a - 1), array.shape[1])]

    return Way(lambda arrays, values: [array.reshape(array.shape[a], array.shape[-1]) for array in arrays], write)


def inner(values: Values) -> int:
    return values["heads"] * (values["head_size"] or values["width"] // values["heads"])


def of_kind(kind: str):
    return lambda values, i: kinds(values)[i] == kind


def drawn(i: int) -> Way:
    """The random numbers of layer i, [H R K F], which are no part of a file."""
    def read(arrays, values):
        heads, size = values["heads"], inner(values) // values["heads"]
        rounds = max(values["rounds"], values["eval_rounds"] or 0)
        return [Random(0).split(i).normal((heads, rounds, size, sum(factors(values)) // 2), "float64")]

    return Way(read, lambda arrays, values: [])


REFORMER = Architecture(
    name="reformer",
    summary="Reformer, a language model with axial positions",
    task_class="ReformerModelWithLMHead",
    variant="reformer",
    fixed=dict(positions="learned", norm="layer_norm", bias=True, tied=False, attention_bias=False, head_bias=True,
               attend="chunks", wrap="previous", correction=False, streams="concat"),
    filled=dict(bias=False, head_bias=False),
    keys=(
        WIDTH, CONTEXT, CHUNK,
        count("num_attention_heads", "heads", 12),
        count("num_hashes", "rounds", 1),
        widths("feed_forward_size", "ffn_width", WIDTH, 512, lambda values: values["ffn_multiple"] + 0.5),
        word("hidden_act", "activation", "relu", ACTIVATIONS),
        number("layer_norm_eps", "norm_eps", 1e-12),
        Key(("attention_head_size",), ("head_size",), count("attention_head_size", "head_size", 64).read,
            lambda values: {"attention_head_size": inner(values) // values["heads"]}),
        Key(("local_attn_chunk_length",), ("local_chunk",), count("local_attn_chunk_length", "local_chunk", 64).read,
            lambda values: {"local_attn_chunk_length": values["local_chunk"] or values["chunk"]}),
        Key(("attn_layers", "num_hidden_layers"), ("layers", "mixers"), read_layers, write_layers),
        Key(("num_buckets",), ("buckets", "factors"), read_buckets, write_buckets),
        Key(("axial_pos_embds", "axial_pos_shape", "axial_pos_embds_dim"), ("axial", "axial_widths"), read_positions,
            write_positions),
        Key((), ("ffn_multiple", "ffn_chunks", "loss_chunks"), lambda config: {}, lambda values: {}),
        training("dropout", "hidden_dropout_prob"),
        Key(("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob"), (), lambda config: {},
            lambda values: {"lsh_attention_probs_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}),
        only("is_decoder", True, "this model sees the past alone"),
        only("tie_word_embeddings", False, "its head reads two streams, and the embedding makes one"),
        *(only(f"{kind}_num_chunks_{side}", number, "a chunk sees itself and the one before here")
          for kind in ("lsh", "local") for side, number in (("before", 1), ("after", 0))),
        only("hash_seed", None, "numbers that torch draws from a seed are others here"),
    ),
    prefix="reformer.",
    rules=(
        Rule("reformer.embeddings.word_embeddings.weight", "embed.weight"),
        Rule("reformer.embeddings.position_embeddings.embedding.weight", "positions",
             when=lambda values, i: values["axial"] is None),
        *(Rule(f"reformer.embeddings.position_embeddings.weights.{a}", f"axial.tables.{a}", table(a),
               lambda values, i, a=a: values["axial"] is not None and a < len(axes(values)[0])) for a in range(AXES)),
        *biased(f"{LAYER}.attention.layer_norm", "blocks.{i}.norm1"),
        Rule(tuple(f"{LAYER}.attention.self_attention.{part}.weight" for part in ("query_key", "value")),
             "blocks.{i}.mixer.qkv.weight", rows(inner, inner), of_kind("lsh")),
        Rule(tuple(f"{LAYER}.attention.self_attention.{part}.weight" for part in ("query", "key", "value")),
             "blocks.{i}.mixer.qkv.weight", rows(inner, inner, inner), of_kind("chunked")),
        Rule((), "blocks.{i}.mixer.rotations", drawn, of_kind("lsh")),
        Rule(f"{LAYER}.attention.output.dense.weight", "blocks.{i}.mixer.out.weight"),
        *biased(f"{LAYER}.feed_forward.layer_norm", "blocks.{i}.norm2"),
        *biased(f"{LAYER}.feed_forward.dense.dense", "blocks.{i}.ffn.up"),
        *biased(f"{LAYER}.feed_forward.output.dense", "blocks.{i}.ffn.down"),
        *biased("reformer.encoder.layer_norm", "norm"),
        Rule("lm_head.decoder.weight", "head.weight"),
        Rule("lm_head.decoder.bias", "head_bias"),
    ),
    ignored_arrays=(r"lm_head\.bias",),  # which nothing reads
    # the last ones are of earlier versions, and nothing reads them
    ignored=("axial_norm_std", "chunk_size_lm_head", "classifier_dropout", "attention_probs_dropout_prob", "intermediate_size",
             "num_chunks_before", "num_chunks_after"),
)
