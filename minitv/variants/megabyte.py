"""MEGABYTE: a large model reads patches of bytes, a small one writes the bytes of each (Yu et al. 2023, arXiv 2305.07185).

The problem. A text is five times as long in bytes as in words, a picture or a minute of sound has a million bytes. A
Transformer over bytes pays for that twice: every byte meets all bytes before it, so attention grows with T², and every byte
passes through all large feed-forward networks, although most bytes are easy to predict. And it writes one byte after the other
through all layers. Word pieces shorten a text, but another program must make them first, and pictures and sound have none.

The idea. Cut the text into patches of P bytes. A large global model has one position for each patch. There it reads the patch
before: the embeddings of its P bytes, side by side. Its output at this position serves to predict the patch of the position. A
small local model predicts the bytes of the patch one after the other. It sees the global output for the patch, the bytes of the
same patch so far, and nothing else. Numbers in brackets name the paper's equations.

- Why side by side and not the sum: a sum would not tell which byte stood where. P bytes with D/P channels each fill one vector
  of D channels, and the global model gives D channels back, D/P of them to each byte.
- Why a local model: bytes that the global model predicted all at once would not know of each other. If the next word is cat or
  dog, it would also write cag and dot. To predict the patch as a whole, it would need a probability for each of 256^P patches,
  which are too many (section 2.4). Without a local model the paper has 1.263 bits per byte of scientific articles in place of
  0.687 (Table 10).
- Why a global model: without it, a byte sees its own patch alone. Then the same articles take 1.373 bits per byte.
- Why two shifts: patch k must not be read before it is written, so the global model reads patch k - 1 at position k. A byte
  must not be read before it is predicted, so the local model reads the byte before. At the first place of a patch, the local
  model does not read the byte before, which is in another patch. The global model has read it. So both shifts together show
  exactly the past.
- Why pads: at the first place of a patch there is no byte before in the patch, and at the first patch no patch before. A
  learned vector stands there instead.
- Why that is cheap: attention costs T²/P² among patches and T P inside them, and T^(4/3) in all with P = T^(1/3) (section 3.1).
  And a global block works once for P bytes, so it may have P times as many weights at the same cost. With equal computation the
  paper has 1.000 bits per byte of old books (PG-19), and a Transformer with a shorter context has 1.057 (Table 7).

What is lost. The global model gives its part before the first byte of the patch is known, so the large model never reacts to
bytes of the running patch. Predictions become worse towards the end of a patch (section 2.3.3). And where a word begins in its
patch is an accident: the same word looks different to the global model at each of P places (section 2.3.1).

    ours                                                        the paper's
    B T V              batch, tokens that are read, vocabulary  -, T, V
    P                  tokens in a patch, --patch               P
    K = T / P          patches, rounded up                      K
    D                  width of the global model, --width       P · D_G
    D / P              channels of a token in it                D_G
    d                  width of the local model, --local-widths D_L
    L_g L_l            global and local blocks; --layers is     -
                       their sum, --local-layers is L_l
    x_t                token t; x_0 is given, not predicted     x_{t-1}
    E₀ [V D/P]         embedding of the global model            E^global-embed
    positions [C D/P]  learned positions in a context of C      E^pos
    pads [P-1 D/P]     what stands before the text              E^global-pad [P D_G], without its last vector
    E₁ [V d]           embedding of the local model, and head   E^local-embed
    pad [d]            first input of every patch               E^local-pad
    W [d D/P]          from the global to the local model       w^GL

The paper predicts all its bytes, the first one from pads alone. Here, as everywhere in this library, a text begins with a token
that is given. It takes the last place of the pads before the text. Nothing else differs, and logits t belong to token t + 1.

    h_t = E₀[x_t] + positions[t]                                                   (1) [D/P]
    in_0 = pads, h_0 side by side;   in_k = h_{(k-1)P+1}, .. h_{kP} side by side   (2) [D]
    out_0, .. out_{K-1} = norm(global blocks(in_0, .. in_{K-1}))                   (3) [K D], causal
    in_{k,0} = W out_k[part 0] + pad,   in_{k,p} = W out_k[part p] + E₁[x_{kP+p}]  (4) [d], part p of P equal ones
    out_{k,0}, .. out_{k,P-1} = norm(local blocks(in_{k,0}, .. in_{k,P-1}))        (5) [P d], causal, each patch alone
    P(token t + 1 is v) = softmax(E₁ out_{k,p})_v,   t = kP + p                    (6) with --tied

The blocks are the Transformer's, x + layer(norm(x)), with causal attention (minitv/variants/transformer.py). Learned positions
inside a patch are added in (4) as well. The loss is the Transformer's, the mean of -ln P(token t + 1) over all t.
minitv/models/megabyte.py computes all of it: ``entered`` is (1), (2) and (4), ``read`` (3) and (5), ``carried`` the product
with W, and ``logits`` of minitv/models/encoder.py is (6).

Gradients. Attention, norms and matrices have those of the Transformer, only the shifts are new. The gradient of in_k is cut
into P parts, which go to the embeddings of the tokens (k - 1) P + 1 to k P. Those of in_0 go to token 0 and to the pads, summed
over the batch. The gradient of in_{k,0} goes to the pad of the local model, summed over the batch and all patches. That of
out_k consists of Wᵀ times the gradients of in_{k,0} to in_{k,P-1}, side by side. E₁ has two gradients with --tied, as the
embedding of (4) and as the matrix of (6).

Four tokens in patches of 2. To see the shifts alone, a token t of this example is embedded as the number x_t, the pads are 9
and 7, W is 10, and in place of blocks there are sums over the past.

    >>> import numpy as np
    >>> x, P = np.array([3, 5, 4, 1]), 2
    >>> entered = np.append(9, x[:3]).reshape(-1, P)  # (2): patch 0 reads a pad and token 0, patch 1 tokens 1 and 2
    >>> print(entered)
    [[9 3]
     [5 4]]
    >>> out = np.cumsum(entered, axis=0)  # (3)
    >>> local = 10 * out + np.where(np.arange(P) == 0, 7, x.reshape(-1, P))  # (4)
    >>> print(local)
    [[ 97  35]
     [147  71]]
    >>> print(np.cumsum(local, axis=1))  # (5)
    [[ 97 132]
     [147 218]]

Row k, column p stands at token t = 2 k + p. For example, 147 is 10 · (9 + 5) + 7. The global blocks of a model also mix the two
columns of ``entered``, which these sums do not. So in a real model every logit depends on exactly the tokens up to it. Row t of
the next table has a 1 for each token that changes the logits t.

    >>> from minitv import variants
    >>> model = variants.load("megabyte").configure(context=6, width=16, patch="2", heads=2).build(5)
    >>> ids, table = np.array([[3, 1, 4, 1, 0, 2]]), np.zeros((6, 6), int)
    >>> for t in range(6):
    ...     other = ids.copy()
    ...     other[0, t] = (ids[0, t] + 1) % 5
    ...     table[:, t] = np.any(model(other).numpy() != model(ids).numpy(), axis=(0, 2))
    >>> print(table)
    [[1 0 0 0 0 0]
     [1 1 0 0 0 0]
     [1 1 1 0 0 0]
     [1 1 1 1 0 0]
     [1 1 1 1 1 0]
     [1 1 1 1 1 1]]

Writing. When a patch is complete, the global model takes one step: it reads the patch, keeps a key and a value of it in each
layer, and its output waits in P parts. For each token of the next patch the local model takes one step, with a part and the
token before. Its keys and values are dropped when the patch ends. A patch needs L_g + P L_l layers one after the other, where a
Transformer with as many layers needs P (L_g + L_l) (section 3.2).

Tokens here are the characters of the text, or its bytes as in the paper: --tokenizer byte.

How to choose P. Attention is cheapest at P = (2 L_g D T / (L_l d))^(1/3), with L_g global and L_l local blocks: about 5 for
T = 64 and 8 for T = 256, where everything else is equal. The paper takes 8 for text, 12 to 192 for pictures and 32 for sound,
and finds hardly any difference between 48 and 768 for pictures (Table 12). P must divide --width.

How to choose the models. It is best to have most weights in the global model (Table 13): make it wider than the local one
(--local-widths), and give it more layers (--local-layers). In the paper they have 24 layers of width 1536 and 18 of width 1024.
There both learn with Adam, β = 0.9 and 0.98, a weight decay of 0.1, gradients clipped at 1, a dropout of 0.1, and a learning
rate that rises for 500 steps and then falls to 0 (appendix A.1).

Pictures and sound: ``minitv train megabyte --task images`` and ``--task audio``. A picture is a sequence of pixels behind a
sign that begins it. The sign takes the last place of the first pads, so a patch holds whole rows of pixels, or whole squares
with --scan patch, and never parts of two. Without other options --patch is 8 for pictures, a row of the smallest ones, and 16
for sound, 2 milliseconds. The paper has squares of 2 by 2 pixels, each of three bytes, for pictures of 64 by 64, and squares of
8 by 8 for larger ones (Table 5).

Options beyond the graph above:

- ``--start previous`` reads x_{kP} at the first place of patch k in place of the pad. Equation (4), as it is printed, says so
  for all p; the text of the paper says pad. With short patches of text a small model learns more with it: with P = 4 a quarter
  of all tokens is otherwise predicted by a local model that does not read the token before.
- ``--pads first-id`` and ``--no-carry-projection`` make the program in the paper's appendix B: pads are the embedding of token
  0, and there is no W, so d = D/P.
- ``--patch 4,2`` has three levels: a global model over patches of 8, a middle one over the 4 units of 2 tokens in each patch,
  and a local one over the 2 tokens of a unit. Every level reads the unit before, adds what it got from the level above and
  gives parts of its output to the level below. m levels with the best sizes cost T^(1 + 1/(2^m - 1)) for attention. The paper
  has two; MEGABYTE-pytorch has any number.
- ``--reach r`` is cross-patch attention (section 2.3.2): a local layer also sees the keys and values of the last r positions of
  the patch before, and gradients flow there. It needs positions of which only differences count, such as --positions rope. In
  the paper it helps for pictures and not for text (Table 10).
- ``--strided`` is strided inference (section 2.3.3), for evaluation and writing alone. A second pass begins half a patch later,
  and each logit is taken from the pass in which it stands in the first half of its patch. That costs twice the time, and the
  second pass does not see the first P/2 tokens. On PG-19 it lowers 0.9079 bits per byte to 0.8926 (Table 11). Figures with and
  without it must not be compared. ``minitv eval RUN --strided`` does it with a model that was trained without the option.

The last patch of a text need not be full: it is filled up, and the logits beyond the end are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autograd import Tensor, assert_close, concat, pad, reshape, transpose
from autograd.device import beside
from autograd.random import Random

from ..config import check, option
from ..errors import UserError
from ..models.megabyte import Megabyte, Size, odd
from ..ops import merge_heads
from ..options import ModelOptions
from ..variant import Page, Variant
from . import transformer


@dataclass(frozen=True)
class MegabyteOptions(transformer.TransformerOptions):
    """megabyte"""

    heads: int = option(4, "attention heads of every level; they divide its width", low=1)
    patch: str = option("4", "tokens in a patch; several numbers separated by commas make more levels, so that 4,2 is a patch "
                        "of 4 units with 2 tokens each")
    local_widths: str | None = option(
        None, "widths of the levels inside a patch, separated by commas, the outer ones first; none = --width in each"
    )
    local_layers: str | None = option(
        None, "how many of the --layers are in each level inside a patch, separated by commas, the outer ones first; none = "
              "the same number in every level, and what is left in the outermost"
    )
    start: str = option("pad", "what the first position of a patch reads: a pad, as published, or the token before",
                        choices=("pad", "previous"))
    pads: str = option("learned", "vectors in place of tokens where there are none: learned ones, or the embedding of token 0 "
                       "as in the paper's appendix", choices=("learned", "first-id"))
    carry_projection: bool = option(True, "what a level gives to the next one is multiplied by a matrix; without it the widths "
                                    "must fit, as in the paper's appendix")
    reach: int = option(0, "positions of the patch before that a layer inside a patch sees as well (cross-patch attention)",
                        low=0)
    strided: bool = option(False, "evaluation and writing take two passes, whose patches are half a patch apart, and each "
                                  "logit from the pass in which it stands in the first half")

    __post_init__ = check

    def levels(self, model: ModelOptions) -> list[Size]:
        """The levels, the outermost first; UserError where their numbers do not fit each other."""
        groups = _numbers("--patch", self.patch, low=1)
        inner = len(groups)
        width = [model.width, *([model.width] * inner if self.local_widths is None else
                                _numbers("--local-widths", self.local_widths, low=1, count=inner))]
        share = model.layers // (inner + 1)
        layers = ([share] * inner if self.local_layers is None else
                  _numbers("--local-layers", self.local_layers, low=0, count=inner))
        if sum(layers) > model.layers:
            raise UserError(f"--local-layers {self.local_layers}: these are {sum(layers)} layers, and --layers is "
                            f"{model.layers}, allowed: as many at most")
        units = [int(np.prod(groups[i:], dtype=object)) for i in range(inner + 1)]
        if units[0] > 2**20:
            raise UserError(f"--patch {self.patch}: a patch of {units[0]} tokens, allowed: {2**20} at most")
        for i, (d, unit) in enumerate(zip(width, units, strict=True)):
            if d % unit:
                flag = "--local-widths" if i and self.local_widths else "--width"
                raise UserError(f"{flag}: {d} channels are not divided by the {unit} tokens that share them, see --patch, "
                                f"allowed: a multiple of {unit}")
            if i and not self.carry_projection and width[i - 1] // groups[i - 1] != d:
                raise UserError(f"--no-carry-projection: each of {groups[i - 1]} positions gets "
                                f"{width[i - 1] // groups[i - 1]} of {width[i - 1]} channels and has {d}, allowed with "
                                f"--local-widths {','.join(str(model.width // (units[0] // u)) for u in units[1:])}")
        if self.strided and units[0] % 2:
            raise UserError(f"--strided: {odd(units[0])}")
        if self.reach:
            if self.reach > min(groups):
                raise UserError(f"--reach {self.reach}: the patch before has fewer positions, allowed: 0 to {min(groups)}")
            if model.positions in ("learned", "sinusoidal"):
                raise UserError(f"--reach {self.reach}: with --positions {model.positions} a place in the patch before is the "
                                "same as in this one, allowed: --positions rope, alibi, none")
        mixer = AcrossPatches if self.reach else Attention
        return [Size(width[0], model.layers - sum(layers), units[0], 0, Attention, True),
                *(Size(d, n, unit, group, mixer, bool(self.reach))
                  for d, n, unit, group in zip(width[1:], layers, units[1:], groups, strict=True))]


def _numbers(flag: str, text: str, *, low: int, count: int | None = None) -> list[int]:
    """The numbers of a text such as "4,2"; UserError unless there are ``count`` of them, from ``low`` on."""
    words = [word.strip() for word in text.split(",")]
    good = all(word.isascii() and word.isdigit() and len(word) < 8 and int(word) >= low for word in words)
    if not good or (count is not None and len(words) != count):
        number = "integers" if count is None else "1 integer" if count == 1 else f"{count} integers"
        raise UserError(f"{flag}: {text!r}, allowed: {number} from {low}, separated by commas" if count != 1 else
                        f"{flag}: {text!r}, allowed: {number} from {low}")
    return [int(word) for word in words]


class Attention(transformer.Attention):
    """The Transformer's attention, among the positions of one level."""

    sees_all = False


class Cache(NamedTuple):
    """Keys and values [B H S K] of the running patch and of those before it that are still seen, and how many came."""

    keys: Tensor
    values: Tensor
    position: int


class AcrossPatches(Attention):
    """The same among the positions of a patch, which also see the last ``reach`` positions of the patch before.

    x [B T D] has the positions of all patches; the first patch has none before it. ``model.context`` is the length of a patch.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: MegabyteOptions, layer: int = 0, dtype=np.float32):
        super().__init__(rng, model, options, layer, dtype)
        self.patch, self.reach = model.context, options.reach

    def init_state(self, batch: int) -> Cache:
        return Cache(*super().init_state(batch), 0)

    def prefill(self, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        keys, values, start = state
        q, k, v = self._heads(x, start)
        keys, values, stop = concat([keys, k], axis=2), concat([values, v], axis=2), start + x.shape[1]
        base = stop - keys.shape[2]
        seen = np.arange(base, stop) >= (np.arange(start, stop)[:, None] // self.patch) * self.patch - self.reach  # [T S]
        y = super()._attend(q, keys, values, mask=beside(seen, q.data))
        old = max(stop // self.patch * self.patch - self.reach - base, 0)  # nobody sees them any more
        return self.out(merge_heads([y])), Cache(keys[:, :, old:], values[:, :, old:], stop)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **dropping) -> Tensor:
        """Attention of patches [B·G H P K], each to the end of the one before and to itself."""
        batch, heads, length, size = q.shape
        groups = -(-length // self.patch)

        def cut(x: Tensor) -> Tensor:
            if spare := groups * self.patch - length:
                x = pad(x, widths=((0, 0), (0, 0), (0, spare), (0, 0)))
            return reshape(x, (batch, heads, groups, self.patch, size))

        def flat(x: Tensor) -> Tensor:
            return reshape(transpose(x, axes=(0, 2, 1, 3, 4)), (batch * groups, heads, x.shape[3], size))

        def extended(x: Tensor) -> Tensor:
            x = cut(x)
            before = pad(x[:, :, :-1, self.patch - self.reach :], widths=((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
            return flat(concat([before, x], axis=3))  # [B·G H reach+P K]

        seen = np.ones((batch, groups, 1, 1, self.reach + self.patch), bool)
        seen[:, 0, ..., : self.reach] = False
        mask = beside(seen.reshape(batch * groups, 1, 1, -1), q.data)
        y = super()._attend(flat(cut(q)), extended(k), extended(v), mask=mask, **dropping)
        y = transpose(reshape(y, (batch, groups, heads, self.patch, size)), axes=(0, 2, 1, 3, 4))
        return reshape(y, (batch, heads, groups * self.patch, size))[:, :, :length]


MEGABYTE = Variant(
    name="megabyte",
    summary="A large model reads patches of the text, a small one writes the tokens of each patch",
    paper="Yu et al. 2023, arXiv 2305.07185",
    mixer=Attention,
    options=MegabyteOptions,
    model=Megabyte,
    fused="megabyte",
    without=("embed_norm",),
    presets={"small": dict(patch="8", local_layers="2")},
    on_tasks={"images": dict(patch="8"), "audio": dict(patch="16")},  # a row of 8 pixels, 2 ms of sound
    page=Page(
        formula="in_k = the embeddings of the P tokens before patch k, side by side; out = blocks(in) over patches; token p of "
                "patch k gets W out_k[part p] + E x_{kP+p}, a pad in place of E x for p = 0; logits = E blocks(..) over the "
                "tokens of one patch",
        cost="training, for each sequence: O(T D² / P) for a global block, which has 12 D² weights, and O(T d²) for a local "
             "one, which has 12 d²; attention costs O(T² D / P²) in a global block and O(T P d) in a local one. Memory: O(T D "
             "/ P) and O(T d) for each block. Generating a token: O(d²) and O(P d) in a local block; once for P tokens, O(D²) "
             "and O(t D / P) in a global one",
        state="2 D t / P numbers in each global layer, keys and values of all patches so far, and at most 2 P d in each local "
              "layer, those of the running patch; besides, the last P - 1 tokens, and less than P vectors of d numbers from "
              "the global model. With D = d = 128 and P = 4 a global layer has 4,096 numbers after 64 tokens and a local one "
              "1,024 at most, which are 16 and 4 KiB in float32; a layer of the Transformer has 64 KiB",
        operators=("attention", "embedding"),
        golden="the paper's equations (1) to (6), written position by position with PyTorch's attention, norms and loss: whole "
               "models of two and three levels with all gradients, in both kinds of pads",
        discrepancies=(
            "the paper predicts the first byte from pads alone; here the first token of a text is given, and its embedding is "
            "the last vector of the pads before the text",
            "equation (4), as it is printed, adds the embedding of the byte before at every place; the text and Figure 1 have "
            "a pad at the first place of a patch: --start, the default is the pad",
            "in the program of appendix B pads are the embedding of token 0 and w^GL is missing: --pads first-id "
            "--no-carry-projection",
            "section 2.3.2 joins keys and values with the last r 'keys and queries' of the patch before, by which keys and "
            "values are meant: --reach; here it is off by default, because Table 10 is better without it for text",
            "section 2.3.1 has causal convolutions before patches are cut; they gained 0.002 to 0.003 bits and are not here",
            "the paper has relu, and here --activation has gelu, relu_squared and others; it draws weights with the deviation "
            "0.006, cut at two deviations, here they are normal with --init-std; it has no dropout of embeddings, nor has this",
            "both models end with a norm, as models with a norm before each layer do; the paper does not write it down",
            "MEGABYTE-pytorch has another graph: its local model reads a start token and then the P bytes of a patch, and what "
            "the global model says is added to the bytes alone, so that the first byte of patch k + 1 is predicted behind the "
            "last one of patch k, by a global model that knows the patches before k; a matrix follows the embeddings that "
            "stand side by side; and its loss leaves out every byte 0",
        ),
        review="it gives the time O(T^(4/3) d), which is right for attention alone with P = T^(1/3). The paper has O(T²/P² + T "
               "P) in section 3.1, and takes P = 8 where T^(1/3) is 20. All other layers cost O(T). It gives the space O(T log "
               "T d), which is nowhere in the paper: activations take O(T (D / P + d)) for each layer, without a logarithm. It "
               "says that 1.5 billion parameters write 40 % faster than 350 million in a Transformer. That is right for "
               "writing 8192 bytes: Table 9 has 93 s for a global model of 1.3 billion and a local one of 218 million, and "
               "132 s for a Transformer with a context of 1024",
    ),
)


# -- what it is equal to --------------------------------------------------------------------------------------------
def carried_over(model, flat, names: dict[str, str]):
    """The flat model with weights of MEGABYTE; ``names`` are MEGABYTE's names, or beginnings of them, by the flat model's."""
    theirs = model.state()
    flat.load({name: theirs[names.get(name, name)] if name in names or name in theirs else
               next(theirs[names[prefix] + name.removeprefix(prefix)] for prefix in names if name.startswith(prefix))
               for name in flat.state()})
    return flat


@MEGABYTE.becomes("transformer", "a patch is one token, and there is no local model")
def _(case, draw):
    """What the global model gives goes to the head, behind a second norm."""
    model = case.model(patch="1", local_layers="0", carry_projection=False, tied=False)
    outer, inner = model.blocks.levels
    for parameter in (inner.pads, inner.positions):
        parameter.assign_(np.zeros(parameter.shape))
    flat = carried_over(model, case.of("transformer", tied=False), {
        "embed.weight": "blocks.0.embed.weight", "positions": "blocks.0.positions", "blocks.": "blocks.0.stack."})
    ids = case.ids(draw)
    assert_close(model(ids).numpy(), model.logits(outer.norm(flat.hidden(ids))).numpy(), terms=10_000)


@MEGABYTE.becomes("transformer", "one patch holds the text, and there is no global model")
def _(case, draw):
    length, width, layers = (case.sizes[letter] for letter in "TDL")
    model = case.model(patch=str(length), width=2 * length, local_widths=str(width), start="previous",
                       local_layers=str(layers))
    project = model.blocks.levels[0].project
    for parameter in project.parameters():
        parameter.assign_(np.zeros(parameter.shape))
    case.same(model, carried_over(model, case.of("transformer", heads=model.blocks.levels[1].stack[0].mixer.heads),
                                  {"positions": "blocks.1.positions", "blocks.": "blocks.1.stack."}), draw)
