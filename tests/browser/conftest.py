"""A real Chromium, driven by playwright; tests that need it are skipped where the system has none."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that these tests find visiting.py under any pytest import mode
from visiting import Open, Visit, watched  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000
"""Milliseconds: of a browser that starts on a busy machine."""


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium. Skips where there is none: playwright's own would be a download."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is on the PATH (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One browser a module, not a session: playwright keeps this thread's asyncio loop running until it is closed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, timeout=PATIENCE)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open an address in a fresh profile: open_page(address, width=1280, scheme="light", offline=True) -> Visit."""
    contexts = []

    def visit(address: str, *, width: int = 1280, scheme: str = "light", offline: bool = False) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            offline=offline,
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        visited = watched(context.new_page())
        visited.page.goto(address)
        return visited

    yield visit
    for context in contexts:
        context.close()
