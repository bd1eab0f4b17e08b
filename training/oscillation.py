"""Against weights that jump to and fro between two integers: a damping loss, and freezing those that do.

Nagel et al. 2022 (arXiv:2203.11086), "Overcoming Oscillations in Quantization-Aware Training", sec. 4. Of layers whose
weights have fewer than 8 bits alone: elsewhere a step is too small to matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.units import WeightedUnit

MOMENTUM = 0.01
"""Of the running frequency and the running integer, as in the paper's code."""


def low_bit_layers(network: QuantizedModel) -> dict[str, WeightedUnit]:
    """The layers that a switch of this page acts on, by name.

    Raises TrainingError where network.config asks for damping or freezing, and there is no such layer.
    """
    layers = {
        name: unit
        for name, unit in network.units().items()
        if isinstance(unit, WeightedUnit) and unit.weight_quantizer.bits < 8
    }
    for key in ("damping", "freezing"):
        if getattr(network.config, key) and not layers:
            raise TrainingError(
                f"quant.{key} is {getattr(network.config, key)}, but no layer has weights of fewer than 8 bits; set it "
                "to 0, or lower quant.weight_bits."
            )
    return layers


def damping_loss(layers: Mapping[str, WeightedUnit]) -> Tensor:
    """The sum over all weights of |s w_int - clip(w, s n, s p)|^2, (): how far they lie from what they are rounded to.

    s w_int and the range are held constant, so that weights are drawn to the middle of their bins, and beyond the range
    nothing is drawn. Source: the paper's dampening loss.
    """
    losses = []
    for unit in layers.values():
        quantizer, weight = unit.weight_quantizer, unit.weight
        with torch.no_grad():
            codes, step = quantizer(weight)
            scale = step.view(-1, *[1] * (weight.dim() - 1))
            centre, lower, upper = codes * scale, quantizer.lower * scale, quantizer.upper * scale
        losses.append((centre - weight.clamp(lower, upper)).square().sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def damping_weight(largest: float, fraction: float) -> float:
    """Half a cosine from 0 to `largest` over the quantised schedule, fraction 0..1: the paper's for this loss."""
    return largest * (1.0 - math.cos(math.pi * fraction)) / 2.0


class WeightFreezer:
    """Counts how often each weight's integer turns back, and holds those that do it too often.

    A weight oscillates in a step that changes its integer against the direction of its last change. The frequency of
    that is a running mean, and so is the integer. Where the frequency passes `threshold`, the integer is held at its
    running mean, rounded, for good. Held means that the latent weight is put at integer * step after every step: what
    trains, validates and is exported needs to know nothing of it. A held weight is then at the middle of its bin, where
    LSQ's gradient of the step is 0, so that a step learns from the weights that are free; in the paper's code it learns
    from both. Nothing waits for a GPU.
    Source: the paper's iterative freezing, with a constant threshold. That the running integer takes in the current one
    before it is rounded, and the projection, are ours.
    """

    def __init__(self, layers: Mapping[str, WeightedUnit], threshold: float) -> None:
        self.layers, self.threshold = dict(layers), threshold
        self._states: dict[str, dict[str, Tensor]] = {}
        for name, unit in self.layers.items():
            codes = _codes(unit)
            self._states[name] = {
                "integer": codes.to(torch.int8),
                "direction": torch.zeros_like(codes, dtype=torch.int8),
                "frequency": torch.zeros_like(codes),
                "mean": codes.clone(),
                "frozen": torch.zeros_like(codes, dtype=torch.bool),
                "held": torch.zeros_like(codes, dtype=torch.int8),
            }

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step: count, freeze, and put back what is frozen."""
        for name, unit in self.layers.items():
            state = self._states[name]
            codes, step = unit.weight_quantizer(unit.weight)
            _track(torch.where(state["frozen"], state["held"].to(codes.dtype), codes), state, self.threshold)
            middle = state["held"] * step.view(-1, *[1] * (unit.weight.dim() - 1))
            unit.weight.copy_(torch.where(state["frozen"], middle, unit.weight))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it knows, for a checkpoint: UNIT.integer and so on, each like the unit's weight."""
        return {f"{name}.{key}": tensor for name, state in self._states.items() for key, tensor in state.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])


def _codes(unit: WeightedUnit) -> Tensor:
    with torch.no_grad():
        codes: Tensor = unit.weight_quantizer(unit.weight)[0]
    return codes


def _track(codes: Tensor, state: dict[str, Tensor], threshold: float) -> None:
    turn = torch.sign(codes - state["integer"]).to(torch.int8)
    oscillated = turn * state["direction"] == -1
    state["frequency"].lerp_(oscillated.to(codes.dtype), MOMENTUM)
    state["direction"].copy_(torch.where(turn != 0, turn, state["direction"]))
    state["integer"].copy_(codes)
    state["mean"].lerp_(codes, MOMENTUM)
    new = (state["frequency"] > threshold) & ~state["frozen"]
    state["held"].copy_(torch.where(new, state["mean"].round(), state["held"]))
    state["frozen"].logical_or_(new)
