"""Sound: what of WAV files is read, the levels of mu-law, the task, and what a trained model writes."""

from __future__ import annotations

import math
import struct
import sys

import numpy as np
import pytest
from scipy.io import wavfile

from autograd.random import Random
from minitv import cli
from minitv.audio import from_mu_law, mu_law, prepared, read_wav, write_wav
from minitv.errors import UserError
from minitv.sources import rank
from minitv.tasks import audio
from minitv.tasks.audio import Audio

SINE = np.sin(np.arange(800) / 9) * 0.6


def saved(path, samples, rate=8000):
    wavfile.write(path, rate, samples)
    return path


@pytest.mark.parametrize(("kind", "error"), [("int16", 2**-16), ("int32", 1e-7), ("uint8", 2**-8), ("float32", 1e-7),
                                             ("float64", 1e-7)])
def test_samples_of_every_kind_are_read(tmp_path, kind, error):
    scale = {"int16": 2**15, "int32": 2**31, "uint8": 128}.get(kind, 1)
    stored = SINE * scale + 128 * (kind == "uint8")
    stored = (stored if kind.startswith("float") else np.round(stored)).astype(kind)
    samples, notes = read_wav(saved(tmp_path / "a.wav", stored), 8000)
    assert samples.dtype == np.float32 and not notes
    assert np.abs(samples - SINE).max() <= error + 1e-7


def test_24_bits_are_read(tmp_path):
    values = np.round(SINE * 2**23).astype(int)
    data = b"".join(int(value).to_bytes(3, "little", signed=True) for value in values)
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, 8000, 24000, 3, 24, b"data",
                       len(data))
    (tmp_path / "a.wav").write_bytes(head + data)
    assert np.abs(read_wav(tmp_path / "a.wav", 8000)[0] - SINE).max() < 1e-6


def test_flac_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(UserError, match=r"^--data: .*a\.flac: a FLAC file needs the package soundfile: pip install soundfile"):
        task(data=str(tmp_path))


def test_a_single_channel_with_an_axis_of_its_own_is_no_mean(tmp_path):
    samples, notes = prepared("a.flac", np.full((9, 1), 0.5, np.float32), 8000, 8000)
    assert samples.shape == (9,) and not notes


def test_what_is_written_is_read_again(tmp_path):
    write_wav(tmp_path / "a.wav", np.append(SINE, 1.5), 4000)
    samples, notes = read_wav(tmp_path / "a.wav", 4000)
    assert not notes and np.abs(samples[:-1] - SINE).max() < 1e-4 and samples[-1] == np.float32(32767 / 32768)


def test_two_channels_become_their_mean_and_that_is_said(tmp_path):
    stored = np.stack([SINE, -SINE / 2], axis=1).astype(np.float32)
    samples, notes = read_wav(saved(tmp_path / "a.wav", stored), 8000)
    assert np.abs(samples - SINE / 4).max() < 1e-6 and notes == ["2 channels become their mean"]


def test_another_rate_is_resampled_and_that_is_said(tmp_path):
    rate = 11025
    wave = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 0.5
    samples, notes = read_wav(saved(tmp_path / "a.wav", wave.astype(np.float32), rate), 8000)
    assert len(samples) == 8000 and notes == ["11025 samples a second are resampled to 8000"]
    inner = slice(200, -200)
    assert np.abs(samples - np.sin(2 * np.pi * 440 * np.arange(8000) / 8000) * 0.5)[inner].max() < 5e-3


def test_what_is_too_loud_is_clipped_and_that_is_said(tmp_path):
    samples, notes = read_wav(saved(tmp_path / "a.wav", np.array([0.5, -1.5, 2.0], np.float32)), 8000)
    assert samples.tolist() == [0.5, -1.0, 1.0] and notes == ["what is louder than full scale is clipped"]


def whole(tmp_path):
    return saved(tmp_path / "whole.wav", (SINE * 32767).astype(np.int16)).read_bytes()


@pytest.mark.parametrize(("content", "sentence"), [
    (lambda data: data[:1000], "Reached EOF prematurely; finished at 1000 bytes, expected 1644 bytes from header"),
    (lambda data: data[:1001], "is no WAV file that can be read"),
    (lambda data: data[:30], "is no WAV file that can be read"),
    (lambda data: b"", "is no WAV file that can be read"),
    (lambda data: b"ID3 this is something else" * 9, "is no WAV file that can be read: File format b'ID3 ' not understood"),
    (lambda data: data[:4] + bytes(4) + data[8:], "is no WAV file that can be read"),
    (lambda data: data[:20] + b"\x07" + data[21:], "Unknown wave file format: MULAW"),
    (lambda data: data[:24] + struct.pack("<II", 999, 1998) + data[32:], "has 999 samples a second, allowed: 1000 to 768000"),
    (lambda data: struct.pack("<4sI", b"RIFF", 36) + data[8:40] + bytes(4), "holds no sound"),
], ids=["short", "odd", "head", "empty", "other", "no size", "mu-law", "rate", "no samples"])
def test_what_is_no_sound_is_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "a.wav"
    path.write_bytes(content(whole(tmp_path)))
    with pytest.raises(UserError) as error:
        read_wav(path, 8000)
    assert str(error.value).startswith(f"{path}: ") and sentence in str(error.value)


def test_numbers_that_are_not_finite_and_files_that_are_not_there_are_sentences(tmp_path):
    with pytest.raises(UserError, match="holds a sample that is not finite"):
        read_wav(saved(tmp_path / "a.wav", np.array([0.5, np.nan], np.float32)), 8000)
    with pytest.raises(UserError, match=r"missing\.wav: cannot be read: No such file"):
        read_wav(tmp_path / "missing.wav", 8000)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_wav(tmp_path, 8000)


# -- mu-law ---------------------------------------------------------------------------------------------------------------
def test_levels_are_those_of_the_formula():
    for x in (-1.0, -0.3, -1e-3, 0.0, 1e-5, 0.02, 0.7, 1.0):
        compressed = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
        assert mu_law(np.array([x]))[0] == math.floor((compressed + 1) / 2 * 255 + 0.5)
    assert mu_law(np.array([-1.0, 0.0, 1.0, 2.0])).tolist() == [0, 128, 255, 255]


def test_every_level_is_the_nearest_one_to_its_sample():
    levels = np.arange(256)
    samples = from_mu_law(levels)
    assert np.array_equal(mu_law(samples), levels) and (np.diff(samples) > 0).all() and samples[[0, 255]].tolist() == [-1, 1]
    assert abs(samples[127] + 8.6e-5) < 1e-6
    every = np.linspace(-1, 1, 100_001)
    errors = np.abs(from_mu_law(mu_law(every)) - every)
    assert 0.02 < errors.max() < 0.0216 and errors[np.abs(every) < 0.01].max() < 3e-4  # small where sound is soft


# -- the task -------------------------------------------------------------------------------------------------------------
def task(context: int = 32, batch: int = 4, seed: int = 0, saved=None, **values) -> Audio:
    return Audio(Audio.Options(**values), context, batch, seed, saved)


def test_the_sound_that_is_made_up_is_always_the_same_and_has_a_pitch():
    t = task(rate=2000)
    assert len(t.training) == 60 * 2000 and len(t.test) == 6 * 2000
    assert np.array_equal(t.training, task(rate=2000, seed=5).training)
    rate, hertz = 8000, 220.0
    for sound in (audio.string(Random(0), hertz, 2000, rate), audio.sing(hertz, audio.VOWELS[2], 2000, rate, 0.0)):
        spectrum = np.abs(np.fft.rfft(sound[400:2000] * np.hanning(1600)))
        autocorrelation = np.fft.irfft(np.abs(np.fft.rfft(sound[400:2000], 4096)) ** 2)[20:60]
        assert abs(20 + autocorrelation.argmax() - rate / hertz) < 1.5 and spectrum.max() > 0
    notes = [audio.note(Random(i), rate) for i in range(20)]
    assert all(np.isfinite(sound).all() and 0.25 < np.abs(sound).max() <= 0.8001 for sound in notes)
    assert all(0.2 * rate <= len(sound) <= 0.5 * rate for sound in notes)


def test_a_string_is_the_recurrence_of_its_paper():
    first = 2 * Random(3).uniform((36,), np.float64) - 1
    y = first.tolist()
    for n in range(36, 300):
        y.append(0.996 * (y[n - 36] + (y[n - 37] if n > 36 else 0)) / 2)
    assert np.abs(audio.string(Random(3), 8000 / 36.5, 300, 8000) - y).max() < 1e-12


def test_a_sample_is_asked_for_by_those_before_it(tmp_path):
    wave = (np.sin(np.arange(3000) / 7) * 0.5).astype(np.float32)
    t = task(data=str(saved(tmp_path / "a.wav", wave)))
    levels = mu_law(wave)
    assert np.array_equal(t.training, levels[:2700]) and np.array_equal(t.test, levels[2700:])
    for inputs, labels in (t.batch(0), t.held_out()):
        assert inputs.shape[1] == 32 and np.array_equal(inputs[:, 1:], labels[:, :-1])
    assert np.array_equal(task(data=str(tmp_path / "a.wav")).batch(3).inputs, t.batch(3).inputs)


def test_a_folder_of_files_is_one_sound_in_the_order_of_their_hashes(tmp_path):
    (tmp_path / "below").mkdir()
    waves = {name: np.full(500, level, np.float32) for name, level in (("a.wav", 0.1), ("b.WAV", 0.2), ("below/c.wav", 0.3))}
    for name, wave in waves.items():
        saved(tmp_path / name, np.stack([wave, wave], axis=1), 8000 if name == "a.wav" else 16000)
    (tmp_path / "readme.txt").write_text("text")
    t = task(data=str(tmp_path), rate=16000)
    whole = np.concatenate([t.training, t.test])
    order = sorted(waves, key=rank)
    assert [np.unique(from_mu_law(whole)[at]).round(1).tolist() for at in (np.r_[300], np.r_[len(whole) - 300])] == [
        [np.float32(waves[order[0]][0]).round(1)], [np.float32(waves[order[2]][0]).round(1)]]
    assert len(whole) == 2000 and "3 files" in t.description
    assert sorted(t.notes) == ["left out: 1 that is no WAV or FLAC file",
                               "of 1 of 3 files: 8000 samples a second are resampled to 16000",
                               "of 3 of 3 files: 2 channels become their mean"]


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda folder: folder.mkdir(), "holds no WAV or FLAC file"),
    (lambda folder: saved(folder, np.zeros(100, np.int16)), "what is held out has 10 samples, and --context 32 needs"),
    (lambda folder: saved(folder, np.zeros(20, np.int16)), "the training part has 18 samples, and --context 32 needs"),
    (lambda folder: folder.write_text("no sound"), "is no WAV file that can be read"),
    (lambda folder: None, "cannot be read: No such file"),
], ids=["folder", "short", "shorter", "text", "missing"])
def test_data_that_is_no_sound_is_a_sentence(tmp_path, make, sentence):
    make(tmp_path / "a.wav")
    with pytest.raises(UserError) as error:
        task(data=str(tmp_path / "a.wav"))
    assert str(error.value).startswith("--data: ") and sentence in str(error.value)


def test_baselines_count_as_they_say(tmp_path):
    wave = np.round(np.sin(np.arange(400) / 5), 1).astype(np.float32) * 0.5
    t = task(data=str(saved(tmp_path / "a.wav", wave)))
    learned, held = t.training.astype(int).tolist(), t.test.astype(int).tolist()

    def bits(*contexts):
        total = []
        for i, x in enumerate(held):
            p = 1 / 256
            for context in contexts:
                alike = [y for j, y in enumerate(learned) if context(learned, j) == context(held, i)]
                p = (alike.count(x) + len(set(alike)) * p) / (len(alike) + len(set(alike))) if alike else p
            total.append(-math.log2(p))
        return np.mean(total)

    def nothing(levels, i):
        return 0

    def before(levels, i):
        return levels[i - 1] if i else 128

    def line(levels, i):
        samples = [0.0, 0.0, *from_mu_law(np.array(levels))]
        return mu_law(np.array([2 * samples[i + 1] - samples[i]]))[0]

    expected = {"uniform": 8.0, "all samples": bits(nothing), "the one before": bits(nothing, before),
                "the two before, as a line": bits(nothing, line)}
    assert list(t.baselines) == list(expected)
    for name, value in expected.items():
        assert abs(t.baselines[name] - value) < 1e-9, name


# -- a run ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio") / "run"
    assert cli.main(["train", "megabyte", "--task", "audio", "--rate", "2000", "--context", "16", "--eval-tokens", "320",
                     "--patch", "4", "--layers", "2", "--width", "8", "--heads", "2", "--batch", "2", "--threads", "1",
                     "--warmup", "1", "--steps", "2", "--eval-every", "2", "--out", str(folder)]) == 0
    return folder


def test_a_model_writes_a_sound(run, tmp_path, capsys):
    assert cli.main(["sample", str(run), "--seconds", "0.05", "--seed", "2"]) == 0
    assert capsys.readouterr().out == f"{run / 'sample.wav'}: 1 sound of 0.05 seconds, 2000 samples a second\n"
    rate, samples = wavfile.read(run / "sample.wav")
    assert rate == 2000 and samples.shape == (100,) and len(np.unique(samples)) > 20 and samples[0] == 3
    out = tmp_path / "two.wav"
    assert cli.main(["sample", str(run), "--seconds", "0.05", "--seed", "1", "--count", "2", "--out", str(out)]) == 0
    several = wavfile.read(out)[1]
    assert len(several) == 700 and np.array_equal(several[600:], samples) and not several[100:600].any()


def test_a_model_continues_what_was_held_out(run, tmp_path, capsys):
    out = tmp_path / "a.wav"
    assert cli.main(["sample", str(run), "--seconds", "0.05", "--complete", "0.4", "--out", str(out)]) == 0
    assert "; 0.02 seconds of each are the beginning of one that was held out" in capsys.readouterr().out
    samples, held = wavfile.read(out)[1], from_mu_law(task(rate=2000).test[:100])
    equal = np.abs(samples / 32767 - held) < 1e-4
    assert equal[:40].all() and not equal[40:].all()


@pytest.mark.parametrize(("argv", "sentence"), [
    (["sample", "--prompt", "a"], "--prompt: this says nothing to a model of the task audio, allowed: --out, --compl"),
    (["sample", "--out", "a.mp3"], "--out a.mp3: a model of audio writes a file that ends with .wav"),
    (["sample", "--seconds", "3", "--count", "3", "--complete", "0.5"],
     "--seconds: 3 · 3 seconds are to be completed, and 6 are held out"),
    (["eval", "--data", "short.wav"], "what is held out has 9 samples, and --context 16 needs at least 17"),
    (["eval", "--text", "a"], "--text: the task audio has no text"),
])
def test_mistakes(run, tmp_path, monkeypatch, capsys, argv, sentence):
    monkeypatch.chdir(tmp_path)
    saved("short.wav", np.ones(9, np.int16), 2000)
    assert cli.main([argv[0], str(run), *argv[1:]]) == 2
    out, err = capsys.readouterr()
    assert not out and sentence in err and err.count("\n") == 1


def test_a_model_is_judged_by_what_is_held_out_and_by_other_sound(run, tmp_path, capsys):
    assert cli.main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "made up: " in out and "what is held out" in out and "320 values" in out and "bits per sample, " in out
    saved(tmp_path / "other.wav", np.ones(200, np.int16), 4000)
    assert cli.main(["eval", str(run), "--data", str(tmp_path / "other.wav"), "--strided"]) == 0
    assert "all of it" in (out := capsys.readouterr().out) and "96 values, in two passes" in out
    assert "4000 samples a second are resampled to 2000" in " ".join(out.split())
    saved(tmp_path / "long.wav", np.ones(785, np.int16), 2000)
    assert cli.main(["eval", str(run), "--data", str(tmp_path / "long.wav")]) == 0
    assert "all of it" in (out := capsys.readouterr().out) and " 784 values" in out  # more than --eval-tokens 320


def test_a_model_of_text_takes_no_options_of_files(tmp_path, capsys):
    out, text = str(tmp_path / "run"), tmp_path / "a.txt"
    text.write_text("the cat sat on the mat " * 40)
    assert cli.main(["train", "--data", str(text), "--layers", "1", "--width", "8", "--context", "8", "--steps", "1",
                     "--eval-every", "0", "--threads", "1", "--out", out]) == 0
    capsys.readouterr()
    for argv, sentence in ((["--out", "a.png"], "--out: this says nothing to a model of the task text, allowed: --prompt, "),
                           (["--complete", "0.5"], "--complete: this says nothing to a model of the task text")):
        assert cli.main(["sample", out, *argv]) == 2
        assert sentence in capsys.readouterr().err
