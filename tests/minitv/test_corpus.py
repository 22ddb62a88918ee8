"""A corpus: what is held out, ids on disk, large texts in little memory, n-grams on a part of a text."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autograd import private
from minitv import corpus as corpora
from minitv import kept, ngram
from minitv.corpus import open_corpus
from minitv.errors import UserError
from minitv.ngram import ngram_bpc
from minitv.sources import rank
from minitv.tokenizer import ByteTokenizer, CharTokenizer


@pytest.fixture
def told():
    return []


@pytest.fixture
def read(tmp_path, told):
    """Write texts into files of a folder, and open one of them or the folder."""
    root = tmp_path / "texts"

    def read_(contents="", name="", **options):
        files = {"text.txt": contents} if isinstance(contents, str | bytes) else contents
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
        name = name or ("text.txt" if isinstance(contents, str | bytes) else "")
        return open_corpus(str(root / name), tell=told.append, **options)

    return read_


def decode(corpus):
    return corpus.tokenizer.decode(corpus.training), corpus.tokenizer.decode(corpus.held_out)


# What is held out


def test_a_file_gives_its_last_tenth(read, tmp_path, told):
    text = "".join(chr(97 + i % 26) for i in range(1001))
    corpus = read(text, context=64)
    assert decode(corpus) == (text[:900], text[900:])
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (corpus.size_bytes, corpus.characters, corpus.tokens_per_char) == (1001, 1001, (1.0, 1.0))
    assert corpus.description == str(tmp_path / "texts" / "text.txt") and told == []


def test_the_embedded_text_gives_its_last_tenth():
    corpus = open_corpus(context=64)
    text = "".join(decode(corpus))
    assert len(corpus.training) == int(0.9 * len(text)) and corpus.characters == len(text)
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_each_of_three_books_gives_its_last_tenth(read):
    books = {f"{letter}.txt": letter * 20_000 + "\n" for letter in "abc"}
    corpus = read(books, context=64)
    training, held_out = decode(corpus)
    assert {letter: training.count(letter) for letter in "abc"} == dict.fromkeys("abc", 18_000)
    assert {letter: held_out.count(letter) for letter in "abc"} == dict.fromkeys("abc", 2000)


def test_of_many_files_whole_ones_are_held_out(read):
    names = [f"{i}.txt" for i in range(2000)]
    letters = {name: chr(0x4E00 + i) for i, name in enumerate(names)}
    corpus = read({name: letter * 9 + "\n" for name, letter in letters.items()}, context=64)
    training, held_out = decode(corpus)
    last = sorted(names, key=rank)[1800:]
    assert set(held_out) == {"\n", *(letters[name] for name in last)} and len(held_out) == 2000
    assert not set(training) & set(held_out) - {"\n"}


def test_a_huge_file_does_not_hide_the_small_ones(read):
    small = {f"{i:03}.txt": chr(0x4E00 + i) * 99 + "\n" for i in range(500)}
    corpus = read({"huge.txt": "x" * 1_000_000 + "\n", **small}, context=64)
    _, held_out = decode(corpus)
    assert held_out.count("x") == 100_000 and len(held_out) == 105_001
    assert len(set(held_out) - {"x", "\n"}) == 50


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=12))
def test_both_parts_are_the_whole_text(sizes):
    class Text:
        def measured(self, kind):
            return [(None, size) for size in sizes]

    parts = corpora._cut(Text(), CharTokenizer)
    assert all(0 <= part.cut <= part.size for part in parts) and [part.size for part in parts] == sizes
    assert abs(sum(part.cut for part in parts) - 0.9 * sum(sizes)) < len(sizes) + 1
    assert len(parts) > 1 or parts[0].cut == int(0.9 * sizes[0])


def test_the_split_depends_on_nothing_but_names_and_contents(read, tmp_path, monkeypatch):
    contents = {f"{i}/{j}.txt": f"{i} {j}\n" * 40 for i in range(5) for j in range(5)}
    one = read(contents, context=8)
    (tmp_path / "texts").rename(tmp_path / "moved")
    walk = os.walk

    def another_order(root, onerror):
        for folder, folders, files in walk(root, onerror=onerror):
            folders.reverse()
            files.reverse()
            yield folder, folders, files

    monkeypatch.setattr(os, "walk", another_order)
    monkeypatch.chdir(tmp_path / "moved")
    two = open_corpus(".", context=8)
    assert (one.training == two.training).all() and (one.held_out == two.held_out).all() and one.sha256 == two.sha256


@pytest.mark.parametrize(("text", "context", "sentence"), [
    ("a" * 100, 10, "the held-out part (the last 10% of 100 tokens) has 10 tokens, and --context 10 needs at least 11"),
    ("a", 1, "the training part (the first 90% of 1 tokens) has 0 tokens, and --context 1 needs at least 2"),
    ({"a": "a" * 50, "b": "b" * 50}, 10, "the held-out part (10% of 101 tokens) has 11 tokens"),
])
def test_a_text_too_short_to_split(read, text, context, sentence):
    if not isinstance(text, str):
        assert len(read(text, context=context).held_out) == 11
        context = 11
    with pytest.raises(UserError) as error:
        read(text, context=context)
    assert str(error.value).startswith(sentence)
    assert str(error.value).endswith(": give a longer text with --data, or a smaller --context")


@pytest.mark.parametrize("text", ["", "\ufeff", {"a": "", "b": ""}])
def test_empty_texts_are_sentences(read, text):
    with pytest.raises(UserError, match=r"--data: .* holds no text"):
        read(text)


# Held-out text of its own


def test_a_text_of_its_own_is_held_out(read, tmp_path, told):
    (tmp_path / "val.txt").write_text("held ß out", encoding="utf-8")
    corpus = read("all of it", val_data=str(tmp_path / "val.txt"), context=8)
    assert decode(corpus) == ("all of it", "held ß out") and told == []
    assert corpus.description == f"{tmp_path / 'texts' / 'text.txt'}, held out {tmp_path / 'val.txt'}"
    assert corpus.size_bytes == 20 and corpus.characters == 19
    others = read("all of it" * 3), read("all of it!", val_data=str(tmp_path / "val.txt"))
    assert corpus.sha256 not in [other.sha256 for other in others]
    folders = read({"a/1": "one", "a/2": "two", "b/3": "three"}, "a", val_data=str(tmp_path / "texts" / "b"), context=3)
    assert sorted(decode(folders)[0].split()) == ["one", "two"] and decode(folders)[1] == "three"


def test_faults_of_a_held_out_text_name_its_option(read, tmp_path, told):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff")
    for name, sentence in (("nowhere", "there is no such file"), ("empty", "holds no text"), ("binary", "is not UTF-8 text")):
        with pytest.raises(UserError, match=f"--val-data.*{name}.*{sentence}"):
            read("abc", val_data=str(tmp_path / name))
    with pytest.raises(UserError, match=r"the held-out part \(all of --val-data\) has 3 tokens, and --context 3"):
        read({"a": "abcdefgh", "b": "abc"}, "a", val_data=str(tmp_path / "texts" / "b"), context=3)
    with pytest.raises(UserError, match="--val-data -: standard input is the text of --data already"):
        open_corpus("-", "-")
    path = str(tmp_path / "texts" / "a")
    open_corpus(path, path, tell=told.append)
    assert told == ["--val-data holds the same text as --data: the model is tested on what it was trained on"]


# Tokens


def test_bytes_of_any_file(read):
    data = bytes(range(256)) * 4
    corpus = read(data, tokenizer="byte", context=64)
    assert bytes(corpus.training) + bytes(corpus.held_out) == data
    assert corpus.size_bytes == 1024 and corpus.characters == 1024 - 4 * 64  # some continue a character
    corpus = read("é" * 95 + "a" * 10, tokenizer="byte")
    assert corpus.tokens_per_char == (2.0, 20 / 15)


@pytest.mark.parametrize(("vocab", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16),
                                              (65537, np.uint32)])
def test_ids_have_the_smallest_type(read, vocab, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + vocab))) * (10 if vocab == 2 else 2)
    corpus = read(text)
    assert corpus.training.dtype == corpus.held_out.dtype == dtype and corpus.tokenizer.vocab == vocab
    assert "".join(decode(corpus)) == text


def test_a_stored_tokenizer_is_used(read, tmp_path):
    corpus = read("abcabcabc" * 2, saved=CharTokenizer("abcd"), tokenizer="byte")
    assert corpus.tokenizer.characters == "abcd"
    assert isinstance(read("abc" * 9, saved=ByteTokenizer()).tokenizer, ByteTokenizer)
    with pytest.raises(UserError, match=r"--data: .*text.txt: the character 'é' \(U\+00E9\) at offset 2000002 is unknown"):
        read("abc" * 666_667 + "aé" + "c" * 10, saved=CharTokenizer("abcd"))


def test_another_text_than_the_one_of_a_run_is_refused(read, tmp_path):
    sha256 = read("abc" * 9).sha256
    assert read("abc" * 9, expected=sha256).sha256 == sha256
    with pytest.raises(UserError, match=r"text.txt is not the text this run began with; give that one with --data$"):
        read("abd" * 9, expected=sha256, saved=CharTokenizer("abc"))
    with pytest.raises(UserError, match="give that one with --data and --val-data"):
        read("abc" * 9, expected=sha256, val_data=str(tmp_path / "texts"))


# Ids on disk


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where entries of texts lie; every text counts as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "SMALL", 0)
    return tmp_path / "cache" / "minitv" / "texts"


TEXT = "the quick brown fox, \n" * 50


def entries(folder, kind=""):
    return sorted(path for path in folder.iterdir() if path.name.startswith(kind))


def same(one, two):
    assert one.training.dtype == two.training.dtype and one.tokenizer.to_json() == two.tokenizer.to_json()
    assert (one.training == two.training).all() and (one.held_out == two.held_out).all()
    assert one.tokens_per_char == two.tokens_per_char and one.baselines == two.baselines


def test_small_texts_are_not_kept(read, folder, monkeypatch):
    """But their n-grams are counted once in a process."""
    monkeypatch.setattr(corpora, "SMALL", len(TEXT) + 1)
    monkeypatch.setattr(corpora, "_figures", {})
    first = read(TEXT).baselines
    assert len(first) == 6 and not folder.exists()
    monkeypatch.setattr(ngram, "ngram_bpc", lambda *_: [1.0])
    assert read(TEXT).baselines == first and read(TEXT[1:]).baselines == [1.0]


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_kept_text_is_the_same_and_is_not_encoded_again(read, folder, monkeypatch, tokenizer, told):
    contents = {f"{i}.txt": TEXT + chr(0x1F600 + i) for i in range(30)} | {"large.txt": TEXT * 20}
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "SMALL", 10**9)
        fresh = read(contents, tokenizer=tokenizer)
        assert len(fresh.baselines) == 6
    first = read(contents, tokenizer=tokenizer)
    same(fresh, first)
    assert told == [f"the token ids are kept for the next run in {folder} (at most 16.0GB in all, the oldest go first)"]
    for owner in (CharTokenizer, ByteTokenizer):
        monkeypatch.setattr(owner, "read", lambda *_: pytest.fail("it was encoded again"))
    monkeypatch.setattr(ngram, "ngram_bpc", lambda *_: pytest.fail("n-grams were counted again"))
    second = read(contents, tokenizer=tokenizer)
    same(first, second)
    same(first, read(contents, saved=first.tokenizer))
    assert len(told) == 1 and not second.training.flags.writeable
    assert {path.stat().st_mode & 0o777 for path in entries(folder)} == {0o600} or os.name == "nt"


def test_entries_depend_on_all_that_goes_into_them(read, folder, tmp_path):
    (tmp_path / "val").write_text("the fox\n" * 9)
    for options in ({}, {"tokenizer": "byte"}, {"saved": CharTokenizer("".join(sorted({*TEXT, "Z"})))},
                    {"val_data": str(tmp_path / "val")}):
        before = len(entries(folder, "ids")) if folder.exists() else 0
        assert len(read(TEXT, **options).baselines) == 6
        assert len(entries(folder, "ids")) == len(entries(folder, "ngrams")) == before + 1
    same(read({"a": TEXT, "b": TEXT}), read({"a": TEXT, "b": TEXT}))


@pytest.mark.parametrize("harm", ["a bit", "cut", "empty", "another name"])
@pytest.mark.parametrize("kind", ["ids", "alphabet", "ngrams"])
def test_a_damaged_entry_is_made_anew(read, folder, told, harm, kind):
    first = read(TEXT)
    bits = first.baselines
    (path,) = entries(folder, kind)
    data = path.read_bytes()
    others = [other for other in entries(folder) if other != path]
    path.unlink()  # and not written in place: the ids are mapped
    path.write_bytes({"a bit": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b"",
                      "another name": others[0].read_bytes()}[harm])
    path.chmod(0o600)
    del told[:]
    second = read(TEXT)
    assert second.baselines == bits
    same(first, second)
    assert told[0] == f"{path}: a damaged file is made anew" and path.read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners and modes of this kind")
def test_an_entry_that_others_could_write_is_made_anew(read, folder, told):
    first = read(TEXT)
    (path,) = entries(folder, "ids")
    path.chmod(0o666)
    del told[:]
    same(first, read(TEXT))
    assert told[0] == f"{path}: a file that others could write is made anew"
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_folder_the_ids_stay_in_memory(read, folder, told, tmp_path, monkeypatch):
    monkeypatch.setattr(private, "places", lambda name: [tmp_path / "file"])
    (tmp_path / "file").touch()
    corpus = read(TEXT)
    assert "".join(decode(corpus)) == TEXT and len(corpus.baselines) == 6
    assert told == ["token ids are kept in memory and not on disk, since no folder will do: "
                    f"{tmp_path / 'file' / 'texts'}: {os.strerror(errno.EEXIST)}"]


@pytest.mark.parametrize("where", ["mkstemp", "write", "replace"])
def test_a_full_disk_ends_nothing(read, folder, told, monkeypatch, where):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        monkeypatch.setattr(kept, "_seal", refuse)
    else:
        monkeypatch.setattr(*((tempfile, "mkstemp") if where == "mkstemp" else (os, "replace")), refuse)
    corpus = read(TEXT)
    assert "".join(decode(corpus)) == TEXT and len(corpus.baselines) == 6
    assert told == [f"token ids are kept in memory and not on disk: {folder}: {os.strerror(errno.ENOSPC)}"]
    assert not entries(folder)


def test_a_text_that_is_no_text_leaves_nothing(read, folder):
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read(TEXT.encode() + b"\xff")
    assert not entries(folder)


def test_the_oldest_entries_are_removed(read, folder, monkeypatch):
    def ids():
        return {path.name for path in entries(folder, "ids")}

    read("a" * 1000)
    first = ids()
    read("b" * 1000)
    second = ids() - first
    for age, path in enumerate(entries(folder)):
        os.utime(path, (age, age))
    monkeypatch.setattr(kept, "LIMIT", 2500)
    read("a" * 1000)  # which makes it the one that was used last
    read("c" * 1000)
    assert first < ids() and not second & ids() and len(ids()) == 2
    monkeypatch.setattr(kept, "LIMIT", 10)
    corpus = read("d" * 1000)
    assert len(ids()) == 1 and set(corpus.training) == {0}


def _digest(path):
    corpora.SMALL = 0
    corpus = open_corpus(path, tell=lambda text: None)
    return hashlib.sha256(corpus.training.tobytes() + corpus.held_out.tobytes()).hexdigest()


def test_processes_do_not_disturb_one_another(folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 500)
    with ProcessPoolExecutor(4) as pool:
        digests = set(pool.map(_digest, [str(path)] * 12))
    assert len(digests) == 1 and [path.name[:3] for path in entries(folder)] == ["alp", "ids"]


# Memory

PEAK = """
import json, resource, sys
from minitv.corpus import open_corpus
from minitv.data import Batches
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
small = open_corpus(sys.argv[1], tokenizer=sys.argv[3], context=64)
before = peak()
large = open_corpus(sys.argv[2], tokenizer=sys.argv[3], context=64, tell=lambda text: None)
print(json.dumps([len(large.training), before, peak()]))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such figure")
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_memory_does_not_grow_with_the_text(folder, tmp_path, tokenizer):
    line = "a line of a large text, é\n"
    (tmp_path / "small.txt").write_text(line * 50_000, encoding="utf-8")
    with open(tmp_path / "large.txt", "w", encoding="utf-8") as file:
        for _ in range(64):
            file.write(line * 40_000)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small.txt"), str(tmp_path / "large.txt"), tokenizer]
    for _ in range(2):  # the second time from disk
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(corpora.__file__).parents[1])
        tokens, before, after = json.loads(run.stdout)
        assert tokens > 50_000_000 and after - before < 30  # MB


# N-grams


def test_n_grams_of_a_large_text_take_evenly_spaced_pieces(read, monkeypatch, told):
    monkeypatch.setattr(ngram, "PIECE", 16)
    monkeypatch.setattr(corpora, "COUNTED", 128)
    monkeypatch.setattr(corpora, "SCORED", 32)
    corpus = read("".join(chr(97 + i * i % 26) for i in range(2000)))
    starts = np.linspace(0, 1800 - 16, 8).astype(int)
    training = np.concatenate([corpus.training[start:start + 16] for start in starts])
    held_out = np.concatenate([corpus.held_out[:16], corpus.held_out[-16:]])
    assert corpus.baselines == ngram_bpc(training, held_out, corpus.tokenizer.vocab)
    assert told == ["n-grams count 128 of 1.8k training tokens and are scored on 32 of 200 held-out tokens, "
                    "in evenly spaced pieces"]


def test_n_grams_are_in_bits_per_character(read):
    corpus = read("é" * 500 + "ü" * 500 + "éü" * 100, tokenizer="byte")
    assert corpus.baselines == [2 * bits for bits in ngram_bpc(corpus.training, corpus.held_out, 256)]


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_sample_has_about_the_size_that_was_asked_for(length, tokens):
    part = ngram.sample(np.arange(length), tokens)
    most = min(length, tokens)
    assert most - tokens / ngram.PIECE - 1 <= len(part) <= most and (np.diff(part) > 0).all()
