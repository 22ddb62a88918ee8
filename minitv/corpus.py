"""The text of a run as token ids, in two parts: one to learn from, one held out.

    corpus = open_corpus("my.txt", context=64)
    corpus.training, corpus.held_out, corpus.tokenizer, corpus.baselines

**What is held out.** A tenth of the text, or the text of ``--val-data``. A single document, the embedded text too, gives its
last tenth. Of a folder, each large file gives its last tenth, so that three books are held out alike; the small ones stand in
the order of the SHA-256 of their paths, and the last tenth of them is held out, so that of thousands it is a random sample of
whole files. Each part is then one sequence of tokens, so no window reaches from one part into the other.

**Large texts** are read in blocks, and their ids, in the smallest type that holds the vocabulary, are mapped from a file that
the next run finds by the hash of the text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from . import ngram
from .data import check_length
from .errors import UserError, plain
from .kept import LIMIT, Kept
from .report import count
from .sources import Document, Reader, Source
from .tokenizer import TOKENIZERS, CharTokenizer, Tokenizer

FORMAT = 2  # of what is kept; another one is not read
SMALL = 4_000_000  # bytes; the ids of a shorter text are made anew each time
LARGE_FILE = 10_240, 0.01  # bytes or characters that a large file has at least, and its share of the text
TRAINING = 0.9  # the share of a text
COUNTED, SCORED = 2**22, 2**20  # training and held-out tokens that n-grams count and are scored on, 50 bytes each

_figures: dict[str, list[float]] = {}  # of the n-grams of small texts, for further runs of this process


@dataclass(frozen=True)
class Corpus:
    """Token ids for training and held out, and where they came from.

    ``sha256`` (hexadecimal) and ``size_bytes`` are those of the text in UTF-8; with ``--val-data`` the hash is that of both
    hashes. ``tokens_per_char``: of the training and of the held-out part.
    """

    training: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer
    description: str
    sha256: str
    size_bytes: int
    characters: int
    tokens_per_char: tuple[float, float]
    _kept: Kept | None = field(repr=False)
    _key: str = field(repr=False)
    _tell: Callable[[str], Any] = field(repr=False)

    @cached_property
    def baselines(self) -> list[float]:
        """Bits per held-out character of n-gram models of order 0, 1, ...; see ngram.py."""
        training, held_out = ngram.sample(self.training, COUNTED), ngram.sample(self.held_out, SCORED)
        if len(training) < len(self.training) or len(held_out) < len(self.held_out):
            self._tell(f"n-grams count {count(len(training))} of {count(len(self.training))} training tokens and are scored on "
                       f"{count(len(held_out))} of {count(len(self.held_out))} held-out tokens, in evenly spaced pieces")

        def make() -> list[float]:
            return ngram.ngram_bpc(training, held_out, self.tokenizer.vocab)

        version = hashlib.sha256(Path(ngram.__file__).read_bytes()).hexdigest()
        name = _name("ngrams", self._key, version, COUNTED, SCORED)
        if self._kept:
            bits = self._kept.value(name, make)
        elif (bits := _figures.get(name)) is None:
            bits = _figures[name] = make()
        return [value * self.tokens_per_char[1] for value in bits]


def open_corpus(data: str = "", val_data: str | None = None, tokenizer: str = "char", encoding: str = "utf-8", *,
                context: int = 1, saved: Tokenizer | None = None, expected: str | None = None,
                tell: Callable[[str], Any] | None = None) -> Corpus:
    """Read a text and make its ids; UserError when it cannot be read or a part is shorter than context + 1 tokens.

    ``data`` and ``val_data`` are sources as in ``Reader.open``. ``saved`` is the tokenizer of a checkpoint and comes before
    the name ``tokenizer``; ``expected`` is the ``sha256`` that the text must have. ``tell`` is called with sentences for the
    user, and prints them on stderr by default.
    """
    tell = tell or _note
    if saved is None and tokenizer not in TOKENIZERS:
        raise UserError(f"--tokenizer {tokenizer}: such tokens come with the weights of a model that was imported, which "
                        f"--init-from names; allowed without it: {', '.join(TOKENIZERS)}")
    kind = type(saved) if saved else TOKENIZERS[tokenizer]
    if data == val_data == "-":
        raise UserError("--val-data -: standard input is the text of --data already")

    def read(option: str, source: str) -> _Text:
        return _Text(Reader(option, encoding, kind.bytewise, tell).open(source), option)

    texts = [read("--data", data)]
    if val_data is None:
        sha256, description = texts[0].sha256, texts[0].description
        parts, of_training, of_held_out = _cut(texts[0], kind), "the first 90% of {}", "the last 10% of {}"
        if len(parts) > 1:
            of_training, of_held_out = "90% of {}", "10% of {}"
    else:
        texts.append(read("--val-data", val_data))
        if texts[0].sha256 == texts[1].sha256:
            tell("--val-data holds the same text as --data: the model is tested on what it was trained on")
        sha256 = hashlib.sha256(f"{texts[0].sha256} {texts[1].sha256}".encode()).hexdigest()
        description = f"{texts[0].description}, held out {texts[1].description}"
        parts = [_Part(document, size, size) for document, size in texts[0].measured(kind)]
        parts += [_Part(document, size, 0) for document, size in texts[1].measured(kind)]
        of_training, of_held_out = "all of --data", "all of --val-data"
    if expected not in (None, sha256):
        raise UserError(f"{description} is not the text this run began with; give that one with --data"
                        + " and --val-data" * (val_data is not None))
    size = sum(text.size for text in texts)
    kept = Kept(tell) if size >= SMALL else None

    def learn() -> str:
        return "".join(sorted(set().union(*(set(block) for part in parts for block in part.document.texts()))))

    if saved is None and kind is CharTokenizer:
        saved = CharTokenizer(kept.value(_name("alphabet", sha256), learn) if kept else learn())
    encoder = saved or kind()
    key = _name("ids", sha256, encoder.to_json(), [part.cut for part in parts])
    training, held_out, spelled = _ids(parts, encoder, kept, key, tell)
    tokens = len(training) + len(held_out)
    check_length(training, context, f"the training part ({of_training.format(f'{tokens} tokens')})")
    check_length(held_out, context, f"the held-out part ({of_held_out.format(f'{tokens} tokens')})")
    return Corpus(training, held_out, encoder, description, sha256, size, sum(text.characters for text in texts),
                  (len(training) / max(spelled[0], 1), len(held_out) / max(spelled[1], 1)), kept, key, tell)


class _Text:
    """A source that was read once: the hash and the size of its UTF-8, and how long each document is."""

    def __init__(self, source: Source, option: str):
        self.description = source.description
        self._documents = []  # each with its characters and bytes
        digest = hashlib.sha256()
        for document in source.documents:
            characters = size = 0
            for block in document.blocks():
                digest.update(block)
                size += len(block)
                characters += int(np.count_nonzero(np.frombuffer(block, np.int8) >= -64))  # the others continue one
            self._documents.append((document, characters, size))
        self.sha256 = digest.hexdigest()
        self.characters = sum(characters for _, characters, _ in self._documents)
        self.size = sum(size for _, _, size in self._documents)
        if not self.size:
            raise UserError(f"{option}: {self.description} holds no text")

    def measured(self, kind: type[Tokenizer]) -> list[tuple[Document, int]]:
        """The documents with their bytes or characters, by which a tokenizer cuts them."""
        return [(document, size if kind.bytewise else characters) for document, characters, size in self._documents]


class _Part(NamedTuple):
    """A document and how much of it is for training, in bytes or characters; the rest is held out."""

    document: Document
    size: int
    cut: int

    def of(self, held_out: bool) -> tuple[int, int]:
        """Where what is for training, or the rest, begins and ends."""
        return (self.cut, self.size) if held_out else (0, self.cut)


def _cut(text: _Text, kind: type[Tokenizer]) -> list[_Part]:
    """What of each document is held out."""
    measured = text.measured(kind)
    least = max(LARGE_FILE[0], LARGE_FILE[1] * sum(size for _, size in measured)) if len(measured) > 1 else 0
    small = int(sum(size for _, size in measured if size < least) * TRAINING)  # that much is for training
    parts = []
    for document, size in measured:
        cut = int(size * TRAINING) if size >= least else min(size, small)
        small -= cut if size < least else 0
        parts.append(_Part(document, size, cut))
    return parts


def _ids(parts: list[_Part], tokenizer: Tokenizer, kept: Kept | None, key: str, tell: Callable[[str], Any]
         ) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The ids of both parts, and how many characters each spells: from the disk, if they are kept there."""
    dtype = np.min_scalar_type(tokenizer.vocab - 1)
    numbers = 3  # stand before the ids: the tokens for training, and the characters of both parts
    header = numbers * np.dtype(np.int64).itemsize

    def write(file: BinaryIO) -> None:
        start = file.tell()
        file.write(bytes(header))
        tokens, spelled = [0, 0], [0, 0]  # of the training and of the held-out part
        for held_out in (False, True):
            for part in parts:
                first, end = part.of(held_out)
                if first == end:
                    continue
                for ids, characters in tokenizer.read(part.document, first, end):
                    file.write(ids.astype(dtype, copy=False))
                    tokens[held_out] += len(ids)
                    spelled[held_out] += characters
        file.seek(start)
        file.write(np.array([tokens[False], *spelled], np.int64))

    content = kept.find(key) if kept else None
    if kept and content is None and kept.keep(key, write):
        tell(f"the token ids are kept for the next run in {kept.folder} (at most {count(LIMIT)}B in all, the oldest go first)")
        content = kept.find(key)
    if content is None:
        memory = BytesIO()
        write(memory)
        content = memory.getbuffer()
    ids = np.frombuffer(content, dtype, offset=header)
    trained, *spelled = np.frombuffer(content, np.int64, numbers).tolist()
    return ids[:trained], ids[trained:], spelled


def _name(kind: str, *depends: Any) -> str:
    """The name of what is kept: a word, and a hash of what it depends on."""
    return f"{kind}-{hashlib.sha256(json.dumps([FORMAT, *depends]).encode()).hexdigest()[:32]}"


def _note(text: str) -> None:
    print(f"note      {plain(text)}", file=sys.stderr, flush=True)
