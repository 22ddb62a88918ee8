"""A new paper is one file, a new task is one file: both are written into a folder here, and everything knows them."""

import json
import sys

import numpy as np
import pytest

import minitv.tasks
import minitv.variants
from minitv import cli, variants

PAPER = '''"""Mean of the past: the simplest mixer there is."""

from dataclasses import dataclass

import numpy as np

from autograd import cumsum
from minitv.config import check, option
from minitv.nn import Linear, Stateful
from minitv.variant import Page, Variant


@dataclass(frozen=True)
class MeanOptions:
    """mean-of-past"""

    scale: float = option(1.0, "factor of the mean", above=0)

    __post_init__ = check


class Mean(Stateful):
    """y_t = scale W (x_1 + ... + x_t) / t."""

    def __init__(self, rng, model, options, layer=0, dtype=np.float32):
        self.out, self.scale = Linear(rng, model.width, model.width, std=0.02, dtype=dtype), options.scale

    def __call__(self, x, rng=None):
        return self.prefill(x, self.init_state(len(x)))[0]

    def init_state(self, batch):
        return self.constant(0.0, batch, 1, self.out.weight.shape[1]), 0

    def prefill(self, x, state):
        total, count = state
        sums = cumsum(x, axis=1) + total
        counts = np.arange(count + 1, count + 1 + x.shape[1]).astype(x.dtype)
        return self.out(sums * (self.scale / counts)[:, None]), (sums[:, -1:], count + x.shape[1])


MEAN = Variant(
    name="mean-of-past",
    summary="The mean of the past, through a matrix",
    paper="none",
    mixer=Mean,
    options=MeanOptions,
    page=Page(formula="y_t = W mean(x_1 ... x_t)", cost="O(T D)", state="D", operators=("cumsum",), golden="itself",
              discrepancies=(), review="it does not name it"),
)
'''

TASK = '''"""Parity: how many ones came so far, modulo 2."""

from dataclasses import dataclass

import numpy as np

from autograd.random import Random
from minitv.config import check, option
from minitv.task import Batch, Task


@dataclass(frozen=True)
class ParityOptions:
    """parity"""

    ones: float = option(0.5, "probability of a one", above=0, below=1)

    __post_init__ = check


class Parity(Task, name="parity", summary="the parity of the ones so far"):
    """Ids 0 and 1; the answer at each position is the parity of all ids up to it."""

    Options = ParityOptions
    vocab = 2
    baselines = {"chance": 0.5}

    def __init__(self, options, context, batch, seed, saved=None):
        self.options, self.shape, self.random = options, (batch, context), Random(seed)

    def _draw(self, rng, sequences):
        inputs = (rng.uniform((sequences, self.shape[1]), np.float64) < self.options.ones).astype(np.intp)
        return Batch(inputs, inputs.cumsum(axis=1) % 2)

    def batch(self, step):
        return self._draw(self.random.split(0, step), self.shape[0])

    def held_out(self):
        return self._draw(self.random.split(1), 32)
'''


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """A folder in which the package finds one more paper and one more task."""
    for package, name, source in ((minitv.variants, "mean_of_past", PAPER), (minitv.tasks, "parity", TASK)):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir()
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", list(package.__path__))
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    monkeypatch.setenv("MINITV_PATH", str(tmp_path))
    return tmp_path


SMALL = ["--context", "8", "--layers", "1", "--width", "16", "--batch", "4", "--steps", "6", "--eval-every", "3"]


def test_a_paper_and_a_task_in_one_file_each_are_known_everywhere(extended, capsys):
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "mean-of-past" in listed and "parity" in listed
    assert cli.main(["explain", "mean-of-past"]) == 0
    assert "y_t = W mean(x_1 ... x_t)" in capsys.readouterr().out

    out = extended / "run"
    assert cli.main(["train", "mean-of-past", "--task", "parity", "--scale", "0.5", "--ones", "0.3", *SMALL,
                     "--out", str(out)]) == 0
    header, *records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert header["task"] == "parity" and header["baselines"] == {"chance": 0.5}
    assert [record["step"] for record in records if "val_accuracy" in record] == [0, 3, 6]
    assert cli.main(["train", "--resume", str(out), "--steps", "8"]) == 0


def test_the_paper_is_trained_on_text_and_writes(extended, capsys):
    text, out = extended / "text.txt", extended / "written"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    assert cli.main(["train", "mean-of-past", "--data", str(text), *SMALL, "--sample-tokens", "4", "--out", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["sample", str(out), "--tokens", "5", "--prompt", "the "]) == 0
    assert capsys.readouterr().out.startswith("the ")


@pytest.mark.full
def test_the_task_is_learned_by_the_variants_that_exist(extended, capsys):
    directory = extended / "compare"
    assert cli.main(["compare", "transformer", "mean-of-past", "--task", "parity", *SMALL, "--out", str(directory)]) == 0
    table = json.loads((directory / "compare.json").read_text())
    assert {row["variant"] for row in table["variants"]} == {"transformer", "mean-of-past"}
    assert all(0 <= row["accuracy"] <= 1 for row in table["variants"])


def test_prefill_in_parts_equals_the_call(extended):
    model = variants.load("mean-of-past").configure(width=8, layers=2, context=6).build(5)
    ids = np.arange(6)[None] % 5
    first, state = model.prefill(ids[:, :2], model.init_state(1))
    second, _ = model.prefill(ids[:, 2:], state)
    np.testing.assert_allclose(np.concatenate([first.numpy(), second.numpy()], axis=1), model(ids).numpy(), atol=1e-5)


@pytest.mark.parametrize("name, source, sentence", [
    ("broken.py", "def (", "broken.py: line 1: invalid syntax"),
    ("latin.py", "x = '\xe9'".encode("latin-1"), "latin.py: line 1: "),
    ("retnet.py", "", "retnet.py has this name already"),
    ("other.py", PAPER, "other.py: 'mean-of-past' is declared in"),
])
def test_a_module_that_does_not_fit_is_a_sentence(extended, capsys, name, source, sentence):
    (extended / "variants" / name).write_bytes(source if isinstance(source, bytes) else source.encode())
    assert cli.main(["list"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_folder_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("MINITV_PATH", "nowhere")
    assert cli.main(["list"]) == 2 and "MINITV_PATH: nowhere is no folder" in capsys.readouterr().err


def test_a_paper_may_be_a_package(extended, capsys):
    folder = extended / "variants" / "mean_of_past"
    folder.mkdir()
    (extended / "variants" / "mean_of_past.py").rename(folder / "__init__.py")
    assert cli.main(["list"]) == 0 and "mean-of-past" in capsys.readouterr().out


def test_a_module_that_cannot_be_imported_is_a_sentence_with_its_line(extended, capsys):
    source = extended / "variants" / "failing.py"
    source.write_text("import math\nmath.nothing\nX = Variant(name='failing')\n")
    assert cli.main(["explain", "failing"]) == 2
    assert f"{source}, line 2: AttributeError: " in (error := capsys.readouterr().err) and error.count("\n") == 1
