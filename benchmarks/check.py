"""What `minitv check --all` finds on this machine, and how long it takes with compiled kernels and without.

    python benchmarks/check.py

It writes benchmarks/results/check.json, from which benchmarks/report.py makes the table of the top README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rounds import save

from minitv.results import host


def run(cache: str) -> dict:
    """One run of the command, with kernels that are compiled into this folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "check.json")
        subprocess.run([sys.executable, "-m", "minitv", "check", "--all", "--json", str(out)],
                       env={**os.environ, "NUMBA_CACHE_DIR": cache}, check=False)
        return json.loads(out.read_text("utf-8"))


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = run(cache), run(cache)
    result = {key: warm[key] for key in ("ok", "summary")}
    result["seconds"] = {"cold": cold["seconds"], "warm": warm["seconds"]}
    result["units"] = {kind: sum(unit["kind"] == kind for unit in warm["results"]) for kind in ("operator", "variant")}
    result |= {"identities": len(warm["identities"]), "threads": host()["cores"], "rounds": 1}
    save("check", result)
    return int(not (cold["ok"] and warm["ok"]))


if __name__ == "__main__":
    sys.exit(main())
