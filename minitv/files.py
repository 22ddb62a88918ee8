"""Files as a run needs them: read only where there is a file, and replaced as a whole."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from .errors import RunError, plain

TABLE, PICTURE = "compare.json", "compare.png"  # what compare writes beside the folders of its runs


def read(path: str | os.PathLike, *, pipes: bool = False) -> bytes:
    """The bytes of a file. OSError for a device, and for a pipe unless ``pipes`` allows one: it may have no end."""
    check(path, pipes=pipes)
    with open(path, "rb") as file:
        return file.read()


def check(path: str | os.PathLike, *, pipes: bool = False) -> None:
    """Raise what ``read`` raises for what is no file."""
    mode = os.stat(path).st_mode
    pipe = stat.S_ISFIFO(mode)
    if pipe and pipes:
        print(f"reading {plain(os.fspath(path))}, a pipe, up to its end", file=sys.stderr, flush=True)
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, f"this is a {'pipe' if pipe else 'device'}, and a file is needed", os.fspath(path))


def replace(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part; RunError when the disk refuses.

    ``data`` may come in parts, which are not all in memory at once.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            for part in [data] if isinstance(data, bytes) else data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
