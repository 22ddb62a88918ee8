"""What is chosen by a measurement: made once, kept for every later run, the same for all, and by rule where nothing is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autograd.cpu import choice
from autograd.cpu import compile as compiler
from autograd.cpu.choice import Choice, choose, kept


def spin(steps):
    return lambda: sum(range(steps))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(choice, "SECONDS", 0.01)
    choice.say.cache_clear()
    return tmp_path


def ways(**steps):
    return lambda: {name: [spin(count), spin(count)] for name, count in steps.items()}


def forbidden():
    raise AssertionError("measured again")


def test_the_fastest_way_is_measured_once_and_kept(folder):
    assert kept("sums") is None
    first = choose("sums", ways(short=1000, long=20_000), "long")
    assert first.way == "short" and first.why.startswith("measured here: 0.") and first.why.endswith("of the time of long")
    assert choose("sums", forbidden, "long") == kept("sums") == first
    assert choose("products", ways(short=1000, long=20_000), "short").way == "short"  # another name, another file
    assert len(list(folder.iterdir())) == 2


def test_about_as_fast_is_not_faster(folder, monkeypatch):
    """The way of the rule stays unless another takes less than MARGIN of its time, so that noise seldom decides."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(choice.time, "thread_time", lambda: 1e-3 * next(ticks))  # every call takes as long
    assert choose("sums", ways(one=1, other=1), "other") == Choice("other", "measured here: 1.00 of the time of one")


def test_the_file_of_another_process_counts(folder, monkeypatch):
    """Two processes measure at the same time and find different things: the file that appears first is what both go by."""
    real = choice._measured

    def meanwhile(found, rule):
        choice._keep(folder / f"sums-{choice._machine()}.json", {"way": "long", "milliseconds": {"long": 1.0, "short": 2.0}})
        return real(found, rule)

    monkeypatch.setattr(choice, "_measured", meanwhile)
    assert choose("sums", ways(short=1000, long=20_000), "short").way == "long" == kept("sums").way
    assert len(list(folder.iterdir())) == 1


@pytest.mark.full
def test_processes_that_begin_at_once_agree(tmp_path):
    program = ("import random, sys, time; from autograd.cpu import choice; choice.SECONDS = 0.05\n"
               "calls = {n: [lambda s=random.random(): time.sleep(s / 1e3)] for n in 'abcd'}\n"
               "choice.time.thread_time = time.perf_counter\n"
               "print(choice.choose('waiting', lambda: calls, 'a').way)")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    assert len({process.communicate(timeout=120)[0] for process in started}) == 1
    assert len(list(tmp_path.rglob("waiting-*"))) == 1


def test_by_rule_where_nothing_is_kept(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choice.tempfile, "mkstemp", full)
    assert choose("sums", ways(short=10, long=20_000), "long") == Choice("long", "by rule: No space left on device")
    assert capsys.readouterr().err == f"kernel cache: {folder}: No space left on device; by rule long computes sums\n"
    monkeypatch.setattr(choice, "cache_directory", lambda: None)
    assert choose("sums", forbidden, "long") == Choice("long", "by rule: no folder keeps what is measured")
    assert kept("sums") is None


@pytest.mark.parametrize("content", ["", "{}", '{"way": "short", "milliseconds": {"long": 1}}', "[1]", "\ud800"])
def test_a_damaged_file_decides_nothing(folder, capsys, content):
    path = folder / f"sums-{choice._machine()}.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    path.chmod(0o600)
    assert choose("sums", forbidden, "long").way == "long" and kept("sums") is None
    assert f"{path}: a damaged file; by rule long computes sums" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders of a user are private on Windows")
def test_a_file_that_others_could_write_decides_nothing(folder, capsys):
    choose("sums", ways(short=10, long=20_000), "long")
    (path,) = folder.iterdir()
    path.chmod(0o666)
    assert choose("sums", forbidden, "long").way == "long"
    assert "a file that others could write; by rule long computes sums" in capsys.readouterr().err


def test_other_processors_and_libraries_measure_for_themselves(folder, monkeypatch):
    names = {choice._machine()}
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    names.add(choice._machine())
    monkeypatch.setattr(choice, "processor", lambda: "another one")
    names.add(choice._machine())
    assert len(names) == 3


def test_the_width_of_vectors_follows_from_features():
    features = "+avx2,+fma,+avx512f", "+avx2,+fma,-avx512f", "-avx2,+fma", ""
    assert list(map(compiler.vector_bits, features)) == [512, 256, 128, 128]


def test_numba_features_decide_about_the_product(tmp_path):
    """Without AVX the product is BLAS's, and `minitv info` says why."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "NUMBA_CPU_NAME": "generic",
                   "NUMBA_CACHE_DIR": str(tmp_path)}
    environment.pop("NUMBA_CPU_FEATURES", None)
    done = subprocess.run([sys.executable, "-m", "minitv", "info"], env=environment, capture_output=True, text=True, check=True)
    assert "BLAS (the kernel needs AVX2 and FMA, and a compiler)" in done.stdout
    native = compiler.NATIVE_BITS
    assert native == 128 or f"128-bit: NUMBA_CPU_FEATURES leaves out {native}-bit ones" in done.stdout


def test_what_is_kept_can_be_read(folder):
    choose("sums", ways(short=1000, long=20_000), "long")
    (path,) = folder.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["way"] == "short" and found["milliseconds"].keys() == {"short", "long"}
