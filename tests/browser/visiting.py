"""A page in a real browser, and what it did beside being shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page


@dataclass(frozen=True, kw_only=True)
class Visit:
    """errors: what the page's console said at level error, and what its scripts raised. requests: every address that
    it asked for, its own among them; data: addresses are left out, because nothing is asked for them.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        root = "document.documentElement"
        return int(self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))


Open = Callable[..., Visit]


def watched(page: Page) -> Visit:
    """A visit that is told what the page does from now on."""
    visit = Visit(page=page)
    page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("data:") else visit.requests.append(request.url))
    return visit
