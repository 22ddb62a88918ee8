"""Conformer: attention for what is far and convolution for what is near, for speech (Gulati et al. 2020, arXiv 2005.08100).

The problem. A model is to write down what somebody says. It reads a spectrogram: every 10 ms a *frame* says how strong the
sound is in each of M bands of frequency (minitv/mel.py). Speech has two kinds of structure. A sound such as a "t" is a pattern
of a few hundredths of a second, and it looks the same wherever it stands. Which word it belongs to, and how fast somebody
speaks, shows over seconds. Attention sees far, but at first all positions are alike to it: it must learn from much data that
neighbours belong together. Convolution begins with neighbours, but it needs many layers to see far.

The idea. Each block has both, one after the other: attention with relative positions, then a convolution with a filter of its
own for each channel. They stand between two halves of a feed-forward network. An *utterance* is what somebody says in one
recording. A block gets it as a vector x at each of its T positions:

    x̃ = x + ½ ffn(x)                    a half step of a feed-forward network
    x' = x̃ + attention(x̃)              what is far
    x'' = x' + convolution(x')           what is near
    y = norm(x'' + ½ ffn(x''))           the other half, and a norm at the end            (the paper's section 2.4)

Every module normalises its input first. In front of the blocks, two convolutions make one position of every four frames. Behind
them, a linear layer gives logits for every position: one for each word or letter, and one for the *blank*, "nothing new here".
CTC makes a text of them. It is a loss that needs no marks of where each word stands (minitv/ops/ctc_loss).

- Why attention and then convolution: in the paper this order is better than the other one, and than both side by side.
- Why two halves of a feed-forward network: the first prepares what attention compares, and the second works on what it found.
  With steps of one half, both together move x as far as one whole step (Macaron-Net: Lu et al. 2019, arXiv 1906.02762).
- Why a norm at the end: x is a sum of many parts and would grow from block to block. After this norm, the head needs none.
- Why relative positions: what is said 0.2 s before matters in the same way everywhere in an utterance. A vector for each place
  would have to learn this anew for each place, and would be missing in an utterance that is longer than those of training.
- Why a gate in the convolution (GLU, Dauphin et al. 2017): one half of the channels decides by a sigmoid how much of the other
  half the filter reads.
- Why a filter for each channel alone (depthwise): 32 taps for each of D channels are 32 D weights, where filters that mix
  channels have 32 D². The linear layers before and behind it mix the channels.
- Why swish, z · sigmoid(z): the paper has 4.3 % word errors with it, and 4.5 % with max(0, z). --activation has others.
- Why fewer positions than frames: a letter lasts several frames, and attention over a fourth of the positions costs a
  sixteenth. But CTC needs a position for each label, and one more between two equal ones.

What it gives. LibriSpeech is English read from books. In the paper, a model of 118.8 M parameters makes 2.1 % word errors on
its clean test and 4.3 % on the harder one, without a language model. With max(0, z) the second is 4.5 %; then without the
convolution 4.9 %; then with one feed-forward network in place of two 5.0 %; then without relative positions 5.6 %.

What is lost. Attention costs O(T²), so very long recordings must be cut. Ten seconds are 249 positions; with 4 heads the scores
of a layer are 4 T² = 248,004 numbers, and those of all distances 4 T (2 T - 1) = 495,012. The batch norm of the paper makes an
utterance depend on the others of its batch while training. The model needs the whole utterance before it writes a word, unless
it reads chunks (below). And CTC chooses the label of each position without knowing those of the others. The paper's models read
their output by a transducer instead, a network that also reads the labels so far.

    ours                                                              theirs
    B, T, D             utterances, positions of one, --width         -, -, encoder dim d
    M                   bands of the spectrogram, --mels              80 filterbank channels
    H, K = D / H        heads, and channels of one                    h, d_k
    u, w                bias_u, bias_v: added to every query          u, v (Transformer-XL)
    R_n, p_n            sines of a distance n, and Wpos R_n           R_{i-j}, W_k,R R_{i-j} (Transformer-XL)
    kernel              taps of the depthwise filter                  kernel size, 32

The modules. f is the activation, ∘ is elementwise, and dropout stands at the end of each:

    ffn(x) = W₂ f(W₁ norm(x) + b₁) + b₂
    attention: q, k, v = split(Wqkv norm(x) + b)
        y_i = Σ_j softmax_j(((q_i + u) · k_j + (q_i + w) · p_{i-j}) / √K) v_j,    W merge(y) + b
    convolution: a, g = split(W₁ norm(x) + b₁),   z = a ∘ sigmoid(g),   W₂ f(norm(filter(z))) + b₂
        filter(z)_t = b₃ + Σ_j weight_j z_{t + j - (kernel-1)/2},  j = 0 .. kernel - 1        0 outside of the utterance

R_n has sin(n 10000^(-2m/D)) in channel 2m and the cosine of the same in channel 2m + 1, n from -(T-1) to T - 1. All scores of
distances are one product of matrices and a shift (minitv/ops/relative_attention). The classes Subsampling (the convolutions in
front), ConformerBlock, RelativeAttention and Convolution in minitv/models/conformer.py are these formulas, and FeedForward in
minitv/blocks.py is the ffn.

Padding. Utterances of a batch have different lengths, and shorter ones are filled up with zeros. In many programs what stands
there leaks into the result, because a filter or a batch norm reads it. Here a position counts only if all frames that it sees
belong to the utterance. Each convolution in front makes (n - 1) // 2 of n, so 6 frames have no position, and 7 have one:

    >>> from minitv import variants
    >>> model = variants.load("conformer").configure().build(11)
    >>> [model.positions(frames) for frames in (6, 7, 10, 11, 100)]
    [0, 1, 1, 2, 24]

Attention hides the other positions, the filter reads 0 there, and norms over a batch leave them out. So an utterance has the
same logits alone and in any batch, but for rounding; with a batch norm that holds outside of training.

Which norm follows the filter. The paper has a batch norm: it normalises each channel over all positions of all utterances. It
needs large batches, and while training an utterance depends on those that are computed together with it. --conv-norm layer, the
default, normalises each position alone, and suits small batches and streams. --conv-norm group normalises each position in
groups of channels.

What a position sees. Without --chunk it sees the whole utterance, and nothing is masked but padding. With --chunk c it sees its
own chunk of c positions and --left-chunks chunks before it, or all of them, and the filter looks back alone. Then words can be
written while somebody speaks: ``minitv transcribe RUN FILE --stream``. A chunk is complete when its 4 c + 3 frames have come,
because its last position sees 3 frames beyond its own. They last 40 c + 45 ms. The state is what later chunks see: the keys and
values of --left-chunks chunks, and the last kernel - 1 inputs of the filter. With --chunk 8 --left-chunks 4, D = 64 and
--kernel 15 these are 2 · 32 · 64 + 14 · 64 = 4992 numbers in each layer, 20 kB in float32. A stream gives what the same model
gives for the whole utterance:

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

An example: three positions, one channel. The values are a = 1, 2, 3 and the gates 1, 0 and 1, so the filter reads 1, 0, 3. Its
taps are 1, 2 and 4. In a centred filter the middle tap is the position itself; in one that looks back alone, the last tap is:

    >>> from autograd import depthwise_conv1d
    >>> z, taps = np.array([1.0, 0, 3]).reshape(1, 3, 1), np.array([[1.0, 2, 4]])
    >>> depthwise_conv1d(z, taps, ahead=1).numpy().ravel(), depthwise_conv1d(z, taps).numpy().ravel()
    (array([ 2., 13.,  6.]), array([ 4.,  2., 13.]))

So 13 = 1 · 1 + 2 · 0 + 4 · 3 stands at the middle position of the centred filter, and at the last position of the other one.

Gradients. The pages of the operators have those of attention, filter, gate and loss. The gradient of a sum goes to all its
terms, so x gets that of y through every module and also directly. Half steps halve the gradients of their networks. Padding has
the gradient 0.

How it is trained. ``minitv train conformer --out runs/mine`` learns the task speech (minitv/tasks/speech.py), by AdamW and the
CTC loss. The learning rate rises for 100 steps to --lr 0.002 and falls along a cosine. Dropout is 0.1, and stripes of each
training spectrogram are hidden (SpecAugment). The paper has Adam; its rate rises for 10,000 steps to 0.05 / √D and falls with
1 / √step. At first the model learns to write nothing, because the blank is right nearly everywhere: the loss stays on a
plateau, and the word error rate is 1. Words appear when it leaves the plateau.

How it writes. The best class of each position is taken. Equal neighbours become one, and blanks are dropped. With ``minitv
transcribe runs/mine FILE.wav --beam 8``, a prefix beam search adds up all that reads as the same text (decoding.py in
minitv/ops/ctc_loss).

What to choose. --kernel 15 with 40 ms a position sees 0.6 s, more than most digits last. The paper tries 3 to 65 and finds 32
best. An even number has no middle, so here it is odd, unless the filter looks back alone. The paper's models have D = 144, 256
and 512, with 16, 16 and 17 layers, 4, 4 and 8 heads, and --ffn-multiple 4; its largest is best with 16 heads. --subsampling 2
leaves twice as many positions: letters of words that are spoken fast need them. --frames samples --subsampling wave reads the
sound itself, as wav2vec 2.0 does. This wants far more data, and is there for the weights of such a model, which ``minitv
import`` reads. --no-convolution and --no-macaron leave parts out, to see what they are worth. --chunk 4 to 16 are usual for
streams: a position of a longer chunk sees more, and its words are written later.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..config import check, option, settings
from ..errors import UserError
from ..models.conformer import Conformer, ConformerBlock, RelativeAttention
from ..variant import Page, Variant

MOST = 32  # convolutions over samples


@dataclass(frozen=True)
class ConformerOptions:
    """conformer"""

    heads: int = option(4, "attention heads; they divide the width", low=1)
    kernel: int = option(15, "taps of the depthwise convolution: an odd number, unless it looks back alone (--chunk)", low=1,
                         high=1025)
    conv_norm: str = option("layer", "what is normalised after the depthwise convolution: each position, each position in "
                            "groups of channels, or each channel over all positions of a batch, as in the paper",
                            choices=("layer", "group", "batch"))
    conv_groups: int = option(4, "groups of channels of --conv-norm group; they divide the width", low=1)
    convolution: bool = option(True, "blocks have their convolution; without it, a run shows what the convolution is worth")
    macaron: bool = option(True, "blocks have half a step of a feed-forward network at their beginning and at their end; "
                                 "without it, one whole step at the end")
    subsampling: str = option("4", "frames of the spectrogram from one position of the model to the next; or wave, the "
                              "convolutions over samples of wav2vec 2.0, with --frames samples",
                              choices=("2", "4", "8", "wave"))
    wave_channels: str = option("512,512,512,512,512,512,512", "channels of each convolution of --subsampling wave", newer=True)
    wave_kernels: str = option("10,3,3,3,3,2,2", "taps of each", newer=True)
    wave_strides: str = option("5,2,2,2,2,2,2", "step of each", newer=True)
    wave_norm: str = option("group", "norm of each channel over time after the first convolution, or of each position after "
                            "all of them", choices=("group", "layer"), newer=True)
    wave_bias: bool = option(False, "these convolutions have biases", newer=True)
    chunk: int | None = option(None, "positions of a chunk, so that the model can follow a stream: a position sees its own "
                               "chunk and those before; none = it sees the whole utterance", low=1, high=2**20)
    convolution_bias: bool = option(True, "the convolution of a block has biases, where --bias gives them", newer=True)
    final_norm: bool = option(False, "what the last block gives is normalised once more", newer=True)
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
        for name, setting in settings(type(self)).items():
            if name.startswith("wave_") and self.subsampling != "wave" and getattr(self, name) != setting.default:
                raise UserError(f"{setting.flag}: this concerns --subsampling wave, and --subsampling is {self.subsampling}")
        if len({len(numbers) for numbers in self.wave}) > 1:
            raise UserError("--wave-channels, --wave-kernels and --wave-strides: they have " + ", ".join(
                str(len(numbers)) for numbers in (self.wave[2], *self.wave[:2])) + " numbers, allowed: as many each")

    @functools.cached_property
    def wave(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Taps, steps and channels of the convolutions over samples."""
        return _numbers("--wave-kernels", self.wave_kernels), _numbers("--wave-strides", self.wave_strides), _numbers(
            "--wave-channels", self.wave_channels)

    @property
    def halvings(self) -> int:
        """How often the frames are halved."""
        return {"2": 1, "4": 2, "8": 3}[self.subsampling]


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    words = text.split(",")
    if len(words) > MOST or not all(word.strip().isdecimal() and 1 <= int(word) <= 2**20 for word in words):
        raise UserError(f"{flag}: {text!r}, allowed: up to {MOST} integers from 1 to 2**20 separated by commas")
    return tuple(map(int, words))


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
                "convolution = W f(norm(depthwise(a ∘ sigmoid(g)))) with a, g = split(W x)",
        cost="training, for each layer and utterance of T positions, a fourth of the frames: O(T D²) for matrices, which "
             "have 4 ffn_multiple D² + 8 D² weights; O(T² D) for attention, its scores of content and of distance; O(T "
             "kernel D) for the filter. Once for the whole model, O(T D²) for the two convolutions in front, with 9 D² "
             "weights, and as many in the linear layer after them: with 40 bands 90 D² products for each position, as in three "
             "or four blocks. Memory: O(T D), and O(T² H) for the scores. It does not generate; it writes down what it "
             "hears, all positions at once or chunk by chunk",
        state="none where it sees a whole utterance. With --chunk c and --left-chunks n: keys and values of n c positions, and "
              "kernel - 1 inputs of the filter, 2 n c D + (kernel - 1) D numbers in each layer; without --left-chunks the keys "
              "and values of all positions so far. And up to 4 c + 2 frames in front, and the last class for CTC",
        operators=("relative_attention", "depthwise_conv1d", "gated", "ctc_loss"),
        golden="Wav2Vec2ConformerForCTC of the package transformers, from samples to all gradients, and models written from "
               "the paper's formulas in PyTorch, with two utterances of different lengths, its CTC loss "
               "and all gradients: layer norm, group norm, batch norm with its running statistics, and chunks; the shift as "
               "Transformer-XL's appendix has it",
        discrepancies=(
            "the paper's filter has 32 taps, which have no middle; here --kernel is odd, or looks back alone",
            "the paper has a batch norm after the filter: --conv-norm batch. Its statistics here are those of a micro-batch, "
            "the part of a batch that is computed at once, so --micro-batch changes a run; the default is a "
            "layer norm",
            "the paper reads its output by a transducer with an LSTM; here CTC reads it",
            "Transformer-XL's own shift is right for the past alone, and ESPnet and others had it in encoders; WeNet leaves "
            "the shift out. Here distances to both sides have vectors",
            "torchaudio's Conformer has no positions at all, and reads padding; Wav2Vec2Conformer of the package transformers "
            "has no biases in its convolution module: --no-convolution-bias. It reads samples by seven convolutions, and "
            "normalises what the last block gives: --subsampling wave --final-norm",
            "the convolutions in front are those of ESPnet, two of 3 × 3 with max(0, x) and without padding; the paper says "
            "nothing of them but their factor 4",
            "the paper's dropout is that of each residual branch, and feed-forward networks have another one after the "
            "activation; here the second one is left out",
            "the paper does not say how its weights begin; here those of the blocks come from N(0, init_std²) as in "
            "the other variants, and those of convolutions from uniform numbers",
            "the paper trains with 80 bands at 16 kHz, 10 masks of time and noise in the weights; here 40 bands at 8 kHz and "
            "two masks are enough for digits: --mels, --rate, --time-masks, and no noise in weights",
        ),
        review="it says that convolution adds the local part which attention lacks. The paper's ablation agrees: without the "
               "convolution there are 0.4 points more word errors; only positions are worth more, 0.6",
    ),
)
