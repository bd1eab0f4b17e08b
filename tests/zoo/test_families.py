"""One small member of every family: trained for a step, exported, and no integer differs between the three sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import CLASSES, INTEGER, SIDE, WITH_ISLANDS
from torch import Tensor, nn
from torch.nn import functional as F

import mecdeploy
from mecdeploy import InputSpec, QuantConfig, QuantizedModel
from mecdeploy.runtime_checks import ParityReport


def photographs(count: int) -> Tensor:
    """uint8 [count, 3, SIDE, SIDE], smooth as photographs are: noise of 4 pixels a side, enlarged."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 4, 4))).float()
    smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return smooth.round().clamp(0, 255).to(torch.uint8)


def trained(network: nn.Module, pixels: Tensor) -> QuantizedModel:
    spec = InputSpec.from_statistics(channels=3, height=SIDE, width=SIDE, mean=127.0, std=64.0)
    with torch.no_grad():  # BatchNorm's statistics: those of photographs, not 0 and 1
        for _ in range(4):
            network.train()(spec.normalize(pixels))
    model = mecdeploy.prepare(network.eval(), QuantConfig(weight_bits=4, act_bits=4), spec)
    mecdeploy.calibrate(model, pixels.split(8))
    loss = F.cross_entropy(model.train()(pixels), torch.arange(len(pixels)) % CLASSES)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:  # a step relative to its size: random networks have gradients of any size
                assert torch.isfinite(parameter.grad).all()
                parameter.sub_(1e-2 * parameter.abs() * parameter.grad.sign())
    return model.eval()


def checked(name: str, network: nn.Module, folder: Path) -> ParityReport:
    pixels = photographs(16)
    model = trained(network, pixels)
    path = mecdeploy.export(model, out=folder / f"{name}.onnx").path
    return mecdeploy.check(model, path, images=pixels[:3].numpy(), labels=np.zeros(3, dtype=np.int64))


ALONE = {"densenet": 6, "maxvit": 1}
"""BatchNorms that follow neither a convolution nor an island: each is a depthwise kernel of its own."""


def products(name: str, network: nn.Module) -> int:
    """How many convolutions and products the network has.

    MultiheadAttention keeps the weights of its first product outside of any Linear. The two Linears of a Swin V2 block
    that compute its position bias read nothing of the image: they are a constant.
    """
    kinds = [type(module).__name__ for module in network.modules()]
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    constant = 2 * kinds.count("ShiftedWindowAttentionV2")
    return layers + kinds.count("MultiheadAttention") - constant + ALONE.get(name, 0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", INTEGER)
def test_convolutional_families_run_in_integers_from_end_to_end(name: str, tmp_path: Path) -> None:
    network = INTEGER[name]()
    report = checked(name, network, tmp_path)
    assert report.passed, report.failures
    assert report.integers_different == 0 and report.integers_compared > 1000
    assert report.exact_end_to_end and not report.float_operators
    assert report.integer_convolutions == products(name, network) and report.float_convolutions == 0
    assert report.logits.different == 0 and report.top1_agreement == 1


@pytest.mark.parametrize("name", WITH_ISLANDS)
def test_every_layer_with_weights_of_a_transformer_is_an_integer_kernel(name: str, tmp_path: Path) -> None:
    network = WITH_ISLANDS[name]()
    report = checked(name, network, tmp_path)
    assert report.passed, report.failures
    assert report.integers_different == 0 and report.integers_compared > 1000
    assert report.integer_convolutions == products(name, network) and report.float_convolutions == 0
    floating = {operator for island in report.islands for operator in island.operators}
    assert {"layer_norm", "gelu"} <= floating
    assert all(island.reason for island in report.islands)
