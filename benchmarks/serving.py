"""What dynamic batching is worth: servers with and without it, asked over loopback in interleaved rounds.

    python -m benchmarks.serving

Each client sends one image as binary tensor, waits for its answer and sends the next. One server is asked at a time,
and the others are idle. A server has one thread for onnxruntime; the clients are one process on the other core. Two
networks: one that takes milliseconds an image, and one so small that HTTP takes longer than the network.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving_client import drive, infer_request, serving
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


def request(network: str, side: int) -> bytes:
    """One image as binary tensor, with its HTTP headers."""
    image = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    return infer_request("here", network, image)


def ask(server: Server, content: bytes, clients: int, seconds: float) -> list[float]:
    """Seconds that each answer took, of clients that ask without a pause. Raises RuntimeError if one was refused."""
    end = time.perf_counter() + seconds
    address = ("127.0.0.1", server.port)
    # The answers' bits are benchmarks.serving_load's business.
    traffic = drive(address, [content], [b""], connections=clients, stop=lambda _: time.perf_counter() >= end)
    if traffic.refused or traffic.wrong:
        raise RuntimeError(f"{traffic.refused} requests were refused, {traffic.wrong} answers were empty.")
    return traffic.seconds


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
            times = 1e3 * np.array(ask(servers[name], content, clients, seconds))
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
        started = {name: stack.enter_context(serving(models, *options)) for name, options in SERVERS.items()}
        servers = {name: Server(port=port) for name, (_, _, port) in started.items()}
        for network, side in NETWORKS.items():
            for server in servers.values():
                ask(server, request(network, side), 4, 0.3)  # warm
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
