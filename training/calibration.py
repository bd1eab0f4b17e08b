"""calibrate: first step sizes, the ones that lose least in the mean square."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.quantizers import SMALLEST_STEP, ActivationQuantizer
from mecdeploy.training.units import DropoutUnit, WeightedUnit

CANDIDATES = 64


def search_steps(values: Tensor, lower: int, upper: int) -> Tensor:
    """Step per row with the least mean square error of clamp(round(x / step)) * step among CANDIDATES.

    values: [rows, n]. The candidates are even fractions of the step that clips nothing. Returns [rows], > 0; a row of
    zeros gets the step 1 / upper.
    """
    reach = torch.maximum(values.amax(1) / upper, -values.amin(1) / max(1, -lower)).clamp_min(0)
    reach = torch.where(reach > SMALLEST_STEP, reach, torch.full_like(reach, 1.0 / upper))
    best_error = torch.full_like(reach, float("inf"))
    best_step = reach.clone()
    for index in range(CANDIDATES, 0, -1):  # downwards: of equal errors, the step that clips least
        step = reach * (index / CANDIDATES)
        codes = torch.round(values / step[:, None]).clamp_(lower, upper)
        error = (codes * step[:, None] - values).square_().mean(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
    return best_step


@torch.no_grad()
def calibrate(model: QuantizedModel, batches: Iterable[Tensor]) -> None:
    """Set every step size of a prepared model: weights first, then activations as the quantised weights produce them.

    batches: uint8 [N, C, H, W]; a few hundred training images are enough. BatchNorm uses batch statistics, as QAT will,
    and its running statistics are left alone. Raises TrainingError without a batch, or for an activation not finite.
    """
    for unit in model.units().values():
        if isinstance(unit, WeightedUnit):
            weights = unit.weight_quantizer
            weights.step.copy_(search_steps(unit.weight.flatten(1), weights.lower, weights.upper))
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.samples = []
    try:
        _observe(model, batches)
        for name, unit in model.units().items():
            for output in unit.outputs:
                assert isinstance(output, ActivationQuantizer) and output.samples is not None
                _set_step(name, output, output.samples)
    finally:
        for quantizer in quantizers:
            quantizer.samples = None


def _observe(model: QuantizedModel, batches: Iterable[Tensor]) -> None:
    was_training = model.training
    norms = [u.batch_norm for u in model.units().values() if isinstance(u, WeightedUnit) and u.batch_norm is not None]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for unit in model.units().values():
        if isinstance(unit, DropoutUnit):
            unit.eval()  # a range is that of whole activations
    try:
        for norm in norms:
            norm.momentum = 0.0
        for batch in batches:
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)


def _set_step(name: str, quantizer: ActivationQuantizer, samples: list[Tensor]) -> None:
    if not samples:
        raise TrainingError("calibration got no images; give it at least one batch.")
    values = torch.cat(samples)
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(
            f"{name}: its activation is not finite on the calibration images; train the float model again with a lower "
            "schedule.fp_learning_rate."
        )
    lower, upper = -quantizer.zero_point, quantizer.qmax - quantizer.zero_point
    step = search_steps(values[None], lower, upper)[0]
    quantizer.step.copy_(step.clamp_max(quantizer.largest_step))
