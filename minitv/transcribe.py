"""minitv transcribe: what a trained model hears in a recording, at once or as a stream, and a picture of how it came to it.

    minitv transcribe runs/mine FILE.wav --picture heard.png      a model of: minitv train conformer --out runs/mine
    minitv transcribe runs/mine FILE.wav --stream                 a model that was trained with --chunk

    recogniser = Recogniser(load("runs/mine"))
    recogniser.transcript(sound, beam=8)                 # samples [N] from -1 to 1 at recogniser.front.rate
    for text in recogniser.stream(pieces): ...           # samples [n], [n], ... as they come

A file is WAV, or FLAC with the package soundfile. One of another rate than the model's is resampled, and several channels
become their mean (minitv/audio.py). Without --beam the best class of each position is taken; equal neighbours become one and
blanks are dropped (minitv/ops/ctc_loss/decoding.py).

A stream gives what the whole recording gives without --beam: a frame depends on its own samples, the logits of a position on
its chunk and those before, and what is written at a position on its class and the one before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from autograd import no_grad, to_numpy
from autograd.cpu.process import blas_threads, memory
from autograd.device import select

from . import room
from .audio import read_sound
from .digits import WORDS, say
from .errors import UserError, device_errors, plain, quoted
from .ops.ctc_loss.decoding import align, beam_search, collapse
from .options import TranscribeOptions
from .picture import COLOURS, INK, save, sheet
from .report import tell
from .sample import Trained, load
from .tasks.speech import Speech, normalised, stored_alphabet, stored_scale

PIECE_S = 0.1  # of a stream
SCORES = 16  # bytes for two positions that see each other, in a head: scores, weights, and scores of all distances


class Recogniser:
    """A trained model of speech, with the spectrogram and the alphabet that it was trained with."""

    def __init__(self, run: Trained):
        experiment = run.experiment
        if not issubclass(experiment.task, Speech):
            raise UserError(f"the model was trained on the task {experiment.task.name}, which has no sound; train one with: "
                            "minitv train conformer")
        self.model, self.options, self.heads = run.model, experiment.data, experiment.mixer.heads
        self.alphabet = stored_alphabet(run.saved)
        self.front = self.options.front(stored_scale(run.saved, self.options.front().bands))

    def frames(self, sound: np.ndarray) -> np.ndarray:
        """What the model reads, [T M], of samples [N]."""
        return normalised(self.front, self.front._replace(scale=None)(sound), self.options.normalise)

    def logits(self, sound: np.ndarray) -> np.ndarray:
        """What the model says of every position, [T' V], of samples [N]."""
        frames = self.frames(sound)
        size = SCORES * self.heads * int(self.model.positions(len(frames))) ** 2
        if size > memory():
            raise UserError(f"{len(sound) / self.front.rate:.0f} s of sound at once would take {room.text(size)} of memory, "
                            f"and this machine has {room.text(memory())}: give shorter recordings, or --stream with a model "
                            "that was trained with --chunk")
        with no_grad(), blas_threads(1):
            logits = to_numpy(self.model(frames[None]).data)[0]
        return logits[: int(self.model.positions(len(frames)))]

    def classes(self, logits: np.ndarray, beam: int = 1) -> Sequence[int]:
        """The labels of the best path of logits [T' V], or, with a beam above 1, of the best transcript found."""
        if beam > 1:
            return beam_search(logits, beams=beam)[0][0]
        return collapse(logits.argmax(axis=-1).tolist())

    def transcript(self, sound: np.ndarray, beam: int = 1) -> str:
        """What is said in samples [N]."""
        return self.alphabet.decode(self.classes(self.logits(sound), beam))

    def stream(self, pieces: Iterable[np.ndarray]) -> Iterator[str]:
        """The text of a sound that comes in pieces [n], whenever there is more of it."""
        if self.options.normalise != "corpus":
            raise UserError("--stream: the model was trained with --normalise utterance, which a stream does not know")
        state, front = self.model.init_state(1), self.front
        rest, previous, written = np.zeros(0, np.float32), None, []

        def read(frames: np.ndarray, last: bool) -> str:
            nonlocal state, previous
            with no_grad(), blas_threads(1):
                logits, state = self.model.prefill(frames[None], state, last)
            path = to_numpy(logits.data)[0].argmax(axis=-1).tolist()
            before = self.alphabet.decode(written)
            written.extend(collapse(path, previous=previous))
            previous = path[-1] if path else previous
            return self.alphabet.decode(written)[len(before):]

        for piece in pieces:
            rest = np.concatenate([rest, piece])
            frames = front(rest)
            rest = rest[len(frames) * front.hop :]
            if text := read(frames, False):
                yield text
        if text := read(np.zeros((0, front.bands), np.float32), True):
            yield text


def transcribe(directory: str, paths: Sequence[str], options: TranscribeOptions) -> None:
    """Print what is said in every file, or in what ``options.say`` makes; UserError if there is nothing to read.

    Of several files, one that cannot be read does not stop the others: it is told, and is an error at the end.
    """
    with device_errors():
        select(options.device)
    if bool(paths) == (options.say is not None):
        raise UserError("FILE and --say: give one of them, a recording or digits that a computed voice is to say")
    if options.picture and len(paths) > 1:
        raise UserError(f"--picture: it shows one recording, and {len(paths)} are given")
    recogniser = Recogniser(load(directory, options.checkpoint))
    recogniser.model.to(options.device)
    rate = recogniser.front.rate
    if options.picture:
        sheet(Path(options.picture), "--picture")  # what does not fit is told before the work
    unread: list[str] = []
    for name in paths or [options.say]:
        if options.say is not None:
            sound, notes = say(_words(options.say), options.speaker, 0, rate), []
        else:
            try:
                sound, notes = read_sound(Path(name), rate)
            except UserError as error:
                if len(paths) == 1:
                    raise
                tell(str(error), "note      ")
                unread.append(name)
                continue
        for note in notes:
            tell(f"{plain(name)}: {note}", "note      ")
        if recogniser.model.positions(recogniser.front.frames(len(sound))) < 1:
            tell(f"{plain(name)}: {len(sound) / rate:.3f} s are too short for a single position of the model", "note      ")
        heading = f"{plain(name)}: " if len(paths) > 1 else ""
        if options.stream:
            step = round(PIECE_S * rate)
            print(heading, end="", flush=True)
            for text in recogniser.stream(sound[i : i + step] for i in range(0, len(sound), step)):
                sys.stdout.write(text)
                sys.stdout.flush()
            print()
        else:
            print(heading + recogniser.transcript(sound, options.beam))
        if options.picture:
            tell(f"picture: {picture(recogniser, sound, options.beam, Path(options.picture), name)}")
    if unread:
        raise UserError(f"{len(unread)} of {len(paths)} files cannot be read: {', '.join(map(plain, unread))}")


def _words(text: str) -> list[str]:
    """The digits of a text, as words or as figures; UserError for another word."""
    words = [list(WORDS)[int(word)] if word.isdecimal() and len(word) == 1 else word.lower() for word in text.split()]
    if unknown := [word for word in words if word not in WORDS]:
        raise UserError(f"--say: {quoted(unknown[0])} is no digit, allowed: {', '.join(WORDS)}")
    if not words:
        raise UserError(f"--say: there is no word in it, allowed: {', '.join(WORDS)}")
    return words


def picture(recogniser: Recogniser, sound: np.ndarray, beam: int, path: Path, title: str) -> Path:
    """Draw the spectrogram, the probability of each label that was written and of the blank, and where each label stands."""
    canvas = sheet(path, "--picture", height=6.4)
    frames, logits = recogniser.frames(sound), recogniser.logits(sound).astype(np.float64)
    classes = recogniser.classes(logits, beam)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))  # [T' V]
    subsample, hop = recogniser.model.subsample, recogniser.front.hop / recogniser.front.rate
    seconds = (np.arange(len(logits)) * subsample.stride + (subsample.window - 1) / 2) * hop  # the middle of each position
    figure = canvas.figure
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2.4, 0.9))
    if recogniser.front.samples:
        above.plot(np.arange(len(frames)) * hop, frames[:, 0], color=COLOURS[0], linewidth=0.4)
    else:
        above.imshow(frames.T, origin="lower", aspect="auto", cmap="magma",
                     extent=(0, max(len(frames), 1) * hop, 0, frames.shape[1]))
    above.set_ylabel("sound" if recogniser.front.samples else "mel band", color=INK)
    middle.plot(seconds, probabilities[:, 0], color="#aaaaaa", linewidth=1, label="blank")
    units = recogniser.alphabet.units
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(dict.fromkeys(classes))}
    for label, colour in colours.items():
        middle.plot(seconds, probabilities[:, label], color=colour, linewidth=1.6, label=units[label - 1])
    middle.set_ylabel("probability", color=INK)
    middle.set_ylim(-0.03, 1.03)
    middle.legend(loc="upper left", bbox_to_anchor=(1.005, 1), fontsize=8, frameon=False)
    where = align(logits, classes) if len(logits) else []
    before = 0
    for at, label in zip(seconds, where, strict=True):
        if label and label != before:
            below.text(at, 0.5, units[label - 1], color=colours[label], ha="center", va="center", fontsize=9, parse_math=False)
            above.axvline(at, color="white", linewidth=0.6, alpha=0.6)
        before = label
    below.set_yticks([])
    below.set_ylabel("written", color=INK)
    below.set_xlabel("seconds", color=INK)
    figure.suptitle(plain(title, 90), fontsize=10, color=INK, parse_math=False)
    return save(canvas, path)
