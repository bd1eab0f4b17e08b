"""The networks that latency is measured on: torchvision's, with random weights and statistics of real photographs.

Time and size do not depend on what a network knows, so nothing is trained. Its BatchNorm statistics and the step sizes
are nevertheless calibrated on photographs: a network whose activations are all zero or all saturated might be faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mecdeploy.export import ExportConfig, IntegerGraph, export_model, lower
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import ModelConfig, QuantConfig
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.models import build_model
from mecdeploy.training.preparation import prepare

SIDE = 224  # pixels
CLASSES = 1000
BATCH = 8


def photographs(count: int, seed: int, side: int = SIDE) -> Tensor:
    """uint8 [count, 3, side, side]: random crops and mirror images of scikit-learn's two sample photographs.

    side: in pixels. Crops are SIDE pixels large and shrunk to it, so that small images show as much as large ones.
    """
    from sklearn.datasets import load_sample_images

    images: list[np.ndarray] = load_sample_images().images  # uint8 [427, 640, 3] each
    generator = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        image = images[index % len(images)]
        top, left = (int(generator.integers(0, length - SIDE + 1)) for length in image.shape[:2])
        crop = image[top : top + SIDE, left : left + SIDE]
        crops.append(crop[:, :: 1 if generator.random() < 0.5 else -1])
    pixels = torch.from_numpy(np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2)))
    if side == SIDE:
        return pixels
    return interpolate(pixels, (side, side), mode="bilinear", antialias=True)


def input_spec(pixels: Tensor) -> InputSpec:
    """Normalisation by the statistics of these photographs."""
    values = pixels.double()
    height, width = pixels.shape[2:]
    return InputSpec.from_statistics(
        channels=3, height=height, width=width, mean=float(values.mean()), std=float(values.std())
    )


def batches(pixels: Tensor) -> Iterator[Tensor]:
    """The photographs, BATCH at a time."""
    return (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))


@torch.no_grad()
def float_network(
    name: str, pixels: Tensor, spec: InputSpec, seed: int, *, classes: int = CLASSES, stem: str = "auto"
) -> nn.Module:
    """The network in evaluation mode, its BatchNorm statistics averaged over the photographs."""
    torch.manual_seed(seed)
    config = ModelConfig(name=name, stem=stem)
    model = build_model(config, num_classes=classes, channels=3, height=spec.height, width=spec.width)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
    for batch in batches(pixels):
        model(spec.normalize(batch))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def quantized_network(model: nn.Module, pixels: Tensor, spec: InputSpec, bits: int) -> QuantizedModel:
    """The network with weights and activations of `bits` bits; first, last and residual stream 8, as by default."""
    quantized = prepare(model, QuantConfig(weight_bits=bits, act_bits=bits), spec)
    calibrate(quantized, batches(pixels))
    return quantized.eval()


def exported(model: QuantizedModel) -> bytes:
    """The ONNX file that `mecdeploy export` writes with its default settings."""
    graph: IntegerGraph = lower(model)
    return export_model(graph, ExportConfig(), {})
