"""What a command said, and how the tests look at it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TINY = ["--epochs", "2", "--fp-epochs", "1", "--device", "cpu"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error, asserting that it is one line and the exit code is the user's."""
        assert self.code == 2, f"exit {self.code}: {self.err}"
        lines = [line for line in self.err.splitlines() if line]
        assert lines and lines[-1].startswith("Error: "), self.err
        assert "Traceback" not in self.err
        return lines[-1]


Call = Callable[..., Outcome]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the nearest thing to a full disk that needs no disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
