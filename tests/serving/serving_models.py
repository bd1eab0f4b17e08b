"""Small exported classifiers, never trained, and pictures for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("tabby cat", "dog", "arbre — \N{DECIDUOUS TREE}", "<b>car</b>")


def write_classifier(path: Path, *, seed: int, input: str = "uint8") -> Path:
    """A calibrated W4A4 classifier of 16x16 RGB images, never trained: what is served does not depend on it."""
    import torch
    from torch import nn

    from mecdeploy import InputSpec, QuantConfig, calibrate, export, prepare

    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(CLASSES)))
    spec = InputSpec(channels=3, height=16, width=16, pixel_scale=1 / 64, pixel_zero_point=128)
    model = prepare(network, QuantConfig(weight_bits=4, act_bits=4), spec)
    calibrate(model, [torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)])
    return export(model, out=path, input=input, class_names=CLASSES).path


def encoded(*, size: tuple[int, int], format: str, mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A file of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, format, **options)
    return file.getvalue()
