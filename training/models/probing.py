"""Which images a network can take, found by trying: one forward pass of zeros says it before minutes of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

_SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 512)
"""Sides, in pixels, that networks are commonly made for: one that takes none of them does not fail for the size."""


@torch.no_grad()
def forward_shapes_only(model: nn.Module, shape: tuple[int, int, int, int]) -> Tensor:
    """The network's output for images [N, C, H, W] on the meta device: a shape without numbers, without its cost."""
    meta = {name: tensor.to("meta") for name, tensor in _tensors(model).items()}
    output: Tensor = functional_call(model.eval(), meta, (torch.empty(shape, device="meta"),))
    model.train()
    return output


def smallest_side(takes: Callable[[int], bool], above: int) -> int | None:
    """The smallest side in pixels, larger than `above`, of square images that `takes` says the network can take.

    Exact for networks that take every size from some on (those with a fixed number of halvings), else a size that
    works. None where no common size works.
    """
    low, high = above, next((side for side in _SIDES if side > above and takes(side)), None)
    while high is not None and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(middle) else (middle, high)
    return high


def succeeds(attempt: Callable[[], object]) -> bool:
    """Whether `attempt` raises nothing."""
    try:
        attempt()
    except Exception:
        return False
    return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
