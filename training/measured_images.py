"""The images that a finished network is measured on: as many as were asked for, in fixed batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mecdeploy.training.data import Batch, ImageSource
from mecdeploy.training.data.source import UNKNOWN
from mecdeploy.training.device import channels_last
from mecdeploy.training.errors import TrainingError


def count_images(source: ImageSource, images: int | None, *, default: int, part: str) -> int:
    """How many of a source's images to take: `images`, or where None as many as there are up to `default`.

    part: what the source is called in a message. Raises TrainingError for more than there are, for fewer than 2, and
    for a source without labels.
    """
    if bool((source.labels == UNKNOWN).any()):
        raise TrainingError(f"the {part} images have no labels, without which this cannot be measured on them.")
    if images is None:
        images = min(default, len(source))
    if images > len(source):
        raise TrainingError(f"images is {images}, but the run has {len(source)} {part} images; ask for at most these.")
    if images < 2:
        raise TrainingError(f"images is {images}; a measurement needs at least 2 {part} images.")
    return images


def batch_count(images: int, batch_size: int) -> int:
    """How many batches `take` yields."""
    return math.ceil(images / batch_size)


def take(
    source: ImageSource, images: int, *, batch_size: int, device: torch.device, seed: int | None = None
) -> Iterator[Batch]:
    """Batches with `images` images in all, not augmented, on the device, as `place` lays out the network.

    seed: draws them; None takes the first, which hold every class. The same call always gives the same.
    """
    for batch in source.batches(batch_size, device=device, seed=seed):
        pixels, labels = batch.images[0][:images], batch.labels[:images]
        yield Batch((channels_last(pixels, device),), labels.to(device))
        images -= len(labels)
        if not images:
            return
