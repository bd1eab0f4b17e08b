"""The frame into which these tests put one difficulty each: a stem, what is given, a mean over positions and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from journey import CLASSES
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def conv(inputs: int = 8, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Framed(nn.Module):
    """body: (this module, stem's [N, 8, 8, 8]) -> [N, channels, H, W]; it finds the layers given by their names."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], channels: int = 8, **layers: nn.Module) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Linear(channels, CLASSES)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        logits: Tensor = self.head(self.body(self, self.stem(x)).mean((2, 3)))
        return logits
