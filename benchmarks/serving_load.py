"""What one process of `mecdeploy serve` sustains over loopback, and whether its memory stays where it is.

    python -m benchmarks.serving_load

A ResNet-20 for 32x32 pixels, W4A4 with random weights, one image a request, tensors as bytes: a small network, so that
the server is measured rather than onnxruntime. First one connection, then several until 100,000 requests are answered.
Every answer's logits are compared with those of the file in this process, bit for bit. The client is a process beside
the server; its share of a core says whether it was the bottleneck. On Linux.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULT = Path(__file__).parent / "results" / "serving-load.json"
NETWORK, SIDE, BITS, IMAGES, SEED = "resnet20", 32, 4, 256, 0
REQUESTS, LONGEST = 100_000, 110.0
ALONE_SECONDS, SAMPLE_EVERY = 5.0, 500
WARM_UP = 0.2
"""Of the requests: what caches and arenas take then is not growth."""
SERVER_PACKAGES = ("uvicorn", "starlette", "h11")


def write_model(folder: Path) -> tuple[Path, Any]:
    """The file, and images for it, uint8 [n, 3, 32, 32]."""
    from benchmarks import networks

    pixels = networks.photographs(IMAGES, SEED, side=SIDE)
    spec = networks.input_spec(pixels)
    model = networks.float_network(NETWORK, pixels, spec, SEED, classes=10)
    file = folder / f"{NETWORK}.onnx"
    file.write_bytes(networks.exported(networks.quantized_network(model, pixels, spec, BITS)))
    return file, pixels.numpy()


def run_alone(model: Path, images: Any) -> tuple[list[bytes], float]:
    """The bytes of the logits of each image, run one by one in this process, and the median of the times in ms."""
    import statistics

    from benchmarks.timing import open_session

    session = open_session(model, "model")
    logits, times = [], []
    for image in images:
        began = time.perf_counter()
        (rows,) = session.run(None, {"pixels": image[None]})
        times.append(1e3 * (time.perf_counter() - began))
        logits.append(rows.tobytes())
    return logits, statistics.median(times)


def resident(process: int) -> float:
    """Megabytes (10^6 bytes) of memory that a process has in RAM."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(samples: list[tuple[int, float]]) -> float | None:
    """Megabytes for 100,000 requests, by least squares after the warm-up; None for too few samples."""
    import numpy as np

    settled = np.array([sample for sample in samples if sample[0] >= WARM_UP * samples[-1][0]])
    return 1e5 * float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0]) if len(settled) > 2 else None


def describe(traffic: Any) -> dict[str, Any]:
    """Rates, latencies in milliseconds, and the client's share of a core."""
    import numpy as np

    p50, p99 = (1e3 * float(np.percentile(traffic.seconds, share)) for share in (50, 99))
    return {
        "requests": len(traffic.seconds),
        "wrong": traffic.wrong,
        "refused": traffic.refused,
        "per_second": round(traffic.rate, 1),
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "client_core_share": round(traffic.cpu / traffic.wall, 3),
    }


def measure(model: Path, images: Any, expected: list[bytes], *, requests: int, connections: int) -> dict[str, Any]:
    """Both loads on one server, and its memory under the second."""
    from benchmarks.serving_client import drive, infer_request, serving

    with serving([model], "--reload-seconds", "0") as (process, host, port):
        prepared = [infer_request(f"{host}:{port}", model.stem, image) for image in images]
        samples: list[tuple[int, float]] = []

        def until(seconds: float, most: int, *, sampled: bool) -> Any:
            deadline = time.monotonic() + seconds

            def stop(answers: int) -> bool:
                if sampled and answers % SAMPLE_EVERY == 0:
                    samples.append((answers, resident(process)))
                return answers >= most or time.monotonic() > deadline

            return stop

        alone, together = (
            drive((host, port), prepared, expected, connections=count, stop=stop)
            for count, stop in (
                (1, until(ALONE_SECONDS, requests, sampled=False)),
                (connections, until(LONGEST, requests, sampled=True)),
            )
        )
    return {
        "connections": {"1": describe(alone), str(connections): describe(together)},
        "resident_mb": {"first": round(samples[0][1], 1), "last": round(samples[-1][1], 1)},
        "mb_per_100k_requests": slope(samples),
        "samples": [(answers, round(size, 1)) for answers, size in samples[:: max(1, len(samples) // 50)]],
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="on several connections, in at most 110 seconds")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    from benchmarks.environment import describe_environment, load_average

    before = load_average()
    with TemporaryDirectory() as folder:
        model, images = write_model(Path(folder))
        expected, alone_ms = run_alone(model, images)
        found = measure(model, images, expected, requests=given.requests, connections=given.connections)
    result = {
        "environment": describe_environment(seed=SEED, threads=1),
        "server": {name: importlib.metadata.version(name) for name in SERVER_PACKAGES},
        "load_average": before,
        "network": {"name": NETWORK, "side": SIDE, "bits": BITS},
        "alone_ms": round(alone_ms, 3),
        **found,
    }
    given.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=2))


if __name__ == "__main__":
    main()
