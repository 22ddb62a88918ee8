"""Names that are declared in the modules of a folder, found by reading the sources: nothing is imported for a list or a help.

A declaration is a statement at the top of a module that says ``name="..."``: a call, as in
``RETNET = Variant(name="retnet", ...)``, or a class, as in ``class Text(Task, name="text")``. Modules whose names begin with an
underscore declare nothing.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One declaration: its name, the sentence about it, and where it stands."""

    name: str
    summary: str
    module: str  # full name
    attribute: str  # of the module

    def load(self) -> Any:
        """Import the module and return what was declared."""
        return getattr(importlib.import_module(self.module), self.attribute)


def entries(package: str, path: Sequence[str]) -> dict[str, Entry]:
    """The declarations in the modules of a package by name, in alphabetical order; ``path`` is the package's ``__path__``."""
    found: dict[str, Entry] = {}
    for module in pkgutil.iter_modules(list(path)):
        if not module.name.startswith("_"):
            source = Path(module.module_finder.path, f"{module.name}.py")
            for entry in _read(str(source), source.stat().st_mtime_ns, f"{package}.{module.name}"):
                if entry.name in found:
                    raise TypeError(f"{entry.name!r} is declared in {found[entry.name].module} and in {entry.module}")
                found[entry.name] = entry
    return dict(sorted(found.items()))


@functools.cache
def _read(source: str, changed: int, module: str) -> tuple[Entry, ...]:
    found = []
    for statement in ast.parse(Path(source).read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=attribute)], value=ast.Call(keywords=keywords)):
                pass
            case ast.ClassDef(name=attribute, keywords=keywords):
                pass
            case _:
                continue
        texts = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant) and isinstance(k.value.value, str)}
        if "name" in texts:
            found.append(Entry(texts["name"], texts.get("summary", ""), module, attribute))
    return tuple(found)
