"""What a server counts, for Prometheus.

Several processes (prometheus_client's multi-process mode) keep their values in files of one folder, named by the
environment variable PROMETHEUS_MULTIPROC_DIR before this module is imported; any of them answers for all.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RELOAD_RESULTS = ("loaded", "failed")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The series of one server. Labels come from its own models and routes, never from what a client writes."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mecdeploy_requests",
            "Requests answered, by HTTP status; 499: the client left before its answer.",
            ("model", "endpoint", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "mecdeploy_request_seconds",
            "From a request's headers to its answer.",
            ("model", "endpoint"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch_rows = Histogram(
            "mecdeploy_batch_rows",
            "Rows that were run together.",
            ("model",),
            buckets=_ROWS,
            registry=self._registry,
        )
        self.in_flight = self._gauge("mecdeploy_requests_in_flight", "Requests accepted and not yet answered.", "model")
        self.queue_rows = self._gauge("mecdeploy_queue_rows", "Rows waiting to be run.", "model")
        self.versions = self._gauge(
            "mecdeploy_model_version", "Processes that serve this version now.", "model", "version"
        )
        self.reloads = Counter(
            "mecdeploy_reloads",
            "New versions found while serving: loaded, or failed and the old one kept.",
            ("model", "result"),
            registry=self._registry,
        )
        _forget_the_dead()

    def expect(self, model: str) -> None:
        """Begin a model's series at 0, so that a rate and an alert have something to go by before anything happens."""
        self.in_flight.labels(model)
        for result in RELOAD_RESULTS:
            self.reloads.labels(model, result)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        if FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, registry=self._registry, multiprocess_mode="livesum")


def _forget_the_dead() -> None:
    """Drop the gauges of processes that ended: a process that replaces a killed one does so for it."""
    folder = os.environ.get(FOLDER)
    for file in Path(folder).glob("gauge_live*.db") if folder is not None else ():
        process = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{process}").exists():
            mark_process_dead(process)  # type: ignore[no-untyped-call]
