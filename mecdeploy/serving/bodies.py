"""Bodies of requests: never more than the limit is kept, and nobody waits for one for ever."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from mecdeploy.serving.errors import Refusal


class Body:
    """The body of one request, read once or thrown away."""

    def __init__(self, request: Request, *, limit: int, seconds: float) -> None:
        """limit: bytes. seconds: from now until all of it has to be here."""
        self._request, self._limit = request, limit
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._read = 0
        self.complete = False

    async def read(self) -> bytes:
        """All of it. Refuses one that is compressed (415), too long (413) or too slow (408)."""
        encoding = self._request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise Refusal(415, f"the body is encoded ({encoding[:40]!r}); send it as it is.")
        self._refuse_long(self._announced())
        chunks = bytearray()
        try:
            async with asyncio.timeout_at(self._deadline):
                async for chunk in self._request.stream():
                    self._count(chunk)
                    chunks += chunk
        except TimeoutError:
            raise Refusal(408, f"the body was not complete in time, {self._read} bytes had arrived.") from None
        self.complete = True
        return bytes(chunks)

    async def discard(self) -> bool:
        """Read what is left, within the same limits, and keep nothing: a client that is still sending hears no answer.

        Returns whether the connection can be used again.
        """
        if not self.complete and not self._read and "expect" not in self._request.headers:
            try:
                self._refuse_long(self._announced())
                async with asyncio.timeout_at(self._deadline):
                    async for chunk in self._request.stream():
                        self._count(chunk)
                self.complete = True
            except (TimeoutError, Refusal, ClientDisconnect):
                pass
        return self.complete

    def _announced(self) -> int:
        return int(self._request.headers.get("content-length", 0))  # the server has refused what is no number

    def _count(self, chunk: bytes) -> None:
        self._read += len(chunk)
        self._refuse_long(self._read)

    def _refuse_long(self, size: int) -> None:
        if size > self._limit:
            raise Refusal(413, f"the body has more than {self._limit} bytes, which are the most that are read.")
