"""How models with different positions read texts that are longer than those they were trained on.

    python benchmarks/extrapolation.py --data tinyshakespeare.txt [POSITIONS ...] [--steps 2000] [--seeds 1] [--save]

One model for each kind of positions is trained at the context C with the same batches, and then predicts the same held-out
characters in windows of C, 2 C, 4 C and 8 C characters, each of which begins without a past. Longer windows help any model
that can use them, because fewer characters have little before them. So the last quarter of every window is reported by itself.
And as what needs no extrapolation, there are windows of C that overlap by half, of which the last half counts ("sliding"). The
scalings of rope are read by the model that was trained without one, with the factor that the window needs. Learned positions
end at the context: longer windows are refused, and the table says so.

Runs are kept in ``--out``: the same command goes on from there. ``--save`` writes benchmarks/results/extrapolation.json and
draws extrapolation.png beside it (with matplotlib).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import numpy as np
from rounds import RESULTS, ROOT, known, save

from autograd import cross_entropy, no_grad
from autograd.cpu.process import blas_threads, cores
from minitv import load
from minitv.errors import UserError
from minitv.evaluate import TOKENS, surprise
from minitv.log import read_log

TRAINED = {  # what stands in the table: the variant, and its options
    "learned": ("transformer", {"positions": "learned"}), "sinusoidal": ("transformer", {"positions": "sinusoidal"}),
    "none": ("transformer", {"positions": "none"}), "alibi": ("transformer", {"positions": "alibi"}),
    "rope": ("roformer", {}), "xpos": ("roformer", {"xpos": True}), "linear attention with rope": ("roformer-linear", {}),
}
SCALINGS = ("linear", "ntk", "dynamic-ntk", "yarn", "llama3")  # of the model with rope
TIMES = (1, 2, 4, 8)
BINS = 2  # in an octave of positions


def train(name: str, seed: int, folder: Path, arguments: argparse.Namespace) -> Path:
    """The folder of a run with these positions, which goes on if it has begun."""
    variant, options = TRAINED[name]
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    command = [sys.executable, "-m", "minitv", "train"]
    if (out / "last").exists():
        if load(str(out)).step >= arguments.steps:
            return out
        command += ["--resume", str(out), "--steps", str(arguments.steps)]
    else:
        command += [variant, "--preset", arguments.preset, "--data", arguments.data, "--out", str(out), "--seed", str(seed),
                    "--context", str(arguments.context), "--steps", str(arguments.steps), "--sample-tokens", "0"]
        for option, value in options.items():
            command += [f"--{option}"] if value is True else [f"--{option}", value]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"{name}: training failed with exit code {code}, see above")
    return out


def reading(trained, length: int, **options):
    """The trained weights in a model that reads windows of ``length``; UserError if it ends before."""
    if trained.model.bounded and length > trained.model.context:
        raise UserError(f"the model has {trained.model.context} positions")
    model = trained.experiment.replace(context=length, **options).build(trained.model.embed.weight.shape[0])
    weights = trained.model.state()
    if trained.model.positions is not None:
        weights["positions"] = weights["positions"][:length]
    model.load(weights)
    return model


def sliding(model, ids: np.ndarray) -> np.ndarray:
    """The surprise in nats of all ids but the first half window: each has half a window before it at least."""
    context, half = model.context, model.context // 2
    rows = np.lib.stride_tricks.sliding_window_view(ids, context + 1)[::half]  # [N T + 1]
    count = max(1, TOKENS // context)

    def score(part: np.ndarray) -> np.ndarray:
        losses = cross_entropy(model(np.ascontiguousarray(part[:, :-1])), np.ascontiguousarray(part[:, 1:]), reduction="none")
        return losses.numpy()[:, half:].astype(np.float64).ravel()

    with no_grad(), blas_threads(1), ThreadPoolExecutor(cores()) as pool:
        parts = [pool.submit(copy_context().run, score, rows[i : i + count]) for i in range(0, len(rows), count)]
        return np.concatenate([part.result() for part in parts])


def measure(trained, ids: np.ndarray, context: int, bits: float, scaling: str | None) -> dict:
    """Bits per character by the length of the windows, and in the longest by position, in bins of half an octave."""
    found: dict = {"windows": {}, "last_quarter": {}}
    for times in TIMES:
        length, options = times * context, {}
        if scaling is not None and times > 1:
            options = {"scaling": scaling, "scaling_factor": 1.0 if scaling == "dynamic-ntk" else float(times)}
            options |= {} if scaling in ("linear", "ntk") else {"trained_context": context}
        try:
            model = reading(trained, length, **options)
        except UserError as error:
            found["windows"][str(length)] = found["last_quarter"][str(length)] = None
            found["refused"] = str(error)
            continue
        table = bits * surprise(model, ids).reshape(-1, length)  # [windows positions]
        found["windows"][str(length)] = float(table.mean())
        found["last_quarter"][str(length)] = float(table[:, -(length // 4):].mean())
        found["by_position"] = [[first, float(table[:, first - 1 : last - 1].mean())] for first, last in _bins(length)]
        if times == 1:
            found["sliding"] = float(bits * sliding(model, ids).mean())
    return found


def _bins(length: int) -> list[tuple[int, int]]:
    """(first, last) positions, counted from 1, of bins that grow with the position."""
    edges = sorted({round(2 ** (i / BINS)) for i in range(math.ceil(BINS * math.log2(length)) + 1)} | {length + 1})
    edges = [edge for edge in edges if edge <= length - length // 16 or edge == length + 1]
    return list(itertools.pairwise(edges))


def merged(parts: list[dict]) -> dict:
    """The means over seeds, and the standard deviation of the windows where there are several."""
    first = parts[0]

    def mean(get):
        values = [get(part) for part in parts]
        return None if None in values else round(statistics.fmean(values), 4)

    result = {key: {length: mean(lambda part, key=key, length=length: part[key][length]) for length in first[key]}
              for key in ("windows", "last_quarter")}
    result["by_position"] = [[at, mean(lambda part, i=i: part["by_position"][i][1])]
                             for i, (at, _) in enumerate(first["by_position"])]
    result["sliding"] = mean(lambda part: part["sliding"])
    if len(parts) > 1:
        result["spread"] = {length: round(statistics.stdev(part["windows"][length] for part in parts), 4)
                            for length, value in result["windows"].items() if value is not None}
    return result | ({"refused": first["refused"]} if "refused" in first else {})


def picture(results: dict[str, dict], context: int, highest: float, path: Path) -> None:
    """Bits per character over the length of the windows, and by position in the longest."""
    from matplotlib.figure import Figure

    from minitv.picture import COLOURS, DASHES, INK

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    lengths, by_position = figure.subplots(1, 2, sharey=True)
    for i, (name, numbers) in enumerate(results.items()):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[(i // len(COLOURS) + 2 * ("rope, " in name)) % len(DASHES)]
        style = dict(color=colour, linestyle=(0, dashes) if dashes else "solid", linewidth=1.6)
        points = [(int(length), value) for length, value in numbers["windows"].items() if value is not None]
        lengths.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
        by_position.plot(*zip(*numbers["by_position"], strict=True), **style)
    ticks = [times * context for times in TIMES]
    for axes, at, label in ((lengths, ticks, "characters in a window"),
                            (by_position, [1, *ticks], "position in the longest window that is read")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(tick) for tick in at])
        axes.minorticks_off()
        axes.axvline(context, color="#767676", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel(f"{label}; dashed: the trained context", color=INK, fontsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    values = [value for numbers in results.values() for value in (*filter(None, numbers["windows"].values()),
                                                                  *(bits for _, bits in numbers["by_position"]))]
    lengths.set_ylim(min(values) - 0.05, min(max(values), highest) + 0.1)  # beyond what counting letters gives, nothing is said
    lengths.set_ylabel("bits per character (lower is better)", color=INK, fontsize=9)
    figure.legend(*lengths.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("positions", nargs="*", metavar="POSITIONS", help=f"of {', '.join(TRAINED)} (default: all)")
    parser.add_argument("--data", required=True, metavar="FILE", help="a text, as of minitv train")
    parser.add_argument("--preset", default="nanogpt-cpu", metavar="NAME", help="default: nanogpt-cpu")
    parser.add_argument("--context", type=int, default=64, help="of the training (default: 64)")
    parser.add_argument("--steps", type=int, default=2000, help="of each training (default: 2000)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each (default: 1)")
    parser.add_argument("--characters", type=int, default=100_000, help="held-out characters that are read (default: 100000)")
    parser.add_argument("--out", default=str(ROOT / "runs" / "extrapolation"), help="folder of the runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/extrapolation.json and extrapolation.png")
    arguments = parser.parse_args()
    names = known(arguments.positions or ["all"], TRAINED, parser, "POSITIONS")
    folder, context, longest = Path(arguments.out), arguments.context, max(TIMES) * arguments.context
    results: dict[str, list[dict]] = {}
    for name in names:
        for seed in range(arguments.seeds):
            out = train(name, seed, folder, arguments)
            trained, (header, _) = load(str(out)), read_log(out)
            task = trained.experiment.begin(trained.saved)
            held_out = task.corpus.held_out
            count = min(arguments.characters, len(held_out) - 1) // longest * longest
            if not count:
                raise SystemExit(f"--data: its held-out part has {len(held_out)} tokens, fewer than a window of {longest}")
            ids, bits = np.array(held_out[: count + 1], np.intp), task.tokens_per_char["held_out"] / math.log(2)
            for scaling in (None, *SCALINGS) if name == "rope" else (None,):
                key = name if scaling is None else f"{name}, {scaling}"
                found = measure(trained, ids, context, bits, scaling)
                results.setdefault(key, []).append(found)
                row = "  ".join(f"{length}: {'refused' if value is None else format(value, '.3f')}"
                                for length, value in found["windows"].items())
                print(f"{key:<28} bits per character  {row}  sliding: {found['sliding']:.3f}")
    table = {name: merged(parts) for name, parts in results.items()}
    result = {"benchmark": "extrapolation", "threads": cores(), "rounds": 1, "preset": arguments.preset, "context": context,
              "steps": arguments.steps, "seeds": arguments.seeds, "characters": count,
              "data": (header.get("corpus") or {}).get("description", arguments.data), "ngram_bpc": header["ngram_bpc"],
              "positions": table}
    if arguments.save:
        result = save("extrapolation", result, "positions")
        picture(result["positions"], context, result["ngram_bpc"][0], RESULTS / "extrapolation.png")
    else:
        picture(table, context, result["ngram_bpc"][0], folder / "extrapolation.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
