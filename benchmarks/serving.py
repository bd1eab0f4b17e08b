"""What dynamic batching is worth: servers with and without it, asked over loopback in interleaved rounds.

    python -m benchmarks.serving

Each client sends one image as binary tensor, waits for its answer and sends the next. One server is asked at a time,
and the others are idle. A server has one thread for onnxruntime; the clients are one process on the other core. Two
networks: one that takes milliseconds an image, and one so small that HTTP takes longer than the network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import quartiles, ratios

RESULT = Path(__file__).parent / "results" / "serving.json"
SERVERS = {
    "one by one": ("--max-batch", "1", "--max-delay-ms", "0"),
    "what waits": ("--max-batch", "32", "--max-delay-ms", "0"),
    "waits 1 ms": ("--max-batch", "32", "--max-delay-ms", "1"),
}
"""Name -> options of `mecdeploy serve`. The second runs what came in while it was busy; the third waits for more."""
BASE = "one by one"
NETWORKS = {"resnet8": 32, "resnet18": 224}
"""Name -> side of its images in pixels."""
BITS = 4
CLIENTS = (1, 16)
SECONDS = 1.2
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    port: int

    def rows(self, network: str) -> tuple[float, float]:
        """How many batches were run, and how many rows, since it was started."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            text = answer.read().decode()
        count, total = (
            float(re.search(rf'^mecdeploy_batch_rows_{part}{{model="{network}"}} (\S+)$', text, re.MULTILINE)[1])  # type: ignore[index]
            for part in ("count", "sum")
        )
        return count, total


@contextmanager
def running(models: list[Path], options: tuple[str, ...]) -> Iterator[Server]:
    """A server process, killed at the end."""
    command = [sys.executable, "-m", "mecdeploy", "serve", *map(str, models), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"serving address=http://127.0.0.1:(\d+) ", line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line}")
            server = Server(port=int(found[1]))
            asyncio.run(listening(server))
            yield server
        finally:
            process.kill()


async def listening(server: Server) -> None:
    """Wait until the server takes connections."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return


def request(network: str, side: int) -> bytes:
    """One image as binary tensor, with its HTTP headers."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, side, side), dtype=np.uint8).tobytes()
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, side, side]}
    tensor["parameters"] = {"binary_data_size": len(pixels)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = (
        f"POST /v2/models/{network}/infer HTTP/1.1",
        "host: here",
        f"inference-header-content-length: {len(head)}",
        f"content-length: {len(head) + len(pixels)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + head + pixels


async def ask(server: Server, content: bytes, clients: int, seconds: float) -> list[float]:
    """Seconds that each answer took, of clients that ask without a pause. Raises RuntimeError for another answer."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while time.perf_counter() < end:
            began = time.perf_counter()
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = re.search(rb"\r\ncontent-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            times.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


def export(network: str, side: int, folder: Path) -> Path:
    """The network as `mecdeploy export` writes it, with random weights: they change no time."""
    from benchmarks.networks import exported, float_network, input_spec, photographs, quantized_network

    pixels = photographs(32, 0, side)
    spec = input_spec(pixels)
    path = folder / f"{network}.onnx"
    path.write_bytes(exported(quantized_network(float_network(network, pixels, spec, 0), pixels, spec, BITS)))
    return path


def measure(servers: dict[str, Server], network: str, clients: int, rounds: int, seconds: float) -> dict[str, Any]:
    """All servers in turns: requests a second, latency, rows of a batch, and each against BASE within its round."""
    content = request(network, NETWORKS[network])
    rates: dict[str, list[float]] = {name: [] for name in servers}
    worst: dict[str, list[float]] = {name: [] for name in servers}
    middle: dict[str, list[float]] = {name: [] for name in servers}
    before = {name: server.rows(network) for name, server in servers.items()}
    names = list(servers)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            times = 1e3 * np.array(asyncio.run(ask(servers[name], content, clients, seconds)))
            rates[name].append(
                len(times) / (time.perf_counter() - began)
            )  # the last answers take longer than `seconds`
            middle[name].append(float(np.median(times)))
            worst[name].append(float(np.percentile(times, 99)))
    result = {}
    for name, server in servers.items():
        batches, rows = (after - then for after, then in zip(server.rows(network), before[name], strict=True))
        result[name] = {
            "requests_per_second": quartiles(rates[name]),
            "rate_over_base": ratios(rates[name], rates[BASE]),
            "median_milliseconds": quartiles(middle[name]),
            "p99_milliseconds": quartiles(worst[name]),
            "p99_over_base": ratios(worst[name], worst[BASE]),
            "rows_per_batch": round(rows / batches, 2),
        }
    return result


def main() -> None:
    """Measure, and write the result file."""
    from contextlib import ExitStack

    from benchmarks.environment import describe_environment, load_average

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of asking one server once")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    busy = load_average()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = [export(network, side, folder) for network, side in NETWORKS.items()]
        servers = {name: stack.enter_context(running(models, options)) for name, options in SERVERS.items()}
        for network, side in NETWORKS.items():
            for server in servers.values():
                asyncio.run(ask(server, request(network, side), 4, 0.3))  # warm
        found = {
            network: {
                str(clients): measure(servers, network, clients, arguments.rounds, arguments.seconds)
                for clients in CLIENTS
            }
            for network in NETWORKS
        }
    result = {
        "environment": describe_environment(seed=0, threads=1) | {"load_average_before": busy},
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "bits": BITS,
        "sides": NETWORKS,
        "servers": {name: " ".join(options) for name, options in SERVERS.items()},
        "networks": found,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
