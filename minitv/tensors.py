"""Arrays in safetensors files: mapped when they are read, made one after the other when they are written.

A file is the length of its header in eight bytes, the header, which is JSON and says of every array its dtype, its shape and
where it lies, and then the arrays. So one array can be read, or written, without the others in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors

from . import files
from .errors import CheckpointError, quoted

HEADER = 10**7  # bytes of a foreign header or index at most: those of a model of a thousand layers have two million
AXES = 32  # of an array at most: every NumPy has so many
WRITTEN = {"float32": "F32", "float64": "F64", "int64": "I64"}
READ = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}  # numpy has no bfloat16


class Stored(NamedTuple):
    """An array in a file: where it lies, and of what shape and dtype it is, in the words of the format."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file

    def array(self, file: BinaryIO | None = None) -> np.ndarray:
        """The numbers as they lie in the file, which is mapped; bfloat16 becomes float32.

        CheckpointError for other dtypes, and for more than 32 axes.
        """
        if self.dtype not in READ:
            raise CheckpointError(f"{self.path}: its dtype is {quoted(self.dtype)}, allowed: {', '.join(READ)}")
        if len(self.shape) > AXES:
            raise CheckpointError(f"{self.path}: an array has {len(self.shape)} axes, allowed are {AXES}")
        if not math.prod(self.shape):
            return np.zeros(self.shape, np.float32 if self.dtype == "BF16" else READ[self.dtype])
        array = np.memmap(self.path if file is None else file, READ[self.dtype], "r", self.start, self.shape)
        return (array.astype(np.uint32) << 16).view(np.float32) if self.dtype == "BF16" else array


def stored(path: Path) -> dict[str, Stored]:
    """The arrays of a file by name; CheckpointError if it is none of this format."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with open(path, "rb") as file:
            return _described(file, path, HEADER)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _described(file: BinaryIO, path: Path, longest: int) -> dict[str, Stored]:
    """What the header of an open file says, which has at most so many bytes."""
    try:
        if len(head := file.read(8)) < 8:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: it has {len(head)} bytes")
        size, length = struct.unpack("<Q", head)[0], os.fstat(file.fileno()).st_size
        if size > min(longest, length - 8):
            raise CheckpointError(f"{path} is truncated or not a safetensors file: its first eight bytes say that its header "
                                  f"has {size} bytes, allowed are {longest}, and no more than the file has")
        header = json.loads(file.read(size), object_pairs_hook=unique)
        with safetensors.safe_open(path, "np"):  # which checks that every array lies in the file, and no two at one place
            pass
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # whatever the package raises
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    return {name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items() if name != "__metadata__"}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice, which programs read in different ways; ValueError."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the name {quoted(name)} stands twice in one object")
        made[name] = value
    return made


class Mapped(Mapping[str, np.ndarray]):
    """The arrays of one file, each of which is mapped anew whenever it is asked for, so that its memory is soon free again.

    The file stays open until ``close``: all arrays are of the same one, even where another takes its name meanwhile.
    """

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # closed by ``close``
        try:
            self._stored = _described(self._file, path, 10 * HEADER)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> np.ndarray:
        return self._stored[name].array(self._file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def sha256(self) -> str:
        """The SHA-256 of the whole file."""
        return digest(self._file)

    def close(self) -> None:
        """Close the file; arrays that were asked for stay."""
        self._file.close()


def digest(file: BinaryIO) -> str:
    """The SHA-256 of an open file, from its first byte on, of which a part at a time is in memory."""
    file.seek(0)
    sums = hashlib.sha256()
    while part := file.read(2**20):
        sums.update(part)
    return sums.hexdigest()


class Planned(NamedTuple):
    """An array that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def blocks(arrays: Mapping[str, np.ndarray | Planned], metadata: Mapping[str, str] | None = None) -> Iterator[bytes]:
    """The bytes of a file with these arrays, part by part: float32, float64 or int64, of any shape and layout."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # 8 bytes a number first, so that every array begins at a multiple of its own, which the format asks for
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    place = 0
    for name in names:
        array = arrays[name]
        dtype = np.dtype(array.dtype)
        stop = place + math.prod(array.shape) * dtype.itemsize
        header[name] = {"dtype": WRITTEN[dtype.name], "shape": list(array.shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        array = arrays[name]
        if isinstance(array, Planned):
            made = array.make()
            if made.shape != array.shape:
                raise AssertionError(f"{name} was planned with the shape {array.shape} and has {made.shape}")
            array = made.astype(array.dtype, copy=False)
        # In C order, which np.ascontiguousarray would give too, but it makes a 0-d array 1-d.
        yield np.asarray(array, order="C", dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        del array


def of_folder(folder: Path) -> dict[str, Stored]:
    """The arrays of a model in a folder: of model.safetensors, or of the files that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return stored(single)
    try:
        if (size := index.stat().st_size) > HEADER:
            raise CheckpointError(f"{index}: it has {size} bytes, allowed are {HEADER}")
        places = json.loads(files.read(index), object_pairs_hook=unique)["weight_map"]
        named = {name: str(file) for name, file in places.items()}
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not the index of a model: weight_map, which names the file of every array, is not "
                              "there") from None
    arrays: dict[str, Stored] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: {quoted(file)} is not the name of a file beside it")
        if not (folder / file).is_file():
            raise CheckpointError(f"{index} names {quoted(file)}, and there is no such file beside it")
        for name, array in stored(folder / file).items():
            if named.get(name) != file:
                raise CheckpointError(f"{folder / file} holds {quoted(name)}, which the index does not place there")
            arrays[name] = array
    if missing := [name for name in named if name not in arrays]:
        raise CheckpointError(f"{index}: {quoted(named[missing[0]])} does not hold {quoted(missing[0])}"
                              + (f", and {len(missing) - 1} more arrays are not where it says" if len(missing) > 1 else ""))
    return arrays
