"""minitv stream, and minitv sample with a window: texts of any length in constant memory."""

from __future__ import annotations

import io
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from autograd import assert_close, no_grad
from autograd.random import Random
from minitv import checkpoint, stream, variants
from minitv.cli import main
from minitv.errors import UserError
from minitv.evaluate import surprise
from minitv.options import SampleOptions
from minitv.sample import generate, streams, together
from minitv.stream import ANEW, DENSE, SINKS, WINDOW, Streams
from minitv.tokenizer import ByteTokenizer
from minitv.variants.attention_sinks import streaming
from tests.minitv.models import assert_same_on_a_gpu
from tests.minitv.test_sample import CHARACTERS, build, stored

SMALL = dict(context=8, layers=2, width=16)
ROPE = dict(positions="rope", **SMALL)


def nats(model, ids):
    """-ln p of every id but the first, the text read at once."""
    with no_grad():
        logits = model(ids[None, :-1]).numpy()[0]
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


def by_range(values, positions):
    """Sums and numbers of values by ⌊log2 position⌋."""
    ranges = np.array([int(p).bit_length() - 1 for p in positions])
    return [(values[ranges == part].sum(), (ranges == part).sum()) for part in range(max(ranges) + 1)]


@pytest.mark.parametrize("sizes", [(100,), (1, 1, 5, 20, 3, 70), (8, 8, 8, 76)])
def test_every_way_of_reading_is_what_it_is_called(sizes):
    """In blocks of any sizes, against a call of the whole text and against windows that are read one by one."""
    model, ids = build("transformer", 11, **ROPE), np.random.default_rng(0).integers(0, 11, 100)
    ways = Streams(model, 3, 2, recompute=10**9)
    for block in np.split(ids, np.cumsum(sizes)[:-1]):
        ways.read(block)
    places = np.arange(1, 100)
    anew = np.array([nats(model, ids[max(place - 8, 0):place + 1])[-1] for place in places])
    expected = {DENSE: (surprise(model, ids), (places - 1) % 8 + 1), WINDOW: (nats(streaming(model, 5, 0), ids), places),
                SINKS: (nats(streaming(model, 3, 2), ids), places), ANEW: (anew, places)}
    assert set(ways.sums) == set(expected)
    for name, (values, positions) in expected.items():
        for part, (total, number) in enumerate(by_range(values, positions)):
            assert ways.sums[name].tokens[part] == number
            assert ways.sums[name].nats[part] == pytest.approx(total, rel=1e-9), name
    np.testing.assert_array_equal(ways.paired.tokens, ways.sums[SINKS].tokens)
    np.testing.assert_allclose(ways.paired.nats, ways.sums[SINKS].nats)


def test_recomputation_of_some_tokens_is_corrected_by_the_cache_on_the_same_tokens():
    model, ids = build("transformer", 11, **ROPE), np.random.default_rng(0).integers(0, 11, 300)
    some, every = Streams(model, 3, 2, recompute=4), Streams(model, 3, 2, recompute=10**9)
    for ways in (some, every):
        ways.read(ids)
    tokens = some.sums[ANEW].tokens[:9]
    assert tokens.tolist() == [1, 2, 4, 4, 4, 4, 4, 4, 1]  # the last range ends early
    results = [stream.Result(None, "", "", 3, 2, ways, 300) for ways in (some, every)]
    for part in range(9):
        part = slice(part, part + 1)
        plain = some.sums[ANEW].means[part] - some.paired.means[part] + some.sums[SINKS].means[part]
        assert results[0].bits(ANEW, part) == pytest.approx(plain[0] / math.log(2))
    assert results[1].bits(ANEW) == pytest.approx(every.sums[ANEW].nats.sum() / 299 / math.log(2))


def test_what_is_kept_of_a_text_does_not_grow():
    model = build("transformer", 11, **ROPE)
    ways = Streams(model, 3, 2, recompute=1)
    sizes = []
    for block in np.split(np.random.default_rng(0).integers(0, 11, 600), 6):
        ways.read(block)
        caches = [ways.ways[name].state.blocks for name in (WINDOW, SINKS)]
        sizes.append((len(ways._past), sum(array.size for blocks in caches for cache, *_ in blocks for array in cache[:4])))
    assert set(sizes) == {(8, 2 * 2 * 2 * 5 * 16)}


@pytest.mark.full
@pytest.mark.parametrize("options", [dict(sink_kind="logit"), dict(sink_kind="learned-token", positions="alibi")],
                         ids=["rope", "alibi"])
def test_on_a_gpu_the_model_is_the_same(options):
    """Beyond the window, trained and read in parts."""
    options = {**SMALL, "window": 4, "sinks": 2, "layers": 1, **options}
    ids = np.random.default_rng(0).integers(0, 11, (1, 15))
    assert_same_on_a_gpu(lambda: build("attention-sinks", 11, np.float32, **options), ids, 11)


# -- the command


def saved(directory, variant, tokenizer, **options):
    model = build(variant, tokenizer.vocab, np.float32, **options)
    config = variants.load(variant).configure(**{**SMALL, **options}).to_json()
    checkpoint.save(directory, "last", model=model.state(), optimizer={}, state=stored(config, tokenizer=tokenizer.to_json()))
    return str(directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("stream") / "run", "transformer", CHARACTERS, **ROPE)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "text"
    path.write_text("".join(np.random.default_rng(0).choice(list(CHARACTERS.characters), 300)), encoding="utf-8")
    return str(path)


def test_the_command_prints_a_table(run, text, capsys):
    assert main(["stream", run, "--data", text, "--window", "3", "--sinks", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 sinks + 3 recent tokens; window alone: 5" in out and "37.5 times the context" in out
    table = out[out.index("tokens before\n"):].splitlines()[1:]
    assert table[0].split() == ["position", "tokens", "dense", "window", "window", "+", "sinks", "recomputation"]
    assert [line.split()[0] for line in table[1:10]] == ["1", "2", "4", "8", "16", "32", "64", "128", "256"]
    assert table[9].split()[:4] == ["256", "-", "299", "44"] and table[9].split()[4] == "-"  # no dense beyond the context
    first = table[1].split()
    assert first[3] == first[4] == first[5]  # before the cache is full, all are the same model


def test_the_command_draws(run, text, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "s.svg"
    assert main(["stream", run, "--data", text, "--window", "3", "--sinks", "2", "--out", str(picture)]) == 0
    assert picture.read_text().count("<svg") == 1
    assert main(["stream", run, "--data", text]) == 0 and (Path(run) / "stream.png").stat().st_size > 1000


def test_without_matplotlib_the_table_is_printed_and_a_line_says_what_is_missing(run, text, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["stream", run, "--data", text]) == 0
    out, err = capsys.readouterr()
    assert "tokens before\n" in out and err == "no picture: a picture needs matplotlib: pip install matplotlib\n"
    assert main(["stream", run, "--data", text, "--out", str(tmp_path / "s.png")]) == 2  # a picture that was asked for


def test_a_text_of_bytes_from_standard_input(tmp_path, capsys, monkeypatch):
    folder = saved(tmp_path / "bytes", "attention-sinks", ByteTokenizer(), window=4, sinks=1, **SMALL)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("aé€😀".encode() * 40)))
    assert main(["stream", folder, "--data", "-", "--recompute", "0"]) == 0
    out = capsys.readouterr().out
    assert "160 characters" in out and "1 sinks + 4 recent tokens" in out and "recomputation" not in out


def test_ctrl_c_shows_what_has_been_read(run, text, capsys, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 50)
    read, blocks = Streams.read, []

    def stopping(self, ids):
        if len(blocks) == 3:
            raise KeyboardInterrupt
        blocks.append(ids)
        read(self, ids)

    monkeypatch.setattr(Streams, "read", stopping)
    assert main(["stream", run, "--data", text]) == 130
    assert "150 characters" in capsys.readouterr().out


def test_fewer_tokens_are_read_if_asked(run, text, capsys):
    assert main(["stream", run, "--data", text, "--tokens", "33"]) == 0
    assert "33 characters" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["stream", "sample"])
@pytest.mark.parametrize(("variant", "options", "words", "sentence"), [
    ("transformer", ROPE, ["--window", "0"], "--window: 0 is too small, allowed: an integer from 1"),
    ("transformer", ROPE, ["--window", "3", "--sinks", "4"], "--sinks 4: the cache would have more sinks than recent tokens"),
    ("transformer", ROPE, ["--window", "7", "--sinks", "2"], "--window 7 and --sinks 2: a token would see 9 others"),
    ("transformer", SMALL, ["--window", "3"], "--window: this model was trained with --positions learned: "),
    ("transformer", dict(positions="sinusoidal"), ["--sinks", "1"], "--window: this model was trained with --positions sinus"),
    ("rwkv", SMALL, ["--window", "3"], "--window: rwkv has no cache of keys and values that could be cut, allowed: "),
    ("longnet", dict(positions="rope"), ["--window", "3"], "--window: longnet has no cache of keys and values that could be "),
])
def test_mistakes(command, variant, options, words, sentence, text, tmp_path, capsys):
    folder = saved(tmp_path / "run", variant, CHARACTERS, **{**SMALL, **options})
    assert main([command, folder, *words, *(["--data", text] if command == "stream" else [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minitv: error: " + sentence) and err.count("\n") == 1


def test_a_text_without_an_answer(run, tmp_path, capsys):
    (tmp_path / "one").write_text("a")
    assert main(["stream", run, "--data", str(tmp_path / "one")]) == 2
    assert "the text has 1 token, and a prediction needs" in capsys.readouterr().err


# -- writing


def test_a_window_writes_on_without_end(run):
    """In constant memory, and the same as a stream that is read at once."""
    pieces = next(streams(run, SampleOptions(window=3, sinks=2, temperature=0)))[1]
    assert len("".join(itertools.islice(pieces, 150))) == 150
    model = build("transformer", 11, **ROPE)
    written = list(generate(streaming(model, 3, 2), np.array([1, 2, 3]), 40, Random(0), temperature=0))
    ids = np.array([1, 2, 3, *written])
    with no_grad():
        logits = streaming(model, 3, 2)(ids[None, :-1]).numpy()[0]
    assert_close(logits[2:].argmax(-1), np.array(written))
    frame = together(streaming(model, 3, 2), np.array([[1]]), None, [Random(0)])
    assert len(list(itertools.islice(frame, 50))) == 50 and len(frame.gi_frame.f_locals["history"]) <= 9


def test_how_many_tokens_are_written():
    assert (SampleOptions().tokens, SampleOptions(window=3).tokens, SampleOptions(window=3, tokens=9).tokens) == (500, None, 9)
    with pytest.raises(UserError, match="--count 2: the first text has no end without --tokens, allowed: 1"):
        SampleOptions(sinks=1, count=2)


def test_the_command_writes_with_a_window(run, capsys):
    assert main(["sample", run, "--prompt", "abc", "--window", "3", "--tokens", "20"]) == 0
    assert len(capsys.readouterr().out.rstrip("\n")) <= 23
