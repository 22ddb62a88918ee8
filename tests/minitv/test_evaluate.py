"""minitv eval: how well a model predicts a text."""

import hashlib
import json
import math
import sys

import numpy as np
import pytest

from autograd import cross_entropy
from minitv import checkpoint, tasks, variants
from minitv.cli import main
from minitv.errors import RunError, UserError
from minitv.evaluate import evaluate, surprise
from minitv.experiment import suits
from minitv.tokenizer import ByteTokenizer

from .models import NAMES
from .test_sample import CHARACTERS, build, stored


def by_hand(model, ids):
    """-ln p of every id but the first, each window by itself, by a softmax in float64."""
    nats, context = [], model.context
    for start in range(0, len(ids) - 1, context):
        window = ids[start:min(start + context, len(ids) - 1)]
        logits = model(window[None]).numpy()[0].astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        nats += [-math.log(row[label]) for row, label in zip(p, ids[start + 1:start + 1 + len(window)], strict=True)]
    return np.array(nats)


@pytest.mark.usefixtures("forms_unless_full")
@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("length", [9, *(pytest.param(length, marks=pytest.mark.full) for length in (2, 8, 10, 41))])
def test_every_token_is_predicted_from_its_window(variant, length):
    model = build(variant, 11)
    ids = np.random.default_rng(length).integers(0, 11, length)
    np.testing.assert_allclose(surprise(model, ids), by_hand(model, ids), rtol=1e-9)


def test_many_calls_of_the_model_keep_their_order():
    model = build("aft-simple", 11)
    ids = np.random.default_rng(0).integers(0, 11, 3000)
    np.testing.assert_allclose(surprise(model, ids), by_hand(model, ids), rtol=1e-9)


def test_the_loss_is_that_of_training():
    """On a text that windows fill exactly: the mean loss of the model on them."""
    from minitv.data import windows

    model = build("transformer", 11)
    ids = np.random.default_rng(1).integers(0, 11, 8 * 6 + 1)
    inputs, labels = windows(ids, 8, len(ids))
    assert inputs.shape == (6, 8)
    result = evaluate(model, ids, len(ids))
    assert result.loss == pytest.approx(cross_entropy(model(inputs), labels).item(), rel=1e-9)
    assert result.bits_per_token == result.bits_per_character == pytest.approx(result.loss / math.log(2))


def test_characters_of_several_bytes_cost_the_sum_of_their_bytes():
    tokenizer, text = ByteTokenizer(), "aé€😀b\n"
    model = build("transformer", 256)
    result = evaluate(model, tokenizer.encode(text), len(text))
    bits = [math.nan, *by_hand(model, tokenizer.encode(text)) / math.log(2)]
    edges = np.cumsum([0, *(len(character.encode()) for character in text)])
    expected = [(c, sum(bits[a:b])) for c, a, b in zip(text, edges, edges[1:], strict=False)]
    found = list(result.characters(tokenizer))
    assert [c for c, _ in found] == list(text)
    np.testing.assert_allclose([b for _, b in found], [b for _, b in expected])
    assert result.bits_per_character == pytest.approx(result.bits_per_token * 12 / 6)


def test_bytes_that_are_no_text_are_characters_too():
    tokenizer = ByteTokenizer()
    result = evaluate(build("transformer", 256), np.frombuffer(b"a\xffb\xe2\x82", np.uint8).astype(np.intp), 4)
    assert [c for c, _ in result.characters(tokenizer)] == ["a", "\ufffd", "b", "\ufffd"]


@pytest.mark.parametrize("length", [0, 1])
def test_too_little_to_predict(length):
    with pytest.raises(UserError, match=f"has {length} token"):
        evaluate(build("transformer", 11), np.zeros(length, np.intp), length)


def test_a_model_without_numbers():
    model = build("transformer", 11)
    model.embed.weight.assign_(np.full(model.embed.weight.shape, np.nan))
    with pytest.raises(RunError, match="the surprise of token 1 is not finite"):
        surprise(model, np.array([1, 2, 3]))


# -- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval") / "run"
    model = build("transformer", CHARACTERS.vocab, np.float32)
    for name, sha256 in (("last", ""), ("best", hashlib.sha256(b"abab").hexdigest())):
        checkpoint.save(directory, name, model=model.state(), optimizer={}, state=stored(corpus_sha256=sha256))
        for parameter in model.parameters():
            parameter.assign_(parameter.numpy() * np.float32(0.5))
    return str(directory)


def rows(capsys, *argv):
    """{name: text} of the rows, and the lines of the table below."""
    assert main(["eval", *argv]) == 0
    out, err = capsys.readouterr()
    head, _, table = out.partition("\n\n")
    assert err == ""
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in head.splitlines()}, table.splitlines()


def test_a_text_of_the_command_line(run, capsys):
    values, table = rows(capsys, run, "--text", "abé λ\nab")
    from minitv.sample import load

    expected = by_hand(load(run).model, CHARACTERS.encode("abé λ\nab"))
    assert values["loss"] == f"{expected.mean():.4f} nats per token" and not table
    assert values["bits"].startswith(f"{expected.mean() / math.log(2):.4f} per character, ")
    assert values["text"] == "--text: 8 characters" and values["model"] == f"transformer of {run}, step 7"
    assert values["predicted"] == "7 tokens, all but the first, in windows of 8" and "note" not in values


def test_each_character_has_a_line(run, capsys):
    _, table = rows(capsys, run, "--text", "ab \né", "--per-character")
    from minitv.sample import load

    bits = by_hand(load(run).model, CHARACTERS.encode("ab \né")) / math.log(2)
    assert table[0].split() == ["offset", "bits", "character", "#", "=", "half", "a", "bit"]
    assert table[1].split() == ["0", "-", "'a'"]
    for i, (line, cost, shown) in enumerate(zip(table[2:], bits, ["'b'", "' '", "'\\n'", "'é'"], strict=True), 1):
        assert line.startswith(f"{i:>8}  {cost:6.2f}  {shown}") and line.count("#") == min(60, round(2 * cost))


def test_a_file_and_a_folder(run, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh", encoding="utf-8")
    alone, _ = rows(capsys, run, "--data", str(tmp_path / "a.txt"))
    assert alone["text"] == f"{tmp_path / 'a.txt'}: 8 characters"
    assert alone["loss"] == rows(capsys, run, "--text", "abcdefgh")[0]["loss"]
    assert rows(capsys, run, "--data", str(tmp_path))[0]["loss"] == alone["loss"]
    (tmp_path / "a.txt").write_text("abé", encoding="latin-1")
    assert rows(capsys, run, "--data", str(tmp_path / "a.txt"), "--encoding", "latin-1")[0]["text"].endswith("3 characters")


def test_the_text_of_the_training_is_pointed_out(run, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("abab", encoding="utf-8")
    path = str(tmp_path / "a.txt")
    assert "trained on" in rows(capsys, f"{run}/best", "--data", path)[0]["note"]
    assert "note" not in rows(capsys, run, "--data", path)[0]


def test_standard_input(run, capsys, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("abab", encoding="utf-8")
    with open(tmp_path / "a.txt", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert rows(capsys, run, "--data", "-")[0]["text"] == "standard input: 4 characters"


@pytest.mark.parametrize("argv, sentence", [
    ([], "--data and --text: give one of them, the text that the model is to predict"),
    (["--data", "x", "--text", "y"], "--data and --text: give one of them"),
    (["--text", "abz"], "--text: the character 'z' (U+007A) at offset 2 is unknown: this model knows 12 characters"),
    (["--text", "a"], "--text: the text has 1 token, and"),
    (["--text", ""], "--text: the text has 0 tokens, and a prediction needs one to be predicted and one before it"),
    (["--data", "z.txt", "--text", ""], "--data and --text: give one of them"),
    (["--data", "z.txt"], "the character 'z' (U+007A)"),
    (["--data", "nowhere.txt"], "--data nowhere.txt: there is no such file or folder"),
    (["--checkpoint", "first"], "--checkpoint: 'first' is unknown"),
    (["--txet", "a"], "unknown option --txet; did you mean --text?"),
])
def test_mistakes(run, capsys, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "z.txt").write_text("abz")
    assert main(["eval", run, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.startswith("minitv: error: ") and err.count("\n") == 1


def test_a_model_that_sees_both_sides_cannot_be_asked_for_the_next_token(tmp_path, capsys):
    (name, *_) = (name for name in variants.variants() if suits(variants.load(name), tasks.load("masked")))
    made = variants.load(name).configure(context=8, layers=1, width=16)
    model = made.build(11)
    state = stored(config=made.to_json(), vocab=11)
    checkpoint.save(tmp_path, "last", model=model.state(), optimizer={}, state=state)
    assert main(["eval", str(tmp_path), "--text", "ab"]) == 2
    assert "--text: the task masked has no text to continue" in capsys.readouterr().err


def test_a_task_of_drawn_sequences_is_judged_by_what_is_held_out(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "--task", "mqar", "--width", "8", "--heads", "1", "--layers", "1", "--steps", "1", "--batch", "2",
                 "--threads", "1", "--eval-examples", "9", "--out", run]) == 0
    value = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["val_accuracy"]
    capsys.readouterr()
    assert main(["eval", run]) == 0
    out = capsys.readouterr().out
    assert f"  accuracy        {value:.4f}, " in out and "sequences that are drawn, what is held out" in out
    assert "72 answers" in out
    assert main(["eval", run, "--data", "a.txt"]) == 2
    assert "--data: the sequences of the task mqar are drawn, and the held-out ones are always " in capsys.readouterr().err
