"""What the README, the docstrings and the examples say is executed."""

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
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {"01_scalar_graph": [], "02_char_lm": ["2"], "03_write_an_operator": []}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


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
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


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
    assert README.count(">>> ") >= 4 and len(commands()) >= 6
    assert 'pip install -e ".[test]" && pytest' in README and "pip install -e . && minitv train" in README


def test_python_in_the_readme():
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False, encoding="utf-8").failed == 0


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_readme_are_understood(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    word, *rest = shlex.split(command)[1:]
    if word == "train":
        rest.append("--print-config")
    elif word in ("sample", "plot", "compare"):
        rest.append("--help")
    (tmp_path / "my.txt").write_text("text")
    assert cli.main([word, *rest]) == 0
    assert capsys.readouterr().out


def test_tables_of_the_readme_are_what_the_results_say():
    result = subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_named_in_the_readme_exist():
    named = re.findall(r"`((?:autograd|minitv|tests|examples|benchmarks)/[\w./]*)`", README)
    for path in named + re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
