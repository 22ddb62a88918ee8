"""The status line, and text that fits a terminal."""

import io
import math
import os
import sys

import pytest

from minitv import report
from minitv.report import Progress, columns, count, duration, reflow, wrap


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
    progress.update(number, loss=loss, metric=("bits/char", loss / math.log(2)), tokens_per_s=12_345)


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


@pytest.mark.parametrize("metric, shown", [(("accuracy", 0.9125), "0.912 accuracy  "), (("accuracy", math.nan), "")])
def test_the_status_line_shows_the_metric_of_any_task(clock, metric, shown):
    stream = io.StringIO()
    Progress(9, stream=stream).update(1, loss=2.0, metric=metric, tokens_per_s=100)
    assert stream.getvalue() == f"step 1/9  loss 2.0000  {shown}100 tokens/s\n"


@pytest.mark.parametrize("width, line", [
    (100, "step  100/1500  loss 2.0000  2.885 bits/char  12.3k tokens/s  ETA 23m 20s    7% #"),
    (80, "step  100/1500  loss 2.0000  2.885 bits/char  12.3k tokens/s  ETA 23m 20s"),
    (60, "step  100/1500  loss 2.0000  12.3k tokens/s  ETA 23m 20s"),
    (45, " 100/1500  loss 2.0000  12.3k/s  ETA 23m 20s"),
    (40, " 100/1500  2.00  12.3k/s  ETA 23m 20s"),
    (36, " 100/1500  loss 2.0000  ETA 23m 20s"),
    (30, " 100/1500  2.00  ETA 23m 20s"),
    (24, " 100/1500  ETA 23m 20s"),
    (20, " 100/1500"),
    (5, " 100/"),
])
def test_a_narrow_terminal_keeps_the_time_that_is_left(clock, monkeypatch, width, line):
    monkeypatch.setattr(report, "columns", lambda stream: width)
    stream = Terminal()
    with Progress(1500, stream=stream) as progress:
        for number in (99, 100):
            clock[0] += 1
            step(progress, number)
    last = stream.getvalue().rpartition("\r")[2].rstrip()
    assert last.startswith(line.rstrip()) and (width >= 100 or last == line)


def test_what_others_write_goes_above_the_status_line(monkeypatch):
    """A kernel cache that is full, a warning: whole lines, in their order."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10) as progress:
        step(progress, 1)
        print("compiling kernels", file=sys.stderr, flush=True)
        print("half a", end="", file=sys.stderr)
        step(progress, 2)
        print(" line", file=sys.stderr)
        print("without an end", end="", file=sys.stderr)
        step(progress, 10)
    assert sys.stderr is stream
    screen = _screen(stream.getvalue())
    assert screen[:2] == ["compiling kernels", "half a line"]
    assert screen[-2] == "without an end" and screen[-1].startswith("step 10/10")
    assert len(screen) == 4 and sum("tokens/s" in line for line in screen) == 1


def test_other_streams_are_left_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(10):
        assert sys.stderr is stream


# -- text that fits ----------------------------------------------------------------------------------------------------


def test_only_a_terminal_has_a_width(monkeypatch):
    assert columns(io.StringIO()) is None
    assert columns(Terminal()) == 80  # it does not tell
    terminal = Terminal()
    terminal.fileno = lambda: 7
    for cells, width in ((33, 33), (0, 80)):
        monkeypatch.setattr(os, "get_terminal_size", lambda number, cells=cells: os.terminal_size((cells, 24)))
        assert columns(terminal) == width


@pytest.mark.parametrize("width", [10, 20, 33, 80])
def test_lines_break_between_words(width):
    text = "each channel takes a weighted mean of its past, in linear-time, with internationalization"
    lines = wrap(text, width, "  name  ", "    ").split("\n")
    assert lines[0].startswith("  name") and all(line.startswith("    ") for line in lines[1:])
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    assert "".join(words) == "name" + text.replace(" ", "")
    if width >= 24:  # every word fits into a line
        assert words == ["name", *text.split()]


def test_a_message_breaks_on_a_terminal_alone(monkeypatch):
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(report, "columns", lambda stream: 30 if stream.isatty() else None)
    for stream in (terminal, pipe):
        report.tell("transformer, 14.4k parameters, folder w", "model     ", stream)
    assert terminal.getvalue() == "model     transformer, 14.4k\n          parameters, folder w\n"
    assert pipe.getvalue() == "model     transformer, 14.4k parameters, folder w\n"


def test_without_a_width_a_line_stays_as_it_is():
    assert wrap("a  b " * 99, None, "> ") == "> " + "a  b " * 99
    assert wrap("", 20, "  x  ") == "  x"


def test_a_docstring_is_broken_anew():
    text = ("One sentence that is broken\nin the source.\n\n    y = softmax(q k) v\n    z = a formula that is much too long "
            "for it\n\n- an item that is\n  long\n- another\nafter it")
    assert reflow(text, 24).split("\n") == [
        "One sentence that is", "broken in the source.", "", "    y = softmax(q k) v", "    z = a formula that",
        "    is much too long for", "    it", "", "- an item that is long", "- another", "after it"]
    assert reflow(text, None) == text
