"""What a process serves: models with their batches, admission, time limits. HTTP is app.py's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from mecdeploy.serving.batching import Arrays, Batcher
from mecdeploy.serving.config import ServeConfig
from mecdeploy.serving.errors import Refusal
from mecdeploy.serving.metrics import Metrics
from mecdeploy.serving.models import ServedModel
from mecdeploy.serving.repository import Slot, find_sources, watch

T = TypeVar("T")
_RETRY_AFTER = 1


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A version of a model, and the batches that are its own: what was accepted for it is answered by it."""

    model: ServedModel
    batcher: Batcher
    max_batch: int

    async def infer(self, arrays: Arrays) -> Arrays:
        """The model's outputs, run together with what others ask for."""
        rows = len(next(iter(arrays.values()))) if self.model.free_rows else 1
        if rows > self.max_batch:
            raise Refusal(
                400, f"the request has {rows} rows; at most {self.max_batch} are run together: send it in parts."
            )
        return await self.batcher.submit(arrays, rows)


class Service:
    """Loads every model, or raises UserError. Used on one event loop, but for `in_thread`."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.draining = False
        sources = find_sources(config.models)
        # A thread for each model's batches, and as many as there are cores for images and long bodies.
        self._runs = ThreadPoolExecutor(len(sources), thread_name_prefix="runs")
        self._work = ThreadPoolExecutor(config.threads_per_model, thread_name_prefix="work")
        self._slots: dict[str, Slot] = {}
        self._serving: dict[str, Serving] = {}
        self._accepted: Counter[str] = Counter()
        for source in sources:
            self.metrics.expect(source.name)
            slot = Slot(source, config.threads_per_model, partial(self._count_reload, source.name))
            self._slots[source.name] = slot
            self._switch(slot, slot.model)

    @property
    def models(self) -> list[ServedModel]:
        """The versions that are served now."""
        return [serving.model for serving in self._serving.values()]

    def find(self, name: str, version: str | None) -> Serving:
        """The version that is served. Refuses a name, and a version, that is not."""
        serving = self._serving.get(name)
        if serving is None:
            raise Refusal(404, f"there is no model {name[:80]!r}; served are {', '.join(self._serving)}.")
        if version is not None and version != serving.model.version:
            raise Refusal(
                404, f"model {name!r} has no version {version[:40]!r}; version {serving.model.version} is served."
            )
        return serving

    @contextmanager
    def admit(self, name: str) -> Iterator[None]:
        """Hold one of the places that a model has for requests, from before the body is read to the answer."""
        if self.draining:
            raise Refusal(503, "the server is shutting down.", retry_after=_RETRY_AFTER)
        if self._accepted[name] >= self.config.max_queue:
            raise Refusal(
                429,
                f"model {name!r} has {self.config.max_queue} requests to answer and takes no more; try again later.",
                retry_after=_RETRY_AFTER,
            )
        self._accepted[name] += 1
        try:
            with self.metrics.in_flight.labels(name).track_inprogress():
                yield
        finally:
            self._accepted[name] -= 1

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run what takes long, so that other requests are heard meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._work, work, *arguments)

    def watching(self) -> Awaitable[None]:
        """Looks for new versions until it is cancelled."""
        return watch(self._slots.values(), self.config.reload_seconds, self._switch)

    def drain(self) -> None:
        """Refuse new requests from now on, and answer the accepted ones without waiting for others to join them."""
        self.draining = True
        for serving in self._serving.values():
            serving.batcher.hurry()

    def close(self) -> None:
        """End the threads."""
        self._runs.shutdown(wait=False)
        self._work.shutdown(wait=False)

    def _switch(self, slot: Slot, model: ServedModel) -> None:
        self.metrics.versions.labels(slot.model.name, slot.model.version).set(0)
        self.metrics.versions.labels(model.name, model.version).set(1)
        slot.model = model
        batcher = Batcher(
            model.infer,
            executor=self._runs,
            max_rows=self.config.max_batch if model.free_rows else 0,
            max_delay=self.config.max_delay_ms / 1e3 if model.free_rows else 0,
            ran=self.metrics.batch_rows.labels(model.name).observe,
            queued=self.metrics.queue_rows.labels(model.name).inc,
        )
        self._serving[model.name] = Serving(model=model, batcher=batcher, max_batch=self.config.max_batch)

    def _count_reload(self, name: str, result: str) -> None:
        self.metrics.reloads.labels(name, result).inc()
