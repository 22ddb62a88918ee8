"""A page in a real browser: Chromium without a window, which Selenium drives."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str:
    """Why there is no browser; empty where there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "a page in a browser needs selenium: pip install selenium"
    if not _chromium() or not shutil.which("chromedriver"):
        return "a page in a browser needs Chromium and its driver: apt-get install chromium chromium-driver"
    return ""


def start(profile: str | Path) -> Any:
    """A browser that keeps what it writes in the folder ``profile``, and logs its console and its requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _chromium()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def show(browser: Any, path: Path, width: int, scheme: str, scale: float = 1) -> None:
    """Open a page in a window of this width, light or dark, and wait until its script has drawn everything."""
    screen = dict(width=width, height=900, deviceScaleFactor=scale, mobile=width < 500)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    prefer(browser, scheme)
    browser.get("about:blank")
    for log in ("performance", "browser"):
        browser.get_log(log)  # of what the browser opens by itself
    browser.get(path.resolve().as_uri())
    end = time.monotonic() + 30
    while browser.execute_script("return document.documentElement.dataset.ready") != "yes":
        if time.monotonic() > end:
            raise TimeoutError(f"{path} was not drawn in 30 seconds: {browser.get_log('browser')}")
        time.sleep(0.05)


def prefer(browser: Any, scheme: str) -> None:
    """Prefer light or dark colours."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[dict(name="prefers-color-scheme", value=scheme)]))
