"""Latency, size and export cost at 224x224, batch 1, 1 thread: ours against fp32 and onnxruntime's static int8.

    python -m benchmarks.latency

All models of a network take turns in one process, so that drift and neighbours meet all of them alike. On a machine
that has other work to do, `chrt -r 1 python -m benchmarks.latency` (as root, Linux) keeps one core for it. The weights
are random and the quantisers calibrated (benchmarks/networks.py): that changes no kernel, and so no time and no size.
fp32 and static int8 take normalised floats, as such files do; ours takes raw uint8 pixels and normalises inside.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NETWORKS = ("resnet18", "mobilenet_v2")
BITS = (8, 4, 2)
FLOAT, STATIC = "fp32", "static_int8"
RESULT = Path(__file__).parent / "results" / "latency.json"
CALIBRATION_IMAGES = 32


def ours(bits: int) -> str:
    """The name of our model in the results."""
    return f"w{bits}a{bits}"


def write_models(name: str, seed: int, folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Every file of one network, and the input that each one takes: name -> path, name -> feed."""
    from benchmarks import networks
    from benchmarks.baselines import write_float, write_static_int8
    from mecdeploy.float_baseline import INPUT

    pixels = networks.photographs(CALIBRATION_IMAGES, seed)
    spec = networks.input_spec(pixels)
    model = networks.float_network(name, pixels, spec, seed)
    files = {key: folder / f"{name}-{key}.onnx" for key in (FLOAT, STATIC, *(ours(bits) for bits in BITS))}
    images = spec.normalize(pixels).numpy()
    write_float(model, networks.SIDE, files[FLOAT])
    write_static_int8(files[FLOAT], images, files[STATIC])
    for bits in BITS:
        quantized = networks.quantized_network(model, pixels, spec, bits)
        files[ours(bits)].write_bytes(networks.exported(quantized))
    floats, integers = {INPUT: images[:1]}, {"pixels": pixels[:1].numpy()}
    return files, {key: floats if key in (FLOAT, STATIC) else integers for key in files}


def measure(files: Mapping[str, Path], feeds: Mapping[str, Any], *, rounds: int, loads: int) -> dict[str, Any]:
    """Per model: size, convolutions by kind, load time, latency, and latency over both baselines."""
    from benchmarks.timing import count_convolutions, load_times, quartiles, ratios
    from mecdeploy.runtime_checks.latency import compare_latency

    loading = load_times(files, rounds=loads)
    reports = compare_latency(files, feeds, threads=1, rounds=rounds, warmup=5)
    times = {key: [seconds * 1e3 for seconds in report.rounds] for key, report in reports.items()}
    return {
        key: {
            "file_bytes": path.stat().st_size,
            **count_convolutions(path),
            "load_milliseconds": quartiles(loading[key]),
            "milliseconds": quartiles(times[key]),
            "ratio_to_fp32": ratios(times[key], times[FLOAT]),
            "ratio_to_static_int8": ratios(times[key], times[STATIC]),
        }
        for key, path in files.items()
    }


def export_costs(seed: int) -> dict[str, Any]:
    """Seconds and extra memory of exporting each network at each width, each in a process of its own."""
    from benchmarks.export_cost import measure_apart

    return {name: {ours(bits): measure_apart(name, bits, seed) for bits in BITS} for name in NETWORKS}


def main() -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--loads", type=int, default=9, help="sessions opened per model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from benchmarks.environment import describe_environment, load_average, scheduling

    environment = describe_environment(seed=arguments.seed, threads=1)
    environment |= {"scheduling": scheduling(), "load_average_before": load_average()}
    networks = {}
    with TemporaryDirectory() as folder:
        for name in NETWORKS:
            files, feeds = write_models(name, arguments.seed, Path(folder))
            networks[name] = measure(files, feeds, rounds=arguments.rounds, loads=arguments.loads)
            for key, row in networks[name].items():
                print(name, key, json.dumps(row), flush=True)
    result = {
        "environment": environment,
        "side": 224,
        "batch": 1,
        "rounds": arguments.rounds,
        "networks": networks,
        "export": export_costs(arguments.seed),
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
