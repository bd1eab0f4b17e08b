"""Weight quantisers on other grids than the plain signed range (docs/weight-grids.md), and which layer has which.

The kernels are int8 whatever the storage: any table of int8 levels costs the bits of its indices alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecdeploy.training.lsq import clamp_scaling_gradient
from mecdeploy.training.odd_grid import quantize_odd, search_odd_steps
from mecdeploy.training.quantizers import SMALLEST_STEP
from mecdeploy.training.weight_quantizers import AnyWeightQuantizer, WeightQuantizer, make_weight_quantizer


class MidriseWeightQuantizer(WeightQuantizer):
    """Odd codes of a weight [O, ...] with a learned step for each output channel: `quantize_odd`."""

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -self.upper

    @property
    def upper(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def levels(self) -> Tensor:
        """int8 [2^bits], ascending: what codes can be."""
        return torch.arange(self.lower, self.upper + 1, 2, dtype=torch.int8)

    def fit(self, weight: Tensor) -> None:
        """Set the steps that lose least of a weight [O, ...]."""
        self.step.copy_(search_odd_steps(weight.flatten(1), self.bits))

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and step [O]."""
        factor = (weight[0].numel() * self.upper) ** -0.5
        step = clamp_scaling_gradient(self.step, SMALLEST_STEP, float("inf"), factor)
        return quantize_odd(weight, step.view(-1, *[1] * (weight.dim() - 1)), self.bits), step


class TernaryWeightQuantizer(WeightQuantizer):
    """Codes -1, 0 and 1 of a weight [O, ...]: LSQ with these bounds."""

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -1

    @property
    def levels(self) -> Tensor:
        """int8 [3]: what codes can be."""
        return torch.tensor([-1, 0, 1], dtype=torch.int8)


def choose_weight_quantizer(weight: Tensor, bits: int, grid: str, rule: str = "lsq") -> AnyWeightQuantizer:
    """The quantiser of a layer's weight [O, ...] on a grid of WEIGHT_GRIDS, its steps yet to be found.

    rule: of the uniform grid. A grid that has no form at this width leaves the layer uniform: all of them at 8 bits,
    ternary at any but 2. The plain range of 1 bit would be -1 and 0: there every uniform layer is mid-rise.
    """
    channels = weight.shape[0]
    if bits == 1 or (grid == "midrise" and bits < 8):
        return MidriseWeightQuantizer(bits, channels)
    if grid == "ternary" and bits == 2:
        return TernaryWeightQuantizer(bits, channels)
    return make_weight_quantizer(bits, channels, rule)
