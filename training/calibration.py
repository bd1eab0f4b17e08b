"""calibrate: first step sizes, the ones that lose least in the mean square."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.movement import DropoutUnit
from mecdeploy.training.quantizers import SMALLEST_STEP, ActivationQuantizer
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_grids import MidriseWeightQuantizer, TableWeightQuantizer
from mecdeploy.training.weight_quantizers import WeightQuantizer, three_sigma_steps

CANDIDATES = 64

ELEMENTS_AT_ONCE = 1 << 20
"""Of weights whose steps are searched together: what stays in a processor's cache is searched ten times as fast."""


def search_steps(values: Tensor, lower: int, upper: int) -> Tensor:
    """Step per row with the least mean square error of clamp(round(x / step)) * step among CANDIDATES.

    values: [rows, n]. The candidates are even fractions of the step that clips nothing. Returns [rows], > 0; a row of
    zeros gets the step 1 / upper.
    """
    rows = max(1, ELEMENTS_AT_ONCE // max(1, values.shape[1]))
    return torch.cat([_search_steps(part, lower, upper) for part in torch.split(values.detach(), rows)])


def _search_steps(values: Tensor, lower: int, upper: int) -> Tensor:
    reach = torch.maximum(values.amax(1) / upper, -values.amin(1) / max(1, -lower)).clamp_min(0)
    reach = torch.where(reach > SMALLEST_STEP, reach, torch.full_like(reach, 1.0 / upper))
    best_error = torch.full_like(reach, float("inf"))
    best_step = reach.clone()
    errors = torch.empty_like(values)
    for index in range(CANDIDATES, 0, -1):  # downwards: of equal errors, the step that clips least
        step = reach * (index / CANDIDATES)
        torch.div(values, step[:, None], out=errors)
        errors.round_().clamp_(lower, upper).mul_(step[:, None]).sub_(values).square_()
        error = errors.mean(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
    return best_step


def search_step_and_zero(values: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Step and zero point, both (), with the least mean square error among CANDIDATES ranges of codes 0..qmax.

    values: [n]. The candidates are even fractions of the range from the smallest (at most 0) to the largest value.
    """
    low, high = values.amin().clamp_max(0.0), values.amax().clamp_min(0.0)
    if not bool(high - low > SMALLEST_STEP):
        return torch.full_like(low, 1.0 / qmax), torch.zeros_like(low)
    best = (float("inf"), low, high)
    for index in range(CANDIDATES, 0, -1):
        step = (high - low) * (index / CANDIDATES) / qmax
        zero = torch.round(-low * (index / CANDIDATES) / step)
        codes = torch.clamp(torch.round(values / step), -zero, qmax - zero)
        error = float((codes * step - values).square_().mean())
        if error < best[0]:
            best = (error, step, zero)
    return best[1], best[2]


@torch.no_grad()
def set_weight_steps(unit: WeightedUnit) -> None:
    """First step sizes of a unit's weight, where it learns any: LSQ+'s own, or those that search_steps finds."""
    quantizer, weight = unit.weight_quantizer, unit.weight.flatten(1)
    if not isinstance(quantizer, WeightQuantizer):
        return
    if isinstance(quantizer, MidriseWeightQuantizer | TableWeightQuantizer):
        quantizer.fit(unit.weight)
    elif quantizer.three_sigma:
        quantizer.step.copy_(three_sigma_steps(weight, quantizer.bits))
    else:
        quantizer.step.copy_(search_steps(weight, quantizer.lower, quantizer.upper))


@torch.no_grad()
def calibrate(model: QuantizedModel, batches: Iterable[Tensor]) -> None:
    """Set every step size of a prepared model: weights first, then activations as the quantised weights produce them.

    batches: uint8 [N, C, H, W]; a few hundred training images are enough. BatchNorm uses batch statistics, as QAT will,
    and its running statistics are left alone. Raises TrainingError without a batch, or for an activation not finite.
    """
    for unit in model.units().values():
        if isinstance(unit, WeightedUnit):
            set_weight_steps(unit)
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.samples = []
    try:
        _observe(model, batches)
        for name, outputs in _by_step(model).items():
            _set_step(name, outputs)
    finally:
        for quantizer in quantizers:
            quantizer.samples = None


def _by_step(model: QuantizedModel) -> dict[str, list[ActivationQuantizer]]:
    """Quantisers that share a step together, under the name of the first unit that has one."""
    names: dict[nn.Parameter, str] = {}
    groups: dict[str, list[ActivationQuantizer]] = {}
    for name, unit in model.units().items():
        for index, output in enumerate(unit.outputs):
            assert isinstance(output, ActivationQuantizer)
            key = names.setdefault(output.step, name if index == 0 else unit.output_names[index])
            groups.setdefault(key, []).append(output)
    return groups


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


def _set_step(name: str, quantizers: list[ActivationQuantizer]) -> None:
    samples = [sample for quantizer in quantizers for sample in quantizer.samples or ()]
    if not samples:
        raise TrainingError("calibration got no images; give it at least one batch.")
    values = torch.cat(samples)
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(
            f"{name}: its activation is not finite on the calibration images; train the float model again with a lower "
            "schedule.fp_learning_rate."
        )
    quantizer = quantizers[0]
    if quantizer.offset is not None:
        step, zero = search_step_and_zero(values, quantizer.qmax)
        quantizer.offset.copy_(zero * step)
    else:
        step = search_steps(values[None], -quantizer.zero_point, quantizer.qmax - quantizer.zero_point)[0]
    quantizer.step.copy_(step.clamp_max(quantizer.largest_step))
