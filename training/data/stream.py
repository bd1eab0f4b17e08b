"""Images too many or too large for memory: read and decoded when they are needed, by worker processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mecdeploy.training.data.decode import (
    ImageFile,
    ImageFiles,
    decode_augmented,
    decode_image,
    decode_many,
    raise_first,
    usable_cores,
)
from mecdeploy.training.data.order import WHOLE, Share, check_request, epoch_order, step_bounds, step_count
from mecdeploy.training.data.source import Batch
from mecdeploy.training.data.workers import in_workers
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.seeding import derive_seed


class Order(Protocol):
    """Image indices in the order of an epoch."""

    def __getitem__(self, run: slice, /) -> Tensor:
        """Those of positions run.start to run.stop, int64."""
        ...


class StreamSource:
    """An ImageSource over image files; labels are class indices, one for each file.

    files: paths, or images inside other files. order: which image comes when, from (seed, epoch) alone; by default all
    are shuffled.
    Without augment every image is `decode_image`'s. With it, a random resized crop (and a flip half of the time, if
    flip) is drawn from (seed, epoch, image), so that neither the number of workers nor the batch size changes what an
    image becomes. workers: processes that decode, at most one a core; 0 decodes in this one.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: NDArray[np.integer],
        *,
        channels: int,
        height: int,
        width: int,
        flip: bool,
        workers: int,
        order: Callable[[int | None, int], Order] | None = None,
    ) -> None:
        self._files = files
        self._labels = labels
        self._shape = (channels, height, width)
        self._flip = flip
        self._workers = min(workers, usable_cores())
        self._order = order or (lambda seed, epoch: epoch_order(len(files), seed, epoch))

    def __len__(self) -> int:
        return len(self._files)

    @property
    def labels(self) -> Tensor:
        """See ImageSource.labels; made anew, so that a small type in a file stays small until all are asked for."""
        return torch.from_numpy(self._labels.astype(np.int64))

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
        count = len(self)
        steps = step_count(count, batch_size, drop_last=drop_last) - start_step
        order = self._order(seed, epoch)

        def requests() -> Iterator[NDArray[np.int64]]:
            for _, first, end in step_bounds(count, batch_size, start_step=start_step, drop_last=drop_last):
                low, high = share.bounds(end - first)
                yield order[first + low : first + high].numpy()

        recipe = _Recipe(
            self._files, self._shape, self._flip, seed if augment else None, epoch, views if augment else 1
        )
        return self._batches(requests(), recipe, min(self._workers, max(steps, 0)), torch.device(device), views)

    def _batches(
        self,
        requests: Iterator[NDArray[np.int64]],
        recipe: _Recipe,
        workers: int,
        device: torch.device,
        views: int,
    ) -> Iterator[Batch]:
        ahead, now = tee(requests)  # the workers' and ours: a list of them all would hold every index of the epoch
        decoded = in_workers(recipe, ahead, workers)
        try:
            for chosen in now:
                images = tuple(_put(view, device) for view in next(decoded))
                labels = _put(self._labels[chosen].astype(np.int64), device)
                yield Batch(images if len(images) == views else images * views, labels)
        finally:
            decoded.close()

    def arrays(self, limit: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """See ImageSource.arrays; decodes them all at once."""
        count = len(self) if limit is None else min(limit, len(self))
        return self._decode(range(count)), self._labels[:count].astype(np.int64)

    def sample(self, limit: int, seed: int) -> NDArray[np.uint8]:
        """At most `limit` different images drawn by the seed, uint8 [n, C, H, W]."""
        draw = random.Random(derive_seed(seed, "sample"))  # unlike randperm, in no more memory than the sample takes
        return self._decode(draw.sample(range(len(self)), min(limit, len(self))))

    def _decode(self, indices: range | list[int]) -> NDArray[np.uint8]:
        channels, height, width = self._shape
        pixels, refused = decode_many(_Chosen(self._files, indices), channels=channels, height=height, width=width)
        raise_first(refused)
        return pixels


@dataclass(frozen=True)
class _Recipe(Dataset[NDArray[np.uint8] | TrainingError]):
    """What a worker needs to make the images of one epoch: indices -> uint8 [views, m, C, H, W]."""

    files: ImageFiles
    shape: tuple[int, int, int]
    flip: bool
    seed: int | None
    epoch: int
    views: int

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.uint8] | TrainingError:
        pixels = np.empty((self.views, len(indices), *self.shape), np.uint8)
        try:
            for position, index in enumerate(indices.tolist()):
                pixels[:, position] = self._decode(index)
        except TrainingError as error:
            return error
        return pixels

    def _decode(self, index: int) -> NDArray[np.uint8]:
        file = self.files[index]
        channels, height, width = self.shape
        if self.seed is None:
            return decode_image(file, channels=channels, height=height, width=width)[None]
        draw = random.Random(derive_seed(self.seed, "augment", self.epoch, index))
        return decode_augmented(
            file, channels=channels, height=height, width=width, views=self.views, flip=self.flip, draw=draw
        )


class _Chosen:
    """Some of the files."""

    def __init__(self, files: ImageFiles, indices: Sequence[int]) -> None:
        self._files, self._indices = files, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> ImageFile:
        return self._files[self._indices[position]]


def _put(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; a GPU fetches it from pinned memory while this process goes on."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
