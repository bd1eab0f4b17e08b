"""Activations by name or written by hand: integer where there is a kernel, and otherwise an island that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journey import FEW_BITS, operators_in_float, travel
from networks import Framed, conv, conv_bn_relu
from torch import Tensor, nn
from torch.nn import functional as F

INTEGER: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    # A function of a convolution's output, and how many kernels it takes besides.
    "silu": (lambda m, x: F.silu(x), 2),
    "x * sigmoid(x)": (lambda m, x: x * torch.sigmoid(x), 2),
    "hardswish": (lambda m, x: F.hardswish(x), 2),
    "x * relu6(x + 3) / 6": (lambda m, x: x * F.relu6(x + 3.0) / 6.0, 2),
    "x * (relu6(x + 3) / 6) in place": (lambda m, x: x.mul(F.relu6(x + 3.0, inplace=True).div_(6.0)), 2),
    "x * clamp(x + 3, 0, 6) * (1 / 6)": (lambda m, x: x * torch.clamp(x + 3, 0, 6) * (1 / 6), 2),
    "relu6(x + 3) / 6": (lambda m, x: F.relu6(x + 3) / 6, 1),
    "leaky ReLU": (lambda m, x: F.leaky_relu(x, 0.1), 1),
    "PReLU": (lambda m, x: m.prelu(x), 1),
    "RReLU": (lambda m, x: F.rrelu(x), 1),
    "hardtanh from 0": (lambda m, x: F.hardtanh(x, 0.0, 2.0), 0),
    "ReLU6 of a value that is read twice": (lambda m, x: F.relu6(x) + x, 2),
}


@pytest.mark.parametrize("kind", INTEGER)
def test_integer_activations(kind: str, tmp_path: Path) -> None:
    activation, kernels = INTEGER[kind]

    def body(m: Any, x: Tensor) -> Tensor:
        return activation(m, m.bn(m.conv(x)))

    model = travel(Framed(body, conv=conv(), bn=nn.BatchNorm2d(8), prelu=nn.PReLU()), tmp_path)
    assert not model.islands()
    assert len(model.units()) == 5 + kernels  # stem, convolution, mean, its flattening, head


def test_relu6_of_something_else_than_x_plus_3_is_no_hard_sigmoid(tmp_path: Path) -> None:
    """The factor 6 stays, and x + 3 that is read again stays a value."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x) + 3
        return F.relu6(y) / 6 + y + F.relu6(m.other(x) + 2) / 6

    model = travel(Framed(body, conv=conv(), other=conv()), tmp_path)
    assert not model.islands()
    assert not any("sigmoid" in str(getattr(unit, "function", "")) for unit in model.units().values())


class MishByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(F.softplus(x))


def test_float_activations_are_told_and_exact_around(tmp_path: Path) -> None:
    activations = [nn.ELU(), nn.Mish(), nn.GELU(), nn.GELU("tanh"), nn.PReLU(4), MishByHand(), nn.Hardtanh(), nn.GLU(1)]

    def body(m: Any, x: Tensor) -> Tensor:
        parts = [layer(part) for layer, part in zip(m.activations, m.conv(x).split(4, 1), strict=True)]
        return m.last(torch.cat(parts, 1))

    network = Framed(
        body, conv=conv(8, 4 * len(activations)), activations=nn.ModuleList(activations), last=conv_bn_relu(30, 8)
    )
    model = travel(network, tmp_path)
    expected = {"elu", "mish", "gelu", "prelu", "softplus", "tanh", "hardtanh", "glu", "mul", "cat"}
    assert operators_in_float(model) == expected
    reasons = {island.reason for island in model.islands().values()}
    assert "elu has no integer kernel" in reasons
    assert {"stem.0", "conv", "last.0", "head"} <= set(model.units())


def test_squeeze_and_excite_by_convolutions(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
        return x * gate

    network = Framed(body, down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1))
    assert not travel(network, tmp_path, config=FEW_BITS).islands()


def test_squeeze_and_excite_by_linear_layers_and_expand_as(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.size()
        gate = m.layers(m.pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return x * gate.expand_as(x)

    layers = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
    assert not travel(Framed(body, pool=nn.AdaptiveAvgPool2d(1), layers=layers), tmp_path).islands()


def test_attention_over_channels_and_positions(tmp_path: Path) -> None:
    """CBAM: the statistics over channels are float, the convolution over them and the gates are not."""

    def body(m: Any, x: Tensor) -> Tensor:
        statistics = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(m.conv(statistics))

    model = travel(Framed(body, conv=conv(2, 1)), tmp_path)
    assert operators_in_float(model) == {"amax", "mean", "cat"}
    assert {"conv", "sigmoid", "mul"} <= set(model.units())
