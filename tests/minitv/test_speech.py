"""The task speech: its voices, its frames, recordings on disk, the error rate, and what it refuses."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from scipy.io import wavfile

from autograd import assert_close
from autograd.random import Random
from minitv import checkpoint, cli
from minitv.audio import read_sound, write_wav
from minitv.digits import DIGITS, WORDS, digits_of, say
from minitv.error_rate import word_error_rate
from minitv.errors import UserError
from minitv.mel import FrontEnd, SpecAugment, mel, scale_of, triangles
from minitv.sample import load
from minitv.task import NOTHING
from minitv.tasks.speech import Recordings, Speech, SpeechOptions, divide, recordings
from minitv.transcribe import Recogniser

RATE = 8000


def options(**values):
    drawn = {} if values.get("data") else {"utterances": 5, "eval_examples": 6}
    return SpeechOptions(**{**drawn, **values})


def task(batch=4, seed=1, context=1000, saved=None, **values):
    return Speech(options(**values), context, batch, seed, saved)


def texts(corpus):
    return [corpus.text(i) for i in range(len(corpus))]


def names(corpus):
    return {corpus.name(i) for i in range(len(corpus))}


# -- voices ------------------------------------------------------------------------------------------------------------
def test_an_utterance_is_a_function_of_its_numbers():
    one = say(["three", "one"], 5, 2, RATE)
    assert one.dtype == np.float32 and np.array_equal(one, say(["three", "one"], 5, 2, RATE))
    for other in (say(["three", "one"], 6, 2, RATE), say(["three", "one"], 5, 3, RATE), say(["three", "two"], 5, 2, RATE)):
        assert len(other) != len(one) or not np.array_equal(other, one)
    assert 0.05 < np.abs(one).max() <= 0.61 and np.isfinite(one).all()


@pytest.mark.parametrize("word", WORDS)
def test_a_word_takes_as_long_as_people_need(word):
    seconds = [len(say([word], speaker, 0, RATE)) / RATE for speaker in range(3)]
    assert all(0.2 < s < 1.7 for s in seconds)


def test_a_room_is_as_loud_as_it_is_asked_for():
    quiet, noisy = (say(["six"], 3, 0, RATE, snr) for snr in (60, -20))
    hush = slice(0, 300)  # before the first word
    assert np.abs(quiet[hush]).max() < 0.02 * np.abs(quiet).max() and np.abs(noisy[hush]).max() > 0.3 * np.abs(noisy).max()
    assert len(task(utterances=2, snr=-20.0).held_out().inputs) == 6


def test_digits_are_all_alike_and_up_to_the_longest():
    drawn = [digits_of(speaker, 0, 5) for speaker in range(1000)]
    lengths = np.bincount([len(words) for words in drawn], minlength=6)
    assert lengths[0] == 0 and len(lengths) == 6 and (abs(lengths[1:] - 200) < 50).all()
    counts = [sum(words.count(digit) for words in drawn) for digit in DIGITS]
    assert min(counts) > 240 and max(counts) < 360


def test_a_vowel_has_its_formants():
    """Twice the power near 300 and 870 Hz in "two" than between them, for a mouth of size 1."""
    front = FrontEnd(RATE, 40)
    frames = np.concatenate([front(say(["two"], speaker, 0, RATE)) for speaker in range(12)])
    loud = frames[frames.mean(axis=1) > np.quantile(frames.mean(axis=1), 0.7)].mean(axis=0)
    hertz = 700 * (10 ** (np.linspace(0, mel(RATE / 2), 42)[1:-1] / 2595) - 1)
    assert loud[(hertz > 200) & (hertz < 450)].max() > loud[(hertz > 1500) & (hertz < 2000)].max() + 1


# -- frames ------------------------------------------------------------------------------------------------------------
def test_frames_are_those_of_the_formula():
    front, sound = FrontEnd(RATE, 10), np.random.default_rng(0).normal(size=700)
    frames = front(sound)
    assert frames.shape == (front.frames(700), 10) == ((700 - 200) // 80 + 1, 10) and frames.dtype == np.float32
    t, n = 3, np.arange(200)
    x = (0.5 - 0.5 * np.cos(2 * np.pi * n / 200)) * sound[80 * t : 80 * t + 200]
    power = np.array([abs(np.sum(x * np.exp(-2j * np.pi * k * n / 256))) ** 2 for k in range(129)])
    edges = np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 12)
    middle = mel(np.arange(129) * RATE / 256)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    for band in range(10):
        low, peak, high = hertz[band : band + 3]
        f = 700 * (10 ** (middle / 2595) - 1)
        weight = np.clip(np.minimum((f - low) / (peak - low), (high - f) / (high - peak)), 0, None)
        assert frames[t, band] == pytest.approx(np.log(weight @ power + 1e-6), abs=1e-4)


def test_every_band_hears_something():
    assert (triangles(RATE, 80, 256).sum(axis=1) > 0).all()
    assert (triangles(16000, 80, 512).sum(axis=1) > 0).all()


@pytest.mark.parametrize("step", [1, 79, 80, 333])
def test_frames_of_a_stream_are_those_of_the_whole(step):
    front, sound = FrontEnd(RATE, 8), np.random.default_rng(1).normal(size=1000).astype(np.float32)
    rest, parts = np.zeros(0, np.float32), []
    for start in range(0, 1000, step):
        rest = np.concatenate([rest, sound[start : start + step]])
        parts.append(front(rest))
        rest = rest[len(parts[-1]) * front.hop :]
    assert np.array_equal(np.concatenate(parts), front(sound))


def test_short_sound_has_no_frames_and_silence_has_finite_ones():
    front = FrontEnd(RATE, 8)
    assert front(np.zeros(199)).shape == (0, 8) and front(np.zeros(200)).shape == (1, 8)
    assert np.isfinite(front(np.zeros(400))).all()
    assert (scale_of(front(np.zeros(400)))[1] == 1).all()


def test_masks_hide_stripes_and_nothing_else():
    frames, masks = np.ones((100, 40), np.float32), SpecAugment(2, 8, 3, 0.1)
    hidden = [masks(frames, Random(seed)) == 0 for seed in range(50)]
    assert np.array_equal(hidden[3], masks(frames, Random(3)) == 0) and (frames == 1).all()
    for where in hidden:
        bands, times = where.all(axis=0), where.all(axis=1)
        assert np.array_equal(where, bands | times[:, None]) and bands.sum() <= 16 and times.sum() <= 30
    assert max(where.all(axis=1).sum() for where in hidden) > 15 and any(where.all(axis=0)[[0, -1]].any() for where in hidden)
    assert (SpecAugment(0, 8, 0, 0.1)(frames, Random(0)) == 1).all()
    assert SpecAugment(1, 8, 1, 1.0)(np.ones((0, 40)), Random(0)).shape == (0, 40)


# -- batches -----------------------------------------------------------------------------------------------------------
def test_a_batch_is_a_function_of_the_seed_and_the_step():
    made = task()
    one, again, other = made.batch(7), task().batch(7), task(seed=2).batch(7)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.numbers, other.numbers) or not np.array_equal(one.inputs, other.inputs)
    assert not np.array_equal(one.numbers, made.batch(8).numbers)


def test_utterances_of_a_batch_are_padded_and_the_longest_comes_first():
    made = task(batch=6)
    batch = made.batch(0)
    assert list(batch.lengths) == sorted(batch.lengths, reverse=True) and batch.inputs.shape[1] == batch.lengths[0]
    for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
        assert not batch.inputs[row, length:].any()
        words = made.training.text(number).split()
        assert [made.alphabet.units[i - 1] for i in batch.labels[row] if i != NOTHING] == words
    part = batch.part(slice(3, 6))
    assert part.inputs.shape == (3, batch.lengths[3], 40) and part.length == -(-batch.lengths[3] // 4)


def test_nobody_is_heard_in_training_and_held_out():
    made = task()
    assert not names(made.training) & names(made.testing) and len(made.held_out().inputs) == 6
    assert made.vocab == 11 and made.baselines == {"all blank": 1.0}


def test_frames_are_normalised_by_the_training_data():
    made = task()
    every = np.concatenate([made.front.scaled(made.training.frames(i)) for i in range(5)])
    assert_close(every.mean(axis=0) + 1, np.ones(40), terms=10**6)
    own = task(normalise="utterance").held_out()
    frames = own.inputs[0, : own.lengths[0]]
    assert abs(frames.mean(axis=0)).max() < 1e-3 and abs(frames.std(axis=0) - 1).max() < 1e-3


def test_a_resumed_run_has_the_same_frames():
    made = task()
    again = task(saved={**made.state(), "vocab": made.vocab})
    assert all(np.array_equal(a, b) for a, b in zip(made.batch(3), again.batch(3), strict=True))
    for broken in ({"units": 3}, {"scale": [[0.0] * 40] * 2}, {"scale": None}):
        with pytest.raises(UserError, match="the checkpoint has no"):
            task(saved={**made.state(), **broken})


def test_a_run_goes_on_with_its_own_recordings_alone(tmp_path):
    made = task(data=str(corpus(tmp_path / "a")))
    saved = {**made.state(), "vocab": made.vocab}
    assert len(task(data=str(tmp_path / "a"), saved=saved).training) == 4
    corpus(tmp_path / "b", text="two one")
    with pytest.raises(UserError, match="these are other recordings or transcripts than those of the run"):
        task(data=str(tmp_path / "b"), saved=saved)
    other = task(data=str(tmp_path / "b"), saved=made.inherited(saved))
    assert other.alphabet.units == made.alphabet.units and np.array_equal(other.front.scale, made.front.scale)


def test_an_utterance_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match=r"--context: an utterance has \d+ frames of 10 ms, and 50 are allowed"):
        task(context=50).batch(0)


# -- the error rate ----------------------------------------------------------------------------------------------------
class Deaf:
    """A model that says the same class everywhere."""

    def __init__(self, said):
        self.said = said

    def positions(self, lengths):
        return lengths // 4

    def __call__(self, frames, rng=None, lengths=None):
        from autograd import Tensor

        logits = np.zeros((len(frames), frames.shape[1] // 4, 11), np.float32)
        logits[..., self.said] = 5
        return Tensor(logits)


def test_a_model_that_writes_nothing_has_the_rate_of_the_baseline():
    made = task()
    sums = sum(made.score(Deaf(0), made.held_out().part(slice(i, i + 2))) for i in (0, 2, 4))
    whole = made.score(Deaf(0), made.held_out())
    assert made.value(sums) == made.value(whole) == 1.0 and made.interval(sums) == (1.0, 1.0)
    assert sums[0] == pytest.approx(whole[0], rel=1e-5) and sums[1] == sum(len(t.split()) for t in texts(made.testing))
    assert made.verdict(1.0, 100) == "no better than any baseline yet"
    assert made.verdict(0.9, 100) == "better than every baseline"


def test_the_interval_is_that_of_the_utterances():
    made = task()
    sums = made.score(Deaf(1), made.held_out())
    words = [len(t.split()) for t in texts(made.testing)]
    said = made.alphabet.units[0]
    wrong = [len(t.split()) - (said in t) for t in texts(made.testing)]
    assert made.value(sums) == pytest.approx(sum(wrong) / sum(words))
    low, high = made.interval(sums)
    assert low <= made.value(sums) <= high


# -- recordings --------------------------------------------------------------------------------------------------------
def corpus(root, speakers=3, each=2, text="one two", rate=RATE):
    """Recordings as LibriSpeech has them; returns the folder."""
    for speaker in range(speakers):
        folder = root / str(speaker) / "7"
        folder.mkdir(parents=True)
        names = [f"{speaker}-7-{i:04}" for i in range(each)]
        (folder / f"{speaker}-7.trans.txt").write_text("".join(f"{name} {text}\n" for name in names))
        for i, name in enumerate(names):
            write_wav(folder / f"{name}.wav", say(text.split(), speaker, i, rate), rate)
    return root


def test_recordings_are_found_and_divided_by_speaker(tmp_path):
    every = recordings(str(corpus(tmp_path)), "--data")
    assert [r.name for r in every[:3]] == ["0-7-0000", "0-7-0001", "1-7-0000"] and every[0].text == "one two"
    training, testing = divide(every)
    assert len(training) == 4 and len({r.speaker for r in testing}) == 1
    assert not {r.speaker for r in training} & {r.speaker for r in testing}
    alone = [r for r in every if r.speaker == "0"]
    assert [len(part) for part in divide(alone)] == [1, 1]
    with pytest.raises(UserError, match="--data: there is one recording, and another one must be held out"):
        divide(alone[:1])


def test_held_out_recordings_have_their_folder_in_the_description(tmp_path):
    one, two = (str(corpus(tmp_path / name, speakers=2, each=1)) for name in "ab")
    assert task(data=one, val_data=two).description == f"{two}: 2 utterances of 2 speakers"
    assert task(data=one).description == f"{one}: 1 utterance of 1 speaker"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_folder_may_have_a_name_that_is_no_text(tmp_path):
    (corpus(tmp_path) / "0").rename(tmp_path / os.fsdecode(b"\xff"))
    training, testing = divide(recordings(str(tmp_path), "--data"))
    assert len(training) == 4 and len(testing) == 2


def test_a_task_of_recordings(tmp_path):
    made = task(data=str(corpus(tmp_path)))
    assert made.alphabet.kind == "character" and made.alphabet.units == (" ", "e", "n", "o", "t", "w") and made.vocab == 7
    assert made.alphabet.decode(made.alphabet.encode("two one", "x")) == "two one"
    words = task(data=str(tmp_path), labels="word")
    assert words.alphabet.units == ("one", "two") and words.batch(0).labels.max() == 2
    assert "6 utterances" not in words.about()[-1][1] and "4 utterances of 2 speakers for training" in words.about()[-1][1]


def test_recordings_of_another_rate_and_of_two_channels_are_brought_to_ours_and_that_is_told(tmp_path, capsys):
    corpus(tmp_path, rate=16000)
    path = tmp_path / "0" / "7" / "0-7-0000.wav"
    rate, samples = wavfile.read(path)
    wavfile.write(path, rate, np.stack([samples, samples], axis=1))
    every = Recordings(recordings(str(tmp_path), "--data"), FrontEnd(RATE, 40), 1000)
    told = " ".join(capsys.readouterr().err.split())
    assert "2 channels become their mean in 0-7-0000" in told
    assert "16000 samples a second are resampled to 8000 in 0-7-0000, 0-7-0001, 1-7-0000, 1-7-0001, 2-7-0000 and 1 more" in told
    seconds = len(samples) / rate
    assert abs(len(every.frames(0)) - 100 * seconds) < 4


def test_recordings_without_sound_or_words_or_too_long_ones_are_left_out_and_named(tmp_path, capsys):
    corpus(tmp_path)
    wavfile.write(tmp_path / "0" / "7" / "0-7-0000.wav", RATE, np.zeros(0, np.int16))
    (tmp_path / "1" / "7" / "1-7.trans.txt").write_text("1-7-0000 one\n1-7-0001\n")
    write_wav(tmp_path / "2" / "7" / "2-7-0000.wav", np.zeros(5 * RATE), RATE)
    every = Recordings(recordings(str(tmp_path), "--data"), FrontEnd(RATE, 40), 300)
    told = " ".join(capsys.readouterr().err.split())
    assert "left out, because there is no sound: 0-7-0000" in told and "there are no words: 1-7-0001" in told
    assert "left out, because it has more than --context 300 frames: 2-7-0000" in told
    assert names(every) == {"0-7-0001", "1-7-0000", "2-7-0001"}


def test_a_recording_without_a_transcript_is_left_out_and_named(tmp_path, capsys):
    corpus(tmp_path)
    (tmp_path / "1" / "7" / "1-7.trans.txt").write_text("1-7-0000 one\n")
    assert len(recordings(str(tmp_path), "--data")) == 5
    assert "left out, because there is no transcript: 1-7-0001.wav" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf1-7-0000 one two\n1-7-0001 one\n",
                                     b"1-7-0000\tone two\r\n1-7-0001\tone\r\n"])
def test_transcripts_may_have_a_byte_order_mark_and_tabs(tmp_path, content):
    corpus(tmp_path)
    (tmp_path / "1" / "7" / "1-7.trans.txt").write_bytes(content)
    assert [r.text for r in recordings(str(tmp_path), "--data") if r.speaker == "1"] == ["one two", "one"]


def test_the_name_of_a_recording_may_end_in_capitals_and_a_line_has_a_single_end(tmp_path, capsys):
    folder = corpus(tmp_path) / "1" / "7"
    (folder / "1-7-0000.wav").rename(folder / "1-7-0000.WAV")
    (folder / "1-7.trans.txt").write_text("1-7-0000 one\u2028two\n")
    (recording,) = (r for r in recordings(str(tmp_path), "--data") if r.speaker == "1")
    assert recording.path.name == "1-7-0000.WAV" and recording.text == "one two"
    (folder / "1-7-0000.flac").write_bytes(b"fLaC and nothing")  # what the other was made of
    assert recording in recordings(str(tmp_path), "--data")
    assert "1-7-0001.wav" in (told := capsys.readouterr().err) and "1-7-0000" not in told


@pytest.mark.filterwarnings("error")
def test_recordings_without_a_frame_are_refused(tmp_path):
    corpus(tmp_path)
    for path in tmp_path.rglob("*.wav"):
        write_wav(path, np.zeros(100), RATE)
    with pytest.raises(UserError, match="each recording to train on is shorter than a frame of 25 ms; give longer ones"):
        task(data=str(tmp_path))


def test_a_run_ends_where_no_held_out_recording_can_be_judged(run, tmp_path, capsys):
    for path in corpus(tmp_path).rglob("*.wav"):
        write_wav(path, np.zeros(500), RATE)
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--data", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and "6 utterances of 3 speakers: each one that is held out is too short for its transcript" in err


def test_digits_may_be_written_by_their_characters():
    made = task(labels="character")
    text = next(text for text in texts(made.training) if " " in text)
    assert made.alphabet.decode(made.alphabet.encode(text, "it")) == text and made.vocab == 1 + len(set(" ".join(DIGITS)))
    assert (made.batch(0).labels != NOTHING).sum() > 16


def test_a_model_keeps_its_labels_and_bands():
    saved = task().state()
    with pytest.raises(UserError, match=r"^--labels character: the model writes words$"):
        task(saved=saved, labels="character")
    with pytest.raises(UserError, match=r"^--mels 20: the model reads 40 bands$"):
        task(saved=saved, mels=20)
    saved |= {"labels": "character", "units": list(" EFGHINORSTUVWXZ")}  # of a run on LibriSpeech
    with pytest.raises(UserError, match="the transcript of computed voices has the character "):
        task(saved=saved)


def test_utterances_that_are_too_short_for_their_transcripts_count_nothing_and_are_named(tmp_path):
    corpus(tmp_path)
    for speaker in range(3):
        write_wav(tmp_path / str(speaker) / "7" / f"{speaker}-7-0001.wav", np.zeros(600), RATE)
    made = task(data=str(tmp_path))
    loss, count = made.loss(Deaf7(), made._assembled(made.training, np.arange(4), None))
    assert np.isfinite(loss.numpy()) and count == 2 * len("one two")
    shown = made.show(Deaf7(), Random(0))
    assert "too short for their transcripts, so that the loss leaves them out: 1 held-out utterance, " in shown
    assert "2 training utterances, " in shown and "-7-0001" in shown


class Deaf7(Deaf):
    """One of seven classes."""

    def __init__(self):
        super().__init__(0)

    def __call__(self, frames, rng=None, lengths=None):
        logits = super().__call__(frames, rng, lengths)
        return logits[..., :7]


def mistakes():
    def missing(root):
        (root / "0" / "7" / "0-7-0001.wav").unlink()

    def corrupt(root):
        (root / "0" / "7" / "0-7-0001.wav").write_bytes(b"RIFF....WAVEfmt nothing")

    def torn(root):
        path = root / "0" / "7" / "0-7-0001.wav"
        path.write_bytes(path.read_bytes()[:400])

    def flac(root):
        (root / "0" / "7" / "0-7-0001.wav").unlink()
        (root / "0" / "7" / "0-7-0001.flac").write_bytes(b"fLaC and nothing")

    def twice(root):
        (root / "0" / "7" / "more.trans.txt").write_text("0-7-0001 one\n")

    def latin(root):
        (root / "0" / "7" / "0-7.trans.txt").write_bytes(b"0-7-0001 \xff\n")

    def empty(root):
        for path in root.rglob("*.trans.txt"):
            path.unlink()

    return [(missing, "0-7-0001 has a transcript and no recording, 0-7-0001.wav or 0-7-0001.flac is needed beside it"),
            (corrupt, "0-7-0001.wav: is no WAV file that can be read"), (torn, "0-7-0001.wav: is no WAV file that can be read"),
            (flac, "0-7-0001.flac: "), (twice, "0-7-0001 has a transcript in "),
            (latin, "0-7.trans.txt: cannot be read as UTF-8"),
            (empty, "there is no transcript, a file *.trans.txt with lines of a name and a text")]


@pytest.mark.parametrize(("spoil", "said"), mistakes(), ids=lambda x: getattr(x, "__name__", ""))
def test_mistakes_in_a_folder_of_recordings(tmp_path, capsys, spoil, said):
    spoil(corpus(tmp_path))
    assert cli.main(["train", "conformer", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.splitlines()[-1].startswith("minitv: error: ") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("values", "said"), [
    (dict(data="nowhere"), "--data nowhere: there is no such folder"),
    (dict(val_data="nowhere"), "--val-data: this concerns recordings, and --data is not given"),
    (dict(data="a", utterances=7), "--utterances 7: this is for digits of computed voices, .* allowed with --data: 4000"),
    (dict(data="a", snr=7.0), "--snr 7.0: this is for digits of computed voices"),
    (dict(data="a", eval_examples=7), "--eval-examples 7: this is for digits of computed voices")])
def test_options_that_do_not_go_together(values, said):
    with pytest.raises(UserError, match=said):
        task(**values)


def test_flac_is_read_with_soundfile(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    sound = np.stack([say(["one"], 0, 0, 16000)] * 2, axis=1)
    soundfile.write(tmp_path / "a.flac", sound, 16000)
    samples, notes = read_sound(tmp_path / "a.flac", RATE)
    assert notes == ["2 channels become their mean", "16000 samples a second are resampled to 8000"]
    assert abs(len(samples) - len(sound) / 2) <= 1
    (tmp_path / "b.flac").write_bytes(b"fLaC and nothing")
    with pytest.raises(UserError, match=r"b\.flac: is no FLAC file that can be read: [^<]*$"):
        read_sound(tmp_path / "b.flac", RATE)
    soundfile.write(tmp_path / "c.flac", sound[:, :1], RATE)
    assert read_sound(tmp_path / "c.flac", RATE)[1] == []
    with pytest.raises(UserError, match=r"nowhere\.flac: cannot be read: No such file or directory"):
        read_sound(tmp_path / "nowhere.flac", RATE)


def test_unknown_symbols_are_refused_by_name(tmp_path):
    corpus(tmp_path / "a")
    corpus(tmp_path / "b", text="six one")
    with pytest.raises(UserError, match="the transcript of 0-7-0000 has the character 's', which is in no transcript that "):
        task(data=str(tmp_path / "a"), val_data=str(tmp_path / "b"))
    with pytest.raises(UserError, match="the transcript of 0-7-0000 has the word 'six'"):
        task(data=str(tmp_path / "a"), val_data=str(tmp_path / "b"), labels="word")


def test_held_out_recordings_of_which_none_can_be_used_are_named(tmp_path):
    corpus(tmp_path / "a")
    for path in corpus(tmp_path / "b").rglob("*.wav"):
        wavfile.write(path, RATE, np.zeros(0, np.int16))
    with pytest.raises(UserError, match=r"^--val-data: none of 6 recordings can be used; left out, because there is no sound"):
        task(data=str(tmp_path / "a"), val_data=str(tmp_path / "b"))


# -- a whole run -------------------------------------------------------------------------------------------------------
SMALL = ["--width", "8", "--layers", "1", "--heads", "2", "--kernel", "3", "--batch", "4", "--threads", "1", "--warmup", "1",
         "--steps", "2", "--eval-every", "2", "--eval-examples", "6", "--utterances", "9", "--longest", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "run"
    assert cli.main(["train", "conformer", *SMALL, "--chunk", "2", "--out", str(folder)]) == 0
    return folder


def test_a_run_is_judged_by_what_is_held_out_and_by_other_recordings(run, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    rate = float((run / "log.jsonl").read_text().split('"val_wer": ')[-1].split(",")[0])
    assert "digits of computed voices: 6 utterances of 6 speakers, what is held out" in out and f" {rate:.4f} (95 %: " in out
    corpus(tmp_path, speakers=2)
    write_wav(tmp_path / "1" / "7" / "1-7-0000.wav", np.zeros(500), RATE)
    assert cli.main(["eval", str(run), "--data", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}: 4 utterances of 2 speakers, all of it" in out and "predicted 4 utterances" in out
    assert "too short for their transcripts, so that the loss leaves them out: 1 held-out utterance, 1-7-0000" in out
    texts = [word_error_rate(["one two"], [Recogniser(load(str(run))).transcript(say(["one", "two"], i, j, RATE))])
             for i, j in ((0, 0), (0, 1), (1, 1))]
    wrong = sum(each.substitutions + each.deletions + each.insertions for each in texts) + 2  # the short one says nothing
    assert f"{wrong / 8:.4f} (95 %" in out


@pytest.mark.filterwarnings("error")
def test_a_run_that_diverges_ends_with_a_sentence_and_no_warning(tmp_path, capsys):
    assert cli.main(["train", "conformer", *SMALL, "--lr", "1e30", "--clip", "0", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("minitv: error: step 2 made a number that is not finite, first")


def test_what_a_run_tells(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    assert '"val_wer_low"' in lines[-1] and '"val_wer_high"' in lines[-1]
    assert '"description": "digits of computed voices"' in lines[0]
    assert checkpoint.load_run(str(run)).state.task["units"] == sorted(DIGITS)


@pytest.mark.full
def test_batch_norm_is_resumed_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--conv-norm", "batch", "--dropout", "0.1"]
    assert cli.main(["train", "conformer", *SMALL, *more, "--steps", "4", "--out", str(whole)]) == 0
    assert cli.main(["train", "conformer", *SMALL, *more, "--steps", "4", "--minutes", "1e-9", "--out", str(parts)]) == 0
    assert cli.main(["train", "--resume", str(parts), "--minutes", "none"]) == 0
    one, other = (checkpoint.load(str(folder)).model for folder in (whole, parts))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
