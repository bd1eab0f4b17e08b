"""Requests that no HTTP library would send, as bytes on a connection of their own."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator

INFER, CLASSIFY = "/v2/models/photos/infer", "/v1/models/photos/classify"
SHAPE = (1, 3, 16, 16)
SIZE = 768
PATIENCE = 60.0


def infer_body(**changes: object) -> bytes:
    """A good request as JSON, but for the changes to its only input."""
    entry = {"name": "pixels", "datatype": "UINT8", "shape": list(SHAPE), "data": [0] * SIZE}
    return json.dumps({"inputs": [{**entry, **changes}]}).encode()


def lines(first: str, *others: str, body: bytes = b"") -> bytes:
    """A request with these header lines and nothing else."""
    return "\r\n".join((first, "Host: x", *others)).encode("latin-1") + b"\r\n\r\n" + body


def post(path: str, body: bytes, *others: str) -> bytes:
    """A request with a length."""
    return lines(f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}", *others, body=body)


def chunked(body: bytes, size: int = 1000) -> bytes:
    """A body without a length."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def hostile_requests() -> Iterator[tuple[str, bytes]]:
    """(What it is, all its bytes); each deserves a status of 4xx, or a closed connection."""
    good, target = infer_body(), f"POST {INFER} HTTP/1.1"
    yield "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50)
    yield "HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
    yield "HTTP/0.9", b"GET /\r\n\r\n"
    yield "a version that there is not", lines(f"POST {INFER} HTTP/9.9", "Content-Length: 0")
    yield "a first line of 1 MB", b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    yield "a header of 1 MB", lines("GET /v2 HTTP/1.1", "X-Long: " + "a" * 1_000_000)
    yield "100,000 headers", lines("GET /v2 HTTP/1.1", *(f"X-{number}: {number}" for number in range(100_000)))
    yield "a header without a name", lines("GET /v2 HTTP/1.1", ": value")
    yield "a header with a null", lines("GET /v2 HTTP/1.1", "X-Null: a\0b")
    yield "a header folded over lines", lines("GET /v2 HTTP/1.1", "X-Fold: a\r\n\tb\0")
    yield "a space before the colon", lines(target, "Content-Length : 5", body=b"hello")
    yield "a negative length", lines(target, "Content-Length: -5")
    yield "a length that is no number", lines(target, "Content-Length: five", body=b"hello")
    yield "a length with a plus", lines(target, "Content-Length: +5", body=b"hello")
    yield "a length of 400 digits", lines(target, "Content-Length: " + "9" * 400)
    yield "a length of a terabyte", lines(target, "Content-Length: 1000000000000", body=good)
    yield "two lengths", lines(target, "Content-Length: 5", "Content-Length: 6", body=b"hello")
    yield "an empty body", post(INFER, b"")
    yield "a length and chunks", lines(target, "Content-Length: 5", "Transfer-Encoding: chunked", body=chunked(b"{}"))
    yield "an unknown transfer encoding", lines(target, "Transfer-Encoding: gzip", body=good)
    yield (
        "chunks whose size is no number",
        lines(target, "Transfer-Encoding: chunked", body=b"zz\r\nhello\r\n0\r\n\r\n"),
    )
    yield "a chunk of 2^70 bytes", lines(target, "Transfer-Encoding: chunked", body=b"4" + b"0" * 17 + b"\r\nhello\r\n")
    yield (
        "a chunk with a long extension",
        lines(target, "Transfer-Encoding: chunked", body=b"5;" + b"a" * 100_000 + b"\r\nhello\r\n0\r\n\r\n"),
    )
    yield "chunks of 2 MB", lines(target, "Transfer-Encoding: chunked", body=chunked(bytes(2_000_000), 50_000))
    yield "2 MB with their length", post(INFER, bytes(2_000_000))
    yield "a gzip body", post(INFER, b"\x1f\x8b\x08" + bytes(60), "Content-Encoding: gzip")
    yield "nothing that can be expected", lines(target, "Expect: 200-maybe", "Content-Length: 5", body=b"hello")
    yield (
        "an upgrade to WebSocket",
        lines(
            f"GET {INFER} HTTP/1.1",
            *(
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: AAAAAAAAAAAAAA",
            ),
        ),
    )
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "NONSENSE", "get"):
        yield f"{method} of infer", lines(f"{method} {INFER} HTTP/1.1", "Content-Length: 0")
    for path in _paths():
        yield f"the path {path[:60]}", post(path, good)
    for length in ("-1", "0", "1", "99999999", "1e3", "0x10", "", " ", "٣", "9" * 400):
        name = "Inference-Header-Content-Length"
        encoded = length.encode("utf-8").decode("latin-1")
        yield f"a JSON header of {length[:10]!r} bytes", post(INFER, good, f"{name}: {encoded}")
    for query in (
        "top=0",
        "top=-1",
        "top=1e9",
        "top=99999999999999999999",
        "top=%00",
        "top=\xff",
        "top[]=1",
        "top=nan",
    ):
        yield f"the query {query}", post(f"{CLASSIFY}?{query}", b"\xff\xd8", "Content-Type: image/jpeg")
    for media in ("", "text/plain", "image/svg+xml", "multipart/form-data", "multipart/form-data; boundary=", "*/*"):
        yield f"an image as {media!r}", post(CLASSIFY, b"\xff\xd8\xff", f"Content-Type: {media}")
    for form in _forms():
        yield f"the form {form[:40]!r}", post(CLASSIFY, form, "Content-Type: multipart/form-data; boundary=b")


def _paths() -> tuple[str, ...]:
    """Addresses of infer for models that there are not."""
    names = (
        *(
            "..",
            "../photos",
            "..%2f..%2f..%2fetc%2fpasswd",
            "%2e%2e/%2e%2e/etc/passwd",
            "photos%00",
            "photos%0a",
            "%ff",
        ),
        *("photos/", "photos/..", "photos.onnx", "PHOTOS", "a" * 5000, "", "%", "%zz", "photos;x=1", "*", "\xff\xfe"),
        *("photos/versions/..", "photos/versions/-1", "photos/versions/%2e%2e%2f1", "photos/versions/" + "9" * 4000),
    )
    absolute = ("//etc/passwd", "/../../etc/passwd", "/v2/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "file:///etc")
    return (*(f"/v2/models/{name}/infer" for name in names), *absolute, "*", "/v2/health/live\\..\\..")


def _forms() -> tuple[bytes, ...]:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="../../x.png"\r\n\r\n'
    return (
        b"",
        b"--b--\r\n",
        b"--b\r\n\r\n\r\n--b--\r\n",
        b"--c\r\nnot ours\r\n--c--\r\n",
        part,
        part + b"no image\r\n--b--\r\n",
        (part + b"\r\n") * 2 + b"--b--\r\n",
        (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n') * 1000 + b"--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="' + b"a" * 100_000 + b'"\r\n\r\n\r\n--b--\r\n',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n" + b"X: y\r\n" * 5000 + b"\r\n\r\n--b--\r\n",
        b"--b\r\nContent-Transfer-Encoding: base64\r\n" + part[5:] + b"%%%\r\n--b--\r\n",
    )


def exchange(host: str, request: bytes) -> int | None:
    """The status of the first answer; None where the server closes the connection without one."""
    with connect(host) as connection:
        # A refusal may come, and the connection may close, before all is sent.
        with contextlib.suppress(OSError):
            connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionError):
            while b"\r\n" not in received and (part := connection.recv(4096)):
                received += part
        return int(received.split(b" ")[1]) if received.startswith(b"HTTP/1.1 ") else None


def abandon(host: str, sent: bytes) -> None:
    """Send so much, then tear the connection down."""
    with connect(host) as connection, contextlib.suppress(OSError):
        connection.sendall(sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def connect(host: str) -> socket.socket:
    """To 127.0.0.1:PORT."""
    address, _, port = host.rpartition(":")
    return socket.create_connection((address, int(port)), timeout=PATIENCE)
