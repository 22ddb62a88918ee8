"""The folder of a run: one writer, readers at any time, and a sentence for every damage of what was written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitv import checkpoint, training, variants
from minitv.cli import main
from minitv.lock import LOCK, held
from minitv.log import LOG, read_log

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--data", "text.txt", "--context", "8", "--layers", "1", "--width", "16", "--batch", "2", "--steps", "4",
         "--eval-every", "2", "--eval-tokens", "64", "--threads", "1", "--log-every", "1"]
QUIET = [*SMALL, "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("".join(f"line {i}: the quick brown fox {i * i % 97}.\n" for i in range(100)))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", *QUIET, "--out", "run"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def said(capsys, *argv):
    """The exit code of a command and the last line of its messages."""
    capsys.readouterr()
    code = main(list(argv))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err.splitlines()[-1] if err else ""


WRITERS = [["train", "--resume", "run", "--steps", "6"], ["train", *QUIET, "--out", "run", "--overwrite"],
           ["train", *QUIET, "--out", "run"]]


@pytest.mark.parametrize("argv", WRITERS)
def test_a_second_writer_is_refused_and_changes_nothing(here, capsys, argv):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with held("run"):
        code, line = said(capsys, *argv)
        assert code == 1 and line.startswith("minitv: error: run is in use: process")
        assert main(["sample", "run", "--tokens", "3"]) == 0, "a reader needs no lock"
        assert read_log("run")[1][-1]["step"] == 4
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_second_new_run_takes_another_folder_while_the_first_has_written_nothing(here, capsys):
    with held("runs/transformer"):
        assert main(["train", *QUIET]) == 0
        assert checkpoint.exists("runs/transformer-2")
    assert not Path("runs/transformer").exists()


def test_a_run_is_resumed_from_what_its_last_writer_left(here, monkeypatch):
    load, seen = checkpoint.load_run, []

    def watched(*args):
        seen.append(Path("run", LOCK).exists())
        return load(*args)

    monkeypatch.setattr(training.checkpoint, "load_run", watched)
    assert main(["train", "--resume", "run", "--steps", "5"]) == 0
    assert seen[0] is True, "the checkpoint is read under the lock"
    assert not Path("run", LOCK).exists()


def test_a_comparison_holds_its_folder_and_each_run_its_own(here, capsys):
    argv = ["compare", "transformer", *SMALL, "--out", "both"]
    with held("both"):
        code, line = said(capsys, *argv)
        assert code == 1 and "both is in use: process" in line
    with held("both/transformer-0"):
        Path("both/transformer-0/note").write_text("the folder stays")
        assert said(capsys, *argv)[0] == 1


def test_a_mistake_leaves_no_folder(here, capsys):
    code, line = said(capsys, "train", *QUIET, "--out", "a/b", "--width", str(2**20))
    assert code == 2 and "numbers in the model would take" in line
    assert not Path("a").exists()


# -- damages

def sealed(change):
    """Change the state of the checkpoint and sign it, as a program of another version would have written it."""
    path = Path("run/last/state.json")
    state = json.loads(path.read_text())
    del state["sha256"]
    change(state)
    path.write_text(json.dumps({**state, "sha256": hashlib.sha256(json.dumps(state).encode()).hexdigest()}))


STATES = [
    (lambda s: s.update(step="3"), "state.json: step: '3' is not an integer from 0 up"),
    (lambda s: s.update(step=-1), "state.json: step: -1 is not an integer from 0 up"),
    (lambda s: s.update(step=1.5), "state.json: step: 1.5 is not an integer"),
    (lambda s: s.update(step=True), "state.json: step: True is not an integer"),
    (lambda s: s.update(best_loss="x"), "state.json: best_loss: 'x' is not a finite number or null"),
    (lambda s: s.update(elapsed_s=None), "state.json: elapsed_s: None is not a finite number from 0 up"),
    (lambda s: s.update(threads=0), "state.json: threads: 0 is not an integer from 1 up"),
    (lambda s: s.update(device=7), "state.json: device: 7 is not a text"),
    (lambda s: s.pop("step"), "state.json: step is missing"),
    (lambda s: s.update(config=[]), "state.json: config: [] is not a JSON object"),
    (lambda s: s.pop("config"), "state.json: config is missing"),
    (lambda s: s["config"].update(variant=None), "state.json: config: variant: None is not a text"),
    (lambda s: s["config"].update(variant="\x1b[31m" * 9999), "unknown variant '\\x1b[31m"),
    (lambda s: s["config"].update(task=[]), "config: task: [] is not a text"),
    (lambda s: s["config"].update(task="mystery"), "unknown task 'mystery'"),
    (lambda s: s["config"].update(model="big"), "config: model: 'big' is not a JSON object"),
    (lambda s: s["config"]["model"].update(colour=1), "model: unknown field 'colour'"),
    (lambda s: s["config"]["model"].update(layers="2"), "model.layers: '2' is not an integer"),
    (lambda s: s["config"]["model"].pop("layers"), "model: missing field 'layers'"),
    (lambda s: s["config"]["run"].update(steps=0), "run.steps: 0 is too small"),
    (lambda s: s["config"]["mixer"].update(heads=[]), "mixer.heads: [] is not an integer"),
]


@pytest.mark.parametrize("change, sentence", STATES)
@pytest.mark.parametrize("argv", [["train", "--resume", "run", "--steps", "6"], ["sample", "run", "--tokens", "2"],
                                  ["train", *QUIET, "--init-from", "run", "--out", "new"],
                                  ["compare", "transformer", *SMALL, "--out", "both"]])
def test_a_damaged_state_is_a_sentence(here, capsys, change, sentence, argv):
    sealed(change)
    if argv[0] == "compare":
        Path("both").mkdir()
        Path("run").rename("both/transformer-0")
    code, line = said(capsys, *argv)
    assert code == 2 and sentence in line, line
    assert len(line) < 230 + len(", ".join(variants.variants()))  # not the 80,000 characters of what is wrong


@pytest.mark.parametrize("key", ["tokenizer", "corpus_sha256"])
def test_a_state_without_the_part_of_its_task_cannot_be_resumed(here, capsys, key):
    sealed(lambda s: s.pop(key))
    code, line = said(capsys, "train", "--resume", "run", "--steps", "6")
    assert code == 2 and f"the checkpoint has no {key}" in line


@pytest.mark.parametrize("tokenizer", [None, 3, [], "a\x1b[31m\nred", {"kind": "char"}, {"kind": "char", "characters": [1]},
                                       {"kind": ["char"]}])
def test_a_damaged_tokenizer_is_a_sentence(here, capsys, tokenizer):
    sealed(lambda s: s.update(tokenizer=tokenizer))
    for argv in (["train", "--resume", "run", "--steps", "6"], ["sample", "run", "--tokens", "2"]):
        code, line = said(capsys, *argv)
        assert code == 2 and "tokenizer" in line and line.isprintable()


@pytest.mark.parametrize("damage, sentence", [
    (lambda log: log.write_bytes(b""), "the header line is missing"),
    (lambda log: log.write_bytes(log.read_bytes()[:20]), "the header line is missing"),
    (lambda log: log.write_text(log.read_text().replace('"loss": ', '"loss": "a", "was": ')), "loss: 'a' is not a finite"),
])
def test_a_damaged_log_is_a_sentence_for_readers_and_no_obstacle_for_a_sound_checkpoint(here, capsys, damage, sentence):
    damage(Path("run", LOG))
    code, line = said(capsys, "plot", "run")
    assert code == 2 and sentence in line
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--steps", "6"]) == 0
    assert sentence in capsys.readouterr().err
    assert [record["step"] for record in read_log("run")[1]][-1] == 6
    assert Path("run/log.damaged.jsonl").exists()
    assert main(["train", *QUIET, "--out", "run", "--overwrite"]) == 0
    assert not Path("run/log.damaged.jsonl").exists()


# -- from outside

def command(*argv):
    return [sys.executable, "-m", "minitv", *argv]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_reader_of_messages_may_leave_at_any_time(here):
    process = subprocess.Popen(command("train", *QUIET, "--out", "unheard"), env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    process.stdout.read(1)
    process.stdout.close()  # as head does
    assert process.wait() == 0
    assert read_log("unheard")[1][-1]["step"] == 4
    read, write = os.pipe()
    os.close(read)  # nobody listens from the beginning
    assert subprocess.run(command("plot", "nowhere"), env=ENVIRONMENT, stderr=write).returncode == 2
    os.close(write)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow UTF-8 alone")
def test_file_names_that_are_not_utf_8(here):
    name = b"caf\xe9.txt"
    os.rename(b"text.txt", name)
    small = [name if word == "text.txt" else word for word in SMALL]
    printed = subprocess.run(command("train", *small, "--print-config"), env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    Path("c.toml").write_bytes(printed.stdout)
    subprocess.run(command("train", "--config", "c.toml", "--out", "from-file"), env=ENVIRONMENT, check=True)
    subprocess.run(command("compare", "transformer", *small, "--out", "both"), env=ENVIRONMENT, check=True)
    assert read_log("from-file")[1][-1]["loss"] == read_log("run")[1][-1]["loss"]
