"""Errors whose message is a sentence for the user; the command line prints them without a traceback."""


class UserError(Exception):
    """Something the user gave cannot be used: the message says what it was and what is allowed."""


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, foreign or tampered with."""
