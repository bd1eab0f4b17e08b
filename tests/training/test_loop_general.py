"""Networks whose quantisers share steps and learn zero points: optimised once, saved once, resumed to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import FINAL, STEPS, assert_same_run, tensors_in, tiny_config, tiny_dataset
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import QuantConfig, ScheduleConfig
from mecdeploy.training.events import StepEvent, TrainingInterrupted
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.loop import train
from mecdeploy.training.optimizers import build_optimizer, momentum_tensors
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer


class Joined(nn.Module):
    """Signed and rectified values side by side, a gate, dropout."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2, self.conv3 = nn.Conv2d(6, 4, 1), nn.Conv2d(10, 8, 1)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, 8, 8] to [N, classes]."""
        x = self.bn1(self.conv1(x))
        x = torch.cat([x, F.relu(self.conv2(F.silu(x)))], 1)
        logits: Tensor = self.fc(self.dropout(F.hardswish(self.conv3(x)).mean((2, 3))))
        return logits


def build(config: Any, *, num_classes: int, channels: int, height: int, width: int) -> nn.Module:
    return Joined(num_classes, channels)


@pytest.fixture(autouse=True)
def joined_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mecdeploy.training.state.build_model", build)
    monkeypatch.setattr("mecdeploy.training.run.build_model", build)


CONFIG = dataclasses.replace(tiny_config(), quant=QuantConfig(zero_point="learned"))


def test_a_run_stopped_after_every_few_steps_ends_at_the_same_bits(tmp_path: Path) -> None:
    train(CONFIG, tiny_dataset(), tmp_path / "whole")
    out, seen = tmp_path / "run", []

    def stop(event: object) -> None:
        if isinstance(event, StepEvent):
            seen.append(event)
            if len(seen) % 2 == 0:
                raise KeyboardInterrupt

    for session in range(6 * STEPS // 2):
        with pytest.raises(TrainingInterrupted):
            train(CONFIG, tiny_dataset(), out, resume=session > 0, report=stop)
    train(CONFIG, tiny_dataset(), out, resume=True, report=stop)
    assert_same_run(out, tmp_path / "whole")
    tensors = tensors_in(out / FINAL)
    offsets = [name for name in tensors if name.endswith(".offset")]
    assert offsets and len({tensors[name].item() for name in offsets}) > 1
    shared = [tensors[f"model.body.{name}.outputs.0.step"].item() for name in ("conv1", "conv2")]
    assert shared[0] == shared[1], "values side by side have one step"


def test_what_is_shared_is_optimised_once() -> None:
    torch.manual_seed(0)
    spec = InputSpec.from_statistics(channels=1, height=8, width=8, mean=104.3, std=70.1)
    model = prepare(Joined(3, 1), QuantConfig(zero_point="learned"), spec)
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    assert len({id(module.step) for module in quantizers}) < len(quantizers)
    steps = model.step_sizes()
    assert len(steps) == len({id(step) for step in steps})
    optimizer = build_optimizer(model, ScheduleConfig(momentum=0.9), steps)
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    images = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    F.cross_entropy(model.train()(images), torch.arange(8) % 3).backward()
    optimizer.step()
    momentum = momentum_tensors(optimizer, model)
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert sorted(momentum) == sorted(names), "by the first name that a shared parameter has"


def test_a_shared_step_has_the_gradients_of_all_its_values() -> None:
    torch.manual_seed(0)
    spec = InputSpec.from_statistics(channels=1, height=8, width=8, mean=104.3, std=70.1)
    model = prepare(Joined(3, 1), QuantConfig(), spec)
    first, second = (model.unit(name).output for name in ("conv1", "conv2"))
    assert first is not None and second is not None and first.step is second.step
    images = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    calibrate(model, [images])
    model.train()

    def gradient() -> float:
        model.zero_grad()
        torch.manual_seed(1)  # dropout
        F.cross_entropy(model(images), torch.arange(8) % 3).backward()
        assert first.step.grad is not None
        return float(first.step.grad)

    together = gradient()
    # conv2's own share: a step of its own with the same value
    second.step = nn.Parameter(first.step.detach().clone())
    apart = gradient()
    assert second.step.grad is not None
    # the codes of both are joined under the first one's scale, so that share stays with it; float32 sums
    assert together == pytest.approx(apart + float(second.step.grad), rel=1e-4)
    assert abs(float(second.step.grad)) > 0.01 * abs(together)
