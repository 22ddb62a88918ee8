"""The command line as a user runs it: a subprocess, its output and its exit code."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import full
from tests.minitv.models import configure

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "compare", "sample", "eval", "import", "export", "convert", "stream", "transcribe", "check", "claims",
            "explore", "list", "info", "explain", "plot")


def minitv(*argv, cwd, input=b"", env=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", **(env or {})}
    command = [sys.executable, "-m", "minitv", *argv]
    done = subprocess.run(command, cwd=cwd, input=input, env=environment, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def sentence_of(code, out, err):
    """The sentence of a usage error: exit code 2, one line on stderr, nothing on stdout."""
    assert (code, out) == (2, ""), err
    assert err.startswith("minitv: error: ") and err.count("\n") == 1, err
    return err.removeprefix("minitv: error: ").rstrip("\n")


def refused(*argv, cwd, **kwargs):
    return sentence_of(*minitv(*argv, cwd=cwd, **kwargs))


@pytest.fixture
def quickly_refused(tmp_path, monkeypatch, capsys):
    """``refused`` in this process: many mistakes in the time of one."""
    from minitv.cli import main

    monkeypatch.chdir(tmp_path)
    return lambda *argv: sentence_of(main([*argv]), *capsys.readouterr())


def test_overview(tmp_path):
    code, out, err = minitv("--help", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert minitv("-h", cwd=tmp_path)[1] == out
    assert minitv(cwd=tmp_path) == (2, "", out)


def test_version(tmp_path):
    code, out, _ = minitv("--version", cwd=tmp_path)
    assert code == 0 and out.startswith("minitv ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(tmp_path, command):
    code, out, err = minitv(command, "--help", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: minitv {command}")
    assert "example" in out and f"  minitv {command}" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_help_needs_no_numpy():
    code = "import sys, minitv.cli; print([m for m in ('numpy', 'numba', 'scipy', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["trian"], f"unknown command 'trian', allowed: {', '.join(COMMANDS)}; did you mean train?"),
        (["--vresion"], "unknown option --vresion; did you mean --version?"),
        (["--steps", "5", "train"], "unknown option --steps; the command comes first, as in minitv train --steps 100"),
        (["sample"], "missing: DIR; see minitv sample --help"),
        (["plot"], "missing: DIR; see minitv plot --help"),
        (["eval"], "missing: DIR; see minitv eval --help"),
        (["plot", "nowhere", "./nowhere"], "DIR: a folder is named twice"),
        (["list", "everything"], "'everything' is out of place, usage: minitv list"),
        (["sample", "a", "b"], "'b' is out of place, usage: minitv sample DIR [options]"),
        (["sample", "x", "--temprature", "1"], "unknown option --temprature; did you mean --temperature?"),
        (["sample", "x", "--max_new_tokens=5"], "unknown option --max-new-tokens; here it is --tokens"),
        (["sample", "x", "--temperature", "-1"], "--temperature: -1.0 is too small, allowed: a number from 0"),
        (["sample", "x", "--top-p", "1.5"], "--top-p: 1.5 is too large, allowed: a number above 0 up to 1"),
        (["sample", "x", "--min-p", "2"], "--min-p: 2.0 is too large, allowed: a number from 0 up to 1"),
        (["sample", "x", "--repetition-penalty", "0"], "--repetition-penalty: 0.0 is too small, allowed: a number above 0"),
        (["sample", "x", "--count", "0"], "--count: 0 is too small, allowed: an integer from 1"),
        (["sample", "x", "--seed", str(2**63 - 1), "--count", "2"], "--count: 2 seeds from 9223372036854775807 on end above"),
        (["sample", "x", "--stop", ""], "--stop: an empty text is everywhere, give at least one character"),
        (["plot", "nowhere"], f"nowhere{os.sep}log.jsonl: No such file or directory; a folder of a run is needed"),
        (["train", "transfomer"], "unknown variant 'transfomer'"),
        (["train", "--evl-every", "5"], "unknown option --evl-every; did you mean --eval-every?"),
        (["train", "--learning_rate=1"], "unknown option --learning-rate; here it is --lr"),
        (["train", "--layers", "0"], "--layers: 0 is too small, allowed: an integer from 1"),
        (["train", "--lr", "nan"], "--lr: nan is not a finite number, allowed: a number above 0"),
        (["train", "--bias", "False"], "--bias takes no value: write --bias or --no-bias"),
        (["train", "--preset", "smal"], "unknown preset 'smal', allowed: tiny, nanogpt-cpu, small; did you mean"),
        (["train", "--tokenizer", "chars"], "--tokenizer: 'chars' is unknown, allowed: char, byte, huggingface, ids"),
        (["train", "--steps", "5", "transformer"], "'transformer' is out of place, usage: minitv train [VARIANT]"),
        (["train", "--config", "no.toml"], "--config no.toml: No such file or directory"),
        (["train", "--steps"], "--steps: a value is missing"),
        (["explain", "layer_nrom"], "unknown variant or operator 'layer_nrom'; did you mean layer_norm?"),
    ],
)
def test_mistakes(tmp_path, quickly_refused, argv, sentence):
    assert quickly_refused(*argv).startswith(sentence)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def config_of(tmp_path, monkeypatch, capsys):
    """What --print-config prints, in this process, as {name: (value as TOML, source)} and as it is."""
    from minitv.cli import main

    monkeypatch.chdir(tmp_path)

    def read(*argv):
        code = main(["train", *argv, "--print-config"])
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), err
        lines = [line for line in out.splitlines() if line and not line.startswith("#")]
        pairs = (line.split(" = ", 1) for line in lines)
        return {name: tuple(map(str.strip, rest.rsplit("  # ", 1))) for name, rest in pairs}, out

    return read


def test_print_config_tells_where_each_value_came_from(tmp_path, config_of):
    (tmp_path / "my.toml").write_text("width = 96\nsteps = 7\neval-every = 3\n")
    shown, _ = config_of("--preset", "nanogpt-cpu", "--config", "my.toml", "--eval_every=9", "--no-tied")
    assert shown["variant"] == ('"transformer"', "default")
    assert shown["layers"] == ("4", "preset nanogpt-cpu")
    assert shown["heads"] == ("4", "preset nanogpt-cpu")
    assert shown["width"] == ("96", "my.toml")
    assert shown["steps"] == ("7", "my.toml")
    assert shown["eval_every"] == ("9", "command line")
    assert shown["tied"] == ("false", "command line")
    assert shown["seed"] == ("0", "default")
    assert shown["threads"] == ('"none"', "default")
    assert shown["out"] == ('"none"', "default")
    assert [p.name for p in tmp_path.iterdir()] == ["my.toml"]


def test_print_config_is_a_config_file(tmp_path, config_of):
    first, text = config_of("transformer", "--preset", "small", "--lr", "5e-4")
    (tmp_path / "again.toml").write_text(text)
    second, _ = config_of("--config", "again.toml")
    assert {name: value for name, (value, _) in first.items()} == {name: value for name, (value, _) in second.items()}
    of_file = {source.partition(",")[0] for name, (_, source) in second.items() if name not in ("resume", "init_from")}
    assert of_file == {"again.toml"}


def test_a_config_file_may_choose_variant_and_preset(tmp_path, config_of):
    (tmp_path / "c.toml").write_text('variant = "transformer"\npreset = "small"\n')
    shown, _ = config_of("--config", "c.toml")
    assert shown["variant"] == ('"transformer"', "c.toml")
    assert shown["context"] == ("256", "preset small")
    shown, _ = config_of("--config", "c.toml", "--preset", "tiny")
    assert shown["context"][1] == "default"


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("layrs = 3", "c.toml: unknown option 'layrs'; did you mean layers?"),
        ("layers = 0", "c.toml: layers: 0 is too small, allowed: an integer from 1"),
        ('layers = "3"', "c.toml: layers: '3' is not an integer, allowed: an integer from 1"),
        ("[model]\nlayers = 3", "--config c.toml: tables are not used"),
        ("layers", "--config c.toml: not a TOML file"),
        ('variant = "transfomer"', "unknown variant 'transfomer'"),
        ('preset = "smal"', "unknown preset 'smal'"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, quickly_refused, content, sentence):
    (tmp_path / "c.toml").write_text(content)
    assert quickly_refused("train", "--config", "c.toml").startswith(sentence)


def test_help_shows_the_defaults_of_the_preset(tmp_path):
    out = " ".join(minitv("train", "--preset", "small", "--help", cwd=tmp_path)[1].split())
    assert "--width N size of the vector of one token (an integer from 1 up to 1048576; default: 384)" in out
    assert "--heads N" in out


@pytest.fixture
def run(tmp_path):
    """A folder with a checkpoint of a run that had some options of its own."""
    from minitv.checkpoint import save

    config = configure("transformer", layers=3, heads=8, out="elsewhere", lr=0.01, steps=50).to_json()
    state = {"config": config, "step": 50, "best_loss": None, "elapsed_s": 1.0, "threads": 1}
    save(tmp_path / "run", "last", model={}, optimizer={}, state=state)
    return tmp_path


def test_resume_takes_the_options_of_the_run(run, config_of):
    shown, text = config_of("--resume", "run", "--steps", "80", "--threads=2", "--lr", "0.01", "--data", "moved.txt")
    assert shown["variant"] == ('"transformer"', "checkpoint run")
    assert shown["layers"] == ("3", "checkpoint run")
    assert shown["heads"] == ("8", "checkpoint run")
    assert shown["min_lr"] == ("0.001", "checkpoint run")
    assert shown["width"] == ("128", "checkpoint run")
    assert shown["steps"] == ("80", "command line")
    assert shown["threads"] == ("2", "command line")
    assert shown["data"] == ('"moved.txt"', "command line")
    assert shown["out"] == ('"run"', "checkpoint run")
    assert shown["resume"] == ('"run"', "command line")
    assert shown["task"] == ('"text"', "checkpoint run")
    (run / "c.toml").write_text(text)
    assert config_of("--config", "c.toml")[0]["steps"] == ("80", "c.toml")
    assert config_of("transformer", "--resume", "run", "--config", "c.toml")[0]["steps"] == ("80", "c.toml")


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (
            ["--lr", "0.02"],
            "--resume run: --lr is 0.01 in this run and cannot become 0.02 (command line); what may change: ",
        ),
        (["--heads", "2"], "--resume run: --heads is 8 in this run and cannot become 2 (command line)"),
        (["--no-tied"], "--resume run: --tied is on in this run and cannot become off (command line)"),
        (["--overwrite"], "--resume run: --overwrite is off in this run and cannot become on (command line)"),
        (["--preset", "small"], "--resume run: --context is 64 in this run and cannot become 256 (preset small)"),
        (["--config", "c.toml"], "--resume run: --seed is 0 in this run and cannot become 5 (c.toml)"),
        (["--resume", "nowhere"], "--resume nowhere: nowhere: there is no such folder"),
    ],
)
def test_resume_refuses_another_run(run, quickly_refused, argv, sentence):
    (run / "c.toml").write_text("seed = 5")
    assert quickly_refused("train", "--resume", "run", *argv).startswith(sentence)


@pytest.mark.parametrize("argv", [["trian"], ["sample"], ["plot", "nowhere"], ["train", "--evl-every", "5"]])
def test_mistakes_as_a_process(tmp_path, argv):
    refused(*argv, cwd=tmp_path)


def test_resume_refuses_another_variant(run):
    (run / "c.toml").write_text('variant = "other"')
    sentence = "--resume run: this is a run of transformer, it cannot continue as other"
    assert refused("train", "--resume", "run", "--config", "c.toml", cwd=run) == sentence


def test_list(tmp_path):
    code, out, err = minitv("list", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert all(f"\n  {preset} " in out for preset in ("tiny", "nanogpt-cpu", "small"))
    from minitv import tasks, variants
    from minitv.errors import UserError

    lines = [" ".join(line.split()) for line in out.splitlines()]
    for name in variants.variants() if full() else ("transformer", "encoder", "conformer"):
        row = lines.index(f"{name} {variants.load(name).summary}")
        assert lines[row + 1] == variants.load(name).paper and lines[row + 2].startswith("tasks: ")
        listed = lines[row + 2].removeprefix("tasks: ").split(", ")
        for task in tasks.tasks():
            with contextlib.nullcontext() if task in listed else pytest.raises(UserError):
                variants.load(name).configure(task=task)
    for name, entry in tasks.tasks().items():
        assert f"{name} {entry.summary}" in lines


SHOWN = [["list"], ["explain"], ["explain", "aft-conv"], ["explain", "attention"], ["info"]]


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
@pytest.mark.parametrize("width", [20, 44, 80])
@pytest.mark.parametrize("argv", SHOWN)
def test_a_terminal_gets_whole_words(tmp_path, argv, width):
    """What a pseudo-terminal of that width receives, against what a pipe receives: the same words, in lines that fit."""
    import fcntl
    import pty
    import struct
    import termios

    plain = minitv(*argv, cwd=tmp_path)[1].split()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "minitv", *argv], cwd=tmp_path, stdout=slave, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"})
    os.close(slave)
    received = b""
    while True:
        try:
            received += os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
    os.close(master)
    process.stderr.close()
    assert process.wait() == 0
    text = received.decode().replace("\r\n", "\n")
    assert max(map(len, text.split("\n"))) <= width
    assert sorted("".join(text.split())) == sorted("".join(plain))  # two libraries of BLAS come in any order
    longest = width - 4  # below the name, indented
    words = [word for word in text.split() if len(word) < longest]
    assert [word for word in plain if len(word) < longest and word not in words] == []


def test_info(tmp_path):
    code, out, err = minitv("info", cwd=tmp_path)
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()]
    assert {"minitv", "python", "numpy", "numba", "scipy", "cupy", "cores", "BLAS", "Numba", "vectors", "products",
            "bfloat16"} <= set(names)


def test_explain(tmp_path):
    code, out, err = minitv("explain", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "\n  layer_norm " in out and "\n  attention " in out
    code, out, err = minitv("explain", "layer_norm", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("layer_norm: x[")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert rows["options"] == "eps=1e-05"
    assert rows["kernels"] == "cpu, cuda"
    assert rows["differentiable"] == "yes"


def test_explain_says_how_a_variant_writes(tmp_path, monkeypatch, capsys):
    from minitv import variants
    from minitv.cli import main
    from minitv.decode import FusedDecoder, decoder

    for name in variants.variants():
        variant = variants.load(name)
        assert main(["explain", name]) == 0
        (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  writing "))
        if not variant.causal:
            assert (variant.writing or "not at all") in row
        else:
            model = variant.configure(width=16, layers=1, context=8).build(5)
            assert ("fused kernels on the CPU" in row) == isinstance(decoder(model), FusedDecoder)
    monkeypatch.setattr("autograd.cpu.compile.unavailable", lambda: "it is not here")
    assert main(["explain", "rwkv"]) == 0
    assert "prefill, one position at a time: the fused kernels need Numba (it is not here)" in capsys.readouterr().out


def test_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from minitv.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    lines = [{"ngram_bpc": [4.0, 3.0]}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "val_loss": 1.6}]
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert minitv("plot", "run", cwd=tmp_path) == (0, f"{Path('run', 'curve.png')}\n", "")
    def plot(*argv):
        return main(["plot", *argv]), *capsys.readouterr()

    assert plot("run", "--out", "x.pdf") == (0, "x.pdf\n", "")
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert plot("run", "again") == (0, "curves.png\n", "")
    assert plot("run", "again", "--out", "y.png") == (0, "y.png\n", "")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "y.png"))
    assert "there is no folder no/such/folder" in sentence_of(*plot("run", "--out", "no/such/folder/x.png"))


def test_a_prompt_from_standard_input_must_be_text(tmp_path):
    sentence = refused("sample", "x", "--prompt", "-", cwd=tmp_path, input=b"ab\xff")
    assert sentence == "--prompt -: standard input is not UTF-8 at byte 2"


@pytest.mark.skipif(os.name != "posix", reason="a descriptor that cannot be read")
def test_a_prompt_from_standard_input_that_cannot_be_read(tmp_path):
    command = f'"{sys.executable}" -m minitv sample x --prompt - 0> written'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, shell=True, capture_output=True, text=True)
    sentence = sentence_of(done.returncode, done.stdout, done.stderr)
    assert sentence == "--prompt -: standard input cannot be read: Bad file descriptor"


def test_output_that_the_terminal_cannot_show_is_no_crash(tmp_path):
    (tmp_path / "ä.toml").write_text("data = 'ü'\n", encoding="utf-8")
    code, out, err = minitv(
        "train",
        "--config",
        "ä.toml",
        "--print-config",
        cwd=tmp_path,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )
    assert (code, err) == (0, "")
    assert "\\xfc" in out


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("argv", [["--help"], ["train", "--print-config"]])
def test_a_reader_that_leaves_early_is_no_traceback(tmp_path, argv):
    command, environment = [sys.executable, "-m", "minitv", *argv], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe)
    process.stdout.close()  # before anything is written
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141
    assert error == ""


@pytest.mark.parametrize("text, sentence", [
    ("resume = 5", "resume"), ("steps = " + "1" * 5000, "not a TOML file"), ("a = " + "[" * 20000, "not a TOML file"),
    ('resume = ""', "an empty text is no folder")])
def test_odd_config_files(tmp_path, quickly_refused, text, sentence):
    (tmp_path / "c.toml").write_text(text)
    assert sentence in quickly_refused("train", "--config", "c.toml")


@pytest.mark.parametrize("option", ["--width", "--layers", "--steps", "--batch", "--warmup"])
def test_numbers_that_no_machine_can_hold(quickly_refused, option):
    sentence = quickly_refused("train", option, "1" + "0" * 400)
    assert option in sentence and "is too large" in sentence


@pytest.mark.parametrize("out", ["", ".", "/dev/null"])
def test_plot_replaces_nothing_but_files(tmp_path, quickly_refused, out):
    (tmp_path / "log.jsonl").write_text('{"variant": "x"}\n{"step": 1, "loss": 1.0}\n')
    quickly_refused("plot", ".", "--out", out)
    assert Path("/dev/null").is_char_device()
