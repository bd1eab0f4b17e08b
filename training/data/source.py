"""What every data set looks like to the rest of the room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecdeploy.training.data.order import WHOLE, Share

UNKNOWN = -1
"""The label of an image that nobody has labelled."""


@dataclass(frozen=True)
class Batch:
    """Images of one step.

    images: one uint8 tensor [m, C, H, W] for each view, all of the same m images in the same order.
    labels: int64 [m], class indices, UNKNOWN where there is none.
    """

    images: tuple[Tensor, ...]
    labels: Tensor


class ImageSource(Protocol):
    """One part of a data set, training or validation.

    Holds no position and no random state: the same call gives the same batches, bit for bit, in any process, whatever
    was drawn before it. Image i is always the same image; in a source made of folders the classes take turns, so that
    any first few images hold every class.
    """

    @property
    def labels(self) -> Tensor:
        """Class indices of all images in order, int64 [n], on the CPU."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        start_step: int = 0,
        augment: bool = False,
        views: int = 1,
        drop_last: bool = False,
        share: Share = WHOLE,
    ) -> Iterator[Batch]:
        """The batches of one epoch from step start_step on, with images and labels on the device.

        seed: None gives the images in order. A number (the run's seed) shuffles them by (seed, epoch).
        augment: needs a seed. Random crops (and flips, where a mirrored image keeps its class) drawn for each view from
        (seed, epoch, step) or (seed, epoch, image), on the CPU, so that every device sees the same pixels.
        views: how many independent augmentations of each image; without augment all views are the same tensor.
        drop_last: leave out a last batch smaller than batch_size, unless it is the only one.
        share: which part of every batch this process gets; it may be empty. The parts put together are the batch.
        Starting at start_step gives exactly the batches that a whole epoch gives from there on.
        ValueError for a batch size, step or number of views that makes no sense; TrainingError for an unreadable image.
        """
        ...

    def arrays(self, limit: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The first `limit` images (all, if None) in order: copies, uint8 [n, C, H, W] and labels int64 [n]."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Training and validation images of one size, with what a model has to know about them.

    validation_labelled: whether the validation images have labels, rather than UNKNOWN ones.
    test: the part that the data set gives for validation, where that is carved instead; nothing in training reads it.
    channels: 1 (grayscale) or 3 (RGB). height, width: pixels. class_names: by class index.
    pixel_mean, pixel_std: one number each over the images that are trained on, in pixel units (0..255); std > 0.
    skipped: unreadable files that were left out, which happens only where data.skip_bad_images allows it.
    """

    train: ImageSource
    validation: ImageSource
    class_names: tuple[str, ...]
    channels: int
    height: int
    width: int
    pixel_mean: float
    pixel_std: float
    skipped: tuple[str, ...] = ()
    test: ImageSource | None = None
    validation_labelled: bool = True
