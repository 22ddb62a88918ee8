"""Multi-query attention: all heads of a layer read the same keys and values (Shazeer 2019, arXiv 1911.02150).

The variant ``multi-query`` has one head of keys and values. ``grouped-query`` (Ainslie et al. 2023, arXiv 2305.13245) has G of
them, each of which serves a group of H/G heads of queries. With G = H it is the Transformer, with G = 1 multi-query attention.

The problem. A Transformer that generates keeps the keys and values of all past tokens, and reads them all for each new token.
With H heads of K channels these are 2 T H K = 2 T D numbers in each layer. The arithmetic with them is small: each number is
multiplied once. So a long context is not slow because of arithmetic, but because memory has to deliver the cache again and
again.

The idea. The heads keep their own queries, and share keys and values. The cache becomes H/G times as small, and each key that
comes from memory is used H/G times: by all queries of its group.

- Why share keys and values, and not queries: only keys and values are kept. A query is used once, for its own token.
- Why heads still differ: each asks with its own query, so each has its own weights over the same keys. What a head can no
  longer choose is what it looks at: all heads of a group see the same K channels of a token.
- Why groups: one head of keys and values loses some quality, and large models trained with it were less stable (2305.13245,
  appendix A). A few groups keep nearly all of the quality and nearly all of the speed.
- Why the feed-forward network is wider here: a layer with G heads of keys and values has 2 D² (1 - G/H) weights fewer. The
  paper gives them to the feed-forward network, so that models of equal size are compared. The presets do so with
  --ffn-multiple.
- Why training is no faster: it reads all keys of a sequence for all its queries at once, so that memory was never the limit.
  The paper measures 13.2 and 13.0 microseconds for a token.

    ours                                                     the papers'
    B T D H K           batch, tokens, width, heads, D / H   b, n, d, h, k = v
    G                   heads of keys and values             1 in 1911.02150, G in 2305.13245
    Wqkv [(H+2G)K D]    queries, then keys, then values      P_q, P_k, P_v
    Wo [D D]            weights of the output                P_o
    q_i [H K]           queries of token i                   q
    k_j v_j [G K]       keys and values of token j           K, V

The layer, for head h = 0 .. H - 1 of queries, which reads head g = ⌊h G / H⌋ of keys and values:

    q, k, v = split(x Wqkvᵀ + b)                             1911.02150, section 3: no letter h in P_k and P_v
    y_h = softmax(q_h k_gᵀ / √K) v_g                         2305.13245, section 2.2: one head of k and v for each group
    out = merge(y) Woᵀ + b

The gradients of k_g and v_g are the sums of what the heads of the group would give alone. minitv/ops/attention/__init__.py has
them with all others.

From a model with all heads to fewer. A trained Transformer need not be trained again: `minitv convert DIR --kv-heads G` makes
one head of keys and values of each group (2305.13245, section 2.1). By default it is the mean of the heads of the group, which
the paper finds better than the first of them, and that better than a new random one. Then it is trained a little more, in the
paper for 5 % of the steps: `minitv train --init-from`. The mean of heads commutes with rope, which turns all of them alike.

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

from ..config import check, option
from ..errors import UserError
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
        if self.heads % groups:
            divisors = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise UserError(f"{flag}: {groups} heads of keys and values do not divide {self.heads} heads, allowed: {divisors}")
        return groups


@dataclass(frozen=True)
class MultiQueryOptions(GroupedOptions):
    """multi-query"""

    kv_heads: int = option(1, "heads of keys and values; they divide the heads of queries", low=1)

    __post_init__ = check


# The feed-forward network takes the 2 D² (1 - G/H) weights that keys and values leave, with the heads of each preset.
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
             "the feed-forward network; O(T² D) for attention, as in the Transformer. Memory: O(T D). Writing token t: O(D²) "
             "for the matrices and O(t D) for attention, which reads 2 t K numbers of memory, the Transformer 2 t D",
        state="2 t K numbers in each layer: one key and one value of all t tokens so far",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention with enable_gqa",
        discrepancies=(
            "the listings of the paper have no factor 1/√K; here, as in all later models, there is one",
            "the paper shares keys and values between decoder and encoder as well; a language model has no encoder",
            "the paper widens the feed-forward network to keep the number of weights; so do the presets, with --ffn-multiple",
        ),
        review="it says that shared keys and values make the cache smaller, which is right",
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
             "the feed-forward network; O(T² D) for attention, as in the Transformer. Memory: O(T D). Writing token t: O(D²) "
             "for the matrices and O(t D) for attention, which reads 2 t G K numbers of memory, the Transformer 2 t D",
        state="2 t G K numbers in each layer: G keys and values of all t tokens so far",
        operators=("attention",),
        golden="PyTorch's scaled_dot_product_attention with enable_gqa",
        discrepancies=(
            "heads that share keys follow each other, as in the paper and in PyTorch; x-transformers lets head h read h mod G, "
            "so its weights need another order of heads",
            "the paper groups the attention of the decoder alone; a language model has no other",
        ),
        review="it does not name it",
    ),
)
