"""Sums and products with constants: they go into the layer before them, or become one small layer of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journey import CLASSES, make_one, settle, spec_for, travel
from networks import Framed, conv, conv_bn_relu
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy import QuantConfig


class FrozenBatchNorm(nn.Module):
    """As detection backbones have it: four buffers, no statistics of the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, low, high in (("weight", -1.5, 1.5), ("bias", -0.5, 0.5), ("mean", -0.5, 0.5), ("variance", 0.5, 2)):
            self.register_buffer(name, torch.empty(channels).uniform_(low, high))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.variance + 1e-5).rsqrt()
        offset = self.bias - self.mean * scale
        return x * scale.reshape(1, -1, 1, 1) + offset.reshape(1, -1, 1, 1)


class LayerScale(nn.Module):
    """One learned factor for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.k = nn.Parameter(torch.full((8, 1, 1), 0.5)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.k * x


class StandardisedConv(nn.Conv2d):
    """Weights with mean 0 and deviation 1, computed at every call from parameters alone."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def frozen_norms(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.norm(m.a(x)))
    return F.relu(m.norm2(m.b(y)) + y)


def factors_behind_a_relu(m: Any, x: Tensor) -> Tensor:
    y = F.relu6(m.a(x)) * 0.5  # changes places with the bound
    return F.relu(m.b(y)) * torch.linspace(0.5, 2.0, 8).view(8, 1, 1)


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], set[str]]] = {
    # A forward, its layers, and the units that the constants need beyond those of the layers.
    "frozen BatchNorm": (
        frozen_norms,
        {"a": conv(), "b": conv(), "norm": FrozenBatchNorm(8), "norm2": FrozenBatchNorm(8)},
        {"add"},
    ),
    "behind a ReLU": (factors_behind_a_relu, {"a": conv(), "b": conv()}, set()),
    "around a BatchNorm": (
        lambda m, x: F.relu(-0.5 * m.bn(m.a(x)) + 1),
        {"a": conv(), "bn": nn.BatchNorm2d(8)},
        set(),
    ),
    "of a residual": (lambda m, x: F.relu(x + m.a(x) * 0.2), {"a": conv()}, {"add"}),
    "of a skip": (lambda m, x: F.relu(0.5 * x + m.a(x)), {"a": conv()}, {"mul", "add"}),
    "alpha": (lambda m, x: F.relu(torch.add(x, m.a(x), alpha=0.3)), {"a": conv()}, {"add"}),
    "differences": (lambda m, x: F.relu(1 - m.a(x)) - x, {"a": conv()}, {"sub", "sub_2"}),
    "negative": (lambda m, x: torch.cat([F.relu(-x), x], 1)[:, ::2], {}, {"neg", "cat", "slice"}),
    "layer scale": (lambda m, x: m.scale(x), {"scale": LayerScale()}, {"scale.mul", "scale.mul_2", "scale.add"}),
    "weight standardisation": (lambda m, x: F.relu(m.a(x)), {"a": StandardisedConv(8, 8, 3, padding=1)}, set()),
}


@pytest.mark.parametrize("kind", CASES)
def test_constants(kind: str, tmp_path: Path) -> None:
    body, layers, units = CASES[kind]
    torch.manual_seed(0)
    model = travel(Framed(body, **layers), tmp_path)
    assert not model.islands()
    convolutions = {name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    assert set(model.units()) == {"stem.0", "head", "mean", "mean_flat", *convolutions, *units}


class NormalisesItself(Framed):
    """Reads images of 0 to 1, as many published networks do."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return super().forward((x - self.mean) / self.deviation)


def test_normalisation_inside_the_network_is_read_by_the_first_layer_in_8_bits(tmp_path: Path) -> None:
    assert list(travel(NormalisesItself(), tmp_path).units())[:2] == ["sub", "stem.0"]
    network = settle(NormalisesItself(), spec_for())
    model, _ = make_one(network, config=QuantConfig(weight_bits=2, act_bits=2))
    (output,) = model.unit("sub").outputs
    assert (output.qmax, model.unit("stem.0").weight_quantizer.bits) == (255, 8)


class Temperature(Framed):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) / 2.0 - 1.0


def test_constants_behind_the_head_go_into_it(tmp_path: Path) -> None:
    assert list(travel(Temperature(lambda m, x: x), tmp_path).units())[-1] == "head"


class Cosine(nn.Module):
    """A head of normalised weights, over normalised features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = conv_bn_relu(3, 8), nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(self.stem(x).mean((2, 3))), F.normalize(self.weight))


def test_a_cosine_head_is_one_linear_layer_of_normalised_features(tmp_path: Path) -> None:
    model = travel(Cosine(), tmp_path)
    assert list(model.units())[-1] == "linear"
    (island,) = model.islands().values()
    assert "linalg_vector_norm" in island.operators
