"""The text, its two parts, and the windows of token ids that training and evaluation see."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autograd.random import Random

from .errors import UserError

EMBEDDED_BYTES = 1_500_000  # the embedded text ends with the file that reaches this size
# no programs of the library: its tests, bundled tools, installed packages, and tables (code pages, help texts)
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo",
            "ensurepip", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """A text, a description of where it came from, and the SHA-256 (hexadecimal) and size of its UTF-8 bytes."""

    text: str
    description: str
    sha256: str
    size_bytes: int


def load_text(source: str = "") -> Corpus:
    """The text of a source; UserError when there is none, or when it is not UTF-8.

    - ``""``: the source of Python's own standard library, about 1.5 MB: the ASCII ``*.py`` files without tests, bundled
      tools and tables, in the order of the SHA-256 of their relative paths (so that both parts of a split are a mix of
      the library), with LF line ends. It is the same for each Python version on every machine of one kind.
    - a file;
    - a folder: its files and those of its subfolders, sorted by relative path; names that begin with a dot are left
      out, links to folders are not followed. A file that does not end with a newline gets one before the next file;
    - ``"-"``: standard input.

    Line ends stay as they are. A byte order mark (U+FEFF) at the beginning of a file is dropped.
    """
    if source == "":
        text, description = _standard_library()
    elif source == "-":
        text, description = _decode(_read_stdin(), "standard input"), "standard input"
    elif os.path.isdir(source):
        text, description = _folder(Path(source))
    else:
        text, description = _decode(_read(Path(source)), source), source
    if not text:
        raise UserError(f"--data: {description} holds no text")
    data = text.encode()
    return Corpus(text, description, hashlib.sha256(data).hexdigest(), len(data))


def split(ids: np.ndarray, context: int, fraction: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The first ``fraction`` of the ids for training and the rest held out.

    UserError when one of them is shorter than a window of context + 1 tokens.
    """
    cut = int(len(ids) * fraction)
    _check(ids[:cut], context, f"the training part (the first {fraction:.0%} of {len(ids)} tokens)")
    _check(ids[cut:], context, f"the held-out part (the last {1 - fraction:.0%} of {len(ids)} tokens)")
    return ids[:cut], ids[cut:]


class Batches:
    """Windows of the ids in random order, a pure function of the seed and the step: a resumed run goes on with its own.

    Each pass over the text cuts it, from a random place on, into windows that do not overlap, and shuffles them: no
    part is seen twice before every part was seen once.
    """

    def __init__(self, ids: np.ndarray, batch: int, context: int, seed: int):
        _check(ids, context, "the text of the batches")
        self._ids, self._shape, self._random = ids, (batch, context), Random(seed)
        self._windows = max(1, len(ids) // context - 1)  # so that the first one can begin at any of `context` places
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [B T] and labels [B T], the tokens that follow them."""
        batch, context = self._shape
        drawn = range(step * batch, (step + 1) * batch)
        starts = [self._starts(i // self._windows)[i % self._windows] for i in drawn]
        return _gather(self._ids, np.array(starts), context)

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of one pass over the text begin, in the order in which they are seen."""
        if self._order[0] != epoch:
            offset, order = self._random.split(epoch, 0), self._random.split(epoch, 1)
            context = self._shape[1]
            spare = len(self._ids) - self._windows * context
            self._order = epoch, offset.integers(0, spare) + context * order.permutation(self._windows)
        return self._order[1]


def windows(ids: np.ndarray, context: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [N T] and labels [N T]: evenly spaced windows that do not overlap, N = tokens / T rounded down.

    At least one window, and at most those that fit.
    """
    _check(ids, context, "the text of the windows")
    last = len(ids) - 1  # the last token is only a label
    count = max(1, min(last, tokens) // context)
    return _gather(ids, np.arange(count) * last // count, context)


def _gather(ids: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    index = starts[:, None] + np.arange(context)
    return ids[index], ids[index + 1]


def _check(ids: np.ndarray, context: int, part: str) -> None:
    if len(ids) < context + 1:
        raise UserError(f"{part} has {len(ids)} tokens, and --context {context} needs at least {context + 1}: "
                        "give a longer text with --data, or a smaller --context")


def _standard_library() -> tuple[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name in _walk(root, LEFT_OUT)
             # written when Python was built, with the paths of that machine
             if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    parts, size = [], 0
    for name in names:
        data = _read(root / name).replace(b"\r\n", b"\n")
        if data and data.isascii():
            parts.append(data.decode())
            size += len(data)
            if size >= EMBEDDED_BYTES:
                break
    if not parts:
        raise UserError(f"the embedded text is the source of Python's standard library, and {root} has none: "
                        "give a text with --data")
    return _join(parts), f"source of the Python {platform.python_version()} standard library, {len(parts)} files"


def _folder(root: Path) -> tuple[str, str]:
    names = sorted(_walk(root, set()))
    text = _join([_decode(_read(root / name), str(root / name)) for name in names])
    return text, f"{root}, {len(names)} file{'s' * (len(names) != 1)}"


def _walk(root: Path, left_out: set[str]) -> list[str]:
    """Relative paths, with slashes, of the regular files below a folder that are not hidden."""
    names = []

    def refuse(error: OSError):
        raise UserError(f"--data: the folder {error.filename} cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return names


def _join(parts: list[str]) -> str:
    parts = [part for part in parts if part]
    return "".join([part if part.endswith("\n") else part + "\n" for part in parts[:-1]] + parts[-1:])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"--data {path}: there is no such file or folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--data {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise UserError("--data -: there is no standard input")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"--data -: standard input cannot be read: {error.strerror or error}") from None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = data[error.start:max(error.end, error.start + 1)].hex(" ")
        raise UserError(f"--data: {name} is not UTF-8 text: byte offset {error.start} holds {found} "
                        f"(hexadecimal), {error.reason}") from None
