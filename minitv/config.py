"""Options declared once: a frozen dataclass gives the command line, its help, the TOML schema and the stored JSON.

    @dataclass(frozen=True)
    class ModelOptions:
        "The model."
        layers: int = option(2, "number of blocks", low=1)
        __post_init__ = check

Values come in layers, the later wins: default < preset < file < command line. Where each value came from is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import shutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import files
from .errors import VALUE, UserError, naming, plain, quoted
from .report import reflow

T = TypeVar("T")

NOUNS = {int: "an integer", float: "a number", str: "a text", Path: "a path"}
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
PLACES = ("DIR", "FILE", "PATH")  # metavars of what lies on the disk
DOTS = 100  # in a key of a TOML file
YES_NO = {"true", "false", "yes", "no", "on", "off", "0", "1"}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    group: str | None = None,
    resumable: bool = False,
    harmless: bool = False,
    newer: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option.

    ``low`` and ``high`` are inclusive bounds, ``above`` and ``below`` exclusive ones. ``group`` is the heading in the
    help (default: the first line of the dataclass's docstring). A ``resumable`` option may change when a run is resumed, and
    no result depends on a ``harmless`` one (but for rounding and what dropout draws). Older checkpoints do not have a
    ``newer`` option: its default is what they did.
    """
    return dataclasses.field(
        default=default,
        metadata=dict(
            help=help, low=low, high=high, above=above, below=below, choices=choices, metavar=metavar, group=group,
            resumable=resumable, harmless=harmless, newer=newer,
        ),
    )


class Sweep(tuple):
    """Several values of one option, each of which is tried."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One option: its type, limits and help, read from a field that ``option`` made."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    group: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    resumable: bool = False
    harmless: bool = False
    newer: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag, "--no-" + self.flag[2:]) if self.type is bool else (self.flag,)

    @property
    def allowed(self) -> str:
        """What may be given, in words: "an integer from 1 up to 8"."""
        if self.type is bool:
            return "true or false"
        if self.choices:
            words = ", ".join(self.choices)
        else:
            bounds = ((" above", self.above), (" from", self.low), (" and below", self.below), (" up to", self.high))
            words = NOUNS[self.type] + "".join(f"{word} {_bound(at)}" for word, at in bounds if at is not None)
        return words + (" or none" if self.optional else "")

    def parse(self, text: str) -> Any:
        """The value of a text from the command line, or UserError."""
        if self.optional and text == "none":
            return None
        value: Any = text
        if self.type in (int, float):
            try:
                value = self.type(text)
            except ValueError:
                raise UserError(f"{self.flag}: {quoted(text)} is not {NOUNS[self.type]}, allowed: {self.allowed}") from None
        return self.check(value, self.flag)

    def parse_several(self, text: str) -> Any:
        """The value of a text, or a Sweep of the values between its commas; a text that may be anything is one value."""
        if "," not in text or (self.type in (str, Path) and not self.choices):
            return self.parse(text)
        values = Sweep(self.parse(part.strip()) for part in text.split(","))
        if len(set(values)) < len(values):
            raise UserError(f"{self.flag}: {quoted(text)} has a value twice")
        return values

    def check(self, value: Any, label: str) -> Any:
        """The value with its exact type (an integer is accepted for a float, a text for a path), or UserError."""
        if value is None or (value == "none" and self.optional):
            if self.optional:
                return None
            raise UserError(f"{label}: a value is needed, allowed: {self.allowed}")
        if type(value) is int and self.type is float:
            value = float(value) if abs(value) < 2**1023 else math.inf
        if type(value) is str and self.type is Path:
            value = Path(value)
        if not isinstance(value, self.type) or (isinstance(value, bool) and self.type is not bool):
            noun = NOUNS.get(self.type, "true or false")
            raise UserError(f"{label}: {quoted(value)} is not {noun}, allowed: {self.allowed}")
        if self.choices and value not in self.choices:
            hint = did_you_mean(value, self.choices)
            raise UserError(f"{label}: {quoted(value)} is unknown, allowed: {self.allowed}{hint}")
        if self.type is float and not math.isfinite(value):
            raise UserError(f"{label}: {value} is not a finite number, allowed: {self.allowed}")
        if self.type in (int, float):
            small = (self.low is not None and value < self.low) or (self.above is not None and value <= self.above)
            large = (self.high is not None and value > self.high) or (self.below is not None and value >= self.below)
            if small or large:
                raise UserError(f"{label}: {quoted(value)} is too {'small' if small else 'large'}, allowed: {self.allowed}")
        if self.metavar in PLACES:
            value = _without_tilde(value, label)
        if self.type in (str, Path) and not _storable(str(value)):
            raise UserError(f"{label}: {quoted(str(value))} holds half a character (a surrogate), which no file can store")
        return value


def _without_tilde(path: str, label: str) -> str:
    """A path in which ~ is the user's home, as a shell has it; UserError where there is none.

    A shell does not read what stands in a file, or behind the sign of --out=~/run.
    """
    if path[:1] != "~" or path[1:2] not in ("", "/", os.sep):
        return path
    home = os.path.expanduser("~")
    if home == "~":
        raise UserError(f"{label}: {quoted(path)} begins with the folder of the user, who has none here: give the whole path")
    return home + path[1:]


def _storable(text: str) -> bool:
    """Whether a text is characters, and bytes that are none as Python has them in file names."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _bound(limit: float) -> str:
    power = (int(limit) + 1).bit_length() - 1
    return f"2**{power} - 1" if power > 30 and limit == 2**power - 1 else str(limit)


@functools.cache
def settings(cls: type) -> dict[str, Setting]:
    """The options that a dataclass declares, by field name."""
    hints = typing.get_type_hints(cls)
    title = (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")
    result = {}
    for field in dataclasses.fields(cls):
        kind, arguments = hints[field.name], typing.get_args(hints[field.name])
        optional = typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in arguments
        if optional:
            kind, *others = (a for a in arguments if a is not type(None))
        if kind not in (*NOUNS, bool) or (optional and (others or kind is bool)) or "help" not in field.metadata:
            raise TypeError(
                f"{cls.__name__}.{field.name}: use option(...) with int, float, str, bool, Path or X | None"
            )
        limits = {k: v for k, v in field.metadata.items() if k != "group"}
        limits["choices"] = tuple(limits["choices"]) if limits["choices"] else None
        group = field.metadata["group"] or title
        result[field.name] = Setting(field.name, kind, optional, field.default, group=group, **limits)
    return result


def check(config: Any) -> None:
    """Check every field against its declaration; meant as ``__post_init__`` (integers become floats where declared)."""
    for name, setting in settings(type(config)).items():
        object.__setattr__(config, name, setting.check(getattr(config, name), name))


# -- layers of values --------------------------------------------------------------------------------------------------


class Options:
    """Several option dataclasses in one flat namespace: each field name belongs to exactly one of them.

    ``without`` names fields that are not offered here and keep their defaults. ``elsewhere(name)`` says who else has an option
    that is unknown here, for the error; an empty text: nobody.
    """

    def __init__(self, *classes: type, without: Sequence[str] = (), elsewhere: Callable[[str], str] = lambda name: ""):
        self.classes, self.elsewhere = classes, elsewhere
        self.settings: dict[str, Setting] = {}
        for cls in classes:
            for name, setting in settings(cls).items():
                if name in without:
                    continue
                if name in self.settings:
                    raise TypeError(f"option {name!r} of {cls.__name__} is declared twice")
                self.settings[name] = setting

    @classmethod
    def union(cls, every: Iterable[Options], without: Sequence[str] = (), **kwargs: Any) -> Options:
        """The options that at least one of several namespaces has, for one command line.

        An option that means different things in several of them stands under a heading of its own, with every meaning.
        """
        union, meanings = cls(**kwargs), {}
        for options in every:
            for name, setting in options.settings.items():
                if name not in without:
                    meanings.setdefault(name, {}).setdefault((setting.group, setting.help), setting)
        for name, several in meanings.items():
            first, *others = several.values()
            if others:
                text = "; ".join(f"{group}: {text}" for group, text in several)
                optional = any(setting.optional for setting in several.values())
                group = "options with a meaning for each variant"
                first = dataclasses.replace(first, group=group, help=text, optional=optional)
            union.settings[name] = first
        return union

    def merge(self, *layers: tuple[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
        """Values and where each came from: the defaults, then ``(source, {name: value})`` in order, the later wins."""
        values = {name: setting.default for name, setting in self.settings.items()}
        sources = dict.fromkeys(values, "default")
        for source, layer in layers:
            for name, value in layer.items():
                if name not in self.settings:
                    hint = self.elsewhere(name) or did_you_mean(name, self.settings)
                    raise UserError(f"{source}: unknown option {quoted(name)}{hint}")
                label = self.settings[name].flag if source == "command line" else f"{source}: {name}"
                values[name] = self.settings[name].check(value, label)
                sources[name] = source
        return values, sources

    def build(self, values: Mapping[str, Any]) -> list[Any]:
        """One instance of each dataclass, in the order they were given."""
        return [cls(**{name: values[name] for name in settings(cls) if name in self.settings}) for cls in self.classes]


def to_json(config: Any) -> dict[str, Any]:
    """The fields as a dictionary that ``json.dumps`` takes."""
    values = {name: getattr(config, name) for name in settings(type(config))}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_json(cls: type[T], data: Any, where: str | None = None) -> T:
    """The inverse of ``to_json``: every field must be there, nothing else may, and each value is checked.

    What a class names in ``retired`` is left out: options that older checkpoints have and that no result depended on. An error
    begins with ``where`` (default: the name of the class).
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected an object with fields, got {quoted(data)}")
    declared = settings(cls)
    for name in data:
        if name not in declared and name not in getattr(cls, "retired", ()):
            raise UserError(f"{where}: unknown field {quoted(name)}{did_you_mean(name, declared)}")
    data = {**{name: setting.default for name, setting in declared.items() if setting.newer}, **data}
    missing = [name for name in declared if name not in data]
    if missing:
        noun = "fields" if len(missing) > 1 else "field"
        raise UserError(f"{where}: missing {noun} {', '.join(map(repr, missing))}")
    values = {name: setting.check(data[name], f"{where}.{name}") for name, setting in declared.items()}
    with naming(where):  # what the class itself checks
        return cls(**values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys of a flat TOML file; ``eval-every`` and ``eval_every`` are the same key.

    File names in it may hold bytes that are not UTF-8, as ``table`` writes them.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        text = files.read(path, pipes=True).decode("utf-8-sig", "surrogateescape")
        for number, line in enumerate(text.splitlines(), 1):  # tomllib's time grows with the square of the dots in a key
            if line.partition("=")[0].count(".") > DOTS and not line.lstrip().startswith("#"):
                raise UserError(f"--config {path}: line {number} has a key of more than {DOTS} dots; options have none")
        data = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise UserError(f"--config {path}: not a TOML file: {error}") from None
    values: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            raise UserError(f"--config {path}: tables are not used, write the keys of [{plain(key, VALUE)}] at the top of "
                            "the file")
        name = key.replace("-", "_")
        if name in values:
            raise UserError(f"--config {path}: {plain(name, VALUE)} is given twice")
        values[name] = value
    return values


def table(rows: Iterable[tuple[str, str, Any, str]]) -> str:
    """Rows of ``(group, name, value, source)`` as text that is also a TOML file: ``layers = 2  # preset small``.

    A file name may hold bytes that are not UTF-8. TOML has no word for them: ``encode`` writes them as they are.
    """
    rows = list(rows)
    texts = [f"{name} = {_toml(value)}" for _, name, value, _ in rows]
    width = min(max(map(len, texts)), 40)
    lines, last = [], None
    for (group, _, _, source), text in zip(rows, texts, strict=True):
        if group != last:
            lines += [*([""] if lines else []), f"# {group}"]
            last = group
        lines.append(f"{text:<{width}}  # {source}")
    return "\n".join(lines)


def encode(text: str) -> bytes:
    """The bytes of a ``table`` in a file."""
    return text.encode("utf-8", "surrogateescape")


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def shown(value: Any) -> str:
    """A value in a sentence: on, off, none, 0.003."""
    if value is None or isinstance(value, bool):
        return {True: "on", False: "off", None: "none"}[value]
    return plain(str(value), VALUE)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`"; did you mean X?"` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word[:VALUE].lower(), list(names), 1, 0.66)
    return f"; did you mean {close[0]}?" if close else ""


def choose(what: str, word: str, names: Iterable[str]) -> str:
    """``word`` if it is known, else UserError with what is allowed and the closest match."""
    names = list(names)
    if word not in names:
        raise UserError(f"unknown {what} {quoted(word)}, allowed: {', '.join(names)}{did_you_mean(word, names)}")
    return word


# -- the command line --------------------------------------------------------------------------------------------------


class _Flag(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


class _Flags(_Flag):
    """A flag that gives a Sweep where both of its forms stand on the command line."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest, None)
        super().__call__(parser, namespace, values, option_string)
        if before is not None and before != (value := getattr(namespace, self.dest)):
            setattr(namespace, self.dest, before if isinstance(before, Sweep) else Sweep((before, value)))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions are paragraphs and indented examples, broken to the width of the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return reflow(text, width)


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError sentences, accepts ``--eval_every`` for ``--eval-every``, and suggests names.

    ``synonyms`` maps option names that people know from other programs to ours; they are suggested, not accepted.
    """

    def __init__(self, prog: str, *, synonyms: Mapping[str, str] | None = None, **kwargs: Any):
        width = min(shutil.get_terminal_size().columns - 2, 110)
        formatter = functools.partial(_Formatter, max_help_position=28, width=width)
        super().__init__(
            prog,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            add_help=False,
            formatter_class=formatter,
            **kwargs,
        )
        self.synonyms = synonyms or {}
        self.elsewhere: Callable[[str], str] = lambda name: ""
        self.add_argument("-h", "--help", action="help", help="show this help and exit")

    def add_options(self, options: Options, values: Mapping[str, Any] | None = None, *, several: bool = False) -> None:
        """Add every option, grouped; the help shows ``values`` (by default the dataclass defaults) as defaults.

        With ``several``, an option takes several values, separated by commas, and gives a Sweep of them; one that is on or off
        gives it where both of its forms are written.
        """
        self.elsewhere = options.elsewhere
        groups: dict[str, Any] = {}
        for name, setting in options.settings.items():
            if setting.group not in groups:
                groups[setting.group] = self.add_argument_group(setting.group)
            default = (values or {}).get(name, setting.default)
            allowed = "" if setting.type is bool or setting.choices or setting.type in (str, Path) else setting.allowed
            notes = [*([allowed] if allowed else []), *([f"default: {shown(default)}"] if default != "" else [])]
            text = setting.help + (f" ({'; '.join(notes)})" if notes else "")
            kwargs: dict[str, Any] = dict(dest=name, help=text.replace("%", "%%"))
            if setting.type is bool:
                kwargs["action"] = _Flags if several else _Flag
            else:
                metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else METAVARS[setting.type]
                kwargs.update(type=setting.parse_several if several else setting.parse, metavar=setting.metavar or metavar)
            groups[setting.group].add_argument(*setting.flags, **kwargs)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Only what was given, by name; UserError for anything unknown."""
        namespace, extra = self.parse_known_intermixed_args(self._normalise(argv))
        for word in extra:
            if word.startswith("-") and word != "-":
                raise UserError(f"unknown option {plain(word.split('=')[0], VALUE)}{self._suggest(word)}")
        if extra:
            raise UserError(f"{quoted(extra[0])} is out of place, usage: {self.usage}")
        return vars(namespace)

    def peek(self, argv: Sequence[str]) -> dict[str, Any]:
        """What this parser knows of a command line that has other options too; -h is left for later."""
        argv = [word for word in self._normalise(argv) if word not in ("-h", "--help")]
        namespace, _ = self.parse_known_args(argv)
        return vars(namespace)

    def error(self, message: str) -> typing.NoReturn:
        message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1: ", message)
        flag = message.partition(":")[0]
        action = self._option_string_actions.get(flag)
        hint = f"; if it begins with - write {flag}=-..." if action is not None and action.metavar == "TEXT" else ""
        message = message.replace("expected one argument", "a value is missing" + hint)
        message = message.replace("the following arguments are required: ", "missing: ")
        if "ignored explicit argument" in message:
            message = self._takes_no_value(flag)
        raise UserError(f"{message}; see {self.prog} --help" if message.startswith("missing") else message)

    def _normalise(self, argv: Sequence[str]) -> list[str]:
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            words.append((name.replace("_", "-") if re.fullmatch(r"--\w[\w-]*", name) else name) + equals + value)
        for word, value in itertools.pairwise(words):
            if isinstance(self._option_string_actions.get(word), _Flag) and set(value.lower().split(",")) <= YES_NO:
                raise UserError(self._takes_no_value(word))
        return words

    def _takes_no_value(self, flag: str) -> str:
        action = self._option_string_actions[flag]
        both = ", or both to try both" if isinstance(action, _Flags) else ""
        return f"{flag} takes no value: write {' or '.join(action.option_strings)}{both}"

    def _suggest(self, word: str) -> str:
        name = word.split("=")[0]
        synonym = "--" + self.synonyms.get(name.lstrip("-").replace("-", "_"), "").replace("_", "-")
        if synonym in self._option_string_actions:
            return f"; here it is {synonym}"
        if hint := self.elsewhere(name.lstrip("-").replace("-", "_")):
            return hint
        flags = {flag[2:]: flag for flag in self._option_string_actions if flag.startswith("--")}
        close = difflib.get_close_matches(name[:VALUE].lstrip("-"), flags, 1, 0.66)
        return f"; did you mean {flags[close[0]]}?" if close else f", see {self.prog} --help"
