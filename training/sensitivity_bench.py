"""A network at 8 bits in which one width at a time is changed, measured on held-out images, and put back.

Everything is post-training quantisation in the deployed arithmetic: step sizes by calibration, nothing trained.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.bit_allocation import packed_size
from mecdeploy.training.calibration import calibrate, set_weight_steps
from mecdeploy.training.config import BIT_WIDTHS, QuantConfig, TrainConfig
from mecdeploy.training.data import Batch, ImageSource
from mecdeploy.training.device import channels_last, place
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.evaluate import BATCH_SIZE
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.seeding import derive_seed
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_grids import choose_weight_quantizer
from mecdeploy.training.weight_quantizers import AnyWeightQuantizer

WIDEST = max(BIT_WIDTHS)
NARROWER = tuple(bits for bits in BIT_WIDTHS if bits != WIDEST)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over the measured images: cross entropy in nats, accuracy 0..1."""

    cross_entropy: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """Quantised less baseline, image by image: means, and the standard errors of these means."""

    cross_entropy: float
    cross_entropy_error: float
    accuracy: float
    accuracy_error: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What is lost when one thing alone has fewer than 8 bits: bits -> change.

    name: a weighted unit, or the unit whose output is read at fewer bits. weights: how many; 0 for an activation.
    """

    name: str
    weights: int
    changes: Mapping[int, Change]


@dataclass(frozen=True, kw_only=True)
class NetworkScore:
    """A whole network, calibrated at its own weight bits, activations at 8. size: bytes of packed weights."""

    name: str
    bits: Mapping[str, int]
    size: int
    score: Score
    change: Change


@dataclass(frozen=True)
class HeldOut:
    """Training images in two parts that share none: uint8 batches to calibrate with, and batches to measure on."""

    calibration: Sequence[Tensor]
    measured: Sequence[Batch]


@dataclass(frozen=True)
class _Outcome:
    """One network on the measured images: cross entropy and correctness (0 or 1) of each, float64 [n]."""

    losses: Tensor
    correct: Tensor

    def score(self) -> Score:
        return Score(cross_entropy=float(self.losses.mean()), accuracy=float(self.correct.mean()))

    def less(self, baseline: _Outcome) -> Change:
        losses, correct = self.losses - baseline.losses, self.correct - baseline.correct
        return Change(
            cross_entropy=float(losses.mean()),
            cross_entropy_error=_standard_error(losses),
            accuracy=float(correct.mean()),
            accuracy_error=_standard_error(correct),
        )


def hold_out(source: ImageSource, config: TrainConfig, images: int, device: torch.device) -> HeldOut:
    """Draw calibration images (config.schedule.calibration_images, at most half) and then at most `images` others."""
    if images < 2 or len(source) < 4:
        raise TrainingError(
            f"a sensitivity needs 2 images to measure on and 2 to calibrate with; {images} were asked for, and "
            f"{config.data.name} has {len(source)} training images."
        )
    left = max(2, min(config.schedule.calibration_images, len(source) // 2))
    calibration: list[Tensor] = []
    measured: list[Batch] = []
    for batch in source.batches(BATCH_SIZE, device=device, seed=derive_seed(config.seed, "sensitivity")):
        pixels = channels_last(batch.images[0], device)
        if left:
            calibration.append(pixels[:left])
        taken = min(left, len(pixels))
        left, further = left - taken, Batch((pixels[taken:][:images],), batch.labels[taken:][:images])
        if len(further.labels):
            measured.append(further)
            images -= len(further.labels)
        if not images:
            break
    return HeldOut(calibration, measured)


@torch.no_grad()
def fold_batch_norm(model: QuantizedModel) -> QuantizedModel:
    """Fold each BatchNorm's running statistics into its unit's weight and bias; returns the model, changed.

    What is deployed stays: gain = gamma / sigma scales the weight's rows and so the step sizes found for them, and
    leaves their codes. But calibration, which runs BatchNorm on batch statistics, now sees the activations that are
    deployed.
    """
    for unit in weighted_units(model).values():
        norm = unit.batch_norm
        if norm is None:
            continue
        assert norm.running_mean is not None and norm.running_var is not None
        gain = norm.weight.abs() / torch.sqrt(norm.running_var + norm.eps)
        bias = torch.zeros_like(gain) if unit.bias is None else unit.bias
        unit.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * gain)
        unit.weight.mul_(gain.view(-1, *[1] * (unit.weight.dim() - 1)))
        unit.batch_norm = None
    return model


def weighted_units(model: QuantizedModel) -> dict[str, WeightedUnit]:
    """The units that have weights, by name, in execution order."""
    return {name: unit for name, unit in model.units().items() if isinstance(unit, WeightedUnit)}


def all_at(quant: QuantConfig, bits: int) -> QuantConfig:
    """The settings with layers, and what they read, at one width, everything else at the widest, and no overrides.

    Weights are on the uniform grid, the one that has every width.
    """
    return dataclasses.replace(
        quant,
        weight_bits=bits,
        act_bits=bits,
        first_last_bits=bits,
        skip_bits=WIDEST,
        weight_grid="uniform",
        overrides={},
    )


class Bench:
    """A network quantised to 8 bits, in which one thing at a time is changed, measured and put back.

    quant: of the run; its widths are not used. counts: weights of every weighted unit, in execution order.
    """

    def __init__(
        self, float_model: nn.Module, spec: InputSpec, quant: QuantConfig, images: HeldOut, device: torch.device
    ) -> None:
        self._images, self._device, self._spec, self._quant = images, device, spec, quant
        self._float_model = place(float_model, device).eval()
        self.float_outcome = self._judge(lambda pixels: self._float_model(spec.normalize(pixels)))
        loss = self.float_outcome.score().cross_entropy
        if not math.isfinite(loss):
            raise TrainingError(
                f"the full-precision network's cross entropy is {loss} on its own training images; "
                "train it again with a lower schedule.fp_learning_rate."
            )
        self._model = self._prepared()
        self.counts = {name: unit.weight.numel() for name, unit in weighted_units(self._model).items()}
        calibrate(self._model, images.calibration)
        self.baseline = self._judge(self._model.eval())

    def layers(self, names: Sequence[str], progress: Progress) -> tuple[Sensitivity, ...]:
        """The weights of each of these units alone at every narrower width."""
        return self._sensitivities("weights", names, self.counts, self._at_weight_bits, progress)

    def activations(self, progress: Progress) -> tuple[Sensitivity, ...]:
        """Every output that an override can narrow alone, at every narrower width; calibrated anew each time."""
        narrowest = all_at(self._quant, NARROWER[0])
        units = prepare(self._float_model, narrowest, self._spec).units()
        names = [name for name, unit in units.items() if any(output.bits != WIDEST for output in unit.outputs)]
        return self._sensitivities("activations", names, dict.fromkeys(names, 0), self._at_activation_bits, progress)

    def networks(self, named: Mapping[str, Mapping[str, int]], progress: Progress) -> tuple[NetworkScore, ...]:
        """Whole networks by name -> unit -> weight bits, each calibrated as a whole."""
        found = []
        for done, (name, bits) in enumerate(named.items()):
            progress("networks", done, len(named))
            model = copy.deepcopy(self._model)
            for unit_name, unit in weighted_units(model).items():
                unit.weight_quantizer = _quantizer(unit, bits[unit_name])
            calibrate(model, self._images.calibration)
            outcome = self._judge(model.eval())
            found.append(
                NetworkScore(
                    name=name,
                    bits=dict(bits),
                    size=packed_size(self.counts, bits),
                    score=outcome.score(),
                    change=outcome.less(self.baseline),
                )
            )
        progress("networks", len(named), len(named))
        return tuple(found)

    def _sensitivities(
        self,
        what: str,
        names: Sequence[str],
        counts: Mapping[str, int],
        measure: Callable[[str, int], _Outcome | None],
        progress: Progress,
    ) -> tuple[Sensitivity, ...]:
        """measure: None where that width cannot be had alone."""
        changes: dict[str, dict[int, Change]] = {}
        tasks = [(name, bits) for name in names for bits in NARROWER]
        for done, (name, bits) in enumerate(tasks):
            progress(what, done, len(tasks))
            outcome = measure(name, bits)
            if outcome is not None:
                changes.setdefault(name, {})[bits] = outcome.less(self.baseline)
        progress(what, len(tasks), len(tasks))
        return tuple(Sensitivity(name=name, weights=counts[name], changes=found) for name, found in changes.items())

    def _at_weight_bits(self, name: str, bits: int) -> _Outcome:
        unit = weighted_units(self._model)[name]
        before, unit.weight_quantizer = unit.weight_quantizer, _quantizer(unit, bits)
        set_weight_steps(unit)
        try:
            return self._judge(self._model)
        finally:
            unit.weight_quantizer = before

    def _at_activation_bits(self, name: str, bits: int) -> _Outcome | None:
        model = self._prepared({escape(name): {"act_bits": bits}})
        if all(output.bits == WIDEST for unit in model.units().values() for output in unit.outputs):
            return None  # it shares its scale with others, which keep it wide
        calibrate(model, self._images.calibration)
        return self._judge(model.eval())

    def _prepared(self, overrides: Mapping[str, Mapping[str, int]] | None = None) -> QuantizedModel:
        quant = dataclasses.replace(all_at(self._quant, WIDEST), overrides=overrides or {})
        model = fold_batch_norm(prepare(self._float_model, quant, self._spec))
        place(model, self._device)
        return model

    @torch.no_grad()
    def _judge(self, network: Callable[[Tensor], Tensor]) -> _Outcome:
        losses, correct = [], []
        for batch in self._images.measured:
            logits, labels = network(batch.images[0]), batch.labels.to(self._device)
            losses.append(F.cross_entropy(logits.double(), labels, reduction="none").cpu())
            correct.append((logits.argmax(1) == labels).double().cpu())
        return _Outcome(torch.cat(losses), torch.cat(correct))


def _quantizer(unit: WeightedUnit, bits: int) -> AnyWeightQuantizer:
    """Another quantiser for the unit's weight, its steps yet to be found."""
    return choose_weight_quantizer(unit.weight, bits, "uniform").to(unit.weight.device)


def _standard_error(values: Tensor) -> float:
    """Of the mean of float64 [n], n > 1."""
    return float(values.std(unbiased=True)) / math.sqrt(len(values))
