"""log.jsonl: what a run wrote down of its steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

LOG = "log.jsonl"


class Log:
    """DIR/log.jsonl: first a header object, then one object per logged step; each line is written at once.

    Without ``resume_step`` the file starts afresh. With it, the file goes on after that step: the old header stays,
    later records and a line torn by a crash are dropped. ``last`` is the newest record so far, or None.
    """

    def __init__(self, directory: str | Path, header: Mapping[str, Any], *, resume_step: int | None = None):
        self.path = Path(directory) / LOG
        records: list[dict] = []
        if resume_step is not None and self.path.exists():
            header, records = read_log(directory)
            records = [record for record in records if record.get("step", 0) <= resume_step]
        self.last: dict[str, Any] | None = records[-1] if records else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.path, "".join(map(_line, [header, *records])).encode())
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; NaN and infinity are written as null."""
        self._file.write(_line(record))
        self._file.flush()
        self.last = dict(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(directory: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of DIR/log.jsonl; a torn last line is left out."""
    path = Path(directory) / LOG
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a folder of a run is needed") from None
    *lines, _ = data.split(b"\n")  # what follows the last newline is torn, or empty
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        objects.append(value)
    if not objects:
        raise UserError(f"{path}: the header line is missing")
    return objects[0], objects[1:]


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(_plain(value), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """NumPy values as Python values, paths as texts, and what JSON has no word for (NaN, infinity) as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
