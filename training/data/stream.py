"""Images too many or too large for memory: decoded when they are needed, by worker processes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mecdeploy.training.data.decode import (
    UnreadableImage,
    decode_augmented,
    decode_image,
    decode_many,
    raise_first,
    usable_cores,
)
from mecdeploy.training.data.order import WHOLE, Share, check_request, epoch_order, step_bounds
from mecdeploy.training.data.source import Batch
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.seeding import derive_seed


class StreamSource:
    """An ImageSource over image files; labels are class indices, one for each path.

    Without augment every image is `decode_image`'s. With it, a random resized crop (and a flip half of the time, if
    flip) is drawn from (seed, epoch, image), so that neither the number of workers nor the batch size changes what an
    image becomes. workers: processes that decode, at most one a core; 0 decodes in this one.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: NDArray[np.integer],
        *,
        channels: int,
        height: int,
        width: int,
        flip: bool,
        workers: int,
    ) -> None:
        self.paths = tuple(paths)
        self.labels: Tensor = torch.from_numpy(np.asarray(labels, np.int64))
        self._shape = (channels, height, width)
        self._flip = flip
        self._workers = min(workers, usable_cores())

    def __len__(self) -> int:
        return len(self.paths)

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
        """See ImageSource.batches; augmentation is drawn from (seed, epoch, image)."""
        check_request(batch_size, seed, start_step, augment, views)
        order = epoch_order(len(self), seed, epoch)
        bounds = step_bounds(len(self), batch_size, start_step=start_step, drop_last=drop_last)
        requests = [order[first:end][slice(*share.bounds(end - first))].tolist() for _, first, end in bounds]
        recipe = _Recipe(self.paths, self._shape, self._flip, seed if augment else None, epoch, views if augment else 1)
        return self._batches(requests, recipe, torch.device(device), views)

    def _batches(self, requests: list[list[int]], recipe: _Recipe, device: torch.device, views: int) -> Iterator[Batch]:
        workers = min(self._workers, len(requests))
        loader = DataLoader(
            recipe,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            # Its own generator: the loader would otherwise draw from torch's global one, once an epoch.
            generator=torch.Generator(),
        )
        decoded = iter(loader)
        try:
            for chosen in requests:
                pixels = _next_batch(decoded, workers)
                if isinstance(pixels, UnreadableImage):
                    raise pixels
                images = tuple(torch.from_numpy(view).to(device) for view in pixels)
                yield Batch(images if len(images) == views else images * views, self.labels[chosen].to(device))
        finally:
            del decoded  # ends its workers; they would else outlive an exception that holds this frame

    def arrays(self, limit: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """See ImageSource.arrays; decodes them all at once."""
        pixels = decode_or_raise(self.paths[:limit], self._shape)
        return pixels, self.labels[:limit].numpy().copy()

    def sample(self, limit: int, seed: int) -> NDArray[np.uint8]:
        """At most `limit` different images drawn by the seed, uint8 [n, C, H, W]."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "sample"))
        chosen = torch.randperm(len(self), generator=generator)[:limit].tolist()
        return decode_or_raise([self.paths[index] for index in chosen], self._shape)


def decode_or_raise(paths: Sequence[str], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """`decode_many`, but UnreadableImage if there is one."""
    pixels, refused = decode_many(paths, channels=shape[0], height=shape[1], width=shape[2])
    raise_first(refused)
    return pixels


@dataclass(frozen=True)
class _Recipe(Dataset[NDArray[np.uint8] | UnreadableImage]):
    """What a worker needs to make the images of one epoch: indices -> uint8 [views, m, C, H, W]."""

    paths: tuple[str, ...]
    shape: tuple[int, int, int]
    flip: bool
    seed: int | None
    epoch: int
    views: int

    def __getitem__(self, indices: list[int]) -> NDArray[np.uint8] | UnreadableImage:
        pixels = np.empty((self.views, len(indices), *self.shape), np.uint8)
        try:
            for position, index in enumerate(indices):
                pixels[:, position] = self._decode(index)
        except UnreadableImage as error:
            return error  # not raised: the loader would put the worker's traceback into its text
        return pixels

    def _decode(self, index: int) -> NDArray[np.uint8]:
        path = self.paths[index]
        channels, height, width = self.shape
        if self.seed is None:
            return decode_image(path, channels=channels, height=height, width=width)[None]
        draw = random.Random(derive_seed(self.seed, "augment", self.epoch, index))
        return decode_augmented(
            path, channels=channels, height=height, width=width, views=self.views, flip=self.flip, draw=draw
        )


def _next_batch(
    decoded: Iterator[NDArray[np.uint8] | UnreadableImage], workers: int
) -> NDArray[np.uint8] | UnreadableImage:
    try:
        return next(decoded)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # it did not die, it raised
            raise
        raise TrainingError(
            f"a process that decodes images ended ({str(error).splitlines()[0]}). It may have run out of memory: "
            f"data.workers is {workers}; set it lower, or to 0."
        ) from error.with_traceback(None)  # which would keep the loader and its processes


def _as_it_is(pixels: Any) -> Any:
    """Leave numpy arrays alone: they come through a pipe, so that a container's small /dev/shm is no limit."""
    return pixels
