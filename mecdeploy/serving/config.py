"""The settings of a server."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mecdeploy.errors import UserError

_LEAST = {
    "workers": 1,
    "threads": 0,
    "max_batch": 1,
    "max_delay_ms": 0,
    "max_queue": 1,
    "timeout": 0.001,
    "body_timeout": 0.001,
    "max_body_mb": 0.001,
    "max_megapixels": 0.001,
    "reload_seconds": 0,
    "drain_seconds": 0,
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What is served, where, and within which limits. Raises UserError for a value out of range.

    models: each NAME=PATH or PATH, of a file, a run folder, a folder of versions, or a folder of such folders.
    workers: processes. threads: of onnxruntime, for each model of a process; 0 shares the cores among the processes.
    max_batch: rows of one run. max_delay_ms: how long a run that could take more rows waits
    for them; 0 runs together what came in while the last run lasted.
    max_queue: requests of a model that a process has accepted and not answered; the next one gets status 429.
    timeout: seconds from a request's headers to its answer. body_timeout: of those, for its body to arrive.
    max_body_mb, max_megapixels: largest body (10^6 bytes), largest image that is decoded (10^6 pixels).
    reload_seconds: between two looks for a new version; 0: never. drain_seconds: to finish requests in at the end.
    """

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 0
    max_batch: int = 32
    max_delay_ms: float = 0.0
    max_queue: int = 256
    timeout: float = 30.0
    body_timeout: float = 10.0
    max_body_mb: float = 16.0
    max_megapixels: float = 50.0
    reload_seconds: float = 2.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("there is no model to serve; name at least one file.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}; it must be from 0 (any free one) to 65535.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise UserError(f"{name} is {value}; it must be a number of at least {least}.")

    @property
    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        """Of one image."""
        return int(self.max_megapixels * 1e6)

    @property
    def threads_per_model(self) -> int:
        """Threads of one run of onnxruntime."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.workers)
