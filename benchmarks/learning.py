"""What every variant learns in the same number of steps: ``minitv compare``, its table and its picture kept.

    python benchmarks/learning.py --data tinyshakespeare.txt --lr 1e-3,3e-3 --seeds 3
    python benchmarks/learning.py transformer rwkv retnet --task mqar --out runs/mqar

Batches, tokens and schedule are the same for all. All options are those of ``minitv compare``. Runs are kept in ``--out``:
the same command goes on from there. The result goes to benchmarks/results/learning.json, or to TASK.json with another task
than text, and the curves to a picture of the same name beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from rounds import RESULTS, ROOT, save

from autograd.cpu.process import cores
from minitv.experiment import DEFAULT_TASK
from minitv.files import PICTURE, TABLE
from minitv.log import read_log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=DEFAULT_TASK, metavar="NAME", help="what the models are trained for (default: text)")
    parser.add_argument("--name", help="of the result's file (default: learning, or the task)")
    parser.add_argument("--preset", default="nanogpt-cpu", metavar="NAME", help="default: nanogpt-cpu")
    parser.add_argument("--threads", type=int, default=cores(), help="worker threads (default: the usable cores)")
    parser.add_argument("--out", default=str(ROOT / "runs" / "learning"), help="folder of the runs (default: runs/learning)")
    arguments, more = parser.parse_known_args()
    command = [sys.executable, "-m", "minitv", "compare", *more, "--task", arguments.task, "--preset", arguments.preset,
               "--threads", str(arguments.threads), "--out", arguments.out]
    if code := subprocess.run(command).returncode:
        return code
    table = json.loads((Path(arguments.out) / TABLE).read_text(encoding="utf-8"))
    first = table["runs"][0]
    header, _ = read_log(Path(arguments.out) / first["folder"])
    name = arguments.name or ("learning" if arguments.task == DEFAULT_TASK else arguments.task)
    save(name, {"benchmark": name, "threads": arguments.threads, "preset": arguments.preset, "rounds": 1, "options": more,
                "data": (header.get("corpus") or {}).get("description", arguments.task), "metric": table["metric"],
                "steps": first["steps"], "ngram_bpc": first["ngram_bpc"], "baselines": first["baselines"],
                "accuracies": first["accuracies"],
                "variants": table["variants"], "runs": table["runs"]})
    if (picture := Path(arguments.out) / PICTURE).exists():
        shutil.copy(picture, RESULTS / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
