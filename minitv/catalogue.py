"""Names that are declared in the modules of a folder, found by reading the sources: nothing is imported for a list or a help.

A declaration is a statement at the top of a module that says ``name="..."``: a call, as in
``RETNET = Variant(name="retnet", ...)``, or a class, as in ``class Text(Task, name="text")``. Modules whose names begin with an
underscore declare nothing. The folders that the environment variable MINITV_PATH names may hold more: FOLDER/variants/*.py
belongs to minitv.variants, FOLDER/tasks/*.py to minitv.tasks.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import pkgutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Entry:
    """One declaration: its name, the sentence about it, and where it stands."""

    name: str
    summary: str
    module: str  # full name
    attribute: str  # of the module

    def load(self) -> Any:
        """Import the module and return what was declared; UserError if a module of MINITV_PATH cannot be imported."""
        return getattr(imported(self.module), self.attribute)


def imported(name: str) -> Any:
    """A module by its full name; UserError if it is one of MINITV_PATH and cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        source = importlib.util.find_spec(name).origin
        if isinstance(error, UserError) or Path(source).is_relative_to(Path(__file__).parent):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
        raise UserError(f"{source}, line {lines[-1]}: {type(error).__name__}: {error}") from error


def modules(package: str, path: list[str]) -> dict[str, Path]:
    """The sources of a package's modules by name; ``path`` is its ``__path__``, which gains the folders of MINITV_PATH.

    UserError where MINITV_PATH names no folder, or a module there has a name that is taken.
    """
    for folder in filter(None, os.environ.get("MINITV_PATH", "").split(os.pathsep)):
        if not os.path.isdir(folder):
            raise UserError(f"MINITV_PATH: {folder} is no folder")
        if (more := os.path.join(os.path.abspath(folder), package.rpartition(".")[2])) not in path:
            path.append(more)  # so that its modules can be imported as well
    return dict(_sources(tuple((root, *os.listdir(root)) for root in path if os.path.isdir(root))))


@functools.cache
def _sources(folders: tuple[tuple[str, ...], ...]) -> dict[str, Path]:
    """The sources of the modules in folders, each given with the names in it, so that a new file is noticed."""
    sources: dict[str, Path] = {}
    for place, module in ((root, module) for root, *_ in folders for module in pkgutil.iter_modules([root])):
        source = Path(place, module.name, "__init__.py") if module.ispkg else Path(place, f"{module.name}.py")
        if module.name.startswith("_") or not source.is_file():
            continue
        if module.name in sources:
            raise UserError(f"{source}: {sources[module.name]} has this name already: rename one of the two")
        sources[module.name] = source
    return sources


def entries(package: str, path: list[str]) -> dict[str, Entry]:
    """The declarations in the modules of a package by name, in alphabetical order; ``path`` is the package's ``__path__``.

    UserError as of ``modules``, and where a module of MINITV_PATH is no Python.
    """
    table: dict[str, Entry] = {}
    sources = modules(package, path)
    for module, source in sources.items():
        for entry in _read(str(source), source.stat().st_mtime_ns, f"{package}.{module}"):
            if entry.name in table:
                other = sources[table[entry.name].module.rpartition(".")[2]]
                raise UserError(f"{source}: {entry.name!r} is declared in {other} already: give it another name")
            table[entry.name] = entry
    return dict(sorted(table.items()))


@functools.cache
def _read(source: str, changed: int, module: str) -> tuple[Entry, ...]:
    declarations = []
    try:
        statements = ast.parse(Path(source).read_bytes()).body
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise UserError(f"{source}: {line}{getattr(error, 'msg', error)}: this is no Python module") from None
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=attribute)], value=ast.Call(keywords=keywords)):
                pass
            case ast.ClassDef(name=attribute, keywords=keywords):
                pass
            case _:
                continue
        texts = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant) and isinstance(k.value.value, str)}
        if "name" in texts:
            declarations.append(Entry(texts["name"], texts.get("summary", ""), module, attribute))
    return tuple(declarations)
