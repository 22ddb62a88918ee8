"""minitv compare: the same protocol for every variant, nothing repeated, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from minitv import compare
from minitv.cli import main
from minitv.errors import UserError
from minitv.log import read_log
from minitv.tasks.text import Text

SMALL = ["--context", "8", "--width", "16", "--layers", "1", "--batch", "4", "--steps", "6", "--eval-every", "3",
         "--log-every", "1"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return TEXT


def write_text(folder):
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over"], 600)
    (folder / "text.txt").write_text(" ".join(words) + "\n")


TEXT = ["--data", "text.txt"]


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """A folder with a text and one run of six steps."""
    folder = tmp_path_factory.mktemp("six")
    write_text(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["compare", "transformer", *TEXT, *SMALL]) == 0
    return folder


@pytest.fixture
def finished(six_steps, tmp_path, monkeypatch):
    """A copy of it, in which a test may work."""
    shutil.copytree(six_steps, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_one_process(monkeypatch):
    """Runs are trained in this process, which need not start Python for each of them."""
    class Here:
        def __init__(self, command):
            assert command[:3] == [sys.executable, "-m", "minitv"]
            self.code = main(command[3:])

        def wait(self):
            return self.code

    monkeypatch.setattr(compare.subprocess, "Popen", Here)


def files(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def said(capfd, *argv):
    code = main(["compare", *argv])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.full
def test_two_seeds_of_a_variant(text, capfd):
    code, out, err = said(capfd, "transformer", *text, *SMALL, "--heads", "2", "--seeds", "2", "--seed", "5")
    assert code == 0, err
    found = json.loads(Path("runs/compare/compare.json").read_text())
    assert [(run["variant"], run["seed"], run["steps"]) for run in found["runs"]] == [("transformer", s, 6) for s in (5, 6)]
    bits = [run["bits_per_char"] for run in found["runs"]]
    (row,) = found["variants"]
    assert row["bits_per_char"] == pytest.approx(statistics.mean(bits))
    assert row["spread"] == pytest.approx(statistics.stdev(bits))
    assert row["state_bytes"] == 2 * 8 * 16 * 4 and row["tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0
    assert f"{row['bits_per_char']:.3f} ± {row['spread']:.3f}" in out and "n-gram order 3" in out
    config = [read_log(f"runs/compare/transformer-{seed}")[0]["config"] for seed in (5, 6)]
    assert config[0]["mixer"] == {"heads": 2} and config[0]["model"] == config[1]["model"]

    logs = [Path(f"runs/compare/transformer-{seed}/log.jsonl").read_text() for seed in (5, 6)]
    code, again, err = said(capfd, "transformer", *text, *SMALL, "--heads", "2", "--seeds", "2", "--seed", "5")
    assert code == 0 and "step" not in again + err  # nothing was trained again
    assert logs == [Path(f"runs/compare/transformer-{seed}/log.jsonl").read_text() for seed in (5, 6)]
    code, _, err = said(capfd, "transformer", *text, *SMALL, "--heads", "4", "--seed", "5")
    assert code == 2 and "transformer-5 holds a run in which heads is 2, not 4" in err
    code, _, err = said(capfd, "transformer", *text, *SMALL, "--heads", "4", "--seed", "5", "--overwrite")
    assert code == 0 and read_log("runs/compare/transformer-5")[0]["config"]["mixer"] == {"heads": 4}


@pytest.mark.parametrize(("argv", "sentence"), [
    (["--data", "other.txt"], "holds a run on other data (its corpus_sha256 differs)"),
    (["--steps", "9"], "holds a run in which steps is 6, not 9"),
    (["--steps", "3"], "holds a run in which steps is 6, not 3"),
    (["--eval-tokens", "50"], "holds a run in which eval_tokens is 100000, not 50"),
    (["--eval-every", "2"], "holds a run in which eval_every is 3, not 2"),
    (["--lr", "0.01"], "holds a run in which lr is 0.003, not 0.01"),
    (["--task", "copy"], "holds a run in which the task is text, not copy"),
])
def test_a_finished_run_of_another_experiment_is_refused(finished, capfd, argv, sentence):
    """All that the results depend on: the table would call it what it is not."""
    Path("other.txt").write_text(Path("text.txt").read_text()[::-1])
    before = files("runs")
    options = [*SMALL, *([] if "--task" in argv else TEXT), *argv]
    code, out, err = said(capfd, "transformer", *options)
    assert (code, out) == (2, "") and f"runs/compare/transformer-0 {sentence}" in err and "--overwrite" in err
    assert files("runs") == before


def test_what_no_result_depends_on_may_differ(finished, capfd):
    Path("moved.txt").write_bytes(Path("text.txt").read_bytes())
    code, out, err = said(capfd, "transformer", *SMALL, "--data", "moved.txt", "--log-every", "5", "--threads", "1")
    assert code == 0 and out and "step" not in err


@pytest.mark.full
def test_a_sweep_shows_every_run_and_the_best_a_variant(text, in_one_process, capfd):
    code, out, err = said(capfd, "transformer", "rwkv", *text, *SMALL, "--lr", "1e-3,3e-1", "--warmup", "0", "--seeds", "2")
    assert code == 0, err
    found = json.loads(Path("runs/compare/compare.json").read_text())
    runs = found["runs"]
    assert sorted((run["variant"], run["swept"]["lr"], run["seed"]) for run in runs) == \
        [(variant, lr, seed) for variant in ("rwkv", "transformer") for lr in (0.001, 0.3) for seed in (0, 1)]
    assert [row["variant"] for row in sorted(found["variants"], key=lambda row: row["bits_per_char"])] == \
        [row["variant"] for row in found["variants"]]
    for row in found["variants"]:
        tried = {lr: statistics.mean(run["val_loss"] for run in runs
                                     if (run["variant"], run["swept"]["lr"]) == (row["variant"], lr)) for lr in (0.001, 0.3)}
        assert row["swept"] == {"lr": min(tried, key=tried.get)} and row["seeds"] == 2
        lrs = {run["lr"] for run in runs if run["variant"] == row["variant"] and run["swept"] == row["swept"]}
        assert lrs == {row["lr"]} == {row["swept"]["lr"]}
    table, every = out.split("\nall runs\n")
    assert "lr" in table.splitlines()[0].split() and len(every.strip().splitlines()) == 9
    assert read_log("runs/compare/rwkv-lr-0.3-1")[0]["config"]["run"]["lr"] == 0.3


def test_a_run_that_ended_by_itself_is_finished(text, in_one_process, capfd):
    argv = ["rwkv", *text, *SMALL, "--steps", "30", "--eval-every", "1", "--lr", "1", "--warmup", "0", "--patience", "2"]
    code, _, err = said(capfd, *argv)
    assert code == 0 and "(--patience)" in err, err
    log = Path("runs/compare/rwkv-0/log.jsonl").read_text()
    code, _, err = said(capfd, *argv)
    assert code == 0 and "step" not in err and Path("runs/compare/rwkv-0/log.jsonl").read_text() == log


def test_a_sweep_of_what_one_variant_has(text, in_one_process, capfd):
    code, out, err = said(capfd, "transformer", "rwkv", *text, *SMALL, "--heads", "2,4")
    assert code == 0, err
    table, every = out.split("\nall runs\n")
    for lines, column in ((table.splitlines(), "parameters"), (every.strip().splitlines(), "seed")):
        header = re.split(" {2,}", lines[0])
        assert header[:3] == ["variant", "heads", column]
        cells = {tuple(line.split()[:2]) for line in lines if line.startswith(("transformer", "rwkv"))}
        assert all(cell in "24" for name, cell in cells if name == "transformer")
        (rwkv,) = (line for line in lines if line.startswith("rwkv"))
        assert len(re.split(" {2,}", rwkv)) == len(header) - 1  # an empty cell


@pytest.mark.full
def test_a_sweep_of_what_is_on_or_off_and_of_the_tokenizer(text, in_one_process, capfd):
    argv = ["rwkv", *text, *SMALL, "--token-shift", "--no-token-shift", "--tokenizer", "char,byte"]
    code, _, err = said(capfd, *argv)
    assert code == 0, err
    found = json.loads(Path("runs/compare/compare.json").read_text())
    assert {(run["swept"]["token_shift"], run["swept"]["tokenizer"]) for run in found["runs"]} == \
        {(shift, kind) for shift in (True, False) for kind in ("char", "byte")}
    assert read_log("runs/compare/rwkv-token-shift-on-tokenizer-byte-0")[0]["config"]["model"]["token_shift"] is True
    code, _, err = said(capfd, *argv)
    assert code == 0 and "step" not in err, err  # each run is compared with its own data


@pytest.mark.full
def test_a_task_and_its_options(tmp_path, monkeypatch, in_one_process, capfd):
    monkeypatch.chdir(tmp_path)
    argv = ["--task", "copy", "--symbols", "5", "--context", "16", "--width", "16", "--layers", "1", "--batch", "4",
            "--steps", "4", "--eval-every", "2"]
    code, out, err = said(capfd, "transformer", "aft-simple", *argv)
    assert code == 0, err
    found = json.loads(Path("runs/compare/compare.json").read_text())
    assert found["metric"] == {"name": "accuracy", "key": "accuracy", "rising": True}
    accuracy = [row["accuracy"] for row in found["variants"]]
    assert accuracy == sorted(accuracy, reverse=True) and "accuracy" in out.splitlines()[0]
    assert {read_log(f"runs/compare/{name}-0")[0]["config"]["data"]["symbols"] for name in ("transformer", "aft-simple")} == {5}
    code, _, err = said(capfd, "transformer", "aft-simple", *argv, "--symbols", "6")
    assert code == 2 and "holds a run in which symbols is 5, not 6" in err


@pytest.mark.full
def test_a_run_that_fails_does_not_lose_the_others(text, capfd, monkeypatch):
    called = []

    def start(command):
        called.append(command)
        return real([sys.executable, "-c", "raise SystemExit(1)"] if len(called) == 1 else command)

    real = subprocess.Popen
    monkeypatch.setattr(compare.subprocess, "Popen", start)
    code, _, err = said(capfd, "transformer", *text, *SMALL, "--seeds", "3")
    assert code == 1 and "transformer, seed 0: failed with exit code 1; the others go on" in err
    assert [run["seed"] for run in json.loads(Path("runs/compare/compare.json").read_text())["runs"]] == [1, 2]
    assert said(capfd, "transformer", *text, *SMALL, "--seeds", "3")[0] == 0
    assert len(called) == 4  # only the one that was missing


def test_a_run_that_is_stopped_stops_the_comparison(text, capfd, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(compare.subprocess, "Popen", lambda command: real([sys.executable, "-c", "raise SystemExit(130)"]))
    code, out, err = said(capfd, "transformer", *text, *SMALL, "--seeds", "3")
    assert code == 130 and not out and err.count("run ") == 1 and "the same command goes on from here" in err


def once_it_listens(call):
    """In a thread: ``call()`` as soon as signals are handed on, for an earlier one would end the tests."""
    before = signal.getsignal(signal.SIGTERM)

    def wait():
        while signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.01)
        time.sleep(0.1)
        call()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_waits_until_the_run_has_saved(number, code):
    """A terminal sends Ctrl-C to both processes; SIGTERM and SIGHUP come to one and are handed on."""
    saves = ("import signal, time\n"
             "def stop(number, frame):\n    time.sleep(1)\n    raise SystemExit(128 + number)\n"
             "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n    signal.signal(number, stop)\n"
             "print(flush=True)\ntime.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", saves], stdout=subprocess.PIPE)
    child.stdout.readline()

    def send():
        if number == signal.SIGINT:
            child.send_signal(number)
        os.kill(os.getpid(), number)

    once_it_listens(send)
    assert compare._wait(child) == code
    child.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
def test_a_signal_while_a_run_ends_stops_the_comparison():
    """Ctrl-C that reaches compare alone, or the last step of a run, is not forgotten."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)

    def end():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        child.stdin.close()

    once_it_listens(end)
    assert compare._wait(child) == 130


@pytest.mark.parametrize("argv, sentence", [
    (["transformr"], "unknown variant 'transformr'"),
    (["transformer", "transformer"], "transformer is given twice"),
    (["transformer", "--seeds", "0"], "--seeds: 0 is too small, allowed: an integer from 1 up to 1000"),
    (["transformer", "--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
    (["transformer", "--preset", "large"], "unknown preset 'large'"),
    (["rwkv", "--heads", "4"], "unknown option --heads; it is an option of aft-conv, "),  # and of others
    (["rwkv", "transformer", "--heads", "3"], "transformer: --heads: 3 heads do not divide the width 128"),
    (["transformer", "rwkv", "--positions", "rope"], "rwkv: --positions rope: rwkv cannot turn queries and keys"),
    (["rwkv", "--bias", "on,off"], "--bias takes no value: write --bias or --no-bias, or both to try both"),
])
def test_mistakes_are_sentences(argv, sentence, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capfd, *argv)
    assert code == 2 and sentence in err and "Traceback" not in err and not Path("runs").exists()


def test_the_task_is_what_the_first_variant_was_made_for():
    assert compare.Plan(["encoder-decoder", "one-wide-ffn"]).task.name == "pairs"
    assert compare.Plan(["conformer"]).task.name == "speech" and compare.Plan().task.name == "text"
    with pytest.raises(UserError, match="--task pairs: transformer reads tokens, and this task has pairs"):
        compare.Plan(["encoder-decoder", "transformer"])


def test_help_names_every_option_once(capfd):
    code, out, _ = said(capfd, "--help")
    assert code == 0 and out.count("  --seeds N") == 1 and out.count("  --steps N") == 1 and "--resume DIR" not in out


def test_the_table_puts_the_best_first():
    results = [{"variant": name, "seed": seed, "swept": {}, "bits_per_char": bits, "val_loss": bits, "parameters": 10,
                "lr": 1e-3, "tokens_per_s": 1e4, "peak_mb": None, "state_bytes": 100, "decode_tokens_per_s": 5.0}
               for name, seed, bits in (("b", 0, 3.0), ("b", 1, 2.0), ("a", 0, 2.75), ("c", 0, None))]
    rows = compare.summary(results, Text)
    assert [row["variant"] for row in rows] == ["b", "a", "c"]
    table = compare.text(rows, {"n-gram order 0": 4.0, "n-gram order 1": 3.5}, Text).splitlines()
    assert table[1].split() == ["b", "10", "2.500", "±", "0.707", "10.0k", "–", "0.1", "5"]
    assert table[-1].split() == ["n-gram", "order", "1", "3.500"]


@pytest.mark.full
def test_curves_are_drawn(text, in_one_process, capfd):
    pytest.importorskip("matplotlib")
    code, _, err = said(capfd, "transformer", *text, *SMALL, "--seeds", "2")
    assert code == 0 and Path("runs/compare/compare.png").read_bytes().startswith(b"\x89PNG") and "curves:" in err


def test_the_command_is_listed():
    assert "compare" in subprocess.run([sys.executable, "-m", "minitv", "--help"], capture_output=True, text=True).stdout
