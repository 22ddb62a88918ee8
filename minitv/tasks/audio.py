"""Audio: sound in 8 bits a sample, predicted one sample after the other.

A sample is a number from -1 to 1, how far the air is moved at a moment. It is rounded to one of 256 levels, which are dense
where sound is soft: those of the mu-law of ITU-T G.711, F(x) = sign(x) ln(1 + 255 |x|) / ln 256 in equal steps
(minitv/audio.py). A level is a token. A model reads a window of --context samples and is asked for the one that follows each of
them, as in a text of bytes. Windows do not overlap in a pass over the sound, so a sample at the beginning of a window is
guessed from few others.

A second has many samples: 8000 at the default rate, of which the default context of 256 sees 0.03 seconds, and a tone of 200
hertz repeats every 40. MEGABYTE was made for such sequences: its patches are short pieces of sound.

The loss is the mean of -ln p of the right levels. The metric is the same in bits, -log₂ p: how many bits a sample takes if the
sound is stored with the model's probabilities. Fewer are better, and 8 bits need no model.

Without --data the sound is made up, a minute to train on and 6 seconds that are held out, the same in every run: notes of a
scale, each either a plucked string or a sung vowel, with a little noise.

- A string is the algorithm of Karplus and Strong 1983 (Computer Music Journal 7(2)): noise of N samples, then
  y[n] = 0.996 (y[n - N] + y[n - N - 1]) / 2, a delay line with a low-pass filter, whose pitch is rate / (N + 1/2).
- A vowel is a sum of the harmonics of its pitch. Each is as loud as three resonances of the mouth make it; their frequencies
  are those of Peterson and Barney 1952 (J. Acoust. Soc. Am. 24(2)), men's voices.

Of sound in files the last tenth is held out. Baselines count in the training part, as minitv/ngram.py does. They estimate the
probability of a level in four ways: all levels are alike (uniform); by how often it occurs in all samples; by how often behind
the same sample; and by how often where a straight line through the two samples before arrives at the same level. For the sound
that is made up, these are 8, 7.75, 6.35 and 5.85 bits. Noise costs bits in every model, since nothing before it says what it
will be.

    minitv train megabyte --task audio --patch 16                      the sound that is made up
    minitv train transformer --task audio --data DIR                   WAV or FLAC files in a folder
    minitv sample DIR --seconds 2                                      writes sample.wav behind one sample of silence
    minitv sample DIR --seconds 2 --complete 0.5                       continues a second of the sound that was held out
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autograd.random import Random

from ..audio import SUFFIXES, from_mu_law, mu_law, read_sound, write_wav
from ..config import check, option
from ..corpus import COUNTED
from ..data import Batches, windows
from ..errors import UserError, naming
from ..ngram import after, sample
from ..options import DATA, STEPS
from ..report import duration
from ..sample import generate, written
from ..sources import rank
from ..task import Batch
from ._media import Media, digest

LEVELS, SILENCE = 256, 128
SOUND = Random(4).split(2**63)  # the source of the sound that is made up
SECONDS, HELD_OUT_SECONDS = 60, 6
TRAINING = 0.9  # the share of samples in files
SCALE = np.array([0, 3, 5, 7, 10, 12, 15, 17, 19])  # semitones above 110 hertz
VOWELS = np.array([(270, 2290, 3010), (530, 1840, 2480), (730, 1090, 2440), (570, 840, 2410), (300, 870, 2240)])  # hertz
SHOWN, HEIGHT = 100, 9  # samples and lines of a curve on the screen
PAUSE = 0.25  # seconds between sounds in a file


@dataclass(frozen=True)
class AudioOptions:
    """audio"""

    data: str = option(
        "", "sound: a file, WAV or FLAC (with the package soundfile), or a folder (every such file in it and below, in the "
        "order of the SHA-256 of their names); "
        "without it, strings and vowels that are made up. The last tenth is held out",
        metavar="PATH", group=DATA, resumable=True, harmless=True,
    )
    rate: int = option(8000, "samples a second; sound of another rate is resampled", low=1000, high=192_000)
    eval_tokens: int = option(32_000, "held-out samples read at an evaluation", low=1, group=STEPS, resumable=True)

    __post_init__ = check


class Audio(Media, name="audio", summary="sound in 8 bits a sample (mu-law), one sample after the other"):
    """Levels as ids; every sample of a window is asked for, given those before it in the window."""

    Options = AudioOptions
    defaults = {"context": 256, "batch": 8, "steps": 1000, "eval_every": 250}  # noqa: RUF012
    metric, unit, key = "bits per sample", "bits/sample", "bps"
    after = "write a sound with: minitv sample {directory}"
    writes, suffix = ("out", "complete", "seconds"), ".wav"
    vocab = LEVELS

    def __init__(self, options: AudioOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self.context, self.notes = options, context, []
        if options.data:
            with naming("--data"):
                levels, self.notes, files = read_levels(options.data, options.rate)
            cut = int(TRAINING * len(levels))
            self.description, self.sha256 = f"{options.data}, {files} file{'s' * (files != 1)}", digest(levels)
        else:
            levels, cut = synthesis(options.rate), SECONDS * options.rate
            self.description, self.sha256 = "strings and vowels that are made up", ""
        self.description += f": {duration(len(levels) / options.rate)}"
        self.form = {"rate": options.rate}
        self.check_same(saved)
        whole = self._whole = self.holds_out_all(saved)
        self.training, self.test = levels[: 0 if whole else cut], levels[0 if whole else cut :]
        if not whole:
            _check(self.training, context, "the training part")
            self._batches = Batches(self.training, batch, context, seed)
        _check(self.test, context, "what is held out")

    def batch(self, step: int) -> Batch:
        return Batch(*self._batches.batch(step))

    def held_out(self) -> Batch:
        return Batch(*windows(self.test, self.context, len(self.test) if self._whole else self.options.eval_tokens))

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """Bits per held-out sample of what counting knows of it."""
        result = {"uniform": math.log2(LEVELS)}
        if not len(self.training):
            return result
        training, test = (sample(part, COUNTED).astype(np.int64) for part in (self.training, self.test))
        p: Any = 1 / LEVELS
        for name, context in (("all samples", np.zeros_like), ("the one before", lambda part: np.append(SILENCE, part[:-1]))):
            before, query = context(training), context(test)
            p = after(before, training, query, test, LEVELS, p)
            result[name] = float(-np.log2(p).mean())
            if name == "all samples":
                alone = p
        p = after(_line(training), training, _line(test), test, LEVELS, alone)
        return result | {"the two before, as a line": float(-np.log2(p).mean())}

    def show(self, model: Any, rng: Random) -> str:
        """A curve of samples with which the model continues the held-out part, behind its first ones."""
        prefix = self.test[: max(1, self.context // 2)]
        levels = np.fromiter(generate(model, prefix, SHOWN, rng), np.int64)
        heights = np.round(from_mu_law(levels) / max(np.abs(from_mu_law(levels)).max(), 1e-9) * (HEIGHT // 2)).astype(int)
        rows = range(HEIGHT // 2, -(HEIGHT // 2) - 1, -1)
        curve = ["".join("#" if height == row else "-" if row == 0 else " " for height in heights).rstrip() for row in rows]
        return "\n".join([*curve, f"{SHOWN} samples that the model wrote behind {len(prefix)} of the held-out sound"])

    @classmethod
    def write_file(cls, run: Any, options: Any, path: Path) -> str:
        rate, number = cls.stored_form(run.saved)["rate"], options.count or 1
        length = max(2, round(options.seconds * rate))
        prefix, remark = np.full((number, 1), SILENCE), ""
        if options.complete is not None:
            task, size = run.experiment.begin(run.saved), max(1, int(options.complete * length))
            if number * length > len(task.test):
                raise UserError(f"--seconds: {number} · {options.seconds:g} seconds are to be completed, and "
                                f"{len(task.test) / rate:.3g} are held out")
            prefix = task.test[: number * length].reshape(number, length)[:, :size]  # [N size]
            remark = f"; {size / rate:.3g} seconds of each are the beginning of one that was held out"
        sounds, pause = [], np.zeros(round(PAUSE * rate), np.float32)
        rngs = [Random(options.seed + i) for i in range(number)]
        rest = written(run.model, prefix, length - prefix.shape[1], rngs, **options.drawing())
        for i, levels in enumerate(np.concatenate([prefix, rest], axis=1)):
            sounds += [pause] * bool(i) + [from_mu_law(levels)]
        write_wav(path, np.concatenate(sounds), rate)
        return f"{number} sound{'s' * (number != 1)} of {length / rate:g} seconds, {rate} samples a second{remark}"


def _check(levels: np.ndarray, context: int, part: str) -> None:
    """Raise UserError if a part of the sound has no window."""
    if len(levels) < context + 1:
        many = f"{len(levels)} sample{'s' * (len(levels) != 1)}"
        raise UserError(f"--data: {part} has {many}, and --context {context} needs at least {context + 1}: give longer sound, "
                        "or a smaller --context")


def _line(levels: np.ndarray) -> np.ndarray:
    """Where a straight line through the two samples before arrives, as a level [N]."""
    samples = from_mu_law(levels)
    before, earlier = np.append(0, samples[:-1]), np.append([0, 0], samples[:-2])
    return mu_law(2 * before - earlier).astype(np.int64)


def read_levels(source: str, rate: int) -> tuple[np.ndarray, list[str], int]:
    """The levels uint8 [N] of a sound file or of those in a folder, what was done to them, and the number of files."""
    root = Path(source)
    paths, others = [root], 0
    if root.is_dir():
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
                 and not any(part.startswith(".") for part in path.relative_to(root).parts)]
        paths = [root / name for name in sorted(names, key=rank) if name.lower().endswith(SUFFIXES)]
        others = len(names) - len(paths)
        if not paths:
            raise UserError(f"{source}: holds no WAV or FLAC file")
    parts, counts = [], Counter()
    for path in paths:
        samples, notes = read_sound(path, rate)
        parts.append(mu_law(samples))
        counts.update(notes)
    notes = [text if len(paths) == 1 else f"of {number} of {len(paths)} files: {text}" for text, number in counts.items()]
    notes += [f"left out: {others} that {'are' if others > 1 else 'is'} no WAV or FLAC file{'s' * (others > 1)}"] * (others > 0)
    return np.concatenate(parts), notes, len(paths)


@functools.lru_cache(maxsize=2)
def synthesis(rate: int) -> np.ndarray:
    """The levels uint8 of the sound that is made up: SECONDS for training, then HELD_OUT_SECONDS."""
    parts = []
    for which, seconds in enumerate((SECONDS, HELD_OUT_SECONDS)):
        notes, length = [], 0
        while length < seconds * rate:
            notes.append(note(SOUND.split(which, len(notes)), rate))
            length += len(notes[-1])
        parts.append(np.concatenate(notes)[: seconds * rate])
    sound = np.concatenate(parts)
    return mu_law(sound + 0.0003 * SOUND.split(2).normal(sound.shape, np.float64))


def note(random: Random, rate: int) -> np.ndarray:
    """A string or a vowel, samples [N] in -1 ... 1 of a fifth to half of a second."""
    length, pitch, loudness, kind, vowel, phase = random.split(0).uniform((6,), np.float64)
    count = int((0.2 + 0.3 * length) * rate)
    hertz = 110 * 2 ** (SCALE[int(pitch * len(SCALE))] / 12)
    sound = (string(random.split(1), hertz, count, rate) if kind < 0.5 else
             sing(hertz, VOWELS[int(vowel * len(VOWELS))], count, rate, 2 * np.pi * phase))
    sound *= np.minimum(1, np.arange(count, 0, -1) / (0.01 * rate))  # it ends softly
    return sound * (0.3 + 0.5 * loudness) / np.abs(sound).max()


def string(random: Random, hertz: float, count: int, rate: int) -> np.ndarray:
    """A plucked string [N], block of one period after block."""
    period = max(2, round(rate / hertz - 0.5))
    block, last, blocks = 2 * random.uniform((period,), np.float64) - 1, 0.0, []
    while period * len(blocks) < count:
        blocks.append(block)
        block, last = 0.498 * (block + np.append(last, block[:-1])), block[-1]
    return np.concatenate(blocks)[:count]


def sing(hertz: float, formants: np.ndarray, count: int, rate: int, phase: float) -> np.ndarray:
    """A vowel [N] whose pitch trembles by one in a hundred, 5 times a second."""
    time = np.arange(count) / rate
    angle = 2 * np.pi * hertz * time + 0.01 * hertz / 5 * np.sin(2 * np.pi * 5 * time + phase)
    harmonics = np.arange(1, int(0.45 * rate / hertz) + 1)[:, None]
    resonance = (1 / (1 + ((harmonics * hertz - formants) / 80) ** 2)).sum(axis=1, keepdims=True)
    return ((resonance + 0.02) / harmonics * np.sin(harmonics * angle)).sum(axis=0) * np.minimum(1, time / 0.02)
