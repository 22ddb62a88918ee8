"""The picture of ``minitv explore`` that the README shows: a screenshot of a page, made by Chromium.

    python benchmarks/explorer.py                       trains the model of `minitv train` first, which takes half a minute
    python benchmarks/explorer.py --run runs/mine       shows another run

It needs plotly, selenium and Chromium, and writes examples/explorer.png.
"""

from __future__ import annotations

import argparse
import base64
import subprocess
import sys
import tempfile
from pathlib import Path

from rounds import ROOT

sys.path.insert(0, str(ROOT))
from tests.minitv import browser as chromium

PICTURE = ROOT / "examples" / "explorer.png"
WIDTH, HEIGHT = 1100, 1306  # of the part of the page that is shown, in its pixels
LARGEST = 200_000  # bytes
TOKEN = 40  # the token that is pointed at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the folder of a run; without it, one is trained")
    run = parser.parse_args().run
    if reason := chromium.missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = f"{folder}/transformer"
            subprocess.run([sys.executable, "-m", "minitv", "train", "--out", run], check=True, cwd=ROOT)
        page = Path(folder) / "explore.html"
        subprocess.run([sys.executable, "-m", "minitv", "explore", run, "--tokens", "48", "--out", page], check=True, cwd=ROOT)
        browser = chromium.start(Path(folder) / "profile")
        try:
            chromium.show(browser, page, WIDTH, "light")
            browser.execute_script(f"document.querySelectorAll('#tokens-a span')[{TOKEN}].click()")
            edge = "return document.getElementById('{}-a').getBoundingClientRect().{} + scrollY"
            top = browser.execute_script(edge.format("text", "top")) - 8
            end = browser.execute_script(edge.format("mixing", "bottom")) + 8
            clip = dict(x=0, y=top, width=WIDTH, height=min(HEIGHT, end - top), scale=1)
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", dict(captureBeyondViewport=True, clip=clip))
        finally:
            browser.quit()
    PICTURE.write_bytes(base64.b64decode(shot["data"]))
    size = PICTURE.stat().st_size
    print(f"{PICTURE.relative_to(ROOT)}: {size / 1000:.0f} kB")
    if size > LARGEST:
        raise SystemExit(f"the picture has {size} bytes, and {LARGEST} are allowed")


if __name__ == "__main__":
    main()
