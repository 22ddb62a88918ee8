"""The public index has another package named autograd: whoever has both is told so, and how to have both."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THEIRS = {"__init__.py": "from .differential_operators import grad\n", "differential_operators.py": "grad = None\n",
          "tracer.py": "", "core.py": "theirs = True\n"}


def ours(site):
    for package in ("minitv", "autograd"):
        shutil.copytree(ROOT / package, site / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def theirs(site):
    (site / "autograd").mkdir(exist_ok=True)
    for name, text in THEIRS.items():
        (site / "autograd" / name).write_text(text)


def uninstall(site):
    for name in THEIRS:
        (site / "autograd" / name).unlink()


def run(site):
    done = subprocess.run([sys.executable, "-m", "minitv", "--version"], cwd=site, env={**os.environ, "PYTHONPATH": str(site)},
                          capture_output=True, text=True)
    return done.returncode, done.stderr


SHARED = "another package of that name was put into the same folder"


@pytest.mark.parametrize("steps, sentence", [
    ((ours,), None),
    ((theirs, ours), SHARED),
    ((ours, theirs), SHARED),
    ((theirs, ours, uninstall), SHARED),  # which takes the first file of ours with it
    ((ours, theirs, uninstall), SHARED),
])
def test_both_in_one_folder_in_any_order(tmp_path, steps, sentence):
    for step in steps:
        step(tmp_path)
    code, err = run(tmp_path)
    if sentence is None:
        assert code == 0, err
    else:
        assert code != 0 and sentence in err and "pip uninstall autograd minitv" in err


def test_the_advice_repairs_it(tmp_path):
    theirs(tmp_path)
    ours(tmp_path)
    shutil.rmtree(tmp_path / "autograd")  # pip uninstall autograd minitv
    shutil.rmtree(tmp_path / "minitv")
    ours(tmp_path)
    assert run(tmp_path) == (0, "")


def test_theirs_is_found_before_ours(tmp_path):
    theirs(tmp_path)
    shutil.copytree(ROOT / "minitv", tmp_path / "minitv", ignore=shutil.ignore_patterns("__pycache__"))
    code, err = run(tmp_path)
    assert code != 0 and "but Python found" in err and "pip uninstall autograd" in err
