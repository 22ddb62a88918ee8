"""What the documents, the docstrings and the examples say is executed."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import autograd
import minitv
from minitv import cli

ROOT = Path(__file__).parent.parent
PAGES = [path for folder in (".", "autograd", "minitv", "minitv/variants", "benchmarks", "examples")
         if (path := ROOT / folder / "README.md").exists()]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVERY = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
EXAMPLES = {"01_scalar_graph": [], "02_char_lm": ["2"], "03_write_an_operator": []}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", EVERY, re.M | re.S)


def commands():
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("minitv ")]


def modules():
    for package in (autograd, minitv):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                yield module.name


def test_every_example_is_run():
    """Here or in test_notebooks.py, which runs those with cells."""
    paths = [path for path in (ROOT / "examples").glob("*.py") if "# %%" not in path.read_text(encoding="utf-8")]
    assert sorted(path.stem for path in paths) == sorted(EXAMPLES)


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, tmp_path):
    result = subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py", *EXAMPLES[name]], cwd=tmp_path,
                            env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert len(result.stdout.splitlines()) > 3


@pytest.mark.parametrize("name", list(modules()))
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_readme_has_what_these_tests_look_for():
    assert EVERY.count(">>> ") >= 4 and len(commands()) >= 6
    assert 'pip install -e ".[test]" && pytest' in README and "pip install -e . && minitv train" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_documents(page):
    assert doctest.testfile(str(page), module_relative=False, encoding="utf-8").failed == 0


def test_what_the_readme_shows_of_python_runs(tmp_path, monkeypatch):
    """The block without prompts, with a small text and few steps."""
    (block,) = re.findall(r"^```python\n(import minitv\n.*?)^```$", README, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("The end is near.\n" * 200)
    block = block.replace("steps=500", "steps=2, eval_every=0, context=8, layers=1, width=16")
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_readme_are_understood(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    word, *rest = shlex.split(command)[1:]
    if word == "train":
        rest.append("--print-config")
    elif word not in ("list", "info", "explain"):  # it reads a run, or takes long
        rest.append("--help")
    (tmp_path / "my.txt").write_text("text")
    assert cli.main([word, *rest]) == 0
    assert capsys.readouterr().out


def test_tables_of_the_documents_are_what_the_results_say():
    result = subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_named_in_the_documents_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:autograd|minitv|tests|examples|benchmarks)/[\w./]*)`", text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"\]\(([\w./]+)\)", text):
            assert (page.parent / path).exists(), path
