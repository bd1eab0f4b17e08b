"""schedule.progressive: the live stage passes through wider quantisers on its way to the final widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.units import WeightedUnit


def phase_at(epoch: int, live_epochs: int, widths: Sequence[int]) -> int:
    """Which of the equal shares of the live epochs an epoch (from 0) is in: one for each width, then the final ones."""
    return epoch * (len(widths) + 1) // live_epochs


def first_epoch(phase: int, live_epochs: int, widths: Sequence[int]) -> int:
    """The epoch with which `phase_at` enters a phase."""
    return -(-phase * live_epochs // (len(widths) + 1))


class FallingWidths:
    """Sets the widths of a prepared network's quantisers, phase by phase. What has 8 bits at the end keeps them.

    widths: bits of weights and activations in phases 0, 1, ...; none falls below its final width, which all have in
    phase len(widths). Source: progressive quantisation of Zhuang et al. 2018 (arXiv:1711.00205); equal shares are ours.
    """

    def __init__(self, network: QuantizedModel, widths: Sequence[int]) -> None:
        self.network, self.widths = network, tuple(widths)
        self._quantizers: list[nn.Module] = []
        for unit in network.units().values():
            self._quantizers += [*unit.outputs, *([unit.weight_quantizer] if isinstance(unit, WeightedUnit) else [])]
        self._final = [int(quantizer.bits) for quantizer in self._quantizers]  # type: ignore[arg-type]

    def apply(self, phase: int) -> list[nn.Module]:
        """Give every quantiser its width in this phase; returns those for which that is another one."""
        changed = []
        for quantizer, final in zip(self._quantizers, self._final, strict=True):
            bits = max(final, self.widths[phase]) if phase < len(self.widths) and final < 8 else final
            if quantizer.bits != bits:
                quantizer.bits = bits  # type: ignore[assignment]
                changed.append(quantizer)
        return changed

    @torch.no_grad()
    def enter(self, phase: int, batches: Iterable[Tensor]) -> list[nn.Parameter]:
        """Apply a phase and calibrate the quantisers that it changes; the others keep what they have learned.

        Calibrated anew, and not scaled by the old largest integer over the new one: that would keep the range, and a
        range that loses nothing at 8 bits makes a step at 2 bits that rounds nearly everything to 0.
        batches: as for calibrate. Returns the parameters that were set: momentum gathered for them is void.
        """
        changed = self.apply(phase)
        moved = {id(parameter) for quantizer in changed for parameter in quantizer.parameters()}
        learned = {id(p): p for quantizer in self._quantizers for p in quantizer.parameters()}
        kept = [(p, p.detach().clone()) for p in learned.values() if id(p) not in moved]
        calibrate(self.network, batches)
        for parameter, value in kept:
            parameter.copy_(value)
        return [p for p in learned.values() if id(p) in moved]
