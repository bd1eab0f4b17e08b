"""A run small enough to train whole in a few hundredths of a second: 45 images, 3 classes, 9 layers of 8 channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mecdeploy.training.config import DataConfig, MecConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.data import Batch, ImageDataset
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.events import Event, StageEvent, StepEvent

FINAL = "checkpoint-final.safetensors"
LAST = "checkpoint-deploy-0002.safetensors"  # the same position, with the optimiser's momentum
STEPS = 3  # 45 images in batches of 13, the remainder of 6 dropped
FP_EPOCHS, QAT_EPOCHS, DEPLOY_EPOCHS = 2, 2, 2


class TinyNet(nn.Module):
    """Convolution, a residual block, dropout (so that a step draws random numbers), pooling, linear."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.flatten(self.pool(self.dropout(x))))


def build_tiny(config: Any, *, num_classes: int, channels: int, height: int, width: int) -> nn.Module:
    """Stands in for build_model."""
    return TinyNet(num_classes, channels)


def tiny_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter in the third of the rows that is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, 1, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 3] += 130
    return images.astype(np.uint8), labels


def tiny_dataset(train: Any = None, validation: Any = None, **changes: Any) -> ImageDataset:
    fields: dict[str, Any] = {
        "train": train or MemorySource(*tiny_images(45, seed=1), flip=True),
        "validation": validation or MemorySource(*tiny_images(24, seed=2), flip=False),
        "class_names": ("top", "middle", "bottom"),
        "channels": 1,
        "height": 8,
        "width": 8,
        "pixel_mean": 104.3,
        "pixel_std": 70.1,
    }
    return ImageDataset(**{**fields, **changes})


def tiny_config(
    *,
    method: str = "mec",
    seed: int = 0,
    mec: MecConfig | None = None,
    weights: str = "",
    augment: bool = True,
    **schedule: Any,
) -> TrainConfig:
    defaults = {
        "fp_epochs": FP_EPOCHS,
        "epochs": QAT_EPOCHS + DEPLOY_EPOCHS,
        "frozen_epochs": DEPLOY_EPOCHS,
        "batch_size": 13,
        "calibration_images": 20,
    }
    return TrainConfig(
        method=method,
        seed=seed,
        device="cpu",
        weights=weights,
        data=DataConfig(augment=augment),
        mec=mec or MecConfig(samples=16, experts=2),
        schedule=ScheduleConfig(**{**defaults, **schedule}),
    )


def interrupt_at(matches: Callable[[Event], bool], error: BaseException | None = None) -> Callable[[Event], None]:
    """A report that raises KeyboardInterrupt (or `error`) at the first event that matches."""

    def report(event: Event) -> None:
        if matches(event):
            raise error or KeyboardInterrupt

    return report


def is_step(stage: str, epoch: int, step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StepEvent) and (event.stage, event.epoch, event.step) == (stage, epoch, step)


def is_stage(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StageEvent) and event.stage == name


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, read without the code under test."""
    from safetensors.torch import load_file

    return load_file(path)


def assert_same_tensors(left: Path, right: Path) -> None:
    """Bit for bit: no tolerance."""
    a, b = tensors_in(left), tensors_in(right)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def assert_same_run(out: Path, reference: Path) -> None:
    """Both end at the same bits, momentum included."""
    for name in (FINAL, LAST):
        assert_same_tensors(out / name, reference / name)


class SlowSource(MemorySource):
    """Takes `pause` seconds for each batch."""

    pause = 0.0

    def batches(self, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        import time

        for batch in super().batches(*args, **kwargs):
            time.sleep(self.pause)
            yield batch
