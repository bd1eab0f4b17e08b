"""The page at /, one file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response


async def page(request: Request) -> Response:
    """The page, and what it may do: run its own script, show the picture it was given, ask this server."""
    content, policy = _content()
    return Response(
        content,
        headers={
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )


@cache
def _content() -> tuple[bytes, str]:
    """The file, and a Content-Security-Policy that names its script and its style by their digests."""
    text = (files("mecdeploy.serving") / "page.html").read_text(encoding="utf-8")
    script, style = (
        " ".join(f"'sha256-{_digest(part)}'" for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
