"""Sound: WAV and FLAC files as samples from -1 to 1 at a rate that is asked for, and back; and samples as one of 256 levels.

The mu-law of ITU-T G.711 makes steps between levels small where sound is soft:

    F(x) = sign(x) ln(1 + 255 |x|) / ln 256,   level = floor(255 (F(x) + 1) / 2 + 1/2)

so that 8 bits are enough for speech. This is the formula as neural networks use it; the standard approximates it by pieces of
straight lines. Silence has level 128.
"""

from __future__ import annotations

import math
import os
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np

from . import files
from .errors import UserError

RATES = 1000, 768_000  # samples a second that a file may have
SUFFIXES = ".wav", ".flac"


def read_wav(path: str | os.PathLike, rate: int) -> tuple[np.ndarray, list[str]]:
    """The samples of a WAV file, float32 [N] in -1 ... 1, at ``rate`` samples a second, and what was done to them, in words.

    Several channels become their mean, another rate is resampled (polyphase, with SciPy's low-pass filter), and what is louder
    than 1, in a file of floating-point numbers, is clipped. The file may hold integers of 8 to 64 bits or floating-point
    numbers. UserError names a file that cannot be read, ends early, holds no sound or a number that is not finite.
    """
    from scipy.io import wavfile  # it takes a moment to import

    content = _content(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks with a title and the like
            warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
            before, samples = wavfile.read(BytesIO(content))
    except Exception as error:  # what SciPy raises at bytes that are no WAV file is of any kind
        raise UserError(f"{os.fspath(path)}: is no WAV file that can be read: {str(error).rstrip('.')}") from None
    return prepared(path, samples, before, rate)


def _content(path: str | os.PathLike) -> bytes:
    try:
        return files.read(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{os.fspath(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_sound(path: Path, rate: int) -> tuple[np.ndarray, list[str]]:
    """The samples [N] of a .wav or .flac file at ``rate``, and what was done to them; UserError if it cannot be read."""
    if path.suffix.lower() != ".flac":
        return read_wav(path, rate)
    try:
        import soundfile
    except ImportError:
        raise UserError(f"{path}: a FLAC file needs the package soundfile: pip install soundfile, or give WAV files") from None
    try:
        samples, before = soundfile.read(BytesIO(_content(path)), dtype="float32", always_2d=True)
    except RuntimeError as error:  # soundfile's own error is one
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise UserError(f"{path}: is no FLAC file that can be read: {reason}") from None
    return prepared(path, samples, before, rate)


class NoSound(UserError):
    """A file that can be read, and holds not a single sample."""


def prepared(path: str | os.PathLike, samples: np.ndarray, before: int, rate: int) -> tuple[np.ndarray, list[str]]:
    """What ``read_wav`` gives, of the samples [N] or [N channels] of a file at ``before`` samples a second."""
    if not RATES[0] <= before <= RATES[1]:
        raise UserError(f"{os.fspath(path)}: has {before} samples a second, allowed: {RATES[0]} to {RATES[1]}")
    if not samples.size:
        raise NoSound(f"{os.fspath(path)}: holds no sound")
    notes = []
    if samples.dtype == np.uint8:
        samples = (samples - 128.0) / 128
    elif samples.dtype.kind == "i":  # 24 bits stand in the upper ones of 32
        samples = samples / -float(np.iinfo(samples.dtype).min)
    elif not np.isfinite(samples).all():
        raise UserError(f"{os.fspath(path)}: holds a sample that is not finite")
    if samples.ndim > 1:
        if samples.shape[1] > 1:
            notes.append(f"{samples.shape[1]} channels become their mean")
        samples = samples.mean(axis=1)
    if np.abs(samples).max() > 1:
        notes.append("what is louder than full scale is clipped")
        samples = np.clip(samples, -1, 1)
    if before != rate:
        from scipy.signal import resample_poly

        notes.append(f"{before} samples a second are resampled to {rate}")
        common = math.gcd(before, rate)
        samples = np.clip(resample_poly(samples, rate // common, before // common), -1, 1)
    return samples.astype(np.float32), notes


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write samples [N] in -1 ... 1 as a WAV file of 16 bits with one channel; RunError when the disk refuses."""
    from scipy.io import wavfile

    content = BytesIO()
    wavfile.write(content, rate, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16))
    files.replace(path, content.getvalue())


def mu_law(samples: np.ndarray) -> np.ndarray:
    """The levels, uint8, of samples in -1 ... 1."""
    samples = np.clip(samples, -1, 1).astype(np.float64)
    return np.floor(127.5 * (np.sign(samples) * np.log1p(255 * np.abs(samples)) / math.log(256) + 1) + 0.5).astype(np.uint8)


def from_mu_law(levels: np.ndarray) -> np.ndarray:
    """The samples, float32 in -1 ... 1, that stand for levels: x = sign(F) (256^|F| - 1) / 255 with F = 2 level / 255 - 1."""
    compressed = levels / 127.5 - 1
    return (np.sign(compressed) * (256 ** np.abs(compressed) - 1) / 255).astype(np.float32)
