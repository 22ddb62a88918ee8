"""Checkpoints: bit-exact round trips, kills and failures at every step of a save, and a sentence for every damage."""

import builtins
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minitv import checkpoint
from minitv.checkpoint import MODEL, NAMES, OPTIMIZER, STATE, check_arrays, exists, load, load_run, read_run, remove, save
from minitv.errors import CheckpointError, UserError
from minitv.experiment import DEFAULT_TASK
from tests.conftest import examples

FILES = (MODEL, OPTIMIZER, STATE)


def parts(value, size=5):
    """A checkpoint in which every file tells which save it is of."""
    return dict(
        model={"w": np.full((size, 3), value, np.float32), "scalar": np.array(value, np.float64)},
        optimizer={"m": np.full(size, value, np.float32), "step": np.array(value, np.int64)},
        state={"config": {"variant": "transformer"}, "step": value, "best_loss": None, "vocabulary": "aé\ud800\n"},
    )


def value_of(found):
    """The number given to ``parts``, after comparing all of what was loaded with it."""
    value = found.state["step"]
    expected = parts(value, len(found.optimizer["m"]))
    assert found.state == expected["state"]
    for part in ("model", "optimizer"):
        same_arrays(expected[part], getattr(found, part))
    return value


def same_arrays(expected, loaded):
    assert expected.keys() == loaded.keys()
    for key, array in expected.items():
        other = loaded[key]
        assert (array.shape, array.dtype) == (other.shape, other.dtype), key
        assert array.tobytes() == other.tobytes(), key  # bits: NaN payloads and -0.0 too; tobytes is in C order


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# -- round trip

LAYOUTS = {
    "c": lambda array: array,
    "fortran": np.asfortranarray,
    "transposed": lambda array: array.T,
    "reversed": lambda array: array[(..., *[slice(None, None, -1)] * array.ndim)],
    "strided": lambda array: np.repeat(array, 2, -1)[..., ::2] if array.ndim else array,
    "broadcast": lambda array: np.broadcast_to(array, (2, *array.shape)),
}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ANY_ARRAY = st.builds(
    lambda layout, array: LAYOUTS[layout](array), st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([np.float32, np.float64, np.int64]).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)),
)
NAMED_ARRAYS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), ANY_ARRAY, max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters), inner, max_size=3),
    max_leaves=8,
)


@examples(150)
@given(model=NAMED_ARRAYS, optimizer=NAMED_ARRAYS, value=JSON)
def test_round_trip_is_bit_exact(tmp_path_factory, model, optimizer, value):
    run = tmp_path_factory.mktemp("run")
    before = {key: array.copy() for key, array in model.items()}
    save(run, "last", model=model, optimizer=optimizer, state={"value": value})
    found = load(run)
    same_arrays(model, found.model)
    same_arrays(before, found.model)
    same_arrays(optimizer, found.optimizer)
    assert found.state == {"value": value}
    for array in (*found.model.values(), *found.optimizer.values()):
        assert type(array) is np.ndarray and array.flags.c_contiguous and array.flags.writeable and array.flags.owndata


def test_special_bits_survive(tmp_path):
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32).view(np.float32)
    save(tmp_path, "last", model={"bits": bits}, optimizer={}, state={})
    assert load(tmp_path).model["bits"].view(np.uint32).tolist() == bits.view(np.uint32).tolist()


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    folder = save(tmp_path / "a" / "run", "last", **parts(3))
    assert folder == tmp_path / "a" / "run" / "last"
    assert listing(folder) == sorted(FILES) and listing(folder.parent) == ["last"]
    same_arrays(parts(3)["model"], safetensors.numpy.load_file(folder / MODEL))
    body = json.loads((folder / STATE).read_text())
    assert body["format_version"] == 1 and body["step"] == 3
    assert body["files"] == {file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
                             for file in (MODEL, OPTIMIZER)}


def test_last_and_best_are_independent(tmp_path):
    assert not exists(tmp_path) and not exists(tmp_path, "best")
    save(tmp_path, "best", **parts(1))
    assert exists(tmp_path, "best") and not exists(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no checkpoint 'last', it has 'best'"):
        load(tmp_path)
    save(tmp_path, "last", **parts(2))
    save(tmp_path, "last", **parts(3))
    assert (value_of(load(tmp_path)), value_of(load(tmp_path, "best"))) == (3, 1)
    assert listing(tmp_path) == ["best", "last"]


def test_a_path_may_be_the_checkpoint_itself(tmp_path):
    save(tmp_path, "last", **parts(1))
    save(tmp_path, "best", **parts(2))
    assert value_of(load(tmp_path / "best")) == 2
    assert value_of(load(str(tmp_path / "best"), "last")) == 2  # the path says more than the name
    (tmp_path / "best").rename(tmp_path / "copy")
    assert value_of(load(tmp_path / "copy")) == 2
    (tmp_path / "last").rename(tmp_path / ".last.old")  # as a kill between the two renames leaves it
    assert value_of(load(tmp_path)) == value_of(load(tmp_path / "last")) == 1 and exists(tmp_path)


OPTIONS = {"variant": "transformer", "model": {"layers": 2}, "mixer": {}, "run": {"steps": 9}}
RUN = {"config": {**OPTIONS, "task": "text", "data": {}}, "step": 7, "best_loss": 1.5, "elapsed_s": 2, "threads": 1,
       "device": "cuda:1", "task": {"anything": [1]}}


def test_read_run_does_not_read_the_arrays(tmp_path):
    folder = save(tmp_path, "last", model={"w": np.ones(2)}, optimizer={}, state=RUN)
    state = load_run(tmp_path).state
    assert load_run(tmp_path).model["w"].tolist() == [1, 1]
    for file in (MODEL, OPTIMIZER):
        (folder / file).unlink()
    assert read_run(tmp_path) == read_run(folder) == state
    assert (state.config.variant, state.config.model, state.step, state.elapsed_s) == ("transformer", {"layers": 2}, 7, 2.0)
    save(tmp_path, "best", model={}, optimizer={}, state={"step": 1})
    with pytest.raises(CheckpointError, match=r"best/state\.json: config, best_loss, elapsed_s, threads is missing"):
        read_run(tmp_path, "best")


def test_a_checkpoint_from_before_there_were_tasks_is_one_of_the_task_text(tmp_path):
    task = {"tokenizer": {"kind": "byte"}, "corpus_sha256": "12"}
    older = {key: value for key, value in RUN.items() if key not in ("task", "device")} | task
    older |= {"config": OPTIONS, "random": {"seed": 0}, "data_position": 7}
    save(tmp_path, "last", model={}, optimizer={}, state=older)
    state = read_run(tmp_path)
    assert (state.config.task or DEFAULT_TASK, state.device) == ("text", "cpu")
    assert {key: state.task[key] for key in task} == task
    assert (state.step, state.best_loss) == (7, 1.5)


@pytest.mark.parametrize("name", NAMES)
def test_removing_a_checkpoint_shows_a_reader_all_of_it_or_none(tmp_path, monkeypatch, name):
    rmtree, seen = shutil.rmtree, []

    def watched(path):
        seen.append(exists(tmp_path, name))
        rmtree(path)

    save(tmp_path, name, **parts(1))
    shutil.copytree(tmp_path / name, tmp_path / f".{name}.old")
    monkeypatch.setattr(shutil, "rmtree", watched)
    remove(tmp_path, name)
    assert listing(tmp_path) == [] and seen[-1] is False
    remove(tmp_path, name)


# -- what cannot be saved; nothing is written then

@pytest.mark.parametrize("change, sentence", [
    (dict(model={"w": np.zeros(2, np.float16)}),
     r"model\.safetensors: 'w' is an array of float16, allowed are arrays of float32, float64, int64"),
    (dict(model={"w": np.zeros(2, ">f4")}), r"model\.safetensors: 'w' is an array of >f4"),
    (dict(optimizer={"m": np.array([None])}), r"optimizer\.safetensors: 'm' is an array of object"),
    (dict(model={"w": [1.0]}), r"'w' is a list, allowed"),
    (dict(model={"w": np.float32(1)}), r"'w' is a float32, allowed are arrays"),
    (dict(model={"__metadata__": np.zeros(2)}), r"'__metadata__' is reserved by safetensors"),
    (dict(model={"\ud800": np.zeros(2)}), r"model\.safetensors cannot be written"),
    (dict(state={"loss": float("nan")}), r"state\.json: the state is not strict JSON: .*float"),
    (dict(state={"loss": float("inf")}), r"state\.json: the state is not strict JSON"),
    (dict(state={"seed": np.int64(1)}), r"state\.json: the state is not strict JSON: .*int64"),
    (dict(state={"d": {1: "a", "1": "b"}}), r"two keys of a dictionary are the same text"),
    (dict(state={"files": 1, "sha256": 2}), r"state\.json: the keys files, sha256 are reserved"),
])
def test_what_cannot_be_stored_is_refused(tmp_path, change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        save(tmp_path / "run", "last", **(parts(1) | change))
    assert listing(tmp_path) == []


@pytest.mark.parametrize("call", [lambda path: save(path, "newest", **parts(1)), lambda path: load(path, "newest"),
                                  lambda path: exists(path, "newest")])
def test_other_names_are_refused(tmp_path, call):
    with pytest.raises(CheckpointError, match="a checkpoint is called last or best, not 'newest'"):
        call(tmp_path)


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"last is in the way: it is not a minitv checkpoint \(it has no state"):
        save(tmp_path, "last", **parts(1))
    assert (tmp_path / "last" / "thesis.txt").read_text() == "mine" and listing(tmp_path) == ["last"]


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"last could not be saved: (File exists|Not a directory)"):
        save(tmp_path / "run", "last", **parts(1))
    with pytest.raises(CheckpointError, match=r"run is a file: a checkpoint is a folder"):
        load(tmp_path / "run")


# -- fault injection

class Killed(BaseException):
    """Ends a save as a kill does: no handler of the module catches it."""


class Faults:
    """Counts every call of ``save`` that changes the disk, and at the chosen one kills it or fails.

    ``when`` is "before", "after" or "half" (a write has got half of its bytes out, any other call has done nothing).
    After a kill, any further call is an error of the module: a killed process cleans nothing up.
    """

    CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "link", "symlink", "truncate")

    def __init__(self, monkeypatch, at=None, when="before", error=None):
        self.log, self.at, self.when, self.error, self.dead = [], at, when, error, False
        self.after_death = []
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(checkpoint, "open", self.open, raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def stop(self):
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.dead = True
        raise Killed

    def wrap(self, name, call, half=None):
        def wrapped(*args, **kwargs):
            if self.dead:
                self.after_death.append(name)
                raise Killed
            chosen = self.at == len(self.log)
            self.log.append(name)
            if chosen and self.when == "before":
                self.stop()
            if chosen and self.when == "half":
                if half:
                    half(*args)
                self.stop()
            try:
                return call(*args, **kwargs)
            finally:
                if chosen:
                    self.stop()
        return wrapped

    def open(self, path, mode):
        file = self.wrap("open", builtins.open)(path, mode, buffering=0)
        return File(file, self)


class File:
    def __init__(self, file, faults):
        self.file = file
        self.write = faults.wrap("write", file.write, half=lambda data: file.write(data[: len(data) // 2]))
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.file.close()


def count_calls(run, monkeypatch, prepare):
    prepare(run)
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        save(run, "last", **parts(2))
    return faults.log


def first_save(run):
    """Nothing saved before."""


def second_save(run):
    save(run, "last", **parts(1))


def after_kill_between_renames(run):
    save(run, "last", **parts(1))
    (run / "last").rename(run / ".last.old")
    (run / ".last.tmp-1").mkdir()
    (run / ".last.tmp-1" / MODEL).write_bytes(b"half")


def after_kill_before_cleaning(run):
    save(run, "last", **parts(0)).rename(run / "previous")
    save(run, "last", **parts(1))
    (run / "previous").rename(run / ".last.old")


SITUATIONS = [first_save, second_save, after_kill_between_renames, after_kill_before_cleaning]


def test_the_faults_reach_every_kind_of_call(tmp_path, monkeypatch):
    log = count_calls(tmp_path, monkeypatch, second_save)
    assert log.count("write") > log.count("open") == 3
    assert log.count("rename") == 2 and log.count("mkdir") == 2
    assert log.count("fsync") == 3 + (0 if os.name == "nt" else 3)
    assert log.count("unlink") == 3 and log.count("rmdir") == 1
    renames = [index for index, name in enumerate(log) if name == "rename"]
    assert max(index for index, name in enumerate(log) if name == "write") < renames[0]
    if os.name != "nt":
        assert [log[index + 1] for index in renames] == ["fsync", "fsync"] and log[renames[0] - 1] == "fsync"


@pytest.mark.parametrize("prepare", SITUATIONS)
def test_a_kill_at_every_call_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, prepare):
    total = len(count_calls(tmp_path / "count", monkeypatch, prepare))
    assert total >= 12
    seen = []
    for at in range(total):
        for when in ("before", "half", "after"):
            run = tmp_path / f"{at}-{when}"
            run.mkdir()
            prepare(run)
            with monkeypatch.context() as patch:
                faults = Faults(patch, at, when)
                with pytest.raises(Killed):
                    save(run, "last", **parts(2))
            assert faults.after_death == [], "a killed process cleans nothing up"
            if prepare is first_save and not exists(run):
                with pytest.raises(CheckpointError, match="has no checkpoint 'last'"):
                    load(run)
                seen.append(1)
            else:
                assert exists(run)
                seen.append(value_of(load(run)))
            assert seen[-1] in (1, 2)
            save(run, "last", **parts(3))
            assert value_of(load(run)) == 3
            assert listing(run) == ["last"]
    assert seen == sorted(seen) and set(seen) == {1, 2}, "once the new one is there it stays"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("prepare", SITUATIONS)
def test_a_failure_at_every_call_is_a_sentence_and_keeps_the_old_checkpoint(tmp_path, monkeypatch, prepare, error):
    log = count_calls(tmp_path / "count", monkeypatch, prepare)
    last_rename = max(index for index, name in enumerate(log) if name == "rename")
    for at in range(len(log)):
        run = tmp_path / str(at)
        run.mkdir()
        prepare(run)
        failed = False
        with monkeypatch.context() as patch:
            Faults(patch, at, "half", error)
            try:
                save(run, "last", **parts(2))
            except CheckpointError as problem:
                failed = True
                assert str(run / "last") + " could not be saved: " + os.strerror(error) in str(problem)
                assert problem.code == 1, "the machine said no"
                assert ("a checkpoint saved there earlier is intact" in str(problem)) == (
                    at <= last_rename and prepare is not first_save)
                assert ("the new checkpoint is in its place" in str(problem)) == (at > last_rename)
        if failed and at <= last_rename:
            assert exists(run) == (prepare is not first_save)
            if prepare is not first_save:
                assert value_of(load(run)) == 1
                assert (run / "last").is_dir(), "put back in its place"
        else:
            assert value_of(load(run)) == 2
        assert failed or at == 0 or at > last_rename or (log[at] == "rename" and error == errno.EACCES), log[at]
        if failed:
            assert not [name for name in listing(run) if ".tmp-" in name and not name.endswith("-1")]
        save(run, "last", **parts(3))
        assert value_of(load(run)) == 3 and listing(run) == ["last"]


def test_a_rename_that_is_blocked_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    save(tmp_path, "last", **parts(1))
    rename, calls, waits = os.rename, [], []

    def blocked(source, target):
        calls.append(target)
        if len(calls) in (1, 2, 4):
            raise PermissionError(errno.EACCES, "Access is denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", blocked)
    monkeypatch.setattr(time, "sleep", waits.append)
    save(tmp_path, "last", **parts(2))
    assert value_of(load(tmp_path)) == 2 and len(calls) == 5 and len(waits) == 3


def test_a_write_that_the_disk_loses_is_noticed(tmp_path, monkeypatch):
    save(tmp_path, "last", **parts(1))
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.ftruncate(descriptor, 10))
    with pytest.raises(CheckpointError, match=r"could not be saved: \S+ does not read back as written"):
        save(tmp_path, "last", **parts(2))
    assert value_of(load(tmp_path)) == 1


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    save(tmp_path, "last", **parts(1))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="last could not be saved: Permission denied"):
            save(tmp_path, "last", **parts(2))
        assert value_of(load(tmp_path)) == 1
    finally:
        tmp_path.chmod(0o700)


SAVE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.minitv.test_checkpoint import parts, save
value = 0
while True:
    value += 1
    save(sys.argv[1], "last", **parts(value, 2000))
    print(value, flush=True)
"""


@pytest.mark.full
def test_a_process_killed_at_any_time_while_others_read(tmp_path):
    rng = np.random.default_rng(0)
    newest = 0
    for _ in range(4):
        run = tmp_path / str(newest)
        with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, run, Path(__file__).parents[2]],
                              stdout=subprocess.PIPE, text=True) as process:
            timer = threading.Timer(60, process.kill)
            timer.start()
            assert process.stdout.readline() == "1\n"
            end, newest = time.monotonic() + rng.uniform(0.05, 0.4), 1
            while time.monotonic() < end:  # a reader finds a complete checkpoint, never an older one than before
                found = value_of(load(run))
                assert found >= newest
                newest = found
            process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            told = int(("1\n" + process.stdout.read()).split("\n")[-2])
            timer.cancel()
        found = value_of(load(run))
        assert max(newest, told) <= found <= told + 1
        save(run, "last", **parts(0))
        assert listing(run) == ["last"] and value_of(load(run)) == 0
        newest = found


def test_a_reader_follows_a_checkpoint_that_is_replaced_while_it_reads(tmp_path, monkeypatch):
    save(tmp_path, "last", **parts(1))
    read, saves = checkpoint._mapped, []

    def interrupted(path, sha256):
        if path.name == OPTIMIZER and len(saves) < 2:
            saves.append(path)
            save(tmp_path, "last", **parts(1 + len(saves)))
        return read(path, sha256)

    monkeypatch.setattr(checkpoint, "_mapped", interrupted)
    assert value_of(load(tmp_path)) == 3 and len(saves) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs a privilege on Windows")
def test_a_link_to_a_checkpoint_is_replaced_and_not_followed(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", "last", **parts(1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").symlink_to(elsewhere)
    save(tmp_path / "run", "last", **parts(2))
    assert value_of(load(tmp_path / "run")) == 2 and value_of(load(elsewhere)) == 1
    assert listing(tmp_path / "run") == ["last"]


# -- what cannot be loaded

@pytest.fixture
def folder(tmp_path):
    return save(tmp_path, "last", **parts(7))


def rewrite_state(folder, change):
    """Change the state and sign it again, as a program of another version would have written it."""
    body = json.loads((folder / STATE).read_text())
    del body["sha256"]
    change(body)
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    (folder / STATE).write_text(json.dumps(body))


def test_rewriting_the_state_signs_it_as_save_does(folder):
    rewrite_state(folder, lambda body: None)
    assert value_of(load(folder)) == 7


def fails(folder, sentence):
    for path in (folder, folder.parent):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            load(path)
        assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_missing_things(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such folder"):
        read_run(tmp_path / "nowhere", "best")
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(CheckpointError, match=r"has no checkpoint 'last': it is not the folder of a run"):
        load(tmp_path)
    assert not exists(tmp_path) and not exists(tmp_path / "nowhere") and not exists(tmp_path / "photo.jpg")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(folder, file):
    (folder / file).unlink()
    said = {STATE: "is not a minitv checkpoint: it has no"}.get(file, "is incomplete: it has no")
    fails(folder, rf"last {said} {file}")


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_read(folder, file):
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read|has no {file}"):
        load(folder.parent)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("make, kind", [(os.mkfifo, "pipe"), (lambda path: path.symlink_to("/dev/zero"), "device")])
def test_a_file_that_has_no_end_is_not_read(folder, file, make, kind):
    (folder / file).unlink()
    make(folder / file)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read: this is a {kind}, and a file"):
        load(folder)


@pytest.mark.parametrize("file", FILES)
def test_truncated_at_any_length(folder, file):
    data = (folder / file).read_bytes()
    said = "is truncated or not JSON: " if file == STATE else "is truncated or not a safetensors file: "
    for length in sorted({0, 1, 7, 8, 9, 20, len(data) // 2, len(data) - 9, len(data) - 1}):
        (folder / file).write_bytes(data[:length])
        fails(folder, rf"{file} {said}")


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_byte_is_noticed(folder, file):
    good = load(folder)
    data = (folder / file).read_bytes()
    sentences = []
    for position in range(len(data)):
        for flip in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[position] ^= flip
            (folder / file).write_bytes(damaged)
            try:
                found = load(folder)
            except CheckpointError as error:
                assert str(folder / file) in str(error)
                sentences.append(str(error))
            else:  # only what carries no meaning: white space between the values of the JSON
                assert file == STATE and data[position : position + 1] in b" \n" and found.state == good.state
    assert any("was changed or damaged after it was saved" in sentence for sentence in sentences)
    assert len(sentences) > 1.5 * len(data)


def test_appended_bytes_and_exchanged_files(folder):
    for file in FILES:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data + b"\0")
        fails(folder, rf"{file} is truncated or not")
        (folder / file).write_bytes(data)
    other = save(folder.parent / "other", "last", **parts(8))
    (folder / MODEL).write_bytes((other / MODEL).read_bytes())
    fails(folder, r"model\.safetensors was changed or damaged after it was saved, or is of another checkpoint: its sha")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_not_opened(folder, file, protocol, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / file).write_bytes(pickle.dumps(Bomb(), protocol))
    fails(folder, rf"{file} is truncated or not (JSON|a safetensors file)")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("text, sentence", [
    ("[1]", "is not of a minitv checkpoint: it has no format_version"),
    ("{}", "is not of a minitv checkpoint: it has no format_version"),
    ('{"format_version": "1"}', "is not of a minitv checkpoint"),
    ('{"format_version": true}', "is not of a minitv checkpoint"),
    ('{"format_version": 0}', "is not of a minitv checkpoint"),
    ('{"best_metric": null, "global_step": 500}', "is not of a minitv checkpoint"),
    ('{"format_version": 2}', r"has format 2, this minitv reads up to 1: update minitv"),
    ('{"format_version": 1}', r"is incomplete: missing files, sha256"),
    ('{"format_version": 1, "files": {}}', r"is incomplete: missing sha256"),
    ('{"format_version": 1, "files": {}, "sha256": 5}', r"was changed or damaged .*: its sha256 differs"),
    ('{"format_version": 1, "loss": NaN}', r"is truncated or not JSON: NaN is not JSON"),
    ('{"format_version": 1, "loss": -Infinity}', r"is truncated or not JSON: -Infinity is not JSON"),
    ('{"format_version": 1, "files": {}, "sha256": "", "loss": 1e999}', r"was changed or damaged"),
    ("[" * 200_000, r"is truncated or not JSON"),
    ("1" * 10_000, r"is truncated or not JSON|is not of a minitv"),
    ("\x00\xff", r"is truncated or not JSON"),
])
def test_foreign_and_newer_states(folder, text, sentence):
    (folder / STATE).write_bytes(text.encode("latin-1"))
    fails(folder, r"state\.json " + sentence)
    with pytest.raises(CheckpointError, match=r"state\.json " + sentence):
        read_run(folder)


@pytest.mark.parametrize("files", [None, [], {}, {MODEL: ""}])
def test_a_signed_state_without_hashes(folder, files):
    rewrite_state(folder, lambda body: body.update(files=files))
    fails(folder, r"state\.json is incomplete: files must hold the sha256 of model\.safetensors and optimizer")


@pytest.mark.parametrize("value", [None, 5, [], {"bytes": 3}])
def test_a_signed_state_with_foreign_hashes(folder, value):
    rewrite_state(folder, lambda body: body["files"].update({MODEL: value}))
    fails(folder, r"model\.safetensors was changed or damaged")


def test_an_edited_state_is_noticed(folder):
    text = (folder / STATE).read_text()
    (folder / STATE).write_text(text.replace('"step": 7', '"step": 8'))
    fails(folder, r"state\.json was changed or damaged after it was saved: its sha256 differs")


def test_foreign_safetensors_dtypes_get_a_sentence(folder):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (folder / MODEL).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    fails(folder, r"model\.safetensors (is truncated or not a safetensors file|was changed)")


# -- fitting a model

def test_check_arrays():
    expected = {"a": np.zeros((2, 3)), "b": np.zeros((), np.float32), "c": np.zeros(2)}
    check_arrays(expected, {key: array + 1 for key, array in reversed(expected.items())}, "the model")
    with pytest.raises(CheckpointError) as caught:
        check_arrays(expected, {"a": np.zeros((3, 2)), "b": np.zeros(()), "d": np.zeros(1)}, "the model")
    assert str(caught.value) == ("the model does not fit: missing: c; unexpected: d; wrong shape: a (3, 2) instead of "
                                 "(2, 3); wrong dtype: b float64 instead of float32")
    with pytest.raises(CheckpointError, match=r"the optimizer does not fit: missing: 0, 1, .*, 7 and 12 more$"):
        check_arrays({str(index): np.zeros(1) for index in range(20)}, {}, "the optimizer")
    check_arrays({}, {}, "nothing")
