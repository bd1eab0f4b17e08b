"""Random crops and flips of many small images at once, on the device that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mecdeploy.training.seeding import derive_seed


@dataclass(frozen=True)
class Crops:
    """What one view does to a batch of m images, all int64 or bool [m] on the CPU.

    tops, lefts: corner of the crop inside the padded image, 0..2 * padding. mirrored: whether the crop is flipped.
    """

    tops: Tensor
    lefts: Tensor
    mirrored: Tensor

    def part(self, chosen: slice) -> Crops:
        """The crops of some of the images."""
        return Crops(self.tops[chosen], self.lefts[chosen], self.mirrored[chosen])


def crop_padding(height: int, width: int) -> int:
    """Zero pixels around an image before it is cropped: an eighth of its shorter side, at most 4 (8x8: 1, 32x32: 4)."""
    return min(4, min(height, width) // 8)


def draw_crops(count: int, views: int, *, padding: int, flip: bool, seed: int, epoch: int, step: int) -> list[Crops]:
    """Independent crops for each view of a step's images, from (seed, epoch, step) alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "augment", epoch, step))
    drawn = []
    for _ in range(views):
        corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
        mirrored = torch.randint(0, 2, (count,), generator=generator).bool() & flip
        drawn.append(Crops(corners[0], corners[1], mirrored))
    return drawn


def crop_batch(images: Tensor, crops: Crops, padding: int) -> Tensor:
    """Zero-pad every image by `padding` pixels, cut [H, W] back out at its own corner, then mirror left-right.

    images: uint8 [m, C, H, W] on any device; the result has the same shape, type and device.
    Source: He et al. 2015 (arXiv:1512.03385), sec. 4.2 (padding 4, crop 32, horizontal flip).
    """
    count, channels, height, width = images.shape
    tops, lefts, mirrored = (drawn.to(images.device)[:, None] for drawn in (crops.tops, crops.lefts, crops.mirrored))
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = tops + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = lefts + torch.where(mirrored, width - 1 - columns, columns)
    # One flat gather: 4 times faster on a CPU than indexing with four broadcast tensors.
    source = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    source = source.reshape(count, 1, height * width).expand(count, channels, -1)
    return padded.flatten(2).gather(2, source).reshape(images.shape)
