"""Errors whose message is a sentence for the user; the command line prints them without a traceback.

What a message repeats of a value, a file name or a file may be of any length and hold any character. ``quoted`` shortens a
value where a sentence names it. Every message is shortened and escaped as a whole: it is one line, and no terminal obeys it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VALUE, MESSAGE = 100, 2000  # characters of a value, and of a message, that are shown


class UserError(Exception):
    """Something the user gave cannot be used: the message says what it was and what is allowed."""

    code = 2  # of the process
    lines: tuple[str, ...] = ()  # that follow the sentence, to be copied

    def __init__(self, message: str):
        super().__init__(plain(message))


class RunError(UserError):
    """A run that went wrong on its way: nothing that was given is against the rules."""

    code = 1


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, foreign or tampered with."""


class SaveError(RunError, CheckpointError):
    """The disk refused a checkpoint."""


def plain(text: str, longest: int = MESSAGE) -> str:
    """A text on one line: its middle is left out if it is long, and what is not printable is escaped."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: Any) -> str:
    """A value as a sentence names it: a text in quotation marks, a number as it is, and no more of it than is useful."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "an integer of thousands of digits"
    except RecursionError:
        text = "a value that is nested too deeply"
    return plain(text, VALUE)


@contextmanager
def naming(where: object, kind: type[UserError] | None = None) -> Iterator[None]:
    """Put ``where`` before the sentence of an error; ``kind`` is what it becomes, if that is another class."""
    try:
        yield
    except UserError as error:
        raise (kind or type(error))(f"{where}: {error}") from None


@contextmanager
def device_errors() -> Iterator[None]:
    """A device that cannot be used is the machine's fault: a RunError with the engine's sentence."""
    from autograd.errors import DeviceError

    try:
        yield
    except DeviceError as error:
        raise RunError(str(error)) from None
