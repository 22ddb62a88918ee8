"""Folders for what a user's processes keep between runs, into which nobody else can write."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def places(name: str) -> Iterator[Path]:
    """Where such a folder may lie, the best place first: XDG_CACHE_HOME or ~/.cache, then the temporary folder.

    What begins with ~ belongs to a home that does not exist.
    """
    user = os.environ.get("XDG_CACHE_HOME", "")
    user = user if os.path.isabs(user) else os.path.expanduser("~/.cache")
    if os.path.isabs(user):
        yield Path(user, name)
    with contextlib.suppress(FileNotFoundError):  # there is no temporary folder
        yield Path(tempfile.gettempdir(), f"{name}-{os.getuid()}" if hasattr(os, "getuid") else name)


def first(candidates: Iterable[Path], name: str) -> tuple[Path | None, str]:
    """The folder ``name``, made in the first candidate where this user alone can write; or None and why not."""
    reasons = []
    for place in candidates:
        folder = place / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            for path in (place, folder):
                path.mkdir(mode=0o700, exist_ok=True)
                claim(path)
            tempfile.TemporaryFile(dir=folder).close()
            return folder, ""
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    return None, "; ".join(reasons) or "this user has no home"


def claim(path: Path) -> None:
    """Make sure that only this user writes into a folder, or raise OSError."""
    if not all(belongs_to_us(look(path)) for look in (os.lstat, os.stat)):  # a link and what it leads to
        raise PermissionError(0, "belongs to another user")
    if shared(path.stat()):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Put a file that ``write(file)`` fills, and that nobody else may read or write, in its place at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w+b") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def trusted(status: os.stat_result) -> bool:
    """Whether this user alone could write a file."""
    return belongs_to_us(status) and not shared(status)


def belongs_to_us(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()  # Windows: folders of a user are private


def shared(status: os.stat_result) -> bool:
    """Whether a group or everybody may write."""
    return hasattr(os, "getuid") and bool(status.st_mode & 0o022)
