"""The process: foreign clients, signals, workers, connections that hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from server_process import PATIENCE, ServerProcess, until

Serve = Callable[..., ServerProcess]
ROW = json.dumps({"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [0] * 768}]})
INFER = "/v2/models/photos/infer"
IN_FLIGHT = 'mecdeploy_requests_in_flight{model="photos"}'


def test_tritons_client(serve_apart: Serve, photos: Path, newer: Path, pixels: np.ndarray) -> None:
    """NVIDIA's own client, which nobody here wrote, in each of its ways to send and to receive."""
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    server = serve_apart(photos, f"second={newer}")
    client = http.InferenceServerClient(server.host, connection_timeout=PATIENCE, network_timeout=PATIENCE)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("second")
    assert [entry["name"] for entry in client.get_model_repository_index()] == ["photos", "second"]
    (version,) = client.get_model_metadata("photos")["versions"]
    some = pixels[:7]
    expected = ort.InferenceSession(photos).run(None, {"pixels": some})[0]
    tensor = http.InferInput("pixels", some.shape, "UINT8")
    for sent in (True, False):
        tensor.set_data_from_numpy(some, binary_data=sent)
        for outputs in (None, *([http.InferRequestedOutput("logits", binary_data=got)] for got in (True, False))):
            answer = client.infer("photos", [tensor], outputs=outputs, request_id="7", model_version=version)
            np.testing.assert_array_equal(answer.as_numpy("logits"), expected)
            assert answer.get_response()["id"] == "7"
    waiting = [client.async_infer("photos", [tensor]) for _ in range(20)]
    for request in waiting:
        np.testing.assert_array_equal(request.get_result().as_numpy("logits"), expected)
    tensor.set_shape([7, 3, 16, 15])
    with pytest.raises(
        InferenceServerException, match=r"has shape \[7, 3, 16, 15\]; the model reads \[-1, 3, 16, 16\]"
    ):
        client.infer("photos", [tensor])
    with pytest.raises(InferenceServerException, match="there is no model 'third'; served are photos, second"):
        client.infer("third", [tensor])
    client.close()


def ask_together(server: ServerProcess, count: int) -> tuple[list[threading.Thread], list[tuple[int, str]]]:
    answers: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda: answers.append(server.ask(INFER, ROW.encode()))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_it_accepted(serve_apart: Serve, photos: Path, workers: int, end: int) -> None:
    # A batch that waits an hour to be filled, and runs at once when the signal comes.
    server = serve_apart(photos, "--workers", workers, "--max-delay-ms", 3_600_000, "--timeout", 3600)
    threads, answers = ask_together(server, 6)
    until(lambda: server.metric(IN_FLIGHT) == 6, "six requests accepted")
    assert server.end(end) == 0, server.log
    for thread in threads:
        thread.join(PATIENCE)
    assert [status for status, _ in answers] == [200] * 6, server.log
    starts = 1 + (workers if workers > 1 else 0)
    assert len(server.log.splitlines()) == starts, server.log  # the address, the workers, and nothing since
    with pytest.raises(OSError):
        server.ask("/v2/health/live")


def test_workers_count_together_and_are_replaced(serve_apart: Serve, photos: Path) -> None:
    server = serve_apart(photos, "--workers", 2)
    version = 'mecdeploy_model_version{model="photos",version="%s"}'
    served = version % json.loads(server.ask("/v2/models/photos")[1])["versions"][0]
    until(lambda: server.metric(served) == 2, "both workers serve")
    for _ in range(10):
        assert server.ask(INFER, ROW.encode())[0] == 200
    answered = 'mecdeploy_requests_total{endpoint="infer",model="photos",status="200"}'
    assert server.metric(answered) == 10
    workers = [int(number) for number in re.findall(r"worker (\d+) serves", server.log)]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: server.log.count(" serves") == 3, "a worker in its place")
    until(lambda: _settled(server, served), "both workers serve again")
    assert server.metric(answered) == 10  # what the dead one had counted still counts


def _settled(server: ServerProcess, series: str) -> bool:
    try:
        return server.metric(series) == 2
    except OSError:  # a connection that the dead worker had taken
        return False


def test_a_new_version_on_disk_is_served(serve_apart: Serve, photos: Path, newer: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository" / "m"
    (place / "1").mkdir(parents=True)
    shutil.copy(photos, place / "1" / "model.onnx")
    server = serve_apart(place.parent, "--reload-seconds", 0.05)
    assert '"model_version": "1"' in server.ask("/v2/models/m/infer", ROW.encode())[1]
    (place / "2").mkdir()
    (place / "2" / "model.onnx").write_bytes(newer.read_bytes()[:999])
    until(lambda: server.metric('mecdeploy_reloads_total{model="m",result="failed"}') == 1, "a failed reload")
    assert '"model_version": "1"' in server.ask("/v2/models/m/infer", ROW.encode())[1]
    shutil.copy(newer, place / "2" / "model.onnx")
    until(lambda: '"model_version": "2"' in server.ask("/v2/models/m/infer", ROW.encode())[1], "version 2")
    lines = server.log.splitlines()
    assert re.search(r"ERROR model m: .*/2/model.onnx is no ONNX file .*; version 1 goes on$", lines[1])
    assert lines[2].endswith("INFO model m: version 2 takes the place of 1") and len(lines) == 3


@pytest.mark.parametrize("sent", [[b""], [b"GET /v2 HTT"], [b"GET /v2 HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /v2"]])
def test_headers_that_do_not_come(photos: Path, monkeypatch: pytest.MonkeyPatch, sent: list[bytes]) -> None:
    """A connection that says nothing, or stops amid its first or second request, is closed."""
    import asyncio

    import uvicorn

    from mecdeploy.serving import connection
    from mecdeploy.serving.app import build_app
    from mecdeploy.serving.config import ServeConfig

    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    app = build_app(ServeConfig(models=(f"m={photos}",), threads=1, reload_seconds=0))
    settings = uvicorn.Config(app, http=connection.H11WithTimeout, ws="none", log_config=None, timeout_keep_alive=3600)

    async def work() -> bytes:
        server = uvicorn.Server(settings)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server._serve([listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            received = b""
            for number, part in enumerate(sent, 1):
                writer.write(part)
                reading = reader.read() if number == len(sent) else reader.readuntil(b"}")
                received += await asyncio.wait_for(reading, PATIENCE)
            writer.close()
            server.should_exit = True
            await serving
        return received

    received = asyncio.run(work())
    assert received.count(b"HTTP/1.1 200 OK") == len(sent) - 1


def test_what_is_refused_before_it_listens(call: Callable[..., tuple[int, str]], photos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ((photos, "--port", port), f"127.0.0.1 port {port} cannot be listened on (Address already in use)"),
            ((photos, "--port", 0, "--host", "no.such.host.invalid"), "host 'no.such.host.invalid' is no address"),
            ((photos, "--port", 0, "--max-batch", 0), "max_batch is 0; it must be a number of at least 1."),
            ((tmp_path / "text.onnx", "--port", 0), "text.onnx is no ONNX file that onnxruntime"),
            ((tmp_path / "text.onnx", "--port", 0, "--workers", 2), "text.onnx is no ONNX file that onnxruntime"),
            ((tmp_path / "none.onnx",), "none.onnx: no such model file; write one with `mecdeploy export`."),
            ((), "Missing argument 'MODEL...'"),
        ):
            code, error = call("serve", *arguments)
            assert code == 2 and message in error and len(error.splitlines()) == 1, error


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process: its exit code and stderr."""
    from mecdeploy.cli import main

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        assert isinstance(exit.value.code, int)
        return exit.value.code, capsys.readouterr().err

    return run


def test_neither_torch_nor_training_is_imported() -> None:
    script = (
        "import sys\nimport mecdeploy.serving.server\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'sklearn', 'rich', 'mecdeploy.training.model'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
