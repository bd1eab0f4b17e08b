"""Images out of tar shards, one positioned read each, and the order that keeps these reads together."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecdeploy.training.data.decode import EncodedImage
from mecdeploy.training.data.shards_content import BLOCK, member_name
from mecdeploy.training.data.shards_index import Shard, ShardIndex
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.seeding import derive_seed

SHARDS_TOGETHER = 16  # images are shuffled among so many shards
_OPEN = 4 * SHARDS_TOGETHER  # files a process keeps open; a batch may reach into the next shards


class ShardFiles:
    """The images of an index, as ImageFiles. It pickles as the index does."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._open = lru_cache(_OPEN)(self._open_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._index,)

    def __len__(self) -> int:
        return len(self._index.blocks)

    def __getitem__(self, image: int) -> EncodedImage:
        """See ImageFiles; TrainingError if the shard is gone, or is not what was indexed."""
        block, size = int(self._index.blocks[image]), int(self._index.sizes[image])
        shard = int(np.searchsorted(self._index.ends, image, side="right"))
        data = self._open(shard).read(size, block * BLOCK)
        if len(data) < size:
            raise TrainingError(f"{self.name(image)!r} ends after {len(data)} of {size} bytes; has its shard changed?")
        return EncodedImage(data, partial(self.name, image))

    def name(self, image: int) -> str:
        """SHARD/MEMBER, for messages: found by walking through the shard."""
        shard = self._index.shards[int(np.searchsorted(self._index.ends, image, side="right"))]
        return member_name(self._index.folder / shard.name, int(self._index.blocks[image]))

    def _open_shard(self, number: int) -> _OpenShard:
        shard = self._index.shards[number]
        path = self._index.folder / shard.name
        try:
            opened = _OpenShard(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise TrainingError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
        status = os.fstat(opened.handle)
        if Shard(shard.name, status.st_size, status.st_mtime_ns, shard.count) != shard:
            raise TrainingError(
                f"{str(path)!r} has changed since it was indexed; leave shards alone during a run, and start again: "
                f"then it is indexed anew."
            )
        return opened


class _OpenShard:
    """A file that is closed once nobody reads it: another thread may be reading when the cache lets go of it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)

    def read(self, size: int, start: int) -> bytes:
        """`size` bytes, or fewer at the end; no position is kept, so that threads and forks can share the file."""
        return os.pread(self.handle, size, start)


class ShardOrder:
    """Image indices in the order of one epoch, as an Order, made as they are asked for.

    Without a seed: 0, 1, ... With one, shards are shuffled, cut into groups of `together`, and images are shuffled
    within a group, all by (seed, epoch). So a stretch of the order reads from a few shards, and no more than a group is
    ever held.
    ends: int64 [shards], how many images lie in this shard and those before it.
    """

    def __init__(self, ends: NDArray[np.int64], seed: int | None, epoch: int, together: int = SHARDS_TOGETHER) -> None:
        self._seed, self._epoch, self._together = seed, epoch, together
        self._group: tuple[int, Tensor] | None = None
        if seed is None:
            return
        generator = torch.Generator().manual_seed(derive_seed(seed, "shards", epoch))
        shuffled = torch.randperm(len(ends), generator=generator).numpy()
        starts = np.concatenate([[0], ends[:-1]])
        self._starts, self._ends = starts[shuffled], ends[shuffled]
        counts = np.add.reduceat(self._ends - self._starts, np.arange(0, len(ends), together))
        self._group_ends = np.cumsum(counts)

    def __getitem__(self, run: slice, /) -> Tensor:
        """See Order."""
        if self._seed is None:
            return torch.arange(run.start, run.stop)
        parts, position = [torch.zeros(0, dtype=torch.int64)], run.start
        while position < run.stop:
            number = int(np.searchsorted(self._group_ends, position, side="right"))
            images = self._images(number)
            first = int(self._group_ends[number]) - len(images)
            end = min(run.stop, int(self._group_ends[number]))
            parts.append(images[position - first : end - first])
            position = end
        return torch.cat(parts)

    def _images(self, number: int) -> Tensor:
        """The images of a group, shuffled."""
        if self._group is None or self._group[0] != number:
            mine = slice(number * self._together, (number + 1) * self._together)
            ranges = [np.arange(a, b) for a, b in zip(self._starts[mine], self._ends[mine], strict=True)]
            images = torch.from_numpy(np.concatenate(ranges))
            assert self._seed is not None
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "group", self._epoch, number))
            self._group = number, images[torch.randperm(len(images), generator=generator)]
        return self._group[1]
