"""What the tasks on text share: where the text comes from, its two parts, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import check, option
from ..corpus import open_corpus
from ..errors import CheckpointError, UserError
from ..options import DATA, STEPS
from ..report import count
from ..sources import check_encoding
from ..task import Task
from ..tokenizer import from_json


@dataclass(frozen=True)
class CorpusOptions:
    """text"""

    data: str = option(
        "",
        "text file, pipe, folder (every file in it, in the order of the SHA-256 of their names), or - for standard input; "
        "without it, the source of Python's standard library. A tenth of it is held out: the end of a file, of a folder the "
        "end of each large file and the last of the small ones",
        metavar="PATH",
        group=DATA,
        resumable=True,  # it is compared with the hash in the checkpoint: the file may have moved
        harmless=True,
    )
    val_data: str | None = option(
        None, "held-out text of its own, given like --data, of which all is then for training; none = a tenth of --data",
        metavar="PATH", group=DATA, resumable=True, harmless=True, newer=True,
    )
    tokenizer: str = option(
        "char", "a token is one character of the text, or one byte of its UTF-8 (of any file, text or not); the tokens of an "
        "imported model, huggingface or ids, come with --init-from",
        choices=("char", "byte", "huggingface", "ids"), group=DATA,
    )
    encoding: str = option("utf-8", "how characters are written in the text: utf-8, utf-16, latin-1, cp1252, ...",
                           metavar="NAME", group=DATA, resumable=True, harmless=True, newer=True)
    eval_tokens: int = option(100_000, "held-out tokens read at an evaluation", low=1, group=STEPS, resumable=True)

    def __post_init__(self) -> None:
        check(self)
        check_encoding(self.encoding)


HIDDEN = "▢"  # stands for a token that is no part of the text


class OnText(Task):
    """A task whose sequences are windows of a text: ``corpus`` holds its two parts and ``tokenizer`` reads it."""

    writes = ("prompt", "tokens", "stop", "window", "sinks")

    def __init__(self, options: CorpusOptions, context: int, batch: int, seed: int, saved: Mapping[str, Any] | None = None):
        self.options, self.context = options, context
        tokenizer, expected = (None, None) if saved is None else (self.stored_tokenizer(saved), saved.get("corpus_sha256"))
        if tokenizer is not None and tokenizer.kind != options.tokenizer:
            raise UserError(f"--tokenizer {options.tokenizer}: the model knows tokens of the kind {tokenizer.kind}")
        self.corpus = open_corpus(options.data, options.val_data, options.tokenizer, options.encoding, context=context,
                                  saved=tokenizer, expected=expected)
        self.tokenizer = self.corpus.tokenizer

    @classmethod
    def stored_tokenizer(cls, saved: Mapping[str, Any]) -> Any:
        if not isinstance(saved.get("tokenizer"), Mapping):
            raise CheckpointError("the checkpoint has no tokenizer")
        return from_json(saved["tokenizer"])

    def about(self) -> list[tuple[str, str]]:
        text = f"{self.corpus.description}: {count(self.corpus.characters)} characters, sha256 {self.corpus.sha256[:16]}"
        return [("text", text)]

    def header(self) -> dict[str, Any]:
        corpus = {"description": self.corpus.description, "sha256": self.corpus.sha256, "size_bytes": self.corpus.size_bytes,
                  "training_tokens": len(self.corpus.training), "held_out_tokens": len(self.corpus.held_out)}
        return {"corpus": corpus}

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_json(), "corpus_sha256": self.corpus.sha256}

    def word(self, token: int) -> str:
        return self.tokenizer.decode([token]) if token < self.tokenizer.vocab else HIDDEN

    @staticmethod
    def inherited(saved: Mapping[str, Any]) -> dict[str, Any]:
        return {"tokenizer": saved.get("tokenizer")}
