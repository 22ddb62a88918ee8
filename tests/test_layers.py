"""The import graph, read from the sources: a ladder without circles, in the order of the tables "Reading the code".

The engine's table is in autograd/README.md, the library's goes on in minitv/README.md.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"numpy", "scipy", "numba", "llvmlite", "cupy", "matplotlib", "safetensors"}  # what takes a noticeable time to import
CORE = ("tensor", "node", "registry", "op", "routes", "dispatch", "shapes", "check")


def module_name(path: Path) -> str:
    """autograd/ops/gelu/__init__.py -> autograd.ops.gelu"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in ("autograd", "minitv") for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports(module: str) -> dict[str, bool]:
    """What a module imports: modules of ours, and the first names of others; whether within a function only."""
    path, found = SOURCES[module], {}
    tree = ast.parse(path.read_text("utf-8"))
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)}
    unseen = {id(inner) for node in ast.walk(tree)  # these names are for annotations, nothing is imported
              if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            name = name if name in SOURCES else name.partition(".")[0]
            if name != module:
                found[name] = found.get(name, True) and id(node) in late
    if path.name == "__init__.py" and any(isinstance(node, ast.For) and "import_module" in ast.unparse(node)
                                           for node in tree.body):  # which imports all its modules
        children = [other for other in SOURCES if other.startswith(f"{module}.") and "." not in other[len(module) + 1 :]]
        found.update(dict.fromkeys(children, False))
    return found


def ours(module: str) -> list[str]:
    return [name for name in imports(module) if name in SOURCES]


@cache
def loaded(module: str) -> set[str]:
    """The heavy libraries that importing a module brings in, with those of its packages."""
    seen, unseen = set(), [module]
    while unseen:
        name = unseen.pop()
        if name in SOURCES and name not in seen:
            seen.add(name)
            unseen += [other for other, late in imports(name).items() if not late]
            unseen.append(name.rpartition(".")[0])
        seen.add(name)
    return seen & HEAVY


def circles() -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for name in ours(module):
            if name not in index:
                visit(name)
                low[module] = min(low[module], low[name])
            elif name in stack:
                low[module] = min(low[module], index[name])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in SOURCES:
        if module not in index:
            visit(module)
    return found


def floors() -> dict[str, int]:
    """The row of the tables that each module belongs to: the longest path that fits."""
    text = "\n".join((ROOT / folder / "README.md").read_text("utf-8").split("## Reading the code")[1].split("\n## ")[0]
                     for folder in ("autograd", "minitv"))
    rows = [re.findall(r"`((?:autograd|minitv)/[\w/.*]*)`", line.split("|")[1]) for line in text.splitlines() if "|" in line]
    places = {path: number for number, row in enumerate(row for row in rows if row) for path in row}
    found = {}
    for module, path in SOURCES.items():
        relative = path.relative_to(ROOT).as_posix()
        fitting = [p for p in places if relative == p or (p.endswith("/") and relative.startswith(p))]
        if fitting:
            found[module] = places[max(fitting, key=len)]
    return found


def test_no_modules_import_each_other():
    assert circles() == []


def test_every_module_has_a_floor():
    assert [module for module in SOURCES if module not in floors()] == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    place = floors()
    up = [name for name in ours(module) if place[name] > place[module]]
    assert not up, f"{module} imports {', '.join(up)}, which the table places above it"


@pytest.mark.parametrize("module", SOURCES)
def test_an_import_is_late_only_for_the_sake_of_a_heavy_library(module):
    late = [name for name, is_late in imports(module).items()
            if is_late and name in SOURCES and loaded(name) <= loaded(module)]
    assert not late, f"{module} imports {', '.join(late)} within a function, although no heavy library comes with it"


def code_lines(text: str) -> int:
    """The lines of code: without blank ones, comments and docstrings."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    spoken = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent
              for line in range(token.start[0], token.end[0] + 1)}
    return len(spoken - documented)


def test_the_core_reads_in_an_hour(capsys):
    """Prints the layers and the size of the core."""
    texts = {name: SOURCES[f"autograd.{name}"].read_text("utf-8") for name in CORE}
    code = {name: code_lines(text) for name, text in texts.items()}
    layers: dict[int, list[str]] = {}
    for module, floor in floors().items():
        layers.setdefault(floor, []).append(module)
    with capsys.disabled():
        print()
        for floor, modules in sorted(layers.items()):
            print(f"{floor:>3}  {' '.join(modules) if len(modules) < 8 else f'{modules[0]} and {len(modules) - 1} others'}")
        total = sum(len(text.splitlines()) for text in texts.values())
        print(f"core: {sum(code.values())} lines of code, {total} with docstrings, comments and blank lines: "
              + ", ".join(f"{name} {count}" for name, count in code.items()))
    assert sum(code.values()) <= 1210
