"""Seconds and peak extra memory of one export, in a fresh process.

    python -m benchmarks.export_cost resnet18 4    print one JSON object
    python -m benchmarks.export_cost               the large networks that have targets, into results/export_cost.json

Measured from the network in memory to the bytes on the disk: reading the units, passes, emission, onnx's checker and
shape inference, writing. Not measured: importing torch, making the network.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

MEGABYTE = 1e6
LARGE, LARGE_BITS = ("regnet_y_32gf", "vgg16", "convnext_large"), 4
RESULT = Path(__file__).parent / "results" / "export_cost.json"
_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs: sets VmHWM back to the present resident size


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; export memory is measured on Linux only.")


@contextmanager
def exporting() -> Iterator[dict[str, float]]:
    """Around an export: fills in its "seconds", and "extra_bytes", the peak over what the process held before."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept by malloc would hide what export takes from it
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    cost: dict[str, float] = {}
    before, start = resident("VmRSS"), time.perf_counter()
    yield cost
    cost |= {"seconds": time.perf_counter() - start, "extra_bytes": resident("VmHWM") - before}


def measure(name: str, bits: int, seed: int) -> dict[str, float]:
    """Export the named network once, cold."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.networks import BATCH, exported, float_network, input_spec, photographs, quantized_network

    pixels = photographs(BATCH, seed)
    spec = input_spec(pixels)
    model = float_network(name, pixels, spec, seed)
    weights = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    quantized = quantized_network(model, pixels, spec, bits)
    del model
    with TemporaryDirectory() as folder, exporting() as cost:
        (Path(folder) / "model.onnx").write_bytes(exported(quantized))
    return {
        "seconds": round(cost["seconds"], 3),
        "extra_megabytes": round(cost["extra_bytes"] / MEGABYTE, 1),
        "fp32_weights_megabytes": round(weights / MEGABYTE, 1),
        "extra_over_fp32_weights": round(cost["extra_bytes"] / weights, 3),
    }


def measure_apart(name: str, bits: int, seed: int) -> dict[str, float]:
    """The same in a process of its own, so that nothing is warm and no other memory is counted."""
    command = [sys.executable, "-m", "benchmarks.export_cost", name, str(bits), "--seed", str(seed)]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    cost: dict[str, float] = json.loads(found.stdout)
    return cost


def measure_large(seed: int) -> None:
    """Write the result file."""
    from benchmarks.environment import describe_environment, scheduling

    environment = describe_environment(seed=seed, threads=1) | {"scheduling": scheduling()}
    networks = {name: measure_apart(name, LARGE_BITS, seed) for name in LARGE}
    result = {"environment": environment, "side": 224, "bits": LARGE_BITS, "networks": networks}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """One network, or the large ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?")
    parser.add_argument("bits", type=int, nargs="?", default=LARGE_BITS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.network is None:
        measure_large(arguments.seed)
    else:
        print(json.dumps(measure(arguments.network, arguments.bits, arguments.seed)))


if __name__ == "__main__":
    main()
