"""What a run shows: the status line and the picture of the curve."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError
from .log import LOG, read_log

CURVE = "curve.png"


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


def _columns(stream: TextIO) -> int:
    """The width of a terminal; some have none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 80


class Progress:
    """One status line on a terminal, a line from time to time elsewhere; ``text`` prints above it.

    ``steps`` is the last step, ``start`` the step the run begins after. Away from a terminal a line appears at most
    every ``interval`` seconds, and at the last step.
    """

    def __init__(self, steps: int, *, start: int = 0, stream: TextIO | None = None, interval: float = 5.0):
        self.steps, self.start = steps, start
        self.stream = stream or sys.stderr
        self.interval = interval
        self._first: tuple[float, int] | None = None
        self._printed = -math.inf
        self._bar: Any = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb" and _columns(self.stream):
            from tqdm import tqdm

            # The bar comes last: a narrow terminal cuts it, not the numbers.
            self._bar = tqdm(
                total=steps,
                initial=start,
                file=self.stream,
                dynamic_ncols=True,
                leave=True,
                delay=1e-9,
                bar_format="{desc}  {percentage:3.0f}% {bar:20}",
            )

    def update(self, step: int, *, loss: float, metric: tuple[str, float], tokens_per_s: float) -> None:
        """Show that ``step`` steps are done (loss in nats, the metric's unit and value); cheap enough for every step."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now, step  # the first step compiles kernels: it says nothing about the others
        since, first = self._first
        value = "" if math.isnan(metric[1]) else f"{metric[1]:.3f} {metric[0]}  "
        line = (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}  {value}"
            f"{count(tokens_per_s)} tokens/s"
        )
        if step >= self.steps:
            line += "  done"
        elif step > first:
            line += f"  ETA {duration((now - since) / (step - first) * (self.steps - step))}"
        if self._bar is not None:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._printed >= self.interval or step >= self.steps:
            self._printed = now
            self._print(line)

    def text(self, text: str) -> None:
        """Print above the status line: a sample, the result of an evaluation, a message."""
        if self._bar is None:
            self._print(text)
        else:
            self._bar.write(text, file=self.stream)

    def _print(self, text: str) -> None:
        try:
            print(text, file=self.stream, flush=True)
        except OSError:  # the reader is gone: the run goes on without it
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def close(self) -> None:
        """Leave the last status line as it is, and the cursor below it."""
        if self._bar is not None:
            if self._first is None:
                self._bar.leave = False
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# -- the picture -------------------------------------------------------------------------------------------------------

TRAINING, HELD_OUT, BASELINE, INK = "#7fa8d9", "#1f4e9c", "#b3541e", "#333333"


def plot(directory: str | Path, path: str | Path | None = None) -> Path:
    """Draw the losses of a run, in bits per character over steps, beside its n-gram baselines; returns the file.

    Reads from the log's header ``ngram_bpc`` (bits per character of orders 0, 1, ...), ``tokens_per_char`` (of the
    ``training`` and the ``held_out`` part), ``variant`` and ``parameters``; each may be absent.
    """
    header, records = read_log(directory)
    training, held_out = curves(header, records)
    if not training and not held_out:
        raise UserError(f"{Path(directory) / LOG}: no losses to draw yet")
    lines = [(series, name, colour, width) for series, name, colour, width in
             ((training, "training", TRAINING, 1.0), (held_out, "held out", HELD_OUT, 2.2)) if series]
    return draw(Path(directory) / CURVE if path is None else Path(path), lines, header.get("ngram_bpc") or (),
                _title(header, records))


def curves(header: Mapping[str, Any], records: list[dict]) -> tuple[list, list]:
    """The metric of a log as (step, value): of single batches, where a loss says it, and of the held-out data."""
    if "metric" in header:
        key = header["metric"]["key"]
        return _series(records, key, 1.0), _series(records, f"val_{key}", 1.0)
    per_char = header.get("tokens_per_char") or {}
    return (_series(records, "loss", per_char.get("training", 1.0) / math.log(2)),
            _series(records, "val_loss", per_char.get("held_out", 1.0) / math.log(2)))


def draw(path: Path, lines: list[tuple[list, str, str, float]], baselines: Sequence[float], title: str) -> Path:
    """A picture of lines (points, name, colour, width), each with its last value, beside the n-grams' of order 0, 1, ..."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('a picture needs matplotlib: pip install "minitv[plot]"') from None
    if not path.name or (path.exists() and not path.is_file()):
        raise UserError(f"--out {path}: this is not a file")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels: list[tuple[float, str, str, bool]] = []  # height, text, colour, bold
    for order, bits in enumerate(baselines):
        axes.axhline(bits, color=BASELINE, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.75, zorder=1)
        labels.append((bits, f"n-gram order {order}  {bits:.2f}", BASELINE, False))
    for series, name, colour, width in lines:
        steps, bits = zip(*series, strict=True)
        axes.plot(
            steps,
            bits,
            color=colour,
            linewidth=width,
            marker="o" if len(series) == 1 or width > 1 else "",
            markersize=3.5,
            zorder=2 + (width > 1),
            solid_capstyle="round",
        )
        finite = [b for b in bits if math.isfinite(b)]
        if finite and name:
            labels.append((finite[-1], f"{name}  {finite[-1]:.2f}", colour, True))

    points = [point for series, *_ in lines for point in series]
    axes.set_xlim(0, max(1, *(step for step, _ in points)))
    heights = [height for height, *_ in labels]
    drawn = [bits for _, bits in points if math.isfinite(bits)]
    # Order 0 is the frequency of characters: what lies above it is the first few steps, and would squeeze the rest.
    top = max(heights if baselines else [*heights, *drawn], default=1.0)
    bottom = min([*heights, *drawn], default=0.0)
    margin = 0.05 * max(top - bottom, 0.1)
    axes.set_ylim(bottom - margin, top + margin)
    gap = (top - bottom + 2 * margin) / 26
    for (height, text, colour, bold), y in zip(*_spread(labels, gap, bottom - margin / 2), strict=True):
        axes.annotate(
            text,
            xy=(1, height),
            xytext=(1.035, y),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=9,
            va="center",
            fontweight="bold" if bold else "normal",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, shrinkA=0, shrinkB=0, relpos=(0, 0.5)),
        )

    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("bits per character (lower is better)", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix or '.png'}")
    try:
        canvas.print_figure(temporary, facecolor="white")
        os.replace(temporary, path)
    except ValueError as error:  # an unknown suffix
        raise UserError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _series(records: list[dict], key: str, scale: float) -> list[tuple[int, float]]:
    """(step, bits) of the records that have the key; null is a gap in the line."""
    found = [(record["step"], record[key]) for record in records if key in record and "step" in record]
    return [(step, math.nan if value is None else value * scale) for step, value in found]


def _spread(labels: list, gap: float, lowest: float) -> tuple[list, list[float]]:
    """The labels from low to high, and heights from ``lowest`` on, at least ``gap`` apart, near to their own."""
    labels = sorted(labels)
    blocks: list[tuple[float, int]] = []  # mean height and size of labels that touch
    for height, *_ in labels:
        blocks.append((max(height, lowest), 1))
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            (upper, n), (lower, m) = blocks.pop(), blocks.pop()
            mean = (upper * n + lower * m) / (n + m)
            blocks.append((max(mean, lowest + gap * (n + m - 1) / 2), n + m))
    return labels, [mean + gap * (i - (n - 1) / 2) for mean, n in blocks for i in range(n)]


def _title(header: Mapping[str, Any], records: list[dict]) -> str:
    parts = [str(header["variant"])] if "variant" in header else []
    if "parameters" in header:
        parts.append(f"{count(header['parameters'])} parameters")
    if records and records[-1].get("elapsed_s") is not None:
        parts.append(duration(records[-1]["elapsed_s"]))
    return "  ·  ".join(parts)
