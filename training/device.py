"""Where a run computes, and how it stays reproducible there without leaving a trace in the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.launch import Launch


def choose_device(name: str, launch: Launch = Launch()) -> torch.device:  # noqa: B008 (frozen)
    """The device that `name` (auto, cpu or cuda) means on this machine; each of several processes has its own GPU.

    Raises TrainingError for cuda where torch sees no GPU, and for more processes on a machine than it has GPUs.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU here"
        raise TrainingError(f"device is cuda, but {built}. Use device auto or cpu.")
    if not available or name == "cpu":
        return torch.device("cpu")
    if launch.size == 1:
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    if launch.local_size > gpus:
        raise TrainingError(
            f"torchrun started {launch.local_size} processes on this machine, but torch sees {gpus} GPUs; "
            "lower --nproc-per-node, or use device cpu."
        )
    return torch.device("cuda", launch.local_rank)


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


def stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers () from any device as float64 [n] on that of the first, without their graph."""
    device = numbers[0].device
    return torch.stack([number.detach().to(device, torch.float64, non_blocking=True) for number in numbers])


class Readback:
    """Numbers [n] on their way from the device: started after the forward pass, read before the update.

    reduce: what is done with them on the way, such as adding up those of all processes.
    On a GPU the copy waits for the forward pass alone, so the backward pass is queued meanwhile and nothing stalls.
    """

    def __init__(self, numbers: Tensor, reduce: Callable[[Tensor], Tensor] = lambda numbers: numbers) -> None:
        values = reduce(numbers)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = values

    def values(self) -> list[float]:
        """The numbers, waiting for them if need be."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]
