"""Checkpoints: safetensors + JSON, replaced as a whole, checked when loaded, never unpickled.

    DIR/last/model.safetensors, optimizer.safetensors, state.json        the newest state of a run
    DIR/best/...                                                         the one with the lowest held-out loss

``state.json`` holds ``format_version``, what the caller gave, the SHA-256 of the two array files (``files``), and the
SHA-256 of all that (``sha256``).

A save writes and fsyncs ``DIR/.last.tmp-PID``, then: rename ``last`` to ``.last.old``, rename ``.last.tmp-PID`` to
``last``, remove ``.last.old``. A folder cannot be renamed over a non-empty one on any system, hence two renames; each
is atomic on Linux, macOS and Windows. So at every moment ``last`` is either complete, or absent with a complete
``.last.old`` that ``load`` takes instead: ``.last.old`` is removed only while ``last`` is there. The parent folder is
fsynced after each rename, so a power cut finds the same states in the same order (Windows cannot fsync a folder; its
file system keeps the order itself). What a killed save left is removed by the next one. A folder has one writer
(lock.py); readers may load while it saves.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from . import files, tensors
from .errors import CheckpointError, SaveError, UserError
from .schema import RunState, read_state
from .tensors import Mapped, Planned

T = TypeVar("T")
Arrays = dict[str, np.ndarray]

FORMAT_VERSION = 1
NAMES = ("last", "best")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
DTYPES = ("float32", "float64", "int64")
OWN_KEYS = ("format_version", "files", "sha256")


@dataclass(frozen=True)
class Checkpoint:
    """What ``load`` read: fresh writable C-contiguous arrays by name, and the caller's state as JSON gives it back.

    ``load_run`` gives a RunState in its place.
    """

    model: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]
    state: Any


def save(directory: str | os.PathLike, name: str, *, model: Mapping[str, np.ndarray | Planned],
         optimizer: Mapping[str, np.ndarray | Planned], state: dict[str, Any]) -> Path:
    """Write the checkpoint ``name`` ("last" or "best") of the run in ``directory`` and return its folder.

    Arrays are float32, float64 or int64, of any shape and layout, and a planned one is made when it is written; ``state``
    is strict JSON (no NaN or infinity, keys are text, tuples come back as lists). Raises CheckpointError when
    something cannot be stored or the disk refuses; a checkpoint saved before is then intact.
    """
    target = _target(directory, name)
    aside, temporary = _aside(target), target.with_name(f".{name}.tmp-{os.getpid()}")
    earlier, placed = exists(directory, name), False
    for file, arrays in ((MODEL, model), (OPTIMIZER, optimizer)):
        _check(target / file, arrays)
    _encode_state(target / STATE, state, {})  # says what it has to say before anything is written
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        os.makedirs(target.parent, exist_ok=True)
        if target.exists() and not (target / STATE).is_file():
            raise CheckpointError(f"{target} is in the way: it is not a minitv checkpoint (it has no {STATE})")
        for leftover in target.parent.glob(f".{name}.tmp-*"):
            _remove(leftover)
        if target.exists():
            _remove(aside)

        os.mkdir(temporary)
        hashes = {file: _write(temporary / file, tensors.blocks(arrays))
                  for file, arrays in ((MODEL, model), (OPTIMIZER, optimizer))}
        _write(temporary / STATE, [_encode_state(target / STATE, state, hashes)])
        _sync_folder(temporary)
        if target.exists():
            _rename(target, aside)
            _sync_folder(target.parent)
        _rename(temporary, target)
        placed = True
        _sync_folder(target.parent)
    except UserError:  # an array that could not be made
        with contextlib.suppress(OSError):
            _remove(temporary)
            for folder in made:
                folder.rmdir()
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            if aside.exists() and not target.exists():
                os.rename(aside, target)
        with contextlib.suppress(OSError):
            _remove(temporary)
        note = ("; the new checkpoint is in its place, but the disk may forget it" if placed
                else "; a checkpoint saved there earlier is intact" if earlier and exists(directory, name) else "")
        raise SaveError(f"{target} could not be saved: {error.strerror or error}{note}") from error
    with contextlib.suppress(OSError):  # the next save tries again
        _remove(aside)
    return target


def load(directory: str | os.PathLike, name: str = "last") -> Checkpoint:
    """Read the checkpoint ``name`` of the run in ``directory``, or the one that the folder itself is (``DIR/best``).

    Raises CheckpointError when it is missing, truncated, foreign, damaged, or of a newer format.
    """
    return _read(directory, name, _read_checkpoint)


def load_run(directory: str | os.PathLike, name: str = "last") -> Checkpoint:
    """``load`` a checkpoint that a training run saved: its state is a RunState, as schema.py declares it."""
    def read(folder: Path) -> Checkpoint:
        checkpoint = _read_checkpoint(folder)
        return replace(checkpoint, state=read_state(checkpoint.state, str(folder / STATE)))
    return _read(directory, name, read)


def map_run(directory: str | os.PathLike, name: str = "last") -> Checkpoint:
    """``load_run`` without the optimizer, and the arrays of the model are a tensors.Mapped, which the caller closes.

    So the model takes no memory beside what is made of it.
    """
    def read(folder: Path) -> Checkpoint:
        state, hashes = _read_state(folder)
        return Checkpoint(_mapped(folder / MODEL, hashes[MODEL]), {}, read_state(state, str(folder / STATE)))
    return _read(directory, name, read)


def read_run(directory: str | os.PathLike, name: str = "last") -> RunState:
    """The state of a training run's checkpoint, without reading its arrays; paths and errors as in ``load``."""
    return _read(directory, name, lambda folder: read_state(_read_state(folder)[0], str(folder / STATE)))


def remove(directory: str | os.PathLike, name: str) -> None:
    """Remove a checkpoint; who reads meanwhile finds all of it or none."""
    target = _target(directory, name)
    for folder in (_aside(target), target):
        if folder.is_symlink() or not folder.exists():
            _remove(folder)
        else:
            going = target.with_name(f".{name}.tmp-{os.getpid()}")
            _remove(going)
            _rename(folder, going)
            _remove(going)


def exists(directory: str | os.PathLike, name: str = "last") -> bool:
    """Whether the run in ``directory`` has the checkpoint ``name``; ``load`` says whether it is sound."""
    target = _target(directory, name)
    return any(os.path.isfile(folder / STATE) for folder in (target, _aside(target)))


def run_folder(directory: str | os.PathLike) -> Path:
    """The folder of the run to which a folder belongs: itself, or the one above a checkpoint such as ``DIR/best``."""
    path = Path(directory)
    return path.parent if path.name in NAMES and (path / STATE).is_file() else path


def check_arrays(expected: Mapping[str, Any], loaded: Mapping[str, np.ndarray], what: str) -> None:
    """Raise CheckpointError unless ``loaded`` has exactly the names, shapes and dtypes of ``expected``, arrays or tensors."""
    both = [key for key in expected if key in loaded]
    problems = {
        "missing": [key for key in expected if key not in loaded],
        "unexpected": [key for key in loaded if key not in expected],
        "wrong shape": [f"{key} {loaded[key].shape} instead of {expected[key].shape}"
                        for key in both if loaded[key].shape != expected[key].shape],
        "wrong dtype": [f"{key} {loaded[key].dtype} instead of {expected[key].dtype}"
                        for key in both if loaded[key].dtype != expected[key].dtype],
    }
    lines = [f"{problem}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
             for problem, names in problems.items() if names]
    if lines:
        raise CheckpointError(f"{what} does not fit: " + "; ".join(lines))


def _target(directory: str | os.PathLike, name: str) -> Path:
    if name not in NAMES:
        raise CheckpointError(f"a checkpoint is called {' or '.join(NAMES)}, not {name!r}")
    return Path(directory) / name


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


# -- writing

def _check(path: Path, arrays: Mapping[str, np.ndarray | Planned]) -> None:
    """CheckpointError for what cannot be stored."""
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray | Planned) or array.dtype not in [np.dtype(dtype) for dtype in DTYPES]:
            kind = f"an array of {array.dtype}" if isinstance(array, np.ndarray | Planned) else f"a {type(array).__name__}"
            raise CheckpointError(f"{path}: {key!r} is {kind}, allowed are arrays of {', '.join(DTYPES)}")
        if key == "__metadata__":
            raise CheckpointError(f"{path}: the name '__metadata__' is reserved by safetensors")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{path} cannot be written: the name {key!r} is not UTF-8") from error


def _encode_state(path: Path, state: dict[str, Any], hashes: dict[str, str]) -> bytes:
    if reserved := [key for key in OWN_KEYS if key in state]:
        raise CheckpointError(f"{path}: the keys {', '.join(reserved)} are reserved")
    body = {"format_version": FORMAT_VERSION, **state, "files": hashes}
    try:
        text = json.dumps(body, allow_nan=False)
        if json.dumps(json.loads(text)) != text:
            raise ValueError("two keys of a dictionary are the same text")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the state is not strict JSON: {error}") from error
    return json.dumps({**body, "sha256": _sha256(text.encode())}, indent=1).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, parts: Iterable[bytes]) -> str:
    """Write a file, of which only one part is in memory at a time, and return the SHA-256 of it."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        if tensors.digest(file) != digest.hexdigest():
            raise OSError(f"{path.name} does not read back as written")
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    for wait in (0.05, 0.2, 0.8):  # on Windows a reader or a virus scanner in the folder blocks the rename for a moment
        try:
            return os.rename(source, target)
        except PermissionError:
            time.sleep(wait)
    os.rename(source, target)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


# -- reading

def _read(directory: str | os.PathLike, name: str, read: Callable[[Path], T]) -> T:
    """``read(folder of the checkpoint)``, again when a save replaced the folder meanwhile."""
    while True:
        identity = _identity(directory, name)
        try:
            return read(_find(directory, name))
        except CheckpointError:
            if _identity(directory, name) == identity:
                raise


def _identity(directory: str | os.PathLike, name: str) -> tuple[Path, int, int] | None:
    try:
        folder = _find(directory, name)
        status = os.stat(folder)
    except (CheckpointError, OSError):
        return None
    return folder, status.st_ino, status.st_mtime_ns


def _find(directory: str | os.PathLike, name: str) -> Path:
    path, target = Path(directory), _target(directory, name)
    itself = [path] if any(os.path.isfile(path / file) for file in (STATE, MODEL, OPTIMIZER)) else []
    if path.name in NAMES:
        itself.append(_aside(path))
    for folder in (*itself, target, _aside(target)):
        if os.path.isdir(folder):
            return folder
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: there is no such folder")
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is a file: a checkpoint is a folder, give the one that `minitv train` wrote")
    other = [other for other in NAMES if other != name and exists(path, other)]
    raise CheckpointError(f"{path} has no checkpoint {name!r}" + (f", it has {other[0]!r}" if other else
                          ": it is not the folder of a run, or the run ended before it saved"))


def _read_checkpoint(folder: Path) -> Checkpoint:
    state, hashes = _read_state(folder)
    return Checkpoint(*(_read_arrays(folder / file, hashes[file]) for file in (MODEL, OPTIMIZER)), state)


def _read_file(path: Path) -> bytes:
    with _readable(path):
        return files.read(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """CheckpointError for a file that is not there or cannot be read."""
    try:
        yield
    except FileNotFoundError:
        hint = "is not a minitv checkpoint" if path.name == STATE else "is incomplete"
        raise CheckpointError(f"{path.parent} {hint}: it has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The caller's state in a folder's ``state.json``, and the SHA-256 of the other files."""
    path = folder / STATE

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(_read_file(path).decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON: {error}") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is not of a minitv checkpoint: it has no format_version (a positive integer)")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, this minitv reads up to {FORMAT_VERSION}: update minitv")
    if missing := [key for key in OWN_KEYS if key not in body]:
        raise CheckpointError(f"{path} is incomplete: missing {', '.join(missing)}")
    digest = body.pop("sha256")
    try:
        changed = _sha256(json.dumps(body, allow_nan=False).encode()) != digest
    except ValueError:  # a number so large that it became infinite
        changed = True
    if changed:
        raise CheckpointError(f"{path} was changed or damaged after it was saved: its sha256 differs")
    hashes = body["files"]
    if not isinstance(hashes, dict) or {MODEL, OPTIMIZER} - hashes.keys():
        raise CheckpointError(f"{path} is incomplete: files must hold the sha256 of {MODEL} and {OPTIMIZER}")
    return {key: value for key, value in body.items() if key not in OWN_KEYS}, hashes


def _read_arrays(path: Path, sha256: str) -> Arrays:
    arrays = _mapped(path, sha256)
    with contextlib.closing(arrays):
        return {key: np.array(array, order="C") for key, array in arrays.items()}


def _mapped(path: Path, sha256: str) -> Mapped:
    with _readable(path):
        files.check(path)
        arrays = Mapped(path)
        if arrays.sha256() != sha256:
            arrays.close()
            raise CheckpointError(f"{path} was changed or damaged after it was saved, or is of another checkpoint: "
                                  "its sha256 differs")
    return arrays
