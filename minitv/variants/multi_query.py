"""Multi-query attention: all heads of a layer read the same keys and values (Shazeer 2019, arXiv 1911.02150).

The variant ``multi-query`` has one head of keys and values. ``grouped-query`` (Ainslie et al. 2023, arXiv 2305.13245) has G of
them, each of which serves a group of H/G heads of queries. With G = H it is the Transformer, with G = 1 multi-query attention.
minitv/variants/transformer.py tells what queries, keys, values and heads are for.

The problem. A Transformer that writes a text keeps the keys and values of all past tokens in a cache, and reads all of them for
each new token. With H heads of K channels these are 2 t H K = 2 t D numbers in each layer after t tokens. Each number that is
read is multiplied once. So with a long text, the time of a step is the time in which memory delivers the cache. The processor
waits. The paper counts the numbers that are read for one multiplication while b sequences of n tokens are written: they grow as
n/D + 1/b (section 2.4.1). The weights of the matrices cause 1/b, and a larger batch makes that smaller. The cache causes n/D,
and a larger batch does not help there, because every sequence has a cache of its own.

The idea. The heads keep their own queries, and share keys and values. The cache becomes H/G times as small, and each key that
is read serves H/G queries, those of its group. With G = 1, n/D becomes n/(D H) (section 3.1).

- Why share keys and values, and not queries: only keys and values are kept. A query is used once, for its own token.
- Why heads still differ: each has its own query, and so its own weights over the same keys. What is lost: all heads of a group
  see the same K channels of a token's key and take the mean of the same values.
- Why not fewer or narrower heads: they make the cache small as well, but the model loses more. The paper's language models have
  a perplexity of 29.9 with all heads, 30.2 with one head of keys and values, and 30.9 to 31.2 with fewer or narrower heads.
- Why groups: one head of keys and values is little for a large model. T5-XXL has 64 heads. With all of them it scores 47.2 in
  1.51 s for each sample, with G = 1 it scores 46.6 in 0.24 s, and with G = 8 it scores 47.1 in 0.28 s (2305.13245, table 1).
  Smaller models that had G = 1 from their first step on were unstable: their loss had sudden peaks, and they diverged when they
  were then trained on long inputs (appendix A).
- Why the feed-forward network is wider here: a layer with G heads of keys and values has 2 D² (1 - G/H) weights fewer.
  1911.02150 gives them to the feed-forward network, so that models of equal size are compared. The presets do so with
  --ffn-multiple 5 - G/H in place of 4, because each width of that network has 2 D² weights.
- Why training is no faster: all queries of a sequence use the keys together, so reading them was never what took the time. In
  1911.02150, table 2, a token takes 13.2 microseconds of training with all heads and 13.0 with one head of keys and values. To
  write a token, the decoder takes 46 and 3.8.

The state in bytes. A layer keeps 2 t G K numbers for each sequence, in float32 8 t G K bytes. With 6 layers, H = 6, K = 64 and
t = 256, as in the preset small, these are 4.7 MB with G = 6, 1.6 MB with G = 2, and 0.8 MB with G = 1.

How to choose G. It divides H. Where writing is not limited by the cache, with short texts or small models, G = H loses nothing.
Otherwise begin with a G that is much smaller than H, and raise it while the loss falls. 2305.13245 takes 8 of 64, because up to
8 the time of writing hardly grows (section 3.3). --layer-kv-heads gives each layer a number of its own; neither paper does so.
With other --heads or --kv-heads than those of the preset, set --ffn-multiple to 5 - G/H to keep the size of the model.

    ours                                                     the papers'
    B T D H K           batch, tokens, width, heads, D / H   b, n, d, h, k = v
    G                   heads of keys and values             1 in 1911.02150, G in 2305.13245
    Wqkv [(H+2G)K D]    queries, then keys, then values      P_q, P_k, P_v
    Wo [D D]            weights of the output                P_o
    q_i [H K]           queries of token i                   q
    k_j v_j [G K]       keys and values of token j           K, V

The layer, for head h = 0 .. H - 1 of queries, which reads head g = ⌊h G / H⌋ of keys and values. The mask is the Transformer's:
token i sees the keys of tokens j ≤ i.

    q, k, v = split(x Wqkvᵀ + b)                             1911.02150, section 3: P_k and P_v are the same for all heads
    y_h = softmax(q_h k_gᵀ / √K) v_g                         2305.13245, section 2.2: one head of k and v for each group
    out = merge(y) Woᵀ + b                                   1911.02150, section 3: the sum over heads with P_o

The code is ``Attention`` in minitv/variants/transformer.py, and only its options are here. Training, the loss and writing are
those of the Transformer.

Gradients. P_h are the weights of head h, dS_h is the gradient of its scores and dy_h that of its output. The sums are over the
heads h that read g; minitv/ops/attention/__init__.py has all else.

    dv_g = Σ_h P_hᵀ dy_h,   dk_g = Σ_h dS_hᵀ q_h / √K

From a model with all heads to fewer. A trained Transformer need not be trained again from the start: `minitv convert DIR
--kv-heads G` makes one head of keys and values of each group (2305.13245, sections 2.1 and 2.2). By default it is the mean of
the heads of the group. The paper finds this better than to take one of them, and that better than random numbers (section 3.3).
Then the model is trained further with `minitv train --init-from`, in the paper for 5 % as many steps as before. The paper's
model with G = 8 is usable even without that, the one with G = 1 is not. The other weights stay as they are, so the new model is
smaller. With --positions rope, the mean of turned keys is the turned mean of keys, because rope turns all heads alike.

Three tokens. Two heads of queries with K = 1 read one head of keys and values. The scale is ln 2 in place of 1/√K, so that
exp(scale · q · k) = 2^(q · k).

    >>> import numpy as np
    >>> from minitv.ops import attention
    >>> q = np.array([[[1.], [1], [1]], [[0.], [0], [-1]]])[None]  # [1 H T K]
    >>> k, v = np.array([[[[0.], [1], [2]]]]), np.array([[[[7.], [4], [0]]]])  # [1 G T K]
    >>> y, _ = attention(q, k, v, scale=np.log(2))
    >>> print(y.numpy()[0, :, :, 0].round(3))
    [[7.    5.    2.143]
     [7.    5.5   5.143]]

At token 2, head 0 weighs the keys by 2^0, 2^1 and 2^2: (1 · 7 + 2 · 4 + 4 · 0) / 7 = 2.143. Head 1 asks the opposite of the
same keys, with the weights 1, 1/2 and 1/4: (7 + 2 + 0) / 1.75 = 5.143. Keys and values that are repeated for each head give
the same:

    >>> repeated, _ = attention(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1), scale=np.log(2))
    >>> bool(np.allclose(y.numpy(), repeated.numpy()))
    True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import check, option
from ..variant import Page, Variant
from .transformer import Attention, TransformerOptions


@dataclass(frozen=True)
class GroupedOptions(TransformerOptions):
    """grouped-query"""

    kv_heads: int = option(2, "heads of keys and values; they divide the heads of queries", low=1)
    layer_kv_heads: str | None = option(
        None, "the same for each layer by itself, with commas, as 4,2,2,1; none = --kv-heads in every layer", metavar="N,N,..."
    )

    __post_init__ = check

    def groups(self, model, layer):
        flag, groups = "--kv-heads", self.kv_heads
        if self.layer_kv_heads is not None:
            flag = "--layer-kv-heads"
            groups = model.by_layer(flag, self.layer_kv_heads)[layer]
        return self.divided(flag, groups)


@dataclass(frozen=True)
class MultiQueryOptions(GroupedOptions):
    """multi-query"""

    kv_heads: int = option(1, "heads of keys and values; they divide the heads of queries", low=1)

    __post_init__ = check


# Beside its 4 widths, the feed-forward network takes the 2 D² (1 - G/H) weights that keys and values leave: 1 - G/H widths.
WIDER = {(heads, groups): dict(ffn_multiple=5 - groups / heads) for heads, groups in ((4, 1), (4, 2), (6, 1), (6, 2))}

MULTI_QUERY = Variant(
    name="multi-query",
    summary="Causal attention whose heads all read the same keys and values",
    paper="Shazeer 2019, arXiv 1911.02150",
    mixer=Attention,
    options=MultiQueryOptions,
    presets={"tiny": WIDER[4, 1], "nanogpt-cpu": WIDER[4, 1], "small": WIDER[6, 1]},
    fused="transformer",
    page=Page(
        formula="y_h = softmax(q_h kᵀ / √K) v in every head h, with the same k and v for all; q, k, v = split(x Wᵀ), "
                "out = merge(y) Wᵀ",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 2 D² + 2 D K weights, and for "
             "the feed-forward network, in the presets 10 D² - 2 D K; O(T² D) for attention, as in the Transformer. Memory: "
             "O(T D). Writing token t: O(D²) for the matrices and O(t D) for attention, which reads 2 t K numbers of memory, "
             "the Transformer 2 t D",
        state="2 t K numbers in each layer: one key and one value of each of the t tokens so far",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention with enable_gqa",
        discrepancies=(
            "the listings of the paper have no factor 1/√K; here there is one, as in the Transformer and in PyTorch",
            "the paper's translator attends within the encoder, within the decoder and from the decoder to the encoder, and "
            "the heads share keys and values in all three; a language model has the second alone",
            "the paper widens the feed-forward network to keep the number of weights; so do the presets, with --ffn-multiple",
        ),
        review="it says that shared keys and values make the cache smaller, which is right: it is H times as small",
    ),
)

GROUPED_QUERY = Variant(
    name="grouped-query",
    summary="Causal attention in which groups of heads share keys and values",
    paper="Ainslie et al. 2023, arXiv 2305.13245",
    mixer=Attention,
    options=GroupedOptions,
    presets={"tiny": WIDER[4, 2], "nanogpt-cpu": WIDER[4, 2], "small": WIDER[6, 2]},
    fused="transformer",
    page=Page(
        formula="y_h = softmax(q_h k_gᵀ / √K) v_g in every head h, with g = ⌊h G / H⌋; q, k, v = split(x Wᵀ), "
                "out = merge(y) Wᵀ",
        cost="training, for each layer and sequence: O(T D²) for the projections, which have 2 D² + 2 D G K weights, and for "
             "the feed-forward network, in the presets 10 D² - 2 D G K; O(T² D) for attention, as in the Transformer. Memory: "
             "O(T D). Writing token t: O(D²) for the matrices and O(t D) for attention, which reads 2 t G K numbers of "
             "memory, the Transformer 2 t D",
        state="2 t G K numbers in each layer: G keys and G values of each of the t tokens so far",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention with enable_gqa",
        discrepancies=(
            "heads that share keys follow each other, as in the paper and in PyTorch; x-transformers lets head h read h mod G, "
            "so its weights need another order of heads",
            "the paper groups heads in the decoder and not in the encoder; a language model is a decoder",
            "the paper converts trained models and leaves their feed-forward network as it is; the presets train from the "
            "start, with a wider network, as 1911.02150 does",
        ),
        review="it does not name it",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
def repeated(arrays: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Weights of a model in which every head has keys and values of its own: those of its group."""
    arrays = dict(arrays)
    for name, array in arrays.items():
        if ".qkv." in name:
            width = arrays[name.rpartition("qkv")[0] + "out.weight"].shape[0]
            queries, others = array[:width], array[width:]
            others = others.reshape(2, -1, width // heads, *array.shape[1:])  # [k or v, G, K, ..]
            shared = others.repeat(heads // others.shape[1], axis=1).reshape(2 * width, *array.shape[1:])
            arrays[name] = np.concatenate([queries, shared])
    return arrays


SAME = dict(ffn_multiple=4.0)  # a feed-forward network of the same width on both sides


@MULTI_QUERY.special_case("transformer", "all heads have the same keys and values")
def _(case, draw):
    one, other = case.model(**SAME), case.of("transformer", **SAME)
    other.load(repeated(one.state(), one.blocks[0].mixer.heads))
    case.same(one, other, draw)


@GROUPED_QUERY.becomes("multi-query", "all heads are one group")
def _(case, draw):
    one, other = case.model(kv_heads=1, **SAME), case.of("multi-query", **SAME)
    other.load(one.state())
    case.same(one, other, draw)


@GROUPED_QUERY.becomes("transformer", "every head has keys and values of its own")
def _(case, draw):
    other = case.of("transformer", **SAME)
    one = case.model(kv_heads=other.blocks[0].mixer.heads, **SAME)
    other.load(one.state())
    case.same(one, other, draw)
