"""What was computed from a large text and is kept on disk for the next run: token ids, an alphabet, n-gram figures.

Every entry is a file of its own in a folder that this user alone can write. It begins with a hash of its name and its content,
and it appears at once, so processes may write at the same time. What goes wrong here is told once, and costs time, not the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from autograd import private

LIMIT = 16 * 10**9  # bytes of all entries together
SEAL = 32  # bytes at the beginning of an entry
BLOCK = 2**20


class Kept:
    """A folder of entries with names that say everything they depend on; ``tell`` is called with sentences for the user."""

    def __init__(self, tell: Callable[[str], Any]):
        self._tell = tell
        self.folder, reasons = private.first(private.places("minitv"), "texts")
        if self.folder is None:
            tell(f"token ids are kept in memory and not on disk, since no folder will do: {reasons}")

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """A value that JSON can hold."""
        if (content := self.find(name)) is not None:
            return json.loads(bytes(content))
        value = make()
        self.keep(name, lambda file: file.write(json.dumps(value).encode()))
        return value

    def find(self, name: str) -> memoryview | None:
        """The content of an entry, mapped into memory; None if there is none that is whole."""
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                if not private.trusted(os.fstat(file.fileno())):
                    self._tell(f"{path}: a file that others could write is made anew")
                elif file.read(SEAL) != _seal(file, name):
                    self._tell(f"{path}: a damaged file is made anew")
                else:
                    with contextlib.suppress(OSError):
                        os.utime(path)  # the entry that was not used for the longest time goes first
                    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[SEAL:]
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._tell(f"{path}: a file that cannot be read is made anew ({getattr(error, 'strerror', None) or error})")
        return None

    def keep(self, name: str, write: Callable[[BinaryIO], Any]) -> bool:
        """Make an entry of what ``write`` writes into a file, in any order; returns whether it is there."""
        if self.folder is None:
            return False
        path = self.folder / name

        def fill(file: BinaryIO) -> None:
            file.write(bytes(SEAL))
            write(file)
            seal = _seal(file, name)
            file.seek(0)
            file.write(seal)

        try:
            private.replace(path, fill)
        except OSError as error:
            if os.name == "nt" and path.exists():
                return True  # another process is reading the same
            self._tell(f"token ids are kept in memory and not on disk: {self.folder}: {error.strerror}")
            self.folder = None
            return False
        self._shrink(path)
        return True

    def _shrink(self, newest: Path) -> None:
        """Remove the entries that were not used for the longest time, until the others are within the limit."""
        with contextlib.suppress(OSError):  # another process is doing the same
            entries = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.iterdir())
            excess = sum(size for _, size, _ in entries) - LIMIT
            for _, size, path in entries:
                if excess > 0 and path != newest:
                    path.unlink()
                    excess -= size


def _seal(file: BinaryIO, name: str) -> bytes:
    """The hash of an entry's name and content."""
    digest = hashlib.sha256(name.encode())
    file.seek(SEAL)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.digest()
