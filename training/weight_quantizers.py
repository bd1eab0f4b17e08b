"""The module that holds the learned step sizes of a weight, by the rule that maps weights to codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mecdeploy.training.lsq import clamp_scaling_gradient, quantize
from mecdeploy.training.quantizers import SMALLEST_STEP


class WeightQuantizer(nn.Module):
    """Per-output-channel learned step size of a weight [O, ...]: symmetric, zero_point 0, codes -2^(b-1)..2^(b-1)-1."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones(channels))

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def upper(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and step [O]."""
        factor = (weight[0].numel() * self.upper) ** -0.5
        step = clamp_scaling_gradient(self.step, SMALLEST_STEP, float("inf"), factor)
        return quantize(weight, step.view(-1, *[1] * (weight.dim() - 1)), self.lower, self.upper), step


RULES: Mapping[str, Callable[[int, int], WeightQuantizer]] = MappingProxyType({"lsq": WeightQuantizer})
"""Rule -> quantiser of its bits and output channels."""


def make_weight_quantizer(bits: int, channels: int, rule: str = "lsq") -> WeightQuantizer:
    """The quantiser of a weight [channels, ...] at this width, its steps yet to be found; rule: a key of RULES."""
    return RULES[rule](bits, channels)
