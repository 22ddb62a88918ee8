"""The status line and the picture."""

import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitv import report
from minitv.errors import UserError
from minitv.log import Log
from minitv.report import Progress, count, duration, plot

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999.6, "1.0k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (812_000, "812k"),
        (999_960, "1.0M"),
        (1_234_567, "1.2M"),
        (2e9, "2.0G"),
    ],
)
def test_count(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (7500, "2h 05m"),
        (277_200, "3d 5h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# -- progress ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    return now


def step(progress, number, loss=2.0):
    progress.update(number, loss=loss, bpc=loss / math.log(2), tokens_per_s=12_345)


def test_lines_away_from_a_terminal_are_rate_limited(clock):
    stream = io.StringIO()
    with Progress(100, stream=stream, interval=1.0) as progress:
        for number in range(1, 101):
            clock[0] += 0.25
            step(progress, number)
            if number == 50:
                progress.text("a sample")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step   1/100  loss 2.0000  2.885 bits/char  12.3k tokens/s"
    assert lines[1] == "step   5/100  loss 2.0000  2.885 bits/char  12.3k tokens/s  ETA 24s"
    assert lines[-1] == "step 100/100  loss 2.0000  2.885 bits/char  12.3k tokens/s  done"
    assert len(lines) == 25 + 1 + 1
    assert "a sample" in lines
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_the_first_step_does_not_enter_the_estimate(clock):
    stream = io.StringIO()
    progress = Progress(10, stream=stream, interval=0)
    clock[0] += 60  # compiling
    step(progress, 1)
    clock[0] += 2
    step(progress, 2)
    assert "ETA 16s" in stream.getvalue().splitlines()[-1]


def test_a_resumed_run_counts_from_where_it_was(clock):
    stream = io.StringIO()
    progress = Progress(1000, start=900, stream=stream, interval=0)
    for number in (901, 902):
        clock[0] += 1
        step(progress, number)
    assert "ETA 1m 38s" in stream.getvalue().splitlines()[-1]


def test_text_goes_above_the_status_line():
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        progress.text("compiling kernels")
        step(progress, 1)
        progress.text("line one\nline two")
        step(progress, 10, 1.0)
    screen = _screen(stream.getvalue())
    assert screen[:3] == ["compiling kernels", "line one", "line two"]
    assert screen[3].startswith("step 10/10  loss 1.0000  1.443 bits/char  12.3k tokens/s  done  100%")
    assert len(screen) == 4


def _screen(text):
    """What a terminal shows in the end: carriage returns write over the line."""
    lines = []
    for line in text.split("\n"):
        cells = []
        column = 0
        for character in line.replace("\x1b[A", ""):
            if character == "\r":
                column = 0
            else:
                cells[column : column + 1] = character
                column += 1
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


def test_closing_before_the_first_step_leaves_nothing():
    stream = Terminal()
    Progress(10, stream=stream).close()
    assert _screen(stream.getvalue()) == []


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(1, stream=stream) as progress:
        step(progress, 1)
    assert stream.getvalue().count("\n") == 1 and "\r" not in stream.getvalue()


# -- picture -----------------------------------------------------------------------------------------------------------


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
    path = plot(curve(tmp_path, records, **header))
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "log.jsonl"]


def test_plot_writes_where_it_is_told(tmp_path):
    pytest.importorskip("matplotlib")
    curve(tmp_path, [{"step": 1, "loss": 2.0}])
    assert b"<svg" in plot(tmp_path, tmp_path / "a.svg").read_bytes()
    with pytest.raises(UserError, match=r"a\.docx"):
        plot(tmp_path, tmp_path / "a.docx")
    with pytest.raises(UserError, match="no losses"):
        plot(curve(tmp_path / "empty", []))


def test_curves_are_bits_per_character_and_labels_do_not_touch(tmp_path):
    records = [{"step": 3, "loss": math.log(2)}, {"step": 4}, {"step": 5, "loss": None}]
    series = report._series(records, "loss", 2 / math.log(2))
    assert series == [(3, pytest.approx(2.0)), (5, pytest.approx(math.nan, nan_ok=True))]
    labels = [(h, "", "", False) for h in (4.8, 2.41, 2.42, 2.40, 2.9)]
    ordered, heights = report._spread(labels, 0.2, 0.0)
    assert [label[0] for label in ordered] == [2.40, 2.41, 2.42, 2.9, 4.8]
    assert all(b - a >= 0.2 - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights == pytest.approx([2.21, 2.41, 2.61, 2.9, 4.8])
    assert report._spread(labels, 0.2, 2.4)[1] == pytest.approx([2.4, 2.6, 2.8, 3.0, 4.8])


def test_without_matplotlib_a_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UserError, match=r'pip install "minitv\[plot\]"'):
        plot(curve(tmp_path, [{"step": 1, "loss": 2.0}]))


def test_plot_leaves_no_global_figure(tmp_path):
    pytest.importorskip("matplotlib")
    curve(tmp_path, [{"step": 1, "loss": 2.0}])
    code = "import sys; from minitv.report import plot; plot('.'); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
