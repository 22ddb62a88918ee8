"""What the screen shows: numbers for people, the status line of a run, and text that fits the terminal."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import textwrap
import time
from typing import Any, TextIO


def count(number: float) -> str:
    """A number for people: 950, 12.3k, 1.2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit * 0.9995:
            scaled = number / limit
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time for people: 8s, 3m 20s, 2h 05m, 3d 4h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


def columns(stream: TextIO) -> int | None:
    """The width of a terminal, 80 where it does not tell; None when the stream is no terminal."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def wrap(text: str, width: int | None, first: str = "", rest: str = "") -> str:
    """A line broken between its words, and inside one only where it is longer than ``width`` alone.

    ``first`` stands before the first line and ``rest`` before the others, unless they are spaces that would fill the line.
    Without a width the text stays one line.
    """
    if width is None:
        return first + text
    first, rest = (before if before.strip() or len(before) < width else "" for before in (first, rest))
    lines = textwrap.wrap(text, max(width, len(rest) + 1, len(first) + 1), initial_indent=first, subsequent_indent=rest,
                          break_on_hyphens=False)
    return "\n".join(lines) or first.rstrip()


def reflow(text: str, width: int | None) -> str:
    """A docstring for a terminal: paragraphs and list items are broken anew, indented lines only where they are too long.

    Without a width the text stays as it is.
    """
    if width is None:
        return text
    blocks: list[tuple[str, str]] = []  # the indent of the further lines, and the text with the indent of its first line
    for line in text.split("\n"):
        indent, item, words = re.fullmatch(r"(\s*)((?:- )?)(.*)", line).groups()
        before = blocks[-1] if blocks else ("", "")
        goes_on = words and not item and before[1].strip() and indent == before[0]
        if goes_on and (not indent or "- " in before[1][:len(indent)]):
            blocks[-1] = before[0], f"{before[1]} {words}"
        else:
            blocks.append((indent + " " * len(item), line))
    return "\n".join(wrap(block.strip(), width, block[:len(block) - len(block.lstrip())], rest) for rest, block in blocks)


def tell(text: str, label: str = "", stream: TextIO | None = None) -> None:
    """Print a line for a person on stderr, unless another stream is named; on a terminal it breaks between words."""
    stream = stream or sys.stderr
    _print(wrap(text, columns(stream), label, " " * len(label)), stream)


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:  # the reader is gone: the run goes on without it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Above(io.TextIOBase):
    """What other code writes to a terminal with a status line: whole lines, above it."""

    def __init__(self, progress: Progress):
        self._progress, self._begun = progress, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._progress.text("\n".join(lines))
        return len(text)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._progress.stream.fileno()

    def finish(self) -> None:
        """Show a line that has no end yet."""
        if self._begun:
            self.write("\n")


class Progress:
    """One status line on a terminal, a line from time to time elsewhere; ``text`` prints above it.

    ``steps`` is the last step, ``start`` the step the run begins after. Away from a terminal a line appears at most
    every ``interval`` seconds, and at the last step. While the status line is shown, everything written to ``sys.stderr``
    goes above it.
    """

    def __init__(self, steps: int, *, start: int = 0, stream: TextIO | None = None, interval: float = 5.0):
        self.steps, self.start = steps, start
        self.stream = stream or sys.stderr
        self.interval = interval
        self._first: tuple[float, int] | None = None
        self._printed = -math.inf
        self._bar: Any = None
        self._above: _Above | None = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, file=self.stream, dynamic_ncols=True, leave=True, delay=1e-9)
            if self.stream is sys.stderr:
                sys.stderr = self._above = _Above(self)

    def update(self, step: int, *, loss: float, metric: tuple[str, float], tokens_per_s: float) -> None:
        """Show that ``step`` steps are done (loss in nats, the metric's unit and value or NaN); cheap enough for every step."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now, step  # the first step compiles kernels: it says nothing about the others
        since, first = self._first
        left = ""
        if step >= self.steps:
            left = "done"
        elif step > first:
            left = f"ETA {duration((now - since) / (step - first) * (self.steps - step))}"
        number = f"{step:>{len(str(self.steps))}}/{self.steps}"
        if self._bar is not None:
            line, wide = _fitting(number, loss, metric, tokens_per_s, left, columns(self.stream))
            self._bar.bar_format = "{desc}  {percentage:3.0f}% {bar:20}" if wide else "{desc}"
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._printed >= self.interval or step >= self.steps:
            self._printed = now
            _print(_fitting(number, loss, metric, tokens_per_s, left, None)[0], self.stream)

    def text(self, text: str) -> None:
        """Print above the status line: a sample, the result of an evaluation, a message."""
        if self._bar is None:
            _print(text, self.stream)
        else:
            self._bar.write(text, file=self.stream)

    def close(self) -> None:
        """Leave the last status line as it is, and the cursor below it."""
        if self._bar is not None:
            if self._above is not None:
                self._above.finish()
                sys.stderr = self.stream
            if self._first is None:
                self._bar.leave = False
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _fitting(number: str, loss: float, metric: tuple[str, float], tokens_per_s: float, left: str,
             width: int | None) -> tuple[str, bool]:
    """The longest status line that fits into ``width`` columns, and whether a bar fits beside it.

    A narrow terminal loses the bar first, then the task's figure, then words; the time that is left stays longest, beside the
    step and the loss.
    """
    unit, value = metric
    figure = "" if math.isnan(value) else f"{value:.3f} {unit}"
    speed, nats = count(tokens_per_s), f"loss {loss:.4f}"
    forms = ((f"step {number}", nats, figure, f"{speed} tokens/s", left), (f"step {number}", nats, f"{speed} tokens/s", left),
             (number, nats, f"{speed}/s", left), (number, f"{loss:.2f}", f"{speed}/s", left), (number, nats, left),
             (number, f"{loss:.2f}", left), (number, left), (number,))
    lines = ["  ".join(filter(None, form)) for form in forms]
    line = next((line for line in lines if width is None or len(line) <= width), lines[-1][:width])
    return line, width is not None and len(line) + 12 <= width
