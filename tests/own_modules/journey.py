"""What a user does with a network of their own, from prepare to check, and the float network as witness of its meaning.

That PyTorch and onnxruntime agree says nothing about whether both still compute the user's network. So the quantised
one is compared with the network itself, called as the user calls it, right after calibration at 8 bits.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mecdeploy
from mecdeploy import InputSpec, QuantConfig, QuantizedModel

CLASSES = 5

EIGHT_BITS = QuantConfig(weight_bits=8, act_bits=8)
FEW_BITS = QuantConfig(weight_bits=2, act_bits=4, skip_bits=4)

CLOSE = 0.2
"""Of the float logits' spread: what 8-bit rounding may change, and the statistics of one batch in place of all's. The
networks here lose 0.01 to 0.1; a lost operator, a wrong axis or a wrong constant changes random logits by about 1."""


def spec_for(size: int = 8, channels: int = 3) -> InputSpec:
    return InputSpec.from_statistics(channels=channels, height=size, width=size, mean=118.0, std=60.0)


def pictures(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random images of many brightnesses and contrasts, uint8 [count, channels, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, max(2, size // 3), max(2, size // 3), generator=generator)
    light, contrast = torch.rand(2, count, channels, 1, 1, generator=generator)
    smooth = F.interpolate(light + (coarse - light) * contrast, size=(size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def settle(network: nn.Module, spec: InputSpec, passes: int = 1) -> nn.Module:
    """Give BatchNorms the statistics of some images, as training would, and every vector of parameters a spread."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() <= 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    was_training = network.training
    network.train()
    with torch.no_grad():
        for _ in range(passes):
            network(spec.normalize(pictures(32, spec.height, spec.channels)))
    for norm in norms:
        norm.momentum = 0.1
    return network.train(was_training)


def distance(network: nn.Module, model: QuantizedModel, images: Tensor, take: str | int | None = None) -> float:
    """Root mean square difference of logits, float and quantised, over the spread of the float ones."""
    with torch.no_grad():
        result = copy.deepcopy(network).eval()(model.spec.normalize(images))
        expected: Tensor = result if take is None else result[take]
        found = model.eval()(images)
    spread = (expected - expected.mean(0)).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / spread)


def make_one(
    network: nn.Module, *, size: int = 8, channels: int = 3, config: QuantConfig = EIGHT_BITS
) -> tuple[QuantizedModel, Tensor]:
    """A prepared and calibrated copy of a settled network, and the images it was calibrated on."""
    images = pictures(32, size, channels)
    model = mecdeploy.prepare(network, config, spec_for(size, channels))
    mecdeploy.calibrate(model, [images])
    return model, images


def train_a_little(model: QuantizedModel, images: Tensor) -> None:
    """Two steps on live BatchNorm and one on frozen: all parameters get finite gradients and move."""
    labels = torch.arange(len(images)) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(3):
        if step == 2:
            model.freeze()
        model.train()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert bool(torch.isfinite(loss))
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name
        optimizer.step()


def export_and_check(model: QuantizedModel, images: Tensor, folder: Path) -> None:
    """0 integers differ and nothing else fails, for one image and for five."""
    file = folder / "model.onnx"
    mecdeploy.export(model, out=file)
    for count in (1, 5):
        pixels, labels = images[:count].numpy(), np.arange(count) % CLASSES
        report = mecdeploy.check(model, file, images=pixels, labels=labels)
        assert report.failures == ()
        assert report.passed and report.integers_different == 0 and report.integers_compared > 0


def travel(
    network: nn.Module,
    folder: Path,
    *,
    size: int = 8,
    channels: int = 3,
    config: QuantConfig = EIGHT_BITS,
    take: str | int | None = None,
    passes: int = 1,
) -> QuantizedModel:
    """The whole way; returns the trained model.

    take: which of the float network's results are its logits. passes: over the images, for running statistics.
    """
    network = settle(network, spec_for(size, channels), passes)
    model, images = make_one(network, size=size, channels=channels, config=config)
    if config.weight_bits == config.act_bits == 8:
        apart = distance(network, model, images, take)
        assert apart < CLOSE, f"the quantised network is {apart:.3f} of the logits' spread away from the float one"
    train_a_little(model, images)
    export_and_check(model, images, folder)
    return model


def operators_in_float(model: QuantizedModel) -> set[str]:
    """Every operator that model.islands() tells of."""
    return {operator for island in model.islands().values() for operator in island.operators}
