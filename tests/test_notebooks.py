"""The notebooks in examples/ run from the first cell to the last, agree with the library, and find what their text says."""

import re
import runpy
import sys
from pathlib import Path

import pytest

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
             if "# %%" in path.read_text(encoding="utf-8")}
SLOW = {"06_linear_attention", "10_long_convolutions", "13_blocks"}

FINDS = {  # what the text of a notebook says, in its own names
    "04_attention_and_cache": lambda n: (
        n["errors"]["window"] > 5 * n["errors"]["window and sink"] and n["weights"]["all tokens"][20:, 0].mean() > 0.6),
    "05_positions": lambda n: (
        max(n["scores"].values()) - min(n["scores"].values()) < 1e-9 and n["curves"]["one speed"][44] > 0.99
        and n["curves"]["base 10000"][511] < 0.3),
    "06_linear_attention": lambda n: (
        abs(n["slopes"]["positive"] + 0.5) < 0.1 and n["by_angle"]["cosines and sines"][2] > 2 * n["by_angle"]["positive"][2]
        and n["rows"]["means of neighbours"][-1] < 0.15 and n["rows"]["singular vectors"][4] < 0.06
        and all(a > b > c for a, b, c in zip(*(n["rows"][name] for name in ("one of neighbours", "means of neighbours",
                                                                            "singular vectors")), strict=True))
        and n["costs"]["attention"][1] == n["costs"]["Performer, N = 256"][1] == 2 * n["costs"]["Linformer, M = 128"][1]
        and n["costs"]["attention"][-1] > 60 * n["costs"]["Performer, N = 256"][-1]),
    "07_sparse_attention": lambda n: (
        n["found"][1][1] > 4 * n["found"][1][0] and n["found"][8][1] > 0.9 and max(n["reach"]["LongNet"]) == 2
        and max(n["costs"]["LongNet"]) < 64),
    "08_decay_and_recurrence": lambda n: (
        n["overflow"][100][0] == float("inf") and n["overflow"][1000][1] < 1e-4
        and n["maps"]["retention, γ = 0.97"][20, 8] > 3 and 21 < n["half"]["RetNet", "head 0"] < 22),
    "09_aft": lambda n: (
        n["errors"][-15][0] > 0.1 and n["errors"][-15][1] < 1e-6 and max(n["learned"]) == n["learned"][3] > 5
        and n["history"][-1] < 1e-3),
    "10_long_convolutions": lambda n: (
        n["leaks"] == {32: 0, 64: 31} and n["errors"][14] < 0.1 < 0.8 < n["errors"][1] and n["transform_error"] < 1e-12),
    "11_patches": lambda n: (
        n["future"] == 0 < 1e-4 < n["past"] and abs(n["exponent"] - 4 / 3) < 0.05 and n["best"][262144] == 64),
    "12_speech": lambda n: (
        n["SHOWN"][0][1] == 1 and n["SHOWN"][200][1] < 0.1 and n["far"][12].argmax() == 8),
    "13_blocks": lambda n: (
        n["collapse"]["attention alone"][-1] > 0.99 and abs(n["collapse"]["I + A - C"][-1]) < 0.05
        and n["memory"]["reversible"][-1] < 0.5 * n["memory"]["ordinary"][-1] and n["gradient_error"] < 1e-9
        and abs(n["sizes"]["One Wide FFN"] / n["sizes"]["a network in each layer"] - 1) < 0.01),
}


def run(name, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    try:
        return runpy.run_path(str(NOTEBOOKS[name]))
    finally:
        if plt := sys.modules.get("matplotlib.pyplot"):
            plt.close("all")


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in SLOW)) for name in NOTEBOOKS])
def test_notebooks(name, monkeypatch, capsys):
    names = run(name, monkeypatch)
    assert names["largest"] < 1e-12  # from the loop to the definition, the forms and the kernels
    assert FINDS[name](names)
    assert len(capsys.readouterr().out.splitlines()) > 15


def test_tables_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run("05_positions", monkeypatch)["plt"] is None
    assert "base 10000" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_cells(path):
    """Editors find the cells; a text cell has comments alone, a title comes first and three exercises last."""
    cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.M)
    assert cells.pop(0) == "" and cells[0].startswith(" [markdown]\n# # ")
    for cell in cells:
        head, *lines = cell.splitlines()
        assert head in (" [markdown]", "")
        if head:
            assert all(line.startswith("#") for line in lines if line), lines
        else:
            compile("\n".join(lines), path.name, "exec")
    assert re.findall(r"^# (\d)\. ", cells[-1], re.M) == ["1", "2", "3"]
