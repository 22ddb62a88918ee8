"""Speech: the words of recordings are asked for, and nobody says where in a recording each word stands.

    minitv train conformer --out runs/mine
    minitv transcribe runs/mine --say "three one four"
    minitv transcribe runs/mine FILE.wav --beam 8
    minitv eval runs/mine --data DIR                              the word error rate of other recordings

A model reads frames [B T M] of B *utterances*, recordings with what is said in them: the spectrogram of minitv/mel.py has M
bands and a frame every 10 ms. An utterance of a batch has lengths[b] frames, and zeros behind them. The model gives logits for
its positions, and says itself how many of them count. Class 0 of the V classes is the blank, and the others are the words or
characters of the training transcripts (--labels). The loss is that of CTC, which sums over all places where the words can stand
(minitv/ops/ctc_loss). Any model that reads frames can learn the task; the variant conformer does.

Without --data, voices that are computed say one to five digits (minitv/digits.py), so V is 11. Training has --utterances of
them, each by another voice, and the held-out voices are others. --data DIR takes recordings with transcripts as LibriSpeech has
them: a file NAME.trans.txt has a line for each recording, its name and what is said. The recording of that name is a .wav or
.flac file in the same folder, of any rate; it is resampled to --rate.
A recording without a transcript is left out, and is named on the screen.

    DIR/84/121123/84-121123.trans.txt           84-121123-0000 GO DO YOU HEAR
    DIR/84/121123/84-121123-0000.flac

The first folder below DIR is the speaker, here 84. A tenth of the speakers are held out, and training does not hear them: a
word that was learned from a voice is easier to hear from the same voice. If there is one speaker, a tenth of the recordings is
held out.

The metric is the word error rate. The model writes the best class of each position, without repetitions and blanks. The rate
counts the words that must be changed, left out or added to make the transcripts of what it wrote, and divides them by the words
of the transcripts. The interval is that of the bootstrap over utterances (minitv/error_rate.py). The baseline is a model that
writes nothing: its rate is 1. Most positions have no new word, so models learn first to write blanks alone, and stay at 1 for
some time.

What to choose. --rate 16000 and --mels 80 suit recordings of real speech. 8000 samples a second hold no frequency above 4000
Hz, and there S and F differ most. --labels word knows only words of the training transcripts, so a large vocabulary needs
characters. A character needs a position of its own, and a fast speaker more positions: --subsampling 2. --normalise corpus is
needed for streams; utterance suits recordings by different microphones. A lower --snr makes digits harder. More or wider masks
(SpecAugment) suit little data and longer runs. All frames of --data stay in memory: at --mels 40 an hour takes 58 MB.

Limits. Computed digits are a toy: a model that learned them does not understand people. An utterance may have --context frames,
by default 1000, which are 10 s; longer recordings are left out. One that has too few positions for its labels counts nothing in
the loss, and is named on the screen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, no_grad, to_numpy
from autograd.device import beside
from autograd.random import Random

from .. import files, room
from ..audio import SUFFIXES, NoSound, read_sound
from ..config import check, option, settings
from ..digits import DIGITS, digits_of, say
from ..error_rate import bootstrap, edits
from ..errors import CheckpointError, UserError, plain, quoted
from ..mel import FrontEnd, SpecAugment, scale_of
from ..models.conformer import Conformer
from ..ops import ctc_loss
from ..ops.ctc_loss import frames_needed
from ..ops.ctc_loss.decoding import greedy
from ..options import DATA, STEPS
from ..report import count, tell
from ..sources import rank
from ..task import NOTHING, Task
from ._drawn import check_drawn

BATCHES, MASKS = range(2)  # the independent random streams of a run
STRANGERS = 10**6  # held-out speakers of the digits have numbers from here on
MEASURED = 32  # utterances of digits whose frames say how all are normalised
SHOWN = 3  # utterances on the screen
NAMED = 5  # utterances that a note names
UNITS = 10**7  # bytes of a vocab.json at most


@dataclass(frozen=True)
class SpeechOptions:
    """speech"""

    data: str = option("", "folder of recordings (WAV, or FLAC with the package soundfile) and transcripts (*.trans.txt), as "
                       "LibriSpeech has them; without it, digits that computed voices say", metavar="DIR", group=DATA,
                       resumable=True, harmless=True)
    val_data: str | None = option(None, "folder of held-out recordings; none = a tenth of the speakers of --data, or of its "
                                  "recordings where one speaks them all", metavar="DIR", group=DATA, resumable=True,
                                  harmless=True)
    labels: str | None = option(None, "what the model writes: words or characters; none = words of the digits, characters of "
                                "--data", choices=("word", "character"))
    rate: int = option(8000, "samples a second that recordings are brought to", low=2000, high=192_000)
    frames: str = option("bands", "what a model reads: bands of a spectrogram every 10 ms, or the samples themselves, for "
                         "--subsampling wave", choices=("bands", "samples"), newer=True)
    mels: int = option(40, "bands of the spectrogram", low=1, high=1024)
    normalise: str = option("corpus", "mean and variance of the bands are those of all training data, or of each utterance, "
                            "which a stream cannot know", choices=("corpus", "utterance"))
    frequency_masks: int = option(2, "stripes of bands that are hidden in each training utterance (SpecAugment)", low=0,
                                  high=100)
    frequency_width: int = option(8, "bands in such a stripe, at most", low=0, high=1024)
    time_masks: int = option(2, "stripes of time that are hidden in each training utterance", low=0, high=100)
    time_share: float = option(0.05, "share of the utterance in such a stripe, at most", low=0, high=1)
    utterances: int = option(4000, "different training utterances of digits, of as many voices", low=1, high=10**6)
    longest: int = option(5, "digits in an utterance, at most", low=1, high=50)
    snr: float = option(5.0, "dB by which a computed voice is louder than its room, at least; 25 dB more at most", low=-40,
                        high=100)
    eval_examples: int = option(200, "held-out utterances of digits", low=1, high=10**6, group=STEPS, resumable=True)

    def __post_init__(self) -> None:
        check(self)
        for name in ("mels", "frequency_masks", "frequency_width") if self.frames == "samples" else ():
            setting = settings(type(self))[name]
            if getattr(self, name) != setting.default:
                raise UserError(f"{setting.flag}: this concerns --frames bands, and samples have no bands")

    def front(self, scale: np.ndarray | None = None) -> FrontEnd:
        """How sound becomes frames."""
        samples = self.frames == "samples"
        return FrontEnd(self.rate, 1 if samples else self.mels, scale, samples)


class Utterances(NamedTuple):
    """A batch: frames, labels, how many of the frames count, and the numbers of the utterances in their corpus."""

    inputs: np.ndarray  # frames [B T M], 0 where they do not count
    labels: np.ndarray  # [B U], NOTHING behind the last
    lengths: np.ndarray  # frames that count [B]
    numbers: np.ndarray  # [B]

    def part(self, rows: slice) -> Utterances:
        """Some of the utterances, without the padding that only longer ones need."""
        part = type(self)(*(array[rows] for array in self))
        return part._replace(inputs=part.inputs[:, : max(part.lengths.max(initial=0), 1)])

    @property
    def length(self) -> int:
        """Positions of an utterance as a model has them that reads every fourth frame."""
        return -(-self.inputs.shape[1] // 4)

    @property
    def tokens(self) -> int:
        """Frames that count."""
        return int(self.lengths.sum())


class Corpus:
    """Utterances by their numbers: what is said, a name, and frames [T M], float32 and not normalised."""

    speakers: int
    identity: str  # other texts or other names have another one

    def __len__(self) -> int:
        raise NotImplementedError

    def text(self, number: int) -> str:
        raise NotImplementedError

    def name(self, number: int) -> str:
        raise NotImplementedError

    def frames(self, number: int) -> np.ndarray:
        raise NotImplementedError


class Digits(Corpus):
    """Computed voices, one for each utterance, from the speaker with the number ``first`` on, made when they are asked for."""

    def __init__(self, count: int, first: int, longest: int, snr: float, front: FrontEnd):
        self._first, self._longest, self._snr, self._front, self.speakers = first, longest, snr, front, count
        self.identity = f"{count} voices from {first} on, {longest} digits"
        self._made: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.speakers

    def text(self, number: int) -> str:
        return " ".join(digits_of(self._first + number, 0, self._longest))

    def name(self, number: int) -> str:
        return f"speaker {self._first + number}"

    def frames(self, number: int) -> np.ndarray:
        if number not in self._made:
            words = digits_of(self._first + number, 0, self._longest)
            self._made[number] = self._front(say(words, self._first + number, 0, self._front.rate, self._snr))
        return self._made[number]


class Recording(NamedTuple):
    """A recording and its transcript."""

    name: str
    speaker: str
    path: Path
    text: str


class Recordings(Corpus):
    """Recordings on disk. All are read at the beginning; their frames stay in memory.

    Left out, and told, are those without sound or without words, and those of more frames than ``context``.
    """

    def __init__(self, every: Sequence[Recording], front: FrontEnd, context: int, flag: str = "--data"):
        from tqdm import tqdm

        kept, self._frames, notes, total = [], [], {}, 0
        for recording in tqdm(every, desc="reading sound", unit="file", delay=2, leave=False, disable=None):
            try:
                sound, remarks = read_sound(recording.path, front.rate)
            except NoSound:
                sound, remarks = np.zeros(0, np.float32), []
            for note in remarks:
                notes.setdefault(note, []).append(recording.name)
            why = ("there is no sound" if not len(sound) else "there are no words" if not recording.text else
                   f"it has more than --context {context} frames" if front.frames(len(sound)) > context else "")
            if why:
                notes.setdefault(f"left out, because {why}:", []).append(recording.name)
                continue
            kept.append(recording)
            self._frames.append(front(sound))
            total += self._frames[-1].nbytes
            room.check(total, "the frames of the recordings")
        for note, names in notes.items():
            tell(f"{note} {'' if note.endswith(':') else 'in '}{_some(names)}", "note      ")
        if not kept:
            raise UserError(f"{flag}: none of {len(every)} recordings can be used; {next(iter(notes))} {_some(names)}")
        self._kept = kept
        self.speakers = len({recording.speaker for recording in kept})
        texts = "\n".join(f"{recording.name} {recording.text}" for recording in kept)
        self.identity = hashlib.sha256(texts.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def text(self, number: int) -> str:
        return self._kept[number].text

    def name(self, number: int) -> str:
        return self._kept[number].name

    def frames(self, number: int) -> np.ndarray:
        return self._frames[number]


def recordings(folder: str, flag: str) -> list[Recording]:
    """The recordings with transcripts in a folder, by name; UserError says what is missing or cannot be read."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder, a folder with recordings and transcripts is needed")
    by_name: dict[str, Recording] = {}
    for path in sorted(root.rglob("*.trans.txt")):
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8: {getattr(error, 'strerror', None) or error}") from None
        sounds = {sound.stem: sound for suffix in reversed(SUFFIXES) for sound in path.parent.iterdir()
                  if sound.suffix.lower() == suffix and sound.is_file()}  # of two, the WAV file
        for line in filter(str.strip, lines):
            name, *words = line.split()
            if name not in sounds:
                raise UserError(f"{path}: {plain(name, 60)} has a transcript and no recording, "
                                f"{' or '.join(name + suffix for suffix in SUFFIXES)} is needed beside it")
            if name in by_name:
                raise UserError(f"{path}: {plain(name, 60)} has a transcript in {by_name[name].path.parent} already")
            above = path.parent.relative_to(root).parts
            speaker = above[0] if above else name.partition("-")[0]
            by_name[name] = Recording(name, speaker, sounds[name], " ".join(words))
    if not by_name:
        raise UserError(f"{flag} {folder}: there is no transcript, a file *.trans.txt with lines of a name and a text")
    known = {recording.path.with_suffix("") for recording in by_name.values()}
    if silent := [path.name for path in sorted(root.rglob("*"))
                  if path.suffix.lower() in SUFFIXES and path.with_suffix("") not in known]:
        tell(f"{flag} {folder}: left out, because there is no transcript: {_some(silent)}", "note      ")
    return [by_name[name] for name in sorted(by_name)]


def divide(every: Sequence[Recording]) -> tuple[list[Recording], list[Recording]]:
    """For training, and held out: a tenth of the speakers, in the order of the SHA-256 of their names; of one, of the names."""
    alone = len({recording.speaker for recording in every}) == 1
    groups: dict[str, list[Recording]] = {}
    for recording in every:
        groups.setdefault(recording.name if alone else recording.speaker, []).append(recording)
    order = sorted(groups, key=rank)
    if len(order) < 2:
        raise UserError("--data: there is one recording, and another one must be held out; give more, or --val-data")
    out = set(order[: max(1, len(order) // 10)])
    parts: tuple[list[Recording], list[Recording]] = ([], [])
    for name, group in groups.items():
        parts[name in out].extend(group)
    return parts


class Alphabet:
    """What a model writes: class 0 is the blank, class i is ``units[i - 1]``, a word or a character."""

    def __init__(self, kind: str, units: Sequence[str]):
        self.kind, self.units = kind, tuple(units)
        self._class = {unit: i for i, unit in enumerate(self.units, 1)}

    @classmethod
    def of(cls, kind: str, texts: Iterable[str]) -> Alphabet:
        """All units of some texts, in order."""
        return cls(kind, sorted({unit for text in texts for unit in (text.split() if kind == "word" else text)}))

    def encode(self, text: str, name: str) -> list[int]:
        """The classes of a transcript; UserError names a unit that the model does not know."""
        units = text.split() if self.kind == "word" else text
        if unknown := [unit for unit in units if unit not in self._class]:
            known = " ".join(self.units[:12]) + (" ..." if len(self.units) > 12 else "")
            raise UserError(f"the transcript of {plain(name, 60)} has the {self.kind} {quoted(unknown[0])}, which is in no "
                            f"transcript that is trained on; known: {plain(known, 100)}")
        return [self._class[unit] for unit in units]

    def decode(self, classes: Sequence[int]) -> str:
        """The text of classes without blanks."""
        return " ".join((" " if self.kind == "word" else "").join(self.units[i - 1] for i in classes).split())


class Speech(Task, name="speech", summary="the words of recordings, spoken digits unless there are others (CTC)"):
    """Frames of utterances and their labels, without the places of the labels."""

    Options = SpeechOptions
    reads = Conformer.reads
    causal = False
    defaults = {"batch": 16, "steps": 400, "eval_every": 100, "warmup": 100}  # noqa: RUF012
    metric, unit, key, rising = "word error rate", "WER", "wer", False
    hashed = "training_sha256"
    judged = "errors", "label", "utterances"
    baselines = {"all blank": 1.0}  # noqa: RUF012
    after = "write down recordings with: minitv transcribe {directory} FILE.wav"

    def __init__(self, options: SpeechOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self.context, self._count, self._random = options, context, batch, Random(seed)
        front = options.front()
        whole = self.holds_out_all(saved)
        if saved is None:
            check_drawn(options, "digits of computed voices", "utterances", "longest", "snr", "eval_examples")
        if options.data:
            every = recordings(options.data, "--data")
            if whole:
                self.training = self.testing = Recordings(every, front, context)
            else:
                parts = (every, recordings(options.val_data, "--val-data")) if options.val_data else divide(every)
                flags = "--data", "--val-data" if options.val_data else "--data"
                self.training, self.testing = (Recordings(part, front, context, flag)
                                               for part, flag in zip(parts, flags, strict=True))
        elif options.val_data:
            raise UserError("--val-data: this concerns recordings, and --data is not given")
        else:
            self.training = Digits(options.utterances, 0, options.longest, options.snr, front)
            self.testing = Digits(options.eval_examples, STRANGERS, options.longest, options.snr, front)
        kind = options.labels or ("character" if options.data else "word")
        self._sha256 = hashlib.sha256(self.training.identity.encode()).hexdigest()
        if saved is not None and not whole and saved.get("training_sha256", self._sha256) != self._sha256:
            raise UserError(f"--data {options.data}: these are other recordings or transcripts than those of the run, as their "
                            "SHA-256 says; begin a run on them with --init-from")
        if saved is None:
            texts = map(self.training.text, range(len(self.training))) if options.data else [" ".join(DIGITS)]
            self.alphabet = Alphabet.of(kind, texts)
            measured = len(self.training) if options.data else min(MEASURED, len(self.training))
            frames = np.concatenate([self.training.frames(i) for i in range(measured)])
            if not len(frames):
                raise UserError(f"--data {options.data}: each recording to train on is shorter than a frame of "
                                f"{1000 * front.window / front.rate:g} ms; give longer ones")
            scale = scale_of(frames)
        else:
            self.alphabet, scale = stored_alphabet(saved), stored_scale(saved, front.bands)
            if options.labels not in (None, self.alphabet.kind):
                raise UserError(f"--labels {options.labels}: the model writes {self.alphabet.kind}s")
        self.front = front._replace(scale=scale)
        self.vocab = len(self.alphabet.units) + 1
        stripes = 0 if front.samples else options.frequency_masks
        self._masks = SpecAugment(stripes, options.frequency_width, options.time_masks, options.time_share)
        self._short: set[str] = set()  # training utterances with more labels than the model has positions
        self._lock = threading.Lock()
        if not options.data:
            self.alphabet.encode(" ".join(DIGITS), "computed voices")
        for corpus in (self.training, self.testing) if options.data else ():
            for i in range(len(corpus)):
                self.alphabet.encode(corpus.text(i), corpus.name(i))

    @classmethod
    def shape(cls, options: SpeechOptions) -> dict[str, int]:
        return {"features": options.front().bands}

    # -- data ----------------------------------------------------------------------------------------------------------
    def batch(self, step: int) -> Utterances:
        random = self._random.split(BATCHES, step)
        numbers = np.sort(random.integers(0, len(self.training), (self._count,)))
        return self._assembled(self.training, numbers, self._random.split(MASKS, step))

    def held_out(self) -> Utterances:
        return self._held_out

    @functools.cached_property
    def _held_out(self) -> Utterances:
        return self._assembled(self.testing, np.arange(len(self.testing)), None)

    def _assembled(self, corpus: Corpus, numbers: np.ndarray, masks: Random | None) -> Utterances:
        """A batch of some utterances of a corpus, the longest first."""
        frames = [self._normalised(corpus.frames(i)) for i in numbers.tolist()]
        if (most := max(map(len, frames), default=0)) > self.context:
            raise UserError(f"--context: an utterance has {most} frames of {1000 * self.front.hop / self.front.rate:g} ms, and "
                            f"{self.context} are allowed; give more, or utterances of fewer digits (--longest)")
        if masks is not None:
            frames = [self._masks(x, masks.split(row)) for row, x in enumerate(frames)]
        order = sorted(range(len(frames)), key=lambda row: -len(frames[row]))
        labels = [self.alphabet.encode(corpus.text(i), corpus.name(i)) for i in numbers.tolist()]
        inputs = np.zeros((len(frames), max(map(len, frames), default=0) or 1, self.front.bands), np.float32)  # [B T M]
        targets = np.full((len(frames), max(map(len, labels), default=0)), NOTHING)  # [B U]
        for place, row in enumerate(order):
            inputs[place, : len(frames[row])] = frames[row]
            targets[place, : len(labels[row])] = labels[row]
        lengths = np.array([len(frames[row]) for row in order], np.intp)
        return Utterances(inputs, targets, lengths, numbers[order])

    def _normalised(self, frames: np.ndarray) -> np.ndarray:
        return normalised(self.front, frames, self.options.normalise)

    # -- loss and metric -----------------------------------------------------------------------------------------------
    def loss(self, model: Any, batch: Utterances, rng: Random | None = None) -> tuple[Tensor, int]:
        """The sum of the CTC losses in nats, and how many labels there are; utterances that are too short count as 0."""
        logits, positions, targets, labels, fits = self._asked(model, batch, rng)
        if not fits.all():
            with self._lock:
                self._short |= set(map(self.training.name, batch.numbers[~fits].tolist()))
        loss = ctc_loss(logits, *(beside(x, logits.data) for x in (targets, positions, labels)), reduction="sum",
                        zero_infinity=True)
        return loss, int(labels[fits].sum())

    def score(self, model: Any, batch: Utterances) -> np.ndarray:
        """The loss, the number of labels, and for each held-out utterance its edits, its words, and whether it is too short."""
        sums = np.zeros(2 + 3 * len(self.testing))
        with no_grad():
            logits, positions, targets, labels, fits = self._asked(model, batch, None)
            losses = ctc_loss(logits, *(beside(x, logits.data) for x in (targets, positions, labels)), reduction="none",
                              zero_infinity=True)
            sums[:2] = to_numpy(losses.data).sum(dtype=np.float64), labels[fits].sum()
            written = greedy(to_numpy(logits.data), positions)
        each = sums[2:].reshape(3, -1)
        for number, classes, fitting in zip(batch.numbers.tolist(), written, fits.tolist(), strict=True):
            words = self.testing.text(number).split()
            each[:, number] = edits(words, self.alphabet.decode(classes).split()).total, len(words), not fitting
        return sums

    @staticmethod
    def _asked(model: Any, batch: Utterances, rng: Random | None):
        """Logits [B T' V], positions [B] that count, targets [B U], labels [B] that count, and which of them fit."""
        logits = model(batch.inputs, rng, lengths=batch.lengths)
        positions, labels = model.positions(batch.lengths), (batch.labels != NOTHING).sum(axis=1)
        targets = np.where(batch.labels == NOTHING, 0, batch.labels)
        return logits, positions, targets, labels, frames_needed(targets, labels) <= positions

    def value(self, sums: np.ndarray) -> float:
        wrong, words, short = sums[2:].reshape(3, -1)
        if short.all():
            raise UserError(f"{self.description}: each one that is held out is too short for its transcript; give longer ones, "
                            "or a smaller --subsampling")
        return float(wrong.sum() / max(words.sum(), 1))

    def interval(self, sums: np.ndarray) -> tuple[float, float] | None:
        wrong, words, _ = sums[2:].reshape(3, -1)
        return bootstrap(wrong, words) if words.any() else None

    def asked(self, sums: np.ndarray) -> int:
        return len(self.testing)

    def remarks(self, sums: np.ndarray) -> list[str]:
        short = np.flatnonzero(sums[2:].reshape(3, -1)[2])
        return [self._too_short("held-out", list(map(self.testing.name, short.tolist())))] * bool(len(short))

    # -- what a person sees ---------------------------------------------------------------------------------------------
    def about(self) -> list[tuple[str, str]]:
        kind = f"{len(self.alphabet.units)} different {self.alphabet.kind}s"
        sizes = f"{self._size(self.training)} for training and {self._size(self.testing)} held out"
        return [*super().about(), ("speech", f"{self.options.data or 'digits of computed voices'}: {sizes}; {kind}")]

    def header(self) -> dict[str, Any]:
        identity = f"{self.training.identity}\n{self.testing.identity}"
        return {"corpus": {"description": self.options.data or "digits of computed voices",
                           "sha256": hashlib.sha256(identity.encode()).hexdigest(),
                           "utterances": len(self.training), "held_out": len(self.testing)}}

    def show(self, model: Any, rng: Random) -> str:
        """Some held-out utterances: what was said, and what the model wrote."""
        batch = self._held_out
        rows = rng.permutation(len(batch.inputs))[:SHOWN]
        some = Utterances(*(array[rows] for array in batch))
        with no_grad():
            logits = model(some.inputs, lengths=some.lengths)
        written = greedy(to_numpy(logits.data), model.positions(some.lengths))
        lines = []
        for number, classes in zip(some.numbers.tolist(), written, strict=True):
            lines += [f"said:    {self.testing.text(number)}", f"written: {self.alphabet.decode(classes)}"]
        needed = frames_needed(np.maximum(batch.labels, 0), (batch.labels != NOTHING).sum(axis=1))
        short = needed > model.positions(batch.lengths)
        for what, names in (("held-out", list(map(self.testing.name, batch.numbers[short].tolist()))),
                            ("training", sorted(self._short))):
            if names:
                lines.append(self._too_short(what, names))
        return "\n".join(lines)

    @staticmethod
    def _too_short(what: str, names: Sequence[str]) -> str:
        return (f"too short for their transcripts, so that the loss leaves them out: {len(names)} {what} "
                f"utterance{'s' * (len(names) != 1)}, {_some(names)}")

    @property
    def description(self) -> str:
        """What is held out, in a few words."""
        return f"{self.options.val_data or self.options.data or 'digits of computed voices'}: {self._size(self.testing)}"

    @staticmethod
    def _size(corpus: Corpus) -> str:
        return (f"{count(len(corpus))} utterance{'s' * (len(corpus) != 1)} of {count(corpus.speakers)} "
                f"speaker{'s' * (corpus.speakers != 1)}")

    # -- checkpoints -----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        return {"labels": self.alphabet.kind, "units": list(self.alphabet.units), "scale": self.front.scale.tolist(),
                "training_sha256": self._sha256}

    @classmethod
    def imported(cls, folder: Path, vocab: int) -> dict[str, Any]:
        """The units are those of vocab.json, where a bar stands between words; without it, the numbers of the classes."""
        return {**_units(folder / "vocab.json", vocab), "scale": [[0.0], [1.0]]}

    @classmethod
    def exported(cls, saved: Mapping[str, Any]) -> dict[str, bytes]:
        alphabet = stored_alphabet(saved)
        if alphabet.kind != "character":  # their file is for characters
            return {}
        units = ("<pad>", *("|" if unit == " " else unit for unit in alphabet.units))
        return {"vocab.json": json.dumps({unit: i for i, unit in enumerate(units)}, ensure_ascii=False).encode()}

    @staticmethod
    def inherited(saved: Mapping[str, Any]) -> dict[str, Any]:
        return {key: saved[key] for key in ("labels", "units", "scale") if key in saved}


def normalised(front: FrontEnd, frames: np.ndarray, how: str) -> np.ndarray:
    """Frames [T M] that were made without a scale, normalised by that of ``front`` or by their own, float32."""
    if how == "utterance" and len(frames):
        front = front._replace(scale=scale_of(frames))
    return front.scaled(frames).astype(np.float32)


def _units(path: Path, vocab: int) -> dict[str, Any]:
    """What the classes of another program's model are, [1] to [vocab - 1], as a checkpoint keeps it."""
    if not path.is_file():
        return {"labels": "word", "units": [str(i) for i in range(1, vocab)]}
    if (size := path.stat().st_size) > UNITS:
        raise UserError(f"{path}: it has {size} bytes, allowed are {UNITS}")
    try:
        places = json.loads(files.read(path))
        by_class = {place: unit for unit, place in places.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no table of units and the numbers of their classes: {error}") from None
    if any(type(i) is not int or i not in by_class for i in range(1, vocab)):
        raise UserError(f"{path}: it does not name each of the classes 1 to {vocab - 1}, of which the model gives logits")
    return {"labels": "character", "units": [" " if by_class[i] == "|" else by_class[i] for i in range(1, vocab)]}


def stored_alphabet(saved: Mapping[str, Any]) -> Alphabet:
    """What a model of a checkpoint writes."""
    kind, units = saved.get("labels"), saved.get("units")
    if kind not in ("word", "character") or not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
        raise CheckpointError("the checkpoint has no units, texts that the model writes")
    return Alphabet(kind, units)


def stored_scale(saved: Mapping[str, Any], mels: int) -> np.ndarray:
    """By what the frames of a checkpoint's model are normalised, [2 M]."""
    try:
        scale = np.array(saved.get("scale"), np.float64)
    except (TypeError, ValueError):
        scale = np.zeros(0)
    if scale.shape != (2, mels) and scale.ndim == 2 and len(scale) == 2:
        raise UserError(f"--mels {mels}: the model reads {scale.shape[1]} bands")
    if scale.shape != (2, mels) or not np.isfinite(scale).all() or not (scale[1] > 0).all():
        raise CheckpointError(f"the checkpoint has no scale, two rows of {mels} finite numbers")
    return scale


def _some(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(plain(name, 40) for name in names[:NAMED]) + more
