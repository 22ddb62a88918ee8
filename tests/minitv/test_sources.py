"""Where text comes from: files, folders, pipes, standard input, the embedded text; encodings, and what is no text."""

import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitv import sources
from minitv.errors import RunError, UserError
from minitv.files import PICTURE, TABLE
from minitv.sources import EMBEDDED_BYTES, Reader, check_encoding, rank

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such pipes and devices")


@pytest.fixture
def file(tmp_path):
    def write(data: bytes, name: str = "text.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


def load(source="", *, encoding="utf-8", any_bytes=False, option="--data"):
    """The documents of a source joined, its description, and what the user is told."""
    told = []
    found = Reader(option, encoding, any_bytes, told.append).open(str(source))
    joined = b"".join(block for document in found.documents for block in document.blocks())
    if not any_bytes:
        assert "".join(text for document in found.documents for text in document.texts()).encode() == joined
    return SimpleNamespace(data=joined, description=found.description, told=told, documents=found.documents)


def give_stdin(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# Files


@pytest.mark.parametrize("block", [1, 2, 3, 2**20])
def test_a_file_stays_as_it_is(file, monkeypatch, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    data = "a\r\nb\rc\n é𝄞\x00\ufeff".encode()
    path = file(data)
    found = load(path)
    assert found.data == data and found.description == str(path) and found.told == []


def test_a_leading_byte_order_mark_is_dropped(file):
    assert load(file("\ufeffab".encode())).data == load(file("\ufeffab".encode()), any_bytes=True).data == b"ab"


def test_missing_files_are_sentences(file, tmp_path):
    with pytest.raises(UserError, match=r"--data .*nowhere: there is no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"--val-data .*nowhere: there is no such file or folder"):
        load(tmp_path / "nowhere", option="--val-data")
    file(b"a")
    for name in (tmp_path / "text.txt" / "below", "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            load(name)


def test_a_file_that_may_not_be_read(file, monkeypatch):
    path = file(b"a")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"--data .*text.txt: cannot be read: Permission denied"):
        load(path)


def test_a_file_that_changes_while_it_is_read_is_refused(file):
    path = file(b"abc")
    (document,) = Reader("--data", "utf-8", False, print).open(str(path)).documents
    assert list(document.texts()) == ["abc", ""]
    path.write_bytes(b"abd")
    with pytest.raises(RunError, match=r"text.txt changed while it was read"):
        list(document.blocks())


# Encodings


@pytest.mark.parametrize(("data", "sentence"), [
    (b"ab\xffcd", "byte offset 2 holds ff (hexadecimal), invalid start byte"),
    (b"\xff\xfea\x00", "byte offset 0 holds ff (hexadecimal)"),
    (b"abc\xe2\x82", "byte offset 3 holds e2 82 (hexadecimal), unexpected end of data"),
    (b"\xed\xb2\x80", "byte offset 0 holds ed (hexadecimal)"),
    (b"\xef\xbb\xbfab\xff", "byte offset 5 holds ff (hexadecimal)"),
])
@pytest.mark.parametrize("block", [1, 2**20])
def test_what_is_not_utf8_is_located(file, monkeypatch, tmp_path, data, sentence, block):
    path = file(data)
    for source in (path, tmp_path):
        monkeypatch.setattr(sources, "BLOCK", block)
        with pytest.raises(UserError) as error:
            load(source)
        assert f"--data: {path} is not UTF-8 text: {sentence}" in str(error.value)
        assert "another encoding with --encoding " in str(error.value) and "any bytes with --tokenizer byte" in str(error.value)
    give_stdin(monkeypatch, data)
    with pytest.raises(UserError) as error:
        load("-")
    assert f"standard input is not UTF-8 text: {sentence}" in str(error.value)


def test_a_mark_of_another_encoding_is_understood(file):
    with pytest.raises(UserError, match="--encoding utf-16"):
        load(file("ab".encode("utf-16")))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "UTF-32", "utf-8-sig", "shift_jis", "utf-7"])
@pytest.mark.parametrize("block", [1, 3, 2**20])
def test_encodings(file, monkeypatch, encoding, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    text = "one\r\ntwo\n" + ("é" if encoding != "shift_jis" else "日本")
    assert load(file(text.encode(encoding)), encoding=encoding).data == text.encode()
    assert load(file(text.encode(encoding)), encoding=encoding, any_bytes=True).data == text.encode()


def test_what_is_not_text_in_an_encoding_is_located(file):
    with pytest.raises(UserError, match=r"text.txt is not ASCII text: byte offset 1 holds c3 \(hexadecimal\)"):
        load(file("aé".encode()), encoding="ascii")
    with pytest.raises(UserError, match=r"text.txt is not UTF-7 text: it holds U\+D800, half of a character"):
        load(file("a\ud800".encode("utf-7")), encoding="utf-7")


@pytest.mark.parametrize(("name", "hint"), [("latn-1", "did you mean latin-1?"), ("utf9", "did you mean utf"), ("", ""),
                                            ("hex", "such as utf-8"), ("rot13", "such as utf-8"), ("a\0b", "such as utf-8")])
def test_an_unknown_encoding_is_a_sentence(name, hint):
    with pytest.raises(UserError, match=r"--encoding: .* is unknown, allowed are the text encodings of Python") as error:
        check_encoding(name)
    assert hint in str(error.value)


# Folders


def test_a_folder_is_its_files_in_the_order_of_a_hash(file, tmp_path):
    contents = {"b/1.txt": "é", "b.txt": "no end", "a.md": "\ufeffa\n", "b/2.txt": "z", "empty": ""}
    for name, data in {**contents, ".hidden": "x", ".git/config": "x", "b/.x/y": "x"}.items():
        file(data.encode(), name)
    found = load(tmp_path)
    names = sorted(contents, key=lambda name: hashlib.sha256(name.encode()).digest())
    ended = [contents[name].removeprefix("\ufeff") for name in names]
    ended = [part if part.endswith("\n") or not part else part + "\n" for part in ended[:-1]] + ended[-1:]
    assert found.data == "".join(ended).encode()
    assert found.description == f"{tmp_path}, 5 files" and found.told == []


def test_a_folder_of_one_file_is_that_file(file, tmp_path):
    path = file(b"one line, no end")
    assert load(tmp_path).data == load(path).data


def test_paths_rank_alike_on_every_machine():
    assert rank("é") == rank("e\u0301")  # how some file systems spell it
    assert rank("a/b.txt") == hashlib.sha256(b"a/b.txt").digest()
    assert rank("\udcff.txt") == hashlib.sha256(b"\xff.txt").digest()  # a name that is not UTF-8


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root)))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match=r"the folder .* cannot be read: Permission denied"):
        load(tmp_path)


NO_TEXT = {"zeros": b"ab\0c", "a picture": b"\x89PNG\r\n\x1a\n\0", "compressed": b"\x1f\x8b\x08\x01\x02\xff\xfe" * 9,
           "late": b"a" * 5000 + b"\0"}


@pytest.mark.parametrize("data", NO_TEXT.values(), ids=NO_TEXT)
def test_files_of_a_folder_that_are_no_text_are_left_out_and_named(file, tmp_path, data):
    file(b"text\n", "a.txt")
    file(data, "z.bin")
    assert load(tmp_path).data == b"text\n"
    assert load(tmp_path).told == [f"--data {tmp_path}: left out: 1 file that is no text (z.bin)"]
    assert data in load(tmp_path, any_bytes=True).data and load(tmp_path, any_bytes=True).told == []
    assert load(tmp_path / "z.bin", any_bytes=True).data == data


@pytest.mark.parametrize("data", [b"", b"a\x1b[31mred\x07\f\b", "\x01é".encode(), "é".encode() * 5000,
                                  b"x" + "é".encode() * 5000])
def test_text_with_odd_characters_is_text(file, tmp_path, data):
    file(data)
    assert load(tmp_path).data == data and load(tmp_path).told == []


def test_text_of_another_encoding_is_not_left_out(file, tmp_path):
    file("ça va".encode("latin-1"))
    with pytest.raises(UserError, match=r"text.txt is not UTF-8 text"):
        load(tmp_path)
    assert load(tmp_path, encoding="latin-1").data == "ça va".encode()
    file("ça va".encode("utf-16"))
    assert load(tmp_path, encoding="utf-16").data == "ça va".encode()


# What minitv writes


RECORD = b'{"step": 1, "loss": 3.14159}\n'
RUNS = {
    "a checkpoint": {"last/state.json": b"{}", "last/model.safetensors": b"words"},
    "one that a save was killed at": {".last.old/state.json": b"{}", "notes": b"words"},
    "the best": {"best/state.json": b"{}"},
    "a log": {"log.jsonl": b'{"config": {}}\n' + RECORD, "curve.png": b"words"},
    "a torn log": {"log.jsonl": b'{"config": {"variant": "trans'},
    "a log of records": {"log.jsonl": RECORD * 2000},
}


@pytest.mark.parametrize("any_bytes", [False, True])
@pytest.mark.parametrize("files", RUNS.values(), ids=RUNS)
def test_runs_are_no_text(file, tmp_path, files, any_bytes):
    file(b"text\n")
    before = load(tmp_path, any_bytes=any_bytes)
    for name, data in files.items():
        file(data, f"runs/transformer/{name}")
    found = load(tmp_path, any_bytes=any_bytes)
    assert (found.data, found.description) == (before.data, before.description)
    assert found.told == [f"--data {tmp_path}: left out: 1 folder of a run ({Path('runs', 'transformer')})"]


def test_the_folder_of_a_run_may_hold_its_text(file, tmp_path):
    file(b"text\n")
    for name in ("last/state.json", "log.jsonl", "curve.png"):
        file(RECORD, name)
    assert load(tmp_path, any_bytes=True).data == b"text\n"


def test_other_files_called_log_are_text(file, tmp_path):
    file(b'{"question": "why?"}\n', "chat/log.jsonl")
    assert load(tmp_path).data == b'{"question": "why?"}\n'


def test_files_of_compare_are_no_text_at_any_moment(file, tmp_path):
    file(b"text\n")
    file(b"text = 1\n", "settings.toml")
    before = load(tmp_path, any_bytes=True).data
    (tmp_path / "runs" / "compare" / "rwkv-0").mkdir(parents=True)
    file(b"layers = 1\n", "runs/compare/rwkv-0.toml")
    file(b"", "runs/compare/rwkv-0/.lock")
    assert load(tmp_path, any_bytes=True).data == before
    file(RECORD, "runs/compare/rwkv-0/log.jsonl")
    assert load(tmp_path, any_bytes=True).data == before
    file(json.dumps({"metric": {"name": "accuracy"}, "runs": [], "variants": []}, indent=1).encode(), f"runs/compare/{TABLE}")
    file(b"\x89PNG", f"runs/compare/{PICTURE}")
    found = load(tmp_path, any_bytes=True)
    assert found.data == before
    assert found.told == [f"--data {tmp_path}: left out: 1 folder of a run ({Path('runs', 'compare', 'rwkv-0')}); "
                          f"3 files that minitv wrote ({Path('runs', 'compare', TABLE)}, ...)"]


@posix
def test_what_a_folder_holds_besides_files_is_named(file, tmp_path):
    file(b"text\n", "a/text.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    found = load(tmp_path)
    assert found.data == b"text\n"
    assert found.told == [f"--data {tmp_path}: left out: 1 link to a folder (b); "
                          "2 pipes, devices or broken links (broken, ...)"]


# Pipes, devices, standard input


@posix
def test_a_pipe_is_read_and_the_user_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 4)
    monkeypatch.setattr(sources, "SPOOLED", 8)  # the rest lies on disk
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = "a pipe, é and more".encode()
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    found = load(path)
    writer.join()
    assert found.data == data
    assert found.told == [f"--data {path}: this is a pipe, it is read until its writer closes it"]


@posix
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_devices_are_refused(path, monkeypatch):
    with pytest.raises(UserError, match=f"--data {path}: this is a device or a socket"):
        load(path)
    with open(path, "rb") as device:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=device))
        with pytest.raises(UserError, match="--data -: standard input is a device, give it a file or a pipe"):
            load("-")


def test_standard_input(monkeypatch):
    give_stdin(monkeypatch, "é\r\n".encode())
    found = load("-")
    assert found.data == "é\r\n".encode() and found.description == "standard input"
    assert found.told == ["--data -: standard input is read until its writer closes it"]


def test_standard_input_from_a_file_is_not_copied(file, monkeypatch):
    monkeypatch.setattr(sources.tempfile, "SpooledTemporaryFile", lambda *_: pytest.fail("it was copied"))
    with open(file(b"first\nrest"), "rb") as stream:
        stream.readline()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
        found = load("-")
    assert found.data == b"rest" and found.told == []


@posix
def test_a_terminal_is_asked_for_text_until_one_control_d():
    program = ("import sys; from minitv.sources import Reader;"
               "print(list(Reader('--data', 'utf-8', False, print).open('-').documents[0].blocks()))")
    leader, follower = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", program], stdin=follower, stdout=subprocess.PIPE, text=True)
    os.close(follower)
    assert child.stdout.readline() == "--data -: this is a terminal, type the text and end it with Ctrl-D\n"
    os.write(leader, b"typed\n\x04")
    try:
        assert child.communicate(timeout=60)[0] == "[b'typed\\n']\n"
    finally:
        child.kill()
        os.close(leader)


def test_no_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--data -: there is no standard input"):
        load("-")


def test_a_pipe_that_does_not_fit_is_a_sentence(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources.tempfile, "SpooledTemporaryFile", lambda size: Full())
    give_stdin(monkeypatch, b"a")
    with pytest.raises(RunError, match=r"does not fit into the folder of temporary files, .*: No space left on device"):
        load("-")


# The embedded text


def test_the_embedded_text():
    found = load()
    assert EMBEDDED_BYTES <= len(found.data) < 2 * EMBEDDED_BYTES
    assert found.data == load("").data and len(found.documents) == 1
    assert found.data.isascii() and b"\r" not in found.data and 90 <= len(set(found.data)) <= 100
    assert "standard library" in found.description
    assert b"\nimport " in found.data and b"def " in found.data


def library(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return load("")


def test_the_embedded_text_is_chosen_by_names_and_has_one_line_end(monkeypatch, file, tmp_path):
    contents = {"one.py": b"one\r\n", "pack/two.py": b"two", "three.py": b"three\n", "_sysconfigdata_x.py": b"no",
                "test/x.py": b"no", "pack/tests/x.py": b"no", "site-packages/x.py": b"no", "data.txt": b"no",
                "accent.py": "é".encode(), "empty.py": b""}
    for name, data in contents.items():
        file(data, name)
    order = sorted(["one.py", "pack/two.py", "three.py"], key=lambda name: hashlib.sha256(name.encode()).digest())
    found = library(monkeypatch, tmp_path)
    assert found.data.decode().split() == [name.split("/")[-1][:-3] for name in order]
    assert b"\r" not in found.data and found.description.endswith("3 files")


def test_a_python_without_its_source(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"standard library, and .* has none: give a text with --data"):
        library(monkeypatch, tmp_path)
