"""Training images that are drawn beside the steps: to calibrate on, and for the statistics of averaged parameters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from mecdeploy.training.averaging import STATISTICS_BATCHES
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.data import ImageDataset
from mecdeploy.training.device import channels_last
from mecdeploy.training.seeding import derive_seed


def calibration_batches(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> list[Tensor]:
    """The training images that set the first step sizes: schedule.calibration_images of them, not augmented."""
    schedule = config.schedule
    left, batches = schedule.calibration_images, []
    seed = derive_seed(config.seed, "calibrate")
    for batch in dataset.train.batches(schedule.batch_size, device=device, seed=seed, drop_last=True):
        batches.append(batch.images[0][:left])
        left -= len(batches[-1])
        if left < 2:  # BatchNorm has no variance over a single image of one pixel
            break
    return batches


def statistics_batches(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> Iterator[Tensor]:
    """Images for BatchNorm statistics, augmented as in training.

    The same for every process, and whole, so that all come to the same statistics.
    """
    batches = dataset.train.batches(
        config.schedule.batch_size,
        device=device,
        seed=derive_seed(config.seed, "statistics"),
        augment=config.data.augment,
        drop_last=True,
    )
    return (channels_last(batch.images[0], device) for batch in islice(batches, STATISTICS_BATCHES))
