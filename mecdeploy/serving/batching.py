"""Dynamic batching: rows of several requests run as one. No task and no thread is kept while nothing waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    arrays: Arrays
    rows: int
    since: float
    answer: asyncio.Future[Arrays]


class Batcher:
    """Runs what is submitted, first come, first served, one batch at a time; used on one event loop."""

    def __init__(
        self,
        run: Callable[[Arrays], Arrays],
        *,
        executor: Executor,
        max_rows: int,
        max_delay: float,
        ran: Callable[[int], object] = lambda rows: None,
        queued: Callable[[int], object] = lambda rows: None,
    ) -> None:
        """Nothing is run yet.

        run: outputs for inputs, called in `executor`; both have rows along axis 0.
        max_rows: of a batch; a longer request is run alone, so 0 runs each alone.
        max_delay: seconds that the oldest request waits, at most, for a batch to be filled.
        ran: called with the rows of each batch. queued: called with the rows that join, or negative, leave the queue.
        """
        self._run, self._executor, self._ran, self._queued = run, executor, ran, queued
        self._max_rows, self._max_delay = max_rows, max_delay
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, arrays: Arrays, rows: int) -> Arrays:
        """The outputs for these inputs of `rows` rows. Cancelled before its batch is run, a request is not run."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(arrays=arrays, rows=rows, since=loop.time(), answer=loop.create_future())
        self._queue.append(waiting)
        self._rows += rows
        self._queued(rows)
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await waiting.answer

    def hurry(self) -> None:
        """From now on, wait for no batch to be filled."""
        self._max_delay = 0.0
        self._arrived.set()

    async def _work(self) -> None:
        while self._queue:
            await self._fill()
            batch = self._take()
            if batch:
                self._ran(sum(waiting.rows for waiting in batch))
                await self._answer(batch)

    async def _fill(self) -> None:
        """Wait until the queue fills a batch, or its oldest request has waited long enough."""
        loop = asyncio.get_running_loop()
        while self._rows < self._max_rows:
            deadline = self._queue[0].since + self._max_delay
            if loop.time() >= deadline:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The next batch off the queue, without what was cancelled."""
        batch: list[_Waiting] = []
        rows = 0
        while self._queue and (rows == 0 or rows + self._queue[0].rows <= self._max_rows):
            waiting = self._queue.popleft()
            self._rows -= waiting.rows
            self._queued(-waiting.rows)
            if not waiting.answer.done():
                batch.append(waiting)
                rows += waiting.rows
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._executor, _run_joined, self._run, batch)
        except Exception as error:
            if len(batch) > 1:  # a request whose values fail a model must not fail its neighbours
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)


def _run_joined(run: Callable[[Arrays], Arrays], batch: list[_Waiting]) -> list[Arrays]:
    """One answer for each request of a batch."""
    if len(batch) == 1:
        return [run(batch[0].arrays)]
    joined = {name: np.concatenate([waiting.arrays[name] for waiting in batch]) for name in batch[0].arrays}
    outputs = run(joined)
    ends = np.cumsum([waiting.rows for waiting in batch])
    return [
        {name: array[end - waiting.rows : end] for name, array in outputs.items()}
        for waiting, end in zip(batch, ends, strict=True)
    ]
