"""The command line. NumPy, Numba and the library are imported inside the commands, so that help is immediate."""

from __future__ import annotations

import difflib
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import __version__, mixers
from .config import Options, Parser, Setting, choose, encode, from_json, read_toml, settings, shown, table, to_json
from .errors import CheckpointError, UserError, naming, plain
from .options import DEFAULT_PRESET, PRESETS, RESUMABLE, SYNONYMS, ModelOptions, SampleOptions, TrainOptions
from .report import plot

DEFAULT_VARIANT = "transformer"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the machine said no, 2 usage, 130 interrupted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = _dispatch(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as stop:  # argparse, after --help
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()  # a reader that is gone shows here
        return code
    except UserError as error:
        return _fail(error, error.code)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError as error:
        return _fail(f"not enough memory{': ' if str(error) else ''}{error}; try a smaller model, context or batch", 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except KeyboardInterrupt:
        print("\nminitv: stopped", file=sys.stderr)
        return 130


def _fail(message: object, code: int) -> int:
    print(f"minitv: error: {plain(str(message))}", file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(_overview(), end="", file=sys.stderr)
        return 2
    word = argv[0]
    if word == "help" and argv[1:] and argv[1] in COMMANDS:
        return COMMANDS[argv[1]][0](["--help"])
    if word in ("-h", "--help", "help"):
        print(_overview(), end="")
    elif word in ("-V", "--version"):
        print(f"minitv {__version__}")
    elif word in COMMANDS:
        return COMMANDS[word][0](argv[1:])
    elif word.startswith("-"):
        close = difflib.get_close_matches(word, ["--help", "--version"], 1, 0.75)
        hint = f"did you mean {close[0]}?" if close else "the command comes first, as in minitv train --steps 100"
        raise UserError(f"unknown option {word}; {hint}")
    else:
        choose("command", word, COMMANDS)
    return 0


# -- commands ----------------------------------------------------------------------------------------------------------


def _train(argv: list[str]) -> int:
    words, argv = (argv[:1], argv[1:]) if argv and not argv[0].startswith("-") else ([], argv)
    early = _train_parser()
    early.add_argument("--resume")
    seen = early.peek(argv)  # what decides which other options exist
    file = read_toml(seen["config"]) if "config" in seen else {}
    variant, source = (words[0], "command line") if words else (file.get("variant", DEFAULT_VARIANT), "default")
    if "variant" in file and not words:
        source = seen["config"]
    file.pop("variant", None)
    preset = seen.get("preset", file.pop("preset", None))
    resume = seen.get("resume", file.get("resume"))
    if resume is not None:
        label = "--resume" if "resume" in seen else f"{seen['config']}: resume"
        resume = settings(TrainOptions)["resume"].check(resume, label)
    if resume == "":
        raise UserError("--resume: an empty text is no folder")

    layers: list[tuple[str, dict[str, Any]]] = []
    stored: dict[str, Any] | None = None
    if resume not in (None, "none"):
        stored_variant, stored = _stored(resume)
        if source != "default" and variant != stored_variant:
            raise UserError(f"--resume {resume}: this is a run of {stored_variant}, it cannot continue as {variant}")
        variant, source = stored_variant, f"checkpoint {resume}"
    options = Options(ModelOptions, mixers.options(_variant(variant)), TrainOptions, elsewhere=mixers.elsewhere)
    if stored is None or preset is not None:
        name = choose("preset", str(preset or DEFAULT_PRESET), PRESETS)
        shared = mixers.preset(variant, name)
        layers.append((f"preset {name}", {k: v for k, v in shared.items() if k in options.settings}))
    if file:
        layers.append((seen["config"], file))
    values, _ = options.merge(*([(source, stored)] if stored else []), *layers)  # for the help

    parser = _train_parser()
    parser.prog += f" {variant}"
    parser.add_options(options, values)
    given = parser.parse(argv)
    print_config = given.pop("print_config", False)
    layers.append(("command line", {name: value for name, value in given.items() if name in options.settings}))
    if stored is not None:
        _only_resumable(resume, stored, layers, options)
        layers.insert(0, (source, stored))
    values, sources = options.merge(*layers)
    sources["variant"] = source
    model, mixer, run = options.build({**values, "out": values["out"] or f"runs/{variant}"})
    if print_config:
        _write(table(_rows(variant, (model, mixer, run), values, sources)))
        return 0
    from .train import train

    return train(variant, model, mixer, run)


def _compare(argv: list[str]) -> int:
    """The runs of `minitv compare`: every variant with every seed, each with the options that it has."""
    from autograd.random import Random

    from .compare import Run, compare

    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    argv = argv[len(words):]
    variants = [_variant(word) for word in words] or list(mixers.variants())
    if len(set(variants)) < len(variants):
        raise UserError(f"{max(variants, key=variants.count)} is given twice")
    every = {variant: Options(ModelOptions, mixers.options(variant), TrainOptions) for variant in variants}
    known = Options.union(every.values(), without=("resume", "sample_tokens"), elsewhere=mixers.elsewhere)
    parser = Parser(
        "minitv compare",
        synonyms=SYNONYMS,
        usage="minitv compare [VARIANT ...] [options]",
        description="Train several variants on the same text with the same batches, tokens and schedule, and compare them:\n"
        "bits per character of held-out text, speed, memory, size of the state, speed of writing. Each run is a process\n"
        "and a folder of its own; the same command continues what was interrupted, and trains nothing twice. With several\n"
        "seeds the table has means, and ± the standard deviation between seeds.",
        epilog="examples:\n  minitv compare\n  minitv compare transformer rwkv --preset nanogpt-cpu --data my.txt --seeds 3",
    )
    preset_names = "{" + ",".join(PRESETS) + "}"
    parser.add_argument("--preset", metavar=preset_names, help=f"a set of values (default: {DEFAULT_PRESET})")
    seeds = Setting("seeds", int, False, 1, "runs of each variant, with the seeds from --seed on", "", low=1, high=1000)
    parser.add_argument("--seeds", type=seeds.parse, metavar="N", help=f"{seeds.help} (default: 1)")
    preset = choose("preset", str(parser.peek(argv).get("preset", DEFAULT_PRESET)), PRESETS)
    layers = {variant: (f"preset {preset}", {k: v for k, v in mixers.preset(variant, preset).items() if k in options.settings})
              for variant, options in every.items()}
    found = [options.merge(layers[variant])[0] for variant, options in every.items()]
    defaults = {name: [values[name] for values in found if name in values] for name in known.settings}
    parser.add_options(known, {**{name: values[0] if all(value == values[0] for value in values) else "by variant"
                                  for name, values in defaults.items()}, "out": "runs/compare"})
    given = parser.parse(argv)
    given.pop("preset", None)
    number = given.pop("seeds", 1)
    directory = Path(given.pop("out", None) or "runs/compare")
    overwrite = given.pop("overwrite", False)
    runs = []
    for variant, options in every.items():
        chosen = "command line", {k: v for k, v in given.items() if k in options.settings}
        try:
            values, sources = options.merge(layers[variant], chosen)
            model, mixer, _ = options.build(values)
            mixers.load(variant)(Random(0), model, mixer)  # what does not fit is found now, not when its turn comes
        except UserError as error:
            raise UserError(f"{variant}: {error}") from None
        sources["variant"] = "command line"
        for seed in range(values["seed"], values["seed"] + number):
            folder = directory / f"{variant}-{seed}"
            own = {**values, "seed": seed, "out": str(folder), "sample_tokens": 0}
            configs = options.build(own)
            parts = dict(zip(("model", "mixer", "run"), map(to_json, configs), strict=True))
            runs.append(Run(variant, seed, folder, _rows(variant, configs, own, sources), parts, overwrite))
    return compare(sorted(runs, key=lambda run: run.seed), directory)


def _train_parser() -> Parser:
    parser = Parser(
        "minitv train",
        synonyms=SYNONYMS,
        usage="minitv train [VARIANT] [options]",
        description="Train a language model on text. "
        f"VARIANT is a name from `minitv list` (default: {DEFAULT_VARIANT}).\n"
        "Values come from the defaults, then --preset, then --config, then the command line.",
        epilog="examples:\n  minitv train\n"
        "  minitv train transformer --data my.txt --preset nanogpt-cpu --out runs/mine\n"
        "  minitv train --resume runs/mine --steps 4000",
    )
    names = "{" + ",".join(PRESETS) + "}"
    parser.add_argument("--preset", metavar=names, help=f"a set of values (default: {DEFAULT_PRESET})")
    parser.add_argument("--config", metavar="FILE.toml", help="values from a file, one `name = value` a line")
    text = "print every value and where it came from, and exit; the output is a --config file"
    parser.add_argument("--print-config", action="store_true", help=text)
    return parser


def _variant(name: object) -> str:
    return choose("variant", str(name), mixers.variants())


def _stored(directory: str) -> tuple[str, dict[str, Any]]:
    """The variant and all options of the run in a folder, from its last checkpoint."""
    from .checkpoint import STATE, exists, read_run

    config = read_run(directory).config
    if not exists(directory):
        raise UserError(f"--resume {directory}: this is one checkpoint, give the folder of the run, above it")
    values: dict[str, Any] = {}
    with naming(f"--resume {directory}: {STATE}", CheckpointError):
        variant = _variant(config.variant)
        for cls, part in ((ModelOptions, "model"), (mixers.options(variant), "mixer"), (TrainOptions, "run")):
            values |= to_json(from_json(cls, getattr(config, part), part))
    return variant, values | dict(out=directory, resume=directory, overwrite=False)


def _only_resumable(directory: str, stored: dict, layers: list, options: Options) -> None:
    """Refuse what would make the resumed run another run."""
    for source, layer in layers:
        for name, value in layer.items():
            setting, old = options.settings[name], stored[name]
            value = setting.check(value, f"{source}: {name}")
            if name == "out" and value is not None:
                value, old = os.path.abspath(value), os.path.abspath(old)
            if name in (*RESUMABLE, "resume") or value == old or (name == "out" and value is None):
                continue
            may = ", ".join(options.settings[n].flag for n in RESUMABLE)
            raise UserError(
                f"--resume {directory}: {setting.flag} is {shown(old)} in this run and cannot become {shown(value)} "
                f"({source}); what may change: {may}"
            )


def _rows(variant: str, configs, values: dict[str, Any], sources: dict[str, str]) -> list[tuple[str, str, Any, str]]:
    """Every value and where it came from."""
    rows = [("minitv train", "variant", variant, sources["variant"])]
    for config in configs:
        for name, setting in settings(type(config)).items():
            value, derived = values[name], getattr(config, name)
            follows = f", here {shown(derived)}" if value is None and derived is not None else ""  # from other values
            rows.append((setting.group, name, value, sources[name] + follows))
    return rows


def _sample(argv: list[str]) -> int:
    parser = Parser(
        "minitv sample",
        synonyms=SYNONYMS,
        usage="minitv sample DIR [options]",
        description="Write text with a trained model. DIR is the folder of a run.",
        epilog='examples:\n  minitv sample runs/transformer --prompt "def " --tokens 300\n'
        "  echo -n 'ROMEO:' | minitv sample runs/mine --prompt - --temperature 0.7 --top-k 20",
    )
    parser.add_argument("directory", metavar="DIR", help="the folder of a run")
    options = Options(SampleOptions)
    parser.add_options(options)
    given = parser.parse(argv)
    directory = given.pop("directory")
    values, _ = options.merge(("command line", given))
    (config,) = options.build(values)
    if config.prompt == "-":
        config = replace(config, prompt=_standard_input())
    from .sample import stream

    text, last = config.prompt, ""
    for piece in stream(directory, config):
        sys.stdout.write(text + piece)  # the prompt goes out with the first piece: after all checks have passed
        sys.stdout.flush()
        last, text = text + piece or last, ""
    if not last.endswith("\n"):
        print(text)
    return 0


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("--prompt -: there is no standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8 at byte {error.start}") from None


def _list(argv: list[str]) -> int:
    _plain("list", "List the variants and the presets.", argv)
    print("variants (minitv train VARIANT)")
    _columns(mixers.variants().items())
    print("\npresets (--preset NAME)")
    for name, preset in PRESETS.items():
        known = Options(ModelOptions, TrainOptions)
        values, _ = known.merge(("preset", {k: v for k, v in preset.items() if k in known.settings}))
        summary = "context {context}, {layers} layers, width {width}, batch {batch}, {steps} steps".format(**values)
        _columns([(name, summary + (" (the default)" if name == DEFAULT_PRESET else ""))])
    return 0


def _info(argv: list[str]) -> int:
    parser = Parser(
        "minitv info",
        usage="minitv info [--gpu]",
        description="Show versions, processor, threads and GPU: what minitv finds on this machine.",
        epilog="example:\n  minitv info --gpu",
    )
    parser.add_argument("--gpu", action="store_true", help="compile and run a kernel on every GPU, and report")
    if parser.parse(argv).get("gpu"):
        return _info_gpu()
    import platform
    from importlib.metadata import PackageNotFoundError, version

    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    rows = [("minitv", __version__), ("python", system)]
    for name in ("numpy", "numba", "scipy", "safetensors", "matplotlib"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, 'not installed; for curve.png: pip install "minitv[plot]"'))
    import numpy  # noqa: F401 - loads the BLAS that is shown below
    from threadpoolctl import threadpool_info

    from autograd.cpu import compile as compiler
    from autograd.cpu import disk, gemm
    from autograd.cpu.process import cores

    rows.append(("cupy", _cupy()))
    rows.append(("cores", f"{cores()} usable of {os.cpu_count()}"))
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            name = " ".join(str(pool[key]) for key in ("internal_api", "version", "architecture") if pool.get(key))
            rows.append(("BLAS", f"{name}, {pool['num_threads']} threads (1 while training)"))
    serial = f"serial kernels on {cores()} worker threads while training (--threads sets both)"
    rows.append(("Numba", compiler.unavailable() or serial))
    state, folder = "compiled" if disk.cached() else "empty: the first run compiles", disk.cache_directory()
    rows.append(("kernel cache", f"{folder} ({state})" if folder else "none: no folder will do, every run compiles"))
    rows.append(("vectors", "512-bit" if compiler.WIDE_VECTORS else "at most 256-bit: the processor has no AVX-512"))
    own = f"our kernel, in tiles of {gemm.ROWS} x {gemm.WIDE}; BLAS for small ones and in float64"
    other = "BLAS" if compiler.unavailable() else "BLAS: our kernel is faster with AVX-512 only"
    rows.append(("products", own if gemm.suits(512, 512, 512) else other))
    _columns(rows)
    return 0


def _cupy() -> str:
    from importlib.util import find_spec

    if find_spec("cupy") is None:
        return 'not installed; for a GPU: pip install "minitv[cuda13]" or "minitv[cuda12]"'
    return "installed; `minitv info --gpu` tries it"


def _info_gpu() -> int:
    """Run one of our kernels on each card."""
    import time

    import numpy as np

    from autograd import Tensor, gelu, use
    from autograd.device import gpu

    from .errors import device_errors

    with device_errors():
        cupy = gpu()
    runtime = cupy.cuda.runtime
    versions = f"runtime {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}"
    rows = [("cupy", cupy.__version__), ("CUDA", versions)]
    x, good = np.linspace(-3, 3, 1000, dtype=np.float32), True
    for number in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(number)
        rows.append((f"cuda:{number}", f"{properties['name'].decode()}, {properties['totalGlobalMem'] / 2**30:.1f} GiB, "
                                       f"compute capability {properties['major']}.{properties['minor']}"))
        start = time.perf_counter()
        with cupy.cuda.Device(number), use("gelu", kernel="cuda"):
            found = gelu(Tensor(x).to(f"cuda:{number}")).numpy()
        right = bool(np.abs(found - gelu(x).numpy()).max() < 1e-6)
        good &= right
        rows.append(("", f"a kernel of ours compiled and run in {time.perf_counter() - start:.2f} s, "
                         f"{'equal to the CPU' if right else 'and WRONG'}"))
    _columns(rows)
    return 0 if good else 1


def _explain(argv: list[str]) -> int:
    parser = Parser(
        "minitv explain",
        usage="minitv explain [NAME]",
        description="Show a variant: its formula, cost and state, what it equals, where paper and code differ.\n"
        "Or an operator: its formula, shapes, forms and kernels. Without NAME, list all operators.",
        epilog="examples:\n  minitv explain transformer\n  minitv explain layer_norm",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of a variant or of an operator")
    name = parser.parse(argv).get("name")
    import inspect

    import minitv.ops  # noqa: F401 - declares the variants' operators
    from autograd import REGISTRY

    if name is None:
        _columns((op.name, str(op.signature)) for op in sorted(REGISTRY.values(), key=lambda op: op.name))
        return 0
    if name in mixers.variants():
        print(f"{name}: {mixers.variants()[name]}\n")
        _columns(mixers.describe(name))
        return 0
    if name not in REGISTRY:
        known = [*mixers.variants(), *REGISTRY]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else "`minitv explain` lists all operators, `minitv list` all variants"
        raise UserError(f"unknown variant or operator {name!r}; {hint}")
    op = REGISTRY[name]
    print(f"{op.name}: {op.signature}\n")
    page = inspect.getmodule(op.definition)
    alone = sum(other.definition.__module__ == page.__name__ for other in REGISTRY.values()) <= 2
    for text in (op.__doc__, page.__doc__ if alone else None):  # a page that many share speaks of none of them
        if text:
            print(inspect.cleandoc(text) + "\n")
    rows = [
        ("page", inspect.getsourcefile(op.definition) or "none"),
        ("options", ", ".join(f"{key}={value}" for key, value in op.params.items()) or "none"),
        ("forms", ", ".join(op.forms) or "none"),
        ("kernels", ", ".join(op.kernels) or "none: the form runs"),
        *(("law", str(law)) for law in op.laws),
        ("differentiable", "yes" if op.differentiable else "no"),
    ]
    _columns(rows)
    return 0


def _plot(argv: list[str]) -> int:
    parser = Parser(
        "minitv plot",
        usage="minitv plot DIR [--out FILE]",
        description="Draw the curve of a run from DIR/log.jsonl, beside its n-gram baselines.",
        epilog="example:\n  minitv plot runs/transformer",
    )
    parser.add_argument("directory", metavar="DIR", help="the folder of a run")
    parser.add_argument("--out", metavar="FILE", help="picture to write: .png, .svg or .pdf (default: DIR/curve.png)")
    given = parser.parse(argv)
    print(plot(given["directory"], given.get("out")))
    return 0


def _plain(name: str, description: str, argv: list[str]) -> None:
    command = f"minitv {name}"
    Parser(command, usage=command, description=description, epilog=f"example:\n  {command}").parse(argv)


def _write(text: str) -> None:
    """Print a table; the bytes of a file name that are not UTF-8 go out as they are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        sys.stdout.flush()
        sys.stdout.buffer.write(encode(text + "\n"))
    else:
        print(text)


def _columns(rows: Any) -> None:
    rows = list(rows)
    width = max([14, *(len(name) for name, _ in rows)])
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a model on text"),
    "compare": (_compare, "train several variants alike, and compare them"),
    "sample": (_sample, "write text with a trained model"),
    "list": (_list, "list the variants and presets"),
    "info": (_info, "show versions, processor, threads, GPU"),
    "explain": (_explain, "show a variant or an operator: formula, cost, forms, kernels"),
    "plot": (_plot, "draw the curve of a run"),
}


def _overview() -> str:
    commands = "\n".join(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: minitv COMMAND [options]

Transformer variants from scratch, on a small autograd engine.

commands:
{commands}

options:
  -h, --help     show this help; minitv COMMAND --help for a command's
  -V, --version  show the version

examples:
  minitv train                            a minute or two, no file and no network needed
  minitv train --data my.txt --out runs/mine
  minitv sample runs/mine --prompt "Once "
"""
