"""minitv transcribe: at once and as a stream, several files, pictures, and mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from minitv import cli
from minitv.audio import write_wav
from minitv.digits import say
from minitv.sample import load
from minitv.tasks.speech import Speech
from minitv.transcribe import Recogniser, picture

TRAINED = ["--width", "8", "--layers", "1", "--heads", "2", "--kernel", "3", "--batch", "4", "--threads", "1", "--warmup", "1",
           "--steps", "2", "--eval-every", "0", "--eval-examples", "6", "--utterances", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "run"
    assert cli.main(["train", "conformer", *TRAINED, "--chunk", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "whole"
    assert cli.main(["train", "conformer", *TRAINED, "--normalise", "utterance", "--chunk", "1", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, say(["three", "one", "four"], 2_000_000, 0, 8000), 8000)
    return path


def talkative(run):
    """A recogniser with large weights, which hears something everywhere."""
    recogniser = Recogniser(load(str(run)))
    for i, parameter in enumerate(recogniser.model.parameters()):
        noise = np.random.default_rng(i).normal(size=parameter.shape, scale=0.5)
        parameter.assign_(parameter.numpy() + noise.astype(np.float32))
    return recogniser


@pytest.mark.parametrize("step", [400, 10**6])
def test_a_stream_writes_what_the_whole_writes(run, step):
    recogniser, sound = talkative(run), say(["three", "one", "four"], 2_000_000, 0, 8000)
    parts = list(recogniser.stream(sound[i : i + step] for i in range(0, len(sound), step)))
    assert "".join(parts) == recogniser.transcript(sound) and len(parts) > (1 if step < len(sound) else 0)
    assert len(recogniser.transcript(sound).split()) > 2
    assert recogniser.transcript(sound, beam=4)


def test_a_file_is_written_down(run, sound, capsys):
    assert cli.main(["transcribe", str(run), str(sound)]) == 0
    once = capsys.readouterr().out
    assert once.count("\n") == 1
    assert cli.main(["transcribe", str(run), str(sound), "--stream"]) == 0
    assert capsys.readouterr().out == once
    assert cli.main(["transcribe", str(run), "--say", "3 one FOUR"]) == 0
    assert cli.main(["transcribe", str(run), str(sound), str(sound), "--beam", "3"]) == 0
    assert capsys.readouterr().out.count(f"{sound}: ") == 2


def test_what_is_done_to_a_recording_is_told(run, tmp_path, capsys):
    path = tmp_path / "other.wav"
    write_wav(path, say(["two"], 0, 0, 16000), 16000)
    assert cli.main(["transcribe", str(run), str(path)]) == 0
    assert "16000 samples a second are resampled to 8000" in " ".join(capsys.readouterr().err.split())
    write_wav(path, np.zeros(300), 8000)
    assert cli.main(["transcribe", str(run), str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == "\n" and "0.037 s are too short for a single position of the model" in " ".join(err.split())


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_picture(run, sound, tmp_path, capsys):
    path = tmp_path / "heard.png"
    assert cli.main(["transcribe", str(run), str(sound), "--picture", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG" and f"picture: {path}" in " ".join(capsys.readouterr().err.split())
    recogniser, samples = talkative(run), say(["three", "one"], 2_000_000, 0, 8000)
    assert picture(recogniser, samples, 1, tmp_path / "more.svg", "three one").read_text().count("<path") > 10


@pytest.mark.parametrize(("argv", "said"), [
    ([], "FILE and --say: give one of them"),
    (["a.wav", "--say", "one"], "FILE and --say: give one of them"),
    (["a.wav", "--speaker", "3"], "--speaker: this is the voice of --say, which is not given"),
    (["--say", "one", "--picture", "x.txt"], "--picture x.txt: no picture ends with .txt, allowed: .png, .svg, .pdf"),
    (["nowhere.wav"], "nowhere.wav: cannot be read: "),
    (["--say", "eleven"], "--say: 'eleven' is no digit, allowed: zero, one, "),
    (["--say", " "], "--say: there is no word in it"),
    (["a.wav", "b.wav", "--picture", "x.png"], "--picture: it shows one recording, and 2 are given"),
    (["--say", "one", "--stream", "--beam", "2"], "--beam 2: a stream is read by the best class of every frame"),
    (["--say", "one", "--picture", "nowhere/x.png"], "nowhere")])
def test_mistakes(run, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    if "--picture" in argv and importlib.util.find_spec("matplotlib") is None and "--say" in argv:
        said = "a picture needs matplotlib"
    assert cli.main(["transcribe", str(run), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("minitv: error: ") and err.count("\n") == 1


def test_a_file_that_cannot_be_read_does_not_stop_the_others(run, sound, capsys):
    assert cli.main(["transcribe", str(run), str(sound), "nowhere.wav", str(sound)]) == 2
    out, err = capsys.readouterr()
    assert out.count(f"{sound}: ") == 2 and "nowhere.wav: cannot be read: " in err
    assert err.splitlines()[-1] == "minitv: error: 1 of 3 files cannot be read: nowhere.wav"


def test_sound_that_is_too_long_for_the_memory_is_refused(run, sound, monkeypatch, capsys):
    monkeypatch.setattr("minitv.transcribe.memory", lambda: 1000)
    assert cli.main(["transcribe", str(run), str(sound)]) == 2
    out, err = capsys.readouterr()
    assert not out and "s of sound at once would take " in err and "give shorter recordings, or --stream" in err
    assert cli.main(["transcribe", str(run), str(sound), "--stream"]) == 0


def test_a_task_that_is_made_of_speech_is_heard(run):
    class Tones(Speech, name="tones", summary="as speech"):
        pass

    trained = load(str(run))
    other = trained._replace(experiment=dataclasses.replace(trained.experiment, task=Tones))
    sound = say(["one"], 2_000_000, 0, 8000)
    assert Recogniser(other).transcript(sound) == Recogniser(trained).transcript(sound)


def test_what_cannot_follow_a_stream(whole, sound, capsys):
    assert cli.main(["transcribe", str(whole), str(sound), "--stream"]) == 2
    assert "--stream: the model was trained with --normalise utterance" in capsys.readouterr().err


def test_other_commands_refuse_a_model_of_speech(run, capsys):
    assert cli.main(["sample", str(run)]) == 2
    assert "conformer sees a whole sequence at once, it cannot write" in capsys.readouterr().err
    assert cli.main(["eval", str(run), "--text", "one"]) == 2
    assert "--text: the task speech has no text to continue" in capsys.readouterr().err
    assert cli.main(["stream", str(run)]) == 2
    assert "conformer sees a whole sequence at once, it cannot predict the next token" in capsys.readouterr().err


@pytest.mark.full
def test_a_model_of_text_hears_nothing(tmp_path, sound, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    assert cli.main(["train", "transformer", "--data", str(text), "--width", "8", "--heads", "2", "--layers", "1",
                     "--steps", "1", "--context", "8", "--eval-every", "0", "--threads", "1",
                     "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["transcribe", str(tmp_path / "run"), str(sound)]) == 2
    assert "the model was trained on the task text, which has no sound; train one with: minitv train conformer" in \
        capsys.readouterr().err
