"""A real browser for tests and pictures of the page, headless."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
HOW = (
    "The page is tested in a browser, and there is none: install one (Debian: apt-get install chromium; anywhere: "
    "python -m playwright install chromium), or name it in TINYSERVE_BROWSER."
)


class NoBrowserError(Exception):
    """There is none; the message says how to get one."""


def find(bundled: str) -> str:
    """The browser's program: TINYSERVE_BROWSER, one on the PATH, or Playwright's own at `bundled`."""
    named = os.environ.get("TINYSERVE_BROWSER")
    for path in [named] if named else [*map(shutil.which, NAMES), bundled]:
        if path and Path(path).is_file():
            return path
    raise NoBrowserError(f"TINYSERVE_BROWSER is {named}, which is no file. {HOW}" if named else HOW)


@contextmanager
def launched() -> Iterator[Browser]:
    """A running browser; raises NoBrowserError. Playwright's event loop occupies this thread until it is closed."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        sandbox = not hasattr(os, "geteuid") or os.geteuid() != 0  # Chromium refuses to sandbox what root runs
        browser = chromium.launch(
            executable_path=find(chromium.executable_path), args=ARGUMENTS, chromium_sandbox=sandbox
        )
        try:
            yield browser
        finally:
            browser.close()
