"""A normalisation per channel folded into the first convolutions, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traced_networks import classifier, conv, pooled

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.geometry import Geometry
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.normalization import fold_normalization
from mecdeploy.training.planning import plan_units
from mecdeploy.training.plans import Layer
from mecdeploy.training.tracing import trace

SPEC = InputSpec.from_channels(height=8, width=8, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 62.9))


def folded_layers(forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> tuple[nn.Module, dict[str, Layer]]:
    """The float network, and its layers as they expect pixels normalised by one scale and zero point."""
    torch.manual_seed(0)
    model = classifier(forward, **layers).double()
    plans = plan_units(trace(model.float(), SPEC))
    fold_normalization(plans, SPEC)
    return model.double(), {plan.name: plan.layer for plan in plans.by_name.values() if plan.layer is not None}


def apply(layer: Layer, x: Tensor) -> Tensor:
    geometry = layer.geometry
    assert isinstance(geometry, Geometry)
    x = F.pad(x, geometry.pad_argument)
    bias = None if layer.bias is None else layer.bias.double()
    return F.conv2d(x, layer.weight.double(), bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def pixels(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def per_channel(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (SPEC.mean, SPEC.std))
    return (x.double() - mean) / std


def scalar(x: Tensor) -> Tensor:
    return (x.double() - SPEC.pixel_zero_point) * SPEC.pixel_scale


# Weights and biases are rounded to float32 once: 2^-24 of what is summed, 27 taps of sizes up to 3.
ROUNDING = 27 * 3 * 2.0**-24

CONVOLUTIONS: dict[str, nn.Conv2d] = {
    "plain": nn.Conv2d(3, 4, 3),
    "without a bias": nn.Conv2d(3, 4, 3, bias=False),
    "patches": nn.Conv2d(3, 4, 4, stride=4),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3),
    "dilated": nn.Conv2d(3, 4, 2, dilation=3, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@torch.no_grad()
def test_without_padding_it_is_exact(kind: str) -> None:
    first = CONVOLUTIONS[kind]
    model, layers = folded_layers(
        lambda m, x: m.fc(m.conv(x).mean((2, 3))), conv=first, fc=nn.Linear(first.out_channels, 5)
    )
    found, expected = apply(layers["conv"], scalar(pixels())), model.get_submodule("conv")(per_channel(pixels()))
    assert expected.abs().max() > 0.3
    assert (found - expected).abs().max().item() <= ROUNDING


@pytest.mark.parametrize("padding", [1, "same", (0, 2)])
@torch.no_grad()
def test_with_padding_only_the_border_differs_by_the_padded_taps(padding: Any) -> None:
    """There the float network has 0, and the folded one the pixel zero point: t in normalised units."""
    model, layers = folded_layers(lambda m, x: pooled(m, m.conv(x)), conv=nn.Conv2d(3, 4, 3, padding=padding))
    float_conv = model.get_submodule("conv")
    assert isinstance(float_conv, nn.Conv2d)
    found, expected = apply(layers["conv"], scalar(pixels())), float_conv(per_channel(pixels()))
    mean, std = torch.tensor(SPEC.mean, dtype=torch.float64), torch.tensor(SPEC.std, dtype=torch.float64)
    t = ((SPEC.pixel_zero_point - mean) / std).view(1, 3, 1, 1)
    outside = 1 - torch.ones(1, 3, 8, 8, dtype=torch.float64)
    geometry = layers["conv"].geometry
    assert geometry is not None
    outside = F.pad(outside, geometry.pad_argument, value=1.0) * t
    difference = F.conv2d(outside, float_conv.weight)
    assert ((found - expected) - difference).abs().max().item() <= ROUNDING
    vertical, horizontal = geometry.padding[:2]
    inside = difference[:, :, vertical or None : -vertical or None, horizontal or None : -horizontal or None]
    assert bool((inside == 0).all()) and bool(difference.any())


@torch.no_grad()
def test_every_layer_that_reads_pixels_is_folded() -> None:
    model, layers = folded_layers(
        lambda m, x: pooled(m, m.conv(x) + F.conv2d(F.max_pool2d(x, 1), m.second.weight)), second=nn.Conv2d(3, 4, 1)
    )
    assert len(layers) == 3
    second = next(layer for name, layer in layers.items() if name == "second")
    expected = F.conv2d(per_channel(pixels()), model.get_submodule("second").weight)  # type: ignore[arg-type]
    assert (apply(second, scalar(pixels())) - expected).abs().max().item() <= ROUNDING


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a linear layer": (lambda m, x: m.flat(x.flatten(1)), "flat"),
    "a pool": (lambda m, x: pooled(m, m.conv(F.adaptive_avg_pool2d(x, 4))), "adaptive_avg_pool2d"),
    "an island": (lambda m, x: pooled(m, m.conv(torch.tanh(x))), "tanh"),
    "an island beside a convolution": (
        lambda m, x: pooled(m, m.conv(x) + m.second(torch.tanh(x))), "tanh"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_where_something_else_reads_the_pixels(kind: str) -> None:
    forward, name = REFUSED[kind]
    with pytest.raises(TrainingError, match=re.escape(f"{name} reads the pixels, and only a convolution can take in")):
        folded_layers(forward, flat=nn.Linear(192, 5), second=conv(inputs=3))


def test_a_scalar_normalisation_changes_nothing_and_may_be_read_by_anything() -> None:
    spec = InputSpec.from_statistics(channels=3, height=8, width=8, mean=120.7, std=64.1)
    plans = plan_units(trace(classifier(lambda m, x: m.flat(x.flatten(1)), flat=nn.Linear(192, 5)), spec))
    layer = plans.by_name["flat"].layer
    fold_normalization(plans, spec)
    assert plans.by_name["flat"].layer is layer
