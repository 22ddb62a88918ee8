"""Whole runs: resumed, interrupted, killed, diverging and refused."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from autograd import GraphError, NonFiniteError, check_mode, cross_entropy, distance, no_grad, use
from autograd.cpu import bf16, gemm
from autograd.metric import TOLERANCE
from autograd.random import Random
from autograd.routes import Kernel
from autograd.state import products
from minitv import checkpoint, training
from minitv.cli import main
from minitv.config import settings
from minitv.data import Batches
from minitv.experiment import WEIGHTS, Experiment, from_checkpoint
from minitv.log import LOG, read_log
from minitv.optim import cosine
from minitv.options import ModelOptions, TrainOptions
from minitv.schema import RunConfig
from minitv.task import NOTHING, Batch
from minitv.tasks.text import TextOptions
from minitv.trainer import Trainer
from tests.minitv.models import Ids, configure, mean_loss

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--context", "8", "--width", "16", "--layers", "1", "--heads", "2", "--batch", "5", "--sample-tokens", "20"]
RUN = [*TINY, "--steps", "20", "--eval-every", "10", "--log-every", "1", "--warmup", "3"]
DROPPING = [*RUN, "--dropout", "0.2", "--bias", "--no-tied", "--seed", "7"]
bfloat16 = pytest.mark.skipif(bf16.missing() is not None, reason=str(bf16.missing()))
posix = pytest.mark.skipif(os.name == "nt", reason="signals between processes")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 5 kB whose next character mostly follows from the one before."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["the", "fox", "jumps", "over", "lazy", "dög", "quick"]
    path.write_text(" ".join(rng.choice(words, 1000)) + "\n", encoding="utf-8")
    return str(path)


def start(*argv, cwd, script=""):
    """`minitv train` as a process; ``script`` runs before it, with ``step(call)`` to do something in a step."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    before = f"""
import os, signal, sys, time
from minitv import checkpoint
from minitv.trainer import Trainer
taken = Trainer.step
def in_step(number, call):
    def step(self, batch, step):
        if step == number:
            call()
        return taken(self, batch, step)
    Trainer.step = step
def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
{script}
from minitv.cli import main
sys.exit(main())
"""
    command = [sys.executable, "-c", before, "train", *argv]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8")


def train(*argv, cwd, script=""):
    process = start(*argv, cwd=cwd, script=script)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def done(*argv, cwd, **kwargs):
    code, out, err = train(*argv, cwd=cwd, **kwargs)
    assert (code, out) == (0, ""), err
    return err


def arrays(run, name="last"):
    """All weights and moments of a checkpoint, and its step."""
    saved = checkpoint.load(run, name)
    return {**{f"model.{k}": v for k, v in saved.model.items()}, **saved.optimizer}, saved.state["step"]


def assert_same_bits(one, two):
    for name in checkpoint.NAMES:
        (first, step), (second, other) = arrays(one, name), arrays(two, name)
        assert step == other and first.keys() == second.keys()
        assert all(first[key].tobytes() == second[key].tobytes() for key in first)
    assert lines(one) == lines(two)


def lines(run):
    """The log, without what depends on the clock and the folder."""
    header, records = read_log(run)
    header["config"]["run"].pop("out")
    header.pop("started")
    measured = ("tokens_per_s", "elapsed_s", "peak_mb")
    return [header, *({k: v for k, v in record.items() if k not in measured} for record in records)]


@pytest.fixture
def quickly(tmp_path, monkeypatch, capsys):
    """`minitv train` in this process and a fresh folder: exit code, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = main(["train", *argv])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


def sentence(result, expected=2):
    """The sentence of a refusal (exit code 2) or of a failure (1): the last line of what was printed."""
    code, err = result
    assert code == expected and "Traceback" not in err, err
    last = err.rstrip("\n").split("\n")[-1]
    assert last.startswith("minitv: error: ") and err.count("minitv: error") == 1, err
    return last.removeprefix("minitv: error: ")


@pytest.fixture(scope="module", params=[
    pytest.param(("char", 2), id="char"), pytest.param(("byte", 1), id="byte", marks=pytest.mark.full)])
def whole(request, text, tmp_path_factory):
    """A run of 20 steps that nothing interrupted: its folder, its options, what it printed."""
    tokenizer, threads = request.param
    folder = tmp_path_factory.mktemp("whole")
    options = ["--data", text, *DROPPING, "--tokenizer", tokenizer, "--threads", str(threads)]
    err = done(*options, "--out", "run", cwd=folder)
    return folder / "run", options, err


# -- bit for bit


@pytest.mark.full
@posix
def test_killed_and_resumed_is_the_same_run(whole, tmp_path):
    run, options, _ = whole
    code, _, err = train(*options, "--out", "run", cwd=tmp_path, script="in_step(13, lambda: send(signal.SIGKILL))")
    assert code == -signal.SIGKILL
    assert read_log(tmp_path / "run")[1][-1]["step"] == 13 and arrays(tmp_path / "run")[1] == 10
    err = done("--resume", "run", cwd=tmp_path)
    assert "step 11/20" in err and "step 10/20" not in err
    assert_same_bits(tmp_path / "run", run)


@posix
@pytest.mark.full
def test_killed_between_the_two_checkpoints(whole, tmp_path):
    """Both are good and new when the run is over, whatever the moment."""
    run, options, _ = whole
    script = """
saves, save = [], checkpoint.save
def once(*args, **contents):
    saves.append(save(*args, **contents))
    if len(saves) == 3:  # two of step 10, and one of step 20
        send(signal.SIGKILL)
checkpoint.save = once
"""
    code, *_ = train(*options, "--out", "run", cwd=tmp_path, script=script)
    assert code == -signal.SIGKILL
    if arrays(tmp_path / "run")[1] < 20:
        done("--resume", "run", cwd=tmp_path)
    assert_same_bits(tmp_path / "run", run)


def test_same_seed_and_threads_same_bits(whole, tmp_path, quickly):
    run, options, _ = whole
    code, err = quickly(*options, "--out", "again")
    assert code == 0, err
    assert_same_bits(tmp_path / "again", run)


def test_stopped_and_resumed_without_evaluation_is_the_same_run(whole, tmp_path, quickly, monkeypatch):
    """Evaluations and samples leave no trace in the weights; a stop at any step is as good as one at an evaluation."""
    run, options, _ = whole
    step = Trainer.step

    def stopping(self, batch, number):
        if number == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    assert quickly(*options, "--eval-every", "0", "--out", "run")[0] == 143
    assert arrays("run")[1] == 7
    code, err = quickly("--resume", "run")
    assert code == 0 and "held-out" not in err
    expected, got = arrays(run)[0], arrays("run")[0]
    assert all(expected[key].tobytes() == got[key].tobytes() for key in expected)
    assert not checkpoint.exists("run", "best")
    trained = [line for line in lines(run)[1:] if line["step"]]  # without the evaluation before training
    assert [{k: v for k, v in line.items() if k not in ("val_loss", "val_bpc")} for line in trained] == lines("run")[1:]


def as_before_there_were_tasks(folder):
    """Write a checkpoint as earlier versions did: without a task, with the text's options among those of the run."""
    saved = checkpoint.load(folder)
    config = saved.state["config"]
    text = {name: value for name, value in config.pop("data").items() if not settings(TextOptions)[name].newer}
    known = settings(ModelOptions) | settings(TrainOptions)
    for part in ("model", "run"):
        config[part] = {name: value for name, value in config[part].items() if not known[name].newer}
    config["run"] |= text | {"tf32": False}
    del config["task"]
    state = {key: value for key, value in saved.state.items() if key not in ("vocab", "best_step")}
    checkpoint.save(folder, "last", model=saved.model, optimizer=saved.optimizer, state=state)


@posix
@pytest.mark.parametrize("variant", ["transformer", "rwkv", "hyena"])
def test_a_checkpoint_of_an_earlier_version_is_resumed_and_writes(text, quickly, monkeypatch, capsys, variant):
    options = [variant, "--data", text, "--context", "8", "--width", "16", "--layers", "1", "--batch", "5", "--steps", "8",
               "--eval-every", "4", "--sample-tokens", "0", "--dropout", "0.2", "--tokenizer", "byte"]
    assert quickly(*options, "--out", "whole")[0] == 0
    step = Trainer.step

    def stopping(self, batch, number):
        if number == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    assert quickly(*options, "--out", "run")[0] == 143
    monkeypatch.setattr(Trainer, "step", step)
    assert main(["sample", "run", "--tokens", "30"]) == 0
    written = capsys.readouterr().out
    as_before_there_were_tasks("run")
    assert set(checkpoint.load("run").state["config"]) == {"variant", "model", "mixer", "run"}
    assert main(["sample", "run", "--tokens", "30"]) == 0
    assert capsys.readouterr().out == written
    code, err = quickly("--resume", "run")
    assert code == 0, err
    (expected, _), (got, steps) = arrays("whole"), arrays("run")
    assert steps == 8 and all(expected[key].tobytes() == got[key].tobytes() for key in expected)


@pytest.mark.parametrize("tf32, matmul", [(True, "tf32"), (False, "float32")])
def test_what_tf32_said_in_earlier_versions(tf32, matmul):
    config = configure("transformer", device="cuda").to_json()
    del config["run"]["matmul"]
    config["run"]["tf32"] = tf32
    assert from_checkpoint(RunConfig(**config)).run.matmul == matmul


def test_another_seed_is_another_run(text, quickly):
    for seed in ("1", "2"):
        assert quickly("--data", text, *TINY, "--steps", "1", "--seed", seed, "--eval-every", "0", "--out", seed)[0] == 0
    assert lines("1")[1]["loss"] != lines("2")[1]["loss"]


# -- what a run writes and prints


def test_log_schema(whole, text):
    run, options, _ = whole
    objects = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    header, records = objects[0], objects[1:]
    assert header.keys() >= {"config", "variant", "task", "metric", "baselines", "parameters", "corpus", "ngram_bpc",
                             "versions", "tokens_per_char", "started"}
    assert header["metric"] == {"name": "bits per character", "key": "bpc", "rising": False}
    assert list(header["baselines"].values()) == header["ngram_bpc"]
    assert header["config"]["model"]["width"] == 16 and header["config"]["run"]["seed"] == 7
    assert header["config"]["mixer"] == {"heads": 2}
    data = Path(text).read_bytes()
    assert header["corpus"]["size_bytes"] == len(data)
    import hashlib

    assert header["corpus"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert header["parameters"] == sum(v.size for v in checkpoint.load(run).model.values())
    assert len(header["ngram_bpc"]) == 6 and all(0 < bits < 10 for bits in header["ngram_bpc"])
    assert header["versions"].keys() >= {"minitv", "python", "numpy", "numba"}
    tokens = header["corpus"]["training_tokens"] + header["corpus"]["held_out_tokens"]
    assert tokens == (len(data) if "byte" in options else len(data.decode()))

    keys = {"step", "loss", "bpc", "tokens_per_s", "elapsed_s", "lr", "grad_norm"}
    assert [record["step"] for record in records] == list(range(21))
    assert records[0].keys() == {"step", "val_loss", "val_bpc"}
    assert records[0]["val_loss"] == pytest.approx(math.log(checkpoint.load(run).state["vocab"]), abs=0.3)  # guessing
    for record in records[1:]:
        assert record.keys() == keys | ({"val_loss", "val_bpc", "peak_mb"} if record["step"] in (10, 20) else set())
        assert all(math.isfinite(value) and value >= 0 for value in record.values())
        seen = data[:header["corpus"]["training_tokens"]].decode(errors="ignore") if "byte" in options else None
        per_char = header["corpus"]["training_tokens"] / len(seen) if seen else 1
        assert record["bpc"] == pytest.approx(record["loss"] / math.log(2) * per_char, rel=1e-12)
        if "val_loss" in record:
            assert record["val_bpc"] / record["val_loss"] == pytest.approx(records[0]["val_bpc"] / records[0]["val_loss"])
    assert records[1]["lr"] == pytest.approx(3e-3 / 4) and max(r["lr"] for r in records[1:]) == 3e-3
    elapsed = [record["elapsed_s"] for record in records[1:]]
    assert elapsed == sorted(elapsed)


def test_best_is_the_lowest_held_out_loss(whole):
    run, *_ = whole
    losses = {r["step"]: r["val_loss"] for r in read_log(run)[1] if "val_loss" in r and r["step"]}
    best = checkpoint.load(run, "best").state
    assert best["step"] == min(losses, key=losses.get) and best["best_loss"] == min(losses.values())


def test_away_from_a_terminal_there_are_plain_lines(whole):
    _, _, err = whole
    assert "\r" not in err and "\x1b" not in err and err.endswith("\n")
    assert re.search(r"^text      .*text\.txt: [45]\.\dk characters, sha256 [0-9a-f]{16}$", err, re.M)
    assert re.search(r"^n-grams   bits per character by order  0: \d\.\d{3}  1: ", err, re.M)
    assert re.search(r"^model     transformer, \d+(\.\d)?k parameters, \d worker threads?, folder run$", err, re.M)
    assert re.search(r"^step  1/20  loss \d\.\d{4}  \d\.\d{3} bits/char  \S+ tokens/s", err, re.M)
    assert re.search(r"^step 20/20 .* done$", err, re.M)
    assert len(re.findall(r"^step [12]0: held-out loss \d\.\d{4} nats, \d\.\d{3} bits per character, ", err, re.M)) == 2
    assert "minitv sample run" in err


def test_it_learns(text, quickly):
    options = ["--context", "16", "--width", "32", "--layers", "1", "--batch", "16", "--lr", "0.01", "--warmup", "5"]
    code, err = quickly("--data", text, *options, "--steps", "80", "--eval-every", "40", "--out", "run", "--check")
    assert code == 0, err
    header, records = read_log("run")
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[2] < losses[1] < losses[0] and losses[0] == pytest.approx(records[1]["loss"], abs=0.1)
    assert losses[2] / math.log(2) < header["ngram_bpc"][0] - 0.5
    assert "better than n-gram order " in err
    # a stop text, a prompt: the run can be read back
    assert main(["sample", "run", "--prompt", "the ", "--tokens", "20"]) == 0


# -- stopped


def wait_for_steps(process, run, number=3):
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if (run / LOG).exists() and (run / LOG).read_bytes().count(b"\n") > number:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no steps: {process.communicate()[1]}")


@posix
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_tells_how_to_go_on(text, tmp_path, quickly, number, code):
    options = ["--data", text, *TINY, "--steps", "1000000", "--eval-every", "0", "--log-every", "1", "--out", "run"]
    process = start(*options, cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "") and "Traceback" not in err
    (step,) = re.findall(r"^stopped after step (\d+); continue with: minitv train --resume run$", err, re.M)
    assert "stopping after this step and saving" in err
    assert arrays(tmp_path / "run")[1] == int(step)
    assert read_log(tmp_path / "run")[1][-1]["step"] == int(step)
    result, err = quickly("--resume", "run", "--steps", str(int(step) + 2))
    assert result == 0 and read_log("run")[1][-1]["step"] == int(step) + 2


@posix
def test_two_interrupts_stop_at_once(text, tmp_path):
    script = "in_step(3, lambda: (send(signal.SIGINT, signal.SIGINT), time.sleep(100)))"
    before = time.monotonic()
    code, _, err = train("--data", text, *RUN, "--out", "run", cwd=tmp_path, script=script)
    assert code == 130 and time.monotonic() - before < 90
    assert not checkpoint.exists(tmp_path / "run") and "continue with" not in err


@posix
def test_an_interrupt_in_the_last_step_is_a_finished_run(text, tmp_path, quickly, monkeypatch):
    step = Trainer.step

    def interrupted(self, batch, number):
        if number == 19:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "step", interrupted)
    code, err = quickly("--data", text, *RUN, "--out", "run")
    assert code == 0 and "minitv sample run" in err and arrays("run")[1] == 20
    assert signal.getsignal(signal.SIGINT) is before


# -- numbers that are not finite


def test_divergence_names_the_operator_and_keeps_the_good_checkpoint(text, quickly, monkeypatch):
    assert quickly("--data", text, *RUN, "--out", "run")[0] == 0
    good = arrays("run")
    step = Trainer.step

    def corrupted(self, batch, number):
        if number == 22:
            self.model.blocks[0].ffn.up.weight.data[3, 5] = math.nan
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", corrupted)
    said = sentence(quickly("--resume", "run", "--steps", "30"), 1)
    assert said.startswith("step 23 made a number that is not finite, first at ") and "linear" in said
    assert f"The last good checkpoint is run{os.sep}last." in said and "--lr" in said
    kept = arrays("run")
    assert kept[1] == 20 and all(np.array_equal(kept[0][key], good[0][key]) for key in good[0])
    assert read_log("run")[1][-1]["step"] == 22


@pytest.mark.parametrize("extra", [[], ["--check"]])
def test_a_huge_learning_rate(text, quickly, extra):
    said = sentence(quickly("--data", text, *RUN, "--lr", "1e30", "--out", "run", "--eval-every", "0", *extra), 1)
    assert "is not finite, first at " in said and "No checkpoint was saved before it" in said
    assert not checkpoint.exists("run")


def test_weights_that_give_no_held_out_loss_are_not_saved(text, quickly):
    options = ["--lr", "1e38", "--eval-every", "1", "--warmup", "0"]
    said = sentence(quickly("--data", text, *RUN, *options, "--out", "run"), 1)
    assert said.startswith("step 1 made a number that is not finite, first at ")
    assert not checkpoint.exists("run") and not checkpoint.exists("run", "best")


def test_check_changes_nothing(whole, quickly):
    run, options, _ = whole
    assert quickly(*options, "--check", "--out", "checked")[0] == 0
    one, two = arrays(run)[0], arrays("checked")[0]
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


# -- refusals


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A folder with the finished run ``run``; copied by those who change it."""
    folder = tmp_path_factory.mktemp("finished")
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", "--data", text, *RUN, "--out", "run"]) == 0
    finally:
        os.chdir(here)
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_is_not_overwritten(copied, text, quickly):
    before = files(copied)
    said = sentence(quickly("--data", text, *RUN, "--out", "run"))
    assert said == ("run holds a run already: continue it with --resume run, replace it with --overwrite, "
                    "or choose another --out")
    assert files(copied) == before


@pytest.mark.parametrize("mistake", [["--data", "missing.txt"], ["--context", "100000"], ["--heads", "3"]])
def test_overwrite_with_a_mistake_costs_no_run(copied, text, quickly, mistake):
    before = files(copied)
    sentence(quickly("--data", text, *RUN, "--out", "run", "--overwrite", *mistake))
    assert files(copied) == before


def test_overwrite(copied, text, quickly):
    (copied / "notes.txt").write_text("mine")
    code, err = quickly("--data", text, *RUN, "--out", "run", "--overwrite", "--steps", "2", "--eval-every", "0")
    assert code == 0, err
    assert [record["step"] for record in read_log("run")[1]] == [1, 2] and arrays("run")[1] == 2
    assert not checkpoint.exists("run", "best")
    assert (copied / "notes.txt").read_text() == "mine"


def test_out_must_be_a_folder_and_free(tmp_path, text, quickly):
    Path("file").write_text("")
    assert sentence(quickly("--data", text, *RUN, "--out", "file")) == "--out file: this is a file, a folder is needed"
    Path("mine/last").mkdir(parents=True)
    Path("mine/last/thesis.txt").write_text("years")
    said = sentence(quickly("--data", text, *RUN, "--out", "mine", "--overwrite"))
    assert said == f"--out mine: mine{os.sep}last is in the way, it is not a minitv checkpoint"
    assert Path("mine/last/thesis.txt").read_text() == "years"


def corrupt(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, argv, said", [
    (None, ["--steps", "20"], "--steps: this run has done 20 steps; to continue it, ask for more than that"),
    (None, ["--steps", "30", "--data", "other.txt"],
     "other.txt is not the text this run began with; give that one with --data"),
    (None, ["--resume", "nowhere"], "nowhere: there is no such folder"),
    (None, ["--steps", "30", "--width", "32"], "--resume run: --width is 16 in this run and cannot become 32"),
    (lambda run: corrupt(run / "last" / "model.safetensors", -1), ["--steps", "30"], "was changed or damaged"),
    (lambda run: corrupt(run / "last" / "optimizer.safetensors", -1), ["--steps", "30"], "was changed or damaged"),
    (lambda run: corrupt(run / "last" / "state.json", 40), ["--steps", "30"], "state.json"),
    (lambda run: os.truncate(run / "last" / "model.safetensors", 100), ["--steps", "30"], "is truncated"),
    (lambda run: (run / "last" / "optimizer.safetensors").unlink(), ["--steps", "30"], "is incomplete"),
])
def test_resume_refusals(copied, quickly, damage, argv, said):
    Path("other.txt").write_text("another text " * 100)
    if damage:
        damage(copied)
    before = files(copied)
    assert said in sentence(quickly("--resume", "run", *argv))
    assert files(copied) == before


def test_resume_with_more_steps_and_a_moved_text(copied, text, quickly):
    shutil.copy(text, "moved.txt")
    code, err = quickly("--resume", "run", "--steps", "25", "--data", "moved.txt", "--threads", "1")
    assert code == 0, err
    assert [record["step"] for record in read_log("run")[1]] == list(range(26))
    elapsed = [record["elapsed_s"] for record in read_log("run")[1][1:]]
    assert elapsed == sorted(elapsed)


def test_resume_from_the_best_weights(copied, quickly):
    best, last = (checkpoint.load(copied, name).state["step"] for name in ("best", "last"))
    code, err = quickly("--resume", "run/best", "--steps", "25")
    assert code == 0 and [record["step"] for record in read_log("run")[1]] == list(range(26)), err
    assert f"step {best + 1:>{len('25')}}/25" in err and best <= last < 25


@pytest.mark.full
def test_a_run_says_what_is_odd_about_its_length(text, quickly, monkeypatch):
    options = ["--data", text, *TINY, "--eval-every", "0", "--warmup", "5"]
    code, err = quickly(*options, "--steps", "4", "--out", "run")
    assert code == 0 and "rises for 5 steps (--warmup) and this run ends after 4: it never reaches --lr 0.003" in err
    code, err = quickly("--resume", "run", "--steps", "9")
    assert code == 0 and "never reaches" not in err and "planned for" in err
    code, err = quickly("--resume", "run", "--steps", "13")  # which begins at the lowest rate
    rates = [record["lr"] for record in read_log("run")[1]]
    assert code == 0 and ("planned for 9 steps and is now for 13: its learning rate goes from "
                          f"{cosine(8, lr=3e-3, min_lr=3e-4, warmup=5, steps=9):.3g} to "
                          f"{cosine(9, lr=3e-3, min_lr=3e-4, warmup=5, steps=13):.3g} at step 10") in err
    assert rates[-1] < rates[0] and "will take about" not in err
    monkeypatch.setattr(training, "LONG_S", 0)
    assert "this run will take about " in quickly(*options, "--steps", "9", "--out", "long")[1]
    assert "will take about" not in quickly(*options, "--steps", "9", "--minutes", "9", "--out", "short")[1]


def test_a_run_is_saved_as_often_as_is_asked_for(text, quickly, monkeypatch):
    save, saved = checkpoint.save, []

    def noting(directory, name, **contents):
        saved.append((name, contents["state"]["step"]))
        return save(directory, name, **contents)

    monkeypatch.setattr(checkpoint, "save", noting)
    options = ["--data", text, *TINY, "--warmup", "0", "--lr", "1e-9"]
    assert quickly(*options, "--steps", "5", "--eval-every", "0", "--save-every", "2", "--out", "run")[0] == 0
    assert saved == [("last", 2), ("last", 4), ("last", 5)]


def test_resume_with_other_threads_is_the_same_run(whole, tmp_path, quickly):
    run, *_ = whole
    threads = checkpoint.load(run).state["threads"]
    for other in (threads, threads + 1):
        shutil.copytree(run, f"run{other}")
        assert quickly("--resume", f"run{other}", "--steps", "22", "--threads", str(other))[0] == 0
    one, two = arrays(f"run{threads}")[0], arrays(f"run{threads + 1}")[0]
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_resume_without_a_log_starts_a_new_one(copied, quickly):
    (copied / LOG).unlink()
    assert quickly("--resume", "run", "--steps", "22")[0] == 0
    header, records = read_log("run")
    assert header["variant"] == "transformer" and [record["step"] for record in records] == [21, 22]


@pytest.mark.parametrize("content, said", [
    (b"", "--data: t.txt holds no text"),
    (b"abc", "the training part (the first 90% of 3 tokens) has 2 tokens, and --context 8 needs at least 9"),
    (b"ab" * 20, "the held-out part (the last 10% of 40 tokens) has 4 tokens, and --context 8 needs at least 9"),
    (b"abc \xff\xfe" * 100, "--data: t.txt is not UTF-8 text: byte offset 4 holds ff"),
    (None, "--data t.txt: there is no such file or folder"),
])
def test_texts_that_cannot_be_used(quickly, tmp_path, content, said):
    if content is not None:
        Path("t.txt").write_bytes(content)
    assert sentence(quickly("--data", "t.txt", *RUN, "--out", "run")).startswith(said)
    assert not Path("run").exists()


def test_a_text_of_one_character(quickly):
    Path("t.txt").write_text("a" * 300)
    code, err = quickly("--data", "t.txt", *TINY, "--steps", "2", "--out", "run")
    assert code == 0, err
    assert [record["step"] for record in lines("run")[1:]] == [0, 1, 2]
    assert lines("run")[1]["val_loss"] == lines("run")[2]["loss"] == 0


# -- the Trainer


@pytest.fixture
def exact(monkeypatch):
    """Models of experiments in float64."""
    def build(self, vocab, copies=1):
        return self.variant.build(self.model, self.mixer, vocab, Random(self.run.seed).split(WEIGHTS), np.float64)

    monkeypatch.setattr(Experiment, "build", build)


SMALL = dict(context=6, layers=2, width=8, bias=True, heads=2, batch=7, steps=10, warmup=0, seed=3)


def trainer(micro=None, **options):
    """A trainer of a small model; ``micro`` is the number of sequences in a micro-batch."""
    return Trainer(configure("transformer", **{**SMALL, "micro_batch": micro, **options}), Ids(9))


def batch(seed=0, sequences=7):
    ids = np.random.default_rng(seed).integers(0, 9, (sequences, 7))
    return Batch(ids[:, :-1], ids[:, 1:])


def gradient(made, data):
    loss = made.step(data, 0)
    return loss, made.optimizer.gradient.copy()


@pytest.mark.parametrize("micro, threads", [(1, 1), (2, 1), (3, 1), (None, 2), (4, 3), (1, 7), (2, 3), (1, 50)])
def test_parts_of_a_batch_add_up_to_the_batch(exact, micro, threads):
    whole = trainer(threads=1, micro=7)
    parts = trainer(threads=threads, micro=micro)
    assert len(whole._slices(batch())) == 1 and len(parts._slices(batch())) > 1
    try:
        (loss, expected), (other, got) = gradient(whole, batch()), gradient(parts, batch())
        model = configure("transformer", **SMALL).build(9)
        value = mean_loss(model, *batch())
        value.backward()
        norm = math.sqrt(sum((p.grad.numpy() ** 2).sum() for p in model.parameters()))
        assert loss == pytest.approx(value.item(), rel=1e-13) and other == pytest.approx(loss, rel=1e-13)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-14)
        assert whole.grad_norm == pytest.approx(norm, rel=1e-12) and parts.grad_norm == pytest.approx(norm, rel=1e-12)
        sums = whole.evaluate(batch(1))
        assert sums == pytest.approx(parts.evaluate(batch(1)), rel=1e-9) and sums[1] == 42
        assert sums[0] / 42 == pytest.approx(mean_loss(whole.model, *batch(1)).item(), rel=1e-12)
        assert sums[2] == (whole.model(batch(1).inputs).numpy().argmax(-1) == batch(1).labels).sum()
        assert whole.parameters == sum(p.size for p in model.parameters())
    finally:
        whole.close()
        parts.close()


def test_answers_count_alike_in_small_and_in_large_parts_of_a_batch(exact):
    """Half of the labels ask for nothing, and parts with 0 to all answers give the loss and the gradient of the whole."""
    inputs, labels = batch()
    labels = np.where(np.random.default_rng(1).random(labels.shape) < 0.5, labels, NOTHING)
    labels[2] = NOTHING
    asked = labels != NOTHING
    model = configure("transformer", **SMALL).build(9)
    value = cross_entropy(model(inputs, at=np.flatnonzero(asked)), labels[asked])
    value.backward()
    norm = math.sqrt(sum((p.grad.numpy() ** 2).sum() for p in model.parameters()))
    found = []
    for micro, threads in ((7, 1), (1, 1), (2, 1), (3, 1), (None, 4), (1, 4)):
        made = trainer(threads=threads, micro=micro)
        try:
            sums = made.evaluate(Batch(inputs, labels))
            loss, gradients = gradient(made, Batch(inputs, labels))
            found.append((gradients, made.optimizer.param.copy()))
        finally:
            made.close()
        assert loss == pytest.approx(value.item(), rel=1e-13) and made.grad_norm == pytest.approx(norm, rel=1e-12)
        assert sums[1] == asked.sum() and sums[0] / sums[1] == pytest.approx(value.item(), rel=1e-13)
    for gradients, weights in found[1:]:
        np.testing.assert_allclose(gradients, found[0][0], rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(weights, found[0][1], rtol=1e-7, atol=1e-10)


def test_a_batch_without_answers_changes_no_weights(exact):
    made, data = trainer(threads=2, micro=1, weight_decay=0.0), batch()
    before = made.optimizer.param.copy()
    try:
        assert made.step(Batch(data.inputs, np.full_like(data.labels, NOTHING)), 0) == 0 and made.grad_norm == 0
        assert np.array_equal(made.optimizer.param, before)
    finally:
        made.close()


@posix
def test_a_trainer_works_after_a_fork(exact):
    """The child has none of the worker threads: it starts its own, and takes the step that the parent takes."""
    made = trainer(threads=2, micro=1)
    try:
        made.step(batch(), 0)
        ours, theirs = multiprocessing.get_context("fork").Pipe()

        def child():
            theirs.send(made.step(batch(1), 1))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        arrived = ours.poll(60)
        process.kill()
        process.join()
        assert arrived, "the step of the child does not end"
        assert ours.recv() == made.step(batch(1), 1)
    finally:
        made.close()


@pytest.mark.parametrize("micro", [None, 1, 2, 10**6])
@pytest.mark.parametrize("sequences", [1, 2, 7, 13])
def test_slices_cover_the_batch_once(micro, sequences):
    """Threads change nothing; without --micro-batch there are two at least."""
    found = []
    for threads in (1, 2, 3, 7):
        made = trainer(threads=threads, micro=micro)
        made.close()
        found.append(made._slices(batch(sequences=sequences)))
    assert found.count(found[0]) == len(found)
    assert [i for part in found[0] for i in range(part.start, part.stop)] == list(range(sequences))
    if micro is None:
        assert len(found[0]) == min(2, sequences)
    else:
        assert all(part.stop - part.start <= micro for part in found[0])


def test_switches_hold_in_the_worker_threads(exact, monkeypatch):
    """No kernel runs under use(kernel="none"), no gradient is made under no_grad, and check mode finds what is not finite."""
    made = trainer(threads=2, micro=1)
    ran = []
    run = Kernel.run
    monkeypatch.setattr(Kernel, "run", lambda self, *call: ran.append(self.op.name) or run(self, *call))
    try:
        made.step(batch(), 0)
        assert len(ran) > 10
        ran.clear()
        with use(kernel="none"):
            made.step(batch(), 1)
        assert ran == []
        with no_grad(), pytest.raises(GraphError, match="does not depend on anything that requires a gradient"):
            made.step(batch(), 2)
        weight = made.model.blocks[1].mixer.out.weight
        weight.assign_(np.full(weight.shape, math.inf))
        with check_mode(), pytest.raises(NonFiniteError, match="the output of linear"):
            with np.errstate(invalid="ignore"):
                made.step(batch(), 3)
    finally:
        made.close()


@bfloat16
def test_products_in_bfloat16():
    """Steps round the factors of products, in every worker thread, the same each time; evaluation is as without."""
    made = {name: trainer(threads=2, micro=1, matmul=kind)
            for name, kind in (("one", "bf16"), ("again", "bf16"), ("plain", "float32"))}
    try:
        scores = {name: one.evaluate(batch()) for name, one in made.items()}
        losses = {name: [one.step(batch(step), step) for step in range(3)] for name, one in made.items()}
        assert np.array_equal(scores["one"], scores["plain"])
        assert losses["one"] == losses["again"] != losses["plain"]
        assert losses["one"] == pytest.approx(losses["plain"], abs=0.01)
        weights = {name: one.optimizer.param for name, one in made.items()}
        assert weights["one"].tobytes() == weights["again"].tobytes() and weights["one"].dtype == np.float32
        assert not np.array_equal(weights["one"], weights["plain"])
        with products("bf16"):  # what a caller has switched on is not what a run was asked for
            assert made["plain"].step(batch(3), 3) == pytest.approx(made["one"].step(batch(3), 3), abs=0.01)
    finally:
        for one in made.values():
            one.close()


@bfloat16
def test_a_run_in_bfloat16_is_resumed_with_the_same_numbers(text, quickly, monkeypatch):
    options, step = ["--data", text, *TINY, "--steps", "4", "--eval-every", "0"], Trainer.step

    def stopping(self, batch, number):
        if number == 1 and self.run.out == "run":
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    assert quickly(*options, "--matmul", "bf16", "--out", "run")[0] == 143
    assert quickly("--resume", "run")[0] == 0
    for kind in ("bf16", "float32"):
        assert quickly(*options, "--matmul", kind, "--out", kind)[0] == 0
    ends = {run: arrays(run)[0] for run in ("run", "bf16", "float32")}
    assert all(ends["run"][key].tobytes() == ends["bf16"][key].tobytes() for key in ends["run"])
    assert any(ends["run"][key].tobytes() != ends["float32"][key].tobytes() for key in ends["run"])


def test_bfloat16_is_refused_where_the_processor_has_none(text, quickly, monkeypatch, tmp_path):
    monkeypatch.setattr(bf16, "missing", lambda: "this processor has no AVX512-BF16")
    code, err = quickly("--data", text, *TINY, "--matmul", "bf16", "--out", "none")
    assert code == 2 and "--matmul bf16: this processor has no AVX512-BF16, allowed: float32" in err
    assert not Path("none").exists()
    code, err = quickly("--data", text, *TINY, "--matmul", "fp8")
    assert code == 2 and "--matmul" in err and "float32, tf32, bf16" in err


def test_a_loss_that_is_not_finite_changes_nothing_and_is_forgotten(exact):
    made, fresh = trainer(threads=2), trainer(threads=2)
    try:
        assert made.find_nonfinite(batch(), 0) is None
        weight = made.model.blocks[1].mixer.out.weight
        before = weight.numpy().copy()
        weight.assign_(np.where(np.arange(weight.size).reshape(weight.shape) == 0, math.inf, before))
        assert not math.isfinite(made.step(batch(), 0)) and math.isnan(made.grad_norm)
        assert made.find_nonfinite(batch(), 0).startswith("the output of linear")
        weight.assign_(before)
        assert made.step(batch(), 0) == fresh.step(batch(), 0)
        assert np.array_equal(made.optimizer.param, fresh.optimizer.param)
    finally:
        made.close()
        fresh.close()


@pytest.mark.full
def test_200_steps_with_kernels_follow_those_in_plain_numpy(monkeypatch):
    """The same losses within the tolerance of float32, dropout included, for sizes at which every kernel is used."""
    def losses():
        options = dict(context=33, layers=2, width=48, dropout=0.1, bias=True, heads=3, batch=9, steps=200, warmup=20, lr=3e-3)
        made = Trainer(configure("transformer", **options, seed=3, threads=2), Ids(65))
        ids = np.random.default_rng(0).integers(0, 65, 40).repeat(40)[:1500]
        batches = Batches(ids, batch=9, context=33, seed=5)
        try:
            return np.array([made.step(Batch(*batches.batch(step)), step) for step in range(200)])
        finally:
            made.close()

    monkeypatch.setattr(gemm, "suits", lambda M, K, N: True)
    fast = losses()
    monkeypatch.setattr(gemm, "suits", lambda M, K, N: False)
    with use(kernel="none"):  # in the worker threads too
        plain = losses()
    assert plain[-1] < 0.5 * plain[0]
    assert max(distance(*pair) for pair in zip(fast, plain, strict=True)) < TOLERANCE[np.dtype(np.float32)]
