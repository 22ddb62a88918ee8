"""The picture of one run and of several: the looks of variants, smoothing, the best step, titles."""

import itertools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from minitv import picture, variants
from minitv.errors import CheckpointError, RunError, UserError
from minitv.log import Log
from minitv.picture import COLOURS, DASHES, curves, look, plot, smooth

ROOT = Path(__file__).resolve().parents[2]


def curve(directory, records, **header):
    with Log(directory, header) as log:
        for record in records:
            log.write(record)
    return directory


@pytest.mark.parametrize(
    "records, header",
    [
        (
            [{"step": s, "loss": 4 / (s + 1), **({"val_loss": 5 / (s + 1)} if s % 5 == 0 else {})} for s in range(20)],
            dict(ngram_bpc=[4.8, 3.5, 2.9, 2.55, 2.41, 2.42], variant="transformer", parameters=812_000),
        ),
        ([{"step": 1, "loss": 2.0}], {}),
        ([{"step": 1, "val_loss": 2.0}], {"ngram_bpc": [3.0]}),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}], {}),
        ([{"step": 1, "loss": math.nan}], {"ngram_bpc": [3.0]}),
        ([{"step": 1, "loss": math.nan}], {}),
    ],
)
def test_plot_draws(tmp_path, records, header):
    pytest.importorskip("matplotlib")
    path = plot([curve(tmp_path, records, **header)])
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "log.jsonl"]


def test_plot_writes_where_it_is_told(tmp_path):
    pytest.importorskip("matplotlib")
    curve(tmp_path, [{"step": 1, "loss": 2.0}])
    assert b"<svg" in plot([tmp_path], tmp_path / "a.svg").read_bytes()
    with pytest.raises(UserError, match=r"a\.docx"):
        plot([tmp_path], tmp_path / "a.docx")
    with pytest.raises(UserError, match="no losses"):
        plot([curve(tmp_path / "empty", [])])


def test_curves_are_bits_per_character_and_labels_do_not_touch(tmp_path):
    records = [{"step": 3, "loss": math.log(2)}, {"step": 4}, {"step": 5, "loss": None}]
    series = picture._series(records, "loss", 2 / math.log(2))
    assert series == [(3, pytest.approx(2.0)), (5, pytest.approx(math.nan, nan_ok=True))]
    labels = [(h, "", "", False) for h in (4.8, 2.41, 2.42, 2.40, 2.9)]
    ordered, heights = picture._spread(labels, 0.2, 0.0)
    assert [label[0] for label in ordered] == [2.40, 2.41, 2.42, 2.9, 4.8]
    assert all(b - a >= 0.2 - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights == pytest.approx([2.21, 2.41, 2.61, 2.9, 4.8])
    assert picture._spread(labels, 0.2, 2.4)[1] == pytest.approx([2.4, 2.6, 2.8, 3.0, 4.8])


def test_without_matplotlib_a_sentence_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot([curve(tmp_path, [{"step": 1, "loss": 2.0}])])


def test_plot_leaves_no_global_figure(tmp_path):
    pytest.importorskip("matplotlib")
    curve(tmp_path, [{"step": 1, "loss": 2.0}])
    code = "import sys; from minitv.picture import plot; plot(['.']); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})


# -- readings ----------------------------------------------------------------------------------------------------------

def test_readings_of_layers_are_drawn_beside_their_mean(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(picture, "draw", lambda path, lines, *rest, **kwargs: drawn.update(lines=lines, **kwargs) or path)
    names = ["blocks.0.mixer.alpha", "blocks.1.mixer.alpha", "norm.gain"]
    records = [{"step": step, "val_loss": 2.0, names[0]: 1.0, names[1]: 1.0 + step, names[2]: 0.5} for step in (0, 4)]
    found = picture.plot_readings(curve(tmp_path, records, readings=names, variant="simplified"))
    assert found == tmp_path / "readings.png" and drawn["rising"] is None
    assert [(line.name, line.points) for line in drawn["lines"]] == [
        ("", [(0, 1.0), (4, 1.0)]), ("", [(0, 1.0), (4, 5.0)]), ("mixer.alpha", [(0, 1.0), (4, 3.0)]),
        ("norm.gain", [(0, 0.5), (4, 0.5)])]


def test_without_readings_nothing_is_drawn(tmp_path):
    assert picture.plot_readings(curve(tmp_path, [{"step": 1, "loss": 2.0}])) is None
    assert picture.plot_readings(curve(tmp_path, [{"step": 1, "loss": 2.0}], readings=["blocks.0.mixer.alpha"])) is None
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


# -- looks -------------------------------------------------------------------------------------------------------------

def test_every_variant_has_a_look_of_its_own():
    looks = [look(name) for name in variants.variants()]
    assert len(set(looks)) == len(looks) and len({style.colour for style in looks}) == len(COLOURS)


def test_a_look_depends_on_the_name_alone():
    assert look("transformer") == look("transformer") == ("#332288", (), "D")  # as in every picture drawn so far
    assert look("rwkv") == ("#000000", DASHES[3], "o")
    assert look("a\udcffb") and look("")  # names of other programs


# Machado, Oliveira and Fernandes 2009: what an eye without one receptor sees, in linear RGB.
EYES = {
    "usual": np.eye(3),
    "no red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "no green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def _linear(colour):
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(colour, eye):
    t = XYZ @ np.clip(EYES[eye] @ _linear(colour), 0, 1) / XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", EYES)
def test_colours_stay_apart_for_every_eye(eye):
    for one, other in itertools.combinations(COLOURS, 2):
        assert np.linalg.norm(_lab(one, eye) - _lab(other, eye)) > 20, (one, other)  # 2.3 is a just noticeable difference


def test_colours_can_be_read_on_white():
    for colour in (*COLOURS, picture.BASELINE):
        assert 1.05 / (XYZ[1] @ _linear(colour) + 0.05) > 3, colour  # WCAG 2.1, for graphics and bold text


# -- curves ------------------------------------------------------------------------------------------------------------


def test_smoothing_is_a_mean_of_neighbours():
    rng = np.random.default_rng(0)
    steps = np.unique(rng.integers(1, 400, 90)).tolist()
    points = [(step, math.nan if step % 7 == 0 else float(value))
              for step, value in zip(steps, rng.normal(size=len(steps)), strict=True)]
    for step, value in smooth(points, 12):
        near = [v for s, v in points if abs(s - step) <= 12 and math.isfinite(v)]
        assert value == pytest.approx(np.mean(near) if near else math.nan, abs=1e-12, nan_ok=True)
    assert smooth([], 5) == []


def test_logs_of_both_formats(tmp_path):
    new = curves(curve(tmp_path / "new", [{"step": 0, "val_accuracy": 0.1}, {"step": 5, "loss": 1.0, "val_accuracy": 0.5}],
                       variant="rwkv", task="mqar", baselines={"chance": 0.02}, started="2026-11-29 10:00:00", parameters=1500,
                       metric={"name": "accuracy", "key": "accuracy", "rising": True}))
    assert (new.metric, new.rising, new.training, new.held_out) == ("accuracy", True, [], [(0, 0.1), (5, 0.5)])
    assert (new.baselines, new.data, new.identity) == ({"chance": 0.02}, "task mqar", "mqar")
    assert (new.date, new.facts) == ("2026-11-29", ("1.5k parameters",))
    old = curves(curve(tmp_path / "old", [{"step": 1, "loss": math.log(2), "val_loss": math.log(2), "elapsed_s": 200.0}],
                       variant="rwkv", ngram_bpc=[4.0, 3.0], tokens_per_char={"training": 2.0, "held_out": 3.0},
                       corpus={"description": "a.txt", "sha256": "ab"}))
    assert (old.metric, old.rising, old.training, old.held_out) == ("bits per character", False, [(1, 2.0)], [(1, 3.0)])
    assert (old.baselines, old.data, old.identity) == ({"n-gram order 0": 4.0, "n-gram order 1": 3.0}, "a.txt", "ab")
    assert (old.date, old.facts) == ("", ("3m 20s",))


@pytest.mark.parametrize("header", [dict(metric="accuracy"), dict(metric={"name": "a", "key": 1, "rising": True}),
                                    dict(baselines={"chance": "x"}), dict(corpus=[1]), dict(started=5)])
def test_a_log_with_wrong_types_is_a_sentence(tmp_path, header):
    with pytest.raises(CheckpointError, match=next(iter(header))):
        curves(curve(tmp_path, [], **header))


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.fixture
def axes(monkeypatch):
    """Draws, and returns the axes as matplotlib has them."""
    figure = pytest.importorskip("matplotlib.figure")
    made = []

    class Figure(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Figure)

    def draw(*directories, path=None):
        plot(directories, path)
        return made[-1].axes[0]

    return draw


def words(axes):
    return [text.get_text() for text in axes.texts]


def lines_of(axes, variant):
    return [line for line in axes.get_lines() if line.get_color() == look(variant).colour]


RUN = [{"step": s, **({"loss": 3.0 + math.sin(s) + 9 / s} if s else {}),
        **({"val_loss": 2 + (s - 50) ** 2 / 2e3 + 2.2 * (s == 0)} if s % 10 == 0 else {})} for s in range(101)]


def test_one_run(axes, tmp_path):
    corpus = {"description": "a$b$.txt", "sha256": "ab"}
    drawn = axes(curve(tmp_path, RUN, variant="retnet", parameters=812_000, corpus=corpus, started="2026-11-29 10:00:00",
                       ngram_bpc=[4.5, 3.5]))
    raw, smoothed, held_out, ring = lines_of(drawn, "retnet")
    assert raw.get_linewidth() < smoothed.get_linewidth() < held_out.get_linewidth()
    assert np.std(np.diff(smoothed.get_ydata())) < np.std(np.diff(raw.get_ydata())) / 2
    assert held_out.get_xdata()[0] == 0 and drawn.get_ylim()[1] > 5.4 / math.log(2)  # the start is in sight
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (50, 2 / math.log(2))
    assert f"best: {2 / math.log(2):.2f} at step 50" in words(drawn)
    assert drawn.get_title("left") == "retnet  ·  812k parameters\na$b$.txt  ·  2026-11-29"
    assert drawn.get_ylabel() == "bits per character (lower is better)"
    note = "training: single batches (thin) and their mean from 4 steps before to 4 after (thicker)  ·  ring: the best step"
    assert drawn.get_xlabel() == f"optimizer step\n{note}"
    assert "n-gram order 1  3.50" in words(drawn)


def test_several_runs(axes, tmp_path):
    corpus = {"description": "a.txt", "sha256": "ab"}
    folders = [curve(tmp_path / name, RUN, variant=variant, corpus=corpus, ngram_bpc=[4.5], started=f"2026-11-{day} 10:00:00")
               for name, variant, day in (("x", "rwkv", 27), ("y", "hyena", 29), ("z", "rwkv", 28))]
    drawn = axes(*folders, path=tmp_path / "all.png")
    value = f"{RUN[-1]['val_loss'] / math.log(2):.2f}"
    assert {f"rwkv (x)  {value}", f"hyena  {value}", f"rwkv (z)  {value}", "n-gram order 0  4.50"} == set(words(drawn))
    first, ring, second, _ = lines_of(drawn, "rwkv")
    assert first.get_fillstyle() != second.get_fillstyle() and first.get_marker() == second.get_marker() == look("rwkv").marker
    assert ring.get_xdata()[0] == 50 and len(lines_of(drawn, "hyena")) == 2
    assert drawn.get_title("left") == "several runs on held-out data\na.txt  ·  2026-11-27 to 2026-11-29"
    assert lines_of(axes(folders[1]), "hyena")  # the same colour in a picture of its own


@pytest.mark.parametrize("second, title", [
    ({"corpus": {"description": "b.txt", "sha256": "cd"}}, "different data, so that heights do not compare: a.txt; b.txt"),
    ({}, "different data, so that heights do not compare: a.txt; a text that the log does not name"),
])
def test_runs_on_other_texts_say_so(axes, tmp_path, second, title):
    one = curve(tmp_path / "x", RUN, variant="rwkv", corpus={"description": "a.txt", "sha256": "ab"}, ngram_bpc=[4.5])
    other = curve(tmp_path / "y", RUN, variant="hyena", ngram_bpc=[4.5], **second)
    drawn = axes(one, other, path=tmp_path / "p.png")
    assert title in drawn.get_title("left") and not any("n-gram" in word for word in words(drawn))


def test_a_run_that_was_never_evaluated_shows_its_training(axes, tmp_path):
    folders = [curve(tmp_path / name, [{"step": s, "loss": 2.0} for s in (1, 2)], variant=name) for name in ("rwkv", "hyena")]
    assert f"rwkv, training  {2 / math.log(2):.2f}" in words(axes(*folders, path=tmp_path / "p.png"))


def test_a_rising_metric_has_its_best_at_the_top(axes, tmp_path):
    metric = {"name": "accuracy", "key": "accuracy", "rising": True}
    records = [{"step": s, "val_accuracy": a} for s, a in ((0, 0.1), (10, 0.9), (20, 0.8), (30, 0.9))]
    drawn = axes(curve(tmp_path, records, variant="rwkv", metric=metric, baselines={"chance": 0.05}))
    assert "best: 0.90 at step 10" in words(drawn) and "chance  0.05" in words(drawn)
    assert drawn.get_ylabel() == "accuracy (higher is better)" and drawn.get_ylim()[1] > 0.9


def test_what_cannot_share_an_axis_is_refused(tmp_path):
    one = curve(tmp_path / "x", RUN)
    metric = {"name": "accuracy", "key": "accuracy", "rising": True}
    other = curve(tmp_path / "y", [{"step": 1, "val_accuracy": 0.5}], metric=metric)
    with pytest.raises(UserError, match=r"is measured in accuracy, .* in bits per character"):
        plot([one, other])
    with pytest.raises(UserError, match="twice"):
        plot([one, one / "../x"])


def test_names_of_any_characters_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [curve(tmp_path / name, RUN, variant=f"v{name}", corpus={"description": name * 90, "sha256": name})
               for name in ("$x^", "漢字", "a\x1b[31m")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot(folders, tmp_path / "p.png").exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    curve(tmp_path, RUN)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"curve\.png cannot be written: No space left on device"):
        plot([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
