"""Texts, their two parts, batches and windows."""

import hashlib
import io
import os
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitv.data import EMBEDDED_BYTES, Batches, load_text, split, windows
from minitv.errors import UserError


@pytest.fixture
def file(tmp_path):
    def write(data: bytes, name: str = "text.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


def give_stdin(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# Sources


def test_a_file_stays_as_it_is(file):
    data = "a\r\nb\rc\n é𝄞\x00\ufeff".encode()
    path = file(data)
    corpus = load_text(str(path))
    assert corpus.text.encode() == data and corpus.size_bytes == len(data)
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()
    assert corpus.description == str(path)


def test_a_leading_byte_order_mark_is_dropped(file):
    corpus = load_text(str(file("\ufeffab".encode())))
    assert corpus.text == "ab" and corpus.size_bytes == 2
    assert corpus.sha256 == hashlib.sha256(b"ab").hexdigest()


def test_a_folder_is_its_files_in_order(file, tmp_path):
    for name, data in {"b/1.txt": "é", "b.txt": "no end", "a.md": "\ufeffa\n", "b/2.txt": "z", "empty": "",
                       ".hidden": "x", ".git/config": "x", "b/.x/y": "x"}.items():
        file(data.encode(), name)
    corpus = load_text(str(tmp_path))
    assert corpus.text == "a\nno end\né\nz"
    assert corpus.description == f"{tmp_path}, 5 files"


def test_standard_input(monkeypatch):
    give_stdin(monkeypatch, "é\r\n".encode())
    corpus = load_text("-")
    assert corpus.text == "é\r\n" and corpus.description == "standard input"


def test_the_embedded_text():
    corpus = load_text("")
    assert corpus == load_text()
    assert EMBEDDED_BYTES <= corpus.size_bytes < 2 * EMBEDDED_BYTES
    assert corpus.text.isascii() and "\r" not in corpus.text and 90 <= len(set(corpus.text)) <= 100
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert "standard library" in corpus.description
    assert "\nimport " in corpus.text and "def " in corpus.text


def library(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return load_text("")


def test_the_embedded_text_is_chosen_by_names_and_has_one_line_end(monkeypatch, file, tmp_path):
    contents = {"one.py": b"one\r\n", "pack/two.py": b"two", "three.py": b"three\n", "_sysconfigdata_x.py": b"no",
                "test/x.py": b"no", "pack/tests/x.py": b"no", "site-packages/x.py": b"no", "data.txt": b"no",
                "accent.py": "é".encode(), "empty.py": b""}
    for name, data in contents.items():
        file(data, name)
    order = sorted(["one.py", "pack/two.py", "three.py"], key=lambda name: hashlib.sha256(name.encode()).digest())
    corpus = library(monkeypatch, tmp_path)
    assert corpus.text.split() == [name.split("/")[-1][:-3] for name in order]
    assert "\r" not in corpus.text and corpus.description.endswith("3 files")


def test_a_python_without_its_source(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"standard library, and .* has none: give a text with --data"):
        library(monkeypatch, tmp_path)


@pytest.mark.parametrize(("data", "sentence"), [
    (b"ab\xffcd", "byte offset 2 holds ff (hexadecimal), invalid start byte"),
    (b"\xff\xfea\x00", "byte offset 0 holds ff (hexadecimal)"),
    (b"abc\xe2\x82", "byte offset 3 holds e2 82 (hexadecimal), unexpected end of data"),
    (b"\xed\xb2\x80", "byte offset 0 holds ed (hexadecimal)"),
])
def test_what_is_not_utf8_is_located(file, monkeypatch, tmp_path, data, sentence):
    path = file(data)
    for source in (path, tmp_path):
        with pytest.raises(UserError) as error:
            load_text(str(source))
        assert f"--data: {path} is not UTF-8 text: {sentence}" in str(error.value)
    give_stdin(monkeypatch, data)
    with pytest.raises(UserError) as error:
        load_text("-")
    assert f"standard input is not UTF-8 text: {sentence}" in str(error.value)


def test_missing_and_empty_texts_are_sentences(file, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--data .*nowhere: there is no such file or folder"):
        load_text(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--data: .*, 0 files holds no text"):
        load_text(str(tmp_path))
    with pytest.raises(UserError, match=r"--data: .*text.txt holds no text"):
        load_text(str(file("\ufeff".encode())))
    give_stdin(monkeypatch, b"")
    with pytest.raises(UserError, match=r"--data: standard input holds no text"):
        load_text("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="there is no standard input"):
        load_text("-")
    with pytest.raises(UserError, match="cannot be read"):
        load_text(str(tmp_path / "text.txt" / "below"))


def test_a_file_that_may_not_be_read(file, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = file(b"a")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"--data .*text.txt: cannot be read: Permission denied"):
        load_text(str(path))


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root)))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match=r"the folder .* cannot be read: Permission denied"):
        load_text(str(tmp_path))


# Parts


def test_split():
    training, held_out = split(np.arange(1001), 64)
    assert training.tolist() == list(range(900)) and held_out.tolist() == list(range(900, 1001))
    assert [len(part) for part in split(np.arange(10), 3, 0.5)] == [5, 5]


@pytest.mark.parametrize(("tokens", "context", "sentence"), [
    (100, 10, "the held-out part (the last 10% of 100 tokens) has 10 tokens, and --context 10 needs at least 11"),
    (0, 1, "the training part (the first 90% of 0 tokens) has 0 tokens, and --context 1 needs at least 2"),
])
def test_a_text_too_short_to_split(tokens, context, sentence):
    with pytest.raises(UserError) as error:
        split(np.arange(tokens), context)
    assert str(error.value) == sentence + ": give a longer text with --data, or a smaller --context"
    assert split(np.arange(110), 10)[1].size == 11


# Batches


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_batches(batch, context, extra, seed, step):
    ids = np.arange(context + 1 + extra) * 7
    batches = Batches(ids, batch, context, seed)
    inputs, labels = batches.batch(step)
    assert inputs.shape == labels.shape == (batch, context) and inputs.dtype == labels.dtype == np.intp
    assert (labels == inputs + 7).all() and (np.diff(inputs, axis=1) == 7).all()
    assert inputs.min() >= 0 and labels.max() <= ids[-1]
    batches.batch(step + 1)
    for again in (batches, Batches(ids, batch, context, seed)):
        assert (again.batch(step)[0] == inputs).all()


def test_a_window_may_begin_anywhere():
    inputs, labels = Batches(np.arange(8), 200, 5, 1).batch(0)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2} and labels.max() == 7


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_no_part_is_seen_twice_before_every_part_was_seen(context, extra, batch, seed):
    ids = np.arange(context + extra)
    batches = Batches(ids, batch, context, seed)
    windows = max(1, len(ids) // context - 1)
    starts = np.concatenate([batches.batch(step)[0][:, 0] for step in range(3 * windows // batch + 1)])
    for epoch in range(len(starts) // windows):
        seen = np.sort(starts[epoch * windows:(epoch + 1) * windows])
        assert (np.diff(seen) == context).all()  # they touch and do not overlap
        assert seen[0] < 2 * context and len(ids) - seen[-1] <= 3 * context  # from end to end


def test_passes_over_the_text_differ():
    batches = Batches(np.arange(1000), 99, 10, 5)
    first, second = batches.batch(0)[0][:, 0], batches.batch(1)[0][:, 0]
    assert set(np.diff(np.sort(first))) == set(np.diff(np.sort(second))) == {10}
    assert first.min() != second.min() and (np.argsort(first) != np.argsort(second)).any()


def test_batches_differ_by_seed_and_step():
    ids = np.arange(10_000)
    draws = [Batches(ids, 4, 8, seed).batch(step)[0][:, 0] for seed in range(3) for step in range(3)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 9


def test_batches_of_a_text_that_is_too_short():
    with pytest.raises(UserError, match="the text of the batches has 5 tokens, and --context 5 needs at least 6"):
        Batches(np.arange(5), 1, 5, 0)


# Windows


@given(st.integers(1, 12), st.integers(1, 200), st.integers(0, 250))
def test_windows(context, extra, tokens):
    ids = np.arange(context + extra)
    inputs, labels = windows(ids, context, tokens)
    count = len(inputs)
    assert inputs.shape == labels.shape == (count, context) and inputs.dtype == ids.dtype
    assert (labels == inputs + 1).all() and (np.diff(inputs, axis=1) == 1).all()
    assert count == max(1, min(tokens // context, (len(ids) - 1) // context))
    starts = inputs[:, 0]
    steps = np.diff(starts)
    assert starts[0] == 0 and labels.max() <= ids[-1] and (steps >= context).all()
    assert steps.size == 0 or np.ptp(steps) <= 1  # evenly spaced
    assert len(ids) - 1 - starts[-1] <= (len(ids) - 1) / count + 1  # up to the end


def test_windows_that_cover_everything():
    inputs, labels = windows(np.arange(13), 4, 10**9)
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] and labels[-1, -1] == 12


def test_windows_of_a_text_that_is_too_short():
    with pytest.raises(UserError, match="the text of the windows has 4 tokens, and --context 4 needs at least 5"):
        windows(np.arange(4), 4, 100)
