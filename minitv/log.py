"""log.jsonl: what a run wrote down of its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import files
from .errors import CheckpointError, RunError, UserError
from .schema import check_header, check_record

LOG, DAMAGED = "log.jsonl", "log.damaged.jsonl"
ACCURACY = "val_accuracy"  # in a record: the held-out share of right answers, of tasks that tell it


class Log:
    """DIR/log.jsonl: first a header object, then one object per logged step; each line is written at once.

    Without ``resume_step`` the file starts afresh. With it, the file goes on after that step: the old header stays,
    later records and a line torn by a crash are dropped. ``last`` is the newest record so far, or None. Damaged lines do not
    keep a run from going on: the file as it was is then kept beside, and ``note`` says so. RunError when the disk refuses.
    """

    def __init__(self, directory: str | Path, header: Mapping[str, Any], *, resume_step: int | None = None):
        self.path = Path(directory) / LOG
        self.note = ""
        records: list[dict] = []
        if resume_step is not None and self.path.exists():
            header, records = self._sound(header)
            records = [record for record in records if record["step"] <= resume_step]
        self.last: dict[str, Any] | None = records[-1] if records else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self.path, "".join(map(_line, [header, *records])).encode())
        self._file = open(self.path, "ab", buffering=0)

    def _sound(self, header: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """The header, or the given one in place of a damaged one, and the records that are not damaged."""
        data = _read(self.path)
        lines = list(_parse(self.path, data))
        damaged = [str(line) for line in lines if isinstance(line, CheckpointError)]
        if lines and not isinstance(lines[0], CheckpointError):
            header = lines[0]
        elif not lines:
            damaged = [f"{self.path}: the header line is missing"]
        if damaged:
            copy = self.path.with_name(DAMAGED)
            files.replace(copy, data)
            more = f", and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
            self.note = f"{damaged[0]}{more}: left out; the file as it was is {copy}"
        return header, [line for line in lines[1:] if not isinstance(line, CheckpointError)]

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; NaN and infinity are written as null."""
        data = _line(record).encode()
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[self._file.write(data):]
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {error.strerror or error}") from error
        self.last = dict(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(directory: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of DIR/log.jsonl as schema.py declares them; a torn last line is left out.

    UserError where there is none, CheckpointError for the first line that is damaged.
    """
    path = Path(directory) / LOG
    objects = []
    for line in _parse(path, _read(path)):
        if isinstance(line, CheckpointError):
            raise line
        objects.append(line)
    if not objects:
        raise CheckpointError(f"{path}: the header line is missing")
    return objects[0], objects[1:]


def _read(path: Path) -> bytes:
    try:
        return files.read(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; a folder of a run is needed") from None


def _parse(path: Path, data: bytes) -> Iterator[dict[str, Any] | CheckpointError]:
    """Every line, or what is wrong with it."""
    *lines, _ = data.split(b"\n")  # what follows the last newline is torn, or empty
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            value = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = None
        try:
            (check_header if number == 1 else check_record)(value, where)
        except CheckpointError as error:
            yield error
        else:
            yield value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(of_json(value), allow_nan=False) + "\n"


def of_json(value: Any) -> Any:
    """NumPy values as Python values, paths as texts, and what JSON has no word for (NaN, infinity) as None."""
    if hasattr(value, "to_json"):
        value = value.to_json()
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): of_json(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [of_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
