"""Text to token ids and back: by characters, by bytes, by a tokenizer of another program, or as the numbers themselves.

    char         one id for each character of the training text
    byte         one id for each byte of its UTF-8
    huggingface  what a file tokenizer.json says that came with the weights of another program; the tokenizers library reads it
    ids          the text is numbers with spaces between them: the weights came without a tokenizer
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .errors import CheckpointError, UserError, plain, quoted

if TYPE_CHECKING:
    from .sources import Document

SHOWN = 80  # an error names at most this many known characters
PIECE = 2**16  # characters that the tokenizers library gets at once: it needs some hundred bytes of memory for each
APART = re.compile(r"[^\W\d_](?=[ \n][^\W\d_])")  # where a word ends and the next one begins
UNKNOWN = "\ufffd"  # stands for bytes that are no character
MASKS = "[MASK]", "<mask>"  # what special tokens for hidden ones are called
INCOMPLETE = 3  # bytes of a character in UTF-8 that is not complete, at most; each may be written as UNKNOWN


class Tokenizer:
    """What all kinds have. Ids are 0 ... ``vocab`` - 1, and an array of them has the type np.intp."""

    kind: ClassVar[str]
    bytewise: ClassVar[bool] = False  # whether it reads any bytes, and a document is measured in them; else in characters
    vocab: int

    @property
    def spelled(self) -> int:
        """How many of the ids spell something: those from it on stand in no text, and none of them is written."""
        return self.vocab

    def encode(self, text: str) -> np.ndarray:
        """Ids [N] of a text; UserError names the first character that has none."""
        raise NotImplementedError

    def read(self, document: Document, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of a document from character (or byte) ``start`` to ``stop``, block by block, each with its characters."""
        raise NotImplementedError

    def length(self, text: str) -> int:
        """How many characters a text counts for."""
        return len(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        raise NotImplementedError

    def decoder(self, before: Iterable[int] = ()) -> Any:
        """An object whose ``feed(id)`` returns the text that the id completes, "" inside a character.

        ``finish()`` returns what is left at the end: U+FFFD when the last character is incomplete, else nothing. The ids
        ``before`` stand before the first one.
        """
        raise NotImplementedError

    def start(self, prompt: str = "") -> np.ndarray:
        """The ids to begin from, at least one: those of a prompt, or without one a newline where it is known."""
        return self.encode(prompt or "\n")

    @property
    def mask(self) -> int | None:
        """The id that stands for a hidden token: one more than the others; of an imported vocabulary its own, if it has one."""
        return self.vocab

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
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

    def read(self, document: Document, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        for offset, text in _between(document.texts(), start, stop):
            try:
                yield self.encode(text, offset), len(text)
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        return self._codes[_checked(ids, self.vocab)].tobytes().decode("utf-32-le", "surrogatepass")

    def decoder(self, before: Iterable[int] = ()) -> _CharDecoder:
        return _CharDecoder(self)

    def start(self, prompt: str = "") -> np.ndarray:
        """The same; id 0 without a prompt where a newline is unknown."""
        return self.encode(prompt) if prompt else np.array([max(self.characters.find("\n"), 0)], np.intp)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """The 256 bytes: any text can be encoded, and any file; malformed UTF-8 decodes to U+FFFD."""

    kind = "byte"
    bytewise = True
    vocab = 256

    @classmethod
    def train(cls, text: str) -> ByteTokenizer:
        """Nothing is learned from the text."""
        return cls()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text; UserError names a lone surrogate, which has no UTF-8 form."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.intp)

    def read(self, document: Document, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """The same; the document need not be a text."""
        for _, block in _between(document.blocks(), start, stop):
            ids = np.frombuffer(block, np.uint8)
            yield ids, int(np.count_nonzero((ids & 0xC0) != 0x80))  # the other bytes continue a character

    def decode(self, ids: Iterable[int]) -> str:
        return _checked(ids, self.vocab).astype(np.uint8).tobytes().decode(errors="replace")

    def decoder(self, before: Iterable[int] = ()) -> _ByteDecoder:
        return _ByteDecoder()


class IdTokenizer(Tokenizer):
    """Ids in, ids out: a text is numbers with white space between them, and one number counts as one character."""

    kind = "ids"
    mask = None

    def __init__(self, vocab: int, mask: int | None = None):
        self.vocab, self.mask = vocab, mask

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._id(match[0], match.start()) for match in re.finditer(r"\S+", text)], np.intp)

    def read(self, document: Document, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """The same; a number belongs to the part in which it begins."""
        held, offset, places = "", 0, range(start, sys.maxsize if stop is None else stop)
        for text in itertools.chain(document.texts(), " "):
            held += text
            words = list(re.finditer(r"\S+", held))
            whole = words[-1].start() if words and words[-1].end() == len(held) else len(held)  # the rest may go on
            try:
                ids = [self._id(match[0], offset + match.start()) for match in words
                       if match.start() < whole and offset + match.start() in places]
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from None
            yield np.array(ids, np.intp), len(ids)
            held, offset = held[whole:], offset + whole

    def _id(self, word: str, offset: int) -> int:
        if not (word.isascii() and word.isdigit() and len(word) < 16 and int(word) < self.vocab):
            raise UserError(f"{quoted(word)} at offset {offset} is no id: this model came without a tokenizer, so a text is "
                            f"numbers from 0 to {self.vocab - 1} with spaces between them")
        return int(word)

    def length(self, text: str) -> int:
        return len(text.split())

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, _checked(ids, self.vocab)))

    def decoder(self, before: Iterable[int] = ()) -> _IdDecoder:
        return _IdDecoder(self)

    def start(self, prompt: str = "") -> np.ndarray:
        """The same; id 0 without a prompt."""
        return self.encode(prompt) if prompt.strip() else np.zeros(1, np.intp)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab": self.vocab, **({} if self.mask is None else {"mask": self.mask})}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library: ``definition`` is the text of a file tokenizer.json.

    ``vocab`` is the number of ids that the model has, of which the last ones may spell nothing. ``first`` is the id that
    stands before a text, if the model's own description names one. The library is loaded when a text is to be read or written,
    and until then the definition is not checked: CheckpointError if it is no tokenizer, or has more ids than the model;
    UserError where the library is missing.

    What stands in a text as a special token does, such as <|endoftext|>, is one.
    """

    kind = "huggingface"

    def __init__(self, definition: str, vocab: int, first: int | None = None):
        self.definition, self.vocab, self.first = definition, vocab, first

    @cached_property
    def _library(self) -> Any:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise UserError('the tokens of this model need the tokenizers library: pip install "minitv[hf]"') from None
        try:
            library = Library.from_str(self.definition)
            ids = library.get_vocab(with_added_tokens=True).values()
        except BaseException as error:  # a panic of the library is no Exception
            raise _refusal(error, CheckpointError, "tokenizer.json: the tokenizers library cannot read it") from None
        if not ids or max(ids) >= self.vocab:
            raise CheckpointError(f"tokenizer.json: it has ids up to {max(ids, default=-1)}, and the model knows {self.vocab}, "
                                  f"from 0 to {self.vocab - 1}: this tokenizer is of another model")
        library.no_truncation()  # a text is whole
        library.no_padding()
        return library

    @cached_property
    def mask(self) -> int | None:
        """The id that stands for hidden tokens: that of the special token [MASK] or <mask>, if there is one."""
        try:
            ids = [token["id"] for token in json.loads(self.definition)["added_tokens"] if token["content"] in MASKS]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return next((id for id in ids if type(id) is int and 0 <= id < self.vocab), None)

    @cached_property
    def spelled(self) -> int:
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _drops(self) -> bool:
        """Whether characters that the model has no token for would be left out of the ids, and nothing said."""
        from tokenizers.pre_tokenizers import ByteLevel

        library = self._library
        model = json.loads(library.to_str())["model"]
        known = model.get("unk_token") is not None or model.get("unk_id") is not None or model.get("byte_fallback")
        return not known and any(library.token_to_id(byte) is None for byte in ByteLevel.alphabet())

    def check(self) -> None:
        """Raise what reading a text would raise for a damaged definition or a missing library."""
        _ = self._library

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoded(text).ids, np.intp)

    def _encoded(self, text: str, offset: int = 0, special: bool = False) -> Any:
        _utf8(text)
        library = self._library
        try:
            encoded = library.encode(text, add_special_tokens=special)
        except BaseException as error:
            raise _refusal(error, UserError, "the model's tokenizer cannot read this text") from None
        if self._drops:
            begin, end = np.array(encoded.offsets, np.intp).reshape(-1, 2).T  # the characters that each id stands for
            depth = np.bincount(begin, minlength=len(text) + 1) - np.bincount(end, minlength=len(text) + 1)
            if any(not text[place].isspace() for place in np.flatnonzero(np.cumsum(depth)[:-1] == 0)):  # it stands for no id
                for place, character in enumerate(text):
                    if not character.isspace() and not library.encode(character, add_special_tokens=False).ids:
                        raise UserError(f"the character {_name(character)} at offset {offset + place} is unknown: the model's "
                                        "tokenizer has no token for it")
        return encoded

    def read(self, document: Document, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """The same, in pieces of about PIECE characters that end with a word: no token reaches from one word into the next."""
        last = ""
        for offset, text in _pieces(_between(document.texts(), start, stop)):
            before = last if APART.match(last + text[:2]) else ""  # so that no space is put before a piece as before a text
            try:
                encoded = self._encoded(before + text, offset - len(before))
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from None
            ids, last = np.array(encoded.ids, np.intp), text[-1]
            yield ids[np.reshape(encoded.offsets, (-1, 2))[:, 0] >= 1] if before else ids, len(text)

    def decode(self, ids: Iterable[int]) -> str:
        library, ids = self._library, _checked(ids, self.vocab).tolist()
        try:
            return library.decode(ids, skip_special_tokens=False)
        except BaseException as error:
            raise _refusal(error, UserError, "the model's tokenizer cannot write these ids") from None

    def decoder(self, before: Iterable[int] = ()) -> _HuggingFaceDecoder:
        return _HuggingFaceDecoder(self, [int(token) for token in before][-INCOMPLETE:])

    def start(self, prompt: str = "") -> np.ndarray:
        """The special ids that the model wants at the beginning of a text, and those of the prompt after them."""
        encoded = self._encoded(prompt, special=True)
        ids, special = np.array(encoded.ids, np.intp), np.array(encoded.special_tokens_mask, bool)
        ids = ids[:1] if special.all() else ids[:len(ids) - int(np.argmin(special[::-1]))]  # without those for its end
        if len(ids):
            return ids
        if self.first is not None and self.first < self.spelled:
            return np.array([self.first], np.intp)
        newline = super().start()
        return newline if len(newline) else np.zeros(1, np.intp)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "definition": self.definition, "vocab": self.vocab, "first": self.first}


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


class _IdDecoder:
    def __init__(self, tokenizer: IdTokenizer):
        self._tokenizer = tokenizer

    def feed(self, token: int) -> str:
        return " " + self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


class _HuggingFaceDecoder:
    """The text of ids that come one by one.

    The library decodes whole texts: what an id spells depends on those before it, a space for example. So each time the last
    ids are decoded with the new one, and the text is what has come to it. What could be an incomplete character is held back.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, before: list[int]):
        self._tokenizer, self._before, self._ids, self._told = tokenizer, before, [], 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self._text()
        whole = text.rstrip(UNKNOWN)
        if len(whole) < len(text) - INCOMPLETE:
            whole = text[:-INCOMPLETE]
        new, self._told = whole[self._told:], max(self._told, len(whole))
        if whole and len(whole) == len(text):
            self._before, self._ids, self._told = self._ids, [], 0
        return new

    def finish(self) -> str:
        return self._text()[self._told:] if self._ids else ""

    def _text(self) -> str:
        """What the ids since the last complete character spell, after those that end with it."""
        decode = self._tokenizer.decode
        before, text = decode(self._before), decode(self._before + self._ids)
        return text[len(before):] if text.startswith(before) else decode(self._ids)


TOKENIZERS: dict[str, type[CharTokenizer] | type[ByteTokenizer]] = {"char": CharTokenizer, "byte": ByteTokenizer}


def from_json(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``to_json`` described; CheckpointError when it describes none."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "byte" and set(data) == {"kind"}:
        return ByteTokenizer()
    if kind == "char" and set(data) == {"kind", "characters"} and isinstance(data["characters"], str):
        try:
            return CharTokenizer(data["characters"])
        except UserError as error:
            raise CheckpointError(f"the stored tokenizer is damaged: {error}") from None
    if kind in ("ids", "huggingface") and type(vocab := data.get("vocab")) is int and 0 < vocab < 2**31:
        special = data.get("mask" if kind == "ids" else "first")
        known = special is None or (type(special) is int and 0 <= special < vocab)
        if known and kind == "ids" and set(data) <= {"kind", "vocab", "mask"}:
            return IdTokenizer(vocab, special)
        if known and kind == "huggingface" and set(data) == {"kind", "definition", "vocab", "first"} and (
                isinstance(data["definition"], str)):
            return HuggingFaceTokenizer(data["definition"], vocab, special)
    raise CheckpointError(f"the stored tokenizer is not one that minitv writes: {str(data)[:80]}; allowed are the kinds "
                          '"char", with "characters", "byte", "ids", with "vocab", and "huggingface", with "definition", '
                          '"vocab" and "first"')


def _between(blocks: Iterable[Any], start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
    """What lies from ``start`` to ``stop`` in blocks of a text, or of bytes, with the place where each piece begins.

    All blocks are read: who gives them may check that the text has not changed.
    """
    offset = 0
    for block in blocks:
        first, end = max(start, offset), offset + len(block) if stop is None else min(stop, offset + len(block))
        if first < end:
            yield first, block[first - offset:end - offset]
        offset += len(block)


def _pieces(texts: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The same text in pieces of about PIECE characters, each with its place."""
    place, held = None, ""
    for offset, text in texts:
        place, held = offset if place is None else place, held + text
        while len(held) > PIECE:
            cut = max((match.end() for match in APART.finditer(held, PIECE // 2, PIECE)), default=PIECE)
            yield place, held[:cut]
            place, held = place + cut, held[cut:]
    if held:
        yield place, held


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the character {_name(text[error.start])} at offset {error.start} is a lone surrogate, "
                        "which UTF-8 cannot hold: every other character is allowed") from None


def _refusal(error: BaseException, kind: type[UserError] | type[CheckpointError], text: str) -> BaseException:
    """What the library said, as a sentence; an interruption stays what it is."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return error
    return kind(f"{text}: {plain(str(error), 200)}")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _name(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _checked(ids: Iterable[int], vocab: int) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.intp)
    if array.size and not (0 <= array.min() and array.max() < vocab):
        raise UserError(f"decode: the ids must lie in [0, {vocab}), got {array.min()} to {array.max()}")
    return array
