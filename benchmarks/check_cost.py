"""Seconds and peak extra memory of exporting ResNet-50, of the numpy interpreter and of a whole check on ResNet-18.

    python -m benchmarks.check_cost            everything, into results/check_cost.json; about 3 minutes on one core
    python -m benchmarks.check_cost --once     the check and the interpreter once, in this process; one JSON object

224x224, W4A4, 16 images, one thread. Each round is a process of its own. The check is `mecdeploy.check` of a network of
one's own, from reading the file to the report: all three sides, the file with the optimiser off, every integer and
every logit compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHECKED, EXPORTED, BITS, IMAGES = "resnet18", "resnet50", 4, 16
RESULT = Path(__file__).parent / "results" / "check_cost.json"


def measure(seed: int) -> dict[str, Any]:
    """Both costs once, the interpreter first: it is all of what `mecdeploy.runtime_checks.interpret` does."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    from benchmarks.export_cost import MEGABYTE
    from benchmarks.export_cost import exporting as spending
    from benchmarks.networks import BATCH, exported, float_network, input_spec, photographs, quantized_network
    from mecdeploy import check
    from mecdeploy.runtime_checks import interpret

    pixels = photographs(IMAGES, seed)
    spec = input_spec(pixels)
    model = quantized_network(float_network(CHECKED, pixels[:BATCH], spec, seed), pixels[:BATCH], spec, BITS)
    costs: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(exported(model))
        with spending() as costs["interpreter"]:
            interpret(path, pixels.numpy())
        with spending() as costs["check"]:
            report = check(model, path, images=pixels.numpy(), labels=np.zeros(IMAGES, np.int64))
    found: dict[str, Any] = {
        name: {
            "seconds": round(cost["seconds"], 3),
            "extra_megabytes": round(cost["extra_bytes"] / MEGABYTE, 1),
        }
        for name, cost in costs.items()
    }
    compared = {key: getattr(report, key) for key in ("passed", "integers_compared", "integers_different")}
    return found | {"compared": compared}


def measure_apart(seed: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.check_cost", "--once", "--seed", str(seed)]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    costs: dict[str, Any] = json.loads(found.stdout)
    return costs


def summarize(name: str, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Quartiles of the seconds and the largest memory over all rounds."""
    from benchmarks.timing import quartiles

    return {
        "network": name,
        "seconds": quartiles([cost["seconds"] for cost in rounds]),
        "extra_megabytes": max(cost["extra_megabytes"] for cost in rounds),
    }


def main() -> None:
    """Measure once, or all rounds into the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported
    if arguments.once:
        print(json.dumps(measure(arguments.seed)))
        return
    from benchmarks import export_cost
    from benchmarks.environment import describe_environment, load_average, scheduling

    environment = describe_environment(seed=arguments.seed, threads=1)
    environment |= {"scheduling": scheduling(), "load_average_before": load_average()}
    exports, checks = [], []
    for _ in range(arguments.rounds):
        exports.append(export_cost.measure_apart(EXPORTED, BITS, arguments.seed))
        checks.append(measure_apart(arguments.seed))
        print(json.dumps([exports[-1], checks[-1]]), flush=True)
    result = {
        "environment": environment,
        "side": 224,
        "bits": BITS,
        "images": IMAGES,
        "rounds": arguments.rounds,
        "export": summarize(EXPORTED, exports),
        "interpreter": summarize(CHECKED, [costs["interpreter"] for costs in checks]),
        "check": summarize(CHECKED, [costs["check"] for costs in checks]) | checks[-1]["compared"],
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
