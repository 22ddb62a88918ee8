"""Errors whose message is a sentence for the user; the command line prints them without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user gave cannot be used: the message says what it was and what is allowed."""

    code = 2  # of the process


class RunError(UserError):
    """A run that went wrong on its way: nothing that was given is against the rules."""

    code = 1


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, foreign or tampered with."""


@contextmanager
def device_errors() -> Iterator[None]:
    """A device that cannot be used is the machine's fault: a RunError with the engine's sentence."""
    from autograd.errors import DeviceError

    try:
        yield
    except DeviceError as error:
        raise RunError(str(error)) from None
