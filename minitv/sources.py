"""Where text comes from: files, folders, pipes, standard input, and the source of Python's standard library.

A source is a list of documents, and a document is read in blocks, as often as it is needed: a text may be larger than memory.
"""

from __future__ import annotations

import codecs
import contextlib
import encodings.aliases
import hashlib
import io
import os
import platform
import stat
import sys
import sysconfig
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import checkpoint
from .config import did_you_mean
from .errors import RunError, UserError, quoted
from .files import PICTURE, TABLE
from .log import DAMAGED, LOG
from .picture import CURVE, READINGS

Block = TypeVar("Block", str, bytes)

BLOCK = 2**20  # bytes that are read at once
HEAD = 2**13  # bytes that show whether a file is text
SPOOLED = 2**24  # what comes through a pipe and is longer lies in a temporary file
EMBEDDED_BYTES = 1_500_000  # the embedded text ends with the file that reaches this size
# no programs of the library: its tests, bundled tools, installed packages, and tables (code pages, help texts)
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo",
            "ensurepip", "encodings", "pydoc_data"}
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"  # they stand in no text


class Source(NamedTuple):
    """Documents in the order in which they are read, and a few words about where they came from."""

    documents: list[Document]
    description: str


@dataclass
class Reader:
    """What is the same for all documents of a source.

    ``option`` is the one that named the source, for errors. ``any_bytes``: a document may be no text. ``tell`` is called with
    sentences for the user. ``otherwise`` ends the error about what is no text in the encoding.
    """

    option: str
    encoding: str
    any_bytes: bool
    tell: Callable[[str], Any]
    otherwise: str = ", or take any bytes with --tokenizer byte"

    def __post_init__(self) -> None:
        self.encoding = check_encoding(self.encoding)

    def open(self, source: str) -> Source:
        """The documents of a source; UserError when it cannot be read.

        - ``""``: the source of Python's own standard library, about 1.5 MB: the ASCII ``*.py`` files without tests, bundled
          tools and tables, in the order of the SHA-256 of their relative paths (so that both parts of a split are a mix of
          the library), with LF line ends. It is the same for each Python version on every machine of one kind.
        - a file or a pipe; devices are refused;
        - a folder: its files and those of its subfolders, in the same order. What minitv writes (folders of runs, files of
          compare) is left out and reported, and so are files that are no text, unless any bytes will do. Names that begin
          with a dot are left out, links to folders are not followed;
        - ``"-"``: standard input.

        Line ends stay as they are. A byte order mark (U+FEFF) at the beginning of a document is dropped. A document that does
        not end with a newline gets one before the next document.
        """
        if source == "":
            return self._standard_library()
        if source == "-":
            return Source([self._standard_input()], "standard input")
        with self._reading(f" {source}"):
            mode = os.stat(source).st_mode
        if stat.S_ISDIR(mode):
            return self._folder(Path(source))
        if stat.S_ISFIFO(mode):
            self.tell(f"{self.option} {source}: this is a pipe, it is read until its writer closes it")
            with self._reading(f" {source}"), open(source, "rb") as pipe:
                return Source([self._spooled(source, pipe)], source)
        if not stat.S_ISREG(mode):
            raise UserError(f"{self.option} {source}: this is a device or a socket, and text has no end there: give a file, a "
                            "folder, a pipe, or - for standard input")
        return Source([self._file(Path(source))], source)

    def _file(self, path: Path) -> Document:
        return Document(str(path), lambda: open(path, "rb"), self)

    def _standard_library(self) -> Source:
        root = Path(sysconfig.get_path("stdlib"))
        names = []
        for folder, folders, files in self._walk(root):
            folders[:] = [name for name in folders if name not in LEFT_OUT]
            names += [(folder / name).relative_to(root).as_posix() for name in files
                      # written when Python was built, with the paths of that machine
                      if name.endswith(".py") and not name.startswith("_sysconfigdata") and (folder / name).is_file()]
        parts, size = [], 0
        for name in sorted(names, key=rank):
            with self._reading(f" {root / name}"):
                data = (root / name).read_bytes().replace(b"\r\n", b"\n")
            if data and data.isascii():
                parts.append(data)
                size += len(data)
                if size >= EMBEDDED_BYTES:
                    break
        if not parts:
            raise UserError(f"the embedded text is the source of Python's standard library, and {root} has none: "
                            f"give a text with {self.option}")
        text = b"".join([*(part if part.endswith(b"\n") else part + b"\n" for part in parts[:-1]), parts[-1]])
        description = f"source of the Python {platform.python_version()} standard library, {len(parts)} files"
        return Source([Document(description, lambda: io.BytesIO(text), self)], description)

    def _standard_input(self) -> Document:
        if sys.stdin is None:
            raise UserError(f"{self.option} -: there is no standard input")
        stream, mode = sys.stdin.buffer, 0
        with contextlib.suppress(AttributeError, OSError):  # a stream of another kind, in a notebook for example
            mode = os.fstat(stream.fileno()).st_mode
        with self._reading(" -"):
            if stream.isatty():
                keys = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
                self.tell(f"{self.option} -: this is a terminal, type the text and end it with {keys}")
            elif stat.S_ISREG(mode):
                start = stream.tell()

                def again():
                    stream.seek(start)
                    return contextlib.nullcontext(stream)

                return Document("standard input", again, self)
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                raise UserError(f"{self.option} -: standard input is a device, give it a file or a pipe")
            else:
                self.tell(f"{self.option} -: standard input is read until its writer closes it")
            return self._spooled("standard input", stream)

    def _spooled(self, name: str, stream) -> Document:
        """What comes once is kept, to be read again."""
        file, block = tempfile.SpooledTemporaryFile(SPOOLED), None
        while block is None or len(block) == BLOCK:  # a terminal that is asked once more wants Ctrl-D once more
            block = stream.read(BLOCK)
            try:
                file.write(block)
            except OSError as error:
                raise RunError(f"{self.option} {name}: the text does not fit into the folder of temporary files, "
                               f"{tempfile.gettempdir()}: {error.strerror}") from None

        def again():
            file.seek(0)
            return contextlib.nullcontext(file)

        return Document(name, again, self)

    # -- folders

    def _folder(self, root: Path) -> Source:
        names, left = [], {}  # left: what is no text, by reason

        def leave(one: str, several: str, *paths: Path) -> None:
            left.setdefault((one, several), []).extend(paths)

        for folder, folders, files in self._walk(root):
            runs = [name for name in folders if _is_run(folder / name)]
            links = [name for name in folders if name not in runs and (folder / name).is_symlink()]
            leave("folder of a run", "folders of runs", *(folder / name for name in runs))
            leave("link to a folder", "links to folders", *(folder / name for name in links))
            with self._reading(f" {folder}"):
                written = _written_beside(folder, runs, folders, files)
            if folder == root and _is_run(root):
                written |= {LOG, DAMAGED, CURVE, READINGS}
                links += checkpoint.NAMES
            folders[:] = [name for name in folders if name not in runs and name not in links]
            leave("file that minitv wrote", "files that minitv wrote",
                  *(folder / name for name in sorted(written & set(files))))
            for name in files:
                path = folder / name
                if name in written:
                    continue
                if not path.is_file():
                    leave("pipe, device or broken link", "pipes, devices or broken links", path)
                elif not self.any_bytes and not self._file(path).is_text():
                    leave("file that is no text", "files that are no text", path)
                else:
                    names.append(path.relative_to(root).as_posix())
        parts = []
        for (one, several), paths in left.items():
            if paths:
                what, more = (one, "") if len(paths) == 1 else (several, ", ...")
                parts.append(f"{len(paths)} {what} ({min(paths).relative_to(root)}{more})")
        if parts:
            self.tell(f"{self.option} {root}: left out: {'; '.join(parts)}")
        documents = [self._file(root / name) for name in sorted(names, key=rank)]
        for document in documents[:-1]:
            document.ends_line = True
        return Source(documents, f"{root}, {len(names)} file{'s' * (len(names) != 1)}")

    def _walk(self, root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
        """Each folder with the names of folders and files in it that are not hidden; a folder whose name is removed from
        the list is not entered."""

        def refuse(error: OSError):
            raise UserError(f"{self.option}: the folder {error.filename} cannot be read: {error.strerror}")

        for folder, folders, files in os.walk(root, onerror=refuse):
            for names in (folders, files):
                names[:] = sorted(name for name in names if not name.startswith("."))
            yield Path(folder), folders, files

    # -- errors

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """What the system refuses, as a sentence."""
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.option}{name}: there is no such file or folder") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f"{self.option}{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


@dataclass
class Document:
    """A text that can be read again and again, in blocks of about ``BLOCK`` bytes."""

    name: str
    _open: Callable[[], Any] = field(repr=False)  # a file as a context manager, at the beginning
    _reader: Reader = field(repr=False)
    ends_line: bool = False  # add a newline if there is none at the end
    _digest: bytes | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """The option that names it, and its name."""
        return f"{self._reader.option}: {self.name}"

    def blocks(self) -> Iterator[bytes]:
        """The text in UTF-8. Where that is also the encoding of the document, they are its bytes, text or not."""
        if self._reader.encoding == "utf-8":
            blocks: Iterable[bytes] = _without_mark(self._bytes(), codecs.BOM_UTF8)
        else:
            blocks = map(self._encoded, _without_mark(self._decoded(), "\ufeff"))
        return self._ended(blocks, b"\n")

    def texts(self) -> Iterator[str]:
        """The text; UserError names the first bytes that are none in this encoding."""
        return self._ended(_without_mark(self._decoded(), "\ufeff"), "\n")

    def is_text(self) -> bool:
        """Whether the first bytes look like text, if perhaps in another encoding.

        They do not if one of them is zero, or if they are not valid in this encoding and hold control characters besides.
        """
        encoding = self._reader.encoding
        with self._reader._reading(f" {self.name}"), self._open() as file:
            head = file.read(HEAD)
        if "\n".encode(encoding) != b"\n" or head.startswith(WIDE_MARKS):
            return True  # reading it will tell
        if 0 in head:
            return False
        try:
            codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeError:
            return len(head.translate(None, CONTROLS)) == len(head)
        return True

    def _bytes(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        with self._reader._reading(f" {self.name}"), self._open() as file:
            while block := file.read(BLOCK):
                digest.update(block)
                yield block
        if self._digest not in (None, digest.digest()):
            raise RunError(f"{self.where} changed while it was read: begin again when it is complete")
        self._digest = digest.digest()

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self._reader.encoding)()
        offset = 0
        try:
            for block in self._bytes():
                offset += len(block)
                yield decoder.decode(block)
            yield decoder.decode(b"", True)
        except UnicodeDecodeError as error:
            first = offset - len(error.object) + error.start  # the object begins with what was left of the block before
            what = error.object[error.start:max(error.end, error.start + 1)].hex(" ")
            raise self._no_text(f"byte offset {first} holds {what} (hexadecimal), {error.reason}", error.object) from None
        except UnicodeError as error:
            raise self._no_text(str(error)) from None

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise self._no_text(f"it holds U+{ord(text[error.start]):04X}, half of a character") from None

    def _no_text(self, reason: str, data: bytes = b"") -> UserError:
        encoding = self._reader.encoding.upper()
        other = "utf-16" if data.startswith(WIDE_MARKS) else "NAME"
        return UserError(f"{self.where} is not {encoding} text: {reason}; give another encoding with "
                         f"--encoding {other}{self._reader.otherwise}")

    def _ended(self, blocks: Iterable[Block], newline: Block) -> Iterator[Block]:
        last = newline[:0]
        for block in blocks:
            last = block or last
            yield block
        if self.ends_line and last and not last.endswith(newline):
            yield newline


def check_encoding(name: str) -> str:
    """Python's name of an encoding; UserError when it has none for text by this name."""
    try:
        info = codecs.lookup(name)
        if info._is_text_encoding and info.incrementaldecoder is not None:
            return "utf-8" if info.name == "utf-8-sig" else info.name
    except (LookupError, ValueError):
        pass
    names = {word.replace("_", "-") for pair in encodings.aliases.aliases.items() for word in pair}
    raise UserError(f"--encoding: {quoted(name)} is unknown, allowed are the text encodings of Python, such as utf-8, utf-16, "
                    f"latin-1 and cp1252{did_you_mean(name.replace('_', '-'), sorted(names))}")


def rank(path: str) -> bytes:
    """The SHA-256 of a relative path with slashes, by which files are ordered: a mix that is the same on every machine."""
    return hashlib.sha256(unicodedata.normalize("NFC", path).encode(errors="surrogateescape")).digest()


def _without_mark(blocks: Iterable[Block], mark: Block) -> Iterator[Block]:
    blocks, start = iter(blocks), mark[:0]
    for block in blocks:
        start += block
        if len(start) >= len(mark):
            break
    yield start.removeprefix(mark)
    yield from blocks


def _is_run(folder: Path) -> bool:
    """Whether minitv keeps a run in a folder: it holds a checkpoint, or a log, complete or torn."""
    if any(checkpoint.exists(folder, name) for name in checkpoint.NAMES):
        return True
    start = _start(folder / LOG)
    return start.startswith(b'{"') and (b'"config"' in start or b'"loss"' in start)


def _written_beside(folder: Path, runs: list[str], folders: list[str], files: list[str]) -> set[str]:
    """Names of files that compare writes beside the folders of its runs."""
    def written(name: str) -> bool:
        stem, suffix = os.path.splitext(name)
        return suffix == ".toml" and (stem in runs or (stem in folders and _is_empty(folder / stem)))  # a run to come

    names = {name for name in files if written(name)}
    if (start := _start(folder / TABLE)).startswith(b"{") and b'"runs"' in start:
        names |= {TABLE, PICTURE}
    return names


def _is_empty(folder: Path) -> bool:
    return all(name.startswith(".") for name in os.listdir(folder))


def _start(path: Path) -> bytes:
    """The first bytes of a file; none if it cannot be read."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(HEAD)
    except OSError:
        pass
    return b""
