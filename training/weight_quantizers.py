"""The modules that make codes of a weight, by the rule that they follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mecdeploy.training.lsq import clamp_scaling_gradient, quantize, round_through
from mecdeploy.training.quantizers import SMALLEST_STEP

DOREFA_BITS = (2, 3, 4)
"""Widths whose odd codes fit an int8."""


class WeightQuantizer(nn.Module):
    """Per-output-channel learned step size of a weight [O, ...]: symmetric, zero_point 0, codes -2^(b-1)..2^(b-1)-1.

    three_sigma: whether calibration takes `three_sigma_steps`, else the steps that lose least in the mean square.
    """

    def __init__(self, bits: int, channels: int, *, three_sigma: bool = False) -> None:
        super().__init__()
        self.bits, self.three_sigma = bits, three_sigma
        self.step = nn.Parameter(torch.ones(channels))

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def upper(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> Tensor | None:
        """int8 [n], ascending: what codes can be; None for lower..upper."""
        return None

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and step [O]."""
        factor = (weight[0].numel() * self.upper) ** -0.5
        step = clamp_scaling_gradient(self.step, SMALLEST_STEP, float("inf"), factor)
        return quantize(weight, step.view(-1, *[1] * (weight.dim() - 1)), self.lower, self.upper), step


class DorefaWeightQuantizer(nn.Module):
    """DoReFa's 2^bits evenly spaced levels without zero, of a weight [O, ...]; nothing is learned.

    Source: Zhou et al. 2016 (arXiv:1606.06160), eq. 9. bits: one of DOREFA_BITS.
    """

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.bits, self.channels = bits, channels

    @property
    def levels(self) -> Tensor:
        """int8 [2^bits], ascending: the odd integers of at most 2^bits - 1."""
        largest = (1 << self.bits) - 1
        return torch.arange(-largest, largest + 1, 2, dtype=torch.int8)

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and step [O], the same for every channel."""
        codes, step = dorefa_codes(weight, self.bits)
        return codes, step.expand(self.channels)


def dorefa_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Odd codes of a whole weight, [O, ...] float32, and their step, ().

    With n = 2^bits - 1, w' = tanh(w) / M and M = max |tanh(w)|, eq. 9 of DoReFa (arXiv:1606.06160) is
    2 * round(n * (w' / 2 + 1 / 2)) / n - 1: its numerator is the code, from -n to n. Rounds half to even, so that a
    weight of 0 has the code 1. Ours is the step M / n where the paper's is 1 / n: a trained network so starts with the
    weights that it has, about tanh(w). Gradients are straight-through: d (codes * step) / d w = 1 - tanh(w)^2.
    M is taken as constant. Otherwise the largest weight would get, on top of its own gradient, the sum of everybody's
    times code / n - w': a step size's, without the scale by the number of weights that LSQ found it to need.
    """
    largest = (1 << bits) - 1
    squashed = torch.tanh(weight)
    reach = squashed.detach().abs().amax().clamp_min(SMALLEST_STEP)
    positions = round_through((squashed / reach + 1.0) * (largest / 2))
    return 2.0 * positions - largest, reach / largest


def three_sigma_steps(weight: Tensor, bits: int) -> Tensor:
    """LSQ+'s first steps of a weight [O, n]: max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1) per row, [O], > 0.

    sigma is the population's. A row of zeros gets the step 1 / (2^(bits - 1) - 1), as calibration's search gives it.
    Source: Bhalgat et al. 2020 (arXiv:2004.09576), sec. 3, there once a layer.
    """
    mean, sigma = weight.mean(1), weight.std(1, correction=0)
    reach = torch.maximum((mean - 3.0 * sigma).abs(), (mean + 3.0 * sigma).abs())
    steps = reach / (1 << (bits - 1))
    return torch.where(reach > SMALLEST_STEP, steps, 1.0 / ((1 << (bits - 1)) - 1))


AnyWeightQuantizer = WeightQuantizer | DorefaWeightQuantizer


def _dorefa(bits: int, channels: int) -> AnyWeightQuantizer:
    """At 8 bits LSQ: these are the first and last layer, which the papers leave alone, and odd codes are no int8."""
    return (DorefaWeightQuantizer if bits in DOREFA_BITS else WeightQuantizer)(bits, channels)


RULES: Mapping[str, Callable[[int, int], AnyWeightQuantizer]] = MappingProxyType(
    {"lsq": WeightQuantizer, "lsq+": partial(WeightQuantizer, three_sigma=True), "dorefa": _dorefa}
)
"""Rule -> quantiser of its bits and output channels."""


def make_weight_quantizer(bits: int, channels: int, rule: str = "lsq") -> AnyWeightQuantizer:
    """The quantiser of a weight [channels, ...] at this width, its steps yet to be found; rule: a key of RULES."""
    return RULES[rule](bits, channels)
