"""The second process that compiles kernels: who compiles which, what it is told, and that nothing waits for it in vain."""

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest

from autograd.cpu import companion, disk, rehearsal
from autograd.cpu.companion import NO, YES, Companion
from autograd.cpu.compile import Kernel, cpu_kernel
from autograd.ops.gelu import cpu as gelu
from autograd.ops.relu import cpu as relu

ROOT = Path(__file__).resolve().parents[2]
F8 = numba.types.Array(numba.types.float64, 1, "C")


def step(*numbers):
    """What is rehearsed here: two kernels, and a mistake that follows from what they do not compute."""
    x, y = np.ones(64), np.full(64, np.nan)
    gelu.gelu_row(x, y, np.empty(64))
    assert (y == 0).all()
    for number in numbers:
        relu.relu_row(x, y)
        assert y[0] == number


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """A place where no kernel was compiled, on two cores."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(companion, "cores", lambda: 2)
    monkeypatch.setattr(companion, "watching", None)
    return tmp_path


@pytest.fixture
def asked(cold, monkeypatch):
    """A companion whose process is played by the test."""
    monkeypatch.setattr(Companion, "_serve", lambda self: None)
    return Companion()


def test_each_kernel_is_for_who_asks_first(asked):
    asked.missing("ours")
    assert asked._answer("ours") == NO and asked._answer("theirs") == YES


@pytest.mark.parametrize("end", [lambda asked: asked._answer("the next one"), lambda asked: asked._answer(None),
                                 lambda asked: (asked.close(), asked._answer(None))], ids=["goes on", "dies", "is closed"])
def test_a_kernel_that_the_companion_has_begun_is_waited_for(asked, end):
    assert asked._answer("theirs") == YES
    waiting = threading.Thread(target=asked.missing, args=("theirs",), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    end(asked)
    waiting.join(5)
    assert not waiting.is_alive()


def test_after_its_end_nothing_is_its_own(asked):
    asked.close()
    assert asked._answer("theirs") == NO
    asked.missing("theirs")


def test_what_cannot_be_pickled_is_not_told_and_large_arrays_arrive_as_zeros(asked):
    asked.rehearse(step, lambda: 0)
    assert asked._step is None
    asked.rehearse(step, np.ones(2**18), np.ones(3), threading.Lock())
    function, (large, small, lock) = pickle.loads(asked._step)
    assert function is step and large.shape == (2**18,) and not large.any() and small.all() and lock.acquire()


def test_it_starts_at_once_only_where_nothing_was_compiled(asked, cold, monkeypatch):
    assert asked.cold and asked._started
    (cold / "minitv" / "version").mkdir(parents=True)
    (cold / "minitv" / "version" / "kernel.nbc").touch()
    later = Companion()
    assert not later.cold and not later._started
    later.missing("kernel")
    assert later._started
    monkeypatch.setattr(companion, "cores", lambda: 1)
    alone = Companion()
    alone.missing("kernel")
    assert not alone._started


def test_a_rehearsal_notes_each_kernel_once_and_ends_where_it_goes_wrong(monkeypatch):
    for module, name in ((gelu, "gelu_row"), (relu, "relu_row")):  # other tests may have compiled those that are there
        monkeypatch.setattr(module, name, cpu_kernel(getattr(module, name).py_func))
    called = rehearsal.rehearse(pickle.dumps((step, (0, 0, 1, 0))))
    assert called == [(gelu.gelu_row, (F8, F8, F8)), (relu.relu_row, (F8, F8))]
    assert Kernel.compile is numba.core.registry.CPUDispatcher.compile


def files(folder):
    return {path.name.partition("-")[0] for path in folder.rglob("*.nbc")}


def test_the_process_compiles_what_a_step_calls(cold, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    one = Companion()
    one.rehearse(step, 0)
    one.missing("nothing that it asks for")
    end = time.monotonic() + 60
    while (one._process is None or one._process.poll() is None) and time.monotonic() < end:
        time.sleep(0.02)
    assert one._process.returncode == 0
    assert files(cold) == {"autograd.ops.gelu.cpu.gelu_row", "autograd.ops.relu.cpu.relu_row"}


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="processes of POSIX systems")
@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_it_ends_with_the_process_that_started_it(end, cold):
    program = ("import os, sys, time\nfrom autograd.cpu import companion\ncompanion.cores = lambda: 2\n"
               "one = companion.Companion()\none.rehearse(time.sleep, 100)\n"
               f"while one._process is None: time.sleep(0.01)\ntime.sleep(2)\nprint(one._process.pid, flush=True)\n{end}\n")
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, timeout=60)
    number, deadline = int(run.stdout), time.monotonic() + 10
    while Path(f"/proc/{number}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.full
def test_a_process_without_a_folder_ends_at_once(cold, monkeypatch):
    (cold / "minitv").touch()  # no folder can be made there
    one = Companion()
    one.rehearse(step)
    end = time.monotonic() + 60
    while (one._process is None or one._process.poll() is None) and time.monotonic() < end:
        time.sleep(0.02)
    assert one._process.returncode == 0 and (cold / "minitv").is_file()


def test_a_kernel_that_is_not_on_disk_is_told(cold, monkeypatch):
    seen = []
    monkeypatch.setattr(companion, "watching", type("", (), {"missing": lambda self, name: seen.append(name)})())
    kept = disk.Kept(gelu.gelu_row.py_func, cold)
    target = numba.core.registry.cpu_target.target_context
    assert kept.load_overload((F8, F8, F8), target) is None
    assert seen == [kept.path((F8, F8, F8), target.codegen()).name]
