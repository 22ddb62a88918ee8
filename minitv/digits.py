"""Spoken digits that are computed: voices that say words sound by sound, without a recording.

A word is a row of sounds: "one" is W AH N. In a *vowel* such as AH the throat makes a tone of pitch f₀ with its harmonics k f₀,
and the mouth makes those louder that lie near three frequencies F1, F2 and F3, the *formants*. Mostly by them one hears which
vowel it is. A *fricative* such as S is noise within a band of frequencies. A *stop* such as T is a silence and a short burst of
noise. A *nasal* such as N is a voice through the nose, low and soft. Between two sounds the formants glide.

A speaker is a number. It fixes the size of the mouth, which scales all formants, the pitch, and how breathy, fast and bright
the voice is. An utterance is a function of the speaker and of its own number: which digits, how the pitch moves, how long each
sound takes, and how loud the noise of the room is. A digit lasts 0.1 to 0.8 s, and a pause between two digits 0.02 to 0.24 s.
The formants of the vowels are the averages for men that Peterson and Barney published in 1952.

This is a toy: there is no echo, no real voice, and one accent. But a model that learns it must find words of unknown length and
place, in noise, of voices that it has never heard, as in recordings. It will not understand people.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autograd.random import Random

WORDS = {  # by their sounds
    "zero": "Z IH R OW", "one": "W AH N", "two": "T UW", "three": "TH R IY", "four": "F AO R", "five": "F AY V",
    "six": "S IH K S", "seven": "S EH V AH N", "eight": "EY T", "nine": "N AY N",
}
DIGITS = tuple(WORDS)

VOWELS = {"IY": (270, 2290, 3010), "IH": (390, 1990, 2550), "EH": (530, 1840, 2480), "AE": (660, 1720, 2410),
          "AH": (640, 1190, 2390), "AA": (730, 1090, 2440), "AO": (570, 840, 2410), "UW": (300, 870, 2240),
          "ER": (490, 1350, 1690), "UH": (440, 1020, 2240)}  # formants in Hz
GLIDES = {"EY": ("EH", "IY"), "AY": ("AA", "IY"), "OW": ("AO", "UW"), "W": ("UW", "UH"), "R": ("ER", "ER"), "N": ("N", "N")}
NASAL = (250, 1300, 2300)
BANDWIDTHS = (80.0, 110.0, 160.0)  # of the formants, in Hz


class Sound(NamedTuple):
    """How a sound is made: the formants at its beginning and end, its voice and noise, the band of the noise, its duration."""

    first: tuple[float, float, float]
    last: tuple[float, float, float]
    voice: float  # amplitude
    noise: float
    band: tuple[float, float]  # Hz
    seconds: tuple[float, float]  # shortest and longest


def _sound(name: str) -> list[Sound]:
    """The parts of a sound: one, and for a stop its silence and its burst."""
    neutral = VOWELS["AH"]
    noises = {"S": (0.5, 0.0, (3000, 8000)), "Z": (0.3, 0.35, (3000, 8000)), "F": (0.12, 0.0, (800, 8000)),
              "TH": (0.10, 0.0, (1200, 8000)), "V": (0.06, 0.4, (800, 8000))}
    if name in noises:
        noise, voice, band = noises[name]
        return [Sound(VOWELS["UW"] if voice else neutral, neutral, voice, noise, band, (0.07, 0.13))]
    if name in ("T", "K"):
        band = (2500, 8000) if name == "T" else (1200, 2600)
        return [Sound(neutral, neutral, 0, 0, (500, 4000), (0.03, 0.06)), Sound(neutral, neutral, 0, 0.5, band, (0.01, 0.03))]
    first, last = (NASAL if part == "N" else VOWELS[part] for part in GLIDES.get(name, (name, name)))
    voice = {"N": 0.35, "W": 0.6, "R": 0.6}.get(name, 1.0)
    seconds = (0.06, 0.11) if voice < 1 else (0.09, 0.18) if name in GLIDES else (0.07, 0.15)
    return [Sound(first, last, voice, 0.01, (500, 4000), seconds)]


SOUNDS = {name: _sound(name) for word in WORDS.values() for name in word.split()}
SPEAKERS, UTTERANCES = Random(0).split(2**62), Random(1).split(2**62)
BLOCK_S = 0.005  # amplitudes are constant for so long
GAP_S = (0.02, 0.20)  # between two words
EDGE_S = (0.05, 0.25)  # before the first and after the last
QUIETER = 25  # dB from the noisiest room to the most quiet one


def digits_of(speaker: int, number: int, longest: int = 5) -> list[str]:
    """The words of an utterance: 1 to ``longest`` digits; all lengths and all digits are equally likely."""
    count, *digits = UTTERANCES.split(speaker, number, 0).uniform((1 + longest,), np.float64)
    return [DIGITS[int(10 * digit)] for digit in digits[: 1 + int(longest * count)]]


def say(words: list[str], speaker: int, number: int, rate: int, snr: float = 5.0) -> np.ndarray:
    """The sound of an utterance, float32 [N] at ``rate`` samples a second: a function of the arguments alone.

    The voice is ``snr`` to ``snr`` + 25 dB louder than the noise of its room.
    """
    voice, random = SPEAKERS.split(speaker).uniform((5,), np.float64), UTTERANCES.split(speaker, number, 1)
    mouth, pitch, breath = 0.85 + 0.35 * voice[0], 90 + 160 * voice[1], 0.02 * voice[2]
    tempo, brightness = 0.8 + 0.4 * voice[3], 0.6 + 0.8 * voice[4]
    parts = [_silence(random.split(0), EDGE_S)]
    for i, word in enumerate(words):
        parts += [part for name in WORDS[word].split() for part in SOUNDS[name]]
        parts.append(_silence(random.split(1, i), EDGE_S if i == len(words) - 1 else GAP_S))
    draws = random.split(2).uniform((len(parts), 2), np.float64)
    block = round(BLOCK_S * rate)
    spans = [max(1, round((p.seconds[0] + u * (p.seconds[1] - p.seconds[0])) * tempo / BLOCK_S))
             for p, u in zip(parts, draws[:, 0], strict=True)]  # in blocks
    count = sum(spans)
    ends = np.cumsum(spans)
    # Formants, voice and noise at every block: straight lines within a sound, and smoothed over neighbouring sounds.
    along = np.concatenate([(np.arange(n) + 0.5) / n for n in spans])  # [blocks]
    which = np.repeat(np.arange(len(parts)), spans)
    first, last = (np.array([getattr(p, end) for p in parts], float)[which] for end in ("first", "last"))
    formants = _smooth(first + (last - first) * along[:, None], 7) * mouth  # [blocks 3]
    loud = np.array([p.voice * (0.7 + 0.6 * u) for p, u in zip(parts, draws[:, 1], strict=True)])
    level = _smooth(loud[which][:, None], 3)[:, 0]  # [blocks]
    drift = np.interp(np.arange(count), np.linspace(0, count, 6), random.split(3).uniform((6,), np.float64))
    melody = pitch * (1.08 - 0.16 * np.arange(count) / count) * (0.94 + 0.12 * drift)  # f₀ falls towards the end [blocks]
    sound = _voiced(melody, formants, level, block, rate, brightness)
    hiss = random.split(4).normal((len(sound),), np.float64)
    for part, end, span in zip(parts, ends, spans, strict=True):
        strength = part.noise + breath * part.voice
        if strength:
            piece = slice((end - span) * block, end * block)
            sound[piece] += strength * _band(hiss[piece], part.band, rate) * np.hanning(span * block + 2)[1:-1] ** 0.25
    gain, louder = random.split(5).uniform((2,), np.float64)
    power = np.mean(sound**2) + 1e-12
    room = random.split(6).normal((len(sound),), np.float64) * np.sqrt(power / 10 ** ((snr + QUIETER * louder) / 10))
    sound = sound + room
    return (sound * (0.1 + 0.5 * gain) / np.abs(sound).max()).astype(np.float32)


def _silence(random: Random, seconds: tuple[float, float]) -> Sound:
    low, high = seconds
    length = low + (high - low) * float(random.uniform((), np.float64))
    return Sound(VOWELS["AH"], VOWELS["AH"], 0, 0, (500, 4000), (length, length))


def _smooth(x: np.ndarray, reach: int) -> np.ndarray:
    """The mean over ``reach`` neighbouring rows of x [n c]."""
    padded = np.pad(x, ((reach // 2, reach // 2), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, reach, axis=0).mean(axis=-1)


def _voiced(pitch: np.ndarray, formants: np.ndarray, level: np.ndarray, block: int, rate: int, brightness: float) -> np.ndarray:
    """Harmonics of the pitch [blocks], as loud as the formants [blocks 3] make them: [N]."""
    phase = 2 * np.pi * np.cumsum(np.repeat(pitch, block)) / rate  # [N]
    harmonics = np.arange(1, int(rate / 2 / pitch.min()) + 1)
    frequency = harmonics * pitch[:, None]  # [blocks n]
    amplitude = np.zeros(frequency.shape)
    for i, width in enumerate(BANDWIDTHS):
        resonance = 1 / (1 + ((frequency - formants[:, i : i + 1]) / width) ** 2)
        amplitude += brightness**i * resonance / (1 + i)
    amplitude = (amplitude + 0.003) * (frequency < 0.48 * rate) * level[:, None]
    # e^(ikφ) by powers of e^(iφ), a block of samples at a time with its own amplitudes.
    turn = np.exp(1j * phase).astype(np.complex64).reshape(len(pitch), block)
    total, power = np.zeros(turn.shape, np.float32), turn.copy()
    ramp = (np.arange(block, dtype=np.float32) + 0.5) / block
    after = np.concatenate([amplitude[1:], amplitude[-1:]]).astype(np.float32)
    amplitude = amplitude.astype(np.float32)
    for n in range(len(harmonics)):
        total += power.imag * (amplitude[:, n : n + 1] + (after[:, n : n + 1] - amplitude[:, n : n + 1]) * ramp)
        power *= turn
    return total.reshape(-1).astype(np.float64)


def _band(noise: np.ndarray, band: tuple[float, float], rate: int) -> np.ndarray:
    """Noise [n] of a band of frequencies, with the deviation 1."""
    low, high = band[0], min(band[1], 0.5 * rate)
    spectrum = np.fft.rfft(noise)
    frequency = np.arange(len(spectrum)) * rate / max(len(noise), 1)
    inside = 1 / (1 + (np.maximum(low - frequency, 0) / 300) ** 4 + (np.maximum(frequency - high, 0) / 300) ** 4)
    shaped = np.fft.irfft(spectrum * inside, len(noise))
    return shaped / (shaped.std() + 1e-9)
