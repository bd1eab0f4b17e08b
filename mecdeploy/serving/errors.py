"""Why a request gets no answer."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is not answered. status: of HTTP, 4xx where the client can help it; the message is for the client.

    retry_after: seconds after which the same request may be answered; None where it never will be.
    """

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
