"""More than the server takes: refused at once, in words, and what was accepted is answered."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.types import Message

from mecdeploy.serving.app import build_app
from mecdeploy.serving.config import ServeConfig
from mecdeploy.serving.models import ServedModel

ENTRY = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [0] * 768}
REQUEST = json.dumps({"inputs": [ENTRY]}).encode()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is closed, no batch is run."""
    opened = threading.Event()
    opened.set()
    infer = ServedModel.infer

    def guarded(self: ServedModel, arrays: Any) -> Any:
        opened.wait()
        return infer(self, arrays)

    monkeypatch.setattr(ServedModel, "infer", guarded)
    yield opened
    opened.set()


def application(photos: Path, **settings: Any) -> Starlette:
    return build_app(ServeConfig(models=(f"m={photos}",), threads=1, reload_seconds=0, **settings))


class Exchange:
    """One request to an ASGI application, with a client that may be slow, or leave."""

    def __init__(self, app: Starlette, path: str = "/v2/models/m/infer", method: str = "POST") -> None:
        self._app, self._scope = (
            app,
            {
                "type": "http",
                "http_version": "1.1",
                "method": method,
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "headers": [],
            },
        )
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: list[Message] = []

    def start(self, *chunks: bytes, complete: bool = True) -> asyncio.Task[tuple[int, dict[str, Any]]]:
        for number, chunk in enumerate(chunks, 1):
            more = not complete or number < len(chunks)
            self._incoming.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        return asyncio.create_task(self._run())

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self._sent[0]["headers"])

    async def _run(self) -> tuple[int, dict[str, Any]]:
        async def send(message: Message) -> None:
            self._sent.append(message)

        await self._app(self._scope, self._incoming.get, send)
        return self._sent[0]["status"], json.loads(self._sent[1]["body"] or b"{}")


@asynccontextmanager
async def running(app: Starlette) -> AsyncIterator[Starlette]:
    async with app.router.lifespan_context(app):
        yield app


def count(app: Starlette, status: int, endpoint: str = "infer", model: str = "m") -> float:
    series = f'mecdeploy_requests_total{{endpoint="{endpoint}",model="{model}",status="{status}"}} '
    found = [line for line in app.state.service.metrics.exposition().decode().splitlines() if line.startswith(series)]
    return float(found[0].removeprefix(series)) if found else 0


def gauge(app: Starlette, name: str) -> float:
    text = app.state.service.metrics.exposition().decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f'{name}{{model="m"}}'))


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_full_house_refuses_and_then_takes_again(photos: Path, gate: threading.Event) -> None:
    app = application(photos, max_queue=3)

    async def work() -> None:
        async with running(app):
            gate.clear()
            accepted = [Exchange(app).start(REQUEST) for _ in range(3)]
            await until(lambda: gauge(app, "mecdeploy_requests_in_flight") == 3)
            fourth = Exchange(app)
            status, content = await fourth.start(REQUEST[:9], REQUEST[9:])
            assert (status, content["error"]) == (
                429,
                "model 'm' has 3 requests to answer and takes no more; try again later.",
            )
            assert fourth.headers[b"retry-after"] == b"1"
            assert (await Exchange(app, "/v2/health/ready", "GET").start(b""))[0] == 200
            gate.set()
            assert [status for status, _ in await asyncio.gather(*accepted)] == [200] * 3
            assert (await Exchange(app).start(REQUEST))[0] == 200

    run(work)
    assert (count(app, 200), count(app, 429)) == (4, 1)
    assert gauge(app, "mecdeploy_requests_in_flight") == gauge(app, "mecdeploy_queue_rows") == 0


def test_a_server_that_ends_finishes_what_it_accepted(photos: Path, gate: threading.Event) -> None:
    app = application(photos)

    async def work() -> None:
        async with running(app):
            gate.clear()
            accepted = Exchange(app).start(REQUEST)
            await until(lambda: gauge(app, "mecdeploy_requests_in_flight") == 1)
            app.state.service.drain()
            status, content = await Exchange(app).start(REQUEST)
            assert (status, content["error"]) == (503, "the server is shutting down.")
            assert (await Exchange(app, "/v2/health/ready", "GET").start(b"")) == (503, {"ready": False})
            assert (await Exchange(app, "/v2/models/m/ready", "GET").start(b""))[0] == 503
            assert (await Exchange(app, "/v2/health/live", "GET").start(b""))[0] == 200
            gate.set()
            assert (await accepted)[0] == 200

    run(work)


def test_an_answer_that_takes_too_long(photos: Path, gate: threading.Event) -> None:
    app = application(photos, timeout=0.2)

    async def work() -> None:
        async with running(app):
            gate.clear()
            status, content = await Exchange(app).start(REQUEST)
            assert (status, content["error"]) == (504, "no answer within 0.2 seconds.")
            gate.set()
            assert (await Exchange(app).start(REQUEST))[0] == 200

    run(work)
    assert (count(app, 504), count(app, 200)) == (1, 1)


def test_a_body_that_does_not_come(photos: Path) -> None:
    app = application(photos, body_timeout=0.2)

    async def work() -> None:
        async with running(app):
            slow = Exchange(app)
            status, content = await slow.start(REQUEST[:10], complete=False)
            assert (status, content["error"]) == (408, "the body was not complete in time, 10 bytes had arrived.")
            assert slow.headers[b"connection"] == b"close"

    run(work)


def test_a_client_that_leaves_is_not_run_for(photos: Path, gate: threading.Event) -> None:
    app = application(photos)

    async def work() -> None:
        async with running(app):
            gate.clear()
            first = Exchange(app).start(REQUEST)
            await until(lambda: gauge(app, "mecdeploy_requests_in_flight") == 1)
            await until(lambda: gauge(app, "mecdeploy_queue_rows") == 0)
            leaver, stayer = Exchange(app), Exchange(app)
            left, stays = leaver.start(REQUEST), stayer.start(REQUEST)
            await until(lambda: gauge(app, "mecdeploy_queue_rows") == 2)
            leaver.leave()
            await left
            gate.set()
            assert [(await task)[0] for task in (first, stays)] == [200, 200]

    run(work)
    assert (count(app, 499), count(app, 200)) == (1, 2)
    assert 'mecdeploy_batch_rows_sum{model="m"} 2.0' in app.state.service.metrics.exposition().decode()


def test_a_client_that_leaves_while_it_sends(photos: Path) -> None:
    app = application(photos)

    async def work() -> None:
        async with running(app):
            leaver = Exchange(app)
            task = leaver.start(REQUEST[:10], complete=False)
            leaver.leave()
            await task
            assert gauge(app, "mecdeploy_requests_in_flight") == 0

    run(work)
    assert count(app, 499) == 1


def test_a_bug_shows_its_number_and_not_its_trace(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = application(photos)

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a secret of the server")

    async def work() -> None:
        async with running(app):
            monkeypatch.setattr("mecdeploy.serving.protocol.answer", fail)
            status, content = await Exchange(app).start(REQUEST)
            assert status == 500 and "secret" not in content["error"]
            assert content["error"].startswith("internal error; the server's log has it as request ")
            number = content["error"].removesuffix(".").rpartition(" ")[2]
            assert number in caplog.text and "a secret of the server" in caplog.text

    run(work)
    assert count(app, 500) == 1


def test_labels_are_not_the_clients(photos: Path) -> None:
    app = application(photos)

    async def work() -> None:
        async with running(app):
            for name in ("a", "b", "c"):
                assert (await Exchange(app, f"/v2/models/{name}/infer").start(REQUEST))[0] == 404

    run(work)
    assert count(app, 404, model="") == 3
    assert 'model="a"' not in app.state.service.metrics.exposition().decode()
