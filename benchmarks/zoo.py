"""Every classifier of torchvision, from random weights to a checked ONNX file: `python -m benchmarks.zoo --resume`.

Each in a process of its own with a limit of time and memory (benchmarks/zoo_network.py says what is measured), one of
every family first, then by size. Images are small, mostly 64 pixels, so that all of it fits on two cores: kernels,
islands and exactness are those of larger images, the times are not. The result file is written after every network;
--resume measures those it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "zoo.json"

Row = dict[str, Any]


def published() -> dict[str, tuple[str, int]]:
    """Name -> (family, parameters with ImageNet's classes) of all of torchvision's classifiers, in measuring order."""
    import torchvision.models as models

    names = models.list_models(module=models)
    found = {name: (family(name), int(models.get_model_weights(name).DEFAULT.meta["num_params"])) for name in names}
    return in_order(found)


def family(name: str) -> str:
    """The module of torchvision.models that makes the network: mobilenetv3 for mobilenet_v3_small."""
    import torchvision.models as models

    return str(models.get_model_builder(name).__module__).rpartition(".")[2]


def in_order(networks: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """The smallest of every family first, then the others, small ones before large ones."""
    smallest: dict[str, str] = {}
    by_size = sorted(networks, key=lambda name: (networks[name][1], name))
    for name in by_size:
        smallest.setdefault(networks[name][0], name)
    first = list(smallest.values())
    return {name: networks[name] for name in (*first, *(name for name in by_size if name not in first))}


def run_apart(name: str, *, light: bool, seconds: float, gigabytes: float) -> Row:
    """The row of one network; one that was killed has what it had measured, and an `error`."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.zoo_network", name, "--out", str(out)]
        command += ["--gigabytes", str(gigabytes), *(["--light"] if light else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            ran = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
            died = f"the process ended with {ran.returncode}" if ran.returncode else ""
        except subprocess.TimeoutExpired:
            died = f"not done after {seconds:.0f} seconds"
        row: Row = json.loads(out.read_text()) if out.is_file() else {}
    stage = row.pop("unfinished", "build")
    if died:
        row.setdefault("error", f"{stage}: {died}")
        row.setdefault("traced", False)
        row["error"] += f" (limits: {gigabytes:g} GB, {seconds:.0f} s)"
    return row


def read(path: Path) -> dict[str, Any]:
    """The result file, or an empty one."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"networks": {}}
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """One line a network, so that a changed one is one changed line."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in result["networks"].items())
    head = json.dumps({key: value for key, value in result.items() if key != "networks"}, indent=1)[:-2]
    fresh = path.with_suffix(".json.new")
    fresh.write_text(f'{head},\n "networks": {{\n{rows}\n }}\n}}\n')
    fresh.replace(path)


def _is_done(row: Row | None, *, light: bool) -> bool:
    return row is not None and "error" not in row and (light or not row.get("light"))


def main() -> None:
    """Measure, and write the result file after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="these only, in this order")
    parser.add_argument("--resume", action="store_true", help="skip what is measured as asked")
    parser.add_argument("--light", action="store_true", help="W4A4 alone, and no baselines: a third of the time")
    parser.add_argument("--seconds", type=float, default=900, help="limit for one network")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="limit for one network")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    from benchmarks.environment import describe_environment
    from benchmarks.zoo_network import SEED

    networks = published()
    for name in arguments.models or networks:
        result = read(arguments.result)
        known = result["networks"]
        if arguments.resume and _is_done(known.get(name), light=arguments.light):
            continue
        row = run_apart(name, light=arguments.light, seconds=arguments.seconds, gigabytes=arguments.gigabytes)
        environment = describe_environment(seed=SEED, threads=1)
        known[name] = {"family": networks[name][0], "commit": environment.pop("commit"), **row}
        ordered = {key: known[key] for key in networks if key in known}
        missing = [key for key in networks if key not in known]
        write(arguments.result, {"environment": environment, "not_run": missing, "networks": ordered})
        print(name, row.get("error", f"{row.get('seconds')} s"), flush=True)


if __name__ == "__main__":
    main()
