"""What a run leaves in JSON, declared once and checked when it is read: the state of a checkpoint, and the lines of log.jsonl.

``read`` makes a dataclass of parsed JSON. A field without a default must be there. No value is converted, except that an
integer is a number too.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from .errors import VALUE, CheckpointError, plain, quoted

T = TypeVar("T")

NOUNS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", dict: "a JSON object",
         list: "a list"}

Count = Annotated[int, 0]  # from 0 up
Positive = Annotated[int, 1]
Seconds = Annotated[float, 0]


@dataclass(frozen=True)
class RunConfig:
    """The options of a run, by the part of the program that declares and checks them."""

    variant: str
    model: dict[str, Any]
    mixer: dict[str, Any]
    run: dict[str, Any]
    task: str | None = None  # in checkpoints of runs before there were tasks, whose data's options are among those of the run
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds beside its arrays."""

    config: RunConfig
    step: Count  # optimizer steps done
    best_loss: float | None  # null before the first evaluation
    elapsed_s: Seconds
    threads: Positive
    task: dict[str, Any]  # what else is there: the task itself checks it
    best_step: Count = 0
    unimproved: Count = 0  # evaluations in a row that did not improve the held-out loss
    ended: str | None = None  # why a run ended by itself before its last step
    device: str = "cpu"


@dataclass(frozen=True)
class PerCharacter:
    """Tokens of a character in both parts of a text."""

    training: float = 1.0
    held_out: float = 1.0


@dataclass(frozen=True)
class Metric:
    """What a task is judged by: its name with the unit, its key in the records, and whether more of it is better."""

    name: str
    key: str
    rising: bool


@dataclass(frozen=True)
class Header:
    """The first line of log.jsonl; what else it holds is for people."""

    variant: str | None = None
    parameters: Count | None = None
    tokens_per_char: PerCharacter | None = None
    ngram_bpc: list[float] | None = None  # the baselines of logs of runs before there were tasks
    task: str | None = None
    metric: Metric | None = None
    baselines: dict[str, float] | None = None
    accuracies: dict[str, float] | None = None  # of the baselines, where the share of right answers is told beside the metric
    corpus: dict[str, Any] | None = None
    readings: list[str] | None = None  # the keys of what the modules of the model tell of themselves
    started: str | None = None


def read_state(data: Mapping[str, Any], where: str) -> RunState:
    """The state of a checkpoint."""
    names = {field.name for field in dataclasses.fields(RunState)} - {"task"}
    return read(RunState, {**{key: data[key] for key in names & data.keys()},
                           "task": {key: value for key, value in data.items() if key not in names}}, where)


def check_header(data: Any, where: str) -> None:
    """Check the first line of a log."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    read(Header, data, where, others=True)


def check_record(data: Any, where: str) -> None:
    """Check another line of a log: a step, and numbers under any names; null stands for a number that was not finite."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    if "step" not in data:
        raise CheckpointError(f"{where}: step is missing")
    for key, value in data.items():
        _value(Count if key == "step" else float | None, value, f"{where}: {plain(key, VALUE)}")


def read(cls: type[T], data: Any, where: str, *, others: bool = False) -> T:
    """An instance of a dataclass; CheckpointError says what is missing, unknown or of another type. ``others`` may be there."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: {quoted(data)} is not a JSON object")
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls, include_extras=True)
    if unknown := [] if others else [key for key in data if key not in fields]:
        raise CheckpointError(f"{where}: {', '.join(map(quoted, unknown[:8]))} is unknown")
    if missing := [name for name, field in fields.items() if name not in data and field.default is dataclasses.MISSING]:
        raise CheckpointError(f"{where}: {', '.join(missing)} is missing")
    return cls(**{name: _value(hints[name], data[name], f"{where}: {name}") for name in fields if name in data})


def _value(kind: Any, value: Any, where: str) -> Any:
    low, optional, origin, arguments = -math.inf, False, typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        optional = True
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        kind, low = arguments
        origin = None
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        return read(kind, value, where)
    expected = origin or kind
    right = type(value) is expected
    if kind is float and type(value) is int and abs(value) < 2**1023:
        value, right = float(value), True
    if not right or (kind is float and not math.isfinite(value)) or (kind in (int, float) and value < low):
        limit = f" from {low} up" if low > -math.inf else ""
        raise CheckpointError(f"{where}: {quoted(value)} is not {NOUNS[expected]}{limit}{' or null' * optional}")
    if origin is list:
        for i, item in enumerate(value):
            _value(arguments[0], item, f"{where}[{i}]")
    if origin is dict and arguments[1] is not Any:
        for key, item in value.items():
            _value(arguments[1], item, f"{where}: {plain(key, VALUE)}")
    return value
