"""A server process, and a client that costs little: prepared requests over kept connections, one in the hands of each.

A general HTTP client takes as long for a request as the server does for its answer, and would be what is measured.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

HEADER_LENGTH = "Inference-Header-Content-Length"
_START_SECONDS = 120.0


@contextmanager
def serving(models: Sequence[Path], *options: str) -> Iterator[tuple[int, str, int]]:
    """`mecdeploy serve` of one process and one thread: its process id, host and port. Its port takes connections."""
    command = [sys.executable, "-m", "mecdeploy", "serve", *map(str, models), "--port", "0", "--threads", "1", *options]
    with TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with log.open("w") as stream:
            server = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while True:
                found = re.search(r"address=http://([\d.]+):(\d+)", log.read_text())
                if found is not None and _listens(found[1], int(found[2])):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the server did not start: {log.read_text()}")
                time.sleep(0.05)
            yield server.pid, found[1], int(found[2])
        finally:
            server.terminate()
            server.wait()


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port)).close()
    except OSError:
        return False
    return True


@dataclass(kw_only=True)
class Traffic:
    """What came of the requests. seconds: of each, from its first byte sent to its last byte received."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    refused: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.wall


def infer_request(host: str, model: str, image: NDArray[np.uint8]) -> bytes:
    """A request of the Open Inference Protocol for one image [C, H, W], tensors in and out as bytes."""
    size = {"parameters": {"binary_data_size": image.nbytes}}
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, *image.shape]}
    header = json.dumps({"inputs": [{**tensor, **size}], "parameters": {"binary_data_output": True}}).encode()
    body = header + image.tobytes()
    lines = (
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Host: {host}",
        f"{HEADER_LENGTH}: {len(header)}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Connection:
    """A kept connection and the answer that is arriving on it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.row, self.since = 0, 0.0
        self._received = b""

    def ask(self, requests: Sequence[bytes], row: int) -> None:
        """Send a request; its answer is to come."""
        self.row, self._received, self.since = row, b"", time.perf_counter()
        self.socket.sendall(requests[row])

    def answer(self) -> tuple[bytes, bytes] | None:
        """Head and body, once all has come."""
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the server closed a connection that it had to keep.")
        self._received += received
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or len(body) < _number(head, b"content-length: "):
            return None
        return head, body


def _number(head: bytes, name: bytes) -> int:
    return int(head.lower().partition(b"\r\n" + name)[2].partition(b"\r\n")[0])


def drive(
    address: tuple[str, int],
    requests: Sequence[bytes],
    expected: Sequence[bytes],
    *,
    connections: int,
    stop: Callable[[int], bool],
) -> Traffic:
    """Keep every connection busy until `stop` says so, which is called with the number of answers after each.

    requests, expected: row by row, what is sent and the bytes of the logits that have to end its answer.
    """
    traffic = Traffic()
    selector = selectors.DefaultSelector()
    opened = [_Connection(address) for _ in range(connections)]
    began, began_cpu = time.perf_counter(), time.process_time()
    for row, connection in enumerate(opened):
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.ask(requests, row % len(requests))
    busy, stopping = len(opened), False
    while busy:
        for key, _ in selector.select(timeout=60):
            connection = key.data
            answer = connection.answer()
            if answer is None:
                continue
            traffic.seconds.append(time.perf_counter() - connection.since)
            head, body = answer
            if not head.startswith(b"HTTP/1.1 200"):
                traffic.refused += 1
            elif not body.endswith(expected[connection.row]) or len(body) == 0:
                traffic.wrong += 1
            stopping = stopping or stop(len(traffic.seconds))
            if stopping:
                busy -= 1
                selector.unregister(connection.socket)
                connection.socket.close()
            else:
                connection.ask(requests, (connection.row + 1) % len(requests))
    traffic.wall, traffic.cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return traffic
