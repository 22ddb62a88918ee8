"""Results of measurements in a file: what they depend on beside them, and earlier ones of the same machine kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autograd.cpu.process import cores, processor

from . import files
from .errors import UserError

VARYING = ("date", "core", "limits", "limited_by")  # of a host: what differs between two runs on the same machine, or follows


def host() -> dict[str, Any]:
    """What figures depend on. Vectors are as wide as kernels are compiled for, which may be less than the processor has."""
    from autograd.cpu.compile import BITS

    versions = {name: importlib.metadata.version(name) for name in ("numpy", "numba", "torch")
                if importlib.util.find_spec(name)}
    return {"processor": processor(), "vectors": f"{BITS}-bit vectors", "cores": cores(), "system": platform.system(),
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **versions}


def write(path: Path, result: Mapping[str, Any], part: str | None = None, **measured: Any) -> dict[str, Any]:
    """Write a result as JSON, with what was ``measured`` of the machine beside the facts of its host; what was written.

    What was measured before stays in ``result[part]`` beside what is new, if it was on the same machine with the same settings.
    """
    result = {"host": host() | measured, **result}
    if part and path.exists() and not differing(path, result, part):
        before = _before(path, part)[part]
        result[part] = before | {key: {**before.get(key, {}), **new} for key, new in result[part].items()}
    files.replace(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    return result


def differing(path: Path, result: Mapping[str, Any], part: str) -> list[str]:
    """The settings in which a file with a result, if there is one, differs from a new result.

    UserError where the file holds something else.
    """
    if not path.exists():
        return []
    before, now = _settings(_before(path, part), part), _settings({"host": host(), **result}, part)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _before(path: Path, part: str) -> dict[str, Any]:
    """What a file holds; UserError unless it is a result with this part, so that nothing else is lost."""
    try:
        before = json.loads(files.read(path))
        if isinstance(before["host"], dict) and all(isinstance(row, dict) for row in before[part].values()):
            return before
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: this file holds something else than such results, name another one")


def _settings(result: Mapping[str, Any], part: str) -> dict[str, Any]:
    host = {key: value for key, value in result["host"].items() if key not in VARYING}
    return {key: value for key, value in result.items() if key not in ("host", part)} | host
