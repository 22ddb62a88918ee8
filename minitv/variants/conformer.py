"""Conformer: attention for what is far and convolution for what is near, for speech (Gulati et al. 2020, arXiv 2005.08100).

The problem. Speech has two kinds of structure. A sound such as a "t" is a pattern of a few hundredths of a second, and it looks
the same wherever it stands. Which word it belongs to, and how fast somebody speaks, shows over seconds. Attention sees far, but
to it all positions are alike at first: that neighbours belong together it must learn from much data. Convolution begins with
neighbours, but to see far it needs many layers. Models of that time were made of one or of the other.

The idea. Each block has both, one after the other: attention with relative positions, then a convolution of its own for each
channel. Around them stand two halves of a feed-forward network. An utterance of T positions goes through

    x̃ = x + ½ ffn(x)                    a half step of a feed-forward network
    x' = x̃ + attention(x̃)              what is far
    x'' = x' + convolution(x')           what is near
    y = norm(x'' + ½ ffn(x''))           the other half, and a norm at the end            (1) of the paper

where every module normalises its input first. In front of the blocks, two convolutions take four frames of the spectrogram to
one position. After them, a linear layer gives logits of the words or letters for every position, and CTC makes a text of them
(minitv/ops/ctc_loss tells how, and how such a model is trained without knowing where a word stands).

- Why attention and then convolution: in the paper this order is better than the other one, and than both side by side.
- Why two halves of a feed-forward network: the network in front prepares what attention compares, and the one behind what it
  found. With steps of one half, both together move x as far as one whole step (Macaron-Net: Lu et al. 2019, arXiv 1906.02762).
- Why a norm at the end: x is a sum of many parts, and grows from block to block. The norm ends that, so no norm stands before
  the head.
- Why relative positions: "how far before me" is the same question everywhere in an utterance, and in one that is longer than
  all of training. A vector for each place is another number at each place, and is not there for places that training did not
  have.
- Why a gate in the convolution (GLU, Dauphin et al. 2017): half of the channels decide by a sigmoid how much of the other half
  passes. The filter then reads what was let in, and not everything.
- Why a filter for each channel alone (depthwise): 32 taps for each of D channels are 32 D weights, where filters that mix
  channels have 32 D². The two linear layers beside it mix the channels.
- Why swish, z · sigmoid(z): with max(0, z) the paper has 4.5 % word errors in place of 4.3 %. --activation has others.
- Why fewer positions than frames: a frame comes every 10 ms, and a letter lasts 60. Attention over a fourth of the positions
  costs a sixteenth. It must not be too few: CTC needs a position for each label, and one more between two equal ones.

What it gives. In the paper, a model of 118.8 M parameters makes 2.1 % word errors on LibriSpeech's clean test and 4.3 % on the
other one. With max(0, z) the second is 4.5 %, without the convolution 4.9 %, with one feed-forward network in place of two 5.0
%, and without relative positions 5.6 %, where each of these steps includes those before it. The published models read their
output by a network with memory, a transducer. Here CTC reads it, as in most models since.

What is lost. Attention costs O(T²), so very long recordings must be cut. The batch norm of the paper ties utterances of a batch
together. And the plain model needs the whole utterance before it writes a word.

    ours                                                              theirs
    B, T, D             utterances, positions of one, --width         -, -, encoder dim d
    M                   bands of the spectrogram, --mels              80 filterbank channels
    H, K = D / H        heads, and channels of one                    h, d_k
    u, w                bias_u, bias_v: what is asked without query   u, v (Transformer-XL)
    p_n                 Wpos R_n, the vector of a distance            W_k,R R_{i-j}
    kernel              taps of the depthwise filter                  kernel size, 32

The modules. f is the activation, ∘ is elementwise, and dropout stands at the end of each:

    ffn(x) = W₂ f(W₁ norm(x) + b₁) + b₂
    attention: q, k, v = split(Wqkv norm(x) + b)
        y_i = Σ_j softmax_j(((q_i + u) · k_j + (q_i + w) · p_{i-j}) / √K) v_j,    W merge(y) + b
    convolution: a, b = split(W₁ norm(x) + b₁),   z = a ∘ sigmoid(b),   W₂ f(norm(filter(z))) + b₂
        filter(z)_t = b + Σ_j weight_j z_{t + j - (kernel-1)/2},  j = 0 .. kernel - 1        0 outside of the utterance

R_n are sines and cosines of the distance n. minitv/ops/relative_attention shows how the scores of all distances become those of
all pairs without computing anything: a shift.

Padding. Utterances of a batch have different lengths, and shorter ones are filled up. In many programs what stands there leaks
into the result, because a filter or a batch norm reads it. Here a position counts only if all frames that it sees belong to the
utterance, so T frames make (T - 1) // 2 positions for each halving:

    >>> from minitv import variants
    >>> model = variants.load("conformer").configure().build(11)
    >>> [model.positions(frames) for frames in (6, 7, 10, 11, 100)]
    [0, 1, 1, 2, 24]

Attention hides the other positions, the filter reads 0 there, and norms over a batch leave them out. So an utterance has the
same logits alone and in any batch, but for rounding; with a batch norm that holds outside of training.

Which norm follows the filter. The paper has a batch norm: each channel over all positions of all utterances. It needs large
batches, and while training an utterance depends on those beside it: here on those of its micro-batch. --conv-norm layer, the
default, normalises each position alone, and suits small batches and streams; group lies between.

Streams. With --chunk c, a position sees the c positions of its own chunk and those of chunks before it (--left-chunks, or all),
and the filter looks back alone. Then words can be written while somebody speaks: ``minitv transcribe RUN FILE --stream``. It
waits for a chunk of c positions and for 7 - 4 = 3 frames that the last one sees beyond its own, 40 c + 30 ms and the
window of a frame. A stream gives what the whole utterance gives with the same model:

    >>> import numpy as np
    >>> from autograd import no_grad
    >>> model = variants.load("conformer").configure(chunk=3, left_chunks=1, width=16, layers=1, mels=8).build(11)
    >>> frames, parts, state = np.random.default_rng(0).normal(size=(1, 60, 8)), [], model.init_state(1)
    >>> for start in range(0, 60, 20):
    ...     with no_grad():
    ...         logits, state = model.prefill(frames[:, start : start + 20], state, last=start == 40)
    ...     parts.append(logits.numpy())
    >>> [part.shape[1] for part in parts], bool(abs(np.concatenate(parts, axis=1) - model(frames).numpy()).max() < 1e-5)
    ([3, 6, 5], True)

Three positions, one channel. A filter of three taps 1, 2 and 4 reads a = 1, 2, 3 behind gates of 1, 0 and 1: what is let in is
1, 0, 3. Centred, the middle tap is the position itself; over the past, the last one is:

    >>> from autograd import depthwise_conv1d
    >>> z, taps = np.array([1.0, 0, 3]).reshape(1, 3, 1), np.array([[1.0, 2, 4]])
    >>> depthwise_conv1d(z, taps, ahead=1).numpy().ravel(), depthwise_conv1d(z, taps).numpy().ravel()
    (array([ 2., 13.,  6.]), array([ 4.,  2., 13.]))

So 13 = 1 · 1 + 2 · 0 + 4 · 3 stands at the middle position, which sees the next one, or at the last one, which sees the two
before it.

Gradients. Those of attention, filter, gate and loss stand on the pages of the operators. Half steps halve the gradients of
their networks. What padding holds has the gradient 0.

How it is trained. The task speech makes utterances or reads recordings (minitv/tasks/speech.py), hides stripes of the
spectrogram in each (SpecAugment), and asks for the words by the CTC loss. At first the model learns to write nothing, because
the blank is right nearly everywhere: the loss stays on a plateau, and the word error rate is 1. Then words appear within some
hundred steps.

What to choose. --kernel 15 with 40 ms a position sees 0.6 s, more than a digit. The paper tries 7 to 65 and finds 32 best; an
even number has no middle, so here it is odd unless the filter looks back alone. --subsampling 2 leaves twice as many positions:
letters of a word that is spoken fast need them. --no-convolution and --no-macaron leave parts out, as the paper does to see
what they are worth. --chunk 4 to 16 are usual for streams: the longer, the better and the later.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check, option
from ..errors import UserError
from ..models.conformer import Conformer, ConformerBlock, RelativeAttention
from ..variant import Page, Variant


@dataclass(frozen=True)
class ConformerOptions:
    """conformer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)
    kernel: int = option(15, "taps of the depthwise convolution: an odd number, unless it looks back alone (--chunk)", low=1,
                         high=1025)
    conv_norm: str = option("layer", "what is normalised after the depthwise convolution: each frame, each frame in groups of "
                            "channels, or each channel over all frames of a batch, as in the paper",
                            choices=("layer", "group", "batch"))
    conv_groups: int = option(4, "groups of channels of --conv-norm group; they divide the width", low=1)
    convolution: bool = option(True, "blocks have their convolution; without it, they show what it is worth")
    macaron: bool = option(True, "blocks have half a step of a feed-forward network before and after; without it, one "
                                 "whole step after")
    subsampling: str = option("4", "frames of the spectrogram from one position of the model to the next",
                              choices=("2", "4", "8"))
    chunk: int | None = option(None, "positions of a chunk, so that the model can follow a stream: a position sees its own "
                               "chunk and those before; none = it sees the whole utterance", low=1, high=2**20)
    left_chunks: int | None = option(None, "chunks that a position sees before its own; none = all", low=0, high=2**20)

    def __post_init__(self) -> None:
        check(self)
        if self.chunk is None:
            if self.kernel % 2 == 0:
                raise UserError(f"--kernel: {self.kernel} taps have no middle, allowed: an odd number, or with --chunk any")
            if self.left_chunks is not None:
                raise UserError("--left-chunks: this concerns --chunk, and the model sees the whole utterance")
        if not self.convolution and (self.kernel, self.conv_norm) != (15, "layer"):
            flag = "--kernel" if self.kernel != 15 else "--conv-norm"
            raise UserError(f"{flag}: this concerns the convolution, which --no-convolution leaves out")
        if self.conv_norm != "group" and self.conv_groups != 4:
            raise UserError(f"--conv-groups: this concerns --conv-norm group, and --conv-norm is {self.conv_norm}")

    @property
    def halvings(self) -> int:
        """How often the frames are halved."""
        return {"2": 1, "4": 2, "8": 3}[self.subsampling]


CONFORMER = Variant(
    name="conformer",
    summary="Attention with relative positions, and convolution, between two halves of a feed-forward network, for speech",
    paper="Gulati et al. 2020, arXiv 2005.08100",
    mixer=RelativeAttention,
    options=ConformerOptions,
    block=ConformerBlock,
    model=Conformer,
    overrides=dict(context=1000, activation="silu", bias=True, dropout=0.1, lr=2e-3),
    # The convolutions of the front make 18 D² weights and a block 24 D², where a Transformer's block has 12 D².
    presets={"tiny": dict(width=64, layers=3, ffn_multiple=4.5), "nanogpt-cpu": dict(width=96, layers=3, ffn_multiple=3.5),
             "small": dict(width=256, layers=6, heads=4)},
    without=("positions", "token_shift", "embed_norm", "stack", "tied"),
    page=Page(
        formula="x ← x + ½ ffn(x); x ← x + attention(x); x ← x + convolution(x); x ← norm(x + ½ ffn(x)), each of norm(x); "
                "convolution = W f(norm(depthwise(a ∘ sigmoid(b)))) with a, b = split(W x)",
        cost="training, for each layer and utterance of T positions, a fourth of the frames: O(T D²) for matrices, which "
             "have 4 ffn_multiple D² + 8 D² weights; O(T² D) for attention, its scores of content and of distance; O(T "
             "kernel D) for the filter. Once for the whole model, O(T D²) for the two convolutions in front, with 9 D² "
             "weights, and as many in the linear layer after them. Memory: O(T D), and O(T² H) for the scores. It does not "
             "generate; it writes down what it hears, all positions at once or chunk by chunk",
        state="none where it sees a whole utterance. With --chunk c and --left-chunks n: keys and values of n c positions, and "
              "kernel - 1 inputs of the filter, 2 n c D + (kernel - 1) D numbers in each layer; without --left-chunks the keys "
              "and values of all positions so far. And up to 4 c + 6 frames in front, and the last class for CTC",
        operators=("relative_attention", "depthwise_conv1d", "gated", "ctc_loss"),
        golden="models written from the paper's formulas in PyTorch, with two utterances of different lengths, its CTC loss "
               "and all gradients: layer norm, group norm, batch norm with its running statistics, and chunks; the shift as "
               "Transformer-XL's appendix has it",
        discrepancies=(
            "the paper's filter has 32 taps, which have no middle; here --kernel is odd, or looks back alone",
            "the paper has a batch norm after the filter: --conv-norm batch. Its statistics here are those of a micro-batch, "
            "so the number of threads changes a run; the default is a layer norm",
            "the paper reads its output by a transducer with an LSTM; here CTC reads it",
            "Transformer-XL's own shift is right for the past alone, and ESPnet and others had it in encoders; WeNet has "
            "none. Here distances to both sides have vectors",
            "torchaudio's Conformer has no positions at all, and reads padding; that of the package transformers has no biases "
            "in its convolution module: here they follow --bias",
            "the convolutions in front are those of ESPnet, two of 3 × 3 with max(0, x) and without padding; the paper says "
            "nothing of them but their factor 4",
            "the paper's dropout is that of each residual branch, and feed-forward networks have another one after the "
            "activation; here the second one is left out",
            "the paper's weights begin as its framework has them; here those of the blocks come from N(0, init_std²) as in "
            "the other variants, and those of convolutions from uniform numbers",
            "the paper trains with 80 bands at 16 kHz, 10 masks of time and noise in the weights; here 40 bands at 8 kHz and "
            "two masks are enough for digits: --mels, --rate, --time-masks, and no noise in weights",
        ),
        review="it says that convolution adds the local part which attention lacks. That is right: in the paper's ablation, to "
               "leave the convolution out costs the most of all single parts but positions",
    ),
)
