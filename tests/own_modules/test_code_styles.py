"""Ways to write the same network: without modules, in place, with layers called again, with loops and hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from journey import CLASSES, EIGHT_BITS, FEW_BITS, travel
from networks import Framed, conv, conv_bn_relu
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy import QuantConfig


class Functional(nn.Module):
    """Parameters and buffers of its own, and functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.3)
        self.bias = nn.Parameter(torch.zeros(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.depthwise = nn.Parameter(torch.randn(8, 1, 3, 3) * 0.3)
        self.head_weight = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, stride=1, padding=1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta, training=self.training)
        x = torch.relu(torch.conv2d(F.relu(x), self.depthwise, padding=1, groups=8))
        return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), self.head_weight)


@pytest.mark.parametrize("config", [EIGHT_BITS, FEW_BITS], ids=["w8a8", "w2a4"])
def test_functions_alone(config: QuantConfig, tmp_path: Path) -> None:
    model = travel(Functional(), tmp_path, config=config, passes=40)
    assert list(model.units()) == ["conv2d", "conv2d_2", "adaptive_avg_pool2d", "flatten", "head"]
    assert not model.islands()


def test_chains_in_place(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y.relu_()
        z = m.b(y)
        z += y
        z.relu_()
        F.relu_(z)
        total = m.c(z)
        total.add_(z)
        return F.relu(total, inplace=True)

    assert not travel(Framed(body, a=conv(), b=conv(), c=conv()), tmp_path).islands()


def test_one_convolution_and_norm_called_three_times_and_one_relu_everywhere(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = m.relu(m.bn(m.conv(x)))
        return m.relu(m.bn(m.conv(x)) + x)

    model = travel(Framed(body, conv=conv(), bn=nn.BatchNorm2d(8), relu=nn.ReLU()), tmp_path)
    assert {"conv", "conv_2", "conv_3"} <= set(model.units())
    assert not model.islands()


class Nested(nn.Module):
    """Branches in containers of containers, added up by Python's sum, which begins with 0."""

    def __init__(self) -> None:
        super().__init__()
        stages = []
        for inputs in (3, 6):
            side = nn.Sequential(nn.Sequential(nn.Conv2d(inputs, 6, 1)), nn.Identity())
            stages.append(nn.ModuleDict({"main": nn.Sequential(conv_bn_relu(inputs, 6)), "side": side}))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = sum({name: branch(x) for name, branch in stage.items()}.values())
        return self.head(x)


def test_nested_containers(tmp_path: Path) -> None:
    model = travel(Nested(), tmp_path)
    assert "stages.1.main.0.0" in model.units()
    assert not model.islands()


class DynamicBatch(nn.Module):
    """Shapes computed from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv_bn_relu(3, 8), conv_bn_relu(32, 8), nn.Linear(8 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        count = x.size(0)
        x = self.a(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        x = self.b(x.reshape(batch, channels * 4, height // 2, width // 2))
        x = x[:, ::2] + x[:, 1::2]
        x = torch.cat([x, x[:, :, :]], dim=1).reshape(count, -1).view(x.shape[0], -1, 4)
        return self.fc(x.transpose(1, 2).contiguous().flatten(start_dim=1))


def test_shapes_computed_from_the_batch(tmp_path: Path) -> None:
    assert not travel(DynamicBatch(), tmp_path).islands()


class Watched(Framed):
    """Prints, counts, keeps its features, cuts gradients, and takes more than the image if it is given."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x)
        self.register_buffer("calls", torch.zeros(()))
        self.stem.register_forward_hook(lambda module, inputs, output: output * 2.0)
        self.head.register_forward_pre_hook(lambda module, inputs: None)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        print("images of", x.shape)
        self.calls += 1
        with torch.no_grad():
            self.features = self.stem(x if mask is None else x * mask)
        return self.head(self.features.mean((2, 3)))


def test_prints_hooks_counters_and_kept_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Watched()
    assert not travel(network, tmp_path).islands()
    assert "images of torch.Size([32, 3, 8, 8])" in capsys.readouterr().out  # called by the test, not by prepare
    assert network.calls == 1


class StochasticDepth(nn.Module):
    """Draws random numbers, and branches, only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_relu(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:
            return x
        y = self.conv(x)
        if self.training:
            y = y / 0.8 * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.8))
        return x + y


def test_stochastic_depth_is_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert not travel(Framed(lambda m, x: m.block(x), block=StochasticDepth()), tmp_path).islands()
