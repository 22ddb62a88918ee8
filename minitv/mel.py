"""Log-mel spectrograms: the numbers that a model reads of a sound, and the masks on them while training (SpecAugment).

The sound is cut into frames of 25 ms, which begin every 10 ms and overlap. Within so short a time a voice changes little, so
the power at each frequency says which sound is spoken. An ear tells low frequencies apart better than high ones. So the powers
are summed within M bands. A band is a triangle of weights, and all are equally wide on the mel scale, m(f) = 2595 log₁₀(1 + f /
700). The logarithm of a sum is closer than the sum to how loud it sounds:

    frame t     x_n = window_n · sound[t hop + n],  n = 0 .. N - 1,     window_n = ½ - ½ cos(2π n / N)         (Hann)
    power       P_k = |Σ_n x_n e^(-2πi k n / F)|²,  k = 0 .. F / 2                    F, the next power of 2 from N on
    mel         y_m = ln(Σ_k triangle_m(k) P_k + 10⁻⁶)                                [T M]

At 8000 samples a second N is 200, hop 80 and F 256. T = (samples - N) // hop + 1 frames fit, so a second has 98. Nothing is
padded: a frame depends on its own N samples alone, and a stream has the same frames as the whole. Last, each band is shifted
and scaled to mean 0 and variance 1, by numbers of the training data, or of the utterance itself, which a stream cannot know.

>>> import numpy as np
>>> tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000)      # one second of 1000 Hz
>>> frames = FrontEnd(8000, 40)(tone)
>>> frames.shape, round(float(mel(1000) / mel(4000) * 41), 1)      # the middle of band i is at (i + 1) / 41 of the scale
((98, 40), 19.1)
>>> int(frames[0].argmax())
18
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from autograd.random import Random

WINDOW_S, HOP_S = 0.025, 0.010
FLOOR = 1e-6  # power that silence has, so that its logarithm is finite


class FrontEnd(NamedTuple):
    """How sound of ``rate`` samples a second becomes frames of ``bands`` numbers; ``scale`` has their means and deviations.

    Without a ``scale``, frames are not normalised; ``scaled`` then returns them as they are. With ``samples`` a frame is a
    sample, and ``bands`` is 1.
    """

    rate: int
    bands: int
    scale: np.ndarray | None = None  # [2 M]
    samples: bool = False

    @property
    def window(self) -> int:
        """The samples of a frame."""
        return 1 if self.samples else round(WINDOW_S * self.rate)

    @property
    def hop(self) -> int:
        """The samples from the beginning of a frame to that of the next."""
        return 1 if self.samples else round(HOP_S * self.rate)

    def frames(self, samples: int) -> int:
        """How many frames so many samples make."""
        return max(0, (samples - self.window) // self.hop + 1)

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        """The frames [T M], float32, of samples [N]."""
        if self.samples:
            return self.scaled(sound[:, None]).astype(np.float32)
        from scipy.fft import rfft  # it takes a moment to import

        size, count = 1 << (self.window - 1).bit_length(), self.frames(len(sound))
        if not count:
            return np.zeros((0, self.bands), np.float32)
        rows = np.lib.stride_tricks.sliding_window_view(sound.astype(np.float64), self.window)[:: self.hop]  # [T N]
        power = np.abs(rfft(rows * _hann(self.window), size, axis=1)) ** 2  # [T F/2+1]
        return self.scaled(np.log(power @ triangles(self.rate, self.bands, size).T + FLOOR)).astype(np.float32)

    def scaled(self, frames: np.ndarray) -> np.ndarray:
        """Frames [T M] with mean 0 and variance 1, if ``scale`` is that of many like them."""
        return frames if self.scale is None else (frames - self.scale[0]) / self.scale[1]


def scale_of(frames: np.ndarray) -> np.ndarray:
    """Means and deviations [2 M] of the bands over frames [T M]; a band that never changes has the deviation 1."""
    deviation = frames.std(axis=0, dtype=np.float64)
    return np.stack([frames.mean(axis=0, dtype=np.float64), np.where(deviation > 1e-4, deviation, 1.0)])


@lru_cache(maxsize=4)
def _hann(size: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)


def mel(frequency: np.ndarray | float) -> np.ndarray:
    """The place of a frequency in Hz on the mel scale, as the HTK toolkit defines it."""
    return 2595 * np.log10(1 + np.asarray(frequency) / 700)


@lru_cache(maxsize=4)
def triangles(rate: int, bands: int, size: int) -> np.ndarray:
    """The weights [M F/2+1] of the bands: each rises from the middle of the one before to 1 at its own, and falls again.

    The middles are equally far apart on the mel scale, from 0 Hz to half the rate. A narrow band may lie between two
    frequencies of the transform. Then the nearest one has the weight 1.
    """
    edges = 700 * (10 ** (np.linspace(0, mel(rate / 2), bands + 2) / 2595) - 1)  # Hz [M+2]
    frequencies = np.arange(size // 2 + 1) * rate / size
    low, middle, high = (edges[i : i + bands, None] for i in range(3))
    weights = np.clip(np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)), 0, None)
    for band in np.flatnonzero(weights.sum(axis=1) == 0):
        weights[band, np.argmin(np.abs(frequencies - middle[band]))] = 1
    return weights


class SpecAugment(NamedTuple):
    """Masks for training (Park et al. 2019, arXiv 1904.08779): bands and times of an utterance that are set to 0.

    ``bands`` stripes of 0 to ``width`` neighbouring bands, and ``times`` stripes of time, each of 0 to ``share`` of the frames.
    0 is the mean of normalised frames. Each time that an utterance is drawn, other parts of it are hidden, so a model learns to
    rely on no single band or moment.
    """

    bands: int
    width: int
    times: int
    share: float

    def __call__(self, frames: np.ndarray, random: Random) -> np.ndarray:
        """A copy of frames [T M] with masks, a function of the source of random numbers."""
        frames = frames.copy()
        draws = random.uniform((2, self.bands + self.times), np.float64)
        for axis, count, first, longest in ((1, self.bands, 0, min(self.width, frames.shape[1])),
                                            (0, self.times, self.bands, int(self.share * len(frames)))):
            for size, place in draws[:, first : first + count].T:
                length = int(size * (longest + 1))
                start = int(place * (frames.shape[axis] - length + 1))
                key = (slice(None),) * axis + (slice(start, start + length),)
                frames[key] = 0
        return frames
