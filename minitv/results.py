"""Results of measurements in a file: what they depend on beside them, and earlier ones of the same machine kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autograd.cpu.process import cores

from . import files
from .errors import UserError


def host() -> dict[str, Any]:
    """What the figures depend on."""
    processor, vectors = platform.processor(), {}
    if os.path.exists("/proc/cpuinfo"):
        facts = {}  # of the first core
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
        if "model name" in facts:  # names alike hide different processors, their numbers do not
            processor = f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
        flags = facts.get("flags", "").split()
        vectors = {"vectors": next((f"{bits}-bit vectors" for flag, bits in (("avx512f", 512), ("avx2", 256)) if flag in flags),
                                   "128-bit vectors")} if flags else {}
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "numba", "torch")
                if importlib.util.find_spec(name)}
    return {"processor": processor, **vectors, "cores": cores(), "system": platform.system(),
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **versions}


def write(path: Path, result: Mapping[str, Any], part: str | None = None) -> dict[str, Any]:
    """Write a result as JSON; what was written.

    What was measured before stays in ``result[part]`` beside what is new, if it was on the same machine with the same settings.
    """
    result = {"host": host(), **result}
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
    host = {key: value for key, value in result["host"].items() if key != "date"}
    return {key: value for key, value in result.items() if key not in ("host", part)} | host
