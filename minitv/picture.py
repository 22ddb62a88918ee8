"""The picture of runs: what they lost over their steps, one colour and line for each variant in every picture."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import RunError, UserError, plain
from .log import LOG, read_log
from .report import count, duration

CURVE, CURVES, READINGS = "curve.png", "curves.png", "readings.png"
BASELINE, INK = "#767676", "#333333"
BITS = "bits per character"

# Any two stay apart for an eye without the red or the green receptor, and each is dark enough for text on white.
COLOURS = ("#332288", "#0077bb", "#882255", "#e06c1e", "#000000", "#cc6fa2", "#7b3f00", "#ef5365")
DASHES = ((), (5, 2), (1, 1.4), (6, 1.6, 1, 1.6), (3, 1.4, 1, 1.4, 1, 1.4))  # lengths of ink and gap, in line widths
MARKERS = "os^vDP*"
FILLS = ("full", "none", "left", "top", "right", "bottom")  # of the markers: runs of one variant in one picture
SALT = 9693183  # chosen so that no two variants look alike


class Look(NamedTuple):
    """How the line of a variant is drawn."""

    colour: str
    dashes: tuple[float, ...]
    marker: str


def look(variant: str) -> Look:
    """The look of a variant: a function of its name alone, so that a new variant changes no picture of the others."""
    digest = hashlib.sha256(f"{SALT}{variant}".encode(errors="replace")).digest()
    return Look(*(choices[byte % len(choices)] for choices, byte in zip((COLOURS, DASHES, MARKERS), digest, strict=False)))


class Line(NamedTuple):
    """A line of a picture: its points (step, value), the text at its end, and how it is drawn."""

    points: list[tuple[int, float]]
    name: str  # "" for no text
    look: Look
    width: float = 2.0
    alpha: float = 1.0
    marker: str | None = None  # the fill of the markers; None for none
    best: bool = False  # whether its best step is marked


@dataclass(frozen=True)
class Curves:
    """What the log of one run says of its progress; NaN where a step made no number."""

    variant: str
    metric: str  # what is drawn, with its unit
    rising: bool  # whether more of it is better
    training: list[tuple[int, float]]  # (step, value) of single batches
    held_out: list[tuple[int, float]]
    baselines: dict[str, float]  # values of methods that do not learn
    data: str  # what the run was trained on, for a reader
    identity: str | None  # the same for a machine; None when the log does not say
    facts: tuple[str, ...]  # parameters and duration
    date: str  # "" when the log does not say


def curves(directory: str | Path) -> Curves:
    """Read DIR/log.jsonl.

    ``metric`` in its header says what is drawn, and under which key the records have it; an older log has the losses ``loss``
    and ``val_loss`` in nats per token, which become bits per character.
    """
    header, records = read_log(directory)
    metric, corpus, task = header.get("metric"), header.get("corpus") or {}, header.get("task") or "text"
    if metric:
        training, held_out = (_series(records, key, 1.0) for key in (metric["key"], f"val_{metric['key']}"))
    else:
        per_char = header.get("tokens_per_char") or {}
        training, held_out = (_series(records, key, per_char.get(part, 1.0) / math.log(2))
                              for key, part in (("loss", "training"), ("val_loss", "held_out")))
    orders = {f"n-gram order {order}": bits for order, bits in enumerate(header.get("ngram_bpc") or ())}
    facts = [] if header.get("parameters") is None else [f"{count(header['parameters'])} parameters"]
    if records and records[-1].get("elapsed_s") is not None:
        facts.append(duration(records[-1]["elapsed_s"]))
    return Curves(
        variant=header.get("variant") or "", metric=metric["name"] if metric else BITS,
        rising=bool(metric and metric["rising"]), training=training, held_out=held_out,
        baselines=header.get("baselines") or orders,
        data=str(corpus.get("description", "")) or ("" if task == "text" else f"task {task}"),
        identity=str(corpus["sha256"]) if "sha256" in corpus else None if task == "text" else task,
        facts=tuple(facts), date=(header.get("started") or "")[:10])


def smooth(points: list[tuple[int, float]], reach: int) -> list[tuple[int, float]]:
    """At each point the mean of all values at most ``reach`` steps away, before or after; NaN counts nowhere."""
    result, total, count, first, last = [], 0.0, 0, 0, 0
    values = [value if math.isfinite(value) else None for _, value in points]
    for step, _ in points:
        while last < len(points) and points[last][0] <= step + reach:
            total, count = (total + values[last], count + 1) if values[last] is not None else (total, count)
            last += 1
        while points[first][0] < step - reach:
            total, count = (total - values[first], count - 1) if values[first] is not None else (total, count)
            first += 1
        result.append((step, total / count if count else math.nan))
    return result


def reach(points: list[tuple[int, float]]) -> int:
    """How far smoothing reaches: a twenty-fifth of the run."""
    return max(1, round(points[-1][0] / 25))


def plot(directories: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Draw the curves of one run, or those of several in one picture; returns the file.

    By default that is DIR/curve.png of one run, and curves.png in the current folder of several.

    UserError when a run has nothing to draw, or the runs are measured differently. Runs on different texts are drawn, and
    the title says so.
    """
    if len({os.path.realpath(directory) for directory in directories}) < len(directories):
        raise UserError("DIR: a folder is named twice, and each run is drawn once")
    runs = [curves(directory) for directory in directories]
    for directory, run in zip(directories, runs, strict=True):
        if not run.training and not run.held_out:
            raise UserError(f"{Path(directory) / LOG}: no losses to draw yet")
        if (run.metric, run.rising) != (runs[0].metric, runs[0].rising):
            raise UserError(f"{directory} is measured in {run.metric}, {directories[0]} in {runs[0].metric}: "
                            "one axis cannot hold both")
    if path is None:
        path = Path(directories[0]) / CURVE if len(runs) == 1 else CURVES
    if len(runs) > 1:
        return _overlay(Path(path), directories, runs)
    (run,) = runs
    style, lines, note = look(run.variant), [], ""
    if run.training:
        steps, thin = reach(run.training), style._replace(dashes=())
        lines = [Line(run.training, "", thin, 0.6, 0.3), Line(smooth(run.training, steps), "training", thin, 1.2, 0.55)]
        note = f"training: single batches (thin) and their mean from {steps} steps before to {steps} after (thicker)"
    if run.held_out:
        lines.append(Line(run.held_out, "held out", style, 2.2, marker="full", best=True))
    return draw(Path(path), lines, run.baselines, run.metric, title="  ·  ".join(filter(None, (run.variant, *run.facts))),
                about=about(runs), note=note, rising=run.rising)


def readings(directory: str | Path) -> dict[str, list[list[tuple[int, float]]]]:
    """What the modules of a run's model told of themselves over its steps: for each kind of number the series of all layers."""
    header, records = read_log(directory)
    kinds: dict[str, list[list[tuple[int, float]]]] = {}
    for name in header.get("readings") or ():
        kind = ".".join(part for part in name.split(".") if part != "blocks" and not part.isdigit())
        if points := _series(records, name, 1.0):
            kinds.setdefault(kind, []).append(points)
    return kinds


def plot_readings(directory: str | Path) -> Path | None:
    """Draw what the modules of a run's model told of themselves over its steps, DIR/readings.png; None if they told nothing.

    A number that several layers have is a line for each layer, and a thicker one for their mean.
    """
    lines = []
    for i, (kind, layers) in enumerate(readings(directory).items()):
        style = Look(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], MARKERS[i % len(MARKERS)])
        lines += [Line(points, "", style, 0.8, 0.35) for points in layers if len(layers) > 1]
        values: dict[int, list[float]] = {}
        for step, value in itertools.chain(*layers):
            values.setdefault(step, []).append(value)
        mean = [(step, math.fsum(column) / len(column)) for step, column in sorted(values.items())]
        lines.append(Line(mean, kind, style, marker="full"))
    if not lines:
        return None
    return draw(Path(directory) / READINGS, lines, {}, "numbers of the model's layers", rising=None,
                title=read_log(directory)[0].get("variant") or "", note="thin: each layer  ·  thick: the mean of all layers")


def _overlay(path: Path, directories: Sequence[str | Path], runs: list[Curves]) -> Path:
    """Several runs in one picture: the held-out curve of each, or its smoothed training where it was never evaluated."""
    names = [run.variant for run in runs]
    folders = [os.path.normpath(directory) for directory in directories]
    if len({os.path.basename(folder) for folder in folders}) == len(folders):
        folders = [os.path.basename(folder) for folder in folders]
    lines = []
    for i, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        name = run.variant if run.variant and names.count(run.variant) == 1 else f"{run.variant} ({folder})".strip()
        fill = FILLS[names[:i].count(run.variant) % len(FILLS)]
        if run.held_out:
            lines.append(Line(run.held_out, name, look(run.variant), marker=fill, best=True))
        else:
            lines.append(Line(smooth(run.training, reach(run.training)), f"{name}, training", look(run.variant), 1.2))
    alike = _alike(runs) and all(run.baselines == runs[0].baselines for run in runs)
    return draw(path, lines, runs[0].baselines if alike else {}, runs[0].metric, title="several runs on held-out data",
                about=about(runs), rising=runs[0].rising)


def _alike(runs: Sequence[Curves]) -> bool:
    """Whether all runs are known to be on the same data."""
    return len(runs) == 1 or (len({run.identity for run in runs} | {None}) == 2 and all(run.identity for run in runs))


def about(runs: Sequence[Curves]) -> str:
    """The data and the dates of runs, for a title."""
    dates = sorted({run.date for run in runs} - {""})
    when = [dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"] if dates else []
    texts = list(dict.fromkeys(run.data or "a text that the log does not name" for run in runs))
    if _alike(runs):
        return "  ·  ".join([plain(runs[0].data, 70)] * bool(runs[0].data) + when)
    names = plain("; ".join(texts), 110)
    return "\n".join(["different data, so that heights do not compare: " + names, *when])


def draw(path: Path, lines: Sequence[Line], baselines: Mapping[str, float], metric: str, *, title: str, about: str = "",
         note: str = "", rising: bool | None = False, axis: str | None = None, mark: tuple[int, str] | None = None) -> Path:
    """A picture of lines, each with its last value at its end and a ring at its best step, beside baselines by name.

    ``rising`` says whether higher values are better, None that neither are. With ``axis``, its name, the steps are something
    else that begins at 1 and doubles. ``mark`` is a step with a text.
    """
    canvas = sheet(path)
    axes = canvas.figure.add_subplot()
    labels: list[tuple[float, str, str, bool]] = []  # height, text, colour, bold
    points = [point for line in lines for point in line.points]
    end = max(1, *(step for step, _ in points))
    for name, value in baselines.items():
        axes.axhline(value, color=BASELINE, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.75, zorder=1)
        labels.append((value, f"{name}  {value:.2f}", BASELINE, False))
    for line in lines:
        steps, values = zip(*line.points, strict=True)
        fill = line.marker or ("full" if len(steps) == 1 else None)
        axes.plot(steps, values, color=line.look.colour, linewidth=line.width, alpha=line.alpha,
                  linestyle=(0, line.look.dashes) if line.look.dashes else "solid", marker=line.look.marker if fill else "",
                  fillstyle=fill or "full", markersize=5, markevery=max(1, len(steps) // 25), zorder=2 + (line.width > 1))
        finite = [point for point in line.points if math.isfinite(point[1])]
        if finite and line.name:
            labels.append((finite[-1][1], f"{line.name}  {finite[-1][1]:.2f}", line.look.colour, True))
        if finite and line.best:
            step, value = best(finite, rising)
            axes.plot([step], [value], marker="o", markersize=11, fillstyle="none", color=line.look.colour, zorder=4)
            if sum(other.best for other in lines) == 1:
                axes.annotate(f"best: {value:.2f} at step {step}", (step, value), (0, 15 if rising else -15), zorder=5,
                              textcoords="offset points", ha="right" if step > end / 2 else "left", va="center", fontsize=9,
                              color=line.look.colour)
    note = "  ·  ".join(filter(None, (note, "ring: the best step" if any(line.best for line in lines) else "")))

    if axis is None:
        axes.set_xlim(-0.012 * end, 1.012 * end)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xlim(end**-0.012, end**1.012)
        axes.xaxis.set_major_formatter(lambda step, _: count(step))
    if mark is not None:
        axes.axvline(mark[0], color=BASELINE, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(mark[1], (mark[0], 0), (-4, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      rotation=90, ha="right", va="bottom", fontsize=8, color=BASELINE)
    heights = [height for height, *_ in labels]
    numbers = [value for _, value in points if math.isfinite(value)]
    # A baseline is what counting can do: what lies above it is the first few steps, which would squeeze the rest. The value
    # before the first step is shown wherever it lies.
    start = [value for line in lines for step, value in line.points if step == 0 and math.isfinite(value)]
    top = max([*heights, *start] if baselines and not rising else [*heights, *numbers], default=1.0)
    bottom = min([*heights, *numbers], default=0.0)
    margin = 0.06 * max(top - bottom, 0.1)
    axes.set_ylim(bottom - margin, top + margin)
    gap = (top - bottom + 2 * margin) / 26
    for (height, text, colour, bold), y in zip(*_spread(labels, gap, bottom - margin / 2), strict=True):
        axes.annotate(
            plain(text, 60),
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
            parse_math=False,
        )

    axes.set_xlabel((axis or "optimizer step") + (f"\n{note}" if note else ""), color=INK, fontsize=8.5)
    verdict = "" if rising is None else f" ({'higher' if rising else 'lower'} is better)"
    axes.set_ylabel(metric + verdict, color=INK, parse_math=False)
    axes.set_title(plain(title, 90) + (f"\n{about}" if about else ""), loc="left", fontsize=10, color=INK, parse_math=False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return save(canvas, path)


def sheet(path: Path, flag: str = "--out", height: float = 5.4) -> Any:
    """The canvas of an empty picture, with its ``figure``; UserError without matplotlib, or if ``path`` cannot be a file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('a picture needs matplotlib: pip install matplotlib') from None
    if not path.name or (path.exists() and not path.is_file()):
        raise UserError(f"{flag} {path}: this is not a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}")
    canvas = FigureCanvasAgg(Figure(figsize=(9, height), dpi=150, layout="constrained"))
    if path.suffix and path.suffix[1:].lower() not in canvas.get_supported_filetypes():
        raise UserError(f"{flag} {path}: no picture ends with {path.suffix}, allowed: .png, .svg, .pdf")
    return canvas


def save(canvas: Any, path: Path) -> Path:
    """Write a picture so that a crash leaves the old file or the new one; UserError for a suffix that is unknown."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix or '.png'}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a text in a script that the font lacks shows as boxes
            canvas.print_figure(temporary, facecolor="white")
        os.replace(temporary, path)
    except ValueError as error:  # an unknown suffix
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def best(points: list[tuple[int, float]], rising: bool) -> tuple[int, float]:
    """The point with the best value, the earliest of equals."""
    return max(points, key=lambda point: (point[1] if rising else -point[1], -point[0]))


def _series(records: list[dict[str, Any]], key: str, scale: float) -> list[tuple[int, float]]:
    """(step, value) of the records that have the key; null is a gap in the line."""
    pairs = [(record["step"], record[key]) for record in records if key in record and "step" in record]
    return [(step, math.nan if value is None else value * scale) for step, value in pairs]


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
