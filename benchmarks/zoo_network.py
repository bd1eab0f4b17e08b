"""One classifier of torchvision through the whole path, in this process: `python -m benchmarks.zoo_network resnet18`.

Built, its BatchNorm statistics taken from photographs, prepared, calibrated, trained for two steps, exported and
checked at each width; then timed against fp32 and onnxruntime's static int8. What is known is written after every
stage, so that a process killed for its time or memory leaves what it measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mecdeploy import InputSpec, QuantizedModel

SEED = 0
CLASSES = 10
CALIBRATION_IMAGES = 16
CHECKED_IMAGES = 2
TRAINING_STEPS = 2
UNTRAINED = {"regnet_y_128gf", "vit_h_14"}  # 2.6 GB of weights, whose gradients would take as much several times over
RELATIVE_STEP = 1e-3  # every parameter moves by this share of its own size
ROUNDS = 30  # of latency

SIDE = 64  # pixels, unless a network cannot take it
SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56, "vgg": 32}
"""By family or name. VGG pools to 7x7 positions: from 1x1 or 7x7, as here or at 224, that is an integer kernel."""

Row = dict[str, Any]


def side_of(name: str) -> int:
    """The side of the square images that this network is measured with, in pixels."""
    return next((side for start, side in SIDES.items() if name.startswith(start)), SIDE)


def widths(light: bool) -> tuple[int, ...]:
    """Bits of weights and activations, W4A4 first: latency and export cost are those of its file."""
    return (4,) if light else (4, 8, 2)


class Measurement:
    """A row that grows stage by stage, and the file that always holds what is known."""

    def __init__(self, path: Path) -> None:
        self.row: Row = {}
        self.path = path
        self.stage = "build"

    def add(self, **found: object) -> None:
        """Note results, on the disk too."""
        self.row.update(found)
        self.path.write_text(json.dumps({**self.row, "unfinished": self.stage}))

    def finish(self) -> None:
        """Every stage is through."""
        self.path.write_text(json.dumps(self.row))


def measure(name: str, into: Measurement, *, light: bool = False) -> None:
    """Everything about one network. Raises whatever a stage raises; `into.stage` says which.

    light: W4A4 alone, and no baselines, which take most of the time.
    """
    import torch

    torch.set_num_threads(1)
    from benchmarks import networks

    side = side_of(name)
    pixels = networks.photographs(CALIBRATION_IMAGES, SEED, side)
    spec = networks.input_spec(pixels)
    model = networks.float_network(name, pixels, spec, SEED, classes=CLASSES, stem="standard")
    steps = 0 if name in UNTRAINED else TRAINING_STEPS
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    into.add(side=side, parameters=parameters, weight_bytes=weight_bytes, light=light, steps=steps)
    with TemporaryDirectory() as folder:
        files = {}
        for bits in widths(light):
            key = f"w{bits}a{bits}"
            into.stage = f"{key}: train"
            quantized = trained(model, pixels, spec, bits, steps=steps)
            into.stage = f"{key}: export"
            cost, files[key] = export(quantized, weight_bytes, Path(folder) / f"{key}.onnx")
            if bits == 4:
                into.add(traced=True, units=len(quantized.units()), export=cost)
            into.stage = f"{key}: check"
            into.add(**{key: {"file_bytes": files[key].stat().st_size, **checked(files[key], quantized, pixels)}})
            del quantized
            gc.collect()
        if light:
            return
        into.stage = "latency"
        into.add(**latency(name, model, pixels, spec, files["w4a4"], Path(folder), into))


def trained(model: nn.Module, pixels: Tensor, spec: InputSpec, bits: int, *, steps: int) -> QuantizedModel:
    """Prepared, calibrated, and trained for `steps` steps on arbitrary labels.

    Steps are relative, for networks without BatchNorm: with random weights their activations and gradients may be of
    any size, and no one learning rate would suit them.
    """
    import torch

    import mecdeploy
    from benchmarks.networks import BATCH

    quantized = mecdeploy.prepare(model, mecdeploy.QuantConfig(weight_bits=bits, act_bits=bits), spec)
    mecdeploy.calibrate(quantized, (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)))
    quantized.train()
    torch.manual_seed(SEED)
    for step in range(steps):
        batch = pixels[BATCH * step : BATCH * (step + 1)]
        loss = torch.nn.functional.cross_entropy(quantized(batch), torch.arange(len(batch)) % CLASSES)
        torch.autograd.backward(loss)
        with torch.no_grad():
            for parameter in quantized.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RELATIVE_STEP * parameter.abs() * parameter.grad.sign())
                    parameter.grad = None
    return quantized.eval()


def export(model: QuantizedModel, weight_bytes: int, path: Path) -> tuple[Row, Path]:
    """Write the file; seconds and peak extra memory, in megabytes and over the fp32 weights."""
    from benchmarks.export_cost import MEGABYTE, exporting
    from mecdeploy.export import ExportConfig, export_model, lower

    with exporting() as cost:
        path.write_bytes(export_model(lower(model), ExportConfig(), {}))
    extra = cost["extra_bytes"]
    return {
        "seconds": round(cost["seconds"], 2),
        "extra_megabytes": round(extra / MEGABYTE, 1),
        "extra_over_fp32_weights": round(extra / weight_bytes, 2),
    }, path


def checked(path: Path, model: QuantizedModel, pixels: Tensor) -> Row:
    """What `mecdeploy check` says of the file on a few images."""
    import numpy as np

    from mecdeploy.reference import TorchReference
    from mecdeploy.runtime_checks import check_model

    images = pixels[:CHECKED_IMAGES].numpy()
    report = check_model(path, images, np.zeros(len(images), dtype=np.int64), TorchReference(model))
    kernels = {kind: count for kind, count in report.kernels.items() if kind.startswith("QLinear") or kind == "QGemm"}
    return {
        "passed": report.passed,
        "failures": list(report.failures),
        "integers_compared": report.integers_compared,
        "integers_different": report.integers_different,
        "integer_kernels": sum(kernels.values()),
        "integer_products": report.integer_convolutions,
        "float_products": report.float_convolutions,
        "islands": report.float_islands,
        "island_operators": sorted({operator for island in report.islands for operator in island.operators}),
        "float_operators": dict(report.float_operators),
        "island_values_compared": sum(island.compared for island in report.islands),
        "island_values_different": sum(island.different for island in report.islands),
        "island_steps": max((island.max_difference for island in report.islands), default=0.0),
        "logit_difference": report.max_logit_difference,
    }


def latency(
    name: str, model: nn.Module, pixels: Tensor, spec: InputSpec, quantized: Path, folder: Path, into: Measurement
) -> Row:
    """Interleaved, one thread: W4A4, fp32, and static int8 where onnxruntime can make it."""
    from benchmarks.baselines import write_float, write_static_int8
    from benchmarks.timing import quartiles, ratios
    from mecdeploy.float_baseline import INPUT
    from mecdeploy.runtime_checks.latency import compare_latency

    files = {"w4a4": quantized, "fp32": folder / "fp32.onnx"}
    write_float(model, side_of(name), files["fp32"])
    into.add(fp32_bytes=files["fp32"].stat().st_size)
    images = spec.normalize(pixels).numpy()
    try:
        write_static_int8(files["fp32"], images[:8], folder / "int8.onnx")
        files["static_int8"] = folder / "int8.onnx"
    except Exception as error:  # a network that onnxruntime's own tool cannot quantise is a finding
        into.add(static_int8_error=first_line(error))
    feeds = {key: {INPUT: images[:1]} for key in files} | {"w4a4": {"pixels": pixels[:1].numpy()}}
    with real_time():
        reports = compare_latency(files, feeds, threads=1, rounds=ROUNDS)
    times = {key: [seconds * 1e3 for seconds in report.rounds] for key, report in reports.items()}
    found: Row = {"milliseconds": {key: quartiles(values) for key, values in times.items()}}
    found["ratio_to_fp32"] = ratios(times["w4a4"], times["fp32"])
    if "static_int8" in times:
        found["ratio_to_static_int8"] = ratios(times["w4a4"], times["static_int8"])
    return found


@contextmanager
def real_time() -> Iterator[None]:
    """Before all other work of the machine, where the system allows it: some seconds of one core."""
    policy = os.sched_getscheduler(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main() -> None:
    """Measure one network; the row, with `error` where a stage failed, goes to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--light", action="store_true", help="W4A4 alone, and no baselines")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of memory; more is refused to this process")
    arguments = parser.parse_args()
    limit = int(arguments.gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    into = Measurement(arguments.out)
    start = time.perf_counter()
    try:
        measure(arguments.name, into, light=arguments.light)
    except (Exception, MemoryError) as error:
        into.add(error=f"{into.stage}: {first_line(error)}", traced=into.row.get("traced", False))
        into.row.setdefault("seconds", round(time.perf_counter() - start, 1))
        raise
    into.row["seconds"] = round(time.perf_counter() - start, 1)
    into.finish()


if __name__ == "__main__":
    main()
