"""Windows of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Sides = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A convolution's or pool's window: (height, width) pairs; padding: (top, left, bottom, right)."""

    stride: tuple[int, int]
    padding: Sides
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def symmetric_padding(self) -> tuple[int, int] | None:
        """(height, width) where opposite sides agree, else None."""
        top, left, bottom, right = self.padding
        return (top, left) if (top, left) == (bottom, right) else None

    @property
    def pad_argument(self) -> tuple[int, int, int, int]:
        """The padding in the order in which torch's pad takes it: left, right, top, bottom."""
        top, left, bottom, right = self.padding
        return (left, right, top, bottom)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Torch's scalar, list of one or pair as a (height, width) pair."""
    if isinstance(value, int):
        return (value, value)
    values = [int(item) for item in value]
    return (values[0], values[-1])


def sides(padding: int | Sequence[int]) -> Sides:
    """Torch's scalar-or-pair padding on all four sides."""
    height, width = pair(padding)
    return (height, width, height, width)


def same_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> Sides:
    """What padding="same" adds: the surplus of an even kernel goes to the bottom and the right, as in PyTorch."""
    totals = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
    before = [total // 2 for total in totals]
    return (before[0], before[1], totals[0] - before[0], totals[1] - before[1])
