"""Where a run computes, and how it stays reproducible there without leaving a trace in the process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError


def choose_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu or cuda) means on this machine.

    Raises TrainingError for cuda where torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU here"
        raise TrainingError(f"device is cuda, but {built}. Use device auto or cpu.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside, the global generators may be reseeded and, on a CPU, algorithms are deterministic; all is put back after.

    On a CPU that costs nothing measurable. On a GPU it would (and asks for an environment variable that must be set
    before torch starts), so the setting is left alone there.
    """
    was, warned_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic  # its one setting is a property that type checkers cannot see
    filled = settings.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if device.type == "cpu":
                torch.use_deterministic_algorithms(True)
                settings.fill_uninitialized_memory = False
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warned_only)
            settings.fill_uninitialized_memory = filled


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device in channels_last, the layout in which both CPUs and GPUs convolve faster.

    Tensors of other ranks than a convolution's 4 keep their layout (Module.to refuses those of rank 5).
    """
    model = model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def channels_last(images: Tensor, device: torch.device) -> Tensor:
    """[m, C, H, W] on the device, laid out as `place` lays out the network."""
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


class Readback:
    """Numbers () on their way from the device of the first: started after the forward pass, read before the update.

    On a GPU the copy waits for the forward pass alone, so the backward pass is queued meanwhile and nothing stalls.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        device = numbers[0].device
        stacked = torch.stack([number.detach().to(device, torch.float64, non_blocking=True) for number in numbers])
        self._event: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = stacked

    def values(self) -> list[float]:
        """The numbers, waiting for them if need be."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]
