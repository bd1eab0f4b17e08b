"""A network of inverted residuals small enough to train in a second, and a plain loop that trains it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare

STEPS, BATCH = 12, 64


def _conv(inputs: int, outputs: int, kernel: int, *, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """Expand, depthwise, linear bottleneck; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.body = nn.Sequential(
            *_conv(inputs, hidden, 1), nn.ReLU6(),
            *_conv(hidden, hidden, 3, groups=hidden, stride=stride), nn.ReLU6(),
            *_conv(hidden, outputs, 1),
        )  # fmt: skip
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def small_depthwise_net(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *_conv(1, 8, 3), nn.ReLU6(),
        InvertedResidual(8, 8, 1), InvertedResidual(8, 16, 2), InvertedResidual(16, 16, 1),
        *_conv(16, 32, 1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, classes),
    )  # fmt: skip


def train_float(model: nn.Module, spec: InputSpec, pixels: Tensor, labels: Tensor) -> nn.Module:
    """A hundred steps, the last half at a tenth of the rate, so that BatchNorm's statistics settle."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if step < 50 else 0.01
        first = step * BATCH % (len(pixels) - BATCH)
        optimizer.zero_grad()
        logits = model.train()(spec.normalize(pixels[first : first + BATCH]))
        F.cross_entropy(logits, labels[first : first + BATCH]).backward()
        optimizer.step()
    return model.eval()


def train_quantized(
    model: nn.Module, config: QuantConfig, spec: InputSpec, pixels: Tensor, labels: Tensor
) -> QuantizedModel:
    """Half of the steps with live BatchNorm, half with the deployed arithmetic."""
    quantized = prepare(model, config, spec)
    calibrate(quantized, [pixels[:BATCH], pixels[BATCH : 2 * BATCH]])
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.002, momentum=0.9)
    quantized.train()
    for step in range(STEPS):
        if step == STEPS // 2:
            quantized.freeze()
        batch = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(quantized(pixels[batch]), labels[batch]).backward()
        optimizer.step()
    return quantized.eval()
