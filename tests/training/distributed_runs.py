"""What test_distributed*.py have one process or several do. Each part returns what the test looks at."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_run import TinyNet, interrupt_at, is_step, tiny_config, tiny_dataset, tiny_images
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training import state
from mecdeploy.training.batch_moments import SynchronizedBatchNorm
from mecdeploy.training.config import DistillConfig, MecConfig, QuantConfig, TrainConfig
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.errors import PeerFailed, TrainingError
from mecdeploy.training.events import TrainingInterrupted
from mecdeploy.training.gathering import gather_recordings
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.loop import TrainResult, train
from mecdeploy.training.mec import choose_rows
from mecdeploy.training.quantizers import QTensor
from mecdeploy.training.recording import Recording
from mecdeploy.training.world import World, joined

SHORT: dict[str, Any] = {"batch_size": 12, "fp_epochs": 1, "epochs": 2, "frozen_epochs": 1, "learning_rate": 0.001}
"""A low rate, at which no step size runs away: that would make a large difference of the smallest."""
ALL_CODED = MecConfig(code=("features", "activations", "weights"), samples=16, experts=2)
EQUAL_RUNS = {
    "lsq": tiny_config(method="lsq", **SHORT),
    "averaging": tiny_config(method="lsq", averaging=0.9, **SHORT),
    "mec": tiny_config(mec=ALL_CODED, **SHORT),
    "mec_activations_first": tiny_config(
        mec=MecConfig(code=("activations", "features"), layers=("conv1", "add"), samples=8, experts=2, form="exact"),
        **SHORT,
    ),
    "mec_two_views": tiny_config(
        mec=MecConfig(code=("features", "activations"), samples=6, experts=2, views="augmented"), **SHORT
    ),
    "mec_teacher": replace(
        tiny_config(mec=MecConfig(samples=16, experts=2, views="teacher"), **SHORT),
        quant=QuantConfig(damping=0.1, freezing=0.005),
    ),
    "distill": replace(tiny_config(mec=ALL_CODED, **SHORT), distill=DistillConfig(weight=0.7, temperature=2.0)),
}
"""Whose result must not depend on the number of processes."""


class CalmNet(TinyNet):
    """Without dropout, which draws differently on each process."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels)
        self.dropout = nn.Dropout(0.0)


class NormlessNet(CalmNet):
    """Without BatchNorm, too: a part of a batch then has no influence on another."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels)
        self.bn1, self.bn2 = nn.Identity(), nn.Identity()


@contextlib.contextmanager
def network(kind: type[TinyNet]) -> Iterator[None]:
    """The loop builds this network, whatever the config names."""
    with mock.patch.object(state, "build_model", lambda config, *, num_classes, channels, **size: kind(3, channels)):
        yield


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Everything that training computes is in float64, so that another order of sums is told from another result."""
    normalize, quantized, prepare = InputSpec.normalize, InputSpec.quantized, state.prepare

    def doubled(spec: InputSpec, pixels: Tensor) -> QTensor:
        x = quantized(spec, pixels)
        return QTensor(x.codes.double(), x.scale.double(), x.zero_point, x.qmax, x.qmin)

    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(InputSpec, "normalize", lambda spec, pixels: normalize(spec, pixels).double()),
            mock.patch.object(InputSpec, "quantized", doubled),
            mock.patch.object(state, "prepare", lambda *arguments: prepare(*arguments).double()),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def run_together(config: TrainConfig, out: Path, dataset: Any = None, **options: Any) -> TrainResult:
    with joined() as world:
        return train(config, dataset or tiny_dataset(), out, world=world, **options)


def equal_runs(folder: Path) -> dict[str, list[Any]]:
    """Every run of EQUAL_RUNS in float64; its losses and accuracies."""
    found = {}
    with in_float64(), network(CalmNet):
        for name, config in EQUAL_RUNS.items():
            found[name] = numbers(run_together(config, folder / name))
    return found


def parts_of_a_batch(folder: Path) -> list[Any]:
    """Two parts of each batch, of a network in which no image has an influence on another."""
    with in_float64(), network(NormlessNet):
        return numbers(run_together(tiny_config(method="lsq", accumulation=2, **SHORT), folder / "parts"))


def numbers(result: TrainResult) -> list[Any]:
    """What must agree: per epoch, then at the end."""
    rows = [[e.loss, *e.terms.values(), e.train_accuracy, e.validation_accuracy] for e in result.history]
    return [*rows, [result.accuracy_fp32, result.accuracy]]


def norms(folder: Path) -> list[Any]:
    """Synchronised BatchNorm of this process's half of some values: outputs, gradients, running statistics."""
    found = []
    with joined() as world:
        for shape, affine in (((6, 3, 4, 5), True), ((8, 3), True), ((4, 3, 7), False)):
            x, gradient, weight, bias = norm_operands(shape)
            mine = slice(*world.share.bounds(shape[0]))
            x = x[mine].requires_grad_()
            mean, var = torch.full((3,), 0.5).double(), torch.full((3,), 2.0).double()
            scale, shift = (weight.requires_grad_(), bias.requires_grad_()) if affine else (None, None)
            with SynchronizedBatchNorm(world):
                y = F.batch_norm(x, mean, var, scale, shift, training=True, momentum=0.3, eps=1e-3)
            y.backward(gradient[mine])
            summed = [] if not affine else [world.sum(weight.grad), world.sum(bias.grad)]
            found.append([value.tolist() for value in (y, x.grad, mean, var, *summed)])
    return found


def norm_operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [m, 3, ...] far from 0, a gradient of their outputs, weight and bias, one of them negative."""
    generator = torch.Generator().manual_seed(len(shape))
    x, gradient = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return 3 * x + 5, gradient, torch.tensor([1.5, -0.3, 0.8]).double(), torch.tensor([0.2, 0.0, -1.0]).double()


def rows(folder: Path) -> dict[str, Any]:
    """Which rows of which images are coded together, and the gradient of their (weighted) sum."""
    features, activation = coded_operands()
    config = MecConfig(code=("activations", "features"), samples=9)
    found: dict[str, Any] = {}
    with joined() as world:
        mine = slice(*world.share.bounds(12))
        features, activation = features[mine].requires_grad_(), activation[mine].requires_grad_()
        recording = Recording(features=features, activations={"a": activation})
        for samples in (9, 8, 40):
            config = MecConfig(code=("activations", "features"), samples=samples)
            gathered, _ = gather_recordings(recording, None, config, torch.Generator().manual_seed(3), world)
            assert gathered.features is not None
            found[str(samples)] = [gathered.features.tolist(), gathered.activations["a"].tolist()]
        weights = torch.arange(float(gathered.features.numel())).view_as(gathered.features)
        (gathered.features * weights).sum().backward()
        found["gradient"] = features.grad.tolist()
        apart = MecConfig(code=("features",), gather=False)
        found["apart"] = gather_recordings(recording, None, apart, torch.Generator(), world)[0] is recording
    return found


def coded_operands() -> tuple[Tensor, Tensor]:
    """Features [12, 2] and an activation [12, 2, 3, 1], every number of its own."""
    return torch.arange(24.0).view(12, 2), torch.arange(100.0, 172.0).view(12, 2, 3, 1)


def whole_choice(samples: int) -> list[Any]:
    """What one process chooses of all 12 images, in the order in which the objective draws."""
    features, activation = coded_operands()
    generator = torch.Generator().manual_seed(3)
    chosen = choose_rows(activation, samples, generator)
    return [choose_rows(features, samples, generator).tolist(), chosen.tolist()]


def exchanges(folder: Path) -> dict[str, Any]:
    """Every exchange once, and who gets which error."""
    with joined() as world:
        rank = world.rank

        def failing(*ranks: int) -> int:
            if rank in ranks:
                raise ValueError(f"said by {rank}")
            return rank

        def leave_a_file() -> bool:
            found = (folder / "downloaded").exists()
            (folder / "downloaded").touch()
            return found

        tensors = {"a": torch.arange(3), "b": torch.tensor([0.5]), "c": torch.zeros(0, 2)} if rank == 0 else {}
        return {
            "sum": world.sum(torch.tensor([1.0, rank])).tolist(),
            "gather": world.gather(torch.tensor([rank, 5])).tolist(),
            "any": [world.any(False), world.any(rank == 1)],
            "objects": world.objects(f"rank {rank}"),
            "main": world.from_main(lambda: {"from": rank}),
            "main failed": _outcome(lambda: world.from_main(lambda: failing(0))),
            "everywhere": world.everywhere(failing),
            "one failed": _outcome(lambda: world.everywhere(lambda: failing(1))),
            "both failed": _outcome(lambda: world.everywhere(lambda: failing(0, 1))),
            "local first": world.local_first(leave_a_file),
            "local failed": _outcome(lambda: world.local_first(lambda: failing(0))),
            "tensors": {name: t.tolist() for name, t in world.tensors_from_main(tensors).items()},
            "dtypes": sorted(str(t.dtype) for t in world.tensors_from_main(tensors).values()),
            "inside itself": _rejoined(world),
        }


def _rejoined(world: World) -> bool:
    with joined() as again:
        return again is world


def _outcome(work: Any) -> str:
    try:
        return f"no error: {work()}"
    except (ValueError, PeerFailed) as error:
        return f"{type(error).__name__}: {error}"


def diverging(folder: Path) -> str:
    """A loss that is not finite on any process stops all of them, with one error."""
    with network(TinyNet):
        config = tiny_config(batch_size=12, fp_learning_rate=1e38)
        try:
            run_together(config, folder / "diverging")
        except (TrainingError, PeerFailed) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"


def refused(folder: Path) -> list[str]:
    """Batches that two processes cannot share."""
    found = []
    for schedule in ({"batch_size": 13}, {"batch_size": 12, "accumulation": 4}, {"batch_size": 46}):
        try:
            run_together(tiny_config(**schedule), folder / "refused")
        except (TrainingError, PeerFailed) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


class SignallingSource(MemorySource):
    """The second process gets SIGTERM while it loads batch 8: epoch 3, step 2 of the first stage."""

    loaded = 0

    def batches(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in super().batches(*arguments, **options):
            self.loaded += 1
            if self.loaded == 8 and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def interrupted(folder: Path) -> dict[str, Any]:
    """A run with local BatchNorm and dropout: whole; and stopped twice on its way, by both processes' interrupts."""
    found: dict[str, Any] = {}
    every_step = 1e-9  # minutes: what one process's clock decides, all of them have to do
    config = tiny_config(batch_size=12, fp_epochs=3, batch_norm="local", mec=ALL_CODED, save_minutes=every_step)
    with network(TinyNet):
        run_together(config, folder / "whole")
        signalling = tiny_dataset(train=SignallingSource(*tiny_images(45, seed=1), flip=True))
        for name, dataset, report in (
            ("by a signal", signalling, None),
            ("by report", None, interrupt_at(is_step("qat", 2, 1))),
        ):
            try:
                run_together(config, folder / "stopped", dataset, resume=name == "by report", report=report)
            except TrainingInterrupted as interruption:
                found[name] = [interruption.stage, interruption.epoch, interruption.step]
        warnings: list[str] = []
        run_together(
            config, folder / "stopped", resume=True, report=lambda e: warnings.append(getattr(e, "message", ""))
        )
        found["warnings"] = [message for message in warnings if message]
    return found


BROKEN_FILE = """
import os
def make(num_classes):
    if os.environ["RANK"] == "1":
        raise ValueError("no network here")
    from torch import nn
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""

LEAVING_FILE = """
import os
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        if self.training and os.environ["RANK"] == "1":
            os._exit(9)
        return super().forward(x)
def make(num_classes):
    return Net(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def command_with_a_broken_file(folder: Path) -> list[Any]:
    """The command line, where the network fails on the second process."""
    return _command(folder, "broken", BROKEN_FILE)


def command_that_loses_a_process(folder: Path) -> list[Any]:
    """The command line, whose second process vanishes in the first step."""
    return _command(folder, "leaving", LEAVING_FILE)


def _command(folder: Path, name: str, code: str) -> list[Any]:
    """Exit code, stderr without progress, and whether the run's folder is left."""
    from mecdeploy.cli import main

    file = folder / f"{name}.py"
    file.write_text(code)
    arguments = f"train --data digits --model {file}:make --device cpu --out {folder / name}".split()
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main(arguments)
        except SystemExit as left:
            return [left.code, stderr.getvalue(), (folder / name).exists()]
    return ["did not leave", "", True]
