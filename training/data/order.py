"""Which image comes when: pure functions of (seed, epoch), and splits that never move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.seeding import derive_seed


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process gets: the index-th of `count` equal runs of its images.

    The batch as a whole, its order and its augmentation do not depend on how many share it.
    """

    index: int = 0
    count: int = 1

    def bounds(self, size: int) -> tuple[int, int]:
        """First and end of this share in a batch of `size` images; sizes of shares are within one image."""
        return self.index * size // self.count, (self.index + 1) * size // self.count


WHOLE = Share()


def epoch_order(count: int, seed: int | None, epoch: int) -> Tensor:
    """Image indices in the order of one epoch, int64 [count]: 0, 1, ... without a seed, else shuffled by both."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator)


def step_count(count: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Batches in an epoch. drop_last leaves out a smaller last batch, unless it is the only one."""
    whole, rest = divmod(count, batch_size)
    return whole + (1 if rest and not (drop_last and whole) else 0)


def step_bounds(count: int, batch_size: int, *, start_step: int, drop_last: bool) -> Iterator[tuple[int, int, int]]:
    """(step, first, end) of each batch from start_step on; the batch is order[first:end]."""
    for step in range(start_step, step_count(count, batch_size, drop_last=drop_last)):
        yield step, step * batch_size, min((step + 1) * batch_size, count)


def check_request(batch_size: int, seed: int | None, start_step: int, augment: bool, views: int) -> None:
    """ValueError for a request for batches that makes no sense."""
    for name, value, minimum in (("batch_size", batch_size, 1), ("start_step", start_step, 0), ("views", views, 1)):
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    if augment and seed is None:
        raise ValueError("augment needs a seed")


def stratified_split(labels: Sequence[int], keys: Sequence[int | str], held_out: int) -> tuple[list[int], list[int]]:
    """Indices of the images that stay and of those held out, each ascending; every class gives its share.

    keys: what an image is known by, index or path. Which images of a class are held out follows from the hashes of
    their keys alone: no run's seed and no library's random stream can move them, and a new image moves few others.
    held_out: how many in all. Shares are rounded by largest remainder (ties: the smaller class index), then kept such
    that a class of two or more images has one on each side; a class of one image stays whole.
    """
    members = _members(labels)
    shares = {label: held_out * len(group) / len(labels) for label, group in members.items()}
    counts = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(members, key=lambda label: counts[label] - shares[label])
    for label in by_remainder[: held_out - sum(counts.values())]:
        counts[label] += 1
    chosen: set[int] = set()
    for label, group in members.items():
        count = min(max(counts[label], 1), len(group) - 1)
        chosen.update(_ranked("held out", group, keys)[:count])
    return [i for i in range(len(labels)) if i not in chosen], sorted(chosen)


def stratified_fraction(
    labels: Sequence[int], keys: Sequence[int | str], fraction: float, class_names: Sequence[str]
) -> list[int]:
    """Indices of `fraction` of the images of every class, ascending: round(fraction * n) of n, halves up.

    labels: all -1 where they are not to be looked at. keys: as in `stratified_split`; the hashes are others.
    A smaller fraction lies within a larger one.
    TrainingError for a class that no image is left of.
    """
    chosen: list[int] = []
    members = _members(labels)
    for label, group in members.items():
        count = int(fraction * len(group) + 0.5)
        if not count:
            of = f"class {class_names[label]!r}" if label >= 0 else "the data set"
            least = 0.5 / min(map(len, members.values()))
            digits = 2 - math.floor(math.log10(least))
            raise TrainingError(
                f"data.fraction is {fraction}, which leaves {of} none of its {len(group)} training images; "
                f"make it at least {math.ceil(least * 10**digits) / 10**digits:.3g}."  # up: down would be too little
            )
        chosen += _ranked("fraction", group, keys)[:count]
    return sorted(chosen)


def _members(labels: Sequence[int]) -> dict[int, list[int]]:
    """Class index -> its images, ascending; classes ascending, too."""
    members: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        members[label].append(index)
    return members


def _ranked(purpose: str, group: Sequence[int], keys: Sequence[int | str]) -> list[int]:
    """The images in the order of the hashes of their keys."""
    return sorted(group, key=lambda index: (derive_seed(purpose, keys[index]), index))
