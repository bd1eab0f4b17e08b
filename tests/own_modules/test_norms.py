"""Normalisations: a BatchNorm is always integer on images; those that look at each image are float islands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from journey import CLASSES, FEW_BITS, operators_in_float, travel
from networks import Framed, conv, conv_bn_relu
from torch import Tensor, nn
from torch.nn import functional as F


class PreActivation(nn.Module):
    """BatchNorm and ReLU before each convolution; the shortcut leaves after the first of them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class PreActivationNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.body = nn.Sequential(PreActivation(8, 8, 1), PreActivation(8, 12, 2))
        self.bn, self.fc = nn.BatchNorm2d(12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.avg_pool2d(F.relu(self.bn(self.body(self.stem(x)))), 4).view(x.size(0), -1))


def test_a_pre_activation_resnet(tmp_path: Path) -> None:
    model = travel(PreActivationNet(), tmp_path)
    assert {"body.0.bn1", "body.1.bn1", "bn"} <= set(model.units())  # depthwise layers: no convolution precedes them
    assert not model.islands()
    assert not travel(PreActivationNet(), tmp_path, config=FEW_BITS).islands()


def test_a_batch_norm_mlp(tmp_path: Path) -> None:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (192, 16):
        layers += [nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)]
    assert not travel(nn.Sequential(*layers, nn.Linear(16, CLASSES)), tmp_path).islands()


class NormAfterRelu(Framed):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(F.relu(self.hidden(self.stem(x).mean((2, 3))))))


def test_a_batch_norm_of_vectors_without_a_linear_layer_before_it_is_float(tmp_path: Path) -> None:
    network = NormAfterRelu(lambda m, x: x, hidden=nn.Linear(8, 8), norm=nn.BatchNorm1d(8))
    model = travel(network, tmp_path)
    ((name, island),) = model.islands().items()
    assert (name, island.operators) == ("norm", ("batch_norm",))
    assert island.reason.startswith("a BatchNorm of vectors becomes part of the linear layer right before it")


def test_norms_of_each_image_are_float_and_the_convolutions_between_are_not(tmp_path: Path) -> None:
    norms = nn.ModuleList(
        [
            nn.GroupNorm(2, 8),
            nn.LayerNorm([8, 8, 8]),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.BatchNorm2d(8, track_running_stats=False),
        ]
    )

    def body(m: Any, x: Tensor) -> Tensor:
        for convolution, norm in zip(m.convolutions, m.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return x

    network = Framed(body, convolutions=nn.ModuleList([conv() for _ in norms]), norms=norms)
    model = travel(network, tmp_path)
    assert operators_in_float(model) == {"group_norm", "layer_norm", "instance_norm", "batch_norm", "relu", "mean"}
    assert {f"convolutions.{index}" for index in range(4)} <= set(model.units())
    reasons = [island.reason for island in model.islands().values()]
    assert "a BatchNorm without running statistics has no fixed scale" in reasons


class ConvNextBlock(nn.Module):
    """A LayerNorm over channels that lie last, linear layers on all positions, a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


def test_a_convnext_block(tmp_path: Path) -> None:
    network = Framed(lambda m, x: m.last(m.block(x)), block=ConvNextBlock(), last=conv_bn_relu(8, 8))
    model = travel(network, tmp_path)
    assert {"layer_norm", "gelu"} <= operators_in_float(model)
    assert {"block.depthwise", "block.up", "block.down", "last.0"} <= set(model.units())
