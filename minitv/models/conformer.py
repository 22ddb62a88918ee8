"""Conformer: logits of classes at every fourth frame of sound, for CTC. variants/conformer.py teaches the paper.

    x = subsample(frames)               two convolutions of stride 2:  [B T M] -> [B T' D], M bands; or as in wav2vec 2.0
    x = block(x) for every layer        x + ½ ffn(x);  x + attention(x);  x + convolution(x);  norm(x + ½ ffn(x))
    logits = x Wᵀ + b                   [B T' V], class 0 is the blank

Utterances of a batch differ in length, and the shorter ones are filled up. What stands there must not matter: attention does
not see it, it is 0 where the depthwise convolution would read it, and the statistics of a batch norm leave it out. So an
utterance has the same logits in a batch and alone, but for rounding.

With a chunk of c positions the model can follow a stream. A position then sees the positions of its own chunk and those of
``left_chunks`` chunks before (all of them by default), and the depthwise convolution looks back alone. ``prefill`` reads sound
piece by piece: its state holds the frames that have not made a chunk yet, and for each layer the keys and values that later
chunks see and the last inputs of the depthwise convolution. Behind the first convolutions, T counts positions.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np

from autograd import Tensor, concat, conv1d, conv2d, depthwise_conv1d, gelu, getitem, group_norm, relu, reshape, sum, where
from autograd.device import beside, namespace, unscalar
from autograd.errors import ShapeError
from autograd.random import Random

from ..blocks import Block, FeedForward
from ..errors import UserError
from ..nn import (
    ACTIVATIONS,
    Buffer,
    Dropout,
    LayerNorm,
    Linear,
    Module,
    Stateful,
    full,
    gather,
    norm_of,
    training,
    uniform,
)
from ..ops import gated, merge_heads, relative_attention, split_heads
from ..options import ModelOptions
from .encoder import sines

MOMENTUM = 0.1  # of running statistics: the share of a new step


class Subsampling(Module):
    """x[B T' D] of frames [B T M]: 3 × 3 convolutions of stride 2 without padding, relu after each, and a linear layer.

    Each convolution halves the frames and the bands. If there are two, position t' sees the frames 4 t' .. 4 t' + 6.
    """

    def __init__(self, rng: Random, model: ModelOptions, halvings: int, features: int, dtype=np.float32):
        width, self.halvings = model.width, halvings
        bands = self.reduced(features)
        if bands < 1:
            raise UserError(f"--mels: {features} bands are too few for --subsampling {2**halvings}, allowed: at least "
                            f"{self.window}")
        self.kernels, self.biases = [], []
        for i in range(halvings):
            channels = width if i else 1
            self.kernels.append(uniform(rng.split(0, i), (width, channels, 3, 3), 1 / math.sqrt(9 * channels), dtype))
            self.biases.append(full((width,), 0, dtype))
        self.out = Linear(rng.split(1), width * bands, width, bound=1 / math.sqrt(width * bands), dtype=dtype)

    @property
    def stride(self) -> int:
        """Frames from one position to the next."""
        return 2**self.halvings

    @property
    def window(self) -> int:
        """Frames that a position sees."""
        return 2 * self.stride - 1

    def reduced(self, lengths: Any) -> Any:
        """How many positions so many frames make, a number or an array: (n - 1) // 2 for each convolution, and at least 0."""
        for _ in range(self.halvings):
            lengths = (lengths - 1) // 2
        return lengths * (lengths > 0)

    def __call__(self, frames: Tensor, lengths: Any = None) -> Tensor:
        x = reshape(frames, (*frames.shape, 1))  # [B T M 1]
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = relu(conv2d(x, kernel, bias, stride=2))  # [B T/2 M/2 D]
        return self.out(reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3])))


class OverTime(Module):
    """Each channel of an utterance gets mean 0 and variance 1 over its positions, then a gain and an offset."""

    def __init__(self, width: int, *, eps: float = 1e-5, dtype=np.float32):
        self.weight, self.bias, self.eps = full((width,), 1, dtype), full((width,), 0, dtype), eps

    def __call__(self, x: Tensor, lengths: Any = None) -> Tensor:
        """Of x[B T D], of which the first lengths[B] positions count, by default all."""
        xp, length = namespace(x.data), x.shape[1]
        counts = np.full(len(x.data), length) if lengths is None else np.minimum(lengths, length)
        inside = beside(np.arange(length) < counts[:, None], x.data)[..., None]  # [B T 1]
        share = Tensor.wrap(beside((1 / np.maximum(counts, 1)).astype(x.dtype), x.data)[:, None, None])
        mean = sum(where(inside, x, 0.0), axis=1, keepdims=True) * share  # [B 1 D]
        centred = where(inside, x - mean, xp.zeros((), x.dtype))
        variance = sum(centred * centred, axis=1, keepdims=True) * share
        return centred * (variance + self.eps) ** -0.5 * self.weight + self.bias


class WaveFront(Module):
    """x[B T' D] of samples [B T 1], as wav2vec 2.0 reads them (Baevski et al. 2020, arXiv 2006.11477, section 2).

    Convolutions over time without padding, gelu after each; then a norm and a linear layer. With the norm "group", the first
    convolution has a norm of each channel over the time of the utterance; with "layer", each has one of each position.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: Any, features: int, dtype=np.float32):
        if features != 1:
            raise UserError("--subsampling wave: it reads samples of sound, allowed with --frames samples")
        if options.chunk is not None and options.wave_norm == "group":
            raise UserError("--wave-norm group: it is a norm over the whole utterance, which a stream does not know; allowed "
                            "with --chunk: layer")
        self.taps, self.strides, channels = options.wave
        self.kernels, self.biases, self.norms = [], [], []
        for i, (width, taps) in enumerate(zip(channels, self.taps, strict=True)):
            inputs = channels[i - 1] if i else 1
            self.kernels.append(uniform(rng.split(0, i), (width, inputs, taps), 1 / math.sqrt(inputs * taps), dtype))
            self.biases.append(full((width,), 0, dtype) if options.wave_bias else None)
            kind = LayerNorm if options.wave_norm == "layer" else None if i else OverTime
            self.norms.append(kind and kind(width, dtype=dtype))
        self.norm = norm_of(model, channels[-1], dtype)
        self.out = Linear(rng.split(1), channels[-1], model.width, bound=1 / math.sqrt(channels[-1]), dtype=dtype)

    @property
    def stride(self) -> int:
        """Samples from one position to the next."""
        return math.prod(self.strides)

    @property
    def window(self) -> int:
        """Samples that a position sees."""
        size = 1
        for taps, stride in zip(reversed(self.taps), reversed(self.strides), strict=True):
            size = (size - 1) * stride + taps
        return size

    def reduced(self, lengths: Any) -> Any:
        """How many positions so many samples make, a number or an array."""
        for taps, stride in zip(self.taps, self.strides, strict=True):
            lengths = (lengths - taps) // stride + 1
            lengths = lengths * (lengths > 0)
        return lengths

    def __call__(self, frames: Tensor, lengths: Any = None) -> Tensor:
        """Positions of samples, of which the first lengths[B] count, by default all."""
        x, counts = frames, None if lengths is None else np.asarray(lengths)
        for kernel, bias, norm, stride in zip(self.kernels, self.biases, self.norms, self.strides, strict=True):
            x = conv1d(x, kernel, bias, stride=stride)
            if counts is not None:
                counts = np.maximum((counts - kernel.shape[2]) // stride + 1, 0)
            if norm is not None:
                x = norm(x, counts) if isinstance(norm, OverTime) else norm(x)
            x = gelu(x)
        return self.out(self.norm(x))


class Keys(NamedTuple):
    """The keys and values that later chunks see, [B H S K] each, and the position of the first of them."""

    keys: Tensor
    values: Tensor
    first: int


class RelativeAttention(Stateful):
    """out = merge(y) Woᵀ + b, where y is relative_attention of x[B T D]; the page of that operator has the formulas.

    For each distance n there is a vector p_n = R_n Wposᵀ. R_n has sines of n in even channels and cosines in odd ones, so no
    utterance is too long; every layer has a Wpos of its own. UserError if the heads do not divide the width.
    """

    without_rope = without_alibi = "its scores have vectors for the distances already"

    def __init__(self, rng: Random, model: ModelOptions, options: Any, layer: int = 0, dtype=np.float32):
        width, self.heads = model.width, options.heads
        size = model.head_dim(self.heads)
        self.chunk, self.left = options.chunk, options.left_chunks
        self.qkv = Linear(rng.split(0), width, 3 * width, std=model.init_std, bias=model.bias, dtype=dtype)
        self.positions = Linear(rng.split(1), width, width, std=model.init_std, bias=False, dtype=dtype)
        self.bias_u, self.bias_v = full((self.heads, size), 0, dtype), full((self.heads, size), 0, dtype)
        self.out = Linear(rng.split(2), width, width, std=model.output_std, bias=model.bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None, seen: Any = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), heads=(self.heads,) * 3)  # [B H T K]
        return self.dropout(self._attended(q, k, v, self.visible(0, x.shape[1], 0, x.shape[1], seen)), rng)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        queries, keys, width = q.shape[2], k.shape[2], self.positions.weight.shape[1]
        table = sines(1 - queries, keys, width, q.dtype)[::-1]  # R, the furthest past first [C D]
        (p,) = split_heads(self.positions(Tensor.wrap(beside(table.copy(), q.data)[None])), heads=(self.heads,))  # [1 H C K]
        mask = mask if mask is None else beside(mask, q.data)
        y = relative_attention(q, k, v, reshape(p, p.shape[1:]), self.bias_u, self.bias_v, mask)
        return self.out(merge_heads([y]))

    def visible(self, start: int, stop: int, first: int, last: int, seen: Any = None) -> Any:
        """Which keys at ``first`` .. ``last`` - 1 the queries at ``start`` .. ``stop`` - 1 see, or None for all; seen[B S]."""
        mask = None if seen is None else seen[:, None, None, :]  # [B 1 1 S]
        if self.chunk is None:
            return mask
        mine, theirs = np.arange(start, stop)[:, None] // self.chunk, np.arange(first, last) // self.chunk
        near = theirs <= mine
        if self.left is not None:
            near &= theirs >= mine - self.left
        return near if mask is None else beside(near, mask) & mask

    def init_state(self, batch: int) -> Keys:
        shape = batch, self.heads, 0, self.bias_u.shape[1]
        return Keys(self.constant(0.0, *shape), self.constant(0.0, *shape), 0)

    def prefill(self, x: Tensor, state: Keys) -> tuple[Tensor, Keys]:
        """What ``__call__`` gives for the next positions x, which begin a chunk; keys that no later chunk sees are dropped."""
        q, k, v = split_heads(self.qkv(x), heads=(self.heads,) * 3)
        start = state.first + state.keys.shape[2]
        stop = start + x.shape[1]
        k, v = concat([state.keys, k], axis=2), concat([state.values, v], axis=2)
        y = self._attended(q, k, v, self.visible(start, stop, state.first, stop))
        drop = 0 if self.left is None else max(0, stop - self.left * self.chunk - state.first)
        return y, Keys(k[:, :, drop:], v[:, :, drop:], state.first + drop)


class BatchNorm(Module):
    """Each channel gets mean 0 and variance 1 over all positions that count, then a gain and an offset.

    While training, the statistics are those of the utterances that are computed together, a micro-batch. The buffers ``mean``
    and ``variance`` follow those of whole steps, x ← 0.9 x + 0.1 new with the unbiased variance. Outside of training, the
    buffers are used instead. Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, dtype=np.float32):
        self.weight, self.bias = full((width,), 1, dtype), full((width,), 0, dtype)
        self.mean, self.variance = Buffer(np.zeros(width, dtype)), Buffer(np.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: Tensor, seen: Any = None) -> Tensor:
        if not training():
            scale = self.weight * Tensor.wrap((self.variance.data + self.eps) ** -0.5)
            return (x - self.mean) * scale + self.bias
        xp, (batch, length, _) = namespace(x.data), x.shape
        valid = xp.ones((batch, length), bool) if seen is None else seen
        inside, count = valid[..., None], xp.maximum(valid.sum(), 1)  # which lies where x lies: a GPU is not waited for
        share = Tensor.wrap(unscalar((1 / count).astype(x.dtype)))
        mean = sum(where(inside, x, 0.0), axis=(0, 1)) * share  # [D]
        centred = where(inside, x - mean, 0.0)
        variance = sum(centred * centred, axis=(0, 1)) * share
        center, spread = mean.data.astype(np.float64), variance.data.astype(np.float64)
        gather(self, count * center, count * (spread + center**2), count)
        return centred * (variance + self.eps) ** -0.5 * self.weight + self.bias

    def add_statistics(self, total, squares, count) -> None:
        mean = total / count
        variance = (squares / count - mean**2) * (count / namespace(total).maximum(count - 1, 1))
        for buffer, new in ((self.mean, mean), (self.variance, variance)):
            buffer.assign_(((1 - MOMENTUM) * buffer.data + MOMENTUM * new).astype(buffer.dtype))


class GroupNorm(Module):
    """Each group of channels gets mean 0 and variance 1 at every position, then a gain and an offset."""

    def __init__(self, width: int, groups: int, *, dtype=np.float32):
        if width % groups:
            raise UserError(f"--conv-groups: {groups} groups do not divide the width {width}")
        self.weight, self.bias, self.groups = full((width,), 1, dtype), full((width,), 0, dtype), groups

    def __call__(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, groups=self.groups)


class Convolution(Stateful):
    """y = W₂ f(norm(depthwise(a ∘ sigmoid(g)))) + b₂ with a, g = split(W₁ x + b₁), for x[B T D].

    The depthwise filter has ``kernel`` taps, centred, or over the past where the model reads chunks.
    """

    def __init__(self, rng: Random, model: ModelOptions, options: Any, layer: int = 0, dtype=np.float32):
        width, self.taps = model.width, options.kernel
        self.ahead = 0 if options.chunk is not None else (self.taps - 1) // 2
        bias = model.bias and options.convolution_bias
        self.into = Linear(rng.split(0), width, 2 * width, std=model.init_std, bias=bias, dtype=dtype)
        self.depthwise = uniform(rng.split(1), (width, self.taps), 1 / math.sqrt(self.taps), dtype)
        self.depthwise_bias = full((width,), 0, dtype) if bias else None
        self.norm = {"layer": lambda: norm_of(model, width, dtype),
                     "group": lambda: GroupNorm(width, options.conv_groups, dtype=dtype),
                     "batch": lambda: BatchNorm(width, dtype=dtype)}[options.conv_norm]()
        self.activation = ACTIVATIONS[model.activation]
        self.out = Linear(rng.split(2), width, width, std=model.output_std, bias=bias, dtype=dtype)
        self.dropout = Dropout(model.dropout)

    def __call__(self, x: Tensor, rng: Random | None = None, seen: Any = None) -> Tensor:
        z = self._entered(x)
        if seen is not None:
            z = where(seen[..., None], z, 0.0)
        z = depthwise_conv1d(z, self.depthwise, self.depthwise_bias, ahead=self.ahead)
        return self.dropout(self._left(z, seen), rng)

    def _entered(self, x: Tensor) -> Tensor:
        """What the depthwise convolution reads, [B T D]."""
        z, width = self.into(x), x.shape[2]
        return gated(z[..., :width], z[..., width:])

    def _left(self, z: Tensor, seen: Any = None) -> Tensor:
        z = self.norm(z, seen) if isinstance(self.norm, BatchNorm) else self.norm(z)
        return self.out(self.activation(z))

    def init_state(self, batch: int) -> Tensor:
        return self.constant(0.0, batch, self.taps - 1, self.depthwise.shape[0])

    def prefill(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        z, keep = concat([state, self._entered(x)], axis=1), self.taps - 1
        y = depthwise_conv1d(z, self.depthwise, self.depthwise_bias)[:, keep:]
        return self._left(y), getitem(z, key=(slice(None), slice(z.shape[1] - keep, None)))


class ConformerBlock(Block):
    """x ← x + ½ ffn(norm(x)); x ← x + mixer(norm(x)); x ← x + convolution(norm(x)); x ← norm(x + ½ ffn₂(norm(x))).

    ``seen`` [B T] says which positions count. Without ``options.macaron`` the first ffn is left out and ffn₂ takes a whole
    step; without ``options.convolution`` the convolution is left out.
    """

    channels = 2
    normed = True

    def __init__(self, rng: Random, model: ModelOptions, options: Any, layer: int, dtype=np.float32):
        def made(kind: type[Stateful], stream: int) -> tuple[Module, Stateful]:
            norm = norm_of(model, model.width, dtype)
            return norm, kind(rng.split(stream), model, options, layer, dtype)

        self.norm1, self.ffn = made(FeedForward, 0) if options.macaron else (None, None)
        self.norm2, self.mixer = made(RelativeAttention, 1)
        self.norm3, self.convolution = made(Convolution, 2) if options.convolution else (None, None)
        self.norm4, self.ffn2 = made(FeedForward, 3)
        self.norm = norm_of(model, model.width, dtype)

    def __call__(self, x: Tensor, rng: Random | None = None, seen: Any = None) -> Tensor:
        x = self._before(x, rng and rng.split(0))
        x = x + self.mixer(self.norm2(x), rng and rng.split(1), seen)
        if self.convolution is not None:
            x = x + self.convolution(self.norm3(x), rng and rng.split(2), seen)
        return self._after(x, rng and rng.split(3))

    def _before(self, x: Tensor, rng: Random | None = None) -> Tensor:
        return x if self.ffn is None else x + self.ffn(self.norm1(x), rng) * 0.5

    def _after(self, x: Tensor, rng: Random | None = None) -> Tensor:
        y = self.ffn2(self.norm4(x), rng)
        return self.norm(x + (y if self.ffn is None else y * 0.5))

    def init_state(self, batch: int) -> tuple[Keys, Tensor | None]:
        return self.mixer.init_state(batch), None if self.convolution is None else self.convolution.init_state(batch)

    def prefill(self, x: Tensor, state: tuple[Keys, Tensor | None]) -> tuple[Tensor, tuple[Keys, Tensor | None]]:
        keys, recent = state
        x = self._before(x)
        y, keys = self.mixer.prefill(self.norm2(x), keys)
        x = x + y
        if self.convolution is not None:
            y, recent = self.convolution.prefill(self.norm3(x), recent)
            x = x + y
        return self._after(x), (keys, recent)


class State(NamedTuple):
    """The frames [B n M] that have not made a chunk yet, and the state of every block."""

    frames: Any
    blocks: tuple[Any, ...]


class Conformer(Module):
    """An encoder of frames [B T M], M = ``features``, that gives logits of ``vocab`` classes; class 0 is CTC's blank."""

    reads: ClassVar[str] = "frames of sound"
    writing: ClassVar[str] = ("the words of a recording, all at once (minitv transcribe DIR FILE.wav), or chunk by chunk if it "
                              "was trained with --chunk (--stream)")

    def __init__(self, variant: Any, model: ModelOptions, options: Any, vocab: int, rng: Random, dtype: Any = np.float32,
                 features: int = 40):
        self.variant, self.context, self.features = variant, model.context, features
        self.chunk = options.chunk
        self.subsample = (WaveFront(rng.split(0), model, options, features, dtype) if options.subsampling == "wave" else
                          Subsampling(rng.split(0), model, options.halvings, features, dtype))
        self.dropout = Dropout(model.dropout)
        self.blocks = [ConformerBlock(rng.split(1, layer), model, options, layer, dtype) for layer in range(model.layers)]
        self.norm = norm_of(model, model.width, dtype) if options.final_norm else None
        self.head = Linear(rng.split(2), model.width, vocab, std=model.init_std, dtype=dtype)

    def positions(self, lengths: Any) -> Any:
        """How many positions utterances of so many frames have."""
        return self.subsample.reduced(lengths)

    def __call__(self, frames: np.ndarray, rng: Random | None = None, lengths: np.ndarray | None = None) -> Tensor:
        """Logits [B T' V] of frames [B T M], of which the first lengths[B] count, by default all; ``rng`` is for dropout."""
        frames = self._checked(frames)
        window = self.subsample.window
        if frames.shape[1] < window:  # no position, or padding alone
            frames = np.pad(frames, ((0, 0), (0, window - frames.shape[1]), (0, 0)))
            lengths = np.zeros(len(frames), int) if lengths is None else lengths
        x = self.dropout(self.subsample(self._tensor(frames), lengths), rng and rng.split(0))
        seen = None
        if lengths is not None:
            seen = np.arange(x.shape[1]) < np.asarray(self.positions(lengths))[:, None]  # [B T']
            seen = None if seen.all() else beside(seen, x.data)
        for layer, block in enumerate(self.blocks):
            x = block(x, rng and rng.split(1, layer), seen)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B T' V] of what the last block gave, [B T' D]."""
        return self.head(x if self.norm is None else self.norm(x))

    def _checked(self, frames: np.ndarray) -> np.ndarray:
        frames = np.asarray(frames)
        if frames.ndim != 3 or frames.shape[2] != self.features:
            raise ShapeError(f"frames are [B T {self.features}], of B utterances; got an array of shape {frames.shape}")
        return frames

    def _tensor(self, frames: np.ndarray) -> Tensor:
        weight = self.head.weight
        return Tensor.wrap(beside(frames.astype(weight.dtype, copy=False), weight.data))

    def init_state(self, batch: int) -> State:
        """The state before the first frame; UserError if the model sees whole utterances."""
        if self.chunk is None:
            raise UserError("--stream: this model sees a whole utterance at once, train one with --chunk to follow a stream")
        frames = np.zeros((batch, 0, self.features), self.head.weight.dtype)
        return State(frames, tuple(block.init_state(batch) for block in self.blocks))

    def prefill(self, frames: np.ndarray, state: State, last: bool = False) -> tuple[Tensor, State]:
        """Logits [B n V] of all positions whose chunk is complete with these frames, and the state after them.

        ``last`` says that no more frames come, so that the last chunk may be shorter.
        """
        frames = np.concatenate([state.frames, self._checked(frames)], axis=1)
        count = int(self.positions(frames.shape[1]))
        count -= 0 if last else count % self.chunk
        if not count:
            return Tensor.wrap(namespace(self.head.weight.data).zeros((len(frames), 0, self.head.weight.shape[0]),
                                                                      self.head.weight.dtype)), State(frames, state.blocks)
        stride, after = self.subsample.stride, []
        x = self.subsample(self._tensor(frames[:, : (count - 1) * stride + self.subsample.window]))
        for block, past in zip(self.blocks, state.blocks, strict=True):
            x, past = block.prefill(x, past)
            after.append(past)
        return self.logits(x), State(frames[:, count * stride :], tuple(after))
