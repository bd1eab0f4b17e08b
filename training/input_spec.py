"""The raw uint8 input, and what its normalisation means in reals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.quantizers import QTensor


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The raw uint8 input, [N, channels, height, width].

    The full-precision network reads (pixel - mean) / std; the quantised one (pixel - pixel_zero_point) * pixel_scale,
    one scale and zero point for all channels. mean, std: per channel, in pixel units 0..255; empty where the
    normalisation is that one scale and zero point. Where they are given, `prepare` folds the difference into the first
    convolutions (docs/decisions.md says how exactly).
    """

    channels: int
    height: int
    width: int
    pixel_scale: float
    pixel_zero_point: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, key))
            if len(values) not in (0, self.channels):
                raise TrainingError(f"{key} has {len(values)} values for {self.channels} channels; give one for each.")
            object.__setattr__(self, key, values)
        if bool(self.mean) != bool(self.std):
            raise TrainingError("mean and std of the input go together; give both or neither.")
        if any(not value > 0 for value in self.std):
            raise TrainingError(f"std of the input is {list(self.std)}; every value must be positive.")

    @classmethod
    def from_statistics(cls, *, channels: int, height: int, width: int, mean: float, std: float) -> InputSpec:
        """Normalise by a data set's scalar mean and standard deviation, in pixel units 0..255; the mean is rounded."""
        scale = float(torch.tensor(1.0 / max(std, 1.0), dtype=torch.float32))
        zero_point = min(255, max(0, round(mean)))
        return cls(channels=channels, height=height, width=width, pixel_scale=scale, pixel_zero_point=zero_point)

    @classmethod
    def from_channels(cls, *, height: int, width: int, mean: Sequence[float], std: Sequence[float]) -> InputSpec:
        """Normalise channel by channel, in pixel units 0..255, as pretrained networks do.

        All values alike: the same as from_statistics, but for the rounding of the mean. Raises TrainingError.
        """
        if not mean or len(mean) != len(std):
            raise TrainingError(f"mean has {len(mean)} values and std {len(std)}; give both one for each channel.")
        shared = cls.from_statistics(
            channels=len(mean), height=height, width=width, mean=sum(mean) / len(mean), std=sum(std) / len(std)
        )
        return cls(
            channels=len(mean),
            height=height,
            width=width,
            pixel_scale=shared.pixel_scale,
            pixel_zero_point=shared.pixel_zero_point,
            mean=tuple(mean),
            std=tuple(std),
        )

    def for_images(self, *, channels: int, height: int, width: int) -> InputSpec:
        """The same normalisation for other images; where the number of channels differs, its mean over the channels."""
        if not self.mean or channels == self.channels:
            return replace(self, channels=channels, height=height, width=width)
        mean, std = (sum(values) / self.channels for values in (self.mean, self.std))
        return InputSpec.from_channels(height=height, width=width, mean=[mean] * channels, std=[std] * channels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to the float32 input of the full-precision network."""
        if not self.mean:
            return (pixels.float() - self.pixel_zero_point) * self.pixel_scale
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() - mean) / std

    def quantized(self, pixels: Tensor) -> QTensor:
        """The same input as codes and a scale."""
        scale = torch.tensor(self.pixel_scale, dtype=torch.float32, device=pixels.device)
        return QTensor(pixels.float() - self.pixel_zero_point, scale, self.pixel_zero_point, 255)
