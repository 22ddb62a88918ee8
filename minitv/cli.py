"""The command line. NumPy, Numba and the library are imported inside the commands, so that help is immediate."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import __version__, tasks, variants, weights
from .claims import chosen
from .config import Options, Parser, Setting, choose, encode, read_toml, table
from .errors import UserError, naming, plain
from .job import here
from .options import (
    DEFAULT_PRESET,
    ONE_TEXT,
    PRESETS,
    SYNONYMS,
    CheckOptions,
    ClaimsOptions,
    ConvertOptions,
    EvalOptions,
    ExploreOptions,
    ExportOptions,
    ImportOptions,
    ModelOptions,
    SampleOptions,
    StreamOptions,
    TrainOptions,
    TranscribeOptions,
)
from .picture import plot, plot_readings
from .report import columns, count, reflow, tell, wrap
from .signals import Stop


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
            with contextlib.redirect_stderr(_Unheard(sys.stderr)), Stop():
                code = _dispatch(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as end:  # argparse, after --help
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()  # a reader that is gone shows here
        return code
    except UserError as error:
        return _fail(error, error.code, error.lines)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError as error:
        return _fail(f"not enough memory{': ' if str(error) else ''}{error}; try a smaller model, context or batch", 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except KeyboardInterrupt as stop:
        return _fail(None, getattr(stop, "code", 130))


def _fail(message: object, code: int, lines: tuple[str, ...] = ()) -> int:
    """Say why the command ends, with lines to copy below the sentence; None: it was stopped."""
    text = None if message is None else "\n    ".join(plain(line) for line in (str(message), *lines))
    if (agreed := here().fail(text, code)) is not None:
        return agreed
    print("\nminitv: stopped" if text is None else f"minitv: error: {text}", file=_Unheard(sys.stderr))
    return code


class _Unheard:
    """A stream for messages. When its reader leaves, as `head` does, what is written goes nowhere, and the command goes on."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._heard(self._stream.write, text)

    def flush(self) -> None:
        self._heard(self._stream.flush)

    def _heard(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return call(*arguments)


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
    for name in ("--resume", "--init-from"):
        early.add_argument(name)
    choices = early.peek(argv)  # what decides which other options exist
    file = read_toml(choices["config"]) if "config" in choices else {}
    from .request import NAMES, Request

    chosen, sources = {}, {}
    for name in NAMES:
        value, source = file.pop(name, None), choices.get("config", "")
        if name in choices or (name == "variant" and words):
            value, source = choices.get(name, words and words[0]), "command line"
        chosen[name], sources[name] = value, source if value is not None else "default"
    request = Request(chosen, sources, (choices["config"], file) if file else None)

    parser = _train_parser()
    parser.prog += f" {request.variant.name}"
    parser.add_options(request.options, request.values)
    arguments = parser.parse(argv)
    print_config = arguments.pop("print_config", False)
    layer = {name: value for name, value in arguments.items() if name in request.options.settings}
    experiment, origins = request.experiment(("command line", layer))
    if print_config:
        _write(table(experiment.rows(origins)))
        return 0
    from .training import train

    return train(experiment).code


def _compare(argv: list[str]) -> int:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    argv = argv[len(words):]
    parser = Parser(
        "minitv compare",
        synonyms=SYNONYMS,
        usage="minitv compare [VARIANT ...] [options]",
        description="Train several variants on the same data with the same batches, tokens and schedule, and compare them:\n"
        "the task's metric on held-out data, speed, memory, size of the state, speed of writing. Each run is a process\n"
        "and a folder of its own; the same command continues what was interrupted, and trains nothing twice. With several\n"
        "seeds the table has means, and ± the standard deviation between seeds. An option with several values, as in\n"
        "--lr 1e-3,3e-3, is a sweep: each variant stands in the table with the value that gave the lowest held-out loss.\n"
        "An option that is on or off is swept by both of its forms, as in --bias --no-bias.",
        epilog="examples:\n  minitv compare\n  minitv compare transformer rwkv --preset nanogpt-cpu --data my.txt --seeds 3",
    )
    _preset_option(parser)
    parser.add_argument("--task", metavar="NAME", help="what the models are for (default: text, or what the first one reads)")
    seeds = Setting("seeds", int, False, 1, "runs of each variant, with the seeds from --seed on", "", low=1, high=1000)
    parser.add_argument("--seeds", type=seeds.parse, metavar="N", help=f"{seeds.help} (default: 1)")
    early = parser.peek(argv)

    from .compare import DIRECTORY, Plan, compare

    plan = Plan(words, task=early.get("task"), preset=early.get("preset"))
    parser.add_options(plan.options, plan.defaults, several=True)
    options = parser.parse(argv)
    for name in ("preset", "task"):
        options.pop(name, None)
    number, overwrite = options.pop("seeds", 1), options.pop("overwrite", False)
    directory = Path(options.pop("out", None) or DIRECTORY)
    return compare(plan.runs(options, directory=directory, seeds=number, overwrite=overwrite, source="command line"), directory)


def _preset_option(parser: Parser) -> None:
    names = "{" + ",".join(PRESETS) + "}"
    parser.add_argument("--preset", metavar=names, help=f"a set of values (default: {DEFAULT_PRESET})")


def _train_parser() -> Parser:
    parser = Parser(
        "minitv train",
        synonyms=SYNONYMS,
        usage="minitv train [VARIANT] [options]",
        description="Train a model: a language model on text, unless --task asks for something else.\n"
        "VARIANT is a name from `minitv list` (default: transformer).\n"
        "Values come from the defaults, then --preset, then --config, then the command line.",
        epilog="examples:\n  minitv train\n"
        "  minitv train transformer --data my.txt --preset nanogpt-cpu --out runs/mine\n"
        "  minitv train rwkv --task mqar\n"
        "  minitv train --resume runs/mine --steps 4000\n"
        "  mpiexec -n 4 minitv train longnet --batch 64\n"
        "Several processes (mpiexec, or srun) share the sequences of each step, and give the weights that one\n"
        'gives. It needs pip install "minitv[mpi]"; any number of them goes on with a run.',
    )
    text = "what the model is trained for, a name from `minitv list` (default: text, or what the variant reads)"
    parser.add_argument("--task", metavar="NAME", help=text)
    _preset_option(parser)
    parser.add_argument("--config", metavar="FILE.toml", help="values from a file, one `name = value` a line")
    text = "print every value and where it came from, and exit; the output is a --config file"
    parser.add_argument("--print-config", action="store_true", help=text)
    return parser


def _sample(argv: list[str]) -> int:
    parser = Parser(
        "minitv sample",
        synonyms=SYNONYMS,
        usage="minitv sample DIR [options]",
        description="Write text with a trained model. DIR is the folder of a run. A model of images or sound writes\n"
        "a file: sample.png, or sample.wav. A model of pairs answers the prompt, and does not repeat it.",
        epilog='examples:\n  minitv sample runs/transformer --prompt "def " --tokens 300\n'
        "  echo -n 'ROMEO:' | minitv sample runs/mine --prompt - --temperature 0.7 --top-k 20\n"
        "  minitv sample runs/mine/best --count 3\n  minitv sample runs/digits --count 25 --complete 0.5 --out digits.png\n"
        "  minitv sample runs/one-wide-ffn-pairs --prompt 31415 --beam 4",
    )
    directory, config = _of_a_run(parser, SampleOptions, argv)
    read = config.prompt == "-"
    if read:
        config = replace(config, prompt=_standard_input())
    from .sample import open_run, texts, write_file

    run = open_run(directory, config.checkpoint, config.device, "write",
                   others=lambda run: run.answers or bool(run.experiment.task.suffix))
    if run.experiment.task.suffix:
        path, what = write_file(run, directory, config)
        print(f"{path}: {what}")
        return 0
    if read and run.answers:  # the end of a line is no part of a source
        config = replace(config, prompt=config.prompt.removesuffix("\n").removesuffix("\r"))
    several = (config.count or 1) > 1
    for number, (seed, pieces) in enumerate(texts(run, config), 1):
        heading = f"--- text {number} of {config.count}, seed {seed} ---\n" if several else ""
        text, last = heading + ("" if run.answers else config.prompt), ""
        for piece in pieces:
            sys.stdout.write(text + piece)  # the prompt goes out with the first piece: after all checks have passed
            sys.stdout.flush()
            last, text = text + piece or last, ""
        if not last.endswith("\n"):
            print(text)
    return 0


def _parsed(parser: Parser, kind: type, argv: list[str]) -> tuple[Any, dict[str, Any]]:
    """A command's options, and everything that was given, by name."""
    options = Options(kind)
    parser.add_options(options)
    given = parser.parse(argv)
    values, _ = options.merge(("command line", {name: value for name, value in given.items() if name in options.settings}))
    (config,) = options.build(values)
    return config, given


def _of_a_run(parser: Parser, kind: type, argv: list[str], *others: str) -> tuple[Any, ...]:
    """The folder that a command reads, and the command's options; between them what stands in ``others``, by name."""
    text = "the folder of a run, or of one of its checkpoints (DIR/best)"
    parser.add_argument("directory", metavar="DIR", help=text)
    for name in others:
        parser.add_argument(name, metavar="FILE", nargs="*", help="recordings, WAV or FLAC")
    config, given = _parsed(parser, kind, argv)
    directory, more = given["directory"], [given.get(name) for name in others]
    if "checkpoint" in given:
        from .checkpoint import run_folder

        name = Path(directory).name
        if run_folder(directory) != Path(directory) and name != config.checkpoint:
            raise UserError(f"--checkpoint {config.checkpoint}: {directory} is the checkpoint {name!r}; "
                            "give the folder of the run")
    return directory, *more, config


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("--prompt -: there is no standard input")
    if sys.stdin.isatty():
        ends = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D on an empty line"
        print(f"type the prompt, and end it with {ends}", file=sys.stderr, flush=True)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: standard input is not UTF-8 at byte {error.start}") from None
    except OSError as error:  # a folder, for example
        raise UserError(f"--prompt -: standard input cannot be read: {error.strerror or error}") from None


def _eval(argv: list[str]) -> int:
    parser = Parser(
        "minitv eval",
        synonyms=SYNONYMS,
        usage="minitv eval DIR (--data PATH | --text TEXT) [options]",
        description="Say how well a trained model predicts a text: its loss in nats per token, and bits per character.\n"
        "Every token after the first is predicted from those before it in its window of the model's\n"
        "context, as in training. With --per-character each character of the text, or each token of several,\n"
        "stands in a line with its surprise: the bits that it cost, -log2 of the probability that the model gave it.\n"
        "0 bits: the model was sure; 1 bit: it gave the character one half. A model of another task is asked for\n"
        "what its run held out, and one of images, sound, pairs or speech, if there is --data, for all of that.",
        epilog="examples:\n  minitv eval runs/mine --data other.txt\n"
        '  minitv eval runs/mine/best --text "def main(self):" --per-character\n'
        "  minitv eval runs/conformer --data my-recordings",
    )
    directory, config = _of_a_run(parser, EvalOptions, argv)
    from .evaluate import Read, evaluate, read_text
    from .sample import open_run

    run = open_run(directory, config.checkpoint, config.device, "predict the next token",
                   others=lambda run: run.experiment.task.judged is not None)
    model = run.model
    if config.strided:
        from .models.megabyte import strided

        model = strided(model)
    if run.experiment.task.judged:
        _columns(_judged(run, model, directory, config))
        return 0
    tokenizer = run.tokenizer
    if not config.data and config.text is None:
        raise UserError(ONE_TEXT)
    if config.text is not None:
        with naming("--text"):
            read = Read(tokenizer.encode(config.text), tokenizer.length(config.text), "--text", None)
    else:
        read = read_text(config.data, tokenizer, config.encoding)
    with naming(read.description):
        result = evaluate(model, read.ids, read.characters)
    passes = ", in two passes" if getattr(model, "stride", 0) else ""
    rows = [
        ("model", f"{run.experiment.variant.name} of {directory}, step {run.step}"),
        ("text", f"{read.description}: {count(read.characters)} character{'s' * (read.characters != 1)}"),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("bits", f"{result.bits_per_character:.4f} per character, {result.bits_per_token:.4f} per token"),
        ("predicted", f"{len(result.surprise)} tokens, all but the first, in windows of {model.context}{passes}"),
    ]
    if read.sha256 is not None and read.sha256 == run.saved.get("corpus_sha256"):
        rows.append(("note", "this is the text that the model was trained on: it has seen most of it"))
    _columns(rows)
    if config.per_character:
        print("\n  offset    bits  character  # = half a bit")
        offset = 0
        for character, bits in result.characters(tokenizer):  # a token may be several characters
            cost = f"{'-':>6}" if bits != bits else f"{bits:6.2f}"  # nothing comes before the first
            print(f"{offset:>8}  {cost}  {ascii(character) if character.isspace() else repr(character):<9}  "
                  f"{'#' * min(60, round(2 * bits)) if bits == bits else ''}".rstrip())
            offset += len(character)
    return 0


def _judged(run: Any, model: Any, directory: str, config: EvalOptions) -> list[tuple[str, str]]:
    """How well a model predicts data that is no text to continue, beside its baselines."""
    from .evaluate import judge

    experiment = run.experiment
    if config.text is not None or config.per_character:
        flag = "--per-character" if config.text is None else "--text"
        raise UserError(f"{flag}: the task {experiment.task.name} has no text to continue")
    if config.encoding != "utf-8" and not hasattr(experiment.data, "encoding"):
        raise UserError(f"--encoding: the data of the task {experiment.task.name} is no text file")
    saved = run.saved
    if config.data:
        experiment = experiment.replace(data=config.data, encoding=config.encoding, val_data=None)
        saved = experiment.task.of_other_data(saved)
    task = experiment.begin(saved)
    sums = judge(task, model)
    value, answers, passes = task.value(sums), task.asked(sums), ", in two passes" if getattr(model, "stride", 0) else ""
    label, part, items = task.judged
    bounds = task.interval(sums)
    between = f" (95 %: {bounds[0]:.4f} to {bounds[1]:.4f})" if bounds else ""
    return [
        ("model", f"{experiment.variant.name} of {directory}, step {run.step}"),
        ("data", f"{task.description}, {'all of it' if config.data else 'what is held out'}"),
        *(("note", text) for text in task.remarks(sums)),
        ("loss", f"{sums[0] / max(sums[1], 1):.4f} nats per {part}"),
        (label, f"{value:.4f}{between}{'' if label == task.metric else f' {task.metric}'}, {task.verdict(value, answers)}"),
        *([("accuracy", f"{accuracy:.4f}")] if (accuracy := task.accuracy(sums)) is not None else []),
        ("predicted", f"{count(answers)} {items if answers != 1 else items[:-1]}{passes}"),
        *(row for row in task.about() if row[0] == "baselines"),
    ]


def _convert(argv: list[str]) -> int:
    parser = Parser(
        "minitv convert",
        synonyms=SYNONYMS,
        usage="minitv convert DIR [options]",
        description="Give a trained Transformer fewer heads of keys and values (grouped-query or multi-query attention), so\n"
        "that its cache is smaller when it writes. The new model needs a little more training.",
        epilog="examples:\n  minitv convert runs/transformer --kv-heads 1 --out runs/shared\n"
        "  minitv train --init-from runs/shared --steps 200 --out runs/shared-trained",
    )
    directory, config = _of_a_run(parser, ConvertOptions, argv)
    from .convert import convert

    out = convert(directory, config)
    print(f"{out}: heads of keys and values: {config.kv_heads}; train it with: minitv train --init-from {out}")
    return 0


def _import(argv: list[str]) -> int:
    parser = Parser(
        "minitv import",
        synonyms=SYNONYMS,
        usage="minitv import FOLDER|FILE [options]",
        description="Make a run of a model of another program, as the package transformers keeps it: a folder with\n"
        "config.json and model.safetensors, which may be in parts. Nothing is downloaded, and no pickle is loaded.\n\n"
        "architectures:\n" + "\n".join(f"  {name:<18} {entry.summary}" for name, entry in weights.architectures().items()),
        epilog='examples:\n  minitv import gpt2-folder --out runs/gpt2\n  minitv sample runs/gpt2 --prompt "Once "\n'
        "  minitv train --init-from runs/gpt2 --data my.txt --lr 1e-4 --out runs/mine",
    )
    parser.add_argument("source", metavar="FOLDER", help="folder of a model, or its file model.safetensors")
    config, given = _parsed(parser, ImportOptions, argv)
    from .exchange import import_weights

    out, found = import_weights(given["source"], config)
    variant = found.experiment.variant
    _columns([
        ("model", f"{found.architecture.name}, here {variant.name}: {count(found.parameters)} parameters, from {found.dtypes}"),
        ("vocabulary", found.vocabulary),
        ("folder", str(out)),
    ])
    if variant.causal or found.experiment.task.reads != "tokens":
        print(found.experiment.task.after.format(directory=out))
    return 0


def _export(argv: list[str]) -> int:
    parser = Parser(
        "minitv export",
        synonyms=SYNONYMS,
        usage="minitv export DIR [options]",
        description="Write the model of a run for other programs: config.json and model.safetensors, which the package\n"
        "transformers loads. What this package cannot express is refused, with the reason.\n"
        f"Known architectures: {', '.join(weights.architectures())}.",
        epilog="examples:\n  minitv export runs/mine --format huggingface --out my-model",
    )
    directory, config = _of_a_run(parser, ExportOptions, argv)
    from .checkpoint import read_run
    from .exchange import TOKENIZER, export

    out, architecture = export(directory, config)
    print(f"{out}: {architecture.name}, load it with: {architecture.loader(str(out))}")
    units = {"char": f"a character of the alphabet in {directory}", "byte": "a byte"}
    if unit := units.get(read_run(directory, config.checkpoint).task.get("tokenizer", {}).get("kind")):
        print(f"note: no {TOKENIZER} is written: a token is {unit} here, and other programs read and write the ids themselves")
    return 0


def _stream(argv: list[str]) -> int:
    parser = Parser(
        "minitv stream",
        synonyms=SYNONYMS,
        usage="minitv stream DIR [options]",
        description="Read a text of any length in constant memory with a trained Transformer whose positions are relative,\n"
        "and say how well it predicts each range of positions: with a cache of the recent tokens alone; with the\n"
        "first tokens kept besides, as in StreamingLLM; and by reading the context anew for every token.\n"
        "The picture is stream.png in the folder of the run.",
        epilog="examples:\n  minitv train attention-sinks --data my.txt --out runs/mine\n"
        "  minitv stream runs/mine --data other.txt --window 59 --sinks 4\n"
        "  minitv sample runs/mine --window 59 --sinks 4",
    )
    directory, config = _of_a_run(parser, StreamOptions, argv)
    from .stream import stream

    result = stream(directory, config)
    _columns(result.about())
    print("\nbits per character, by the number of tokens before\n" + "\n".join(result.table()))
    try:
        print(f"picture: {result.draw(config.out)}")
    except UserError as error:
        if config.out is not None:
            raise
        tell(f"no picture: {error}")
    return 130 if result.stopped else 0


def _explore(argv: list[str]) -> int:
    parser = Parser(
        "minitv explore",
        synonyms=SYNONYMS,
        usage="minitv explore DIR [DIR ...] [options]",
        description="Write a page for a browser that shows what a trained model does: its learning curve, a text coloured by\n"
        "how well each token was predicted, and for every layer and head which position takes how much of\n"
        "which other one. The page is one file and needs no network. Of several runs, or of a folder of\n"
        "`minitv compare`, two are shown side by side on the same text.",
        epilog="examples:\n  minitv explore runs/mine\n  minitv explore runs/mine runs/rwkv --text other.txt --out both.html\n"
        "  minitv explore runs/compare",
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", help="the folders of runs, or one of `minitv compare`")
    config, given = _parsed(parser, ExploreOptions, argv)
    from .explore import explore

    print(explore(given["directories"], config))
    return 0


def _transcribe(argv: list[str]) -> int:
    parser = Parser(
        "minitv transcribe",
        synonyms=SYNONYMS,
        usage="minitv transcribe DIR FILE.wav [FILE.wav ...] [options]",
        description="Write down what is said in recordings, with a model that was trained on speech. A recording of another\n"
        "rate is resampled. With --stream, words appear while the sound is read.",
        epilog="examples:\n  minitv train conformer --out runs/mine\n  minitv transcribe runs/mine hello.wav --beam 8\n"
        '  minitv transcribe runs/mine --say "three one four" --picture heard.png',
    )
    directory, paths, config = _of_a_run(parser, TranscribeOptions, argv, "files")
    from .transcribe import transcribe

    transcribe(directory, paths or (), config)
    return 0


def _check(argv: list[str]) -> int:
    parser = Parser(
        "minitv check",
        synonyms=SYNONYMS,
        usage="minitv check NAME [NAME ...] [options]",
        description="Prove operators and variants on this machine: every form and kernel against the definition, in values\n"
        "and in the gradients of every input and state; gradients against derivatives; laws; identities with others;\n"
        "other libraries' results. Of a variant also its operators, and models of it: that kernels are forms, that\n"
        "writing is reading, that nothing depends on what comes later. The table says the largest relative error\n"
        "and what is allowed. A failure is made as small as it can be, and printed as a line of Python.\n"
        "NAME is a variant, an operator, or an operator of your own as MODULE:NAME. Your module is imported,\n"
        "that is, it runs: check none that you do not trust.",
        epilog='examples:\n  minitv check retnet\n  minitv check retention --shape "B=2 T=1000 H=4 K=64" --scale 1,10,100\n'
        "  minitv check my_module:my_op --dtype float64\n  minitv check --all",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="a variant, an operator, or MODULE:NAME")
    config, given = _parsed(parser, CheckOptions, argv)
    from .check import report

    return report(given.get("names") or (), config)


def _claims(argv: list[str]) -> int:
    parser = Parser(
        "minitv claims",
        usage="minitv claims [NUMBER|SYSTEM ...] [--fast|--full] [--json FILE]",
        description="Measure the statements of a review of Transformer variants on this machine, all or some: what the review\n"
        "says, what the paper says, what was measured, and a verdict that follows from both. Times are fitted\n"
        "over sizes, states counted, models trained. A verdict needs a quiet machine: where times are too noisy\n"
        "to tell, it says so.",
        epilog="examples:\n  minitv claims transformer 5 6\n  minitv claims --full --json claims.json",
    )
    parser.add_argument("words", metavar="NUMBER|SYSTEM", nargs="*", help="statements by number or by system (default: all)")
    config, given = _parsed(parser, ClaimsOptions, argv)
    from .review import examine, rows, summary

    records, start = [], time.perf_counter()
    statements, path = chosen(given.get("words") or ()), None if config.json is None else Path(config.json)
    for claim, record in examine(statements, config.full, path):
        _heading(f"{claim.number}  {claim.system}: {record.get('verdict', 'failed')}")
        _columns(rows(claim, record))
        print(flush=True)
        records.append(record)
    _heading(summary(records, time.perf_counter() - start))
    return int(any("error" in record for record in records))


def _list(argv: list[str]) -> int:
    _plain("list", "List the variants with their paper and their tasks, the tasks, and the presets.", argv)
    from .experiment import possible

    _heading("variants (minitv train VARIANT)")
    for name in variants.variants():
        variant = variants.load(name)
        _columns([(name, variant.summary), ("", variant.paper), ("", f"tasks: {', '.join(possible(variant))}")])
    _heading("\ntasks (--task NAME)")
    _columns((name, entry.summary) for name, entry in tasks.tasks().items())
    _heading("\npresets (--preset NAME)")
    for name, preset in PRESETS.items():
        options = Options(ModelOptions, TrainOptions)
        values, _ = options.merge(("preset", {k: v for k, v in preset.items() if k in options.settings}))
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
    optional = {"matplotlib": "for curve.png", "plotly": "for minitv explore", "soundfile": "for FLAC files",
                "tokenizers": "for the texts of imported models"}
    for name in ("numpy", "numba", "scipy", "safetensors", *optional):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, f"not installed; {optional.get(name, 'it is needed')}: pip install {name}"))
    import numpy  # noqa: F401 - loads the BLAS that is shown below
    from threadpoolctl import threadpool_info

    from autograd.cpu import bf16, disk, gemm
    from autograd.cpu import compile as compiler
    from autograd.cpu.process import cores, processor

    rows.append(("cupy", _cupy()))
    rows.append(("cores", f"{cores()} usable of {os.cpu_count()}"))
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            name = " ".join(str(pool[key]) for key in ("internal_api", "version", "architecture") if pool.get(key))
            rows.append(("BLAS", f"{name}, {pool['num_threads']} threads (1 while training)"))
    serial = f"serial kernels on {cores()} workers while training (--threads sets both)"
    rows.append(("Numba", compiler.unavailable() or serial))
    state, folder = "compiled" if disk.cached() else "empty: the first run compiles", disk.cache_directory()
    rows.append(("kernel cache", f"{folder} ({state})" if folder else "none: no folder will do, every run compiles"))
    limit = "" if compiler.BITS == compiler.NATIVE_BITS else f": NUMBA_CPU_FEATURES leaves out {compiler.NATIVE_BITS}-bit ones"
    rows.append(("processor", processor()))
    rows.append(("vectors", f"{compiler.BITS}-bit{limit}"))
    rows.append(("products", gemm.explained()))
    rows.append(("bfloat16", bf16.explained()))
    _columns(rows)
    return 0


def _cupy() -> str:
    from importlib.util import find_spec

    if find_spec("cupy") is None:
        return 'not installed; for a GPU: pip install "minitv[cuda13]" or "minitv[cuda12]"'
    return "installed; `minitv info --gpu` tries it"


def _info_gpu() -> int:
    """Run one of our kernels on each card."""
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
            result = gelu(Tensor(x).to(f"cuda:{number}")).numpy()
        right = bool(np.abs(result - gelu(x).numpy()).max() < 1e-6)
        good &= right
        rows.append(("", f"a kernel of ours compiled and run in {time.perf_counter() - start:.2f} s, "
                         f"{'equal to the CPU' if right else 'and WRONG'}"))
    _columns(rows)
    return 0 if good else 1


def _explain(argv: list[str]) -> int:
    parser = Parser(
        "minitv explain",
        usage="minitv explain [NAME]",
        description="Show a variant: what its paper says, its cost, its state, and where paper and code differ.\n"
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
    if name in variants.variants():
        variant = variants.load(name)
        _heading(f"{name}: {variant.summary}\n")
        if page := sys.modules[variants.variants()[name].module].__doc__:
            print(reflow(inspect.cleandoc(page), columns(sys.stdout)) + "\n")
        from .identities import edges_of

        edges = [("identity", f"{edge.general} becomes {edge.special} if {edge.when}") for edge in edges_of(variant)]
        _columns([*variants.describe(variant), *edges, ("writing", _writing(variant))])
        return 0
    if name not in REGISTRY:
        names = [*variants.variants(), *REGISTRY]
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}?" if close else "`minitv explain` lists all operators, `minitv list` all variants"
        raise UserError(f"unknown variant or operator {name!r}; {hint}")
    op = REGISTRY[name]
    _heading(f"{op.name}: {op.signature}\n")
    page = inspect.getmodule(op.definition)
    alone = sum(other.definition.__module__ == page.__name__ for other in REGISTRY.values()) <= 2
    for text in (op.__doc__, page.__doc__ if alone else None):  # a page that many share speaks of none of them
        if text:
            print(reflow(inspect.cleandoc(text), columns(sys.stdout)) + "\n")
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


def _writing(variant: Any) -> str:
    """How a model of a variant generates text on this machine."""
    from autograd.cpu.compile import unavailable

    if variant.writing:
        return variant.writing
    if not variant.causal:
        return "not at all: an output depends on the whole sequence"
    if variant.fused is None:
        return "the model's prefill, one position at a time: there are no fused kernels for it"
    if reason := unavailable():
        return f"the model's prefill, one position at a time: the fused kernels need Numba ({reason})"
    return (f"fused kernels on the CPU (minitv/decode/{variant.fused}.py); on a GPU, or with options that they do not "
            "know, the model's prefill, one position at a time")


def _plot(argv: list[str]) -> int:
    parser = Parser(
        "minitv plot",
        usage="minitv plot DIR [DIR ...] [--out FILE]",
        description="Draw the curves of a run from DIR/log.jsonl, beside its baselines: the training data, smoothed,\n"
        "and the held-out data with its best step. Of several runs, the held-out curves share a picture.\n"
        "Numbers that the layers of one run told of themselves, as gains, are drawn in DIR/readings.png.",
        epilog="examples:\n  minitv plot runs/transformer\n  minitv plot runs/rwkv runs/retnet --out both.svg",
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", help="the folders of runs")
    text = "picture to write: .png, .svg or .pdf (default: curve.png in the folder; of several runs, curves.png here)"
    parser.add_argument("--out", metavar="FILE", help=text)
    arguments = parser.parse(argv)
    directories, out = arguments["directories"], arguments.get("out")
    print(plot(directories, out))
    if len(directories) == 1 and out is None and (path := plot_readings(directories[0])):
        print(path)
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


def _heading(text: str) -> None:
    print(reflow(text, columns(sys.stdout)))


def _columns(rows: Any) -> None:
    """Print (name, text) rows in two columns; below its name stands a text for which the terminal is too narrow."""
    rows, width = list(rows), columns(sys.stdout)
    column = max([14, *(len(name) for name, _ in rows)])
    for name, text in rows:
        if width is not None and width - column - 4 < max([26, *map(len, text.split())]):
            indent = " " * max(0, min(2, width - len(name)))
            print("\n".join([indent + name] * bool(name) + [wrap(text, width, "    ", "    ")]))
        else:
            print(wrap(text, width, f"  {name:<{column}}  ", " " * (column + 4)))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a model on text"),
    "compare": (_compare, "train several variants alike, and compare them"),
    "sample": (_sample, "write text with a trained model"),
    "eval": (_eval, "say how well a trained model predicts a text"),
    "import": (_import, "make a run of a model of another program"),
    "export": (_export, "write a trained model for other programs"),
    "convert": (_convert, "give a trained Transformer fewer heads of keys and values"),
    "stream": (_stream, "read a text of any length in constant memory"),
    "transcribe": (_transcribe, "write down what is said in a recording"),
    "check": (_check, "prove operators and variants, also your own, on any shape"),
    "claims": (_claims, "measure what a review says of the variants"),
    "explore": (_explore, "write a page that shows what a trained model does"),
    "list": (_list, "list the variants, tasks and presets"),
    "info": (_info, "show versions, processor, threads, GPU"),
    "explain": (_explain, "show a variant or an operator: formula, cost, forms, kernels"),
    "plot": (_plot, "draw the curves of one run or several"),
}


def _overview() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
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
