"""Text to token ids and back: one id per character of the training text, or one per byte of its UTF-8."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CheckpointError, UserError, quoted

if TYPE_CHECKING:
    from .sources import Document

SHOWN = 80  # an error names at most this many known characters


class CharTokenizer:
    """The characters (code points) of the training text, sorted: id i is the i-th of them."""

    kind = "char"

    def __init__(self, characters: str):
        if not characters or list(characters) != sorted(set(characters)):
            raise UserError("a char tokenizer needs at least one character, and each once, sorted by code point")
        self.characters = characters
        self.vocab = len(characters)
        self._codes = _code_points(characters)
        self._ids = np.full(int(self._codes[-1]) + 2, -1, np.intp)  # one more than the last known one: all unknown ones
        self._ids[self._codes] = np.arange(self.vocab)

    @classmethod
    def train(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in a text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str, before: int = 0) -> np.ndarray:
        """Ids [len(text)] of a text; UserError names the first character that is not in the alphabet.

        ``before`` characters precede the text and count in the offset that the error names.
        """
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            offset = int(np.argmax(ids < 0))
            more = "" if self.vocab <= SHOWN else f" and {self.vocab - SHOWN} more"
            raise UserError(f"the character {_name(text[offset])} at offset {before + offset} is unknown: this model knows "
                            f"{self.vocab} characters: {self.characters[:SHOWN]!r}{more}")
        return ids

    def read(self, document: Document) -> Iterator[np.ndarray]:
        """The ids of a document, block by block."""
        offset = 0
        for text in document.texts():
            try:
                yield self.encode(text, offset)
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from None
            offset += len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self._codes[_checked(ids, self.vocab)].tobytes().decode("utf-32-le", "surrogatepass")

    def characters_in(self, ids: np.ndarray) -> int:
        """How many characters the ids spell."""
        return len(ids)

    def decoder(self) -> _CharDecoder:
        """An object whose ``feed(id)`` returns the text that the id completes, and ``finish()`` nothing more."""
        return _CharDecoder(self)

    def start(self) -> np.ndarray:
        """The ids [1] to begin from without a prompt: a newline where it is known, else id 0."""
        return np.array([max(self.characters.find("\n"), 0)], np.intp)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer:
    """The 256 bytes: any text can be encoded, and any file; malformed UTF-8 decodes to U+FFFD."""

    kind = "byte"
    vocab = 256

    @classmethod
    def train(cls, text: str) -> ByteTokenizer:
        """Nothing is learned from the text."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text; UserError names a lone surrogate, which has no UTF-8 form."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the character {_name(text[error.start])} at offset {error.start} is a lone surrogate, "
                            "which UTF-8 cannot hold: every other character is allowed") from None
        return np.frombuffer(data, np.uint8).astype(np.intp)

    def read(self, document: Document) -> Iterator[np.ndarray]:
        """The bytes of a document, block by block, text or not."""
        for block in document.blocks():
            yield np.frombuffer(block, np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return _checked(ids, self.vocab).astype(np.uint8).tobytes().decode(errors="replace")

    def characters_in(self, ids: np.ndarray) -> int:
        """How many characters the ids spell: the bytes that do not continue one."""
        return int(np.count_nonzero((ids & 0xC0) != 0x80))

    def decoder(self) -> _ByteDecoder:
        """An object whose ``feed(id)`` returns the text that the id completes, "" inside a character.

        ``finish()`` returns U+FFFD when the last character is incomplete, else "".
        """
        return _ByteDecoder()

    def start(self) -> np.ndarray:
        """The ids [1] to begin from without a prompt: a newline."""
        return np.array([ord("\n")], np.intp)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"kind": self.kind}


class IdTokenizer:
    """Ids in, ids out: a text is numbers with white space between them, and one number counts as one character."""

    kind = "ids"

    def __init__(self, vocab: int, mask: int | None = None):
        self.vocab, self.mask = vocab, mask  # the mask is the id that stands for hidden tokens, if a model has one

    def encode(self, text: str, before: int = 0) -> np.ndarray:
        """Ids [N] of the numbers in a text; UserError names the first word that is no id."""
        ids = []
        for word in re.finditer(r"\S+", text):
            if not (word[0].isascii() and word[0].isdigit() and len(word[0]) < 16 and int(word[0]) < self.vocab):
                raise UserError(f"{quoted(word[0])} at offset {before + word.start()} is no id: this model came without a "
                                f"tokenizer, so that a text is numbers from 0 to {self.vocab - 1} with spaces between them")
            ids.append(int(word[0]))
        return np.array(ids, np.intp)

    def read(self, document: Document) -> Iterator[np.ndarray]:
        """The ids of a document."""
        try:
            yield self.encode("".join(document.texts()))
        except UserError as error:
            raise UserError(f"{document.where}: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return " ".join(map(str, _checked(ids, self.vocab)))

    def characters_in(self, ids: np.ndarray) -> int:
        """How many numbers the ids are."""
        return len(ids)

    def decoder(self) -> _IdDecoder:
        """An object whose ``feed(id)`` returns the number with a space before it, and ``finish()`` nothing more."""
        return _IdDecoder(self)

    def start(self) -> np.ndarray:
        """The ids [1] to begin from without a prompt: 0."""
        return np.zeros(1, np.intp)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"kind": self.kind, "vocab": self.vocab, **({} if self.mask is None else {"mask": self.mask})}


class _IdDecoder:
    def __init__(self, tokenizer: IdTokenizer):
        self._tokenizer = tokenizer

    def feed(self, token: int) -> str:
        return " " + self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


class _CharDecoder:
    def __init__(self, tokenizer: CharTokenizer):
        self._tokenizer = tokenizer

    def feed(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


class _ByteDecoder:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


TOKENIZERS: dict[str, type[CharTokenizer] | type[ByteTokenizer]] = {"char": CharTokenizer, "byte": ByteTokenizer}


def from_json(data: dict[str, Any]) -> CharTokenizer | ByteTokenizer | IdTokenizer:
    """The tokenizer that ``to_json`` described; CheckpointError when it describes none."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "byte" and set(data) == {"kind"}:
        return ByteTokenizer()
    if kind == "ids" and set(data) <= {"kind", "vocab", "mask"} and type(data.get("vocab")) is int and data["vocab"] > 0:
        mask = data.get("mask")
        if mask is None or (type(mask) is int and 0 <= mask < data["vocab"]):
            return IdTokenizer(data["vocab"], mask)
    if kind == "char" and set(data) == {"kind", "characters"} and isinstance(data["characters"], str):
        try:
            return CharTokenizer(data["characters"])
        except UserError as error:
            raise CheckpointError(f"the stored tokenizer is damaged: {error}") from None
    raise CheckpointError(f"the stored tokenizer is not one that minitv writes: {str(data)[:80]}; allowed are "
                          'the kinds "char", with "characters", "byte", and "ids", with "vocab"')


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _name(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _checked(ids: Iterable[int], vocab: int) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.intp)
    if array.size and not (0 <= array.min() and array.max() < vocab):
        raise UserError(f"decode: the ids must lie in [0, {vocab}), got {array.min()} to {array.max()}")
    return array
