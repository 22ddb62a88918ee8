"""What every variant learns of one text in the same number of steps: ``minitv compare``, its table and picture kept.

    python benchmarks/learning.py --data tinyshakespeare.txt [VARIANT ...] [--preset nanogpt-cpu] [--out runs/learning]

Parameters, batches, tokens and schedule are the same for all. Runs are kept in ``--out``: the same command goes on from
there. The result goes to benchmarks/results/learning.json, the curves to learning.png beside it.
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
from minitv.compare import PICTURE, TABLE
from minitv.options import PRESETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names of `minitv list` (default: all)")
    parser.add_argument("--data", required=True, help="text file")
    parser.add_argument("--preset", choices=list(PRESETS), default="nanogpt-cpu", help="default: nanogpt-cpu")
    parser.add_argument("--out", default=str(ROOT / "runs" / "learning"), help="folder of the runs (default: runs/learning)")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "minitv", "compare", *arguments.variants, "--data", arguments.data,
               "--preset", arguments.preset, "--out", arguments.out]
    if code := subprocess.run(command).returncode:
        return code
    found = json.loads((Path(arguments.out) / TABLE).read_text(encoding="utf-8"))
    save("learning", {"benchmark": "learning", "threads": cores(), "preset": arguments.preset, "rounds": 1,
                      "data": Path(arguments.data).name, "steps": found["runs"][0]["steps"],
                      "ngram_bpc": found["runs"][0]["ngram_bpc"], "variants": found["variants"]})
    if (picture := Path(arguments.out) / PICTURE).exists():
        shutil.copy(picture, RESULTS / "learning.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
