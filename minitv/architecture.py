"""What is declared of an architecture whose weights other programs keep in files: one table, by which they come in and go out.

A module of minitv/weights declares a record, found by its name, as GPT-2's does:

    GPT2 = Architecture(
        name="gpt2",                                   # "model_type" of config.json
        summary="...",
        task_class="GPT2LMHeadModel",                  # "architectures" of a config.json that is written
        variant="transformer",
        fixed=dict(positions="learned", bias=True),    # options of the variant that it always has
        keys=(count("n_embd", "width", 768), ...),     # entries of config.json and the options that they are
        rules=(Rule("wte.weight", "embed.weight"), ...),
    )

**Keys.** A Key names entries of config.json and options of ours. ``read(config)`` gives the options, ``write(values)`` the
entries, and both raise a UserError for what the other side has not. The functions below make the usual ones: ``count`` and
``number`` for what is the same on both sides, ``word`` for names that differ, ``ratio`` for a size that we count in widths,
``only`` for an entry that must have one value, ``training`` for what concerns training alone. Entries that no key names must be
null, false, 0 or empty, or stand among ``ignored``: what nobody here knows may change what a model computes.

**Rules.** A Rule names arrays of theirs and of ours; ``{i}`` stands for the number of a layer. ``way`` leads from one to the
other and back: SAME, TRANSPOSED, or ``rows(...)``, by which several of theirs are the rows of one of ours. ``when(values, i)``
says whether a model with these options has the arrays. Import and export are both made of this table (minitv/exchange.py),
which also checks that every array on both sides is named by one rule, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .errors import UserError, quoted

Values = Mapping[str, Any]  # options of ours, or entries of a config.json, by name
Arrays = list[np.ndarray]


# Functions of feed-forward networks by their names in transformers; the first of several names for one is written.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu": "relu", "relu2": "relu_squared"}


# -- config.json -------------------------------------------------------------------------------------------------------
def worded(value: Any) -> str:
    """An entry of a config.json as a sentence names it: true, false and null in the words of the file."""
    return json.dumps(value) if value is None or isinstance(value, bool) else quoted(value)


class Key(NamedTuple):
    """Entries of config.json and options of ours that say the same."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[[Values], Values]
    write: Callable[[Values], Values]


def entry(config: Values, name: str, kind: type | tuple[type, ...], default: Any, allowed: str) -> Any:
    """An entry of a config.json, or what the library takes where it is absent; UserError if it is of another type."""
    value = config.get(name, default)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise UserError(f"{name} is {worded(value)}, allowed: {allowed}")
    return value


def count(theirs: str, ours: str, default: int | None) -> Key:
    """A positive integer that is the same on both sides; None for ``default``: it must be there."""
    def read(config: Values) -> Values:
        value = entry(config, theirs, int, default, "a positive integer")
        if not 1 <= value < 2**31:
            raise UserError(f"{theirs} is {quoted(value)}, allowed: a positive integer below 2**31")
        return {ours: value}

    return Key((theirs,), (ours,), read, lambda values: {theirs: values[ours]})


def number(theirs: str, ours: str, default: float) -> Key:
    """A number that is the same on both sides."""
    def read(config: Values) -> Values:
        value = entry(config, theirs, (int, float), default, "a number")
        if not abs(value) < 2**1000:
            raise UserError(f"{theirs} is {quoted(value)}, allowed: a number that is finite")
        return {ours: float(value)}

    return Key((theirs,), (ours,), read, lambda values: {theirs: values[ours]})


def flag(theirs: str, ours: str, default: bool) -> Key:
    """What is on or off on both sides."""
    def read(config: Values) -> Values:
        return {ours: entry(config, theirs, bool, default, "true or false")}

    return Key((theirs,), (ours,), read, lambda values: {theirs: values[ours]})


def word(theirs: str, ours: str, default: str, words: Values) -> Key:
    """A name that is another one here: ``words`` are ours by theirs, and the first of several that are the same is written."""
    def read(config: Values) -> Values:
        value = entry(config, theirs, str, default, f"one of {', '.join(words)}")
        if value not in words:
            raise UserError(f"{theirs} is {quoted(value)}, allowed: {', '.join(words)}")
        return {ours: words[value]}

    def write(values: Values) -> Values:
        for name, value in words.items():
            if value == values[ours]:
                return {theirs: name}
        raise UserError(f"--{ours.replace('_', '-')} is {values[ours]}, and there is no word for it there, allowed: "
                        f"{', '.join(dict.fromkeys(words.values()))}")

    return Key((theirs,), (ours,), read, write)


def ratio(theirs: str, ours: str, of: Key, multiple: float) -> Key:
    """A size that we count in widths; ``of`` is the key of the width, and null and absence stand for ``multiple`` widths."""
    (width,) = of.ours

    def read(config: Values) -> Values:
        value = config.get(theirs)
        if value is None:
            return {ours: float(multiple)}
        if type(value) is not int or not 1 <= value < 2**31:
            raise UserError(f"{theirs} is {worded(value)}, allowed: a positive integer below 2**31, or null")
        return {ours: value / of.read(config)[width]}

    def write(values: Values) -> Values:
        return {theirs: max(1, round((multiple if values[ours] is None else values[ours]) * values[width]))}

    return Key((theirs,), (ours,), read, write)


def widths(theirs: str, ours: str, of: Key, default: int, usual: Callable[[Values], float] | None = None) -> Key:
    """A size that we count in widths; where it is absent there it is ``default``, where it is none here ``usual(values)``."""
    (width,) = of.ours
    size = count(theirs, ours, default)

    def write(values: Values) -> Values:
        multiple = values[ours] if values[ours] is not None or usual is None else usual(values)
        return {theirs: max(1, round(multiple * values[width]))}

    return Key((theirs,), (ours,), lambda config: {ours: size.read(config)[ours] / of.read(config)[width]}, write)


def only(theirs: str, value: Any, reason: str, *others: Any) -> Key:
    """An entry that must be ``value``, which is also what absence stands for, or one of ``others``; ``reason`` says why."""
    def read(config: Values) -> Values:
        if not any(type(found) is type(one) and found == one for found in (config.get(theirs, value),)
                   for one in (value, *others)):
            raise UserError(f"{theirs} is {worded(config[theirs])}, allowed: {worded(value)}, because {reason}")
        return {}

    return Key((theirs,), (), read, lambda values: {theirs: value})


def training(ours: str, *theirs: str) -> Key:
    """What concerns training alone, such as dropout: it is written, and not read."""
    return Key(theirs, (ours,), lambda config: {}, lambda values: dict.fromkeys(theirs, values[ours]))


# -- arrays ------------------------------------------------------------------------------------------------------------
class Way(NamedTuple):
    """From arrays of theirs to arrays of ours, and back, with the options of the model. Both only move numbers."""

    read: Callable[[Arrays, Values], Arrays]
    write: Callable[[Arrays, Values], Arrays]


SAME = Way(lambda arrays, values: arrays, lambda arrays, values: arrays)
TRANSPOSED = Way(lambda arrays, values: [array.T for array in arrays], lambda arrays, values: [array.T for array in arrays])


def width(values: Values) -> int:
    """How many channels the model has: the rows of a square matrix."""
    return values["width"]


def untied(values: Values, i: int) -> bool:
    """Whether the head has weights of its own: for ``Rule.when``."""
    return not values["tied"]


def rows(*sizes: Callable[[Values], int]) -> Way:
    """Several of theirs are, one below the other, the rows of one of ours; each of ``sizes`` gives the rows of one of them."""
    def write(arrays: Arrays, values: Values) -> Arrays:
        return np.split(arrays[0], np.cumsum([size(values) for size in sizes])[:-1])

    return Way(lambda arrays, values: [np.concatenate(arrays)], write)


def shaped(theirs: Callable[[Sequence[int]], Sequence[int]], ours: Callable[[Sequence[int]], Sequence[int]]) -> Way:
    """The same numbers in another shape: each function gives the shape there of the shape on the other side."""
    return Way(lambda arrays, values: [array.reshape(ours(array.shape)) for array in arrays],
               lambda arrays, values: [array.reshape(theirs(array.shape)) for array in arrays])


FLAT = shaped(lambda shape: (1, 1, *shape), lambda shape: shape[-1:])  # a vector, which they keep with two axes more


class Rule(NamedTuple):
    """Arrays of theirs, of ours, and the way between them, which may depend on the layer.

    Theirs without ours follow from the options: reading only checks them. Ours without theirs are made.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    way: Way | Callable[[int], Way] = SAME
    when: Callable[[Values, int], bool] = lambda values, i: True


def biased(theirs: str, ours: str, way: Way = SAME, bias: Way = SAME) -> tuple[Rule, Rule]:
    """The rules of a layer with a weight and a bias, which are called so on both sides."""
    return Rule(f"{theirs}.weight", f"{ours}.weight", way), Rule(f"{theirs}.bias", f"{ours}.bias", bias)


@dataclass(frozen=True)
class Architecture:
    """An architecture whose weights other programs keep: how its config.json and its arrays are ours, and the other way."""

    name: str  # "model_type" of config.json, unless ``model_type`` is another
    summary: str
    task_class: str  # the class of transformers that a written config.json names
    variant: str
    keys: tuple[Key, ...]
    rules: tuple[Rule, ...]
    model_type: str = ""  # of config.json, where several architectures have the same; ``describes`` then tells them apart
    describes: Callable[[Values], bool] = lambda config: True  # whether a config.json of its model_type is of this one
    loading: str = "transformers.{task_class}.from_pretrained({folder!r})"  # how other programs load what is exported
    signs: tuple[str, ...] = ()  # entries by which a config.json without a model_type is known
    task: str | None = None  # what a model is for here; None: what the variant is trained for by default
    fixed: Values = field(default_factory=dict)  # options of ours that it always has
    likewise: Mapping[str, Values] = field(default_factory=dict)  # variants that export takes, too, with options they must have
    filled: Values = field(default_factory=dict)  # others that export takes, because arrays of zeros stand for what they lack
    vocab: Key = field(default_factory=lambda: count("vocab_size", "vocab", None))
    prefix: str = ""  # of the names of its arrays, which a file of the model without its head does not have
    copies: Mapping[str, str] = field(default_factory=dict)  # arrays that may be there once more, by the name of the copy
    ignored_arrays: tuple[str, ...] = ()  # regular expressions of names whose arrays follow from the options, such as masks
    ignored: tuple[str, ...] = ()  # entries of config.json that change nothing that it computes
    check: Callable[[Values, Values], None] = lambda config, values: None  # UserError for what keys do not see by themselves

    def always(self, variant: str) -> Values:
        """The options that a model of a variant must have; those that the variant has not stand for what it is."""
        return {**self.fixed, **self.likewise.get(variant, {})}

    @property
    def ours(self) -> frozenset[str]:
        """The options that its keys read and write."""
        return frozenset(name for key in self.keys for name in key.ours)

    def loader(self, folder: str) -> str:
        """What loads a folder that was written, for a person."""
        return self.loading.format(task_class=self.task_class, folder=folder)

    def expanded(self, values: Values) -> list[Rule]:
        """The rules of a model with these options, with the numbers of its layers, and names in tuples."""
        made = []
        for rule in self.rules:
            theirs, ours = ((names,) if isinstance(names, str) else names for names in rule[:2])
            layers = range(values["layers"]) if any("{i}" in name for name in (*theirs, *ours)) else (0,)
            made += [Rule(tuple(name.replace("{i}", str(i)) for name in theirs),
                          tuple(name.replace("{i}", str(i)) for name in ours),
                          rule.way if isinstance(rule.way, Way) else rule.way(i))
                     for i in layers if rule.when(values, i)]
        return made
