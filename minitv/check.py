"""`minitv check`: operators and variants are proven on this machine, on any shape, and a failure is made small.

    results = run(units(["retention", "retnet"], options), options)

A *unit* is one operator or one variant; several are shared out over processes. What is checked is declared elsewhere: the
checks of an operator in autograd/verify.py and its laws on its page, the laws of models in laws.py, and identities on records.
"""

from __future__ import annotations

import difflib
import importlib
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import minitv.ops  # noqa: F401 - declares the operators
from autograd import REGISTRY, Op, use, verify
from autograd.cpu.compile import unavailable
from autograd.cpu.process import blas_threads, cores
from autograd.device import gpu
from autograd.draw import Draw, draw_inputs
from autograd.errors import AutogradError
from autograd.laws import Law
from autograd.metric import recorded
from autograd.proof import AT_SHAPE, Row, letters, lines
from autograd.stability import Curve, example, growing, stability, told
from autograd.verify import DTYPES, IDENTITY, LAW, dtypes, parsed, routes, split

from . import __version__, goldens, variants
from .errors import RunError, UserError, device_errors, naming, quoted
from .identities import identities
from .laws import OPTIONS, SIZES, Specimen, laws_of
from .log import of_json
from .options import CheckOptions
from .report import count, duration
from .results import write

LENGTHS, FEW_LENGTHS = (16, 64, 256, 1024), (16, 128)  # of curves, and where everything is checked
FOLLOWS = {"S": "T", "V": "K"}  # letters that are as large as another one, where both are in a signature
PATIENCE = 20.0  # seconds in which a model's failure is made small
MODEL = "model"  # the route of rows that are about a whole model


@dataclass(frozen=True)
class Unit:
    """One operator or one variant, by its name; that of a user's operator is MODULE:NAME."""

    name: str
    kind: str  # "operator" or "variant"


@dataclass
class Result:
    """What was found out about a unit."""

    unit: Unit
    title: str
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    grows: str = ""  # the input that the curves are about

    @property
    def ok(self) -> bool:
        """Whether every check ran and holds."""
        return all(row.draws and not row.failure for row in self.rows) and all(curve.ok for curve in self.curves)


# -- what is checked ---------------------------------------------------------------------------------------------------
def units(names: Sequence[str], options: CheckOptions) -> list[Unit]:
    """The operators and variants of these names, and the operators that the variants are made of, each once; all of them with
    --all. UserError for a name that is none, and for options that do not fit.
    """
    known = variants.variants()
    if options.all:
        if names:
            raise UserError(f"--all: it checks everything, so {quoted(names[0])} has no place beside it")
        found = [*(Unit(name, "variant") for name in known), *(Unit(name, "operator") for name in REGISTRY)]
    else:
        if not names:
            raise UserError("give the names of variants or operators, as in minitv check retnet, or --all")
        found = []
        for name in names:
            if name in known:
                found.append(Unit(name, "variant"))
                found += [Unit(op, "operator") for op in variants.load(name).page.operators]
            else:
                operator(name)
                found.append(Unit(name, "operator"))
    found = list(dict.fromkeys(found))
    _check_options(found, options)
    return found


def operator(name: str) -> Op:
    """The operator of this name, or that of MODULE:NAME, whose module is imported; UserError where there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if name in REGISTRY:
            return REGISTRY[name]
        close = difflib.get_close_matches(name, [*variants.variants(), *REGISTRY], 1)
        hint = f"did you mean {close[0]}?" if close else "`minitv list` lists variants, `minitv explain` operators, and an " \
                                                         "operator of your own is MODULE:NAME"
        raise UserError(f"unknown variant or operator {quoted(name)}; {hint}")
    if not all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        raise UserError(f"{quoted(name)} is no name of an operator, allowed: MODULE:NAME, as in my_module:my_op, with the "
                        "module's name as it is imported")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python does, which the console script does not
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except KeyboardInterrupt:
        raise
    except AttributeError as error:
        if sys.modules.get(module) is None:
            raise UserError(f"{name}: {module} cannot be imported: {type(error).__name__}: {error}") from None
        operators = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, Op)]
        raise UserError(f"{name}: {module} has no {quoted(attribute)}, operators in it: "
                        f"{', '.join(operators) or 'none'}") from None
    except BaseException as error:  # whatever a module does when it runs, SystemExit too
        raise UserError(f"{name}: {module} cannot be imported: {type(error).__name__}: {error}") from None
    if not isinstance(found, Op):
        raise UserError(f"{name}: this is {type(found).__name__}, allowed: an operator, which autograd.op declares")
    return found


def _check_options(chosen: Sequence[Unit], options: CheckOptions) -> None:
    """UserError for a letter, a form or a size that none of the units takes."""
    operators = [operator(unit.name) for unit in chosen if unit.kind == "operator"]
    models = [unit for unit in chosen if unit.kind == "variant"]
    sizes = shape(options)
    known = set().union(*(letters(op) for op in operators), OPTIONS.keys() | SIZES.keys() if models else ()) if sizes else set()
    for letter in sizes:
        if letter not in known:
            raise UserError(f"--shape: nothing that is checked has a size {letter}, allowed: "
                            f"{' '.join(sorted(known)) or 'none'}")
    if sizes:
        for op in operators:
            _check_fits(op, sizes)
        for unit in models:
            try:
                Specimen(variants.load(unit.name), _of_model(sizes)).model()
            except (UserError, AutogradError) as error:
                raise UserError(f"--shape: {unit.name} cannot have it: {error}") from None
    names = {name for op in operators for route in routes(op) for name in _names(route)}
    if options.forms is not None and not words(options.forms):
        raise UserError(f"--forms: {quoted(options.forms)} names none, allowed: names with commas between them")
    for word in words(options.forms):
        if word not in names:
            plain = sorted({parsed(route)[1] for op in operators for route in routes(op)} - {""})
            raise UserError(f"--forms: nothing that is checked has a form or a kernel {quoted(word)}, allowed: "
                            f"{', '.join(plain)}")
    if options.device != "cpu":
        with device_errors():
            gpu()


def _check_fits(op: Op, sizes: Mapping[str, int]) -> None:
    """UserError with the operator's sentence if it does not take inputs of these sizes."""
    draw = Draw.seeded(0, np.float32, sizes=of_operator(op, sizes))
    try:
        with draw.filled():
            args, params = draw_inputs(op, draw)
        op.accept(args, split(op, params)[0])
    except (AutogradError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"--shape: {op.name} cannot have it: {error}") from None


def shape(options: CheckOptions) -> dict[str, int]:
    """The sizes of --shape by their letters."""
    found: dict[str, int] = {}
    if options.shape and not words(options.shape.replace(" ", ",")):
        raise UserError(f"--shape: {quoted(options.shape)} has no size, as \"B=2 T=1000 H=4\" has")
    for word in words(options.shape.replace(" ", ",")):
        match = re.fullmatch(r"([A-Za-z]\w*)=([0-9]{1,9})", word)
        if match is None or not int(match[2]):
            raise UserError(f"--shape: {quoted(word)} is no size, allowed: letters and sizes from 1, as in \"B=2 T=1000 H=4\"")
        if match[1] in found:
            raise UserError(f"--shape: {match[1]} is given twice")
        found[match[1]] = int(match[2])
    return found


def words(text: str | None) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def scales(options: CheckOptions) -> tuple[float, ...]:
    """The factors of --scale."""
    try:
        found = tuple(float(word) for word in words(options.scale))
    except ValueError:
        found = ()
    if not found or not all(0 < value < 1e30 for value in found):
        raise UserError(f"--scale: {quoted(options.scale)}, allowed: numbers above 0 with commas between them, as in 1,10,100")
    return found


def of_operator(op: Op, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of the sizes that an operator has, and others that follow from them."""
    known = letters(op) if sizes else {}
    chosen = {letter: size for letter, size in sizes.items() if letter in known}
    return {**{letter: chosen[other] for letter, other in FOLLOWS.items() if letter in known and other in chosen}, **chosen}


def _of_model(sizes: Mapping[str, int]) -> dict[str, int]:
    return {letter: size for letter, size in sizes.items() if letter in OPTIONS or letter in SIZES}


def _names(route: str) -> set[str]:
    kind, name, _ = parsed(route)
    return {route, name, f"{kind} {name}"}


# -- checking ----------------------------------------------------------------------------------------------------------
def run(chosen: Sequence[Unit], options: CheckOptions) -> list[Result]:
    """The results of all units in their order; progress on a terminal."""
    from tqdm import tqdm

    processes = min(options.processes or cores(), len(chosen))
    with tqdm(total=len(chosen), disable=not sys.stderr.isatty(), file=sys.stderr, leave=False, dynamic_ncols=True,
              bar_format="{n_fmt}/{total_fmt} {bar:20} {desc}") as bar:
        if processes <= 1:
            found = []
            for unit in chosen:
                found.append(check(unit, options, lambda text, unit=unit: bar.set_description_str(f"{unit.name}: {text}")))
                bar.update()
            return found
        results: dict[Unit, Result] = {}
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _only_when_told) as pool:
            waiting = {pool.submit(check, unit, options): unit for unit in sorted(chosen, key=_work, reverse=True)}
            try:
                for future in as_completed(waiting):
                    unit = waiting[future]
                    results[unit] = future.result()
                    bar.set_description_str(f"{unit.name} {'holds' if results[unit].ok else 'FAILS'}")
                    bar.update()
            except BrokenProcessPool:
                raise RunError("a process that checked has ended, perhaps for lack of memory; try --processes 1") from None
            except BaseException:  # Ctrl-C
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                raise
        return [results[unit] for unit in chosen]


def _only_when_told() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(unit: Unit) -> int:
    """How much there is to do, roughly: the longest come first, so that no process ends much later than the others."""
    if unit.kind == "variant":
        return 8
    op = operator(unit.name)
    return len(routes(op)) * (5 + len(op.laws))


def check(unit: Unit, options: CheckOptions, tell: Callable[[str], None] | None = None) -> Result:
    """Everything about one unit; what is declared wrongly is a failure, too."""
    start, result = time.perf_counter(), Result(unit, unit.name)
    try:
        with blas_threads(1) if cores() > 1 else nullcontext():
            (_check_variant if unit.kind == "variant" else _check_operator)(result, options, tell or (lambda text: None))
    except UserError:
        raise
    except Exception as error:  # drawing inputs, importing a kernel: code of whoever wrote the operator
        result.rows.append(Row("", "declaration", draws=1, failure=f"{type(error).__name__}: {error}"))
    result.seconds = time.perf_counter() - start
    return result


def _check_operator(result: Result, options: CheckOptions, tell: Callable[[str], None]) -> None:
    op = operator(result.unit.name)
    result.title = f"{op.name}: {op.signature}"
    chosen = words(options.forms)

    def along(route: str) -> bool:
        on_host = parsed(route)[2] == "host"
        fits = not chosen or bool(_names(route) & set(chosen))
        return fits and (on_host if options.device == "cpu" else not on_host)

    def among(route: str) -> tuple:
        possible = dtypes(op, route)
        if options.dtype is not None:
            wanted = tuple(dtype for dtype in possible if np.dtype(dtype).name == options.dtype)
            return wanted or possible
        return DTYPES[:1] if route.startswith("kernel") else possible

    report = verify(op, options.draws, options.seed, sizes=of_operator(op, shape(options)), along=along, among=among, tell=tell)
    result.rows, result.notes = report.rows, report.notes
    if not op.forms:
        result.rows.append(Row("", "declaration", draws=1, failure=f"{op.name} has no form, and there is nothing to compare"))
        return
    if not report.rows and not report.notes:
        result.notes.append(f"no form or kernel of {op.name} is asked for")
    calls = goldens.calls_of(op) if options.device == "cpu" else []
    for route in filter(along, routes(op)) if calls else ():
        tell(f"{route}, other libraries")
        if (row := _golden_row(op, calls, route, among(route))).draws or row.failure:
            result.rows.append(row)
    order = routes(op)
    result.rows.sort(key=lambda row: order.index(row.route))
    if not goldens.calls() and not options.all:
        result.notes.append("the results of other libraries are not beside this package: they are in a checkout, tests/goldens")
    curves = stability(op, FEW_LENGTHS if options.all else LENGTHS, scales(options), options.seed,
                       1 if options.all else 2, lambda route: route != "definition" and along(route), tell)
    result.curves, result.grows = curves, growing(op) if curves else ""
    for curve in curves:
        if not curve.ok:
            tell(f"{curve.route}, a failure is made small")
            curve.example = example(op, curve)


def _golden_row(op: Op, calls: Iterable[str], route: str, kinds: tuple) -> Row:
    row = Row(route, "other libraries' results")
    for call in calls:
        for dtype in kinds:
            row.draws += 1
            with recorded() as errors:
                try:
                    goldens.verify_call(op, call, goldens.Golden(goldens.calls()[call]).only(call), route, dtype)
                except AssertionError as error:
                    row.failure = row.failure or f"{call}: {error}"
                except AutogradError as error:
                    if not route.startswith("kernel"):
                        raise
                    row.draws -= 1  # a kernel that does not take the call
                    del error
            row.measured(errors)
    return row


def _check_variant(result: Result, options: CheckOptions, tell: Callable[[str], None]) -> None:
    variant = variants.load(result.unit.name)
    result.title = f"{variant.name}: {variant.summary}"
    sizes = _of_model(shape(options))
    for law in laws_of(variant):
        tell(str(law))
        result.rows.append(_model_row(variant, law, sizes, options))
    if reason := unavailable():
        result.notes.append(f"no kernels: {reason}")


def _model_row(variant: Any, law: Law, sizes: Mapping[str, int], options: CheckOptions) -> Row:
    row = Row(MODEL, f"{IDENTITY if law.edge else LAW}{law}")
    for number in range(options.models):
        row.draws += 1
        taken: list[int] = []
        draw = Draw.seeded(options.seed + number)
        inner = draw.integer
        draw.integer = lambda low, high, inner=inner, taken=taken: taken.append(inner(low, high)) or taken[-1]
        with recorded() as errors:
            error = _failure(variant, law, sizes, draw)
        row.measured(errors)
        if error is not None:
            row.failure = f"seed {options.seed + number}: {type(error).__name__}: {error}"
            row.example = _shrunk(variant, law, type(error), dict(sizes), taken)
            break
    return row


def _failure(variant: Any, law: Law, sizes: Mapping[str, int], draw: Draw) -> Exception | None:
    """What is wrong with a model. It computes by forms, but for what a law says of kernels."""
    try:
        with use(kernel="none"):
            law.check(Specimen(variant, sizes), draw)
    except Exception as error:  # a wrong model fails in many ways
        return error
    return None


def _shrunk(variant: Any, law: Law, kind: type[Exception], sizes: dict[str, int], choices: list[int]) -> str:
    """A line of Python that shows the failure of a model of the smallest sizes that still fails."""
    end = time.monotonic() + PATIENCE

    def fails(sizes: Mapping[str, int], choices: Sequence[int]) -> bool:
        return time.monotonic() < end and isinstance(_failure(variant, law, sizes, Draw.replayed(choices)), kind)

    for letter, least in (("B", 1), ("L", 1), ("T", 1), ("D", 2)):
        whole = sizes.get(letter, SIZES[letter])
        for size in sorted({least, least + 1, 4, 8, whole // 2, whole - 1}):
            if least <= size < whole and fails({**sizes, letter: size}, choices):
                sizes[letter] = size
                break
    while choices and fails(sizes, choices[:-1]):
        choices = choices[:-1]
    for place in range(len(choices)):
        if fails(sizes, simpler := [*choices[:place], 0, *choices[place + 1:]]):
            choices = simpler
    return (f"from minitv.check import reproduce; reproduce({variant.name!r}, {str(law)!r}, {choices}"
            + (f", {sizes})" if sizes else ")"))


def reproduce(variant: str, law: str, choices: Sequence[int], sizes: Mapping[str, int] | None = None) -> None:
    """Make one check of a variant's models again: AssertionError, or what else went wrong, if the law does not hold.

    ``choices`` decide the draws, ``sizes`` are those of the model, by letters.
    """
    record = variants.load(variant)
    known = {str(one): one for one in laws_of(record)}
    if law not in known:
        raise LookupError(f"{variant}: no law {law!r}, there are {', '.join(known)}")
    if error := _failure(record, known[law], sizes or {}, Draw.replayed(choices)):
        raise error
    print(f"{variant}: {law}: it holds")


# -- what is said of it ------------------------------------------------------------------------------------------------
def table(result: Result) -> str:
    """The result of one unit as lines of at most 80 characters."""
    head = textwrap.wrap(result.title, 80, subsequent_indent="  ", break_on_hyphens=False)
    if result.unit.kind == "variant":
        for row in result.rows:
            error = f"{row.error:.1e} of {row.allowed:.1e}" if row.allowed else ""
            head += _wrapped(row.check.removeprefix(LAW), 50, f"{error:>18}  {row.verdict}")
    else:
        head += lines(result.rows)
    return "\n".join([*head, *_curves(result), *(f"note: {text}" for text in result.notes)])


def _wrapped(text: str, width: int, rest: str) -> list[str]:
    first, *others = textwrap.wrap(text, width, break_on_hyphens=False)
    return [f"{first:<{width}}  {rest}", *(f"  {line}" for line in others)]


def _curves(result: Result) -> list[str]:
    if not result.curves:
        return []
    lengths = sorted({length for curve in result.curves for length in curve.points})
    heading = f"size of {result.grows}"
    wide = max(9, len(heading))
    widest = max(len(curve.route) for curve in result.curves)
    found = ["errors in float32 over T, values or gradients, whichever is nearer to its limit",
             f"{'':{widest}}  {heading:>{wide}}" + "".join(f"{f'T={length}':>9}" for length in lengths) + "  of limit"]
    for curve in result.curves:
        points = [curve.points.get(length) for length in lengths]
        cells = ["" if point is None else f"{max(point.values, point.gradients):.1e}" for point in points]
        share = max(point.share for point in curve.points.values())
        found.append(f"{curve.route:{widest}}  {curve.scale:>{wide}g}" + "".join(f"{cell:>9}" for cell in cells)
                     + f"{100 * share:>7.0f} %  {'holds' if curve.ok else 'FAILS'}")
    return found


def failures(results: Iterable[Result]) -> list[str]:
    """What went wrong, each with a line of Python that shows it again."""
    found = []
    for result in results:
        for row in result.rows:
            if row.failure:
                where = ", ".join(filter(None, [result.unit.name, row.route.removeprefix(MODEL), row.check]))
                found.append(f"FAILS: {where}: {row.failure}"
                             + (f"\nto see it again, at its smallest:\n  {row.example}" if row.example else ""))
            elif not row.draws:
                found.append(f"NOT RUN: {result.unit.name}, {row.route}, {row.check}: it took none of the calls that were "
                             "drawn")
        found += [f"FAILS: {result.unit.name}, {curve.route}: with {result.grows} of size {curve.scale:g} and T = {length}, "
                  f"{told(point)}" + (f"\nto see it again, at its smallest:\n  {curve.example}" if curve.example else "")
                  for curve in result.curves for length, point in list(curve.failing.items())[:1]]
    return found


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What was checked, one row for each kind of check: of how many operators or variants, by how many calls, the largest
    error as a share of what is allowed, and where that is.
    """
    rows: dict[str, dict[str, Any]] = {}

    def add(what: str, result: Result, calls: int, share: float, where: str, ok: bool) -> None:
        row = rows.setdefault(what, {"what": what, "names": set(), "calls": 0, "share": 0.0, "where": "", "ok": True})
        row["names"].add(result.unit.name)
        row["calls"] += calls
        row["ok"] &= ok
        if share > row["share"]:
            row["share"], row["where"] = share, where

    for result in results:
        for row in result.rows:
            share = row.error / row.allowed if row.allowed else 0.0
            where = ", ".join(filter(None, [result.unit.name, row.route.removeprefix(MODEL)]))
            add(_kind(result, row), result, row.draws, share, where, bool(row.draws and not row.failure))
        for curve in result.curves:
            for length, point in curve.points.items():
                add("operators: stable with large inputs, over T", result, point.calls, point.share,
                    f"{result.unit.name}, {curve.route}, T = {length}, size {curve.scale:g}", point.share <= 1)
    ordered = sorted(rows.values(), key=lambda row: (row["what"].startswith("models"), row["what"].endswith(OTHERS)))
    return [{**row, "names": len(row["names"])} for row in ordered]


OTHERS = "identities with others"
KINDS = {"outputs": "definitions: shapes, dtypes, nothing is written", "values": "values are the definition's",
         "gradients": "gradients are the first form's", "gradients of one input alone": "gradients are the first form's",
         "derivative": "gradients are derivatives", "second derivative": "second derivatives", "adjoint": "linear: adjoints",
         "same bits twice": "the same bits twice"}


def _kind(result: Result, row: Row) -> str:
    what = "models" if result.unit.kind == "variant" else "operators"
    if row.check.startswith(IDENTITY):
        return f"{what}: {OTHERS}"
    if row.check.startswith(LAW):
        return f"models: {row.check.removeprefix(LAW)}" if what == "models" else "operators: laws"
    return f"operators: {KINDS.get(row.check.removesuffix(AT_SHAPE), row.check)}"


def screen(results: Sequence[Result]) -> str:
    """The summary as a screen of text."""
    found = [f"{'what was checked':46}{'of':>4}{'calls':>7}{'error':>8}", f"{'':57}{'/ limit':>8}"]
    for row in summary(results):
        share = "" if not row["share"] else "< 1 %" if row["share"] < 0.01 else "> 10 x" if row["share"] > 10 else \
            f"{100 * row['share']:.0f} %"
        verdict = "holds" if row["ok"] else "FAILS"
        found += _summary_line(row["what"], f"{row['names']:>4}{count(row['calls']):>7}{share:>8}  {verdict}")
    return "\n".join(found)


def verdict(results: Sequence[Result], seconds: float) -> str:
    """Whether everything holds, in a line."""
    counts = [(sum(result.unit.kind == kind for result in results), kind) for kind in ("operator", "variant")]
    units = " and ".join(f"{number} {kind}{'s' * (number != 1)}" for number, kind in counts if number)
    bad = [result.unit.name for result in results if not result.ok]
    found = f"{', '.join(bad)} FAIL{'S' * (len(bad) == 1)}" if bad else "everything holds"
    return f"{units}, in {duration(seconds)}: {found}"


def _summary_line(text: str, rest: str) -> list[str]:
    *others, last = textwrap.wrap(text, 46, subsequent_indent="  ", break_on_hyphens=False)
    return [*others, f"{last:<46}{rest}"]


def write_json(path: str, results: Sequence[Result], options: CheckOptions, seconds: float) -> None:
    """Everything that was found, for machines."""
    content = {
        "minitv": __version__, "options": asdict(options), "seconds": round(seconds, 1),
        "ok": all(result.ok for result in results), "summary": summary(results),
        "identities": [asdict(edge) for edge in identities()],
        "results": [{**asdict(result), "ok": result.ok, "unit": result.unit.name, "kind": result.unit.kind}
                    for result in results],
    }
    with naming("--json"):
        write(Path(path), of_json(content))


def report(names: Sequence[str], options: CheckOptions) -> int:
    """Check, print what was found, and return the exit code."""
    scales(options)
    chosen, start = units(names, options), time.perf_counter()
    results = run(chosen, options)
    seconds = time.perf_counter() - start
    if not options.all:
        print("\n\n".join(map(table, results)) + "\n")
    wrong = failures(results)
    if wrong:
        print("\n\n".join(wrong) + "\n")
    if options.all:
        print(screen(results))
    print(verdict(results, seconds))
    if options.json:
        write_json(options.json, results, options, seconds)
    return int(not all(result.ok for result in results))
