"""Write the tables of all README.md from benchmarks/results and from the records of the variants.

    python benchmarks/report.py [--check]

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``; NAME is a function below. Times have a table for each
machine, from its folder in benchmarks/results. ``--check`` changes nothing and exits with 1 if a table is not what the results
say.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rounds import of_peak

from minitv.claims import VERDICTS
from minitv.config import shown
from minitv.options import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / folder / "README.md" for folder in ("", "benchmarks", "minitv/variants")]
MARKED = re.compile(r"(?P<begin><!-- results: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.S)


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def of_machines(write: Callable[[dict], str]) -> Callable[[], str]:
    """The tables that ``write`` makes of the results NAME.json of every processor, one after the other; NAME is its name."""
    @functools.wraps(write)
    def tables() -> str:
        paths = sorted((ROOT / "benchmarks" / "results").glob(f"*/{write.__name__}.json"))
        found = [json.loads(path.read_text(encoding="utf-8")) | {"folder": path.parent.name} for path in paths]
        return "\n".join(map(write, found))

    return tables


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ratio(numbers: list[float]) -> str:
    """The median, and the smallest and largest of the rounds."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*numbers)


def where(result: dict) -> str:
    """The machine, as a sentence."""
    host = result["host"]
    versions = ", ".join(f"{label} {host[key]}" for key, label in (("numpy", "NumPy"), ("numba", "Numba"), ("torch", "PyTorch"))
                         if key in host)
    threads = f"{result['threads']} thread{'s' * (result['threads'] != 1)}"
    rounds = f"median of {result['rounds']} rounds (smallest to largest)" if result["rounds"] > 1 else "one run each"
    return f"\n{machine(host)}, {threads}, {versions}, {host['date']}: {rounds}.\n"


def machine(host: dict) -> str:
    """The processor, and as far as the result says: its vectors, the peak of a core, and how fast it reads memory."""
    facts = [host["processor"] + (f", {host['core']}" if "core" in host else "")]
    if "vectors" in host:  # of registers
        facts.append(host["vectors"] + (" (wider ones are switched off for both sides)" if "limited_by" in host else ""))
    if limits := host.get("limits"):
        facts.append(f"{limits['gflops']:.0f} GFLOP/s a core")
        for key, label in (("read_gb_s", "memory read at"), ("triad_gb_s", "triad at")):
            one, every = (f"{value:.0f}" for value in limits[key])
            facts.append(f"{label} {one} GB/s by one core" + (f" and {every} by {host['cores']}" if host["cores"] > 1 else ""))
    return ", ".join(facts)


@of_machines
def train(result: dict) -> str:
    """A training step of every variant and shape against PyTorch."""
    rows = []
    for variant, presets in result["variants"].items():
        for preset, numbers in presets.items():
            memory = max(numbers["peak_mb"]["minitv"] / peak for name, peak in numbers["peak_mb"].items() if name != "minitv")
            shares = of_peak(numbers, result["threads"], result["host"].get("limits"))
            of_each = [shares.get(name, "–") for name in ("minitv", "eager", "compile")]
            rows.append([f"{variant}, `{preset}`", f"{numbers['tokens_per_s']['minitv']:,.0f}",
                         ", ".join(of_each) if {*of_each} != {"–"} else "–",
                         *(ratio(numbers["ratio"][name]) if name in numbers["ratio"] else "–" for name in ("eager", "compile")),
                         f"{memory:.2f}", f"{numbers['cold_first_step_s']:.1f} s, {numbers['first_step_s']['minitv']:.2f} s"])
    header = ["training step", "tokens/s", "of the peak: ours, eager, compile",
              "× PyTorch eager", "× torch.compile", "memory / theirs", "first step: cold, cached"]
    return table(header, rows) + where(result)


def speed() -> str:
    """Training and writing against PyTorch, as ranges over machines: never the best of them alone."""
    hosts: dict[str, dict] = {}  # of every machine, by its folder
    rows: dict[tuple, dict[str, dict[str, list[float]]]] = {}  # by what was measured, then by column and machine: the medians
    for name, did in (("train", "training"), ("decode", "writing, batch 1")):
        for path in sorted((ROOT / "benchmarks" / "results").glob(f"*/{name}.json")):
            result, folder = json.loads(path.read_text(encoding="utf-8")), path.parent.name
            hosts.setdefault(folder, result["host"])
            for variant, presets in result["variants"].items():
                for preset, numbers in presets.items():
                    place = (*PRESETS, preset).index(preset)
                    columns = rows.setdefault((did, variant != "transformer", place, preset), {})
                    for rival in numbers["ratio"].keys() & {"eager", "compile"}:
                        found = {rival: numbers["ratio"][rival][0]}
                        if peaks := numbers.get("peak_mb"):
                            found["memory"] = peaks["minitv"] / peaks[rival]
                        for column, value in found.items():
                            columns.setdefault(column, {}).setdefault(folder, []).append(value)

    def cell(of_machines: dict[str, list[float]]) -> str:
        values = [value for machine in of_machines.values() for value in machine]
        ends = " to ".join(dict.fromkeys(f"{end(values):.2f}" for end in (min, max))) if values else "–"
        return ends + " (one machine)" * (len(of_machines) == 1)

    body = [[f"{did}: {'all other variants' if others else 'transformer'}, `{preset}`",
             *(cell(columns.get(column, {})) for column in ("eager", "compile", "memory"))]
            for (did, others, _, preset), columns in sorted(rows.items(), key=lambda item: item[0]) if columns]
    named = "".join(f"- {machine(host)}\n" for host in hosts.values())
    return table(["", "× PyTorch eager", "× torch.compile", "memory / theirs"], body) + f"\nThe machines:\n\n{named}"


@of_machines
def train_bf16(result: dict) -> str:
    """A training step whose products are in bfloat16 against ours in float32 and PyTorch's autocast."""
    rows = [[f"{variant}, `{preset}`", f"{numbers['tokens_per_s']['minitv']:,.0f}",
             *(ratio(numbers["ratio"][name]) if name in numbers["ratio"] else "–" for name in ("float32", "eager", "compile"))]
            for variant, presets in result["variants"].items() for preset, numbers in presets.items()]
    header = ["training step, `--matmul bf16`", "tokens/s", "× ours in float32", "× PyTorch eager, autocast",
              "× torch.compile, autocast"]
    return table(header, rows) + where(result)


@of_machines
def cold(result: dict) -> str:
    """The first training step with an empty cache of kernels."""
    rows = [[f"{variant}, `{preset}`", f"{numbers['cold']['seconds']:.1f} s", f"{numbers['cold']['processor_seconds']:.1f} s",
             f"{numbers['cached']['seconds']:.2f} s"]
            for variant, presets in result["variants"].items() for preset, numbers in presets.items()]
    header = ["until the first step is taken", "empty cache", "of processors", "filled cache"]
    return table(header, rows) + where(result)


@of_machines
def ops(result: dict) -> str:
    """Operators against PyTorch, and the time of ours."""
    rows = [[f"{name}({numbers['inputs']})", rival, f"{numbers['minitv']['training_ms']:,.1f} ms", ratio(times["training"]),
             ratio(times["forward"])]
            for name, numbers in result["operators"].items() for rival, times in numbers["ratio"].items()]
    header = ["operator", "PyTorch", "forward and backward, ours", "× theirs", "× theirs, forward alone"]
    return table(header, rows) + where(result)


@of_machines
def decode(result: dict) -> str:
    """Writing text, one token at a time."""
    rows = [[f"{variant}, `{preset}`", f"{numbers['tokens_per_s']['minitv']:,.0f}", *of_memory(numbers, result["host"]),
             *ratios(numbers, "eager", "operators")]
            for variant, presets in result["variants"].items() for preset, numbers in presets.items()]
    return table(["writing text, batch 1", "tokens/s", "weights that a step reads", "of the speed of memory", "× PyTorch eager",
                  "× through our operators"], rows) + where(result)


@of_machines
def together(result: dict) -> str:
    """Writing several texts side by side."""
    rows = [[f"{variant}, `{preset.replace(', ', '`, ')}", f"{numbers['tokens_per_s']['minitv']:,.0f}",
             *ratios(numbers, "alone", "eager", "operators")]
            for variant, presets in result["variants"].items() for preset, numbers in presets.items()]
    return table(["writing several texts", "tokens/s", "× one text", "× PyTorch eager", "× through our operators"],
                 rows) + where(result)


def ratios(numbers: dict, *names: str) -> list[str]:
    """Our speed over that of each of them; – where it was not measured."""
    return [ratio(numbers["ratio"][name]) if name in numbers["ratio"] else "–" for name in names]


def of_memory(numbers: dict, host: dict) -> list[str]:
    """The weights that a step reads, and how much that is of what a core can read of memory."""
    if "bytes_of_step" not in numbers:
        return ["–", "–"]
    size, (speed, *_) = numbers["bytes_of_step"], host["limits"]["read_gb_s"]
    share = size * numbers["tokens_per_s"]["minitv"] / numbers["batch"] / (1e9 * speed)
    return [f"{size / 1e6:.1f} MB", f"{share:.0%}".replace("%", " %")]


@of_machines
def weights(result: dict) -> str:
    """Weights of another program here and there: writing, reading, memory, and how long they take to load."""
    columns = {"written_per_s": "tokens/s", "read_per_s": "tokens/s", "peak_mb": "MB", "load_s": "s"}
    labels = {"written_per_s": "writing, batch 1", "read_per_s": "reading 512 tokens", "peak_mb": "memory",
              "load_s": "loading"}
    rows = [[f"{shape}: {labels[key]}", f"{numbers[key]['minitv']:,.1f} {unit}", f"{numbers[key]['transformers']:,.1f} {unit}",
             ratio(numbers["ratio"][key])]
            for shape, numbers in result["shapes"].items() if numbers["ratio"] for key, unit in columns.items()]
    return table(["drawn weights, float32", "ours", "transformers", "ours / theirs"], rows) + where(result)


@of_machines
def scaling(result: dict) -> str:
    """Time per token of short and long sequences, in training and in writing."""
    short, long = (str(end(result["lengths"])) for end in (min, max))
    rows = [[variant, *(cell for part in ("training", "writing") for cell in
                        (f"{numbers[part][short]:,.1f}", f"{numbers[part][long]:,.1f}", ratio(numbers[f"{part}_ratio"]))),
             f"{numbers['state_bytes'] / 1e3:,.1f} kB" if "state_bytes" in numbers else "–"]
            for variant, numbers in result["variants"].items()]
    header = ["µs per token", *(f"{part}, {of}" for part in ("training", "writing")
                                for of in (f"T = {short}", f"T = {long}", "grows")), f"state, T = {long}"]
    return table(header, rows) + where(result) + picture(result, "scaling", "Time per token over the length of the sequence")


@of_machines
def alone(result: dict) -> str:
    """Steps on one long sequence, with one thread and with all."""
    counts = list(next(iter(result["variants"].values()))["ms"])
    rows = [[variant, *(f"{numbers['ms'][count]:,.0f}" for count in counts), ratio(numbers["ratio"])]
            for variant, numbers in result["variants"].items()]
    threads = (f"{count} thread{'s' * (count != '1')}" for count in counts)
    return table([f"ms a step, one sequence of {result['length']}", *threads, "× one thread"], rows) + where(result)


@of_machines
def scaling_long(result: dict) -> str:
    """Time per token of a training step over long sequences, and from which length on it is below the Transformer's."""
    lengths = list(map(str, result["lengths"]))
    rows = [[variant, *(f"{numbers['training'][length]:,.1f}" for length in lengths),
             "" if variant == "transformer" else shown(numbers.get("training_crossover"))]
            for variant, numbers in result["variants"].items()]
    header = ["µs per token of a training step", *(f"T = {length}" for length in lengths), "below the Transformer from"]
    return table(header, rows) + where(result) + picture(result, "scaling_long", "Time per token over long sequences")


def ranks_bytes() -> str:
    """What ranks that share a sequence send, over its length and over their number."""
    result = results("ranks_bytes")

    def cells(numbers: dict) -> list[str]:
        return [f"{value / 1e3:,.1f}" for value in numbers.values()]

    first = next(iter(result["variants"].values()))
    rows = [[variant, *cells(numbers["length"]), *cells(numbers["ranks"])] for variant, numbers in result["variants"].items()]
    rows.append(["all keys and values, by the formula", *cells(result["everything"]), *[""] * len(first["ranks"])])
    longest = result["lengths"][-1]
    header = [f"kB a step, {result['ranks']} ranks", *(f"T = {length}" for length in first["length"]),
              *(f"T = {longest}, {ranks} ranks" for ranks in first["ranks"])]
    return table(header, rows) + "\n![Bytes over the length of the sequence](results/ranks_bytes.png)\n"


@of_machines
def ranks_measured(result: dict) -> str:
    """Steps of one rank and of two."""
    rows = [[variant, numbers["shares"], *(f"{numbers['ms'][key]:,.0f}" for key in ("half", "one", "two")),
             ratio(numbers["strong"]), ratio(numbers["weak"])] for variant, numbers in result["variants"].items()]
    header = ["ms a step", "ranks share", "half of the work, 1 rank", "all, 1 rank", "all, 2 ranks", "efficiency, strong",
              "efficiency, weak"]
    return table(header, rows) + where(result).replace("1 thread", "1 thread a rank")


@of_machines
def ranks_simulated(result: dict) -> str:
    """A step replayed on up to thousands of ranks: where the time goes, and the efficiency."""
    rows = [[variant, ranks, *(f"{1e3 * parts[key]:,.0f}" for key in ("compute", "exchange", "gradients")),
             f"{parts['efficiency']:.3f}"]
            for variant, of_ranks in result["variants"].items() for ranks, parts in of_ranks.items()]
    header = ["ms a step", "ranks", "compute", "exchange and waiting", "sum of gradients", "efficiency"]
    about = (f"{result['layers']} layers of width {result['width']}, {result['tokens']} tokens a rank; a message of n bytes "
             f"takes {result['alpha_us']:.0f} µs + n / {result['beta_gb_s']:.0f} GB/s ({result['network']}).\n")
    return table(header, rows) + where(result) + about + picture(result, "ranks_simulated", "Efficiency by number of ranks")


def picture(result: dict, name: str, about: str) -> str:
    """The picture that a benchmark drew beside its result, for the page of benchmarks."""
    return f"\n![{about}](results/{result['folder']}/{name}.png)\n"


def learned(name: str) -> str:
    """What each variant learns in the same steps, the best first, and the baselines: a table of ``minitv compare`` that
    benchmarks/learning.py kept.
    """
    result, title = results(name), LEARNED[name]
    key, unit = result["metric"]["key"], result["metric"]["name"]
    axes, accuracies = [name for name in result["variants"][0]["swept"] if name != "lr"], result.get("accuracies") or {}
    told, rows = ["accuracy"] * bool(accuracies), []
    for row in result["variants"]:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        if bounds := row.get("interval"):
            spread += " (95 %: {:.3f} to {:.3f})".format(*bounds)
        rows.append([row["variant"], *(shown(row["swept"][name]) for name in axes), f"{row['parameters']:,}", f"{row['lr']:g}",
                     f"{row[key]:.3f}{spread}", *(f"{row[name]:.3f}" for name in told),
                     "–" if row["state_bytes"] is None else f"{row['state_bytes'] / 1e3:,.1f} kB"])
    blank = [""] * (2 + len(axes))
    rows += [[name, *blank, f"{value:.3f}", *(f"{accuracies[name]:.3f}" for _ in told), ""]
             for name, value in result["baselines"].items()]
    seeds = result["variants"][0]["seeds"]
    first = f"{title}, `{result['preset']}`, {result['steps']} steps"
    header = [first, *axes, "parameters", "learning rate", unit, *told, "state"]
    of_seeds = f"Means of {seeds} seeds ± their standard deviation" if seeds > 1 else "One seed"
    return table(header, rows) + where(result).replace("one run each.", f"{of_seeds}.")


def extrapolation() -> str:
    """How well each kind of positions reads windows that are longer than those of the training."""
    result = results("extrapolation")
    lengths = list(next(iter(result["positions"].values()))["windows"])

    def cell(value: float | None, spread: float | None = None) -> str:
        return "refused" if value is None else f"{value:.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    rows = [[name, *(cell(value, numbers.get("spread", {}).get(length)) for length, value in numbers["windows"].items()),
             cell(numbers["last_quarter"][lengths[-1]]), cell(numbers["sliding"])]
            for name, numbers in result["positions"].items()]
    header = [f"bits per character, trained at {result['context']}, {result['steps']} steps",
              *(f"windows of {length}" for length in lengths), f"last quarter of {lengths[-1]}", f"sliding {result['context']}"]
    seeds = f"means of {result['seeds']} seeds ± their standard deviation" if result["seeds"] > 1 else "one run each"
    return table(header, rows) + where(result).replace("one run each", seeds)


def streaming() -> str:
    """What a cache of fixed size costs, with and without the first tokens in it."""
    result, rows = results("streaming"), []

    def rise(values: dict) -> str:
        return f"{round(values['rise'], 3) + 0.0:+.3f} ± {values['error']:.3f}"  # 0.0 takes the sign of -0.0 away

    for kind, numbers in result["models"].items():
        for sinks, values in numbers["sinks"].items():
            rows.append([f"`{kind}`", f"{sinks} + {numbers['cache'] - int(sinks)}", f"{values['beyond']:.3f}", rise(values)])
        rows.append([f"`{kind}`", "recomputation", "", rise(numbers["recomputation"])])
    header = ["`--sink-kind`", "sinks + recent tokens", "bits per character beyond the cache", "rise over the reference"]
    return table(header, rows) + f"\n{result['verdict']}\n" + where(result)


def one_wide() -> str:
    """What sharing and dropping feed-forward networks does to weights, work, accuracy and the speed of writing."""
    result = results("one_wide")
    first = next(iter(result["modes"].values()))
    rules = list(first["accuracy"])
    places = [(preset, batch) for preset, batches in first["writing"].items() for batch in batches]
    rows = []
    for mode, numbers in result["modes"].items():
        sizes = numbers["sizes"]
        rows.append([mode, f"{sizes['unique']:,}", f"{sizes['executed']:,}", f"{sizes['encoder'] + sizes['memory']:,}",
                     f"{sizes['decoder']:,}",
                     *(f"{sum(numbers['accuracy'][rule]) / len(numbers['accuracy'][rule]):.3f}" for rule in rules),
                     *(ratio(numbers["writing"][preset][batch]["ratio"]) for preset, batch in places)])
    header = ["sharing and dropping", "weights", "executed", "products for a source's token", "for a target's",
              *(f"`{rule}`" for rule in rules), *(f"× writing, `{preset}`, {batch} at once" for preset, batch in places)]
    seeds = result["options"]["seeds"]
    return table(header, rows) + where(result) + (
        f"Accuracies are the share of targets without a mistake after {result['options']['steps']} steps, "
        f"{f'means of {seeds} seeds' if seeds > 1 else 'one seed'}. The speed of writing is a multiple of the Transformer's.\n")


@of_machines
def without(result: dict) -> str:
    """What each technique is worth: speed with it over speed without it, and the same of memory where that differs."""
    presets = next(iter(result["variants"].values()))
    techniques = dict.fromkeys(name for numbers in presets.values() for name in numbers["ratio"])

    def cell(numbers: dict, name: str) -> str:
        memory = f"{numbers['peak_mb']['minitv'] / numbers['peak_mb'][name]:.2f}"
        return ratio(numbers["ratio"][name]) + (f", {memory} of the memory" if memory != "1.00" else "")

    rows = [[name, *(cell(numbers, name) for numbers in presets.values())] for name in techniques]
    return table(["a training step with it, × without it", *(f"`{name}`" for name in presets)], rows) + where(result)


def duplication() -> str:
    """Reformer's Table 2 at a small size: models by what they were trained with, and what each is evaluated with."""
    result = results("duplication")
    rows = [[name, *(f"{value:.1f}" for value in row.values())] for name, row in result["accuracy"].items()]
    header = ["right answers in percent: trained with", *next(iter(result["accuracy"].values()))]
    return table(header, rows) + where(result)


def share(value: float) -> str:
    """A part of what is allowed; nothing where what is compared has no size."""
    return "–" if not value else "below 1 %" if value < 0.01 else f"{100 * value:.0f} %"


def check() -> str:
    """What `minitv check --all` has checked, and the largest error of each kind."""
    result = results("check")
    rows = [[row["what"], str(row["names"]), f"{row['calls']:,}", share(row["share"]), row["where"]]
            for row in result["summary"]]
    seconds = {name: f"{value:,.0f} s" for name, value in result["seconds"].items()}
    time = f", in {seconds['warm']}, or {seconds['cold']} where all kernels are compiled first" if seconds else ""
    verdict = "Everything holds" if result["ok"] else "Not everything holds"
    units = result["units"]
    return table(["what was checked", "of how many", "calls", "largest error / limit", "where"], rows) + (
        f"\n{verdict}: {units['operator']} operators, {units['variant']} variants, "
        f"{result['identities']} identities{time}.\n") + where(result)


def claims() -> str:
    """What a review says of the variants, what the papers say, what `minitv claims` measured, and the verdict."""
    result = results("claims")
    rows = [[number, row["system"], row["statement"], row["paper"], row["measured"], row["verdict"],
             f"`{row['command']}`"] for number, row in sorted(result["claims"].items(), key=lambda item: int(item[0]))]
    verdicts = [row[5] for row in rows]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in map(str, VERDICTS) if name in verdicts)
    header = ["", "system", "the review says", "the papers say", "measured here", "verdict", "shown by"]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    how = "" if result["full"] else " The sizes and trainings were those of `--fast`."
    return f"{text}{where(result).replace(': one run each.', '.')}\n{len(rows)} statements: {counts}.{how}\n"


def variants() -> str:
    """A page for every variant, folded up."""
    from minitv import variants

    pages = []
    for name, entry in variants.variants().items():
        rows = "".join(f"| {label} | {text} |\n" for label, text in variants.describe(entry.load()))
        pages.append(f"<details><summary><b>{name}</b>: {entry.summary}</summary>\n\n| | |\n|---|---|\n{rows}\n</details>\n\n")
    return "".join(pages)


LEARNED = {  # results of benchmarks/learning.py, and the first words of their tables
    "learning": "held-out text",
    "learning_attention": "held-out text",
    "masked": "hidden characters",
    "speech": "spoken digits",
    "pairs": "answers to strings",
    "images": "digits that are drawn",
    "audio": "strings and vowels",
    "mqar": "multi-query associative recall, `--token-shift`",
    "mqar_without_shift": "multi-query associative recall",
}
TABLES: dict[str, Callable[[], str]] = {
    **{writer.__name__: writer for writer in (train, train_bf16, cold, decode, together, weights, speed, ops, scaling, alone,
                                              scaling_long, extrapolation, duplication, streaming, one_wide, without, check,
                                              claims, variants, ranks_bytes, ranks_measured, ranks_simulated)},
    **{name: functools.partial(learned, name) for name in LEARNED},
}


def filled(text: str) -> str:
    """The page with every table made anew."""
    return MARKED.sub(lambda match: match["begin"] + TABLES[match["name"]]() + match["end"], text)


def main() -> int:
    stale = [page for page in PAGES if page.read_text(encoding="utf-8") != filled(page.read_text(encoding="utf-8"))]
    for page in stale:
        if "--check" in sys.argv[1:]:
            print(f"{page.relative_to(ROOT)} is not what benchmarks/results say: run python benchmarks/report.py")
        else:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
