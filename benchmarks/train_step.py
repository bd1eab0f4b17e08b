"""What a step of quantisation-aware training costs beside full precision: time, memory, and where the time goes.

    python -m benchmarks.train_step --compile    # resnet20 at 32x32, batch 128, 2 threads
    python -m benchmarks.train_step --device cuda --model resnet18 --compile
    python -m benchmarks.train_step --device cuda --model resnet50 --side 224 --classes 1000 --compile

A step is what the training loop does with a batch that is there already: forward pass, loss, backward pass, update. All
variants take turns in one process, the order turning too, and a ratio is taken within a round; peak memory is measured
in a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.environment import describe_environment, load_average, scheduling
from benchmarks.export_cost import exporting as measuring_memory
from benchmarks.networks import input_spec, photographs
from benchmarks.timing import quartiles, ratios
from mecdeploy.training import deployed
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.compiling import compiled
from mecdeploy.training.config import MecConfig, ModelConfig, QuantConfig, ScheduleConfig
from mecdeploy.training.data import Batch
from mecdeploy.training.device import place, reproducible
from mecdeploy.training.mec import mec_objective
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.models import build_model
from mecdeploy.training.optimizers import build_optimizer, set_learning_rate
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import QTensor
from mecdeploy.training.stages import FloatTask, QuantizedTask, Task
from mecdeploy.training.units import AddUnit, WeightedUnit

RESULT = Path(__file__).parent / "results" / "train_step.json"
EAGER = ("fp32", "lsq", "mec", "deploy")
COMPILED = ("fp32 compiled", "lsq compiled", "mec compiled")
LEARNING_RATE = 1e-3  # too small to change what is computed from round to round
WARM_UP = 3
PROCESSES = 5  # for memory
FULL_BETA = 0.5  # of the schedule: where the objective has its whole weight


@dataclass(frozen=True)
class Bench:
    """What every variant has in common."""

    model: str
    bits: int
    classes: int
    device: torch.device
    pixels: Tensor
    labels: Tensor

    @property
    def batch(self) -> Batch:
        """The one batch of every step."""
        return Batch((self.pixels,), self.labels)


def make_bench(arguments: argparse.Namespace) -> Bench:
    """Photographs and random labels on the device."""
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(arguments.seed)
    labels = torch.randint(0, arguments.classes, (arguments.batch,), generator=generator)
    return Bench(
        model=arguments.model,
        bits=arguments.bits,
        classes=arguments.classes,
        device=device,
        pixels=photographs(arguments.batch, arguments.seed, arguments.side).to(device),
        labels=labels.to(device),
    )


def float_network(bench: Bench) -> nn.Module:
    """The network in full precision, the same for every variant."""
    torch.manual_seed(0)
    side = bench.pixels.shape[-1]
    config = ModelConfig(name=bench.model)
    return place(build_model(config, num_classes=bench.classes, channels=3, height=side, width=side), bench.device)


def quantized_network(bench: Bench) -> QuantizedModel:
    """The same network, prepared and calibrated on the batch."""
    config = QuantConfig(weight_bits=bench.bits, act_bits=bench.bits)
    prepared = place(prepare(float_network(bench), config, input_spec(bench.pixels.cpu())), bench.device)
    assert isinstance(prepared, QuantizedModel)
    calibrate(prepared, [bench.pixels])
    return prepared


def make_step(variant: str, bench: Bench) -> tuple[Callable[[], None], Task]:
    """The step of one variant and its task, as the training loop makes them."""
    method, _, compile_it = variant.partition(" ")
    schedule = ScheduleConfig()
    task: Task
    if method == "fp32":
        network = float_network(bench)
        task = FloatTask(network, input_spec(bench.pixels.cpu()), label_smoothing=0.0, device=bench.device)
        optimizer = build_optimizer(network, schedule)
    else:
        quantized = quantized_network(bench)
        if method == "deploy":
            quantized.freeze()
        mec = None if method == "lsq" else MecConfig()
        task = QuantizedTask(quantized, label_smoothing=0.0, device=bench.device, mec=mec)
        optimizer = build_optimizer(quantized, schedule, quantized.step_sizes())
    if compile_it:
        task.forward = compiled(task.network, bench.device)
    task.network.train()

    def step() -> None:
        loss = task.loss(bench.batch, fraction=FULL_BETA, seed=1)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        set_learning_rate(optimizer, LEARNING_RATE)
        optimizer.step()

    return step, task


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, finished on the device."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def take_turns(work: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each, one call a round, the order turning."""
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(1e3 * seconds(work[name], device))
    return times


def parts(bench: Bench) -> dict[str, Callable[[], object]]:
    """What a step of "mec" consists of, each forward and backward by itself; the rest is pooling, loss and Python."""
    model = quantized_network(bench).train()
    read = _inputs(model, bench)
    weighted = [unit for unit in read if isinstance(unit, WeightedUnit)]
    optimizer = build_optimizer(model, ScheduleConfig(), model.step_sizes())
    logits, recording = model(bench.pixels, ("features",))
    logits.sum().backward()  # gradients for the optimiser
    assert recording.features is not None
    features = recording.features.detach().requires_grad_()
    recording.features = features
    generator = torch.Generator(device=bench.device)

    def quantise_weights() -> None:
        codes = [unit.weight_quantizer(unit.weight) for unit in weighted]
        weights = [c * step.view(-1, *[1] * (c.dim() - 1)) for c, step in codes]
        torch.autograd.grad(weights, [unit.weight for unit in weighted], [weight.detach() for weight in weights])

    def code() -> None:
        objective = mec_objective(recording, MecConfig(), step_fraction=FULL_BETA, generator=generator.manual_seed(1))
        torch.autograd.grad(objective.total, features)

    normalised = [unit for unit in weighted if unit.batch_norm is not None and unit.output is not None]
    return {
        "convolutions and linear layers": _all(_product(unit, read[unit][0], unit is weighted[0]) for unit in weighted),
        "BatchNorm with activation quantisers": _all(_normalisation(unit, read[unit][0]) for unit in normalised),
        "residual sums with activation quantisers": _all(
            _sum(unit, *read[unit]) for unit in read if isinstance(unit, AddUnit)
        ),
        "weight quantisers": quantise_weights,
        "coding objective": code,
        "optimiser": optimizer.step,
    }


def _all(work: Iterable[Callable[[], object]]) -> Callable[[], object]:
    every = list(work)
    return lambda: [once() for once in every]


def _inputs(model: QuantizedModel, bench: Bench) -> dict[nn.Module, tuple[QTensor, ...]]:
    """What each unit reads of the batch, in execution order."""
    seen: dict[nn.Module, tuple[QTensor, ...]] = {}

    def see(unit: nn.Module, inputs: tuple[QTensor, ...]) -> None:
        seen[unit] = inputs

    handles = [unit.register_forward_pre_hook(see) for unit in model.units().values()]
    with torch.no_grad():
        model(bench.pixels)
    for handle in handles:
        handle.remove()
    return seen


def _multiply(unit: WeightedUnit, codes: Tensor, weight: Tensor) -> Tensor:
    return F.linear(codes, weight) if unit.geometry is None else deployed.convolve(codes, weight, None, unit.geometry)


def _product(unit: WeightedUnit, x: QTensor, first: bool) -> Callable[[], object]:
    """A layer's convolution or linear product; the first one's pixels need no gradient."""
    codes, weight = x.codes.requires_grad_(not first), unit.weight.detach().clone().requires_grad_()
    leaves = [weight] if first else [codes, weight]

    def once() -> None:
        y = _multiply(unit, codes, weight)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return once


def _normalisation(unit: WeightedUnit, x: QTensor) -> Callable[[], object]:
    norm, output = unit.batch_norm, unit.output
    assert norm is not None and output is not None
    with torch.no_grad():
        y = _multiply(unit, x.codes, unit.weight)
    leaves = [y.requires_grad_(), norm.weight, norm.bias, output.step]

    def once() -> None:
        codes = output.normalized(y, norm).codes
        torch.autograd.grad(codes, leaves, torch.ones_like(codes))

    return once


def _sum(unit: AddUnit, *addends: QTensor) -> Callable[[], object]:
    inputs = [
        replace(x, codes=x.codes.detach().requires_grad_(), scale=x.scale.clone().requires_grad_()) for x in addends
    ]
    steps = [output.step for output in unit.outputs]
    leaves = [*(x.codes for x in inputs), *(x.scale for x in inputs), *steps]

    def once() -> None:
        found = unit(*inputs)
        codes = [value.codes for value in (found if isinstance(found, tuple) else (found,))]
        torch.autograd.grad(codes, leaves, [torch.ones_like(one) for one in codes])

    return once


def peak_memory(variant: str, bench: Bench) -> float:
    """Megabytes that a step takes over what was there before it: activations, gradients and what kernels work in."""
    step, _ = make_step(variant, bench)
    for _ in range(WARM_UP):
        step()  # momentum is there, kernels are chosen
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with measuring_memory() as cost:
        step()
    return cost["extra_bytes"] / 1e6


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Everything, as the result file has it."""
    bench = make_bench(arguments)
    variants = EAGER + (COMPILED if arguments.compile else ())
    with reproducible(bench.device):
        work = {name: make_step(name, bench)[0] for name in variants}
        first = {name: seconds(step, bench.device) for name, step in work.items()}
        for _ in range(WARM_UP):
            for step in work.values():
                step()
        times = take_turns(work, arguments.rounds, bench.device)
        of_step: dict[str, Callable[[], object]] = {"step": work["mec"], **parts(bench)}
        for part in of_step.values():
            part()
        shares = take_turns(of_step, arguments.rounds, bench.device)
    memory = {name: peak_apart(name) for name in variants}
    return {
        "environment": describe_environment(seed=arguments.seed, threads=arguments.threads, device=arguments.device)
        | {"scheduling": scheduling(), "load": load_average()},
        "network": {key: getattr(arguments, key) for key in ("model", "side", "batch", "classes", "bits", "rounds")},
        "variants": {
            name: {
                "milliseconds": quartiles(times[name]),
                "of_fp32": ratios(times[name], times["fp32"]),
                "images_per_second": round(arguments.batch / quartiles(times[name])["median"] * 1e3, 1),
                "first_step_seconds": round(first[name], 1),
                "peak_megabytes": round(memory[name], 1),
                "peak_of_fp32": round(memory[name] / memory["fp32"], 3),
            }
            | ({"of_fp32_compiled": ratios(times[name], times["fp32 compiled"])} if arguments.compile else {})
            for name in variants
        },
        "shares_of_a_mec_step": {name: ratios(of, shares["step"]) for name, of in shares.items() if name != "step"},
    }


def peak_apart(variant: str) -> float:
    """`peak_memory` in processes of their own, with the same arguments: the median, since allocators have luck."""
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--peak", variant]
    folder = Path(__file__).parents[1]
    found = [
        float(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)
        for _ in range(PROCESSES)
    ]
    return statistics.median(found)


def main() -> None:
    """Write the result file, or print the peak memory of one variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="and the same through torch.compile")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--peak", metavar="VARIANT", help="print the peak memory of one variant in megabytes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        bench = make_bench(arguments)
        with reproducible(bench.device):
            print(peak_memory(arguments.peak, bench))
        return
    arguments.result.write_text(json.dumps(measure(arguments), indent=2) + "\n")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
