"""One writer in a folder: ``with held(directory):``. Readers need no lock.

The writer holds a lock of the operating system on DIR/.lock, which ends with the process, however that ends: what a killed
process left is no obstacle. The file says who the holder is, and its time of change is renewed every BEAT seconds. That decides
where the system's lock says nothing: on network folders without locks, or whose locks do not reach other machines. There the
next writer watches a lock of another machine for PATIENCE seconds, and takes it if nobody renewed it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import RunError, UserError, plain

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

LOCK = ".lock"
BEAT, PATIENCE = 2.0, 7.0  # seconds; a network file system may show a change up to 3 s late
STARTED = time.strftime("%Y-%m-%d %H:%M:%S")  # of this process
AT = 2**30  # the byte that Windows locks: it lets nobody read a locked byte, and the text is to be read


@contextlib.contextmanager
def held(directory: str | os.PathLike) -> Iterator[None]:
    """Be the only writer in a folder, which is made if it is not there; RunError names the one that is there already.

    A folder made here is removed at the end if nothing came into it.
    """
    path = Path(directory) / LOCK
    folders = _make(path.parent)
    try:
        with _holding(path):
            yield
    finally:
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[None]:
    try:
        file = _take(path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, ended), name="minitv lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with contextlib.suppress(OSError):
            if os.name != "nt":
                path.unlink()  # before the lock ends: what is unlinked later may be the next holder's
        os.close(file)
        with contextlib.suppress(OSError):
            if os.name == "nt":
                path.unlink()  # refused where the next holder has opened it


def _make(directory: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, from the inside out."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{directory}: this is not a folder, and a folder is needed") from None
    except OSError as error:
        raise RunError(f"{directory} could not be made: {error.strerror or error}") from error
    return missing


def _take(path: Path) -> int:
    """The open file, once it is locked and says that this process is the holder."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o666)
        try:
            locked = _lock(file)
            holder = _holder(file)
            if locked is False or (holder and _may_live(holder, locked) and _renewed(path, holder)):
                raise RunError(_refusal(path, holder))
            if _same(file, path):
                _sign(file)
                if locked is None:  # another process may have signed at the same time: the last one has it
                    time.sleep(BEAT)
                    if (holder := _holder(file)) and holder != _me():
                        raise RunError(_refusal(path, holder))
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the holder before has removed it meanwhile


def _lock(file: int) -> bool | None:
    """Whether this process has the system's lock now; None where the system has none."""
    try:
        if os.name == "nt":
            os.lseek(file, AT, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # both systems' words for: another has it
        return False
    except OSError:
        return None
    return True


def _me() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": STARTED}


def _sign(file: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the text
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(_me()).encode())


def _holder(file: int) -> dict[str, object]:
    """What the file says; empty for nothing, or for a text that is cut off."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        holder = json.loads(os.read(file, 10_000))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _may_live(holder: dict[str, object], locked: bool | None) -> bool:
    """Whether the holder may live although this process got the lock."""
    return locked is None or holder.get("host") != socket.gethostname()


def _renewed(path: Path, holder: dict[str, object]) -> bool:
    """Whether somebody renews the file within PATIENCE."""
    print(f"{plain(str(path))} is of {_name(holder)}; watching it for {PATIENCE:.0f} s", file=sys.stderr, flush=True)
    try:
        before = os.stat(path)
        time.sleep(PATIENCE)
        after = os.stat(path)
    except FileNotFoundError:  # the holder has ended
        return False
    return (before.st_mtime_ns, before.st_ino) != (after.st_mtime_ns, after.st_ino)


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _name(holder: dict[str, object]) -> str:
    if not holder:
        return "another process"
    return plain(f"process {holder.get('pid')} on {holder.get('host')}, begun {holder.get('since')},", 200)


def _refusal(path: Path, holder: dict[str, object]) -> str:
    return (f"{path.parent} is in use: {_name(holder)} writes there, and two writers would destroy the run. "
            "Wait until that one has ended, or choose another folder")
