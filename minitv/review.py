"""minitv claims: the statements of the review one after the other, measured on this machine and written down."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autograd.cpu.process import cores

from . import results
from .claims import VERDICTS, Claim
from .claims.measure import Measure
from .errors import UserError, naming
from .log import of_json
from .report import duration


def examine(claims: Sequence[Claim], full: bool, path: Path | None = None) -> Iterator[tuple[Claim, dict[str, Any]]]:
    """Each statement with the record of its run, as soon as it is done; with a path, the records are also written there.

    A record has a ``verdict`` and what was measured, or an ``error``, which is not written. UserError where the file holds
    something else, before anything is measured.
    """
    if path is not None:
        _check(path, full)
    with Measure(full) as measure, tqdm(total=len(claims), unit="claim", leave=False, disable=None) as bar:
        measure.progress = lambda text: bar.set_description_str(f"{claim.number}: {text}")
        for claim in claims:
            measure.progress(claim.system)
            record = examined(claim, measure)
            if path is not None and "error" not in record:
                results.write(path, _file({str(claim.number): record}, full), "claims")
            bar.clear()
            yield claim, record
            bar.update()


def _check(path: Path, full: bool) -> None:
    """Raise UserError where a file cannot take the records, or would lose others."""
    with naming("--json"):
        if differing := results.differing(path, _file({}, full), "claims"):
            raise UserError(f"{path}: this file has results with another value of {', '.join(differing)}, which would be lost: "
                            "name another file, or remove this one")


def examined(claim: Claim, measure: Measure) -> dict[str, Any]:
    """The record of one statement."""
    load, start = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, time.perf_counter()
    measure.begin(claim.number)
    try:
        finding = claim.test(measure)
        if finding.verdict not in VERDICTS:
            raise TypeError(f"{finding.verdict!r} is no verdict")
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"}
    return {"system": claim.system, "statement": claim.statement, "place": claim.place, "paper": claim.paper,
            "experiment": claim.experiment, "verdict": finding.verdict.name, "measured": finding.measured,
            "numbers": of_json(finding.numbers), "seconds": round(time.perf_counter() - start, 1), "load": load,
            "command": claim.command}


def _file(records: dict[str, dict[str, Any]], full: bool) -> dict[str, Any]:
    return {"benchmark": "claims", "threads": cores(), "rounds": 1, "full": full, "claims": records}


def rows(claim: Claim, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines (label, text) about a statement for a person."""
    found = [(label, record[key]) for label, key in (("verdict", "verdict"), ("measured", "measured"), ("failed", "error"))
             if key in record]
    return [("claim", f"{claim.statement} ({claim.place})"), ("paper", claim.paper), ("experiment", claim.experiment), *found,
            ("shown by", claim.command)]


def summary(records: Sequence[dict[str, Any]], seconds: float) -> str:
    """How many statements got which verdict, in a sentence."""
    verdicts = [record.get("verdict", "failed") for record in records]
    counts = [f"{verdicts.count(name)} {name}" for name in (*map(str, VERDICTS), "failed") if name in verdicts]
    return f"{len(records)} claim{'s' * (len(records) != 1)} in {duration(seconds)}: {', '.join(counts)}"
