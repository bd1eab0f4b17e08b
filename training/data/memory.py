"""A data set that lives decoded in memory and is augmented in batches, on the GPU when there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecdeploy.training.data.augment import crop_batch, crop_padding, draw_crops
from mecdeploy.training.data.order import WHOLE, Share, check_request, epoch_order, step_bounds
from mecdeploy.training.data.source import Batch


class MemorySource:
    """An ImageSource over one array: images uint8 [n, C, H, W], labels [n] class indices.

    flip: whether a mirrored image still shows its class. With augment, images are zero-padded by `crop_padding`,
    cropped at random and, if flip, mirrored half of the time.
    On a GPU the images stay resident (a copy made at the first batch), unless that took half of what is free there.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer], *, flip: bool) -> None:
        self._images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels: Tensor = torch.from_numpy(np.asarray(labels, np.int64))
        self._flip = flip
        self._resident: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

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
        """See ImageSource.batches; augmentation is drawn from (seed, epoch, step)."""
        check_request(batch_size, seed, start_step, augment, views)
        bounds = step_bounds(len(self), batch_size, start_step=start_step, drop_last=drop_last)
        augment_seed = seed if augment else None
        order = epoch_order(len(self), seed, epoch)
        return self._batches(bounds, order, share, torch.device(device), augment_seed, epoch, views)

    def _batches(
        self,
        bounds: Iterator[tuple[int, int, int]],
        order: Tensor,
        share: Share,
        device: torch.device,
        augment_seed: int | None,
        epoch: int,
        views: int,
    ) -> Iterator[Batch]:
        images = self._images_near(device)
        padding = crop_padding(*images.shape[2:])
        for step, first, end in bounds:
            mine = slice(*share.bounds(end - first))
            chosen = order[first:end][mine]
            labels = self.labels[chosen].to(device)
            plain = images[chosen.to(images.device)].to(device)
            if augment_seed is None:
                yield Batch((plain,) * views, labels)
                continue
            # Drawn for the whole batch, so that an image's crop does not depend on how many processes share it.
            drawn = draw_crops(
                end - first, views, padding=padding, flip=self._flip, seed=augment_seed, epoch=epoch, step=step
            )
            yield Batch(tuple(crop_batch(plain, crops.part(mine), padding) for crops in drawn), labels)

    def arrays(self, limit: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """See ImageSource.arrays."""
        return self._images[:limit].numpy().copy(), self.labels[:limit].numpy().copy()

    def _images_near(self, device: torch.device) -> Tensor:
        """All images on the device, or where they are if the device has no room to keep them."""
        if device.type != "cuda":
            return self._images
        if device not in self._resident:
            if self._images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
                return self._images
            self._resident[device] = self._images.to(device)
        return self._resident[device]
