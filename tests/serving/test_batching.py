"""Rows of many requests in one run: the same answers, in bounded batches, and nobody waits for nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from mecdeploy.serving.batching import Arrays, Batcher


class Doubler:
    """y = 2 x, row by row; counts its batches, and waits at a gate."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, arrays: Arrays) -> Arrays:
        self.gate.wait()
        self.batches.append(len(arrays["x"]))
        if (arrays["x"] == 13).any():
            raise ValueError("thirteen")
        return {"y": 2 * arrays["x"]}


def rows(*values: int) -> Arrays:
    return {"x": np.array(values)}


def batched(work: Callable[[Batcher, Doubler], Coroutine[Any, Any, None]], **limits: Any) -> Doubler:
    doubler = Doubler()

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            await work(Batcher(doubler, executor=executor, **limits), doubler)

    asyncio.run(asyncio.wait_for(main(), 60))
    return doubler


def test_requests_that_wait_are_run_together() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        answers = await asyncio.gather(*(batcher.submit(rows(i, i + 1), 2) for i in range(5)))
        assert [answer["y"].tolist() for answer in answers] == [[2 * i, 2 * i + 2] for i in range(5)]

    assert batched(work, max_rows=4, max_delay=0).batches == [4, 4, 2]


def test_a_batch_is_not_split_to_fill_it() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        await asyncio.gather(*(batcher.submit(rows(*range(n)), n) for n in (3, 2, 1, 4, 9)))

    assert batched(work, max_rows=4, max_delay=0).batches == [3, 3, 4, 9]


def test_without_free_rows_each_request_runs_alone() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        await asyncio.gather(*(batcher.submit(rows(i), 1) for i in range(3)))

    assert batched(work, max_rows=0, max_delay=0).batches == [1, 1, 1]


def test_a_full_batch_does_not_wait() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        await asyncio.gather(*(batcher.submit(rows(i), 1) for i in range(4)))

    assert batched(work, max_rows=4, max_delay=1e6).batches == [4]


def test_a_lone_request_waits_for_others_and_no_longer() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        first = asyncio.create_task(batcher.submit(rows(1), 1))
        await asyncio.sleep(0)
        second = asyncio.create_task(batcher.submit(rows(2), 1))
        await asyncio.gather(first, second)
        await batcher.submit(rows(3), 1)

    assert batched(work, max_rows=4, max_delay=0.05).batches == [2, 1]


def test_what_is_cancelled_is_not_run() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        doubler.gate.clear()
        running = asyncio.create_task(batcher.submit(rows(1), 1))
        while batcher._queue or batcher._worker is None:
            await asyncio.sleep(0)
        left, stays = (asyncio.create_task(batcher.submit(rows(i), 1)) for i in (2, 3))
        await asyncio.sleep(0)
        left.cancel()
        doubler.gate.set()
        assert [(await task)["y"].tolist() for task in (running, stays)] == [[2], [6]]

    assert batched(work, max_rows=4, max_delay=0).batches == [1, 1]


def test_a_request_that_fails_fails_alone() -> None:
    async def work(batcher: Batcher, doubler: Doubler) -> None:
        answers = await asyncio.gather(*(batcher.submit(rows(i), 1) for i in (12, 13, 14)), return_exceptions=True)
        assert [str(answer) if isinstance(answer, Exception) else answer["y"].tolist() for answer in answers] == [
            [24],
            "thirteen",
            [28],
        ]
        assert (await batcher.submit(rows(1), 1))["y"].tolist() == [2]

    assert batched(work, max_rows=4, max_delay=0).batches == [3, 1, 1, 1, 1]


def test_a_row_does_not_depend_on_its_batch(photos: Path, pixels: np.ndarray) -> None:
    """What dynamic batching rests on, of onnxruntime's integer kernels: equal bits, whatever else is in the batch."""
    session = ort.InferenceSession(photos)
    alone = np.concatenate([session.run(None, {"pixels": row[np.newaxis]})[0] for row in pixels])
    for size in (2, 3, 7, 8, 16, 31, 40):
        together = [session.run(None, {"pixels": pixels[at : at + size]})[0] for at in range(0, len(pixels), size)]
        np.testing.assert_array_equal(np.concatenate(together), alone)


@pytest.mark.parametrize("limits", [{"max_batch": 8, "max_delay_ms": 20}, {"max_batch": 1}, {}])
def test_answers_of_many_clients(photos: Path, pixels: np.ndarray, limits: dict[str, Any]) -> None:
    """Every answer is its own request's, and equals a session's on that row alone, bit for bit."""
    import httpx2

    from mecdeploy.serving.app import build_app
    from mecdeploy.serving.config import ServeConfig

    session = ort.InferenceSession(photos)
    app = build_app(ServeConfig(models=(str(photos),), threads=1, reload_seconds=0, **limits))

    async def ask(client: httpx2.AsyncClient, row: np.ndarray) -> list[float]:
        entry = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": row.ravel().tolist()}
        answer = await client.post("/v2/models/photos/infer", content=json.dumps({"inputs": [entry]}))
        data: list[float] = answer.json()["outputs"][0]["data"]
        return data

    async def all_at_once() -> list[list[float]]:
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://here", timeout=60) as client,
        ):
            return await asyncio.gather(*(ask(client, row) for row in pixels))

    found = np.array(asyncio.run(all_at_once()), np.float32)
    alone = np.concatenate([session.run(None, {"pixels": row[np.newaxis]})[0] for row in pixels])
    np.testing.assert_array_equal(found, alone)
    exposition = app.state.service.metrics.exposition().decode()
    (runs,) = (line for line in exposition.splitlines() if line.startswith("mecdeploy_batch_rows_count"))
    (total,) = (line for line in exposition.splitlines() if line.startswith("mecdeploy_batch_rows_sum"))
    assert float(total.split()[-1]) == len(pixels)
    assert (float(runs.split()[-1]) == len(pixels)) is (limits.get("max_batch") == 1)
