"""One writer in a folder: a second one is refused with a name, a dead one is no obstacle, on any file system."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minitv import lock
from minitv.errors import RunError, UserError
from minitv.lock import LOCK, held

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from minitv.lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    """The heart beats of a lock in hundredths of a second."""
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


def refused(folder):
    with pytest.raises(RunError) as error, held(folder):
        raise AssertionError("two writers")
    return str(error.value)


def test_the_second_writer_is_refused_and_told_who_the_first_is(tmp_path, holder):
    said = refused(tmp_path / "run")
    assert said.startswith(f"{tmp_path / 'run'} is in use: process {holder.pid} on {socket.gethostname()}, begun 20")
    assert holder.poll() is None and (tmp_path / "run" / LOCK).exists()
    with held(tmp_path / "another"):
        pass


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_killed_writer_is_no_obstacle(tmp_path, holder, number):
    holder.send_signal(getattr(signal, number, signal.SIGTERM))
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists(), "nobody could clean up"
    with held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_the_lock_ends_with_the_block_even_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        assert "process" in refused(tmp_path)  # in the same process too
        raise ZeroDivisionError
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_for_nothing_is_removed_and_no_other(tmp_path):
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "model").write_text("")
    assert (tmp_path / "a" / "b" / "model").exists()
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_writers_that_come_at_once_write_one_after_the_other(tmp_path):
    inside, most, done = [], [], []

    def work():
        while True:
            try:
                with held(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.002)
                    inside.pop()
            except RunError:
                continue
            done.append(1)
            return

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8 and max(most) == 1


def leave(folder, **holder):
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "2026-01-01"} | holder))


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", '{"pid": [[1]]}', '{"host": 3, "pid": "\\u001b[31m"}', "x" * 20_000])
def test_a_damaged_text_is_no_obstacle(tmp_path, quick, text):
    (tmp_path / LOCK).write_text(text, errors="surrogateescape")
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_another_machine_that_renews_its_lock_is_the_holder(tmp_path, quick, capsys):
    leave(tmp_path)
    ended = threading.Event()
    beats = threading.Thread(target=lock._beat, args=(tmp_path / LOCK, ended))
    beats.start()
    try:
        assert "is in use: process 7 on elsewhere" in refused(tmp_path)
    finally:
        ended.set()
        beats.join()
    assert "process 7 on elsewhere" in capsys.readouterr().err, "what is waited for is said"
    with held(tmp_path):  # its process has ended
        pass


@pytest.fixture
def without_locks(monkeypatch, quick):
    """A file system that has none."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_of_the_system_the_heart_beat_decides(tmp_path, without_locks):
    with held(tmp_path / "run"):
        assert f"process {os.getpid()}" in refused(tmp_path / "run")
    leave(tmp_path / "run", host=socket.gethostname())
    with held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_without_locks_of_the_system_one_of_two_that_sign_at_once_goes_on(tmp_path, without_locks, monkeypatch):
    sign = lock._sign

    def both(file):
        sign(file)
        leave(tmp_path)

    monkeypatch.setattr(lock, "_sign", both)
    assert "process 7 on elsewhere" in refused(tmp_path)


PIPE = pytest.param(lambda path: os.mkfifo(path),
                    marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has none"))


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), PIPE])
def test_what_is_no_folder(tmp_path, make):
    make(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "inside"):
        with pytest.raises(UserError, match="this is not a folder, and a folder is needed"), held(path):
            pass


def test_a_full_disk_holds_a_lock_without_a_text(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with held(tmp_path):
            assert "another process writes there" in refused(tmp_path)
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(RunError, match=r"\.lock could not be written: No space left"), held(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
