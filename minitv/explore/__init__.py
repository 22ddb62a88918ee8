"""minitv explore: a page for a browser that shows what a trained model does, in one file that needs no network.

    mixing.py     the matrices of what a model mixes, of any variant, by watching one forward pass
    study.py      all that is shown of one run, as JSON
    page.py       the page: the plotting library, this JSON, and the two files below, in one
    page.js       draws it; page.css has its looks, dark and light, on a phone and on a large screen

Nothing here knows a variant: what a page shows follows from what its operators declare, which are laws and signatures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..checkpoint import run_folder
from ..errors import UserError, naming
from ..options import ExploreOptions
from .page import LIMIT, library, page
from .study import folder_name, study

PAGE = "explore.html"
RUNS = 12  # on a page, at most


def explore(directories: Sequence[str], options: ExploreOptions) -> Path:
    """Write the page of some runs, or of those of a folder of ``minitv compare``, and return its file.

    UserError where plotly is missing, a folder is no run, or a text cannot be read or has characters that a model does not
    know.
    """
    script = library()
    runs, home = _runs(directories)
    path = Path(options.out) if options.out is not None else home / PAGE
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {path}: a page ends with .html")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out {path}: {'this is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")
    tokens, names = options.tokens, _names(runs)
    while True:
        studies = [study(run, options, tokens, name) for run, name in zip(runs, names, strict=True)]
        data = page(studies, script, tokens).encode("utf-8", "backslashreplace")
        if len(data) <= LIMIT:
            break
        if tokens < 8:
            raise UserError(f"DIR: a page of these {len(runs)} runs takes {len(data) / 1e6:.1f} MB, and {LIMIT / 1e6:.0f} are "
                            "allowed; give fewer runs")
        tokens = tokens * 3 // 4
    files.replace(path, data)
    return path


def _runs(directories: Sequence[str]) -> tuple[list[str], Path]:
    """The folders of the runs that are meant, and where the page goes."""
    for directory in directories:
        if not os.path.isdir(directory):
            what = "this is no folder" if os.path.exists(directory) else "there is no such folder"
            raise UserError(f"DIR: {directory}: {what}, allowed: the folders of runs, or one of minitv compare")
    if len(directories) == 1 and (table := Path(directories[0]) / files.TABLE).is_file():
        with naming(table):
            runs = [str(Path(directories[0]) / name) for name in _of_comparison(table)]
        return _counted(runs), Path(directories[0])
    if len({os.path.realpath(directory) for directory in directories}) < len(directories):
        raise UserError("DIR: a folder is named twice, and each run is shown once")
    home = run_folder(directories[0]) if len(directories) == 1 else Path()
    return _counted(list(directories)), home


def _counted(runs: list[str]) -> list[str]:
    if len(runs) > RUNS:
        raise UserError(f"DIR: {len(runs)} runs, and a page shows {RUNS} at most; name those that you want to see")
    return runs


def _of_comparison(table: Path) -> list[str]:
    """The folder of the first run of each variant, and of each value of what was swept."""
    try:
        runs = json.loads(files.read(table))["runs"]
        first: dict[str, str] = {}
        for run in runs:
            first.setdefault(json.dumps([run["variant"], run["swept"]]), str(run["folder"]))
    except (ValueError, KeyError, TypeError):
        raise UserError("this is not what minitv compare writes") from None
    if not first:
        raise UserError("there is no run in it")
    return list(first.values())


def _names(runs: Sequence[str]) -> list[str]:
    """What runs are called: the last parts of their folders, or the folders where those are the same."""
    names = list(map(folder_name, runs))
    return names if len(set(names)) == len(names) else list(runs)
