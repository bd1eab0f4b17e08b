"""The order of shards: every image once, near each other in the files, and cheap to enter anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mecdeploy.training.data.shards_reading import SHARDS_TOGETHER, ShardOrder

COUNTS = [5, 0, 9, 1, 7, 7, 3, 12, 2, 6, 4]
ENDS = np.cumsum(COUNTS)
TOTAL = int(ENDS[-1])
SHARD_OF = [shard for shard, count in enumerate(COUNTS) for _ in range(count)]


def whole(seed: int | None, epoch: int, together: int = 3) -> list[int]:
    return ShardOrder(ENDS, seed, epoch, together)[0:TOTAL].tolist()


def test_without_a_seed_images_come_in_order() -> None:
    assert whole(None, 4) == list(range(TOTAL))
    assert ShardOrder(ENDS, None, 0)[7:11].tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize("together", [1, 2, 3, 11, 16])
def test_every_image_once_whatever_the_epoch(together: int) -> None:
    orders = [whole(seed, epoch, together) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(TOTAL)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert orders[0] == whole(0, 0, together)


def test_any_run_is_a_piece_of_the_whole() -> None:
    order = whole(3, 1)
    for first in range(TOTAL):
        for end in range(first, TOTAL + 1):
            run = ShardOrder(ENDS, 3, 1, 3)[first:end]
            assert run.dtype == torch.int64 and run.tolist() == order[first:end]


def test_images_are_shuffled_among_the_shards_of_a_group_and_no_others() -> None:
    order = whole(3, 1)
    position, groups = 0, []
    while position < TOTAL:  # the witness: a group ends where the first shard comes that was in none before
        group: set[int] = set()
        size = 0
        while position + size < TOTAL and (not group or size < sum(COUNTS[shard] for shard in group)):
            group.add(SHARD_OF[order[position + size]])
            size += 1
        assert len(group) <= 3 and size == sum(COUNTS[shard] for shard in group)
        groups.append(group)
        position += size
    assert sorted(shard for group in groups for shard in group) == [i for i, count in enumerate(COUNTS) if count]
    shards = [SHARD_OF[image] for image in order]
    assert sum(a != b for a, b in zip(shards, shards[1:], strict=False)) > 2 * len(COUNTS)  # not one after the other


def test_a_hundred_million_images_take_memory_for_one_group_only() -> None:
    ends = np.arange(1, 10_001) * 10_000
    order = ShardOrder(ends, 0, 0)
    held = 0
    for first in (0, 49_999_900, 99_999_800):
        run = order[first : first + 200]
        assert len(set(run.tolist())) == 200 and int(run.min()) >= 0 and int(run.max()) < 100_000_000
        assert order._group is not None
        held = max(held, order._group[1].nbytes)
    assert held == 8 * 10_000 * SHARDS_TOGETHER
