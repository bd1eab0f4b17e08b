"""The image in a request's body."""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from mecdeploy.serving.errors import Refusal

FIELD = "image"
_MOST_LINES = 100_000
"""Of a form. The parser stops at each, and the event loop with it; 16 MB of a compressed image hold about 250."""
_TYPES = ("image/jpeg", "image/png", "application/octet-stream")


async def image_of(request: Request, body: bytes) -> bytes:
    """The file in a body: all of it, or the part called "image" of a form. What it is, its own bytes say."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        return await _part(request, body)
    if media not in _TYPES:
        raise Refusal(
            415,
            f"the body's content type is {media[:80]!r}; send {', '.join(_TYPES)}, or multipart/form-data with a file "
            f"called {FIELD!r}.",
        )
    return body


async def _part(request: Request, body: bytes) -> bytes:
    if body.count(b"\r\n") > _MOST_LINES:
        raise Refusal(400, f"the form has over {_MOST_LINES} lines, which no image has; send the file as the body.")

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    form = Request({"type": "http", "headers": request.scope["headers"]}, receive)
    try:
        async with form.form(max_files=1, max_fields=8) as fields:
            files = [value for name, value in fields.multi_items() if name == FIELD]
            if len(files) != 1 or not isinstance(files[0], UploadFile):
                raise Refusal(400, f"the form needs one file called {FIELD!r}, as curl -F {FIELD}=@FILE sends it.")
            return await files[0].read()
    except MultiPartException as error:
        raise Refusal(400, f"the form cannot be read: {error.message}") from None
