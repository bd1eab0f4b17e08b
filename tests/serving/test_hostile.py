"""Hundreds of requests that mean no good, to a real server: each gets a 4xx or no answer, and the next client its own.

What is asserted after each group: the same process still runs, answers a good request bit for bit, and its memory has
not grown by more than what it may hold at once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hostile_bytes import (
    CLASSIFY,
    INFER,
    SHAPE,
    SIZE,
    abandon,
    chunked,
    connect,
    exchange,
    hostile_requests,
    infer_body,
)
from hostile_bytes import lines as request_lines
from hostile_images import hostile_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_process import PATIENCE, ServerProcess, until

LIMITS = ("--max-body-mb", 1, "--max-megapixels", 4, "--body-timeout", 1, "--max-queue", 8, "--threads", 1)
LARGEST_GROWTH = 100.0
"""MB. 35 were seen: a few bodies of 1 MB and what their JSON becomes, an image of 4 megapixels in a few copies. A bomb
that went off would be 150 MB (an image at Pillow's own limit) to 7.5 GB (one of 50,000 x 50,000 pixels)."""
READABLE = {"a chunk of 2^32 - 1 bytes", "a wrong checksum", "a palette that is missing"}
"""Damaged, but Pillow reads them, here as in `mecdeploy predict`."""
NEEDED = ("name", "datatype", "shape", "data")
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Lone surrogates, which JSON can spell and UTF-8 cannot, among them.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
keys = st.sampled_from(["name", "datatype", "shape", "data", "parameters", "inputs", "outputs", "id"]) | st.text(
    max_size=8
)


class Victim:
    """The server, and what proves that it is well."""

    def __init__(self, server: ServerProcess, model: Path) -> None:
        self.server = server
        self.pixels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"pixels": self.pixels})
        self._expected = logits.ravel().tolist()
        self._heard = 0
        self.require_health()
        self._before = self._megabytes("VmRSS")

    def post(self, path: str, body: bytes, **headers: str) -> int:
        """The status of the answer, over a connection of a well-behaved library."""
        connection = http.client.HTTPConnection(self.server.host, timeout=PATIENCE)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("POST", path, body, named)
            response = connection.getresponse()
            response.read()
            return response.status

    def require_health(self) -> None:
        """Alive, right, and no fatter than it may be."""
        good = infer_body(data=self.pixels.ravel().tolist())
        # 429 and 503: connections that were torn down are not noticed at once.
        until(lambda: self.server.ask(INFER, good)[0] not in (429, 503), "room for one more")
        status, answer = self.server.ask(INFER, good)
        assert status == 200, answer
        (output,) = json.loads(answer)["outputs"]
        assert output["data"] == self._expected
        assert self.server.process.poll() is None
        if hasattr(self, "_before"):
            grown = self._megabytes("VmHWM") - self._before
            assert grown < LARGEST_GROWTH, f"{grown:.0f} MB more than at the start"
        said, self._heard = self.server.log[self._heard :], len(self.server.log)
        assert " ERROR " not in said, said

    def _megabytes(self, field: str) -> float:
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0]) / 1e3


@pytest.fixture(scope="module")
def victim(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    arguments = [f"photos={photos}", *map(str, LIMITS)]
    with ServerProcess(arguments, tmp_path_factory.mktemp("victim")) as server:
        yield Victim(server, photos)


@pytest.fixture(autouse=True)
def unharmed(victim: Victim) -> Iterator[None]:
    yield
    victim.require_health()


def test_requests_that_are_none(victim: Victim) -> None:
    answered = {what: exchange(victim.server.host, request) for what, request in hostile_requests()}
    assert len(answered) > 90
    assert {what: status for what, status in answered.items() if status is not None and not 400 <= status < 500} == {}
    closed = [what for what, status in answered.items() if status is None]
    assert closed == []


def test_images_that_are_none(victim: Victim) -> None:
    answered = {
        what: victim.post(CLASSIFY, content, content_type="application/octet-stream")
        for what, content in hostile_images()
    }
    assert len(answered) > 45
    refused = {what for what, status in answered.items() if status in (400, 413)}
    assert {what: answered[what] for what in answered.keys() - refused - READABLE} == {}


@QUICK
@given(body=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_and_any_json(victim: Victim, body: bytes) -> None:
    assert 400 <= victim.post(INFER, body) < 500


@QUICK
@given(data=st.data())
def test_a_good_request_with_something_changed(victim: Victim, data: st.DataObject) -> None:
    request: dict[str, Any] = json.loads(infer_body())
    place, needed = data.draw(st.sampled_from([(request, ("inputs",)), (request["inputs"][0], NEEDED)]), label="place")
    key = data.draw(keys)
    place[key] = data.draw(values)
    status = victim.post(INFER, json.dumps(request).encode())
    # What the server does not read is none of its business.
    assert 400 <= status < 500 or (status == 200 and key not in needed)


@QUICK
@given(
    length=st.integers(-10, 300)
    | st.integers()
    | st.text(st.characters(max_codepoint=255, exclude_categories=("Cc",))),
    size=st.integers(-10, 2 * SIZE) | values,
    sent=st.integers(0, 2 * SIZE),
)
def test_binary_tensors_of_wrong_lengths(victim: Victim, length: object, size: object, sent: int) -> None:
    entry = {"name": "pixels", "datatype": "UINT8", "shape": list(SHAPE), "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [entry]}).encode()
    status = victim.post(INFER, header + bytes(sent), Inference_Header_Content_Length=str(length).strip())
    right = (size, sent, length) == (SIZE, SIZE, len(header))
    assert status == 200 if right else 400 <= status < 500


@pytest.mark.parametrize("depth", [100, 1000, 100_000, 400_000])
@pytest.mark.parametrize("opening", [b"[", b'{"inputs":', b'[{"data":'])
def test_nesting(victim: Victim, depth: int, opening: bytes) -> None:
    assert victim.post(INFER, (opening * depth)[:900_000]) == 400
    closing = {b"[": b"]", b'{"inputs":': b"}", b'[{"data":': b"}]"}[opening]
    depth = min(depth, 900_000 // (len(opening) + len(closing)))
    assert victim.post(INFER, opening * depth + b"0" + closing * depth) == 400


@pytest.mark.parametrize(
    "shape",
    [
        *([], [0], [1], [-1, 3, 16, 16], [0, 3, 16, 16], [2**31, 3, 16, 16], [2**63, 3, 16, 16], [10**30, 3, 16, 16]),
        *([1, 3, 16], [1, 3, 16, 16, 1], [1, 3, 16, 17], [1] * 10_000, [1.0, 3, 16, 16], ["1", 3, 16, 16], [True] * 4),
        *(None, "1,3,16,16", {"0": 1}, [[1, 3, 16, 16]], [None] * 4, [1e400, 3, 16, 16]),
    ],
)
def test_shapes(victim: Victim, shape: object) -> None:
    assert victim.post(INFER, infer_body(shape=shape)) == 400


@pytest.mark.parametrize(
    "data",
    [
        *([], [0] * (SIZE - 1), [0] * (SIZE + 1), [0] * 300_000, [256] * SIZE, [-1] * SIZE, [0.5] * SIZE, ["0"] * SIZE),
        *([None] * SIZE, [10**400] * 100, [True] * SIZE, [float("nan")] * SIZE, [float("inf")] * SIZE, "0" * SIZE),
        *({}, None, [[0] * SIZE, [0]], [[[[0] * 16] * 16] * 2 + [[[0] * 15] * 16]], [{}] * SIZE, [[]] * SIZE),
    ],
)
def test_data(victim: Victim, data: object) -> None:
    assert victim.post(INFER, infer_body(data=data)) == 400


@pytest.mark.parametrize("item", ["[]", "{}", "0", "1e9", "[0]", '"a"', '{"name":""}', "null", '"\\ud800"'])
@pytest.mark.parametrize("place", ['{"inputs":[%s]}', '{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[%s]}]}'])
def test_bodies_that_swell(victim: Victim, place: str, item: str) -> None:
    """A list of empty lists takes thirty times the memory of its JSON."""
    body = place % ",".join([item] * (900_000 // (len(item) + 1)))
    assert victim.post(INFER, body.encode()) == 400


def test_lists_are_counted_before_they_are_made(victim: Victim) -> None:
    status, answer = victim.server.ask(INFER, b'{"inputs":[' + b"[]," * 250_000 + b"0]}")
    assert status == 400 and "over 200000 lists and objects; send tensors flat" in answer


def test_a_form_of_almost_boundaries(victim: Victim) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    body = part + b"\r\n--bx" * 120_000 + b"\r\n--b--\r\n"
    status, answer = victim.server.ask(CLASSIFY, body, content_type="multipart/form-data; boundary=b")
    assert status == 400 and "over 100000 lines" in answer


@pytest.mark.parametrize("size", ['"\\ud800"', "[1]", "{}", "1e3", "-1", "9" * 4000, "true", "null", '""'])
def test_sizes_that_are_none(victim: Victim, size: str) -> None:
    entry = f'{{"name":"pixels","datatype":"UINT8","shape":{list(SHAPE)},"parameters":{{"binary_data_size":{size}}}}}'
    assert victim.post(INFER, f'{{"inputs":[{entry}]}}'.encode()) == 400


def test_many_rows_of_nothing(victim: Victim) -> None:
    """A shape costs nothing to write; the server must not make room for it."""
    rows = 10**9
    assert victim.post(INFER, infer_body(shape=[rows, *SHAPE[1:]], data=[0] * SIZE)) == 400
    entry = {"name": "pixels", "datatype": "UINT8", "shape": [rows, *SHAPE[1:]]}
    entry["parameters"] = {"binary_data_size": rows * SIZE}
    header = json.dumps({"inputs": [entry]}).encode()
    assert victim.post(INFER, header + bytes(SIZE), Inference_Header_Content_Length=str(len(header))) == 400


@pytest.mark.parametrize("cut", ["in the first line", "in a header", "before the body", "in the body", "in a chunk"])
def test_clients_that_leave(victim: Victim, cut: str) -> None:
    good = request_lines(f"POST {INFER} HTTP/1.1", f"Content-Length: {len(infer_body())}", body=infer_body())
    parts = request_lines(f"POST {INFER} HTTP/1.1", "Transfer-Encoding: chunked", body=chunked(infer_body(), 500))
    sent = {
        "in the first line": good[:9],
        "in a header": good[:70],
        "before the body": good[: good.index(b"\r\n\r\n") + 4],
        "in the body": good[:-10],
        "in a chunk": parts[:-800],
    }[cut]
    for _ in range(40):
        abandon(victim.server.host, sent)


def test_clients_that_leave_before_their_answer(victim: Victim) -> None:
    good = request_lines(f"POST {INFER} HTTP/1.1", f"Content-Length: {len(infer_body())}", body=infer_body())
    for _ in range(40):
        abandon(victim.server.host, good)
    until(
        lambda: victim.server.metric('mecdeploy_requests_in_flight{model="photos"}') == 0, "all requests are done with"
    )


def test_bodies_that_trickle(victim: Victim) -> None:
    """As many as the server takes at once, and a byte at a time: all are told so, and their places are free again."""
    waiting = [connect(victim.server.host) for _ in range(8)]
    try:
        for connection in waiting:
            connection.sendall(request_lines(f"POST {INFER} HTTP/1.1", "Content-Length: 1000", body=b"{"))
        for connection in waiting:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b" ")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    finally:
        for connection in waiting:
            connection.close()


def test_idle_connections_keep_nobody_out(victim: Victim) -> None:
    idle = [connect(victim.server.host) for _ in range(16)]
    try:
        victim.require_health()
    finally:
        for connection in idle:
            connection.close()


def test_a_hundred_requests_on_one_connection_after_a_refusal(victim: Victim) -> None:
    """A refused body is read to its end, so that what follows it is no part of it."""
    connection = http.client.HTTPConnection(victim.server.host, timeout=PATIENCE)
    bodies: list[Callable[[], bytes]] = [infer_body, lambda: infer_body(shape=[1]), lambda: b"{" * 5000]
    with contextlib.closing(connection):
        for number in range(99):
            connection.request("POST", INFER, bodies[number % 3]())
            response = connection.getresponse()
            response.read()
            assert response.status == (200, 400, 400)[number % 3]
