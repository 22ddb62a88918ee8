"""Ctrl-C, SIGTERM and SIGHUP: a clean end from the first moment, a saved run once it takes steps."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minitv.cli import main
from minitv.signals import NUMBERS, Stop, Stopped, threads

ROOT = Path(__file__).resolve().parents[2]
# As a process, one number alone without --full: each of them is tried in this process.
each_number = pytest.mark.parametrize("number", [pytest.param(number, marks=[] if number == signal.SIGINT else pytest.mark.full)
                                                 for number in NUMBERS])
SMALL = ["--layers", "1", "--width", "16", "--context", "8", "--batch", "2", "--eval-every", "0", "--threads", "1"]
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX systems")


@posix
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_before_the_steps_and_asks_after(number, capfd):
    with pytest.raises(Stopped) as raised, Stop():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert raised.value.code == 128 + number
    with Stop() as stop:
        stop.begin()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.signal == number
    assert "stopping after this step" in capfd.readouterr().err


@posix
def test_a_second_ctrl_c_stops_at_once_and_what_was_swallowed_is_remembered():
    with pytest.raises(Stopped), Stop() as stop:
        stop.begin()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    with pytest.raises(Stopped), Stop() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            pass  # as a callback of another library does
        stop.begin()
    with pytest.raises(Stopped), Stop():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("made of it by a library") from None


def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def work():
        with Stop() as stop:
            stop.begin()
            seen.append(stop.signal)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None] and signal.getsignal(signal.SIGINT) == before


def test_nobody_waits_for_threads_of_what_was_ended():
    end = threading.Event()
    with pytest.raises(Stopped), threads(1) as pool:
        begun, waiting = pool.submit(end.wait), pool.submit(end.wait)
        raise Stopped(signal.SIGINT)
    assert waiting.cancelled() and not begun.done()
    end.set()
    with threads(1) as pool:
        late = pool.submit(time.sleep, 0.05)
    assert late.done()


def test_ctrl_c_while_the_program_is_loaded_ends_in_a_line():
    loading = ("import runpy, sys\n"
               "class Pressed:\n"
               "    def find_spec(self, name, *others):\n"
               "        if name == 'minitv.config':\n"
               "            raise KeyboardInterrupt\n"
               "sys.meta_path.insert(0, Pressed())\n"
               "runpy.run_module('minitv', run_name='__main__')\n")
    run = subprocess.run([sys.executable, "-c", loading], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                         text=True)
    assert (run.returncode, run.stdout, run.stderr.strip()) == (130, "", "minitv: stopped")


def start(cwd, *argv, program=("-m", "minitv")):
    return subprocess.Popen([sys.executable, "-u", *program, *argv], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


@posix
@each_number
def test_a_run_that_takes_steps_is_saved_and_says_how_it_goes_on(number, tmp_path):
    (tmp_path / "text.txt").write_text("hello world\n" * 60)
    run = start(tmp_path, "train", "--data", "text.txt", "--out", "run", "--steps", "1000000", *SMALL)
    before = ""
    for line in run.stdout:
        before += line
        if line.startswith("step"):
            break
    run.send_signal(number)
    after = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number, before + after
    assert "continue with: minitv train --resume run" in after
    assert (tmp_path / "run" / "last" / "state.json").exists()


@posix
@each_number
def test_a_run_that_waits_for_its_text_ends_in_a_line(number, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    run = start(tmp_path, "train", "--data", "pipe", "--out", "run", "--steps", "10", *SMALL)
    for line in run.stdout:
        if "pipe" in line:
            break
    run.send_signal(number)
    after = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + number and after.strip() == "minitv: stopped"
    assert not (tmp_path / "run").exists()


@posix
@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_run_whose_kernels_are_compiled_ends_at_once_and_saves_nothing(resumed, tmp_path, monkeypatch):
    """A thread that compiles takes many seconds, and does not listen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello world\n" * 60)
    argv = ["train", "--data", "text.txt", "--out", "run", "--steps", "2", *SMALL]
    if resumed:
        assert main(argv) == 0
        argv = ["train", "--resume", "run", "--steps", "4"]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("run/last/*")}
    compiling = ("import time\n"
                 "from minitv.trainer import Trainer\n"
                 "Trainer._micro_batch = lambda *inputs: (print('compiling'), time.sleep(100))\n"
                 "from minitv.__main__ import run\n"
                 "run()\n")
    run = start(tmp_path, *argv, program=("-c", compiling))
    for line in run.stdout:
        if line.startswith("compiling"):
            break
    begin = time.monotonic()
    run.send_signal(signal.SIGINT)
    after = run.communicate(timeout=60)[0]
    assert run.returncode == 130 and time.monotonic() - begin < 30
    assert after.splitlines()[-3:] == ["the first step was not done: nothing was saved", "", "minitv: stopped"]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("run/last/*")} == before
    assert (tmp_path / "run").exists() == resumed
