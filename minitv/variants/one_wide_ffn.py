"""One Wide FFN: one feed-forward network for a whole translation model (Pires et al. 2023, arXiv 2309.01826).

This page has two variants. ``encoder-decoder`` is the Transformer of 2017 (Vaswani et al., arXiv 1706.03762), with which the
paper compares its own. ``one-wide-ffn`` is the same model with fewer feed-forward networks. minitv/variants/transformer.py
tells what queries, keys, heads and norms are for.

The problem of 2017. Some tasks turn one sequence into another: a translator turns a sentence into a sentence, a program answers
31415 with 51413. The first sequence is called the source, the second one the target. A model with a causal mask, such as
``transformer``, can read the source and continue with the target. But then each token of the source sees only those before it,
although all of them are known.

The encoder-decoder. The model has two halves. The encoder reads the source, all of it at once and without a causal mask, and
gives a vector for each of its tokens: the memory. The decoder writes the target, one token after the other.

- Why cross-attention: the decoder must see the source. In each of its layers, the tokens of the target ask (queries), and the
  memory answers (keys and values). The memory does not change while the target is written, so its keys and values are computed
  once.
- Why a causal mask in the decoder alone: a token of the target may see the whole source and the target before it. It must not
  see what it is to guess.
- Why training needs no writing: the right target is known. The decoder reads the end sign and then the target, and is asked at
  every place for the token that comes next. So one pass trains a guess of every token, the end sign among them. The loss is the
  mean of -ln p of the right tokens. This is called teacher forcing. When the model writes, it reads its own tokens instead.
- Why padding changes nothing: the pairs of a batch have different lengths, and shorter rows are filled up. A mask hides filled
  places of the source from the encoder and from cross-attention. Those of the target stand behind its end, where the causal
  mask hides them, and nothing is asked there.

The problem of 2023. Each layer of both halves has a feed-forward network (FFN), which computes with every token on its own. In
the Transformer Big, with 6 + 6 layers, the twelve FFNs hold 100.7 of 228 million weights. Are all of them needed?

One Wide FFN. All layers of the encoder call the same FFN, and the layers of the decoder have none. That saves eleven of twelve
FFNs, and costs 0.3 of 35.6 BLEU (a measure of translations, more is better). Then the one FFN gets all the weights that were
saved: with 12 times the hidden size the model is as large as before. Now it is better than before (36.5 BLEU), and it writes
faster: 137.5 tokens a second instead of 110.8, of one sentence at a time with a beam of 5 (Table 4).

- Why layers can share: each layer adds a correction to x, so neighbouring layers read similar vectors, and their FFNs find
  overlapping patterns (section 2.1). What they do differently is left to attention, and to the norm before the FFN. Each layer
  has these for itself. One self-attention for all layers of the decoder, in contrast, would cost 9 BLEU (Table 8).
- Why the decoder can do without: its tokens read the memory, on which the encoder's FFN has worked already. A decoder without
  FFNs loses 0.4 BLEU, an encoder without FFNs loses 0.9.
- Why wide: two networks of hidden size f, added up, are one network of hidden size 2 f. So one wide FFN can do what several do
  together, and every layer has all of it.
- Why it writes faster: the encoder runs once. The decoder runs once for every token of the target, and each time the processor
  must read all of its weights and start all of its operations. An FFN less in the decoder saves this for every token. The wide
  FFN of the encoder sees all tokens of the source in one product.
- Why the norms are not shared: each layer chooses with its norm which channels the FFN sees how strongly. A model that shares
  norms and attention too is ALBERT (Lan et al. 2019, arXiv 1909.11942), another model.
- Why W₂ starts smaller: an output of the FFN is a sum over its hidden size. With 12 times as many terms of the same size, its
  variance would be 12 times as large. So the deviation of the first W₂ is divided by √12.

What it costs. The weights are as many as before, the work is not. Let each side have one token, and count a multiplication and
an addition for each weight that is used. Attention in all layers has 72 D² weights. Twelve FFNs have 96 D², which makes 336 D²
operations. One FFN with as many weights runs six times, which makes 2 (72 + 6 · 96) D² = 1296 D², 3.9 times as many. A training
step pays for this, and so does reading the source. A training step also keeps 6 · 12 f hidden values of the wide FFN for such a
pair, where the twelve FFNs have 12 f. Only writing gains, and only while reading is a small part of it. The paper's
model writes 24 % faster with one sentence at a time, 1 % faster with 16, and 22 % slower with 512 (Table 10). A model that has
a decoder alone, such as a language model, becomes slower: 69.3 tokens a second instead of 79.8 (Table 6).

What is lost. A layer of the decoder without an FFN only mixes tokens by weighted means. It computes nothing with a token alone,
except for its norms and matrices. How much accuracy this costs depends on the task. benchmarks/one_wide.py measures it for
strings that are reversed or sorted, and for sums.

    ours                                                       the paper's
    B S T D             batch, source, target, width           -, -, -, d_model
    H, K = D / H        heads, and channels of each            16 heads in its Transformer Big
    L, L'               layers of encoder and decoder          N_enc, N_dec
    f, f'               hidden size of a usual and a wide FFN  d_ff, d_ff'
    x [B S D]           in the encoder                         -
    m [B S D]           memory: what the encoder gives         -
    y [B T D]           in the decoder                         -
    W [outputs inputs]  a matrix of weights, used as x Wᵀ      W [inputs outputs], used as x W

The layers of One Wide FFN. In ``encoder-decoder`` each layer has an FFN and a norm before it, in the decoder behind cross:

    FFN(x) = max(0, x W₁ᵀ + b₁) W₂ᵀ + b₂                       equation (1); W₁ [f' D], W₂ [D f'], one for all that share it
    encoder, layer i:  x ← x + selfᵢ(normᵢ(x))                 attention among the tokens of the source
                       x ← x + FFN(norm'ᵢ(x))                  FFN has no index, its norm has
    memory:            m = norm(x)                             after the last layer
    decoder, layer i:  y ← y + selfᵢ(normᵢ(y))                 attention to the target so far
                       y ← y + crossᵢ(norm'ᵢ(y), m)            and no FFN, nor a norm for it
    cross(y, m) = merge(softmax(q kᵀ / √K) v) Woᵀ              q = y Wqᵀ of the target, k and v = m Wkᵀ, m Wvᵀ of the memory
    logits = norm(y) Eᵀ                                        E is the embedding of source and target

merge puts the heads side by side. The biases b₁ and b₂, and those of all other matrices, exist with --bias. In
minitv/models/encdec.py, Reader is a layer of the encoder, Writer a layer of the decoder, CrossAttention is cross, and Network
is FFN. ``plan`` below says which layers have which network. The gradients of softmax are in minitv/ops/attention/__init__.py.

--share and --drop say which layers share, and which have no FFN. These are the names of the paper and its results for English
to German (Tables 2 to 4: BLEU, and millions of weights):

    --share none --drop none                     Transformer Big      35.6   228
    --share encoder --drop none --widen 1        SharedEnc            35.4   186
    --share decoder --drop none --widen 1        SharedDec            35.3   186
    --share each --drop none --widen 1           SharedEncSharedDec   34.7   144
    --share all --drop none --widen 1            SharedEncDec         34.5   136
    --share none --drop encoder --widen 1        NoEnc                34.7   178
    --share none --drop decoder --widen 1        NoDec                35.2   178
    --share none --drop both                     NoEncNoDec           33.5   127
    --share decoder --drop encoder --widen 1     NoEncSharedDec       33.9   136
    --share encoder --drop decoder --widen 1     SharedEncNoDec       35.3   136
    --share encoder --drop decoder               One Wide FFN         36.5   228

Without --widen, the networks that stay get all weights of those that went. Let N layers have an FFN in the usual model. If I of
them keep one of their own and W networks are shared, then f' = f (N - I) / W. One Wide FFN has I = 0 and W = 1. Where nothing
is shared, W counts all networks that stay, and I = 0. The millions of weights follow from the shapes: a self-attention has
4 D², a cross-attention 4 D², an FFN 2 D f. What then remains of 228 million is the embedding, 51.8 million.

    >>> D, f, L, attention = 1024, 4096, 6, 6 * 4 * 1024**2 + 6 * 8 * 1024**2
    >>> for name, hidden in [("Big", 2 * L * f), ("SharedEnc", f + L * f), ("NoDec", L * f), ("SharedEncDec", f),
    ...                      ("NoEncNoDec", 0), ("SharedEncNoDec, f' = 24576", 24576), ("One Wide FFN, f' = 49152", 12 * f)]:
    ...     print(f"{(attention + 2 * D * hidden + 51.8e6) / 1e6:.0f} million: {name}")
    228 million: Big
    186 million: SharedEnc
    178 million: NoDec
    136 million: SharedEncDec
    127 million: NoEncNoDec
    178 million: SharedEncNoDec, f' = 24576
    228 million: One Wide FFN, f' = 49152

How to choose. The defaults are One Wide FFN. In the paper's model, half of its hidden size, --widen 6, has 35.7 BLEU, and twice
of it, --widen 24, has 36.4, which is no more than with the default of 12 (Table 4). --share-every 3 and 2 give the encoder 2
and 3 networks, each for neighbouring layers; beside a usual decoder they are no better than one (Table 7). With few pairs, 610
thousand, One Wide FFN is as good as the usual model, and not better (Table 6). Fewer layers in the decoder make a model faster
too: --layers 12 --decoder-layers 2 has 35.5 BLEU without any sharing, and writes 230.1 tokens a second. Few FFNs are left there
to be dropped, so that One Wide FFN with these layers writes 1.5 % faster, with 35.7 BLEU (Table 6).

Two layers with one network, in numbers. Let D = f = 1, w₁ = 1 and w₂ = 0.5, without biases, norms and attention. A layer is
x ← x + w₂ max(0, w₁ x), and x = 2 at first:

    >>> from autograd import Tensor, relu
    >>> w1, w2 = Tensor([1.0], requires_grad=True), Tensor([0.5], requires_grad=True)
    >>> one = 2 + w2 * relu(w1 * 2)
    >>> two = one + w2 * relu(w1 * one)
    >>> print(one.item(), two.item())
    3.0 4.5

The output is 2 (1 + w₁ w₂)². A weight that two layers use gets two gradients, and its gradient is their sum. The last layer
gives w₁ · 3 = 3. The first one gives w₁ · 2 = 2, and the last layer makes (1 + w₁ w₂) = 1.5 times as much of it, which is 3.

    >>> two.sum().backward()
    >>> print(w2.grad.item())
    6.0

So the gradient of an FFN that L layers share is about L times as large as that of a usual one. Adam divides by the size of the
gradients, so this does no harm; plain gradient descent would need a smaller step. The FFN is one parameter in everything else
too: the optimiser, the norm for clipping, weight decay and the checkpoint know it once. Two more gradients are sums. That of m
has a part from the keys and values of every layer of the decoder, and it is all that the encoder learns from. That of E has
three parts, as the embedding of the source, as that of the target, and as the head.

How it writes. The source is read once, and gives the keys and values of the memory in every layer of the decoder. Then each
token of the target adds its own keys and values to every layer, looks at those so far, and at those of the memory. All these
keys and values are the state: 2 (S + t) D numbers in a layer. In the preset tiny, D = 96 and L' = 2, so 10 tokens of a source
and 7 of a target make 2 (10 + 7) 96 · 2 = 6528 numbers, which take 26 kB with 4 bytes each. S counts the end sign behind the
source, and t the one with which the target begins. ``minitv sample DIR --prompt 31415`` takes the likeliest token at every
step, or draws with --temperature. A beam (--beam 4) follows the 4 likeliest beginnings at once, because the likeliest first
token need not begin the likeliest target. The sum of log-probabilities falls with every token, so short targets would win; it
is divided by the length (--length-penalty).

    minitv train one-wide-ffn                                  reverses strings of digits; --rule sort, add or all
    minitv train one-wide-ffn --data pairs.tsv                 a source, a tab and its target in each line
    minitv compare encoder-decoder one-wide-ffn --task pairs   both, with accuracy, weights, state and speed of writing
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check, option
from ..errors import UserError
from ..models.encdec import EncoderDecoder, Plan
from ..options import ModelOptions
from ..variant import Page, Variant
from .transformer import Attention, Bidirectional, TransformerOptions

SIDES = ("encoder", "decoder")
SHARING = {"none": (), "encoder": ("encoder",), "decoder": ("decoder",), "each": SIDES, "all": SIDES}
DROPPING = {"none": (), "encoder": ("encoder",), "decoder": ("decoder",), "both": SIDES}


@dataclass(frozen=True)
class EncoderDecoderOptions(TransformerOptions):
    """encoder-decoder"""

    decoder_layers: int | None = option(
        None, "number of blocks of the decoder; none = --layers, as many as the encoder has", low=1, high=10_000)

    def plan(self, model: ModelOptions) -> Plan:
        """The layers: each has a feed-forward network of its own."""
        return self._plan([*range(model.layers)], [model.layers + i for i in range(self._writers(model))], lambda n: 1.0)

    def _writers(self, model: ModelOptions) -> int:
        return self.decoder_layers or model.layers

    @staticmethod
    def _plan(encoder: list, decoder: list, factor) -> Plan:
        """The layers by names of their networks, which ``factor`` gives their sizes."""
        names = list(dict.fromkeys(name for name in [*encoder, *decoder] if name is not None))
        numbers = ([None if name is None else names.index(name) for name in side] for side in (encoder, decoder))
        return Plan(Bidirectional, Attention, *numbers, [factor(name) for name in names])


@dataclass(frozen=True)
class OneWideOptions(EncoderDecoderOptions):
    """one-wide-ffn"""

    share: str = option(
        "encoder", "layers that have a feed-forward network in common: none, those of the encoder, those of the decoder, those "
        "of each side, or all layers of both sides", choices=tuple(SHARING),
    )
    drop: str = option("decoder", "sides whose layers have no feed-forward network", choices=tuple(DROPPING))
    share_every: int | None = option(None, "neighbouring layers that have a network in common; none = all of a side", low=1,
                                     high=10_000)
    widen: float | None = option(
        None, "hidden size of the networks that are shared, or where none is, of all that stay, in --ffn-multiple widths; none "
        "= so many that the model has as many weights as with a network in every layer", above=0, high=1024,
    )

    def __post_init__(self) -> None:
        check(self)
        shared, dropped = SHARING[self.share], DROPPING[self.drop]
        if gone := [side for side in shared if side in dropped]:
            raise UserError(f"--share {self.share}: the layers of the {gone[0]} have no feed-forward network with --drop "
                            f"{self.drop}, so that there is nothing to share")
        if self.share_every is not None and not shared:
            raise UserError(f"--share-every {self.share_every}: with --share none no layers have a network in common")
        if self.widen is not None and len(dropped) == 2:
            raise UserError(f"--widen {self.widen:g}: with --drop both there is no feed-forward network")

    def plan(self, model: ModelOptions) -> Plan:
        """The layers: networks are named by what shares them."""
        shared, dropped = SHARING[self.share], DROPPING[self.drop]

        def name(side: str, layer: int):
            if side in dropped:
                return None
            if side not in shared:
                return side, layer
            return "shared", "" if self.share == "all" else side, layer // (self.share_every or 10_000)

        encoder, decoder = ([name(side, i) for i in range(layers)]
                            for side, layers in zip(SIDES, (model.layers, self._writers(model)), strict=True))
        names = {name for name in [*encoder, *decoder] if name is not None}
        wide = {name for name in names if name[0] == "shared"} or names
        matched = (len(encoder) + len(decoder) - len(names - wide)) / max(len(wide), 1)
        factor = matched if self.widen is None else self.widen
        return self._plan(encoder, decoder, lambda name: factor if name in wide else 1.0)


# A layer of ``transformer`` has 12 D² weights. With d = 3/4 D, so have a layer of the encoder and one of the decoder together:
# 12 d² in attention and 28/3 d² in two feed-forward networks, (12 + 28/3) · (3/4)² = 12. So the presets have equal sizes.
SIZES = {preset: dict(width=width, ffn_multiple=7 / 3) for preset, width in (("tiny", 96), ("nanogpt-cpu", 96), ("small", 288))}
PAPER = dict(activation="relu", positions="sinusoidal")
WITHOUT = ("token_shift", "embed_norm", "stack")

ENCODER_DECODER = Variant(
    name="encoder-decoder",
    summary="The Transformer of 2017: an encoder reads a source, a decoder writes a target",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    mixer=Attention,
    options=EncoderDecoderOptions,
    model=EncoderDecoder,
    overrides=PAPER,
    presets=SIZES,
    without=WITHOUT,
    page=Page(
        formula="encoder: x ← x + self(norm(x)), x ← x + FFN(norm(x)); decoder: y ← y + self(norm(y)), y ← y + cross(norm(y), "
                "m), y ← y + FFN(norm(y)); m = norm(x) of the last layer, cross(y, m) = softmax(q kᵀ / √K) v with q of y, k "
                "and v of m",
        cost="training, for a pair of a source of S and a target of T tokens: O((S + T) D²) for the matrices, of which a "
             "layer of the encoder has 4 D² + 2 D f weights and one of the decoder 8 D² + 2 D f; O((S² + T² + S T) D) for "
             "attention. Memory: O((S + T) (D + f)) in each layer. Writing: the source is read once; then token t takes "
             "O(D² + D f) for the matrices and O((S + t) D) for attention",
        state="2 (S + t) D numbers in each layer of the decoder: keys and values of the source and of the t tokens written",
        operators=("attention",),
        golden="PyTorch's TransformerEncoderLayer and TransformerDecoderLayer with norm_first, with padding and all gradients",
        discrepancies=(
            "in 2017 a norm follows each sum (section 3.1); here it stands before each layer, and once more at the end of both "
            "sides, as in today's models; the paper on One Wide FFN does not say where its norms stand",
            "in 2017 source and target share one vocabulary and its embedding, which is the head too (section 3.4), and so it "
            "is here; --no-tied gives the head weights of its own",
            "in 2017 the feed-forward network has biases, eq. (2), and attention has none; here --bias switches those of both "
            "on, and those of the norms",
            "the target begins with the sign that also ends sequences, as in fairseq, the program of the second paper; the "
            "first one does not say with what",
            "the paper smooths labels by 0.1 and averages checkpoints; here neither is done",
            "the paper ranks the targets of a beam by their log-probability over ((5 + n)/6)^0.6 for n tokens; here it is over "
            "n^penalty, as in fairseq, and --length-penalty 1 is the default",
        ),
        review="it explains the Transformer by self-attention alone, and does not name cross-attention",
    ),
)

ONE_WIDE_FFN = Variant(
    name="one-wide-ffn",
    summary="An encoder-decoder with one wide feed-forward network for all layers of the encoder, and none in the decoder",
    paper="Pires et al. 2023, arXiv 2309.01826",
    mixer=Attention,
    options=OneWideOptions,
    model=EncoderDecoder,
    overrides=PAPER,
    presets=SIZES,
    without=WITHOUT,
    page=Page(
        formula="encoder: x ← x + self(norm(x)), x ← x + FFN(norm(x)) with one FFN for all layers; decoder: y ← y + "
                "self(norm(y)), y ← y + cross(norm(y), m), and no FFN",
        cost="training, for a pair of a source of S and a target of T tokens: O((S + T) D²) for the matrices of attention, 4 "
             "D² weights in a layer of the encoder and 8 D² in one of the decoder; O(S D f') in every layer of the encoder "
             "for the wide network, which has 2 D f' weights, f' = (L + L') f; O((S² + T² + S T) D) for attention. Memory: "
             "O(S (D + f')) in each layer of the encoder and O((S + T) D) in one of the decoder. Writing: the source is read "
             "once; then token t takes O(D²) for the matrices and O((S + t) D) for attention",
        state="2 (S + t) D numbers in each layer of the decoder: keys and values of the source and of the t tokens written",
        operators=("attention",),
        golden="the same layers of PyTorch, with one pair of Linear in all layers of the encoder and none in the decoder, in "
               "both sides, and in the decoder alone, with all gradients",
        discrepancies=(
            "newer versions of fairseq, the paper's program, draw the first W₁ and W₂ between -1/√n and 1/√n for n inputs, so "
            "that the first output does not grow with the hidden size; older ones have Xavier's rule, by which the first "
            "output of a wide network is small; here it is as large as that of a usual one, as in newer ones",
            "the paper writes max(0, x); --activation has others",
            "the paper trains with dropout 0.1 on 296 million pairs, and the learning rate rises to 0.0007 in 4000 steps and "
            "falls with the inverse square root of the steps; here it falls as a cosine, the task draws new pairs at every "
            "step, and the default is no dropout",
            "equal weights are not equal work: the shared network runs in every layer of the encoder at its full size, which "
            "the paper's tables do not count; a run prints what it executes",
        ),
        review="it says 18.5 % faster, a number that the paper does not have: with one sentence at a time, Transformer Big "
               "writes 24 % faster, Base 26 %, the multilingual model 18 %, and a model that has a decoder alone is slower by "
               "13 %",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
@ONE_WIDE_FFN.becomes("encoder-decoder", "no layer shares its network or has none")
def _(case, draw):
    one, other = case.model(share="none", drop="none"), case.of("encoder-decoder")
    other.load(one.state())
    case.same(one, other, draw)


@ONE_WIDE_FFN.special_case("encoder-decoder", "all layers have the same network")
def _(case, draw):
    one, other = case.model(share="all", drop="none", widen=1.0), case.of("encoder-decoder")
    weights, shared = one.state(), {}
    for name in other.state():
        inside = name.split(".", 2)[-1]
        shared[name] = weights[f"encoder.0.{inside}" if inside.startswith("ffn.") else name]
    other.load(shared)
    case.same(one, other, draw)
